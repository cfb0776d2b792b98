//! Files of `torch.save`: an archive, or the older row of pickles with the tensors' bytes behind them.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use half::{bf16, f16};
use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Id, Object, Pickle, PickleError};
use super::weights::{Content, Entry};

/// How the older form begins: a pickle of this number (torch/serialization.py, `MAGIC_NUMBER`).
const LEGACY_MAGIC: [u8; 13] = [0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];
/// Dictionaries within dictionaries that are looked into.
const MAX_DEPTH: usize = 8;
/// Longest name of a tensor's place within dictionaries, in bytes.
const MAX_PLACE: usize = 1000;

/// Why a file cannot be read.
#[derive(Debug)]
pub(super) enum TorchError {
    /// The system says so.
    Io(io::Error),
    /// It begins as such a file, and does not go on as one.
    Damaged(String),
    /// It is intact, and something else: what, and what to do instead.
    Foreign(String, &'static str),
}

impl From<io::Error> for TorchError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("it ends too early".into()),
            // What an archive's checksums say.
            io::ErrorKind::InvalidData => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

impl From<PickleError> for TorchError {
    fn from(error: PickleError) -> Self {
        match error {
            PickleError::Io(error) => error.into(),
            PickleError::Form(reason) => Self::Damaged(format!("its pickle: {reason}")),
            PickleError::Large(what) => Self::Foreign(
                format!("a checkpoint that has {what} beside its tensors, such as logs or arrays"),
                "load it in PyTorch and save the weights alone, as torch.save(model.state_dict(), \"weights.pth\")",
            ),
        }
    }
}

impl From<ZipError> for TorchError {
    fn from(error: ZipError) -> Self {
        match error {
            ZipError::Io(error) => error.into(),
            error => Self::Damaged(error.to_string()),
        }
    }
}

/// Where a tensor's values lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    storage: String,
    offset: usize,
    stride: Vec<usize>,
}

/// An opened file.
pub(super) struct TorchFile {
    pub(super) pickle: Pickle,
    storages: Storages,
    /// The storage that was read last: several tensors may lie in it.
    last: Option<(String, Vec<u8>)>,
    /// Bytes that tensors may still have: together they have hardly more than the file.
    left: u64,
}

enum Storages {
    /// The archive, and the folder in it that everything lies in.
    Archive(Box<ZipArchive<BufReader<File>>>, String),
    /// Where each storage's bytes begin, and how many they are.
    Row(BufReader<File>, BTreeMap<String, (u64, u64)>),
}

impl TorchFile {
    /// Opens a file whose first bytes are `head`; `None` when it does not begin as `torch.save` does.
    pub(super) fn open(file: File, head: &[u8]) -> Option<Result<Self, TorchError>> {
        let reader = BufReader::new(file);
        if head.starts_with(b"PK") {
            return Some(Self::archive(reader));
        }
        // After the number of the protocol, which every one has since the first.
        let begins = head.first() == Some(&0x80) && head.get(2..2 + LEGACY_MAGIC.len()) == Some(&LEGACY_MAGIC);
        begins.then(|| Self::row(reader))
    }

    fn archive(reader: BufReader<File>) -> Result<Self, TorchError> {
        let left = 2 * reader.get_ref().metadata()?.len();
        let mut archive = ZipArchive::new(reader)?;
        let names: Vec<String> =
            archive.file_names().map(|name| name.map(|name| name.into_owned())).collect::<Result<_, _>>()?;
        if let Some((what, instead)) = super::foreign::archive(&names) {
            return Err(TorchError::Foreign(what, instead));
        }
        let main = names.iter().find(|name| is_in_root(name, "data.pkl"));
        let Some(root) = main.and_then(|name| name.strip_suffix("data.pkl")) else {
            return Err(TorchError::Damaged("it has no data.pkl".into()));
        };
        let order = format!("{root}byteorder");
        if names.contains(&order) {
            let mut text = String::new();
            archive.by_name(&order)?.take(16).read_to_string(&mut text)?;
            if text.trim() == "big" {
                return Err(TorchError::Foreign(
                    "a checkpoint of a big-endian machine".into(),
                    "load it with PyTorch and save it again on a little-endian one",
                ));
            }
        }
        let pickle = Pickle::read(&mut BufReader::new(archive.by_name(&format!("{root}data.pkl"))?))?;
        Ok(Self { pickle, storages: Storages::Archive(Box::new(archive), root.to_owned()), last: None, left })
    }

