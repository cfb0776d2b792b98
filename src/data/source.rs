//! Where labelled images come from.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::DataError;
use super::table::{self, Columns};
use crate::bundle::{Exif, sha256_hex};
use crate::gzip::Gunzip;
use crate::listing::{Found, PassedOver, endings, is_hidden, labelled, walk};
use crate::pixels::{DecodeLimits, ENDINGS, Picture, RgbImage, decode_at_least, has_picture_ending};
use crate::stop::Stop;

const CIFAR_SIDE: usize = 32;
const CIFAR_PIXELS: usize = 3 * CIFAR_SIDE * CIFAR_SIDE;
/// The first of the files that CIFAR-10's binary version is published in.
const CIFAR10_BATCH: &str = "data_batch_1.bin";

/// The form of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A folder with one folder of images per class, named by the class's label
    Folder,
    /// A text file with one `path label` per line; paths are relative to its folder, labels are names or indices
    List,
    /// A CSV file with a header: the images' paths, relative to its folder, in the column `path` (or image, file, …), their
    /// labels in `label` (or class, target), and more for --group-by
    Csv,
    /// CIFAR-10's binary version: a label byte, then 3072 pixel bytes; one file, or the folder with the five published
    /// ones
    Cifar10,
    /// CIFAR-100's binary version: a byte each for the coarse and the fine label, then 3072 pixel bytes
    Cifar100,
    /// IDX, as used by MNIST and Fashion-MNIST: …-images-idx3-ubyte[.gz], with …-labels-idx1-ubyte[.gz] beside it
    Idx,
    /// A safetensors file with `logits` [N, K] (f32) and `labels` [N] (i64)
    Logits,
}

impl Form {
    /// The form that `path` most likely has.
    ///
    /// # Errors
    /// When there is nothing at `path`.
    pub fn guess(path: &Path, classes: usize) -> Result<Self, DataError> {
        let metadata = fs::metadata(path).map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let size = metadata.len() as usize;
        Ok(if path.join(CIFAR10_BATCH).is_file() {
            Self::Cifar10
        } else if metadata.is_dir() {
            Self::Folder
        } else if has_picture_ending(path) {
            let reason = "is one image: give a folder that holds a folder of images per class, or a list of images";
            return Err(content(path, reason));
        } else if name.ends_with(".safetensors") {
            Self::Logits
        } else if name.ends_with(".csv") || name.ends_with(".tsv") {
            Self::Csv
        } else if name.contains("idx3-ubyte") {
            Self::Idx
        } else if name.ends_with(".bin") {
            let hundred =
                size.is_multiple_of(2 + CIFAR_PIXELS) && (classes == 100 || !size.is_multiple_of(1 + CIFAR_PIXELS));
            if hundred { Self::Cifar100 } else { Self::Cifar10 }
        } else {
            Self::List
        })
    }
}

/// One image, still where it was found.
#[derive(Debug, Clone)]
enum Item {
    File(PathBuf),
    /// Planes of bytes in `store`, from `at`.
    Raw {
        at: usize,
    },
}

/// Pixels of a set that keeps them all in one file.
#[derive(Debug, Clone)]
struct Store {
    bytes: Arc<[u8]>,
    width: usize,
    height: usize,
    planes: usize,
}

/// Images and the index of each one's class.
#[derive(Debug, Clone)]
pub struct LabelledImages {
    items: Vec<Item>,
    labels: Vec<u32>,
    store: Option<Store>,
    origin: PathBuf,
    /// The folder that paths are told from: the set's, or that of its list.
    base: PathBuf,
    columns: Option<Columns>,
}

