//! Where the pictures come from: files, folders, patterns, lists, tar archives, Parquet; on disk or in object stores.

mod archive;
mod error;
mod form;
mod lines;
mod list;
mod members;
#[cfg_attr(not(feature = "object-stores"), path = "no_objects.rs")]
mod objects;
mod place;
#[cfg_attr(not(feature = "parquet"), path = "no_table.rs")]
mod table;

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use bytes::Bytes;

use super::Shard;
use crate::listing::{Found, PassedOver, endings, hidden_parts, walk};
use crate::pixels::has_picture_ending;

use form::{Form, fits};

pub use error::SourceError;
pub use objects::Stores;
pub(super) use place::Place;

/// Where the true class of a picture is read from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// The label column of CSV, JSON lines and Parquet, or the .cls members of tar archives, if there are any
    #[default]
    Given,
    /// The name of the folder that the image is in
    Folder,
    /// What follows the picture's name in each line of a text list, as in ImageNet-LT's lists
    Line,
    /// True classes are not read
    None,
}

impl Labels {
    /// Whether rows get labels, where the source has `column` for them or not.
    fn with_column(self, column: bool) -> bool {
        self == Self::Folder || (self == Self::Given && column)
    }
}

/// Whether a run was told to stop; asked before each picture, and while a source keeps silent.
#[derive(Clone)]
pub struct Stopped {
    told: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Nobody writes rows any more.
    ended: Arc<AtomicBool>,
}

impl Stopped {
    /// As `told` says.
    pub fn when(told: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { told: Arc::new(told), ended: Arc::default() }
    }

    pub(super) fn now(&self) -> bool {
        self.ended.load(Ordering::Relaxed) || self.told()
    }

    pub(super) fn told(&self) -> bool {
        (self.told)()
    }

    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Default for Stopped {
    /// Never.
    fn default() -> Self {
        Self::when(|| false)
    }
}

impl fmt::Debug for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stopped({})", self.now())
    }
}

/// How sources are read.
#[derive(Debug, Clone, Default)]
pub struct SourceOptions {
    /// Where true classes are read from.
    pub labels: Labels,
    /// Column of a list or table that has the path, or the picture's bytes.
    pub image_column: Option<String>,
    /// Column that has the true class.
    pub label_column: Option<String>,
    /// Bytes of a picture, at most.
    pub max_file_bytes: u64,
    /// Where objects are found.
    pub stores: Stores,
    /// When to take no more.
    pub stopped: Stopped,
    /// The share of the pictures that is wanted; an archive belongs to one share as a whole.
    pub shard: Shard,
}

/// One picture, as its source names it.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// A path; ARCHIVE/MEMBER; TABLE#ROW. It is what rows carry, and what a share and a resumed run go by.
    pub(crate) key: String,
    /// The true class, by label or index.
    pub(super) label: Option<String>,
    pub(super) content: Content,
}

#[derive(Debug, Clone)]
pub(super) enum Content {
    At(Place),
    Bytes(Bytes),
    /// It is known already that there is none.
    Lost(Fault),
    /// No picture: the source itself cannot be read further, for this reason.
    Broken(String),
}

impl Item {
    fn broken(source: &str, reason: &str) -> Self {
        let reason = format!("{source} cannot be read further: {reason}");
        Self { key: source.to_owned(), label: None, content: Content::Broken(reason) }
    }

    pub(super) fn is_broken(&self) -> bool {
        matches!(self.content, Content::Broken(_))
    }

    /// Whether `shard` is told of it. A source's end is every share's loss.
    fn is_for(&self, shard: Shard) -> bool {
        self.is_broken() || shard.has(&self.key)
    }
}

/// Why a picture cannot be scored: a word to count by and a sentence for its row.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) kind: &'static str,
    pub(super) detail: String,
}

impl Fault {
    pub(super) fn new(kind: &'static str, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    fn too_large(limit: u64) -> Self {
        Self::new("file_too_large", format!("the file is larger than {limit} bytes: raise --max-file-mb"))
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        let kind = if error.kind() == io::ErrorKind::NotFound { "file_not_found" } else { "file_not_readable" };
        Self::new(kind, error.to_string())
    }
}

/// The pictures of all inputs, in order.
pub struct Source {
    items: Box<dyn Iterator<Item = Item> + Send>,
    len: Option<u64>,
    labelled: bool,
}