    fn row(mut reader: BufReader<File>) -> Result<Self, TorchError> {
        // The magic number, and the version of this form.
        for _ in 0..2 {
            Pickle::read(&mut reader)?;
        }
        let system = Pickle::read(&mut reader)?;
        let little = system.entry(system.root(), "little_endian").map(|id| system.get(id));
        if little == Some(&Object::Bool(false)) {
            return Err(TorchError::Foreign(
                "a checkpoint of a big-endian machine".into(),
                "load it with PyTorch and save it again on a little-endian one",
            ));
        }
        let pickle = Pickle::read(&mut reader)?;
        let keys = Pickle::read(&mut reader)?;
        let sizes = element_sizes(&pickle);
        let mut places = BTreeMap::new();
        let end = reader.get_ref().metadata()?.len();
        for key in keys.elements(keys.root()).unwrap_or_default() {
            let Some(key) = keys.text(*key) else {
                return Err(TorchError::Damaged("a storage has a key that is not text".into()));
            };
            let mut count = [0; 8];
            reader.read_exact(&mut count)?;
            let at = reader.stream_position()?;
            let Some(size) = sizes.get(key) else {
                return Err(TorchError::Damaged(format!("nothing says what storage {key:?} holds")));
            };
            let length = u64::from_le_bytes(count).checked_mul(*size);
            let Some(length) = length.filter(|length| at.checked_add(*length).is_some_and(|last| last <= end)) else {
                return Err(TorchError::Damaged("it ends too early".into()));
            };
            places.insert(key.to_owned(), (at, length));
            reader.seek(SeekFrom::Start(at + length))?;
        }
        let left = 2 * end;
        Ok(Self { pickle, storages: Storages::Row(reader, places), last: None, left })
    }

    /// The tensor's values as f32.
    ///
    /// # Errors
    /// When its bytes are not there, or its shape asks for more of them than there are.
    pub(super) fn values(&mut self, shape: &[usize], kind: Float, place: &Place) -> Result<Vec<f32>, TorchError> {
        let count: usize = shape.iter().product();
        if count == 0 {
            return Ok(Vec::new());
        }
        let Some(left) = self.left.checked_sub((count * kind.size()) as u64) else {
            return Err(TorchError::Damaged("its tensors have more bytes than the file".into()));
        };
        self.left = left;
        if self.last.as_ref().is_none_or(|(key, _)| *key != place.storage) {
            // Not both at once.
            self.last = None;
            let bytes = self.storage(&place.storage)?;
            self.last = Some((place.storage.clone(), bytes));
        }
        let bytes = self.last.as_ref().map(|(_, bytes)| bytes.as_slice()).unwrap_or_default();
        let reach = shape.iter().zip(&place.stride).try_fold(place.offset, |reach, (&extent, &stride)| {
            extent.saturating_sub(1).checked_mul(stride).and_then(|more| reach.checked_add(more))
        });
        let size = kind.size();
        // With a stride of 0, a few bytes could stand for any number of values.
        let fits = |reach: usize| reach < bytes.len() / size && count <= bytes.len() / size;
        if !reach.is_some_and(fits) {
            return Err(TorchError::Damaged(format!(
                "storage {:?} has {} bytes; a tensor in it has the shape {shape:?} and begins at element {}",
                place.storage,
                bytes.len(),
                place.offset
            )));
        }
        if is_contiguous(shape, &place.stride) {
            return Ok(kind.widen(&bytes[place.offset * size..][..count * size]));
        }
        let all = kind.widen(bytes);
        let mut index = vec![0; shape.len()];
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            let at = index.iter().zip(&place.stride).map(|(i, stride)| i * stride).sum::<usize>();
            values.push(all[place.offset + at]);
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Ok(values)
    }

    fn storage(&mut self, key: &str) -> Result<Vec<u8>, TorchError> {
        let mut bytes = Vec::new();
        match &mut self.storages {
            Storages::Archive(archive, root) => {
                let name = format!("{root}data/{key}");
                if archive.index_for_name(&name).is_none() {
                    return Err(TorchError::Damaged(format!("it has no {name}, in which a tensor lies")));
                }
                let mut file = archive.by_name(&name)?;
                if file.compression() != CompressionMethod::Stored {
                    return Err(TorchError::Foreign(
                        "a checkpoint whose archive was compressed again".into(),
                        "unpack it and give the file that torch.save wrote, or save it again",
                    ));
                }
                // What is not there is not allocated.
                file.read_to_end(&mut bytes)?;
            }
            Storages::Row(reader, places) => {
                let Some(&(at, length)) = places.get(key) else {
                    return Err(TorchError::Damaged(format!("it has no storage {key:?}, in which a tensor lies")));
                };
                reader.seek(SeekFrom::Start(at))?;
                reader.take(length).read_to_end(&mut bytes)?;
            }
        }
        Ok(bytes)
    }
}