impl LabelledImages {
    /// Opens the set at `path`, whose classes are `labels` in the order of the logits.
    ///
    /// # Errors
    /// When a file cannot be read, or a label is none of `labels`.
    pub fn open(path: &Path, form: Form, labels: &[String]) -> Result<Self, DataError> {
        let set = match form {
            Form::Folder => folder(path, labels),
            Form::List => list(path, labels),
            Form::Csv => table::open(path, labels),
            Form::Cifar10 => cifar(path, labels, 1),
            Form::Cifar100 => cifar(path, labels, 2),
            Form::Idx => idx(path, labels),
            Form::Logits => Err(content(path, "holds logits, not images: give the images themselves")),
        }?;
        if set.items.is_empty() {
            return Err(content(path, "holds no images"));
        }
        Ok(set)
    }

    /// All pictures in `path` and below, of whatever they are; each has the label 0.
    ///
    /// # Errors
    /// When a folder cannot be read, or there is no picture.
    pub fn without_classes(path: &Path) -> Result<Self, DataError> {
        let mut passed = PassedOver::default();
        let files = pictures_below(path, &mut passed)?;
        if files.is_empty() {
            let others = endings(&passed.others);
            let has = if others.is_empty() { String::new() } else { format!(", only files {others}") };
            return Err(content(path, &format!("holds no images{has}")));
        }
        passed.tell(path);
        let labels = vec![0; files.len()];
        Self::of_files(files, labels, path, None)
    }

    /// Of `files`, whose classes are `labels`; `origin` says so, in `columns` if it has more to say.
    ///
    /// # Errors
    /// When a file has two labels.
    pub(super) fn of_files(
        files: Vec<PathBuf>,
        labels: Vec<u32>,
        origin: &Path,
        columns: Option<Columns>,
    ) -> Result<LabelledImages, DataError> {
        let mut known: HashMap<&Path, u32> = HashMap::with_capacity(files.len());
        for (file, &label) in files.iter().zip(&labels) {
            if *known.entry(file).or_insert(label) != label {
                let reason = format!("gives {} two labels: keep one, since an image has one class", file.display());
                return Err(content(origin, &reason));
            }
        }
        let items = files.into_iter().map(Item::File).collect();
        let base = if origin.is_dir() { origin } else { origin.parent().unwrap_or(origin) }.to_owned();
        Ok(Self { items, labels, store: None, origin: origin.to_owned(), base, columns })
    }

