//! Where the images come from: files, folders, a list.

use std::fs::{self, File};
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use crate::pixels::{ENDINGS, has_picture_ending};

/// An input that cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Not there, or not readable.
    #[error("{path}: {cause}")]
    Io {
        /// The input.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A folder without a picture.
    #[error("{}: the folder holds no file that ends in .{}", .0.display(), ENDINGS.join(", ."))]
    NoImages(PathBuf),
}

/// The files that `inputs` stand for: a file is itself, whatever its name and even when it is missing, which its row will
/// tell; a folder is every picture in it and below, by name.
///
/// # Errors
/// When a folder cannot be read or holds no picture.
pub fn expand(inputs: &[PathBuf]) -> Result<Vec<PathBuf>, SourceError> {
    let mut files = Vec::new();
    for input in inputs {
        if !input.is_dir() {
            files.push(input.clone());
            continue;
        }
        let before = files.len();
        walk(input, &mut files)?;
        if files.len() == before {
            return Err(SourceError::NoImages(input.clone()));
        }
    }
    Ok(files)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), SourceError> {
    let fail = |cause| SourceError::Io { path: folder.to_owned(), cause };
    let mut entries = fs::read_dir(folder).map_err(fail)?.collect::<Result<Vec<_>, _>>().map_err(fail)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // Symbolic links to folders are not followed: they may form a circle.
        if entry.file_type().map_err(fail)?.is_dir() {
            walk(&path, files)?;
        } else if has_picture_ending(&path) {
            files.push(path);
        }
    }
    Ok(())
}

/// One path a line; empty lines are skipped.
///
/// # Errors
/// When the list cannot be read or is not UTF-8.
pub fn from_list(list: impl BufRead) -> Result<Vec<PathBuf>, SourceError> {
    let lines = list.lines().collect::<Result<Vec<_>, _>>();
    let lines = lines.map_err(|cause| SourceError::Io { path: "the list on stdin".into(), cause })?;
    Ok(lines.into_iter().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).map(PathBuf::from).collect())
}

/// A file's bytes, or the sentence that stands in its row.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > limit {
        return Err(format!("the file is larger than {limit} bytes: raise --max-file-mb"));
    }
    Ok(bytes)
}
