//! The one way in which this program writes, replaces and removes files: a file is there as a whole or not at all, whenever
//! the program or the machine stops, and nothing is removed that the program did not make.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A hidden name beside `path` that no other thread or process uses: `.NAME-PROCESS-NUMBER-NANOSECONDS`.
pub fn draft_of(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    // Process numbers come again, in containers most of all.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}-{}-{n}-{time}", process::id()))
}

/// The name that `draft` was made for, when it has exactly the form that [`draft_of`] gives.
pub fn name_of_draft(draft: &str) -> Option<&str> {
    let mut parts = draft.strip_prefix('.')?.rsplitn(4, '-');
    let number = |text: &str| !text.is_empty() && text.len() <= 39 && text.bytes().all(|b| b.is_ascii_digit());
    for _ in 0..3 {
        parts.next().filter(|part| number(part))?;
    }
    parts.next().filter(|name| !name.is_empty())
}

/// Writes the whole of `path`, flushed to the disk, or leaves it as it was. Where a pipe or a device stands, it is written to.
///
/// # Errors
/// When the disk is full or the folder cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if is_special(path) {
        return fs::OpenOptions::new().write(true).open(path)?.write_all(content);
    }
    replace_through(&draft_of(path), path, content)
}

/// As [`replace`], through a `draft` on the same disk that no other process writes: after a kill the next run writes over it.
///
/// # Errors
/// As [`replace`].
pub fn replace_through(draft: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let write = || {
        step();
        let mut file = File::create(draft)?;
        step();
        file.write_all(content)?;
        commit(&file, draft, path)
    };
    write().inspect_err(|_| {
        // The reason to tell is the first one.
        let _ = fs::remove_file(draft);
    })
}

/// Flushes `file`, which was written under the name `draft`, to the disk and puts it in the place of `path`.
///
/// # Errors
/// When the disk is full or the folder cannot be written; the draft is left.
pub fn commit(file: &File, draft: &Path, path: &Path) -> io::Result<()> {
    step();
    file.sync_all()?;
    step();
    fs::rename(draft, path)?;
    step();
    sync_folder_of(path);
    step();
    Ok(())
}

/// Puts the folder `draft`, whose files were flushed, in the place of `path`, where nothing stands.
///
/// # Errors
/// When something stands there, or the folder above cannot be written; the draft is left.
pub fn place_folder(draft: &Path, path: &Path) -> io::Result<()> {
    step();
    sync_folder(draft);
    step();
    fs::rename(draft, path)?;
    step();
    sync_folder_of(path);
    Ok(())
}

/// Puts the folder `draft` in the place of the folder `path`, on the same disk, or leaves what is there. Of the old folder
/// only the files named `own` are removed, and the folder itself when it is empty then; callers refuse folders with other
/// content beforehand. Where the system cannot exchange two names at once, a kill in between leaves the old folder under a
/// hidden name beside it.
///
/// # Errors
/// When `path` is no folder, or the folder above cannot be written.
pub fn replace_folder(draft: &Path, path: &Path, own: &[&str]) -> io::Result<()> {
    if !path.exists() {
        return place_folder(draft, path);
    }
    if !path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is a file, not a folder"));
    }
    step();
    sync_folder(draft);
    step();
    let old = if exchange(draft, path) {
        draft.to_owned()
    } else {
        let old = draft_of(path);
        fs::rename(path, &old)?;
        step();
        fs::rename(draft, path).inspect_err(|_| {
            // Back to what it was; the reason to tell is the first one.
            let _ = fs::rename(&old, path);
        })?;
        old
    };
    step();
    sync_folder_of(path);
    step();
    // The new one stands; what is left of the old one does no harm.
    remove_own(&old, own);
    Ok(())
}

/// Removes the files named `own` from `folder`, and the folder when nothing else is in it. Links are not followed. What cannot
/// be removed stays.
pub fn remove_own(folder: &Path, own: &[&str]) {
    if !fs::symlink_metadata(folder).is_ok_and(|found| found.is_dir()) {
        return;
    }
    for name in own {
        let path = folder.join(name);
        if fs::symlink_metadata(&path).is_ok_and(|found| found.is_file()) {
            let _ = fs::remove_file(&path);
            step();
        }
    }
    let _ = fs::remove_dir(folder);
}

/// What `folder` holds beside the files named `own`, in order; nothing when it cannot be read.
pub fn foreign(folder: &Path, own: &[&str]) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_own = |entry: &fs::DirEntry, name: &str| own.contains(&name) && entry.file_type().is_ok_and(|t| t.is_file());
    let mut foreign: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (!is_own(&entry, &name)).then_some(name)
        })
        .collect();
    foreign.sort();
    foreign
}

/// The folder `nbn` in the user's cache folder, when the environment names one.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).or_else(|| set("LOCALAPPDATA"));
    Some(cache?.join("nbn"))
}

/// Flushes the names in `folder` to the disk, so that they outlive a power cut. Not every system can: then nothing happens.
pub fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

