//! Rows in files that are committed one by one.
//!
//! A part is written under a hidden name, flushed to the disk, then renamed: a file that is called a part is whole. What
//! the parts hold is the record of what is done; nothing else is kept, so nothing can disagree with them. `run.json` says
//! what all parts of a folder have in common, and a run that would add others is refused.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufReader, BufWriter, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde_json::Value;

use super::Shard;
use super::pipeline::{KeyHash, hash};
use super::rows::{Form, Format, Output, Row, RowWriter, WriteError, keys_in_csv, keys_in_json_lines, keys_in_parquet};
use crate::files;

/// What all parts of a folder have in common, as `run.json` keeps it.
pub type RunRecord = serde_json::Map<String, Value>;

const RECORD: &str = "run.json";
/// Bytes of a `run.json`; a record takes a thousand.
const MAX_RECORD: u64 = 1 << 20;

/// A folder that parts cannot be added to.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// The system's fault.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Parts are there, and nobody asked to go on.
    #[error("{} already holds {parts} parts: continue with --resume, or give another folder", folder.display())]
    NotEmpty {
        /// The folder.
        folder: PathBuf,
        /// How many.
        parts: usize,
    },
    /// A part cannot be read back.
    #[error("{}: {reason}: it was changed after it was committed; remove it, and --resume scores its images again", part.display())]
    Damaged {
        /// The part.
        part: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The parts were made otherwise.
    #[error(
        "the parts in {} were made with {field} {before}, but now it is {now}: give another folder, or continue with \
         the earlier settings (see run.json there; if there are no parts yet, remove it)",
        folder.display()
    )]
    Differs {
        /// The folder.
        folder: PathBuf,
        /// What differs.
        field: String,
        /// In the parts.
        before: Value,
        /// Now.
        now: Value,
    },
    /// Nothing says how the parts were made.
    #[error(
        "{} holds {parts} parts without run.json, so it is not known how they were made: restore it, or give another \
         folder",
        folder.display()
    )]
    NoRecord {
        /// The folder.
        folder: PathBuf,
        /// How many.
        parts: usize,
    },
    /// Something of the user's has a name that a run needs.
    #[error(
        "{} was not written by a run of this version of nbn score ({reason}); it is left as it is: move it, or give \
         another folder",
        path.display()
    )]
    Foreign {
        /// The file, folder or link.
        path: PathBuf,
        /// How that is known.
        reason: String,
    },
    /// Another process is at it.
    #[error("another process is writing share {index} of {count} to {}", folder.display())]
    Locked {
        /// The folder.
        folder: PathBuf,
        /// The share.
        index: u32,
        /// Of how many.
        count: u32,
    },
}

/// A folder of parts, and the part in the making.
pub struct Parts<'a> {
    folder: PathBuf,
    shard: Shard,
    form: Form<'a>,
    part_rows: u64,
    next: u64,
    current: Option<Current<'a>>,
    parts: u64,
    rows: u64,
    /// Held as long as parts are written.
    _lock: File,
}

struct Current<'a> {
    draft: PathBuf,
    part: PathBuf,
    writer: RowWriter<'a, BufWriter<File>>,
    rows: u64,
}

/// A part's name, taken apart.
struct Name {
    shard: Shard,
    number: u64,
    format: Format,
}

impl Name {
    /// The part that is called exactly `text`.
    fn parse(text: &str) -> Option<Self> {
        let (rest, ending) = text.strip_prefix("part-")?.split_once('.')?;
        let format = Format::of_ending(ending)?;
        let (shard, number) = rest.rsplit_once('-')?;
        let shard = parse_share(shard)?;
        let name = Self { shard, number: number.parse().ok()?, format };
        (name.text() == text).then_some(name)
    }

    /// The part whose draft is called exactly `text`.
    fn parse_draft(text: &str) -> Option<Self> {
        Self::parse(text.strip_prefix('.')?.strip_suffix(".tmp")?)
    }

    fn text(&self) -> String {
        format!("part-{}-{:06}.{}", share(self.shard), self.number, self.format.ending())
    }

    fn draft(&self) -> String {
        format!(".{}.tmp", self.text())
    }
}

/// A share as names have it.
fn share(shard: Shard) -> String {
    format!("{:05}-of-{:05}", shard.index(), shard.count())
}

fn parse_share(text: &str) -> Option<Shard> {
    let (index, count) = text.split_once("-of-")?;
    let shard = Shard::new(index.parse().ok()?, count.parse().ok()?).ok()?;
    (share(shard) == text).then_some(shard)
}

fn name_of_lock(shard: Shard) -> String {
    format!(".lock-{}", share(shard))
}

/// The name under which `shard` writes `run.json` before it is put in its place.
fn draft_of_record(shard: Shard) -> String {
    format!(".{RECORD}-{}.tmp", share(shard))
}