impl Source {
    /// What `inputs` stand for, in their order:
    ///
    /// - a folder is every picture in it and below, by name;
    /// - a path with `*`, `?` or `[` that is no file is a pattern;
    /// - .txt, .csv, .jsonl, .ndjson, .parquet are lists and tables, .tar, .tar.gz, .tgz archives of pictures;
    /// - a URL (s3://, gs://, az://, file://) is the same in an object store, where patterns have `*` and `[`; one that ends
    ///   as neither list, archive nor picture is every picture below it;
    /// - `-` is a list of paths on `stdin`;
    /// - every other file is a picture; one that ends as pictures do may be missing, which its row will tell.
    ///
    /// # Errors
    /// When an input cannot be opened or holds no picture. What fails later is a row with an error, or, where the rest of
    /// an input is lost with it, stands in the summary.
    pub fn open(
        inputs: &[PathBuf],
        options: &SourceOptions,
        stdin: impl io::BufRead + Send + 'static,
    ) -> Result<Self, SourceError> {
        fits(inputs, options)?;
        let mut parts: Vec<Source> = Vec::new();
        let mut stdin = Some(stdin);
        for input in inputs {
            parts.push(if input == Path::new("-") {
                // Said twice it is empty the second time.
                stdin.take().map_or_else(|| Source::of_files(Vec::new(), options), |s| list::text_on_stdin(s, options))
            } else {
                Self::one(input, options)?
            });
        }
        let len = parts.iter().map(|part| part.len).sum();
        let labelled = parts.iter().any(|part| part.labelled);
        Ok(Self { items: Box::new(parts.into_iter().flat_map(|part| part.items)), len, labelled })
    }

    fn one(input: &Path, options: &SourceOptions) -> Result<Self, SourceError> {
        let text = input.to_string_lossy();
        let place = if text.contains("://") {
            Place::of(&text, &options.stores).map_err(|fault| SourceError::Url(fault.detail))?
        } else {
            Place::File(input.to_owned())
        };
        if let Place::File(path) = &place {
            if path.is_dir() {
                let (mut files, mut shut, mut passed) = (Vec::new(), Vec::new(), PassedOver::default());
                walk(path, &mut |found| match found {
                    Found::Picture(file) => files.push(Place::File(file)),
                    Found::Shut(folder, error) => {
                        let fault = Fault::new("folder_not_readable", format!("the folder cannot be read: {error}"));
                        shut.push(Item { key: Place::File(folder).name(), label: None, content: Content::Lost(fault) });
                    }
                    Found::Hidden(path) => passed.hidden.push(path),
                    Found::Link(path) => passed.links.push(path),
                    Found::Other(file) => passed.others.push(file),
                })
                .map_err(|cause| SourceError::Io { path: path.clone(), cause })?;
                passed.tell(path);
                let source = Self::of_folder(input, files, &endings(&passed.others), options)?;
                // Each folder that cannot be read is a row at the end.
                shut.retain(|item| options.shard.has(&item.key));
                let len = source.len.map(|n| n + shut.len() as u64);
                return Ok(Self { items: Box::new(source.items.chain(shut)), len, ..source });
            }
            if !path.exists() && text.contains(['*', '?', '[']) {
                return Ok(Self::of_files(pattern(path)?, options));
            }
        }
        if let Place::Object(object) = &place
            && object.is_pattern()
        {
            let fail = |reason: String| SourceError::Pattern { pattern: text.to_string(), reason };
            let found = object.matching().map_err(|error| fail(error.to_string()))?;
            if found.is_empty() {
                return Err(fail("no object matches".into()));
            }
            return Ok(Self::of_files(found.into_iter().map(Place::Object).collect(), options));
        }
        match (Form::of(input), &place) {
            (Form::Archive, _) => archive::open(place, options),
            (Form::Table, _) => table::open(place, options),
            (Form::Csv, _) => list::csv(place, options),
            (Form::JsonLines, _) => list::json_lines(place, options),
            (Form::Text, _) => list::text(place, options),
            // Stores have no folders: what is no picture by its name is the head of their names.
            (Form::Other, Place::Object(object)) if !has_picture_ending(input) => {
                let found = object.below().map_err(|cause| SourceError::Io { path: input.to_owned(), cause })?;
                let is_wanted =
                    |name: &str| has_picture_ending(Path::new(name)) && hidden_parts(name) <= hidden_parts(&text);
                let pictures = found.into_iter().filter(|o| is_wanted(&o.to_string()));
                Self::of_folder(input, pictures.map(Place::Object).collect(), "", options)
            }
            // A folder that was misspelt is no picture.
            (Form::Other, Place::File(path)) if !has_picture_ending(path) && !path.exists() => Err(SourceError::Io {
                path: path.clone(),
                cause: io::Error::new(io::ErrorKind::NotFound, "no such file or folder"),
            }),
            (Form::Other, _) => Ok(Self::of_files(vec![place], options)),
        }
    }

