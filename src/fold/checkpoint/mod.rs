//! Reads a checkpoint into an ordered map of tensors. Nothing in the file is ever run: a pickle is parsed for
//! tensors and plain containers, and every other global in it is skipped.
//!
//! `torch` (over `pickle`) and safetensors give a file's tensors by name, of which `weights` chooses one network's;
//! `foreign` names files that are something else.

mod foreign;
mod names;
mod pickle;
mod roots;
mod torch;
mod weights;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::FoldError;
use torch::{Float, TorchError, TorchFile};
pub use weights::Choice;
use weights::{Chosen, Content, Entry, choose};

/// Most elements of one tensor (4 GiB of f32), before anything is allocated for it.
const MAX_ELEMENTS: usize = 1 << 30;
/// Longest name of a tensor, in bytes.
const MAX_NAME: usize = 500;
/// Highest number in a name: no network has as many blocks or experts, and sums of such numbers cannot overflow.
const MAX_INDEX: usize = 9999;
/// Longest header of safetensors, in bytes, as its own library has it.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes that tell what a file is.
const HEAD: u64 = 512;

/// One weight tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Extents, the outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Values; f16, bf16 and f32 widen exactly, f64 rounds.
    pub values: Vec<f32>,
}

/// The tensors of one network by name, and what else its file says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Checkpoint {
    /// Name → tensor, in torchvision's form, without wrappers' prefixes; the classifier is `fc`. `num_batches_tracked`
    /// counters are left out.
    pub tensors: BTreeMap<String, Tensor>,
    /// Plain strings and numbers beside the weights, such as `arch`, `epoch`, `nbn.*`.
    pub metadata: BTreeMap<String, String>,
    /// Names that differ from the file's own → the file's own, with the dictionaries that they lie in.
    pub names: BTreeMap<String, String>,
    /// Where in the file the network begins, if not at its top: a dictionary, a prefix of names, or both.
    pub root: Option<String>,
    /// What the file holds besides, a few words for each group.
    pub left_out: Vec<String>,
    /// What of it stands among the network's own tensors, and takes no part in its logits.
    pub idle: Vec<String>,
    /// Modules that may be the classifier, if none is known for one.
    pub likely_classifiers: Vec<String>,
    /// Tensors that have a place and are no floats → their element type.
    pub unread: BTreeMap<String, String>,
    /// Whether the classifier is named as that of classifier-balancing's cosine.
    pub is_cosine: bool,
}

impl Checkpoint {
    /// Reads a `torch.save` file or safetensors with the weights of one network.
    ///
    /// # Errors
    /// As [`Self::choose`]; several networks are an error.
    pub fn load(path: &Path) -> Result<Self, FoldError> {
        Self::choose(path, &Choice::default())
    }

    /// Reads a `torch.save` file or safetensors, told apart by content, of which `choice` says what to take.
    ///
    /// # Errors
    /// When the file cannot be read, is neither, holds several networks of which `choice` names none, or holds a tensor that is
    /// not finite or whose name or size is beyond any network's.
    pub fn choose(path: &Path, choice: &Choice) -> Result<Self, FoldError> {
        let unread = |cause| FoldError::File { path: path.to_owned(), cause };
        if path.is_dir() {
            return Err(foreign_file(path, foreign::folder(path)));
        }
        let mut file = File::open(path).map_err(unread)?;
        let mut head = Vec::new();
        (&mut file).take(HEAD).read_to_end(&mut head).map_err(unread)?;
        let checkpoint = if head.get(8) == Some(&b'{') && !head.starts_with(b"PK") {
            read_safetensors(path, choice)?
        } else {
            let file = File::open(path).map_err(unread)?;
            match TorchFile::open(file, &head) {
                Some(opened) => opened
                    .map_err(Failure::from)
                    .and_then(|file| read_torch(file, path, choice))
                    .map_err(|error| error.of(path))?,
                None => return Err(foreign_file(path, foreign::begins(&head, path))),
            }
        };
        checkpoint.check_finite()?;
        Ok(checkpoint)
    }

    /// The file's own name of the tensor that is called `name` here.
    pub fn own_name<'a>(&'a self, name: &'a str) -> &'a str {
        self.names.get(name).map_or(name, String::as_str)
    }

    fn check_finite(&self) -> Result<(), FoldError> {
        for (name, tensor) in &self.tensors {
            if let Some(index) = tensor.values.iter().position(|v| !v.is_finite()) {
                let value = f64::from(tensor.values[index]);
                return Err(FoldError::NotFinite { name: self.own_name(name).to_owned(), index, value });
            }
        }
        Ok(())
    }

