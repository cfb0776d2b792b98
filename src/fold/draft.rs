//! A bundle that is being made, beside the place that it will have.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::FoldError;
use super::onnx::{DataFile, Network, OnnxError};
use crate::bundle::{BUNDLE_FILES, DATA_FILE, FileDigest, MANIFEST_FILE, MODEL_FILE, Manifest, is_data_file};
use crate::files::{draft_of, foreign, name_of_draft, place_folder, remove_own, replace, replace_folder};
use crate::runtime::NetworkSource;
use crate::stop::exit_at_once;

/// Drafts that are older were left by processes that ended.
const STALE: Duration = Duration::from_secs(3600);

/// The drafts that this process is making. Who writes into one holds it.
static OPEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn open() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what this process has written of bundles that are not finished, and ends it with `status`: nothing can be written
/// in between. What is being written is written to its end first.
pub fn remove_drafts_and_exit(status: i32) -> ! {
    let drafts = open();
    drafts.iter().for_each(|folder| remove(folder));
    exit_at_once(status)
}

/// Its folder is made when something is written, and is removed with what this program wrote unless the bundle is published.
pub(super) struct Draft {
    out: PathBuf,
    folder: PathBuf,
    /// Whether weights have files of their own, however few they are.
    always_apart: bool,
    /// Whether a bundle that is there is replaced.
    replaces: bool,
    data: Vec<DataFile>,
    /// Folders above it that were made for it, the outermost last.
    above: Vec<PathBuf>,
}

impl Draft {
    /// The draft of a bundle at `out`.
    pub(super) fn of(out: &Path, always_apart: bool, replaces: bool) -> Self {
        let folder = draft_of(out);
        Self { out: out.to_owned(), folder, always_apart, replaces, data: Vec::new(), above: Vec::new() }
    }

    /// Puts the network's weights into files here if its own file cannot hold them, or if they are to be there.
    ///
    /// # Errors
    /// When a weight cannot be read or written.
    pub(super) fn hold(&mut self, network: &mut Network) -> Result<(), FoldError> {
        let mut open = open();
        let out = self.out.clone();
        let fail = |cause: OnnxError| FoldError::Onnx { path: out.clone(), cause };
        network.gather().map_err(fail)?;
        if !network.fits_within() || self.always_apart {
            self.make(&mut open)?;
            self.data = network.move_weights(&self.folder, DATA_FILE).map_err(fail)?;
        }
        network.name_digests(&self.data);
        Ok(())
    }

    /// What the runtime opens a network of these weights from.
    pub(super) fn source<'a>(&'a self, graph: &'a [u8]) -> NetworkSource<'a> {
        NetworkSource { graph, folder: (!self.data.is_empty()).then_some(&self.folder) }
    }

    /// Where it is made.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
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
        self.publish_with(manifest, model, &[])
    }

    /// As [`Draft::publish`], with other files of a bundle, by name.
    ///
    /// # Errors
    /// When it cannot be written; what was there stays.
    pub(super) fn publish_with(
        mut self,
        manifest: &Manifest,
        model: &[u8],
        others: &[(&str, &[u8])],
    ) -> Result<(), FoldError> {
        let text = serde_json::to_string_pretty(manifest).map_err(|error| FoldError::Input(error.to_string()))?;
        let own = own_files(&self.out);
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        let mut open = open();
        self.make(&mut open)?;
        let write = || {
            replace(&self.folder.join(MODEL_FILE), model)?;
            others.iter().try_for_each(|(name, bytes)| replace(&self.folder.join(name), bytes))?;
            replace(&self.folder.join(MANIFEST_FILE), (text + "\n").as_bytes())?;
            // Another process may have put one there meanwhile.
            if self.replaces {
                replace_folder(&self.folder, &self.out, &own)
            } else {
                place_folder(&self.folder, &self.out)
            }
        };
        write().map_err(|cause| FoldError::File { path: self.out.clone(), cause })?;
        self.above.clear();
        Ok(())
    }

    fn make(&mut self, open: &mut BTreeSet<PathBuf>) -> Result<(), FoldError> {
        if self.folder.is_dir() {
            return Ok(());
        }
        let parent = self.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |cause| FoldError::File { path, cause }
        };
        self.above = parent.ancestors().take_while(|above| !above.exists()).map(Path::to_owned).collect();
        fs::create_dir_all(parent).map_err(fail(parent))?;
        sweep(parent, &self.out);
        open.insert(self.folder.clone());
        fs::create_dir(&self.folder).map_err(fail(&self.out))
    }
}

/// Removes the drafts of `out` that killed processes have left in `folder`.
fn sweep(folder: &Path, out: &Path) {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|found| found.modified()).ok().and_then(|time| time.elapsed().ok());
        let is_draft = entry.file_name().to_str().and_then(name_of_draft).is_some_and(|of| of == name);
        if is_draft && age.is_some_and(|age| age > STALE) {
            remove(&entry.path());
        }
    }
}

/// Removes a draft's own files, and its folder when nothing else is in it.
fn remove(folder: &Path) {
    let own = own_files(folder);
    remove_own(folder, &own.iter().map(String::as_str).collect::<Vec<_>>());
}

impl Drop for Draft {
    fn drop(&mut self) {
        let mut open = open();
        // A published one has another name by now.
        remove(&self.folder);
        open.remove(&self.folder);
        // What is not empty stays.
        self.above.iter().for_each(|folder| {
            let _ = fs::remove_dir(folder);
        });
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