    /// What a table says of the images besides.
    pub(super) fn columns(&self) -> Option<&Columns> {
        self.columns.as_ref()
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// The file or folder that they were read from.
    pub(super) fn origin(&self) -> &Path {
        &self.origin
    }

    /// Whether the pixels of all lie in one file, as they are: such images cannot be damaged one by one.
    pub(super) fn are_in_one_file(&self) -> bool {
        self.store.is_some()
    }

    /// SHA-256 of that file.
    pub(super) fn digest(&self) -> Option<String> {
        self.store.as_ref().map(|store| sha256_hex(&store.bytes))
    }

    /// Whether there is none; [`LabelledImages::open`] refuses such a set.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Index of each image's class.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Keeps the images with these numbers, counted from 0 in the set's order.
    ///
    /// # Errors
    /// When a number is beyond the set.
    pub fn select(&self, records: &[usize]) -> Result<Self, DataError> {
        if let Some(beyond) = records.iter().find(|&&r| r >= self.len()) {
            let reason = format!("has {} images, counted from 0, but record {beyond} is asked for", self.len());
            return Err(content(&self.origin, &reason));
        }
        Ok(Self {
            items: records.iter().map(|&r| self.items[r].clone()).collect(),
            labels: records.iter().map(|&r| self.labels[r]).collect(),
            store: self.store.clone(),
            origin: self.origin.clone(),
            base: self.base.clone(),
            columns: self.columns.as_ref().map(|columns| columns.select(records)),
        })
    }

    /// What tells the image from the set's others: its path within the set, or where its pixels start.
    pub fn id(&self, index: usize) -> String {
        match &self.items[index] {
            Item::File(path) => {
                // The one may be relative and the other not.
                let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
                let within = path.strip_prefix(&self.base).map_or_else(
                    |_| {
                        let path = whole(path);
                        path.strip_prefix(whole(&self.base)).map(Path::to_owned).unwrap_or(path)
                    },
                    Path::to_owned,
                );
                // Names that are no text must not look alike.
                within.to_str().map_or_else(|| format!("{within:?}"), str::to_owned)
            }
            Item::Raw { at } => at.to_string(),
        }
    }

    /// The image's path, or its record number.
    pub fn name(&self, index: usize) -> String {
        match &self.items[index] {
            Item::File(path) => path.display().to_string(),
            Item::Raw { .. } => format!("{} record {index}", self.origin.display()),
        }
    }

    /// Whether the bytes of the image can be had, whatever they are. A link may lead nowhere, or a disk be missing.
    pub fn is_readable(&self, index: usize) -> bool {
        match &self.items[index] {
            Item::File(path) => {
                fs::File::open(path).is_ok_and(|file| file.metadata().is_ok_and(|found| found.is_file()))
            }
            Item::Raw { .. } => true,
        }
    }

    /// Decodes an image.
    ///
    /// # Errors
    /// A sentence without the image's name.
    pub fn picture(&self, index: usize, exif: Exif, limits: &DecodeLimits) -> Result<Picture, String> {
        self.picture_at_least(index, exif, limits, None)
    }

    /// As [`Self::picture`], or of a JPEG as few pixels as leave `least` along the shorter side.
    ///
    /// # Errors
    /// As [`Self::picture`].
    pub fn picture_at_least(
        &self,
        index: usize,
        exif: Exif,
        limits: &DecodeLimits,
        least: Option<u32>,
    ) -> Result<Picture, String> {
        match (&self.items[index], &self.store) {
            (Item::File(path), _) => {
                let bytes = fs::read(path).map_err(|error| error.to_string())?;
                decode_at_least(&bytes, exif, limits, &Stop::default(), least).map_err(|error| error.to_string())
            }
            (Item::Raw { at }, Some(store)) => Picture::try_from(store.picture(*at)).map_err(|error| error.to_string()),
            (Item::Raw { .. }, None) => Err("has no pixels".into()),
        }
    }
}

impl Store {
    fn picture(&self, at: usize) -> RgbImage {
        let plane = self.width * self.height;
        let bytes = &self.bytes[at..at + plane * self.planes];
        RgbImage::from_fn(self.width as u32, self.height as u32, |x, y| {
            let at = y as usize * self.width + x as usize;
            let channel = |c: usize| bytes[at + plane * c.min(self.planes - 1)];
            image::Rgb([channel(0), channel(1), channel(2)])
        })
    }
}

/// The pictures in `folder` and below; what else is there is added to `passed`.
///
/// # Errors
/// When a folder cannot be read.
fn pictures_below(folder: &Path, passed: &mut PassedOver) -> Result<Vec<PathBuf>, DataError> {
    let read = |path: &Path, cause| DataError::Read { path: path.to_owned(), cause };
    let (mut pictures, mut shut) = (Vec::new(), None);
    let walked = walk(folder, &mut |found| match found {
        Found::Picture(path) => pictures.push(path),
        Found::Shut(path, cause) => shut = shut.take().or(Some(read(&path, cause))),
        Found::Hidden(path) => passed.hidden.push(path),
        Found::Link(path) => passed.links.push(path),
        Found::Other(path) => passed.others.push(path),
    });
    walked.map_err(|cause| read(folder, cause))?;
    shut.map_or(Ok(pictures), Err)
}

fn folder(path: &Path, labels: &[String]) -> Result<LabelledImages, DataError> {
    let mut set = LabelledImages::of_files(Vec::new(), Vec::new(), path, None)?;
    let (mut unknown, mut loose, mut passed) = (Vec::new(), Vec::new(), PassedOver::default());
    for class in entries(path)? {
        if is_hidden(&class) {
            passed.hidden.push(class);
            continue;
        }
        if let Some(error) = fs::metadata(&class).err().filter(|_| class.is_symlink() && !has_picture_ending(&class)) {
            if class.file_name().and_then(OsStr::to_str).is_some_and(|name| labels.iter().any(|label| label == name)) {
                let reason = format!("{} is a link that cannot be followed: {error}: correct it", class.display());
                return Err(content(path, &reason));
            }
            passed.broken_links.push(class);
            continue;
        }
        if !class.is_dir() {
            if has_picture_ending(&class) {
                loose.push(class);
            } else {
                passed.others.push(class);
            }
            continue;
        }
        let name = class.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(label) = labels.iter().position(|l| *l == name) else {
            unknown.push(name);
            continue;
        };
        set.items.extend(pictures_below(&class, &mut passed)?.into_iter().map(Item::File));
        set.labels.resize(set.items.len(), label as u32);
    }
    passed.tell(path);
    if let Some(first) = loose.first() {
        tracing::warn!(
            "{}: images outside of the classes' folders are left out: {}, such as {}",
            path.display(),
            loose.len(),
            first.display()
        );
    }
    if let Some(first) = unknown.first() {
        let reason = format!(
            "has {} folder(s) that are not named after a class of the model, the first is {first:?}: give each folder \
             the label of its class as its name, such as {:?}",
            unknown.len(),
            labels.first().map_or("", String::as_str)
        );
        return Err(content(path, &reason));
    }
    if set.items.is_empty() {
        let others = &passed.others;
        let seen = if others.is_empty() { String::new() } else { format!("; it holds files {}", endings(others)) };
        let reason = format!(
            "holds no class folder with images, which end in .{}: expected FOLDER/LABEL/image.jpg{seen}",
            ENDINGS.join(", .")
        );
        return Err(content(path, &reason));
    }
    Ok(set)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let fail = |cause| DataError::Read { path: folder.to_owned(), cause };
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).map_err(fail)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().map_err(fail)?;
    entries.sort();
    Ok(entries)
}