/// Whether `name` is `file` in the one folder of an archive, or in none.
pub(super) fn is_in_root(name: &str, file: &str) -> bool {
    name == file || name.strip_suffix(file).and_then(|root| root.strip_suffix('/')).is_some_and(|r| !r.contains('/'))
}

fn is_contiguous(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(stride).rev().all(|(&extent, &stride)| {
        let fits = extent == 1 || stride == expected;
        expected *= extent;
        fits
    })
}

/// The floats that weights are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    F64,
    F32,
    F16,
    Bf16,
}

impl Float {
    fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// f64 rounds, the others widen exactly.
    pub(super) fn widen(self, bytes: &[u8]) -> Vec<f32> {
        fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            let (chunks, _) = bytes.as_chunks::<N>();
            chunks.iter().map(|chunk| convert(*chunk)).collect()
        }
        match self {
            Self::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Self::F32 => each(bytes, f32::from_le_bytes),
            Self::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }
}

/// A tensor's element type, by its name in PyTorch, and the bytes of an element.
fn element(name: &str) -> Option<(&str, u64)> {
    let name = name.strip_prefix("torch.").or(name.strip_prefix("torch.cuda."))?;
    Some(match name.strip_prefix("cuda.").unwrap_or(name) {
        "DoubleStorage" | "float64" => ("float64", 8),
        "FloatStorage" | "float32" => ("float32", 4),
        "HalfStorage" | "float16" => ("float16", 2),
        "BFloat16Storage" | "bfloat16" => ("bfloat16", 2),
        "LongStorage" | "int64" => ("int64", 8),
        "IntStorage" | "int32" => ("int32", 4),
        "ShortStorage" | "int16" => ("int16", 2),
        "CharStorage" | "int8" => ("int8", 1),
        "ByteStorage" | "uint8" => ("uint8", 1),
        "BoolStorage" | "bool" => ("bool", 1),
        "QInt8Storage" => ("qint8", 1),
        "QUInt8Storage" => ("quint8", 1),
        "QInt32Storage" => ("qint32", 4),
        "ComplexFloatStorage" | "complex64" => ("complex64", 8),
        "ComplexDoubleStorage" | "complex128" => ("complex128", 16),
        "UntypedStorage" | "storage.UntypedStorage" => ("bytes", 1),
        other => (other, 1),
    })
}

/// The name of a float's type as one that is read.
pub(super) fn float(name: &str) -> Option<Float> {
    match name {
        "float64" => Some(Float::F64),
        "float32" => Some(Float::F32),
        "float16" => Some(Float::F16),
        "bfloat16" => Some(Float::Bf16),
        _ => None,
    }
}

/// Bytes of an element of each storage.
fn element_sizes(pickle: &Pickle) -> BTreeMap<String, u64> {
    let mut sizes = BTreeMap::new();
    for id in pickle.ids() {
        if let Object::Persistent(of) = pickle.get(id)
            && let Some(storage) = storage(pickle, *of)
        {
            sizes.insert(storage.0.to_owned(), storage.2);
        }
    }
    sizes
}

/// Key, element type and its bytes: what a persistent object stands for.
fn storage(pickle: &Pickle, of: Id) -> Option<(&str, &str, u64)> {
    let parts = pickle.elements(of)?;
    if pickle.text(*parts.first()?) != Some("storage") {
        return None;
    }
    let (kind, size) = element(pickle.class(*parts.get(1)?)?)?;
    Some((pickle.text(*parts.get(2)?)?, kind, size))
}

/// The tensors in the pickle's dictionaries, by where they stand, and the texts and numbers of the outermost.
pub(super) fn contents(pickle: &Pickle) -> (Vec<Entry<Place>>, BTreeMap<String, String>) {
    let mut walk = Walk { pickle, entries: Vec::new(), seen: HashSet::new() };
    walk.dictionary(pickle.root(), &mut Vec::new());
    let mut metadata = BTreeMap::new();
    for (key, value) in pickle.entries(pickle.root()).unwrap_or_default() {
        let value = match pickle.get(*value) {
            Object::Text(text) => text.clone(),
            Object::Int(int) => int.to_string(),
            Object::Float(float) => float.to_string(),
            _ => continue,
        };
        if let Some(key) = pickle.text(*key) {
            metadata.insert(plain(key), plain(&value));
        }
    }
    (walk.entries, metadata)
}

/// `text` without what a terminal would take for commands.
pub(super) fn plain(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

struct Walk<'a> {
    pickle: &'a Pickle,
    entries: Vec<Entry<Place>>,
    /// Containers that were walked through: one may stand in many places, and in itself.
    seen: HashSet<Id>,
}

/// Most elements of a list that is looked into.
const MAX_LIST: usize = 1000;

