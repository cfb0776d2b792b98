//! Networks as ONNX Runtime has optimised them, kept on disk.
//!
//! Opening a network costs an optimisation pass and, per session, a copy of its weights. The runtime can write the
//! optimised graph with its weights in a side file; opened from there, the weights are mapped and shared by all
//! sessions and processes. An entry is named by everything that it depends on: the network's SHA-256, the runtime's
//! build, the processor's features, and the provider with its precision and options. It is made in a folder of its own and
//! renamed into place, and never changed afterwards. Whoever can write the cache can change what runs.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::model::{builder, commit, optimised};
use super::{Library, NetworkSource, OnnxModel, RuntimeError, SessionOptions};
use crate::files::{draft_of, name_of_draft, place_folder, remove_own, replace};

const GRAPH: &str = "network.onnx";
const WEIGHTS: &str = "network.data";
/// Drafts that are older were left by processes that ended.
const STALE: Duration = Duration::from_secs(3600);

/// A network's file and what it must be.
#[derive(Debug, Clone)]
pub struct NetworkFile {
    /// Where it lies.
    pub path: PathBuf,
    /// SHA-256 in lower-case hexadecimal that its bytes must have. It stands for the weights in `data`, too: the file names their
    /// digests.
    pub sha256: String,
    /// Files that hold weights beside it.
    pub data: Vec<PathBuf>,
}

/// A folder of optimised networks, or none.
#[derive(Debug, Clone, Default)]
pub struct NetworkCache {
    folder: Option<PathBuf>,
}

impl NetworkCache {
    /// Networks are kept in `folder`, which is made when the first is written.
    pub fn at(folder: PathBuf) -> Self {
        Self { folder: Some(folder) }
    }

    /// Nothing is kept.
    pub fn none() -> Self {
        Self::default()
    }

    /// `nbn/networks` in the user's cache folder, if the environment names one.
    pub fn default_folder() -> Option<PathBuf> {
        Some(crate::files::cache_folder()?.join("networks"))
    }

