//! Rows in files that are committed one by one.
//!
//! A part is written under a hidden name, flushed to the disk, then renamed: a file that is called a part is whole. What
//! the parts hold is the record of what is done; nothing else is kept, so nothing can disagree with them. `run.json` says
//! what all parts of a folder have in common, and a run that would add others is refused.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Shard;
use super::pipeline::{KeyHash, hash};
use super::rows::{
    Columns, Format, Output, Row, RowWriter, WriteError, keys_in_csv, keys_in_json_lines, keys_in_parquet,
};
use crate::bundle::Class;

/// What all parts of a folder have in common, as `run.json` keeps it.
pub type RunRecord = serde_json::Map<String, Value>;

const RECORD: &str = "run.json";

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
    #[error("{} holds {parts} parts already: go on with --resume, or give another folder", folder.display())]
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
        "the parts in {} were made with {field} {before}, now it is {now}: give another folder, or go on as it was begun \
         (run.json there says how; where there is no part yet, remove it)",
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
        "{} holds {parts} parts without run.json, so nothing says how they were made: put it back, or give another folder",
        folder.display()
    )]
    NoRecord {
        /// The folder.
        folder: PathBuf,
        /// How many.
        parts: usize,
    },
    /// Another process is at it.
    #[error("another process writes share {index} of {count} to {}", folder.display())]
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
    format: Format,
    columns: Columns,
    classes: &'a [Class],
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
}

impl Name {
    fn parse(name: &str, ending: &str) -> Option<Self> {
        let rest = name.strip_prefix("part-")?.strip_suffix(ending)?.strip_suffix('.')?;
        let mut words = rest.split('-');
        let index = words.next()?.parse().ok()?;
        let count = words.next().filter(|word| *word == "of").and(words.next())?.parse().ok()?;
        let number = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Self { shard: Shard::new(index, count).ok()?, number })
    }
}

