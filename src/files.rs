//! Files that are there as a whole or not at all, whenever the program or the machine stops.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A hidden name beside `path` that no other thread or process uses.
pub fn draft_of(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    // Process numbers come again, in containers most of all.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}-{}-{n}-{time}", process::id()))
}

/// Writes the whole of `path`, flushed to the disk, or leaves it as it was.
///
/// # Errors
/// When the disk is full or the folder cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    replace_through(&draft_of(path), path, content)
}

/// As [`replace`], through a `draft` on the same disk that no other process writes: after a kill the next run writes over it.
///
/// # Errors
/// As [`replace`].
pub fn replace_through(draft: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let write = || {
        let mut file = File::create(draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(draft, path)
    };
    write().inspect_err(|_| {
        // The reason to tell is the first one.
        let _ = fs::remove_file(draft);
    })
}

/// Puts the folder `draft` in the place of the folder `path`, on the same disk, or leaves what is there. Where the system
/// cannot exchange two names at once, a kill in between leaves the old one under a hidden name beside it.
///
/// # Errors
/// When `path` is no folder, or the folder above cannot be written.
pub fn replace_folder(draft: &Path, path: &Path) -> io::Result<()> {
    if !path.exists() {
        return fs::rename(draft, path);
    }
    if !path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "a file stands in its place"));
    }
    let old = if exchange(draft, path) {
        draft.to_owned()
    } else {
        let old = draft_of(path);
        fs::rename(path, &old)?;
        fs::rename(draft, path).inspect_err(|_| {
            // Back to what it was; the reason to tell is the first one.
            let _ = fs::rename(&old, path);
        })?;
        old
    };
    // The new one stands; what is left of the old one does no harm.
    let _ = fs::remove_dir_all(&old);
    Ok(())
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
    fn a_folder_takes_the_place_of_another_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (path, draft) = (folder.path().join("1"), folder.path().join(".draft"));
        for content in ["old", "new"] {
            fs::create_dir(&draft).unwrap();
            fs::write(draft.join(content), content).unwrap();
            replace_folder(&draft, &path).unwrap();
        }
        let held: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(held, ["new"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(replace_folder(&draft, &path).is_err());
        assert!(path.join("new").is_file(), "what was there stays");
        let file = folder.path().join("2");
        fs::write(&file, "a file").unwrap();
        fs::create_dir(&draft).unwrap();
        assert!(replace_folder(&draft, &file).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"a file");
    }
}