    /// Opens `sessions` sessions over `network` on the processor, and hands each to `opened` before the next is opened. `read`
    /// gives the network's bytes, which it checks the first time; it is called only when the cache cannot vouch for the file: no
    /// entry, or the file's size or time of change differ from when it was last read.
    ///
    /// A cache that cannot be read or written costs its advantages, never the answer.
    ///
    /// # Errors
    /// `read`'s, `opened`'s, or the runtime's.
    pub fn open<'a, E: From<RuntimeError>>(
        &self,
        library: &Library,
        network: &NetworkFile,
        read: impl Fn() -> Result<NetworkSource<'a>, E>,
        options: SessionOptions,
        sessions: usize,
        mut opened: impl FnMut(OnnxModel) -> Result<(), E>,
    ) -> Result<(), E> {
        let plain = |opened: &mut dyn FnMut(OnnxModel) -> Result<(), E>, sessions: usize| {
            (0..sessions).try_for_each(|_| opened(OnnxModel::open(library, read()?, options)?))
        };
        let Some(entry) = self.entry(network, options) else { return plain(&mut opened, sessions) };
        if !self.vouches(&entry, network) {
            let source = read()?;
            if !entry.join(GRAPH).is_file()
                && let Err(reason) = self.make(&entry, library, source, options)
            {
                tracing::warn!(cache = %entry.display(), reason, "the optimised network could not be cached, so starts stay slow: give a writable --cache, or none");
            }
            self.stamp(&entry, network);
        }
        let mut left = sessions;
        let graph = entry.join(GRAPH);
        // One after the other: opened on threads of their own, they took 38 MiB each instead of 24.
        while left > 0 && graph.is_file() {
            match OnnxModel::open_optimised(library, &graph, options) {
                Ok(model) => opened(model)?,
                Err(error) => {
                    tracing::warn!(cache = %entry.display(), %error, "the cached network cannot be opened: remove it");
                    break;
                }
            }
            left -= 1;
        }
        plain(&mut opened, left)
    }

    /// A note that was kept with `network`'s entry for what `options` says of the device.
    pub fn note<T: DeserializeOwned>(&self, network: &NetworkFile, options: SessionOptions, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.entry(network, options)?.join(name)).ok()?).ok()
    }

    /// Keeps a note with `network`'s entry, if there is one and it can be written.
    pub fn keep_note<T: Serialize>(&self, network: &NetworkFile, options: SessionOptions, name: &str, note: &T) {
        let Some(entry) = self.entry(network, options).filter(|entry| entry.is_dir()) else { return };
        let written = serde_json::to_vec(note).map_err(io::Error::other).and_then(|n| replace(&entry.join(name), &n));
        if let Err(error) = written {
            tracing::debug!(%error, name, "a note could not be written to the cache");
        }
    }

    fn entry(&self, network: &NetworkFile, options: SessionOptions) -> Option<PathBuf> {
        let mut key = Sha256::new();
        let provider = options.device.identity(&options.cuda);
        for part in [network.sha256.as_str(), ort::info(), &processor(), &provider] {
            key.update(part.as_bytes());
            key.update([0]);
        }
        let key: String = key.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Some(self.folder.as_ref()?.join(key))
    }

    /// Whether `network`'s file is, by size and time of change, the one that was checked when the entry was made.
    fn vouches(&self, entry: &Path, network: &NetworkFile) -> bool {
        let kept = || fs::read(entry.join(stamp_name(&network.path))).ok();
        entry.join(GRAPH).is_file() && stamp(network).is_some_and(|stamp| kept() == Some(stamp))
    }

    fn stamp(&self, entry: &Path, network: &NetworkFile) {
        if let Some(stamp) = stamp(network).filter(|_| entry.is_dir()) {
            // Without it, the file is read and checked again next time.
            let _ = replace(&entry.join(stamp_name(&network.path)), &stamp);
        }
    }

    fn make(
        &self,
        entry: &Path,
        library: &Library,
        source: NetworkSource<'_>,
        options: SessionOptions,
    ) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let parent = entry.parent().ok_or("the cache folder has no name")?;
        fs::create_dir_all(parent).map_err(text)?;
        sweep(parent);
        let draft = draft_of(entry);
        fs::create_dir(&draft).map_err(text)?;
        let made = builder(library, options)
            .and_then(|b| optimised(b, &draft.join(GRAPH), WEIGHTS))
            .and_then(|b| commit(b, source))
            .map_err(|error| error.to_string())
            .and_then(|_session| {
                for name in [GRAPH, WEIGHTS] {
                    match File::open(draft.join(name)) {
                        // A small network has all of its weights in the graph.
                        Err(error) if name == WEIGHTS && error.kind() == io::ErrorKind::NotFound => {}
                        file => file.and_then(|f| f.sync_all()).map_err(text)?,
                    }
                }
                match place_folder(&draft, entry) {
                    // Another process was first; its entry is as good.
                    Err(_) if entry.join(GRAPH).is_file() => Ok(()),
                    result => result.map_err(text),
                }
            });
        // What is left is of no use, and its name will not be used again.
        remove_own(&draft, &[GRAPH, WEIGHTS]);
        made
    }
}

/// Size and time of change of its files, as text.
fn stamp(network: &NetworkFile) -> Option<Vec<u8>> {
    let of_file = |path: &PathBuf| {
        let metadata = fs::metadata(path).ok()?;
        let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(format!("{} {}", metadata.len(), changed.as_nanos()))
    };
    let files: Option<Vec<String>> = std::iter::once(&network.path).chain(&network.data).map(of_file).collect();
    Some(files?.join("\n").into_bytes())
}

