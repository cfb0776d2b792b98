//! Reads a checkpoint into an ordered map of tensors. Nothing in the file is ever run: a pickle is parsed for
//! tensors and plain containers, and every other global in it is skipped.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use half::{bf16, f16};
use pytorch_reader::{DType, PickleValue, PytorchError, PytorchReader};
use safetensors::{Dtype, SafeTensors};

use super::FoldError;

/// Most elements of one tensor (4 GiB of f32), before anything is allocated for it.
const MAX_ELEMENTS: usize = 1 << 30;
/// Longest name of a tensor, in bytes.
const MAX_NAME: usize = 500;
/// Highest number in a name: no network has as many blocks or experts, and sums of such numbers cannot overflow.
const MAX_INDEX: usize = 9999;
/// Bytes that tell what a file is.
const HEAD: u64 = 64;
/// Wrapper keys under which training scripts keep the weights.
const WRAPPERS: [&str; 3] = ["state_dict", "model", "model_state_dict"];

/// One weight tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Extents, the outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Values; f16, bf16 and f32 widen exactly, f64 rounds.
    pub values: Vec<f32>,
}

/// The tensors of a checkpoint by name, any `module.` prefix stripped, and its metadata.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Checkpoint {
    /// Name → tensor. `num_batches_tracked` counters are left out.
    pub tensors: BTreeMap<String, Tensor>,
    /// Plain strings and numbers beside the weights, such as `arch`, `epoch`, `nbn.*`.
    pub metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads a `torch.save` file or safetensors, told apart by content.
    ///
    /// # Errors
    /// When the file cannot be read, is neither, or holds a tensor that is no finite float or whose name or size is beyond
    /// any network's.
    pub fn load(path: &Path) -> Result<Self, FoldError> {
        let unread = |cause| FoldError::File { path: path.to_owned(), cause };
        let mut head = Vec::new();
        std::fs::File::open(path).map_err(unread)?.take(HEAD).read_to_end(&mut head).map_err(unread)?;
        let archive = head.starts_with(b"PK");
        let checkpoint = if head.get(8) == Some(&b'{') && !archive {
            read_safetensors(path)?
        } else if let Some(other) = something_else(&head) {
            return Err(FoldError::NotACheckpoint { path: path.to_owned(), reason: other.into() });
        } else {
            read_pytorch(path, archive)?
        };
        checkpoint.tensors.keys().try_for_each(|name| check_name(name))?;
        checkpoint.check_finite()?;
        Ok(checkpoint)
    }

    fn check_finite(&self) -> Result<(), FoldError> {
        for (name, tensor) in &self.tensors {
            if let Some(index) = tensor.values.iter().position(|v| !v.is_finite()) {
                return Err(FoldError::NotFinite { name: name.clone(), index, value: f64::from(tensor.values[index]) });
            }
        }
        Ok(())
    }
}

/// What a download often leaves in a checkpoint's place.
fn something_else(head: &[u8]) -> Option<&'static str> {
    match head {
        [] => Some("it is empty"),
        [b'<', ..] => Some("it is a web page"),
        _ if head.starts_with(b"version https://git-lfs") => {
            Some("it is a Git LFS pointer; `git lfs pull` fetches the file itself")
        }
        _ => None,
    }
}

/// `archive`: the file begins as `torch.save` begins one.
fn read_pytorch(path: &Path, archive: bool) -> Result<Checkpoint, FoldError> {
    let refuse = |error: PytorchError| {
        let reason = match error {
            PytorchError::Io(source) if source.kind() != std::io::ErrorKind::InvalidData => source.to_string(),
            _ if !archive => "it does not begin like either of them".into(),
            error => return FoldError::Damaged { path: path.to_owned(), reason: error.to_string() },
        };
        FoldError::NotACheckpoint { path: path.to_owned(), reason }
    };
    let mut opened = None;
    for key in WRAPPERS {
        match PytorchReader::with_top_level_key(path, key) {
            Ok(reader) if !reader.is_empty() => {
                opened = Some(reader);
                break;
            }
            // Not there, or something else of that name, as a network's name under `model`.
            Ok(_) | Err(PytorchError::KeyNotFound(_) | PytorchError::InvalidFormat(_)) => {}
            Err(error) => return Err(refuse(error)),
        }
    }
    let reader = match opened {
        Some(reader) => reader,
        None => PytorchReader::new(path).map_err(|error| no_dictionary(path).unwrap_or_else(|| refuse(error)))?,
    };
    if reader.is_empty() {
        return Err(FoldError::NotACheckpoint { path: path.to_owned(), reason: "it holds no tensors".into() });
    }
    let mut checkpoint = Checkpoint { metadata: pytorch_metadata(path), ..Checkpoint::default() };
    for (name, tensor) in reader.into_tensors() {
        if is_counter(&name) {
            continue;
        }
        check_size(&name, tensor.shape())?;
        let values = match tensor.dtype() {
            DType::F32 => widen(&read(&tensor, path)?, f32::from_le_bytes),
            DType::F64 => widen(&read(&tensor, path)?, |b| f64::from_le_bytes(b) as f32),
            DType::F16 => widen(&read(&tensor, path)?, |b| f16::from_le_bytes(b).to_f32()),
            DType::BF16 => widen(&read(&tensor, path)?, |b| bf16::from_le_bytes(b).to_f32()),
            other => return Err(FoldError::ElementType { name, dtype: format!("{other:?}").to_lowercase() }),
        };
        let shape = tensor.shape().to_vec();
        checkpoint.tensors.insert(strip(&name), Tensor { shape, values });
    }
    Ok(checkpoint)
}

