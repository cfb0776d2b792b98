//! `manifest.json`: what a network expects, answers with, and was made from.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::MODEL_FILE;
use super::fold_report::{FoldReport, Head, Reference};
use super::preprocessing::{Color, MAX_SIDE, Preprocessing, Resize, Size};

/// Newest version of the manifest's form, which this build writes where the first cannot say what it has to; it reads both.
pub const SCHEMA_VERSION: u32 = 2;
/// Oldest version of the manifest's form that this build reads.
const OLDEST_SCHEMA_VERSION: u32 = 1;
/// Most classes, so that sums of [`MAX_COUNT`] cannot overflow.
pub(super) const MAX_CLASSES: usize = 1 << 20;
/// Most training images of a class, and most calibration images.
pub(super) const MAX_COUNT: u64 = 1 << 40;
/// Longest class label, and longest other name, in characters.
const MAX_NAME: usize = 1000;
/// Largest number in `evaluation`, which may hold anything that is JSON: f64 holds whole numbers up to it.
const MAX_FREE_NUMBER: f64 = 1e15;
/// Longest text in `evaluation`, in characters.
const MAX_FREE_TEXT: usize = 10_000;
/// Characters of a value that an error quotes.
const QUOTED: usize = 100;

/// The content of `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Form of this file; [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The network, e.g. `resnet50`, `resnext50_32x4d`, `cifar_resnet20`.
    pub arch: String,
    /// The classes in the order of the logits.
    pub classes: Vec<Class>,
    /// From a decoded picture to the network's input.
    pub preprocessing: Preprocessing,
    /// What was merged, and the proof that it changed nothing.
    pub fold: FoldReport,
    /// The checkpoint that was folded.
    pub checkpoint: FileDigest,
    /// The network file of this bundle.
    pub model: FileDigest,
    /// Files of this bundle that hold weights of the network which are not in its own file. That names their digests, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub model_data: Vec<FileDigest>,
    /// Measured accuracy and how it was measured, as given to `nbn fold export --evaluation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Value>,
}

/// One class.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name.
    pub label: String,
    /// Training images, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// The class groups of long-tailed recognition, by training images per class.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// More than 100 training images.
    Many,
    /// 20 to 100 training images.
    Medium,
    /// Fewer than 20 training images.
    Few,
}

impl Group {
    /// The group of a class with `count` training images.
    pub fn of(count: u64) -> Self {
        match count {
            0..20 => Self::Few,
            20..=100 => Self::Medium,
            _ => Self::Many,
        }
    }

    /// `many`, `medium` or `few`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Many => "many",
            Self::Medium => "medium",
            Self::Few => "few",
        }
    }
}

impl Class {
    /// The class's group, when its count is known.
    pub fn group(&self) -> Option<Group> {
        self.count.map(Group::of)
    }
}

/// A file and its SHA-256.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct FileDigest {
    /// File name, without a folder.
    pub file: String,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// A rule that a manifest breaks.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ManifestError {
    /// Written by another version.
    #[error(
        "schema_version is {0}; this build reads {OLDEST_SCHEMA_VERSION} to {SCHEMA_VERSION}: use a matching release or \
         export again"
    )]
    Schema(u32),
    /// Too few or too many classes.
    #[error("it has {0} classes; a classifier has at least 2, and this build reads at most {MAX_CLASSES}")]
    Classes(usize),
    /// Two classes of one name.
    #[error("class label {0:?} appears twice; labels must differ")]
    Duplicate(String),
    /// A value out of range.
    #[error("{what} is {value}; {limit}")]
    Value {
        /// Which.
        what: String,
        /// Its value, cut where it is long.
        value: String,
        /// What it must be.
        limit: &'static str,
    },
    /// Sizes out of range.
    #[error(
        "the preprocessing has \"{resize}\" and crop {crop}; sides must lie in 1..={MAX_SIDE}, and a crop may be larger than what \
         pictures are resized to only where they are fitted in"
    )]
    Size {
        /// What pictures are resized to.
        resize: Resize,
        /// What is cut out of them.
        crop: Size,
    },
    /// A mean or standard deviation of other channels.
    #[error(
        "{color} has {} channel{}, but mean {mean:?} and std {std:?} have {} and {}", color.channels(),
        if color.channels() == 1 { "" } else { "s" }, mean.len(), std.len()
    )]
    Channels {
        /// The channels.
        color: Color,
        /// Mean per channel.
        mean: Vec<f32>,
        /// Standard deviation per channel.
        std: Vec<f32>,
    },
    /// A mean or standard deviation that leaves no usable pixels.
    #[error("mean {mean:?}, std {std:?}; every mean must lie in -1000..=1000 and every std in 0.000001..=1000000")]
    Normalization {
        /// Mean per channel.
        mean: Vec<f32>,
        /// Standard deviation per channel.
        std: Vec<f32>,
    },
}

impl Manifest {
    /// The oldest version of the form that can say what this manifest does.
    pub fn lowest_schema_version(&self) -> u32 {
        let fold = &self.fold;
        let plain = fold.head.is_some()
            && fold.onnx.is_none()
            && fold.batch_norms_left.is_empty()
            && self.model_data.is_empty();
        let proof = &fold.proof;
        let proved = proof.reference == Reference::Checkpoint
            && proof.pictures == 0
            && proof.assumed.is_empty()
            && proof.expected.is_none();
        let plain = plain && fold.head != Some(Head::Cosine) && fold.preprocessing_from.is_none();
        let plain = plain && fold.quantization.is_none();
        if plain && proved && self.preprocessing.is_of_first_schema() { OLDEST_SCHEMA_VERSION } else { SCHEMA_VERSION }
    }

