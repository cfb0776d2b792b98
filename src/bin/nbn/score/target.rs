//! Files that a run writes. That they can be written is found out before the first image is scored, without a change to
//! what they hold; it is replaced only when there is something to take its place.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nbn::batch::{Form, Output, Parts, Row, RowWriter, WriteError};
use nbn::files::{self, Named};
use nbn::pixels::has_picture_ending;

/// Where the rows go.
pub(super) enum Rows<'a> {
    Parts(Parts<'a>),
    File(RowFile<'a>),
    Stream(RowWriter<'a, BufWriter<Stream>>),
}

type Stream = Box<dyn Write + Send>;

impl<'a> Rows<'a> {
    pub(super) fn stdout(form: Form<'a>) -> Result<Self, WriteError> {
        Self::stream(Box::new(io::stdout()), form)
    }

    fn stream(stream: Stream, form: Form<'a>) -> Result<Self, WriteError> {
        Ok(Self::Stream(RowWriter::new(BufWriter::new(stream), form)?))
    }

    /// Rows in the file at `path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn file(path: &Path, form: Form<'a>) -> anyhow::Result<Self> {
        if let Some(stream) = standard_stream(path) {
            return Ok(Self::stream(stream, form)?);
        }
        let file = RowFile::open(path, form);
        Ok(Self::File(file.with_context(|| format!("--output: cannot write {}", path.display()))?))
    }

    /// Called after a run that scored all of a source that names no image: its rows are none.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn finish_empty(&mut self) -> Result<(), WriteError> {
        match self {
            Self::File(file) => file.writer().map(drop).and_then(|()| file.finish()),
            // Streams have the form's head and foot already, parts are of rows.
            Self::Parts(_) | Self::Stream(_) => Ok(()),
        }
    }
}

impl Output for Rows<'_> {
    fn write(&mut self, row: &Row) -> Result<(), WriteError> {
        match self {
            Self::Parts(parts) => parts.write(row),
            Self::File(file) => file.writer()?.write(row),
            Self::Stream(writer) => writer.write(row),
        }
    }

    fn finish(&mut self) -> Result<(), WriteError> {
        match self {
            Self::Parts(parts) => parts.finish(),
            Self::File(file) => file.finish(),
            Self::Stream(writer) => writer.finish(),
        }
    }
}

/// A file whose content stays until the first row is there.
pub(super) struct RowFile<'a> {
    file: File,
    /// Neither a pipe nor a device, which can be neither emptied nor flushed to a disk.
    regular: bool,
    form: Form<'a>,
    writer: Option<RowWriter<'a, BufWriter<File>>>,
}

impl<'a> RowFile<'a> {
    fn open(path: &Path, form: Form<'a>) -> io::Result<Self> {
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        let regular = file.metadata()?.is_file();
        Ok(Self { file, regular, form, writer: None })
    }

    fn writer(&mut self) -> Result<&mut RowWriter<'a, BufWriter<File>>, WriteError> {
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => {
                if self.regular {
                    self.file.set_len(0)?;
                }
                RowWriter::new(BufWriter::new(self.file.try_clone()?), self.form)?
            }
        };
        Ok(self.writer.insert(writer))
    }

    /// Has all rows on the disk.
    fn finish(&mut self) -> Result<(), WriteError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.finish()?;
        if self.regular {
            self.file.sync_all()?;
        }
        Ok(())
    }
}

/// The file that gets the summary.
pub(super) struct SummaryFile {
    path: PathBuf,
}

impl SummaryFile {
    /// Finds out whether `path` can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let probe = || {
            // A pipe is opened once, when there is something to write.
            if files::is_special(path) {
                return Ok(());
            }
            if path.exists() {
                return File::options().write(true).open(path).map(drop);
            }
            let draft = files::draft_of(path);
            File::create_new(&draft)?;
            fs::remove_file(&draft)
        };
        probe().with_context(|| format!("--summary: cannot write {}", path.display()))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Replaces what the file holds with `text`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write(&self, text: &[u8]) -> anyhow::Result<()> {
        let write = || {
            if let Some(mut stream) = standard_stream(&self.path) {
                return stream.write_all(text).and_then(|()| stream.flush());
            }
            // A link is followed, not replaced.
            let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
            match files::replace(&path, text) {
                // The folder takes no other file, or the file is mounted by itself: as containers have it.
                Err(error) if allows_only_writing(&error) && path.exists() => write_in_place(&path, text),
                replaced => replaced,
            }
        };
        write().with_context(|| format!("--summary: cannot write {}", self.path.display()))
    }
}

fn allows_only_writing(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, ResourceBusy};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | ResourceBusy)
}

fn write_in_place(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).truncate(true).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Standard output or error, when `path` leads to what it is, as /dev/stdout does. If that is a file, writing must go on
/// at its end.
fn standard_stream(path: &Path) -> Option<Stream> {
    let found = fs::metadata(path).ok()?;
    let is = |stream: &dyn AsFd| {
        let stream = rustix::fs::fstat(stream.as_fd());
        stream.is_ok_and(|stream| (stream.st_dev, stream.st_ino) == (found.dev(), found.ino()))
    };
    if is(&io::stdout()) {
        return Some(Box::new(io::stdout()));
    }
    is(&io::stderr()).then(|| Box::new(io::stderr()) as Stream)
}

/// Refuses `written` files that are one of the files that are `read`, or the same, or pictures by their names. What is a
/// standard stream overwrites nothing.
///
/// # Errors
/// When one is; both are named.
pub(super) fn refuse_overwriting(mut written: Vec<Named>, read: &[Named]) -> anyhow::Result<()> {
    written.retain(|file| standard_stream(&file.path).is_none());
    files::refuse_same(&written, read)?;
    // Folders, patterns and lists may name it.
    if let Some(file) = written.iter().find(|file| has_picture_ending(&file.path) && file.path.is_file()) {
        bail!(
            "{} {} has the name of an image file, which would be overwritten: give another file",
            file.role,
            file.path.display()
        );
    }
    Ok(())
}