/// Whether only `shard` writes under the name `file` before it puts `run.json` in its place.
fn is_draft_of_record(file: &str, shard: Shard) -> bool {
    let draft = draft_of_record(shard);
    file == draft || files::name_of_draft(file) == Some(&draft)
}

/// What a folder holds of earlier runs.
#[derive(Default)]
struct Found {
    parts: Vec<(PathBuf, Name)>,
    /// Unfinished files of this share, from a run that was killed.
    stale: Vec<PathBuf>,
}

impl Found {
    fn in_folder(folder: &Path, shard: Shard) -> io::Result<Self> {
        let mut found = Self::default();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let Some(file) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if let Some(name) = Name::parse(file) {
                found.parts.push((path, name));
            } else if Name::parse_draft(file).is_some_and(|name| name.shard == shard) || is_draft_of_record(file, shard)
            {
                found.stale.push(path);
            }
        }
        Ok(found)
    }
}

/// Removes the draft `path` that a killed run left. What is no regular file was made by somebody else and stays.
fn remove_draft(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => fs::remove_file(path),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl<'a> Parts<'a> {
    /// Opens `folder` for share `shard`, made when it is missing; each part gets `part_rows` rows. Gives, for --resume, how
    /// often each key has a row already.
    ///
    /// # Errors
    /// When the folder cannot be used, holds parts and `resume` is false, or holds parts that were made with another
    /// `record`.
    pub fn open(
        folder: &Path,
        shard: Shard,
        record: &RunRecord,
        form: Form<'a>,
        part_rows: u64,
        resume: bool,
    ) -> Result<(Self, HashMap<KeyHash, u32>), PartsError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |cause| PartsError::Io { path, cause }
        };
        let format = form.format;
        fs::create_dir_all(folder).map_err(io(folder))?;
        let lock = lock(folder, shard)?;
        let Found { parts: mut found, stale } = Found::in_folder(folder, shard).map_err(io(folder))?;
        if let Some((_, name)) = found.iter().find(|(_, name)| name.format != format) {
            let (field, before, now) = ("format".into(), name.format.ending().into(), format.ending().into());
            return Err(PartsError::Differs { folder: folder.to_owned(), field, before, now });
        }
        let before = read_record(&folder.join(RECORD), record)?;
        if !found.is_empty() && before.is_none() {
            return Err(PartsError::NoRecord { folder: folder.to_owned(), parts: found.len() });
        }
        // A run that ended before it wrote a part leaves no settings that this one must match.
        let replaceable = found.is_empty() && shard.count() == 1;
        // Parts of other shares of the same count hold other pictures.
        found.retain(|(_, name)| name.shard.count() != shard.count() || name.shard == shard);
        if !resume && !found.is_empty() {
            return Err(PartsError::NotEmpty { folder: folder.to_owned(), parts: found.len() });
        }
        for draft in stale {
            remove_draft(&draft).map_err(io(&draft))?;
        }
        agree(folder, record, before.filter(|_| !replaceable), shard)?;
        let mut committed = HashMap::new();
        let mut rows = 0;
        for (part, _) in &found {
            let each = |key: &str| {
                rows += 1;
                *committed.entry(hash(key)).or_default() += 1;
            };
            // A pipe might never end.
            if !fs::metadata(part).map_err(io(part))?.is_file() {
                let reason = "it is not a regular file".into();
                return Err(PartsError::Damaged { part: part.clone(), reason });
            }
            let file = File::open(part).map_err(io(part))?;
            let read = match format {
                Format::Jsonl => keys_in_json_lines(BufReader::new(file), each),
                Format::Csv => keys_in_csv(BufReader::new(file), each),
                Format::Parquet => keys_in_parquet(file, each),
            };
            read.map_err(|reason| PartsError::Damaged { part: part.clone(), reason })?;
        }
        let own = found.iter().filter(|(_, name)| name.shard == shard);
        let next = own.map(|(_, name)| name.number + 1).max().unwrap_or(0);
        let parts = Self {
            folder: folder.to_owned(),
            shard,
            form,
            part_rows: part_rows.max(1),
            next,
            current: None,
            parts: found.len() as u64,
            rows,
            _lock: lock,
        };
        Ok((parts, committed))
    }

    /// Whether `path` is a name in `folder` that parts, or what belongs to them, may get.
    pub fn may_write(folder: &Path, path: &Path) -> bool {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let inside = match (fs::canonicalize(parent), fs::canonicalize(folder)) {
            (Ok(parent), Ok(folder)) => parent == folder,
            _ => parent == folder,
        };
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let lock = name.strip_prefix(".lock-").and_then(parse_share).is_some();
        inside && (name == RECORD || lock || Name::parse(name).is_some() || Name::parse_draft(name).is_some())
    }

    fn current(&mut self) -> Result<&mut Current<'a>, WriteError> {
        let current = match self.current.take() {
            Some(current) => current,
            None => {
                let name = Name { shard: self.shard, number: self.next, format: self.form.format };
                let (part, draft) = (self.folder.join(name.text()), self.folder.join(name.draft()));
                // Never through a link that somebody put there.
                let file = remove_draft(&draft).and_then(|()| File::create_new(&draft));
                let file = file.map_err(|cause| self.explain(cause.into(), &part))?;
                let output = BufWriter::with_capacity(1 << 18, file);
                match RowWriter::new(output, self.form) {
                    Ok(writer) => Current { draft, part, writer, rows: 0 },
                    Err(error) => return Err(self.give_up(error, &draft, &part)),
                }
            }
        };
        Ok(self.current.insert(current))
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        let Some(Current { draft, part, writer, rows }) = self.current.take() else { return Ok(()) };
        let commit = || {
            let file = writer.into_inner()?.into_inner().map_err(|error| WriteError::Io(error.into_error()))?;
            Ok(files::commit(&file, &draft, &part)?)
        };
        commit().map_err(|error| self.give_up(error, &draft, &part))?;
        self.next += 1;
        self.parts += 1;
        self.rows += rows;
        Ok(())
    }

    /// Takes the unfinished part away, which makes room, and says what is safe.
    fn give_up(&self, error: WriteError, draft: &Path, part: &Path) -> WriteError {
        let error = self.explain(error, part);
        // It is no part, and the next run would remove it.
        let _ = remove_draft(draft);
        error
    }

    /// What it means that `part` cannot be written.
    fn explain(&self, error: WriteError, part: &Path) -> WriteError {
        let part = part.to_owned();
        match error {
            error if error.kind() == Some(io::ErrorKind::StorageFull) => {
                let free = rustix::fs::statvfs(&self.folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
                WriteError::Full { part, free, parts: self.parts, rows: self.rows }
            }
            WriteError::Io(cause) => WriteError::Part { part, cause },
            other => other,
        }
    }
}

