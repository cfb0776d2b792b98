//! Lists of some of a set's images: those that a run trained on, and those that it held out.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::source::{content, read};
use super::{DataError, GroupBy, LabelledImages};

/// What a list's images were for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// They were trained on.
    Training,
    /// They were held out.
    HeldOut,
}

/// A list, as it lies in a JSON file. `{"records": [0, 1, …]}`, or numbers alone, will do for one written by hand; one of a run
/// knows its images by their paths, so that it means the same ones when others came to the set or went.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Records {
    /// The set.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    /// What they were for.
    #[serde(skip_serializing_if = "Option::is_none")]
    purpose: Option<Purpose>,
    /// Seed of the draw.
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// What told which images stay together.
    #[serde(skip_serializing_if = "Option::is_none")]
    group_by: Option<String>,
    /// Images in the whole set.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<usize>,
    /// SHA-256 of the file that holds all pixels, where one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    /// Numbers of the images in the set's order, counted from 0.
    records: Vec<usize>,
    /// Their paths within the set; none where all pixels lie in one file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    images: Vec<String>,
    /// Where the list lies.
    #[serde(skip)]
    path: PathBuf,
}

impl Records {
    /// A list of `records` of the set `images` at `file`.
    pub fn new(file: &Path, images: &LabelledImages, records: &[usize], purpose: Purpose, seed: u64) -> Self {
        let paths = if images.are_in_one_file() { Vec::new() } else { records.iter().map(|&r| images.id(r)).collect() };
        Self {
            file: Some(file.to_owned()),
            purpose: Some(purpose),
            seed: Some(seed),
            of: Some(images.len()),
            sha256: images.digest(),
            records: records.to_vec(),
            images: paths,
            ..Self::default()
        }
    }

    /// Says what told which images stay together.
    #[must_use]
    pub fn grouped(mut self, by: Option<&GroupBy>) -> Self {
        self.group_by = by.map(ToString::to_string);
        self
    }