fn name(shard: Shard, number: u64, format: Format) -> String {
    format!("part-{:05}-of-{:05}-{number:06}.{}", shard.index(), shard.count(), format.ending())
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
        (format, columns, classes): (Format, Columns, &'a [Class]),
        part_rows: u64,
        resume: bool,
    ) -> Result<(Self, HashMap<KeyHash, u32>), PartsError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |cause| PartsError::Io { path, cause }
        };
        fs::create_dir_all(folder).map_err(io(folder))?;
        let lock = lock(folder, shard)?;
        let mut found = Vec::new();
        let mut other = None;
        for entry in fs::read_dir(folder).map_err(io(folder))? {
            let path = entry.map_err(io(folder))?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let ending = Path::new(&file).extension().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(name) = Name::parse(&file, &ending) {
                if ending == format.ending() {
                    found.push((path, name));
                } else {
                    other = Some(ending);
                }
            } else if file.starts_with(&format!(".part-{:05}-of-{:05}-", shard.index(), shard.count())) {
                // What an ended process left behind.
                fs::remove_file(&path).map_err(io(&path))?;
            }
        }
        if let Some(before) = other {
            let (field, now) = ("format".into(), format.ending().into());
            return Err(PartsError::Differs { folder: folder.to_owned(), field, before: before.into(), now });
        }
        if !found.is_empty() && !folder.join(RECORD).exists() {
            return Err(PartsError::NoRecord { folder: folder.to_owned(), parts: found.len() });
        }
        if found.is_empty() && shard.count() == 1 {
            // Nobody else is here, and nothing was made: what an ended run was to do binds nobody.
            match fs::remove_file(folder.join(RECORD)) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(io(&folder.join(RECORD))(cause)),
                _ => {}
            }
        }
        // Parts of other shares of the same count hold other pictures.
        found.retain(|(_, name)| name.shard.count() != shard.count() || name.shard == shard);
        if !resume && !found.is_empty() {
            return Err(PartsError::NotEmpty { folder: folder.to_owned(), parts: found.len() });
        }
        agree(folder, record, shard)?;
        let mut committed = HashMap::new();
        let mut rows = 0;
        for (part, _) in &found {
            let each = |key: &str| {
                rows += 1;
                *committed.entry(hash(key)).or_default() += 1;
            };
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
            format,
            columns,
            classes,
            part_rows: part_rows.max(1),
            next,
            current: None,
            parts: found.len() as u64,
            rows,
            _lock: lock,
        };
        Ok((parts, committed))
    }

    fn current(&mut self) -> Result<&mut Current<'a>, WriteError> {
        let current = match self.current.take() {
            Some(current) => current,
            None => {
                let name = name(self.shard, self.next, self.format);
                let (part, draft) = (self.folder.join(&name), self.folder.join(format!(".{name}.tmp")));
                let open = || {
                    let output = BufWriter::with_capacity(1 << 18, File::create(&draft)?);
                    RowWriter::new(output, self.format, self.columns, self.classes)
                };
                let writer = open().map_err(|error| self.explain(error, &draft, &part))?;
                Current { draft, part, writer, rows: 0 }
            }
        };
        Ok(self.current.insert(current))
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        let Some(Current { draft, part, writer, rows }) = self.current.take() else { return Ok(()) };
        let commit = || {
            let file = writer.into_inner()?.into_inner().map_err(|error| WriteError::Io(error.into_error()))?;
            file.sync_all()?;
            fs::rename(&draft, &part)?;
            // So that the name, too, outlives a power cut; not every system can.
            let _ = File::open(&self.folder).and_then(|folder| folder.sync_all());
            Ok(())
        };
        let done = commit();
        done.map_err(|error| self.explain(error, &draft, &part))?;
        self.next += 1;
        self.parts += 1;
        self.rows += rows;
        Ok(())
    }

    /// Takes the unfinished part away, which makes room, and says what is safe.
    fn explain(&self, error: WriteError, draft: &Path, part: &Path) -> WriteError {
        let free = rustix::fs::statvfs(&self.folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
        // It is no part, and the next run would remove it.
        let _ = fs::remove_file(draft);
        let part = part.to_owned();
        match error {
            error if error.kind() == Some(io::ErrorKind::StorageFull) => {
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
            return Err(self.explain(error, &draft, &part));
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
    let name = |shard: Shard| format!(".lock-{:05}-of-{:05}", shard.index(), shard.count());
    let io = |path: &Path, cause| PartsError::Io { path: path.to_owned(), cause };
    let locked =
        |shard: Shard| PartsError::Locked { folder: folder.to_owned(), index: shard.index(), count: shard.count() };
    let path = folder.join(name(shard));
    let file = File::create(&path).map_err(|cause| io(&path, cause))?;
    // A file system without locks: two processes on one share are the operator's to avoid.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(locked(shard));
    }
    for entry in fs::read_dir(folder).map_err(|cause| io(folder, cause))? {
        let path = entry.map_err(|cause| io(folder, cause))?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let words = file.strip_prefix(".lock-").and_then(|rest| rest.split_once("-of-"));
        let Some(other) = words.and_then(|(i, n)| Shard::new(i.parse().ok()?, n.parse().ok()?).ok()) else { continue };
        if other.count() != shard.count()
            && let Ok(file) = File::open(&path)
            // Shared: others may look at the same moment, and NFS locks exclusively only what is open for writing.
            && let Err(TryLockError::WouldBlock) = file.try_lock_shared()
        {
            return Err(locked(other));
        }
    }
    Ok(file)
}

/// Writes `record` when there is none, else compares it with what is there.
fn agree(folder: &Path, record: &RunRecord, shard: Shard) -> Result<(), PartsError> {
    let path = folder.join(RECORD);
    let io = |cause| PartsError::Io { path: path.clone(), cause };
    if !path.exists() {
        // Other shares may do the same at this moment: the first to link a whole file wins, and all compare with it.
        let draft = folder.join(format!(".{RECORD}-{:05}-of-{:05}.tmp", shard.index(), shard.count()));
        let text = serde_json::to_vec_pretty(record).map_err(|error| io(error.into()))?;
        let write = || {
            let mut file = File::create(&draft)?;
            file.write_all(&text)?;
            file.sync_all()
        };
        write().map_err(io)?;
        let linked = match fs::hard_link(&draft, &path) {
            // A file system without links: the last to rename wins.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => fs::rename(&draft, &path),
            _ => fs::remove_file(&draft),
        };
        linked.map_err(io)?;
    }
    let text = fs::read(&path).map_err(io)?;
    let before: RunRecord = serde_json::from_slice(&text).map_err(|error| {
        let reason =
            format!("damaged ({error}); without it, nothing says how the parts were made: give another folder");
        io(io::Error::new(io::ErrorKind::InvalidData, reason))
    })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_told_by_its_name_alone() {
        let shard = Shard::new(3, 16).unwrap();
        let text = name(shard, 7, Format::Csv);
        assert_eq!(text, "part-00003-of-00016-000007.csv");
        let parsed = Name::parse(&text, "csv").unwrap();
        assert_eq!((parsed.shard, parsed.number), (shard, 7));
        for wrong in
            ["part-00003-of-00016-000007.jsonl", ".part-00003-of-00016-000007.csv.tmp", "part-3-of-2-1.csv", "rows.csv"]
        {
            assert!(Name::parse(wrong, "csv").is_none(), "{wrong}");
        }
    }
}
