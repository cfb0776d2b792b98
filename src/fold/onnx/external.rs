//! Weights that lie in files of their own, as protobuf's messages of at most 2 GiB make necessary.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use super::network::quoted;
use super::proto::{Graph, Node, StringEntry, Tensor, kind};
use super::value::Value;
use super::wire::{MAX_MESSAGE, Message};
use super::{Network, OnnxError};
use crate::bundle::DIGEST_KEY;

/// Most bytes of weights that a network's own file holds: room is left for everything else.
const MOST_WITHIN: u64 = MAX_MESSAGE as u64 - (64 << 20);
/// Bytes of a weight from which it may lie in another file.
const LEAST_APART: usize = 1 << 10;
/// A file with weights ends before the weight that would make it longer.
const MOST_IN_A_FILE: u64 = 1 << 30;
/// Weights begin at multiples of it, so that they can be mapped.
const ALIGNMENT: u64 = 4096;
/// A tensor's `data_location` when its values lie in another file.
const EXTERNAL: i32 = 1;

/// A file with weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Its name.
    pub name: String,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// Writes weights one after the other, into as many files as it takes.
struct DataWriter<'a> {
    folder: &'a Path,
    prefix: &'a str,
    open: Option<(File, Sha256, u64)>,
    done: Vec<DataFile>,
}

impl DataWriter<'_> {
    /// Writes `bytes`; gives the name of their file and where in it they begin.
    fn put(&mut self, bytes: &[u8]) -> io::Result<(String, u64)> {
        let length = bytes.len() as u64;
        if self.open.as_ref().is_some_and(|(.., at)| at.next_multiple_of(ALIGNMENT) + length > MOST_IN_A_FILE) {
            self.close()?;
        }
        let name = format!("{}{}", self.prefix, self.done.len());
        if self.open.is_none() {
            self.open = Some((File::create_new(self.folder.join(&name))?, Sha256::new(), 0));
        }
        let (file, digest, at) = self.open.as_mut().ok_or_else(|| io::Error::other("no file is open"))?;
        let begin = at.next_multiple_of(ALIGNMENT);
        let gap = vec![0; (begin - *at) as usize];
        for part in [&gap, bytes] {
            digest.update(part);
            file.write_all(part)?;
        }
        *at = begin + length;
        Ok((name, begin))
    }

    fn close(&mut self) -> io::Result<()> {
        let Some((file, digest, _)) = self.open.take() else { return Ok(()) };
        file.sync_all()?;
        let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        self.done.push(DataFile { name: format!("{}{}", self.prefix, self.done.len()), sha256 });
        Ok(())
    }
}

impl Network {
    /// Where weights lie that are not within.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether all weights fit into the network's own file.
    pub fn fits_within(&self) -> bool {
        self.bytes_of_weights() <= MOST_WITHIN
    }

    fn bytes_of_weights(&self) -> u64 {
        let bytes = |tensor: &Tensor| match self.external(tensor) {
            Ok((_, _, length)) if tensor.is_external() => length,
            _ => Message::len(tensor) as u64,
        };
        self.graph().initializer.iter().map(bytes).sum()
    }

    /// Brings weights that lie in other files into this one: all of them where they fit, else those that only this program
    /// finds, within nodes and graphs within those.
    ///
    /// # Errors
    /// When one cannot be read, or those within nodes do not fit.
    pub fn gather(&mut self) -> Result<(), OnnxError> {
        let fits = self.fits_within();
        let mut graph = std::mem::take(self.graph_mut());
        let gathered = self.gather_graph(&mut graph, &mut MOST_WITHIN.clone(), fits);
        *self.graph_mut() = graph;
        gathered
    }

    fn gather_graph(&self, graph: &mut Graph, left: &mut u64, weights: bool) -> Result<(), OnnxError> {
        if weights {
            graph.initializer.iter_mut().try_for_each(|tensor| self.gather_tensor(tensor, left))?;
        }
        for node in &mut graph.node {
            let tensors = node.attribute.iter_mut().filter_map(|attribute| attribute.t.as_mut());
            tensors.into_iter().try_for_each(|tensor| self.gather_tensor(tensor, left))?;
            node.graphs_mut().try_for_each(|graph| self.gather_graph(graph, left, true))?;
        }
        Ok(())
    }

    fn gather_tensor(&self, tensor: &mut Tensor, left: &mut u64) -> Result<(), OnnxError> {
        if !tensor.is_external() {
            return Ok(());
        }
        let length = self.external(tensor)?.2;
        *left = left.checked_sub(length).ok_or_else(|| {
            OnnxError::Refused(format!(
                "constants within its nodes take more than {MOST_WITHIN} bytes, which one file cannot hold: export it \
                 with its weights as initialisers"
            ))
        })?;
        tensor.raw_data = Some(self.external_bytes(tensor)?.into());
        tensor.external_data.clear();
        tensor.data_location = None;
        Ok(())
    }