impl Output for Parts<'_> {
    fn write(&mut self, row: &Row) -> Result<(), WriteError> {
        let current = self.current()?;
        if let Err(error) = current.writer.write(row) {
            let Some(Current { draft, part, writer, .. }) = self.current.take() else { return Err(error) };
            drop(writer);
            return Err(self.give_up(error, &draft, &part));
        }
        current.rows += 1;
        if current.rows >= self.part_rows { self.commit() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), WriteError> {
        self.commit()
    }
}

/// Takes the share, of which no other process may write, nor any share of another split of the same folder.
fn lock(folder: &Path, shard: Shard) -> Result<File, PartsError> {
    let io = |path: &Path, cause| PartsError::Io { path: path.to_owned(), cause };
    let locked =
        |shard: Shard| PartsError::Locked { folder: folder.to_owned(), index: shard.index(), count: shard.count() };
    let path = folder.join(name_of_lock(shard));
    size_of_own(&path)?;
    // Not truncated: it may be a file of the user's. A link that somebody put there just now is not followed.
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).custom_flags(OFlags::NOFOLLOW.bits() as i32);
    let file = options.open(&path).map_err(|cause| io(&path, cause))?;
    // A file system without locks: two processes on one share are the operator's to avoid.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(locked(shard));
    }
    for entry in fs::read_dir(folder).map_err(|cause| io(folder, cause))? {
        let entry = entry.map_err(|cause| io(folder, cause))?;
        let other = entry.file_name().to_str().and_then(|name| parse_share(name.strip_prefix(".lock-")?));
        if let Some(other) = other
            && other.count() != shard.count()
            && entry.file_type().is_ok_and(|found| found.is_file())
            && let Ok(file) = File::open(entry.path())
            // Shared: others may look at the same moment, and NFS locks exclusively only what is open for writing.
            && let Err(TryLockError::WouldBlock) = file.try_lock_shared()
        {
            return Err(locked(other));
        }
    }
    Ok(file)
}