    /// Reads a list of at least one image.
    ///
    /// # Errors
    /// When the file cannot be read, has another form, or lists nothing.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let list = Self::load_any(path)?;
        if list.records.is_empty() {
            return Err(content(path, "lists no images"));
        }
        Ok(list)
    }

    /// Reads a list, which may be empty: a run may have held nothing out.
    ///
    /// # Errors
    /// When the file cannot be read or has another form.
    pub fn load_any(path: &Path) -> Result<Self, DataError> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Named(Records),
            Plain(Vec<usize>),
        }
        let written = serde_json::from_slice(&read(path)?)
            .map_err(|_| content(path, "expected JSON {\"records\": [0, 1, …]} or a list of record numbers"))?;
        let list = match written {
            Written::Named(list) => list,
            Written::Plain(records) => Self { records, ..Self::default() },
        };
        if !list.images.is_empty() && list.images.len() != list.records.len() {
            let (images, records) = (list.images.len(), list.records.len());
            return Err(content(path, &format!("has {images} images, but {records} records")));
        }
        let mut known = HashSet::new();
        if let Some(twice) = list.records.iter().find(|record| !known.insert(**record)) {
            return Err(content(path, &format!("lists image {twice} twice")));
        }
        Ok(Self { path: path.to_owned(), ..list })
    }

    /// Whether the list is of a run of an earlier version, which knew its images by their numbers alone.
    fn is_old(&self) -> bool {
        self.seed.is_some() && self.of.is_none()
    }

    /// Whether it does not say all that a list says today.
    pub fn is_outdated(&self) -> bool {
        self.of.is_none()
    }

    /// As it is written.
    pub fn to_json(&self) -> String {
        // Paths and numbers make JSON without fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What the list says that its images were for.
    pub fn purpose(&self) -> Option<Purpose> {
        self.purpose
    }

    /// What told which images stay together.
    pub fn group_by(&self) -> Option<&str> {
        self.group_by.as_deref()
    }

    /// Whether both lists mean the same images.
    pub fn is_same_as(&self, other: &Self) -> bool {
        if self.is_of_other_pixels(other) {
            return false;
        }
        if self.images.is_empty() || other.images.is_empty() {
            return self.records == other.records;
        }
        self.images == other.images
    }

    /// Whether the one file that holds all pixels is another.
    fn is_of_other_pixels(&self, other: &Self) -> bool {
        self.sha256.as_ref().zip(other.sha256.as_ref()).is_some_and(|(mine, theirs)| mine != theirs)
    }

    /// What tells this list from that of an earlier time, in words; nothing where it cannot be said.
    pub fn difference(&self, earlier: &Self) -> Option<String> {
        if self.is_same_as(earlier) {
            return None;
        }
        let of = |list: &Self| {
            let file = list.file.as_ref().map(|file| format!(" of {}", file.display())).unwrap_or_default();
            format!("{} images{file}", list.records.len())
        };
        let mut said = match self.purpose {
            Some(Purpose::HeldOut) => format!("it holds out {}, and held out {}", of(self), of(earlier)),
            _ => format!("it trains on {}, and did on {}", of(self), of(earlier)),
        };
        if self.is_of_other_pixels(earlier) {
            said += "; what is in the file has changed";
        }
        let mine: HashSet<&String> = self.images.iter().collect();
        let theirs: HashSet<&String> = earlier.images.iter().collect();
        if let Some(gone) = earlier.images.iter().find(|image| !mine.contains(image)) {
            said += &format!("; {gone} is no longer among them");
        }
        if let Some(new) = self.images.iter().find(|image| !theirs.contains(image)) {
            said += &format!("; {new} is new among them");
        }
        Some(said)
    }

    /// The images of `set` that the list means.
    ///
    /// # Errors
    /// When some are not there, or the set is not the one that was counted.
    pub fn select(&self, set: &LabelledImages) -> Result<LabelledImages, DataError> {
        set.select(&self.numbers(set)?)
    }

    fn numbers(&self, set: &LabelledImages) -> Result<Vec<usize>, DataError> {
        if self.is_old() && !set.are_in_one_file() {
            let reason = "is a list of an earlier version, which numbered the images of a folder: they may be others now. Go on \
                          with the run by --resume, which writes it anew";
            return Err(content(&self.path, reason));
        }
        let of_set = self.file.as_ref().map(|file| format!(", {}", file.display())).unwrap_or_default();
        if let (Some(mine), Some(found)) = (&self.sha256, set.digest())
            && *mine != found
        {
            let reason = format!(
                "numbers images of another file than {}: give the set that the list was made of{of_set}",
                set.origin().display()
            );
            return Err(content(&self.path, &reason));
        }
        if self.images.is_empty() || set.are_in_one_file() {
            return match self.of {
                Some(of) if of != set.len() => Err(content(
                    &self.path,
                    &format!(
                        "numbers images of a set of {of}, and {} has {}: the numbers would mean others. Give the set that the \
                         list was made of{}",
                        set.origin().display(),
                        set.len(),
                        self.file.as_ref().map(|file| format!(", {}", file.display())).unwrap_or_default()
                    ),
                )),
                _ => Ok(self.records.clone()),
            };
        }
        let mut by_path = None;
        let mut missing = Vec::new();
        let mut numbers = Vec::with_capacity(self.records.len());
        for (&record, path) in self.records.iter().zip(&self.images) {
            if record < set.len() && set.id(record) == *path {
                numbers.push(record);
                continue;
            }
            let by_path: &HashMap<String, usize> =
                by_path.get_or_insert_with(|| (0..set.len()).map(|index| (set.id(index), index)).collect());
            match by_path.get(path) {
                Some(&found) => numbers.push(found),
                None => missing.push(path),
            }
        }
        match missing.first() {
            None => Ok(numbers),
            Some(first) => Err(content(
                &self.path,
                &format!(
                    "{} of its {} images are not in {}, such as {first}: give the set that the list was made of{}",
                    missing.len(),
                    self.images.len(),
                    set.origin().display(),
                    self.file.as_ref().map(|file| format!(", {}", file.display())).unwrap_or_default()
                ),
            )),
        }
    }
}