    /// Moves weights of 1 KiB and more into files in `folder`, whose names are `prefix` and a number.
    ///
    /// # Errors
    /// When one cannot be read or written.
    pub fn move_weights(&mut self, folder: &Path, prefix: &str) -> Result<Vec<DataFile>, OnnxError> {
        let mut writer = DataWriter { folder, prefix, open: None, done: Vec::new() };
        let write = |cause| OnnxError::Read { path: folder.to_owned(), cause };
        let mut graph = std::mem::take(self.graph_mut());
        let moved: Result<(), OnnxError> = graph.initializer.iter_mut().try_for_each(|tensor| {
            let bytes = match &tensor.raw_data {
                _ if tensor.is_external() => Cow::Owned(self.external_bytes(tensor)?),
                Some(raw) if raw.len() >= LEAST_APART => Cow::Borrowed(&**raw),
                // Of values in a field of their type, only those of 32-bit floats are known to be large.
                None if tensor.float_data.0.len() * 4 >= LEAST_APART => {
                    Cow::Owned(tensor.float_data.0.iter().flat_map(|value| value.to_le_bytes()).collect())
                }
                _ => return Ok(()),
            };
            let length = bytes.len();
            let (name, begin) = writer.put(&bytes).map_err(write)?;
            let entry = |key: &str, value: String| StringEntry {
                key: Some(key.into()),
                value: Some(value),
                unknown: Vec::new(),
            };
            tensor.external_data =
                vec![entry("location", name), entry("offset", begin.to_string()), entry("length", length.to_string())];
            tensor.data_location = Some(EXTERNAL);
            tensor.raw_data = None;
            tensor.float_data.0 = Vec::new();
            Ok(())
        });
        *self.graph_mut() = graph;
        moved?;
        writer.close().map_err(write)?;
        folder.clone_into(&mut self.folder);
        Ok(writer.done)
    }

    /// Has the network's own file name the digests of `files`, and no others, so that its digest stands for theirs.
    pub fn name_digests(&mut self, files: &[DataFile]) {
        let is_digest = |entry: &StringEntry| entry.key.as_deref().is_some_and(|key| key.starts_with(DIGEST_KEY));
        self.model.metadata_props.retain(|entry| !is_digest(entry));
        for file in files {
            self.model.metadata_props.push(StringEntry {
                key: Some(format!("{DIGEST_KEY}{}", file.name)),
                value: Some(file.sha256.clone()),
                unknown: Vec::new(),
            });
        }
    }

    /// The files beside the network's own that it names, in order.
    ///
    /// # Errors
    /// When a weight lies where it cannot be read.
    pub fn data_files(&self) -> Result<Vec<PathBuf>, OnnxError> {
        let external = self.graph().initializer.iter().filter(|tensor| tensor.is_external());
        let mut files: Vec<PathBuf> =
            external.map(|tensor| Ok(self.external(tensor)?.0)).collect::<Result<_, OnnxError>>()?;
        files.sort();
        files.dedup();
        Ok(files)
    }