    /// `others` are the endings of what is there besides.
    fn of_folder(input: &Path, files: Vec<Place>, others: &str, options: &SourceOptions) -> Result<Self, SourceError> {
        if files.is_empty() {
            return Err(SourceError::NoImages { folder: input.to_owned(), others: others.to_owned() });
        }
        Ok(Self::of_files(files, options))
    }

    fn of_files(files: Vec<Place>, options: &SourceOptions) -> Self {
        let (labels, shard) = (options.labels, options.shard);
        // The only share has all, whatever they are called.
        let has = |place: &Place| shard.count() == 1 || shard.has(&place.name());
        let wanted: Vec<Place> = files.into_iter().filter(has).collect();
        let len = Some(wanted.len() as u64);
        let items = wanted.into_iter().map(move |place| picture(place, None, labels));
        Self { items: Box::new(items), len, labelled: labels == Labels::Folder }
    }

    /// The pictures that `produce` sends, from a thread that begins when the first of them is asked for. `name` is the
    /// file's.
    fn of_thread(
        name: String,
        labelled: bool,
        stopped: &Stopped,
        produce: impl FnOnce(&SyncSender<Item>) + Send + 'static,
    ) -> Self {
        let stopped = stopped.clone();
        let items = std::iter::once_with(move || {
            let (sender, receiver) = sync_channel(2);
            let source = name.clone();
            let produce = move || {
                // Readers of damaged files may panic, and what they have not told must not pass for the end.
                if catch_unwind(AssertUnwindSafe(|| produce(&sender))).is_err() {
                    // The receiver may have gone: nobody wants more then.
                    let _ = sender.send(Item::broken(&source, "it is damaged"));
                }
            };
            let spawned = thread::Builder::new().name("nbn-source".into()).spawn(produce);
            let fault = spawned.err().map(|error| Item::broken(&name, &error.to_string()));
            let sent = std::iter::from_fn(move || {
                // The thread may wait for ever, as a list on stdin does for its next line.
                while !stopped.now() {
                    match receiver.recv_timeout(Duration::from_millis(100)) {
                        Err(RecvTimeoutError::Timeout) => {}
                        sent => return sent.ok(),
                    }
                }
                None
            });
            fault.into_iter().chain(sent)
        });
        Self { items: Box::new(until_broken(items.flatten())), len: None, labelled }
    }

    fn of(items: impl Iterator<Item = Item> + Send + 'static, shard: Shard, labelled: bool) -> Self {
        let items = until_broken(items.filter(move |item| item.is_for(shard)));
        Self { items: Box::new(items), len: None, labelled }
    }

    pub(crate) fn next(&mut self) -> Option<Item> {
        self.items.next()
    }

    /// Pictures in all, where that is known beforehand.
    pub fn len(&self) -> Option<u64> {
        self.len
    }

    /// Whether pictures may come with their true class.
    pub fn has_labels(&self) -> bool {
        self.labelled
    }

    /// Whether it is known that there is none.
    pub fn is_empty(&self) -> bool {
        self.len == Some(0)
    }
}

/// `text`, which comes from a source, as a sentence quotes it: at most its first 200 bytes.
fn cut(text: &str) -> std::borrow::Cow<'_, str> {
    const MAX_QUOTED: usize = 200;
    if text.len() <= MAX_QUOTED {
        return text.into();
    }
    format!("{}… ({} bytes)", &text[..text.floor_char_boundary(MAX_QUOTED)], text.len()).into()
}

/// The items up to the first that says that there are no more.
fn until_broken(mut items: impl Iterator<Item = Item>) -> impl Iterator<Item = Item> {
    let mut broken = false;
    std::iter::from_fn(move || {
        let item = if broken { None } else { items.next() }?;
        broken = item.is_broken();
        Some(item)
    })
}

/// A picture at a place of its own.
fn picture(place: Place, label: Option<String>, labels: Labels) -> Item {
    let label = match labels {
        Labels::Folder => place.folder(),
        Labels::None => None,
        Labels::Given | Labels::Line => label,
    };
    Item { key: place.name(), label, content: Content::At(place) }
}

/// The pictures that match, by name; `**` stands for any folders.
fn pattern(input: &Path) -> Result<Vec<Place>, SourceError> {
    let text = input.to_string_lossy().into_owned();
    let fail = |reason: String| SourceError::Pattern { pattern: text.clone(), reason };
    let mut files = Vec::new();
    for entry in glob::glob(&text).map_err(|error| fail(error.to_string()))? {
        let path = entry.map_err(|error| fail(error.to_string()))?;
        // As in a shell, what is hidden matches only a pattern that says so.
        if path.is_file() && hidden_parts(&path.to_string_lossy()) <= hidden_parts(&text) {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(fail("no file matches".into()));
    }
    files.sort();
    Ok(files.into_iter().map(Place::File).collect())
}
