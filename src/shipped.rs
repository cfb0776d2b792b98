//! What comes inside the program, so that a first answer needs no other file: the bundle in `models/`, and pictures of
//! classes that it knows, which `examples/pictures/draw.py` draws.

use std::io;
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::bundle::sha256_hex;
use crate::files;

macro_rules! embedded {
    ($folder:literal: $($name:literal),*) => {
        &[$(($name, include_bytes!(concat!("../", $folder, "/", $name)))),*]
    };
}

/// The bundle's place in a model repository.
const BUNDLE: &str = "models/cifar10-lt/2";
const BUNDLE_FILES: &[(&str, &[u8])] = embedded!("models/cifar10-lt/2": "calibration.json", "evaluation.json", "familiarity.safetensors", "manifest.json", "model.onnx");

/// Pictures by file name; the name before the ending is the class.
pub const PICTURES: &[(&str, &[u8])] = embedded!("examples/pictures": "airplane.jpg", "ship.jpg", "truck.jpg");

/// A folder with `models/`, a model repository, and `pictures/`.
#[derive(Debug, Clone)]
pub struct Shipped {
    folder: PathBuf,
}

impl Shipped {
    /// Writes everything into the user's cache folder, or, where there is none, into the folder for temporary files. What
    /// is there already and the same stays.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn place() -> io::Result<Self> {
        let every: Vec<u8> =
            BUNDLE_FILES.iter().chain(PICTURES).flat_map(|(_, content)| content.iter().copied()).collect();
        let name = format!("shipped-{}", &sha256_hex(&every)[..12]);
        let folder = files::cache_folder().unwrap_or_else(|| env::temp_dir().join("nbn")).join(name);
        for (below, contents) in [(BUNDLE, BUNDLE_FILES), ("pictures", PICTURES)] {
            let below = folder.join(below);
            fs::create_dir_all(&below)?;
            for (name, content) in contents {
                place(&below.join(name), content)?;
            }
        }
        Ok(Self { folder })
    }

    /// The model repository.
    #[must_use]
    pub fn models(&self) -> PathBuf {
        self.folder.join("models")
    }

    /// The folder of the pictures.
    #[must_use]
    pub fn pictures(&self) -> PathBuf {
        self.folder.join("pictures")
    }
}

fn place(path: &Path, content: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|there| there == content) { Ok(()) } else { files::replace(path, content) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_that_was_changed_is_written_anew_and_others_are_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for before in [None, Some("old"), Some("new")] {
            if let Some(before) = before {
                fs::write(&path, before).unwrap();
            }
            let file = || fs::metadata(&path).ok().map(|metadata| metadata.ino());
            let written = file();
            place(&path, b"new").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            // A file that is replaced is another one.
            let kept = written == file();
            assert_eq!(kept, before == Some("new"), "{before:?}");
        }
    }
}
