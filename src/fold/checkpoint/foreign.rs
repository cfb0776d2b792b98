//! True names for files that are taken for checkpoints and are something else, and what to do instead.

use std::path::Path;

use super::pickle::{Object, Pickle};
use super::torch::{Place, is_in_root, tensor};
use super::weights::{Content, Entry};

const SAVE_WEIGHTS: &str = "load it with the program that made it and save the weights alone, as \
                            torch.save(model.state_dict(), \"weights.pth\")";
const SAVE_FROM_PYTORCH: &str = "load the network in PyTorch and save torch.save(model.state_dict(), \"weights.pth\"), or export \
                                 it as ONNX";
const EXPORT_ONNX: &str = "export the network as ONNX and give that file";
const UNPACK: &str = "unpack it and give the checkpoint in it";

/// What a file is, and what to do instead.
type Found = (String, &'static str);

/// What a file is that begins with `head`, and neither as `torch.save` nor as safetensors do.
pub(super) fn begins(head: &[u8], path: &Path) -> Option<Found> {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let head = if head.trim_ascii_start().starts_with(b"<") { head.trim_ascii_start() } else { head };
    let found = match head {
        [] => ("an empty file", "copy or download it again"),
        [b'<', ..] => ("a web page", "download the file itself"),
        _ if head.starts_with(b"version https://git-lfs") => {
            ("a Git LFS pointer", "`git lfs pull` fetches the file itself")
        }
        _ if head.starts_with(b"\x89HDF\r\n\x1a\n") => ("an HDF5 file, as Keras writes it", EXPORT_ONNX),
        _ if head.starts_with(b"\x93NUMPY") => ("an array of NumPy", SAVE_FROM_PYTORCH),
        _ if head.starts_with(&[0x1f, 0x8b]) => ("a gzip file", UNPACK),
        _ if head.starts_with(b"BZh") => ("a bzip2 file", UNPACK),
        _ if head.starts_with(b"\xfd7zXZ") => ("an xz file", UNPACK),
        _ if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) => ("a Zstandard file", UNPACK),
        _ if head.starts_with(b"7z\xbc\xaf") => ("a 7z archive", UNPACK),
        _ if head.starts_with(b"Rar!") => ("a RAR archive", UNPACK),
        _ if head.get(257..262) == Some(b"ustar") => (
            "a tar archive",
            "unpack it and give the checkpoint in it (names such as .pth.tar are common for files that are no archives)",
        ),
        _ if head.starts_with(b"GGUF") => ("a GGUF file", SAVE_FROM_PYTORCH),
        _ if head.get(4..8) == Some(b"TFL3") => ("a TensorFlow Lite model", EXPORT_ONNX),
        _ if ending == "index" || ending.starts_with("data-0") => ("a part of a checkpoint of TensorFlow", EXPORT_ONNX),
        _ if ending == "pb" => ("a TensorFlow model", EXPORT_ONNX),
        [b'{' | b'[', ..] if head.windows(12).any(|part| part == b"\"weight_map\"") || ending == "json" => (
            "an index or other JSON, not the weights",
            "give the file with the weights; if they are in several, load the model and save torch.save(model.state_dict(), \
             \"weights.pth\")",
        ),
        [0x80, 2..=5, ..] => ("a pickle, and torch.save did not write it", SAVE_FROM_PYTORCH),
        _ => return None,
    };
    Some((found.0.into(), found.1))
}

/// What an archive with files of these names is, if not one that `torch.save` wrote.
pub(super) fn archive(names: &[String]) -> Option<Found> {
    let has = |file: &str| names.iter().any(|name| is_in_root(name, file));
    let within = |part: &str| names.iter().any(|name| name.starts_with(part) || name.contains(&format!("/{part}")));
    let found = if has("constants.pkl") || (has("data.pkl") && within("code/")) {
        (
            "a TorchScript program (torch.jit.save)".to_owned(),
            "save the weights of the network that it was made from, as torch.save(model.state_dict(), \"weights.pth\"), or \
             torch.save(torch.jit.load(FILE).state_dict(), \"weights.pth\")",
        )
    } else if has("data.pkl") {
        return None;
    } else if has("archive_format") || has("serialized_exported_program.json") || within("models/") {
        (
            "a program of torch.export (.pt2)".to_owned(),
            "save the weights of the network that it was made from, as torch.save(model.state_dict(), \"weights.pth\"), or \
             export it as ONNX",
        )
    } else if !names.is_empty() && names.iter().all(|name| name.ends_with(".npy")) {
        ("an archive of NumPy's arrays (.npz)".to_owned(), SAVE_FROM_PYTORCH)
    } else if has("model.weights.h5") {
        ("a Keras model".to_owned(), EXPORT_ONNX)
    } else if within(".data/") && within("extern_modules") {
        ("a package of torch.package".to_owned(), SAVE_WEIGHTS)
    } else {
        let inside = names.iter().find(|name| !name.ends_with('/')).map_or("nothing", String::as_str);
        let shown: String = inside.chars().take(60).collect();
        let endings = [".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors"];
        let holds_one = names.iter().any(|name| endings.iter().any(|ending| name.ends_with(ending)));
        let instead = if holds_one { UNPACK } else { "give the checkpoint itself" };
        let files = if names.len() == 1 { "1 file".to_owned() } else { format!("{} files", names.len()) };
        (format!("a zip archive of {files} ({shown}, for example), not one of torch.save"), instead)
    };
    Some(found)
}

