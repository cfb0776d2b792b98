//! A file, or an object in a store: where a picture, a list or an archive lies.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::Fault;
use super::objects::{Object, Stores};

/// Bytes of a path or URL in a list, at most. Systems and stores take fewer; rows and resumed runs keep it.
const MAX_PATH: usize = 8192;

#[derive(Debug, Clone)]
pub(in super::super) enum Place {
    File(PathBuf),
    Object(Object),
}

impl Place {
    /// What `text` names: an object when it has a scheme, else a file.
    pub(super) fn of(text: &str, stores: &Stores) -> Result<Self, Fault> {
        Ok(if text.contains("://") { Self::Object(stores.object(text)?) } else { Self::File(text.into()) })
    }

    /// What an entry of the list at this place names.
    pub(super) fn entry(&self, text: &str, stores: &Stores) -> Result<Self, Fault> {
        if text.len() > MAX_PATH {
            let reason = format!("its path has {} bytes; nbn reads paths of up to {MAX_PATH}", text.len());
            return Err(Fault::new("list_entry", reason));
        }
        match self {
            _ if text.contains("://") => Self::of(text, stores),
            Self::File(list) => Ok(Self::File(list.parent().unwrap_or(Path::new("")).join(text))),
            Self::Object(list) => Ok(Self::Object(list.sibling(text)?)),
        }
    }

    /// As it is written in rows; bytes of a path that are no UTF-8 as `\xff`.
    pub(super) fn name(&self) -> String {
        match self {
            Self::File(path) => {
                let chunks = path.as_os_str().as_encoded_bytes().utf8_chunks();
                let text = |chunk: std::str::Utf8Chunk<'_>| {
                    let rest: String = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")).collect();
                    format!("{}{rest}", chunk.valid())
                };
                chunks.map(text).collect()
            }
            Self::Object(object) => object.to_string(),
        }
    }

    /// The name of the folder that it is in.
    pub(super) fn folder(&self) -> Option<String> {
        folder(&self.name())
    }

    /// Bytes, where that is known without reading.
    pub(in super::super) fn size(&self) -> Option<u64> {
        match self {
            // One that is not there takes none.
            Self::File(path) => Some(fs::metadata(path).map_or(0, |metadata| metadata.len())),
            Self::Object(object) => object.size(),
        }
    }

    pub(super) fn open(&self) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::File(path) => Box::new(File::open(path)?),
            Self::Object(object) => Box::new(object.open()?),
        })
    }

    /// All bytes.
    pub(in super::super) fn read(&self, limit: u64) -> Result<Bytes, Fault> {
        let bytes = match self {
            Self::File(path) => {
                // A pipe might never end.
                if !fs::metadata(path)?.is_file() {
                    return Err(Fault::new("file_not_readable", "it is not a regular file"));
                }
                let mut bytes = Vec::new();
                File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
                bytes.into()
            }
            Self::Object(object) => object.read(limit)?,
        };
        if bytes.len() as u64 > limit {
            return Err(Fault::too_large(limit));
        }
        Ok(bytes)
    }
}

/// The last folder of a path or URL.
pub(super) fn folder(name: &str) -> Option<String> {
    let (folders, _) = name.rsplit_once('/')?;
    folders.rsplit('/').next().filter(|folder| !folder.is_empty()).map(str::to_owned)
}