/// What an intact file holds at its root when that is no dictionary.
fn no_dictionary(path: &Path) -> Option<FoldError> {
    let found = match PytorchReader::read_pickle_data(path, None).ok()? {
        PickleValue::Dict(_) => return None,
        PickleValue::List(_) => "a list".to_owned(),
        PickleValue::Unsupported(class) => format!("an object of the class {class}"),
        _ => "a single value".to_owned(),
    };
    let reason = format!("it holds {found}, not a dictionary of tensors: save the network's `state_dict()`");
    Some(FoldError::NotACheckpoint { path: path.to_owned(), reason })
}

fn read(tensor: &pytorch_reader::Tensor, path: &Path) -> Result<Vec<u8>, FoldError> {
    tensor.read().map_err(|error| FoldError::Damaged { path: path.to_owned(), reason: error.to_string() })
}

/// `epoch`, `arch` and the like; a checkpoint without them is no less a checkpoint.
fn pytorch_metadata(path: &Path) -> BTreeMap<String, String> {
    let Ok(PickleValue::Dict(entries)) = PytorchReader::read_pickle_data(path, None) else {
        return BTreeMap::new();
    };
    let text = |value| match value {
        PickleValue::String(s) => Some(s),
        PickleValue::Int(i) => Some(i.to_string()),
        PickleValue::Float(f) => Some(f.to_string()),
        _ => None,
    };
    entries.into_iter().filter_map(|(key, value)| Some((key, text(value)?))).collect()
}

fn read_safetensors(path: &Path) -> Result<Checkpoint, FoldError> {
    let bytes = std::fs::read(path).map_err(|cause| FoldError::File { path: path.to_owned(), cause })?;
    let refuse =
        |error: safetensors::SafeTensorError| FoldError::Damaged { path: path.to_owned(), reason: error.to_string() };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(refuse)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(refuse)?;
    let mut checkpoint = Checkpoint::default();
    if let Some(metadata) = header.metadata() {
        checkpoint.metadata = metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    }
    for (name, view) in tensors.tensors() {
        if is_counter(&name) {
            continue;
        }
        check_size(&name, view.shape())?;
        let values = match view.dtype() {
            Dtype::F32 => widen(view.data(), f32::from_le_bytes),
            Dtype::F64 => widen(view.data(), |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => widen(view.data(), |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => widen(view.data(), |b| bf16::from_le_bytes(b).to_f32()),
            other => return Err(FoldError::ElementType { name, dtype: format!("{other:?}").to_lowercase() }),
        };
        checkpoint.tensors.insert(strip(&name), Tensor { shape: view.shape().to_vec(), values });
    }
    Ok(checkpoint)
}

fn check_size(name: &str, shape: &[usize]) -> Result<(), FoldError> {
    let elements = shape.iter().fold(1usize, |elements, extent| elements.saturating_mul(*extent));
    if elements > MAX_ELEMENTS {
        return Err(FoldError::Shape {
            name: name.into(),
            found: shape.to_vec(),
            expected: format!("at most {MAX_ELEMENTS} elements"),
        });
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), FoldError> {
    let refuse = |reason: String| Err(FoldError::Name { name: name.chars().take(100).collect(), reason });
    if name.len() > MAX_NAME {
        return refuse(format!("its name has {} bytes; names may have at most {MAX_NAME}", name.len()));
    }
    let numbers = name.split('.').filter(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
    match numbers.into_iter().find(|number| number.parse::<usize>().is_ok_and(|n| n > MAX_INDEX) || number.len() > 10) {
        Some(number) => {
            refuse(format!("its name has the number {number}; blocks and experts are numbered up to {MAX_INDEX}"))
        }
        None => Ok(()),
    }
}

fn widen<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|chunk| convert(*chunk)).collect()
}

fn is_counter(name: &str) -> bool {
    name.ends_with(".num_batches_tracked")
}

fn strip(name: &str) -> String {
    name.strip_prefix("module.").unwrap_or(name).to_owned()
}
