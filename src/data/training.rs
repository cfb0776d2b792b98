//! A set that is to be trained on: its classes, its long-tailed profile, and what is held out of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fastrand::Rng;

use super::source::{LIST, content, text};
use super::{DataError, Form, LabelledImages};
use crate::listing::{is_hidden, labelled};

/// Files beside a benchmark's own that name its classes.
const NAMES: [&str; 3] = ["classes.txt", "batches.meta.txt", "fine_label_names.txt"];
/// What keeps the draws of the profile and of the split apart.
const PROFILE: u64 = 0x9e37_79b9_7f4a_7c15;

/// A set to train on.
#[derive(Debug)]
pub struct TrainingSet {
    /// The file or folder that its record numbers count in.
    pub path: PathBuf,
    /// Its form.
    pub form: Form,
    /// Its classes, in the order of the logits.
    pub labels: Vec<String>,
    /// Its images.
    pub images: LabelledImages,
    /// The test set that lies beside it, where a benchmark has one.
    pub test: Option<PathBuf>,
}

impl TrainingSet {
    /// Opens the set at `path`: class folders, a list, or a benchmark's file or folder. `classes` names the classes, one a
    /// line; without it they are the folders, the names in the list, or those that the benchmark brings.
    ///
    /// # Errors
    /// When a file cannot be read or has another form.
    pub fn open(path: &Path, form: Option<Form>, classes: Option<&Path>) -> Result<Self, DataError> {
        let (path, test) = benchmark(path);
        let form = form.map_or_else(|| Form::guess(&path, 0), Ok)?;
        let labels = match classes {
            Some(file) => names(file)?,
            None => discover(&path, form)?,
        };
        let images = LabelledImages::open(&path, form, &labels)?;
        Ok(Self { path, form, labels, images, test })
    }

    /// Images per class of the `records`.
    pub fn counts(&self, records: &[usize]) -> Vec<u64> {
        let mut counts = vec![0; self.labels.len()];
        records.iter().for_each(|&r| counts[self.images.labels()[r] as usize] += 1);
        counts
    }
}