/// The name of a file's stamp: the same network may lie in several places.
fn stamp_name(path: &Path) -> String {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    digest.iter().take(8).fold("checked-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// Removes the drafts of entries that killed processes have left in `folder`. The user may have named any folder, and it
/// may hold anything: only folders whose name has a draft's exact form are touched.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(is_draft) && is_stale_folder(&entry.path()) {
            // Another process may be at the same; and a folder that cannot be written is another's to keep.
            remove_own(&entry.path(), &[GRAPH, WEIGHTS]);
        }
    }
}

/// Whether `name` is that of a draft of an entry, whose own name is half a SHA-256 in hexadecimal.
fn is_draft(name: &str) -> bool {
    let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name_of_draft(name).is_some_and(|entry| entry.len() == 32 && entry.bytes().all(hexadecimal))
}

/// Whether `path` is a folder, and no link to one, that was last changed before [`STALE`].
fn is_stale_folder(path: &Path) -> bool {
    let Ok(found) = fs::symlink_metadata(path) else { return false };
    let age = found.modified().ok().and_then(|time| time.elapsed().ok());
    found.is_dir() && age.is_some_and(|age| age > STALE)
}

/// What the runtime's choice of kernels and layouts depends on.
fn processor() -> String {
    let mut features = vec![std::env::consts::ARCH];
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detected {
            ($($name:tt)*) => { $(if std::arch::is_x86_feature_detected!($name) { features.push($name); })* };
        }
        detected!("sse4.1" "avx" "avx2" "fma" "avxvnni" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! detected {
            ($($name:tt)*) => { $(if std::arch::is_aarch64_feature_detected!($name) { features.push($name); })* };
        }
        detected!("neon" "dotprod" "fp16" "i8mm" "bf16" "sve");
    }
    features.join(" ")
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_sweep_takes_stale_drafts_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let folder = |name: &str, files: &[&str], hours: u64| {
            fs::create_dir(at(name)).unwrap();
            files.iter().for_each(|file| fs::write(at(name).join(file), "x").unwrap());
            let then = SystemTime::now() - Duration::from_secs(3600 * hours);
            File::open(at(name)).unwrap().set_modified(then).unwrap();
        };
        let entry = "0123456789abcdef0123456789abcdef";
        let stale = format!(".{entry}-17-0-1700000000000000000");
        let kept = [
            ".git".to_owned(),
            ".ssh".into(),
            // Not quite an entry, not quite a draft, a draft that may be at work, and one that holds something else.
            format!(".{}-17-0-1700000000000000000", entry.to_uppercase()),
            format!(".{}-17-0-1700000000000000000", &entry[1..]),
            ".part-17-0-1700000000000000000".into(),
            format!(".{entry}-17-0"),
            format!("{entry}-17-0-1700000000000000000"),
            format!(".{entry}-17-1-1700000000000000000"),
        ];
        kept[..7].iter().for_each(|name| folder(name, &[GRAPH, "config"], 3));
        folder(&kept[7], &[GRAPH, WEIGHTS], 0);
        folder("elsewhere", &[GRAPH], 3);
        folder(&stale, &[GRAPH, WEIGHTS], 3);
        let mixed = format!(".{entry}-17-2-1700000000000000000");
        folder(&mixed, &[GRAPH, "config"], 3);
        let file = format!(".{entry}-17-3-1700000000000000000");
        fs::write(at(&file), "x").unwrap();
        File::open(at(&file)).unwrap().set_modified(SystemTime::now() - Duration::from_secs(3 * 3600)).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(at("elsewhere"), at(&format!(".{entry}-17-4-1700000000000000000"))).unwrap();
        let names = || {
            let entries = fs::read_dir(root.path()).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let before = names();
        sweep(root.path());
        assert_eq!(names(), before.into_iter().filter(|name| *name != stale).collect::<Vec<_>>());
        kept[..7].iter().for_each(|name| assert!(at(name).join(GRAPH).is_file() && at(name).join("config").is_file()));
        assert!(at(&kept[7]).join(WEIGHTS).is_file() && at("elsewhere").join(GRAPH).is_file());
        assert!(at(&mixed).join("config").is_file() && at(&file).is_file());
    }
}