    /// The network with each 32-bit float of its weights replaced; they lie within.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub(crate) fn with_floats(mut self, by: &mut dyn FnMut(f32) -> f32) -> Result<Self, OnnxError> {
        let mut graph = std::mem::take(self.graph_mut());
        for tensor in &mut graph.initializer {
            if tensor.data_type != Some(kind::FLOAT) {
                continue;
            }
            if tensor.is_external() {
                self.gather_tensor(tensor, &mut u64::MAX.clone())?;
            }
            tensor.float_data.0.iter_mut().for_each(|value| *value = by(*value));
            if let Some(raw) = &tensor.raw_data {
                let (values, _) = raw.as_chunks::<4>();
                let moved: Vec<u8> = values.iter().flat_map(|&v| by(f32::from_le_bytes(v)).to_le_bytes()).collect();
                tensor.raw_data = Some(moved.into());
            }
        }
        *self.graph_mut() = graph;
        Ok(self)
    }

    /// Whether every tensor, in nodes and graphs within them, too, has as many bytes as its shape says.
    pub(super) fn fills<'a>(&self, tensors: &[Tensor], nodes: impl Iterator<Item = &'a Node>) -> Result<(), OnnxError> {
        tensors.iter().try_for_each(|tensor| self.fills_its_shape(tensor))?;
        for node in nodes {
            node.attribute.iter().filter_map(|a| a.t.as_ref()).try_for_each(|tensor| self.fills_its_shape(tensor))?;
            for graph in node.graphs() {
                self.fills(&graph.initializer, graph.node.iter())?;
            }
        }
        Ok(())
    }

    fn fills_its_shape(&self, tensor: &Tensor) -> Result<(), OnnxError> {
        let each = match tensor.data_type.unwrap_or_default() {
            kind::DOUBLE | kind::INT64 => 8,
            kind::FLOAT | kind::INT32 | kind::UINT32 => 4,
            kind::INT16 | kind::UINT16 => 2,
            kind::INT8 | kind::UINT8 | kind::BOOL => 1,
            // Other types are for the runtime to read.
            _ if tensor.is_external() => return self.external(tensor).map(|_| ()),
            _ => return Ok(()),
        };
        let count = tensor.dims.iter().try_fold(1u64, |count, &d| count.checked_mul(u64::try_from(d).ok()?));
        let typed = [
            tensor.float_data.0.len(),
            tensor.int32_data.0.len(),
            tensor.int64_data.0.len(),
            tensor.double_data.0.len(),
            tensor.uint64_data.0.len(),
        ];
        let found = match &tensor.raw_data {
            _ if tensor.is_external() => self.external(tensor)?.2,
            Some(raw) => raw.len() as u64,
            None => typed.iter().sum::<usize>() as u64 * each,
        };
        match count.and_then(|count| count.checked_mul(each)) {
            Some(expected) if expected == found => Ok(()),
            _ => OnnxError::refused(format!(
                "its weight {} has the shape {:?}, but {found} bytes: the file is damaged, or of another export",
                quoted(tensor.name()),
                tensor.dims
            )),
        }
    }

    /// Where the values of an external tensor lie: file, first byte, number of bytes.
    fn external(&self, tensor: &Tensor) -> Result<(PathBuf, u64, u64), OnnxError> {
        let name = quoted(tensor.name());
        let entry = |key: &str| {
            tensor.external_data.iter().rfind(|e| e.key.as_deref() == Some(key)).and_then(|e| e.value.as_deref())
        };
        let number = |key: &str| match entry(key).map(str::parse::<u64>) {
            None => Ok(None),
            Some(Ok(number)) => Ok(Some(number)),
            Some(Err(_)) => {
                OnnxError::refused(format!("the {key} of its weight {name} is not a number: the file is damaged"))
            }
        };
        let Some(location) = entry("location") else {
            return OnnxError::refused(format!("its weight {name} lies in another file, but it does not say in which"));
        };
        let relative = Path::new(location);
        if location.is_empty() || !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
        {
            return OnnxError::refused(format!(
                "its weight {name} lies in {}, outside of the network's folder: put both into one folder and export \
                 again",
                quoted(location)
            ));
        }
        let path = self.folder.join(relative);
        let metadata = fs::metadata(&path).map_err(|cause| {
            OnnxError::Refused(format!(
                "its weight {name} lies in {}, which cannot be read: {cause}: copy it beside the network",
                path.display()
            ))
        })?;
        // A link may lead out of the folder, to what is not the network's.
        let inside = fs::canonicalize(&path).ok().zip(fs::canonicalize(&self.folder).ok());
        if !metadata.is_file() || !inside.is_some_and(|(path, folder)| path.starts_with(folder)) {
            return OnnxError::refused(format!(
                "its weight {name} lies in {}, which is not a file in the network's folder: copy it there",
                quoted(location)
            ));
        }
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or_else(|| metadata.len().saturating_sub(offset));
        if offset.checked_add(length).is_none_or(|end| end > metadata.len()) {
            return OnnxError::refused(format!(
                "its weight {name} ends at byte {}; {} has {}: it is cut off, or of another export",
                offset.saturating_add(length),
                path.display(),
                metadata.len()
            ));
        }
        Ok((path, offset, length))
    }

    /// The bytes of a tensor that lies in another file.
    pub(crate) fn external_bytes(&self, tensor: &Tensor) -> Result<Vec<u8>, OnnxError> {
        let (path, offset, length) = self.external(tensor)?;
        let read = |cause| OnnxError::Read { path: path.clone(), cause };
        let mut file = File::open(&path).map_err(read)?;
        file.seek(SeekFrom::Start(offset)).map_err(read)?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes).map_err(read)?;
        Ok(bytes)
    }

    /// The values of a constant; none when its type is not one that is held.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(crate) fn value_of(&self, tensor: &Tensor) -> Result<Option<Value>, OnnxError> {
        let external =
            if tensor.is_external() { Cow::Owned(self.external_bytes(tensor)?) } else { Cow::Borrowed(&[][..]) };
        Ok(Value::of(tensor, tensor.is_external().then_some(&*external)))
    }
}