fn list(path: &Path, labels: &[String]) -> Result<LabelledImages, DataError> {
    let text = text(path, LIST)?;
    let index = class_index(labels);
    let known: HashSet<&str> = labels.iter().map(String::as_str).collect();
    let base = path.parent().unwrap_or(Path::new("."));
    let (mut files, mut classes) = (Vec::new(), Vec::new());
    for (n, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let wrong = |reason: &str| content(path, &format!("line {}: {reason}", n + 1));
        let Some((file, label)) = labelled(line, |label| known.contains(label)) else {
            return Err(wrong(&format!("{line:?}: expected a path, a space, and a class's label or index")));
        };
        files.push(base.join(file));
        classes.push(index(label).map_err(|reason| wrong(&reason))?);
    }
    LabelledImages::of_files(files, classes, path, None)
}

/// Finds the class of a text that is a label or a class's number.
pub(super) fn class_index(labels: &[String]) -> impl Fn(&str) -> Result<u32, String> {
    let index: HashMap<String, u32> = labels.iter().cloned().zip(0..).collect();
    let count = labels.len();
    move |label| match index.get(label).copied().or_else(|| label.parse().ok()) {
        Some(found) if (found as usize) < count => Ok(found),
        Some(number) => {
            Err(format!("label {number} is out of range; the model has {count} classes, 0 to {}", count - 1))
        }
        None => {
            Err(format!("{label:?} is no class of the model, nor its number: expected a path, and a label or index"))
        }
    }
}

fn cifar(path: &Path, labels: &[String], label_bytes: usize) -> Result<LabelledImages, DataError> {
    let bytes = if path.is_dir() {
        let files: Result<Vec<_>, _> = (1..=5).map(|n| read(&path.join(format!("data_batch_{n}.bin")))).collect();
        files?.concat()
    } else {
        read(path)?
    };
    let record = label_bytes + CIFAR_PIXELS;
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        let reason = format!(
            "is {} bytes long, which is not a multiple of the record length {record}: it is not CIFAR's binary version",
            bytes.len()
        );
        return Err(content(path, &reason));
    }
    let count = bytes.len() / record;
    let labels = check_labels(path, (0..count).map(|r| bytes[r * record + label_bytes - 1]).collect(), labels)?;
    let items = (0..count).map(|r| Item::Raw { at: r * record + label_bytes }).collect();
    let store = Store { bytes: bytes.into(), width: CIFAR_SIDE, height: CIFAR_SIDE, planes: 3 };
    Ok(LabelledImages {
        items,
        labels,
        store: Some(store),
        origin: path.to_owned(),
        base: path.to_owned(),
        columns: None,
    })
}