/// Bytes of the file at `path`, if there is any.
///
/// # Errors
/// When a link, a folder or something else stands there, which no run makes.
fn size_of_own(path: &Path) -> Result<Option<u64>, PartsError> {
    let path = path.to_owned();
    match fs::symlink_metadata(&path) {
        Ok(found) if found.is_file() => Ok(Some(found.len())),
        Ok(_) => Err(PartsError::Foreign { path, reason: "it is not a regular file".into() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(PartsError::Io { path, cause }),
    }
}

/// The record at `path`, if there is any.
///
/// # Errors
/// When something else stands there: it has not the form of `like`.
fn read_record(path: &Path, like: &RunRecord) -> Result<Option<RunRecord>, PartsError> {
    let foreign = |reason: String| PartsError::Foreign { path: path.to_owned(), reason };
    let io = |cause| PartsError::Io { path: path.to_owned(), cause };
    let Some(bytes) = size_of_own(path)? else { return Ok(None) };
    if bytes > MAX_RECORD {
        return Err(foreign(format!("it has {bytes} bytes, and a record has at most {MAX_RECORD}")));
    }
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_RECORD).read_to_end(&mut text)).map_err(io)?;
    let record = serde_json::from_slice::<RunRecord>(&text);
    let record = record.map_err(|error| foreign(format!("it is not a JSON object: {error}")))?;
    match like.keys().find(|field| !record.contains_key(*field)) {
        Some(field) => Err(foreign(format!("it has no field {field:?}"))),
        None => Ok(Some(record)),
    }
}

/// Compares `record` with `before`, which the folder has already; where it has none, writes it.
fn agree(folder: &Path, record: &RunRecord, before: Option<RunRecord>, shard: Shard) -> Result<(), PartsError> {
    let before = match before {
        Some(before) => before,
        None => publish(folder, record, shard)?,
    };
    let fields = before.keys().chain(record.keys());
    let value = |record: &RunRecord, field: &String| record.get(field).cloned().unwrap_or_default();
    match fields.into_iter().find(|field| before.get(*field) != record.get(*field)) {
        None => Ok(()),
        Some(field) => Err(PartsError::Differs {
            folder: folder.to_owned(),
            field: field.clone(),
            before: value(&before, field),
            now: value(record, field),
        }),
    }
}

/// Writes `record`, and gives the one that the folder has then: other shares may write theirs at the same moment, and
/// the first one counts.
fn publish(folder: &Path, record: &RunRecord, shard: Shard) -> Result<RunRecord, PartsError> {
    let (path, draft) = (folder.join(RECORD), folder.join(draft_of_record(shard)));
    let io = |cause| PartsError::Io { path: path.clone(), cause };
    let text = serde_json::to_vec_pretty(record).map_err(|error| io(error.into()))?;
    size_of_own(&draft)?;
    if shard.count() == 1 {
        // No other share can write, and what stands there is a record that no part was made with.
        files::replace_through(&draft, &path, &text).map_err(io)?;
        return Ok(record.clone());
    }
    let place = || {
        files::replace(&draft, &text)?;
        match fs::hard_link(&draft, &path) {
            // A file system without links: the last to rename wins.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return files::commit(&File::open(&draft)?, &draft, &path);
            }
            _ => fs::remove_file(&draft)?,
        }
        files::sync_folder(folder);
        Ok(())
    };
    place().map_err(io)?;
    Ok(read_record(&path, record)?.unwrap_or_else(|| record.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_and_its_draft_are_told_by_their_exact_names() {
        let shard = Shard::new(3, 16).unwrap();
        let name = Name { shard, number: 7, format: Format::Csv };
        assert_eq!(
            (name.text(), name.draft()),
            ("part-00003-of-00016-000007.csv".into(), ".part-00003-of-00016-000007.csv.tmp".into())
        );
        let million = Name { number: 1_000_000, ..name };
        for parsed in [Name::parse(&million.text()), Name::parse_draft(&million.draft())] {
            let parsed = parsed.unwrap();
            assert_eq!((parsed.shard, parsed.number, parsed.format), (shard, 1_000_000, Format::Csv));
        }
        for wrong in [
            "part-3-of-16-7.csv",
            "part-00003-of-00016-000007.txt",
            "part-00003-of-00016-000007.csv.gz",
            "part-+0003-of-00016-000007.csv",
            "part-00003-of-00003-000007.csv",
            "part-00003-of-00016-000007-1.csv",
            "part-00003-of-00016-.csv",
            "rows.csv",
        ] {
            assert!(Name::parse(wrong).is_none(), "{wrong}");
            assert!(Name::parse_draft(&format!(".{wrong}.tmp")).is_none(), "{wrong}");
        }
        for wrong in ["part-00003-of-00016-000007.csv", ".part-00003-of-00016-000007.csv", ".part-00003-of-00016-notes"]
        {
            assert!(Name::parse_draft(wrong).is_none(), "{wrong}");
        }
    }

    fn record(field: &str) -> RunRecord {
        [("nbn".to_owned(), "1".into()), ("field".to_owned(), field.into())].into_iter().collect()
    }

    #[test]
    fn the_first_record_counts_for_all_shares() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (Shard::new(0, 2).unwrap(), Shard::new(1, 2).unwrap());
        assert_eq!(publish(folder.path(), &record("a"), first).unwrap(), record("a"));
        assert_eq!(publish(folder.path(), &record("b"), second).unwrap(), record("a"));
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [RECORD]);
    }
}