/// The training and the test file of a folder that holds a benchmark; any other path as it is.
fn benchmark(path: &Path) -> (PathBuf, Option<PathBuf>) {
    let pairs = [
        ("train.bin", "test.bin"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
    ];
    let test = |name: &str| Some(path.join(name)).filter(|p| p.exists());
    if path.join("data_batch_1.bin").exists() {
        return (path.to_owned(), test("test_batch.bin"));
    }
    match pairs.iter().find(|(train, _)| path.join(train).is_file()) {
        Some((train, name)) => (path.join(train), test(name)),
        None => (path.to_owned(), None),
    }
}

fn names(file: &Path) -> Result<Vec<String>, DataError> {
    let text = text(file, "expected one label per line")?;
    let labels: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    let mut seen = BTreeSet::new();
    match labels.iter().find(|label| !seen.insert(*label)) {
        Some(twice) => Err(content(file, &format!("names the class {twice:?} twice; labels must differ"))),
        None if labels.is_empty() => Err(content(file, "names no class: expected one label per line")),
        None => Ok(labels),
    }
}

fn discover(path: &Path, form: Form) -> Result<Vec<String>, DataError> {
    let numbered = |highest: usize| -> Vec<String> { (0..=highest).map(|k| format!("class {k}")).collect() };
    let by_name = |found: BTreeSet<String>| {
        let indices: Option<Vec<usize>> = found.iter().map(|l| l.parse().ok()).collect();
        match indices.and_then(|indices| indices.into_iter().max()) {
            Some(highest) if highest < (1 << 20) => numbered(highest),
            _ => found.into_iter().collect(),
        }
    };
    match form {
        Form::Folder => {
            let fail = |cause| DataError::Read { path: path.to_owned(), cause };
            let mut labels = Vec::new();
            for entry in fs::read_dir(path).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                if entry.path().is_dir() && !is_hidden(&entry.path()) {
                    labels.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
            labels.sort();
            Ok(labels)
        }
        Form::List => {
            let text = text(path, LIST)?;
            let base = path.parent().unwrap_or(Path::new("."));
            let mut found = BTreeSet::new();
            for (n, line) in text.lines().enumerate() {
                let Some((file, label)) = labelled(line, |_| false) else { continue };
                // A second space belongs to the file's name or to the class's.
                if file.contains(char::is_whitespace) && !base.join(file).is_file() {
                    let reason = format!(
                        "line {}: {file:?} is not a file; if names of classes contain spaces, give the names with \
                         --classes",
                        n + 1
                    );
                    return Err(content(path, &reason));
                }
                found.insert(label.to_owned());
            }
            Ok(by_name(found))
        }
        Form::Csv => Ok(by_name(super::table::labels(path)?.into_iter().collect())),
        Form::Cifar10 | Form::Cifar100 | Form::Idx => {
            let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
            if let Some(file) = NAMES.iter().map(|n| folder.join(n)).find(|p| p.exists()) {
                return names(&file);
            }
            Ok(numbered(if form == Form::Cifar100 { 99 } else { 9 }))
        }
        Form::Logits => Err(content(path, "holds logits; training needs images")),
    }
}

/// Cuts the set to an exponential profile: class k of K keeps ⌊n·F^(−k/(K−1))⌋ of its images, drawn with `seed`, where n is
/// the number of images of class 0 (arXiv 1901.05555). Returns record numbers in the set's order.
///
/// # Errors
/// Names the class that has too few images, or that the factor leaves none.
pub fn long_tail(labels: &[u32], names: &[String], factor: f64, seed: u64) -> Result<Vec<usize>, String> {
    let largest = labels.iter().filter(|&&l| l == 0).count();
    let mut rng = Rng::with_seed(seed ^ PROFILE);
    let mut kept = Vec::new();
    for (k, name) in names.iter().enumerate() {
        let share = factor.powf(-(k as f64) / (names.len() - 1).max(1) as f64);
        // A whole number may come out a little below itself.
        let count = (largest as f64 * share + 1e-9).floor() as usize;
        let mut of_class: Vec<usize> = (0..labels.len()).filter(|&r| labels[r] as usize == k).collect();
        if count == 0 && !of_class.is_empty() {
            return Err(format!(
                "--imbalance-factor {factor} leaves class {k} ({name}) none of its {} images, because class 0 ({}) \
                 has {largest}: give {largest} at most",
                of_class.len(),
                names[0]
            ));
        }
        if of_class.len() < count {
            return Err(format!(
                "class {k} ({name}) has {} images; --imbalance-factor {factor} needs {count}: give a higher factor, \
                 or list the classes in descending order of size, in a file that --classes names",
                of_class.len()
            ));
        }
        rng.shuffle(&mut of_class);
        kept.extend_from_slice(&of_class[..count]);
    }
    kept.sort_unstable();
    Ok(kept)
}

/// Records to train on and records that are held out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Split {
    /// In the set's order.
    pub training: Vec<usize>,
    /// In the set's order.
    pub held_out: Vec<usize>,
    /// Classes of which none is held out, because they have a single image, or a single group of images.
    pub alone: Vec<usize>,
}

/// Holds `fraction` of each class out, drawn with `seed`: one image at least, and never the last one.
///
/// # Errors
/// Names a class that is empty.
pub fn hold_out(
    labels: &[u32],
    records: &[usize],
    names: &[String],
    fraction: f64,
    seed: u64,
) -> Result<Split, String> {
    let mut rng = Rng::with_seed(seed);
    let mut split = Split::default();
    for (k, name) in names.iter().enumerate() {
        let mut of_class: Vec<usize> = records.iter().copied().filter(|&r| labels[r] as usize == k).collect();
        if of_class.is_empty() {
            return Err(format!("class {k} ({name}) has no images that can be decoded: add some, or remove the class"));
        }
        let wanted = if fraction > 0.0 { ((of_class.len() as f64 * fraction).round() as usize).max(1) } else { 0 };
        let count = wanted.min(of_class.len() - 1);
        if count < wanted && count == 0 {
            split.alone.push(k);
        }
        rng.shuffle(&mut of_class);
        split.held_out.extend_from_slice(&of_class[..count]);
        split.training.extend_from_slice(&of_class[count..]);
    }
    split.training.sort_unstable();
    split.held_out.sort_unstable();
    Ok(split)
}