    /// Most pictures of one run of the network, where it has a limit of its own.
    pub fn max_batch(&self) -> Option<usize> {
        self.fold.onnx.as_ref().filter(|onnx| onnx.one_by_one).map(|_| 1)
    }

    /// What the network computes with: `float32`, or `int8`.
    pub fn precision(&self) -> &'static str {
        if self.fold.quantization.is_some() { "int8" } else { "float32" }
    }

    /// Whether the network has an output of this name.
    pub fn has_output(&self, name: &str) -> bool {
        self.fold.proof.outputs.iter().any(|proof| proof.output == name)
    }

    /// Checks what the types alone cannot hold.
    ///
    /// # Errors
    /// Names the first rule that is broken.
    pub fn check(&self) -> Result<(), ManifestError> {
        if !(OLDEST_SCHEMA_VERSION..=SCHEMA_VERSION).contains(&self.schema_version) {
            return Err(ManifestError::Schema(self.schema_version));
        }
        check_name("arch", &self.arch)?;
        check_classes(&self.classes)?;
        self.preprocessing.check()?;
        self.fold.check()?;
        self.checkpoint.check("checkpoint")?;
        self.model.check("model")?;
        if self.model.file != MODEL_FILE {
            return Err(value("model.file", &format!("{:?}", cut(&self.model.file)), "it must be model.onnx"));
        }
        if self.schema_version < SCHEMA_VERSION && !self.model_data.is_empty() {
            return Err(value("schema_version", &self.schema_version, "it must be 2 with model_data"));
        }
        let mut names: Vec<&str> = self.model_data.iter().map(|file| file.file.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(value("model_data.file", &format!("{:?}", cut(pair[0])), "each file is named once"));
        }
        self.model_data.iter().try_for_each(|file| {
            file.check("model_data")?;
            // A name must not lead out of the bundle.
            match is_data_file(&file.file) {
                true => Ok(()),
                false => Err(value("model_data.file", &format!("{:?}", cut(&file.file)), "it must be model.data.N")),
            }
        })?;
        self.evaluation.as_ref().map_or(Ok(()), |evaluation| check_free(None, evaluation))
    }
}

/// Prefix of the names of files with weights; a number follows.
pub const DATA_FILE: &str = "model.data.";

/// Whether `name` is that of a bundle's file with weights.
pub fn is_data_file(name: &str) -> bool {
    let number = name.strip_prefix(DATA_FILE);
    number.is_some_and(|n| (1..=5).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Checks the number of classes, their labels and their counts.
///
/// # Errors
/// Names the first rule that is broken.
pub fn check_classes(classes: &[Class]) -> Result<(), ManifestError> {
    if !(2..=MAX_CLASSES).contains(&classes.len()) {
        return Err(ManifestError::Classes(classes.len()));
    }
    let mut seen = std::collections::HashSet::new();
    for (index, class) in classes.iter().enumerate() {
        check_name(&format!("the label of class {index}"), &class.label)?;
        if !seen.insert(&class.label) {
            return Err(ManifestError::Duplicate(cut(&class.label)));
        }
        if let Some(count) = class.count.filter(|count| *count > MAX_COUNT) {
            let what = format!("the count of class {:?}", cut(&class.label));
            return Err(value(what, &count, "a class has at most 2^40 training images"));
        }
    }
    Ok(())
}

/// Checks the numbers and the texts in `found`, which lies in `evaluation` under `key`.
fn check_free(key: Option<&str>, found: &Value) -> Result<(), ManifestError> {
    let what = |kind: &str| match key {
        Some(key) => format!("{kind} {:?} in evaluation", cut(key)),
        None => format!("{kind} in evaluation"),
    };
    let text = |kind: &str, text: &str| match text.chars().nth(MAX_FREE_TEXT) {
        Some(_) => Err(value(what(kind), &format!("{:?}", cut(text)), "it may have at most 10000 characters")),
        None => Ok(()),
    };
    match found {
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(number) if number.as_f64().is_some_and(|number| number.abs() <= MAX_FREE_NUMBER) => Ok(()),
        Value::Number(number) => Err(value(what("the number"), number, "it must lie in -1e15..=1e15")),
        Value::String(found) => text("the text", found),
        Value::Array(list) => list.iter().try_for_each(|found| check_free(key, found)),
        Value::Object(map) => map.iter().try_for_each(|(key, found)| {
            text("a key", key)?;
            check_free(Some(key), found)
        }),
    }
}

pub(super) fn check_name(what: &str, name: &str) -> Result<(), ManifestError> {
    if name.chars().nth(MAX_NAME).is_none() {
        return Ok(());
    }
    Err(value(what, &format!("{:?}", cut(name)), "it may have at most 1000 characters"))
}

pub(super) fn value(what: impl Into<String>, value: &dyn std::fmt::Display, limit: &'static str) -> ManifestError {
    ManifestError::Value { what: what.into(), value: value.to_string(), limit }
}

/// The beginning of `text`, as errors quote it.
pub(super) fn cut(text: &str) -> String {
    match text.char_indices().nth(QUOTED) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

impl FileDigest {
    pub(super) fn check(&self, what: &'static str) -> Result<(), ManifestError> {
        check_name(&format!("{what}.file"), &self.file)?;
        let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if self.sha256.len() == 64 && self.sha256.bytes().all(hexadecimal) {
            return Ok(());
        }
        let found = format!("{:?}", cut(&self.sha256));
        Err(value(format!("{what}.sha256"), &found, "it must have 64 digits, 0 to 9 and a to f"))
    }
}
