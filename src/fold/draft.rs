//! A bundle that is being made, beside the place that it will have.

use std::fs;
use std::path::{Path, PathBuf};

use super::FoldError;
use super::onnx::{DataFile, Network, OnnxError};
use crate::bundle::{BUNDLE_FILES, DATA_FILE, FileDigest, MANIFEST_FILE, MODEL_FILE, Manifest, is_data_file};
use crate::files::{draft_of, foreign, name_of_draft, remove_own, replace, replace_folder};
use crate::runtime::NetworkSource;

/// Its folder is made when something is written, and is removed with what this program wrote unless the bundle is published.
pub(super) struct Draft {
    out: PathBuf,
    folder: PathBuf,
    /// Whether weights have files of their own, however few they are.
    always_apart: bool,
    data: Vec<DataFile>,
}

impl Draft {
    /// The draft of a bundle at `out`.
    pub(super) fn of(out: &Path, always_apart: bool) -> Self {
        Self { out: out.to_owned(), folder: draft_of(out), always_apart, data: Vec::new() }
    }

    /// Puts the network's weights into files here if its own file cannot hold them, or if they are to be there.
    ///
    /// # Errors
    /// When a weight cannot be read or written.
    pub(super) fn hold(&mut self, network: &mut Network) -> Result<(), FoldError> {
        let fail = |cause: OnnxError| FoldError::Onnx { path: self.out.clone(), cause };
        network.gather().map_err(fail)?;
        if !network.fits_within() || self.always_apart {
            self.make()?;
            self.data = network.move_weights(&self.folder, DATA_FILE).map_err(fail)?;
        }
        network.name_digests(&self.data);
        Ok(())
    }

    /// What the runtime opens a network of these weights from.
    pub(super) fn source<'a>(&'a self, graph: &'a [u8]) -> NetworkSource<'a> {
        NetworkSource { graph, folder: (!self.data.is_empty()).then_some(&self.folder) }
    }

    /// Its files with weights.
    pub(super) fn data(&self) -> Vec<FileDigest> {
        let digest = |file: &DataFile| FileDigest { file: file.name.clone(), sha256: file.sha256.clone() };
        self.data.iter().map(digest).collect()
    }

    /// Puts the bundle in its place as a whole, so that no reader sees half of it and a full disk leaves what was there.
    ///
    /// # Errors
    /// When it cannot be written; what was there stays.
    pub(super) fn publish(self, manifest: &Manifest, model: &[u8]) -> Result<(), FoldError> {
        let text = serde_json::to_string_pretty(manifest).map_err(|error| FoldError::Input(error.to_string()))?;
        let own = own_files(&self.out);
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        self.make()?;
        let write = || {
            replace(&self.folder.join(MODEL_FILE), model)?;
            replace(&self.folder.join(MANIFEST_FILE), (text + "\n").as_bytes())?;
            replace_folder(&self.folder, &self.out, &own)
        };
        write().map_err(|cause| FoldError::File { path: self.out.clone(), cause })
    }

    fn make(&self) -> Result<(), FoldError> {
        if self.folder.is_dir() {
            return Ok(());
        }
        let parent = self.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |cause| FoldError::File { path, cause }
        };
        fs::create_dir_all(parent).map_err(fail(parent))?;
        fs::create_dir(&self.folder).map_err(fail(&self.out))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // A published one has another name by now.
        let own = own_files(&self.folder);
        remove_own(&self.folder, &own.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// Names of the files that a bundle in `folder` may hold: its own, and the drafts of them that ended runs have left.
pub(super) fn own_files(folder: &Path) -> Vec<String> {
    let is_own = |name: &str| BUNDLE_FILES.contains(&name) || is_data_file(name);
    let mut own: Vec<String> = foreign(folder, &BUNDLE_FILES)
        .into_iter()
        .filter(|name| is_own(name) || name_of_draft(name).is_some_and(is_own))
        .collect();
    own.extend(BUNDLE_FILES.map(str::to_owned));
    own
}