fn sync_folder_of(path: &Path) {
    sync_folder(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")));
}

/// Whether something other than a file or a folder stands at `path`: a pipe or a device cannot be replaced, only written to.
pub fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// A file that a run reads or writes: by which flag or in which role, and where.
#[derive(Debug, Clone)]
pub struct Named {
    /// The flag, or what the file is to the run.
    pub role: &'static str,
    /// Where it lies, or would.
    pub path: PathBuf,
}

/// A file that would be written is another file of the run.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} {} is the same file as {} {}, which it would overwrite: give another file",
    written.role, written.path.display(), other.role, other.path.display()
)]
pub struct SameFile {
    /// The file that would be written.
    pub written: Named,
    /// What it is.
    pub other: Named,
}

/// Refuses `written` files that are one of the files that are `read`, or the same.
///
/// # Errors
/// When one is; both are named.
pub fn refuse_same(written: &[Named], read: &[Named]) -> Result<(), SameFile> {
    for (n, file) in written.iter().enumerate() {
        if let Some(other) = read.iter().chain(&written[n + 1..]).find(|other| is_same(&file.path, &other.path)) {
            return Err(SameFile { written: file.clone(), other: other.clone() });
        }
    }
    Ok(())
}

/// Whether two names lead to one file, or would. Pipes, devices and folders are no files: writing to them overwrites nothing.
pub fn is_same(one: &Path, other: &Path) -> bool {
    identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// What tells a file from others.
#[derive(PartialEq, Eq)]
enum Identity {
    /// Device and number.
    #[cfg(unix)]
    There(u64, u64),
    /// Where it is, or would be.
    At(PathBuf),
}

fn identity(path: &Path) -> Option<Identity> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => None,
        #[cfg(unix)]
        Ok(found) => {
            use std::os::unix::fs::MetadataExt;
            Some(Identity::There(found.dev(), found.ino()))
        }
        #[cfg(not(unix))]
        Ok(_) => fs::canonicalize(path).ok().map(Identity::At),
        Err(_) => {
            let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Some(Identity::At(fs::canonicalize(folder).ok()?.join(path.file_name()?)))
        }
    }
}

/// A point between two changes of what is on disk. Builds for debugging end the process at the one whose number
/// `NBN_KILL_AT_STEP` gives, as a kill would: tests read back what is left then (`tests/it/kills.rs`).
fn step() {
    #[cfg(debug_assertions)]
    {
        static PASSED: AtomicU64 = AtomicU64::new(0);
        let kill_at = std::env::var("NBN_KILL_AT_STEP").ok().and_then(|text| text.parse::<u64>().ok());
        if kill_at == Some(PASSED.fetch_add(1, Ordering::SeqCst) + 1) {
            process::abort();
        }
    }
}

#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_replaced_stays_and_no_draft_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        replace(&path, b"old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        // A folder that is not empty cannot be replaced by a file.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("x"), b"x").unwrap();
        assert!(replace(&taken, b"new").is_err());
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.json", "taken"]);
    }

    #[test]
    fn a_draft_is_known_by_its_exact_form() {
        let draft = draft_of(Path::new("models/mine-1.json"));
        assert_eq!(name_of_draft(draft.file_name().unwrap().to_str().unwrap()), Some("mine-1.json"));
        for foreign in [".git", ".ssh", ".cache-1-2", ".a-1-2-x", ".a-1--3", ".-1-2-3", "a-1-2-3", ".a-+1-2-3", ""] {
            assert_eq!(name_of_draft(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_folder_loses_what_is_its_own_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1");
        fs::create_dir_all(path.join("network.onnx")).unwrap();
        fs::write(path.join("manifest.json"), "{}").unwrap();
        fs::write(path.join("notes.txt"), "mine").unwrap();
        let own = ["manifest.json", "network.onnx"];
        // A folder of that name is not the file that this program made.
        assert_eq!(foreign(&path, &own), ["network.onnx", "notes.txt"]);
        remove_own(&path, &own);
        assert_eq!(foreign(&path, &[]), ["network.onnx", "notes.txt"]);
        #[cfg(unix)]
        {
            let link = folder.path().join("link");
            std::os::unix::fs::symlink(&path, &link).unwrap();
            remove_own(&link, &["notes.txt"]);
            assert!(path.join("notes.txt").is_file());
        }
    }

    #[test]
    fn a_folder_takes_the_place_of_another_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (path, draft) = (folder.path().join("1"), folder.path().join(".draft"));
        for content in ["old", "new"] {
            fs::create_dir(&draft).unwrap();
            fs::write(draft.join(content), content).unwrap();
            replace_folder(&draft, &path, &["old", "new"]).unwrap();
        }
        let held: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(held, ["new"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(replace_folder(&draft, &path, &["new"]).is_err());
        assert!(path.join("new").is_file(), "what was there stays");
        let file = folder.path().join("2");
        fs::write(&file, "a file").unwrap();
        fs::create_dir(&draft).unwrap();
        assert!(replace_folder(&draft, &file, &[]).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"a file");
    }
}