    /// What was chosen of `entries`, their values by `read`.
    fn of<P>(
        entries: &[Entry<P>],
        metadata: BTreeMap<String, String>,
        choice: &Choice,
        mut read: impl FnMut(&[usize], Float, &P) -> Result<Vec<f32>, Failure>,
    ) -> Result<Self, Failure> {
        let chosen = choose(entries, choice)?;
        let Chosen { tensors, root, left_out, idle, likely_classifiers, unread, is_cosine, .. } = chosen;
        let mut checkpoint =
            Self { metadata, root, left_out, idle, likely_classifiers, unread, is_cosine, ..Self::default() };
        for (name, n) in tensors {
            let entry = &entries[n];
            check_name(&entry.name)?;
            check_size(&entry.name, &entry.shape)?;
            let Content::Float(kind, place) = &entry.content else { continue };
            let values = read(&entry.shape, *kind, place)?;
            let own = entry.dictionary.iter().chain([&entry.name]).map(String::as_str).collect::<Vec<_>>().join(".");
            if own != name {
                checkpoint.names.insert(name.clone(), own);
            }
            checkpoint.tensors.insert(name, Tensor { shape: entry.shape.clone(), values });
        }
        Ok(checkpoint)
    }
}

/// Why a file is refused, before it is said which.
enum Failure {
    Torch(TorchError),
    Fold(FoldError),
}

impl From<FoldError> for Failure {
    fn from(error: FoldError) -> Self {
        Self::Fold(error)
    }
}

impl From<TorchError> for Failure {
    fn from(error: TorchError) -> Self {
        Self::Torch(error)
    }
}

impl Failure {
    fn of(self, path: &Path) -> FoldError {
        let path = path.to_owned();
        match self {
            Self::Fold(error) => error,
            Self::Torch(TorchError::Io(cause)) => FoldError::File { path, cause },
            Self::Torch(TorchError::Damaged(reason)) => FoldError::Damaged { path, reason },
            Self::Torch(TorchError::Foreign(what, instead)) => FoldError::Foreign { path, what, instead },
        }
    }
}

fn foreign_file(path: &Path, found: Option<(String, &'static str)>) -> FoldError {
    let path = path.to_owned();
    match found {
        Some((what, instead)) => FoldError::Foreign { path, what, instead },
        None => FoldError::NotACheckpoint { path, reason: "it does not begin like either of them".into() },
    }
}

fn read_torch(mut file: TorchFile, path: &Path, choice: &Choice) -> Result<Checkpoint, Failure> {
    let (entries, metadata) = torch::contents(&file.pickle);
    if let Some((what, instead)) = foreign::pickled(&file.pickle, &entries) {
        return Err(TorchError::Foreign(what, instead).into());
    }
    if entries.iter().all(|entry| matches!(entry.content, Content::Plain(_))) {
        return Err(FoldError::NotACheckpoint { path: path.to_owned(), reason: "it holds no tensors".into() }.into());
    }
    Checkpoint::of(&entries, metadata, choice, |shape, kind, place| Ok(file.values(shape, kind, place)?))
}

fn read_safetensors(path: &Path, choice: &Choice) -> Result<Checkpoint, FoldError> {
    let unread = |cause| FoldError::File { path: path.to_owned(), cause };
    let refuse =
        |error: safetensors::SafeTensorError| FoldError::Damaged { path: path.to_owned(), reason: error.to_string() };
    // The header first, so that a file that is none is not read whole.
    let mut file = File::open(path).map_err(unread)?;
    let mut begin = [0; 8];
    file.read_exact(&mut begin).map_err(unread)?;
    let length = u64::from_le_bytes(begin).min(MAX_HEADER);
    let mut head = begin.to_vec();
    (&mut file).take(length).read_to_end(&mut head).map_err(unread)?;
    let described = described(&head[begin.len()..]);
    let expected = described.map(|data| data.saturating_add(length).saturating_add(begin.len() as u64));
    let expected = expected.map_err(|reason| FoldError::Damaged { path: path.to_owned(), reason })?;
    let found = file.metadata().map_err(unread)?.len();
    if found != expected {
        let reason = format!("it has {found} bytes, its header describes {expected}");
        return Err(FoldError::Damaged { path: path.to_owned(), reason });
    }
    let bytes = std::fs::read(path).map_err(unread)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(refuse)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(refuse)?;
    let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut entries: Vec<Entry<&[u8]>> = Vec::new();
    let mut views = tensors.tensors();
    views.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, view) in &views {
        let kind = match view.dtype() {
            Dtype::F64 => Ok(Float::F64),
            Dtype::F32 => Ok(Float::F32),
            Dtype::F16 => Ok(Float::F16),
            Dtype::BF16 => Ok(Float::Bf16),
            other => Err(format!("{other:?}").to_lowercase()),
        };
        let content = match kind {
            Ok(kind) => Content::Float(kind, view.data()),
            Err(kind) => Content::Other(kind),
        };
        entries.push(Entry { dictionary: Vec::new(), name: torch::plain(name), shape: view.shape().to_vec(), content });
    }
    if entries.is_empty() {
        return Err(FoldError::NotACheckpoint { path: path.to_owned(), reason: "it holds no tensors".into() });
    }
    Checkpoint::of(&entries, metadata, choice, |_, kind, bytes| Ok(kind.widen(bytes))).map_err(|error| error.of(path))
}

/// Bytes of tensors that the header of a file of safetensors describes.
fn described(header: &[u8]) -> Result<u64, String> {
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|error| format!("its header is not JSON: {error}"))?;
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    let ends = tensors.filter_map(|(_, tensor)| tensor.get("data_offsets")?.get(1)?.as_u64());
    Ok(ends.max().unwrap_or(0))
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