/// What a folder is.
pub(super) fn folder(path: &Path) -> Option<Found> {
    let has = |name: &str| path.join(name).exists();
    let ends = |ending: &str| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(ending))
    };
    let found = if has(".metadata") || ends(".distcp") {
        (
            "a folder of torch.distributed.checkpoint",
            "make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth",
        )
    } else if has("saved_model.pb") {
        ("a TensorFlow SavedModel", EXPORT_ONNX)
    } else if has("data.pkl") {
        ("an unpacked checkpoint", "give the file that it was unpacked from")
    } else if has("model.safetensors") || has("pytorch_model.bin") {
        ("a folder of Hugging Face's", "give the model.safetensors or pytorch_model.bin in it")
    } else if has("manifest.json") {
        ("a bundle already", "use it as it is, or give its model.onnx to export it again")
    } else {
        ("a folder", "give a file in it")
    };
    Some((found.0.into(), found.1))
}

/// What a pickle of `torch.save` holds, if not tensors in dictionaries.
pub(super) fn pickled(pickle: &Pickle, entries: &[Entry<Place>]) -> Option<Found> {
    let root = pickle.root();
    let class = pickle.class(root).unwrap_or_default();
    if tensor(pickle, root, 0).is_some() {
        return Some(("a single tensor".into(), SAVE_FROM_PYTORCH));
    }
    // Of a list or tuple, what its dictionaries hold.
    let in_list = pickle.elements(root).is_some();
    let is_weight = |entry: &&Entry<Place>| {
        matches!(entry.content, Content::Float(..)) && !(in_list && entry.dictionary.is_empty())
    };
    if entries.iter().any(|entry| is_weight(&entry)) && !is_optimizer(pickle) {
        return None;
    }
    if is_optimizer(pickle) {
        return Some(("an optimizer's state, without a network's weights".into(), SAVE_FROM_PYTORCH));
    }
    if entries.iter().any(|entry| entry.content == Content::Other("numpy array".into())) {
        return Some(("arrays of NumPy, as PaddlePaddle and others save them".into(), SAVE_FROM_PYTORCH));
    }
    let whole = whole_module(pickle);
    match pickle.get(root) {
        Object::Made { .. } if whole.is_none() && pickle.entries(root).is_none() => {
            Some((format!("an object of the class {}", short(class)), SAVE_WEIGHTS))
        }
        Object::List(_) => Some(("a list".into(), SAVE_FROM_PYTORCH)),
        Object::Tuple(_) => Some(("a tuple".into(), SAVE_FROM_PYTORCH)),
        Object::Dict(_) | Object::Made { .. } => {
            let class = whole?;
            Some((
                format!("a whole module of the class {}, which needs its program to be loaded", short(class)),
                "in that program, save the weights alone, as torch.save(model.state_dict(), \"weights.pth\")",
            ))
        }
        _ => Some(("a single value".into(), SAVE_FROM_PYTORCH)),
    }
}

fn short(class: &str) -> String {
    class.chars().take(100).collect()
}

fn is_optimizer(pickle: &Pickle) -> bool {
    let has = |key: &str| pickle.entry(pickle.root(), key).is_some();
    has("param_groups") && has("state")
}

/// The class of the module that the file is, or that it holds in a dictionary.
fn whole_module(pickle: &Pickle) -> Option<&str> {
    let is_module = |id| {
        let Object::Made { state: Some(state), .. } = pickle.get(id) else { return false };
        pickle.entry(*state, "_modules").is_some() && pickle.entry(*state, "_parameters").is_some()
    };
    let values = pickle.entries(pickle.root()).unwrap_or_default().iter().map(|(_, value)| *value);
    std::iter::once(pickle.root()).chain(values).find(|id| is_module(*id)).and_then(|id| pickle.class(id))
}