impl Walk<'_> {
    fn dictionary(&mut self, id: Id, place: &mut Vec<String>) {
        if place.len() > MAX_DEPTH || !self.seen.insert(id) {
            return;
        }
        let pickle = self.pickle;
        if let Some(elements) = pickle.elements(id).filter(|elements| elements.len() <= MAX_LIST) {
            for (n, value) in elements.iter().enumerate() {
                self.value(n.to_string(), *value, place);
            }
        }
        for &(key, value) in pickle.entries(id).unwrap_or_default() {
            match pickle.get(key) {
                Object::Text(text) => self.value(plain(text), value, place),
                Object::Int(int) => self.value(int.to_string(), value, place),
                _ => {}
            }
        }
    }

    fn value(&mut self, key: String, value: Id, place: &mut Vec<String>) {
        if place.iter().map(String::len).sum::<usize>() + key.len() > MAX_PLACE {
            return;
        }
        let found = if key.ends_with("_packed_params") {
            Some((Vec::new(), Content::Other("quantized".into())))
        } else {
            tensor(self.pickle, value, 0)
        };
        if let Some((shape, content)) = found {
            self.entries.push(Entry { dictionary: place.clone(), name: key, shape, content });
            return;
        }
        // Of something that is no tensor, in case that one is wanted here.
        let content = Content::Plain(match self.pickle.get(value) {
            Object::None => "None",
            Object::Bool(_) | Object::Int(_) | Object::Float(_) => "number",
            Object::Text(_) => "text",
            Object::Tuple(_) | Object::List(_) => "list",
            _ => "object",
        });
        self.entries.push(Entry { dictionary: place.clone(), name: key.clone(), shape: Vec::new(), content });
        place.push(key);
        self.dictionary(value, place);
        place.pop();
    }
}

/// Wrappers of wrappers around a tensor that are looked into.
const MAX_WRAPPERS: usize = 4;

/// What the functions that `torch.save` names would have rebuilt (torch/_utils.py).
pub(super) fn tensor(pickle: &Pickle, id: Id, depth: usize) -> Option<(Vec<usize>, Content<Place>)> {
    let Object::Made { by, arguments, .. } = pickle.get(id) else { return None };
    rebuilt(pickle, pickle.class(*by)?, *arguments, depth)
}

fn rebuilt(pickle: &Pickle, by: &str, arguments: Id, depth: usize) -> Option<(Vec<usize>, Content<Place>)> {
    let arguments = pickle.elements(arguments)?;
    let nth = |n: usize| arguments.get(n).copied();
    let other = |shape: Option<Vec<usize>>, what: &str| Some((shape.unwrap_or_default(), Content::Other(what.into())));
    if depth > MAX_WRAPPERS {
        return None;
    }
    match by.rsplit('.').next()? {
        "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" => {
            let (shape, stride) = (pickle.sizes(nth(2)?)?, pickle.sizes(nth(3)?)?);
            let Object::Persistent(of) = pickle.get(nth(0)?) else { return None };
            let (key, mut kind, _) = storage(pickle, *of)?;
            // The storage of the newest form holds bytes; the tensor says of what.
            if by.ends_with("_v3") {
                kind = pickle.class(nth(6)?).and_then(element)?.0;
            }
            let offset = usize::try_from(pickle.int(nth(1)?)?).ok()?;
            let marked = |mark| nth(6).and_then(|id| pickle.entry(id, mark)).map(|id| pickle.get(id));
            if [marked("neg"), marked("conj")].contains(&Some(&Object::Bool(true))) {
                return other(Some(shape), "tensor that stands for its negative or conjugate");
            }
            if stride.len() != shape.len() {
                return other(Some(shape), "tensor whose strides do not fit its shape");
            }
            let Some(float) = float(kind) else { return other(Some(shape), kind) };
            Some((shape, Content::Float(float, Place { storage: key.to_owned(), offset, stride })))
        }
        "_rebuild_parameter"
        | "_rebuild_parameter_with_state"
        | "Parameter"
        | "_rebuild_device_tensor_from_cpu_tensor" => tensor(pickle, nth(0)?, depth + 1),
        "_rebuild_from_type_v2" => rebuilt(pickle, pickle.class(nth(0)?)?, nth(2)?, depth + 1),
        "_rebuild_qtensor" => other(pickle.sizes(nth(2)?), "quantized"),
        "_rebuild_sparse_tensor" => other(None, "sparse"),
        "_rebuild_meta_tensor_no_storage" => other(pickle.sizes(nth(1)?), "meta"),
        "_reconstruct" if by.contains("multiarray") => other(None, "numpy array"),
        _ => None,
    }
}