fn idx(path: &Path, labels: &[String]) -> Result<LabelledImages, DataError> {
    let (dimensions, pixels, at) = read_idx(path)?;
    let [count, height, width] = dimensions[..] else {
        return Err(content(
            path,
            &format!("has {} dimensions; images have 3: give the file …-images-idx3-ubyte", dimensions.len()),
        ));
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().replace("images-idx3", "labels-idx1");
    let beside = path.with_file_name(name);
    let (label_dimensions, label_bytes, label_at) = read_idx(&beside)?;
    if label_dimensions != [count] {
        return Err(content(&beside, &format!("has labels of shape {label_dimensions:?} for {count} images")));
    }
    let labels = check_labels(&beside, label_bytes[label_at..].to_vec(), labels)?;
    let items = (0..count).map(|n| Item::Raw { at: at + n * height * width }).collect();
    let store = Store { bytes: pixels.into(), width, height, planes: 1 };
    Ok(LabelledImages {
        items,
        labels,
        store: Some(store),
        origin: path.to_owned(),
        base: path.to_owned(),
        columns: None,
    })
}

/// Dimensions, all bytes, and where the data starts. Source: yann.lecun.com/exdb/mnist, "the IDX file format".
fn read_idx(path: &Path) -> Result<(Vec<usize>, Vec<u8>, usize), DataError> {
    let mut bytes = read(path)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        Gunzip::new(&bytes[..])
            .read_to_end(&mut unpacked)
            .map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
        bytes = unpacked;
    }
    let broken = || content(path, "is not an IDX file of bytes, or is cut short");
    let &[0, 0, 8, rank, ..] = &bytes[..] else { return Err(broken()) };
    let at = 4 + 4 * usize::from(rank);
    let header = bytes.get(4..at).ok_or_else(broken)?;
    let dimensions: Vec<usize> =
        header.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize).collect();
    let size = dimensions.iter().try_fold(1usize, |size, d| size.checked_mul(*d));
    if size.and_then(|s| s.checked_add(at)) != Some(bytes.len()) || dimensions.contains(&0) {
        return Err(broken());
    }
    Ok((dimensions, bytes, at))
}

fn check_labels(path: &Path, found: Vec<u8>, labels: &[String]) -> Result<Vec<u32>, DataError> {
    if let Some(record) = found.iter().position(|&l| usize::from(l) >= labels.len()) {
        let reason = format!(
            "record {record} has label {}; the model has {} classes, 0 to {}: is this the right set for it? For \
             training, give the names of a set's classes with --classes",
            found[record],
            labels.len(),
            labels.len() - 1
        );
        return Err(content(path, &reason));
    }
    Ok(found.into_iter().map(u32::from).collect())
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, DataError> {
    let fail = |cause| DataError::Read { path: path.to_owned(), cause };
    let mut bytes = Vec::new();
    File::open(path).map_err(fail)?.read_to_end(&mut bytes).map_err(fail)?;
    Ok(bytes)
}

/// What a list is.
pub(super) const LIST: &str = "a list has one `path label` per line";

/// The text of a file, without a byte order mark.
pub(super) fn text(path: &Path, what: &str) -> Result<String, DataError> {
    let text = String::from_utf8(read(path)?).map_err(|_| content(path, &format!("is not UTF-8 text: {what}")))?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

pub(super) fn content(path: &Path, reason: &str) -> DataError {
    DataError::Content { path: path.to_owned(), reason: reason.to_owned() }
}
