//! Rows and the forms that they are written in.

#[cfg_attr(not(feature = "parquet"), path = "no_parquet.rs")]
mod parquet;
mod text;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;

use crate::bundle::{Class, Group, Manifest, Pixels, sha256_hex};
use crate::classify::{Decision, Prediction, Scale, ScoreRule, Scorer};
use crate::features::{Feature, Missing};

pub(super) use self::parquet::keys as keys_in_parquet;
pub(super) use self::text::{keys_in_csv, keys_in_json_lines};

/// The form of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object per line.
    Jsonl,
    /// A header, then one record per image; fields with several values are JSON lists.
    Csv,
    /// Apache Parquet; fields with several values are lists.
    Parquet,
}

impl Format {
    /// The form whose files end in `ending`.
    pub fn of_ending(ending: &str) -> Option<Self> {
        Self::value_variants().iter().copied().find(|format| format.ending().eq_ignore_ascii_case(ending))
    }

    /// Whether this build writes it.
    ///
    /// # Errors
    /// Names the feature that is missing.
    pub fn is_built(self) -> Result<(), Missing> {
        let missing = self == Self::Parquet && !Feature::Parquet.is_built();
        if missing { Err(Feature::Parquet.missing("--format parquet")) } else { Ok(()) }
    }

    /// The ending of files of this form.
    pub fn ending(self) -> &'static str {
        match self {
            Self::Jsonl => "jsonl",
            Self::Csv => "csv",
            Self::Parquet => "parquet",
        }
    }
}

/// What a row tells beside its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Columns {
    /// Classes, the best first; fewer where --min-score leaves fewer.
    pub top_k: usize,
    /// The true class, where the source has one.
    pub label: bool,
    /// The prediction set.
    pub set: bool,
    /// How like the training pictures it is.
    pub familiarity: bool,
    /// The score of every class, in the order of the logits.
    pub probabilities: bool,
    /// The network's own output.
    pub logits: bool,
    /// What its classifier sees.
    pub features: bool,
}

/// What made a row's scores: enough to tell rows of several runs apart when they lie in one table.
#[derive(Debug, Clone, Serialize)]
pub struct Origin {
    /// Name of the model.
    pub model: String,
    /// Its version.
    pub version: String,
    /// What a score is.
    pub scale: Scale,
    /// Id of the calibration behind the scores; none if they are the softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// The class prior of the scores: `uniform`, `train`, or `custom-` and what tells it from other such ones; none if they
    /// are the softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior: Option<String>,
    /// Which pixels of JPEGs were decoded, if not all.
    #[serde(skip_serializing_if = "Pixels::is_exact")]
    pub pixels: Pixels,
}

impl Origin {
    /// The origin of what `scorer` of the model `(name, version)` scores by `rule`, from these pixels.
    pub fn new((name, version): (&str, &str), scorer: &Scorer, rule: &ScoreRule, pixels: Pixels) -> Self {
        Self {
            model: name.to_owned(),
            version: version.to_owned(),
            scale: scorer.scale(),
            calibration: scorer.calibration().map(|calibration| calibration.id.clone()),
            prior: rule.prior().map(|prior| match prior.name() {
                "custom" => format!("custom-{}", &sha256_hex(format!("{prior:?}").as_bytes())[..8]),
                name => name.to_owned(),
            }),
            pixels,
        }
    }

    /// The columns and their values, in order. What is said in one form of rows is said in all.
    pub(super) fn columns(&self) -> Vec<(&'static str, Option<&str>)> {
        let mut columns = vec![
            ("model", Some(self.model.as_str())),
            ("version", Some(self.version.as_str())),
            ("scale", Some(self.scale.name())),
            ("calibration", self.calibration.as_deref()),
            ("prior", self.prior.as_deref()),
        ];
        if !self.pixels.is_exact() {
            columns.push(("pixels", Some(self.pixels.name())));
        }
        columns
    }
}

/// How rows are written.
#[derive(Debug, Clone, Copy)]
pub struct Form<'a> {
    /// The form.
    pub format: Format,
    /// What they tell.
    pub columns: Columns,
    /// The classes, in the order of the logits.
    pub classes: &'a [Class],
    /// What made them.
    pub origin: &'a Origin,
}

/// One picture's row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What the source calls the picture.
    pub key: String,
    /// Its true class, as the source has it.
    pub label: Option<String>,
    /// Its scores, or the sentence that says why there are none.
    pub outcome: Result<Scores, String>,
}

/// What is told of a picture that was scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The best classes and their scores.
    pub top: Vec<(usize, f64)>,
    /// Classes in the prediction set.
    pub set: Option<Vec<usize>>,
    /// How like the training pictures it is: a p-value.
    pub familiarity: Option<f64>,
    /// Why the decision is withheld; none when it is not.
    pub abstained: Option<String>,
    /// The score of every class.
    pub probabilities: Option<Vec<f64>>,
    /// The network's own output.
    pub logits: Option<Vec<f32>>,
    /// What its classifier sees.
    pub features: Option<Vec<f32>>,
}

impl Scores {
    fn decision(&self) -> &'static str {
        if self.abstained.is_some() { "abstain" } else { "accept" }
    }
}

/// How predictions become [`Scores`].
pub struct Scoring<'a> {
    /// The classes.
    pub manifest: &'a Manifest,
    /// What scores are.
    pub scorer: &'a Scorer,
    /// The request that holds for every image.
    pub rule: ScoreRule,
    /// Classes that score less are left out.
    pub min_score: f64,
    /// What is wanted.
    pub columns: Columns,
}

impl Scoring<'_> {
    /// The scores of a prediction, and its best class.
    pub(super) fn score(&self, prediction: &Prediction) -> (Scores, usize) {
        let scored = self.scorer.score(prediction, &self.rule);
        let mut top = scored.probabilities.top(self.columns.top_k.max(1));
        let best = top.first().map_or(0, |(class, _)| *class);
        top.retain(|(_, score)| *score >= self.min_score);
        let familiarity = scored.familiarity.filter(|_| self.columns.familiarity).map(|found| found.p);
        let abstained = match scored.decision {
            Decision::Accept => None,
            Decision::Abstain(reason) => Some(reason),
        };
        let set = scored.set.map(|set| set.members.into_iter().map(|(class, _)| class).collect());
        let probabilities = self.columns.probabilities.then(|| scored.probabilities.values().to_vec());
        let logits = self.columns.logits.then(|| prediction.logits.values().to_vec());
        let features = prediction.features.clone().filter(|_| self.columns.features);
        (Scores { top, set, familiarity, abstained, probabilities, logits, features }, best)
    }
}

/// A row that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The system's fault.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The form's fault.
    #[error("{0}")]
    Form(String),
    /// No room for a part.
    #[error(
        "no space left for {}: {free} bytes are free there; {parts} parts with {rows} rows are committed and stay \
         valid: free some space, or copy the folder to a larger disk, then continue with --resume", .part.display()
    )]
    Full {
        /// The part that did not fit.
        part: PathBuf,
        /// Bytes that are free in its folder.
        free: u64,
        /// Parts that this process committed or found.
        parts: u64,
        /// Rows in them.
        rows: u64,
    },
    /// A part that cannot be written.
    #[error("{}: {cause}", .part.display())]
    Part {
        /// The part.
        part: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

impl WriteError {
    /// What the system said, if it said anything.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io(error) | Self::Part { cause: error, .. } => Some(error.kind()),
            Self::Full { .. } => Some(io::ErrorKind::StorageFull),
            Self::Form(_) => None,
        }
    }
}

/// Where rows are written.
pub trait Output {
    /// Writes one row.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write(&mut self, row: &Row) -> Result<(), WriteError>;

    /// Called after the last row.
    ///
    /// # Errors
    /// When what is buffered cannot be written.
    fn finish(&mut self) -> Result<(), WriteError>;
}

/// Rows in a form, to one stream.
pub enum RowWriter<'a, W: Write + Send> {
    /// JSON lines.
    Jsonl(text::JsonLines<'a, W>),
    /// CSV.
    Csv(Box<text::Csv<'a, W>>),
    /// Parquet.
    Parquet(Box<parquet::Parquet<'a, W>>),
}

impl<'a, W: Write + Send> RowWriter<'a, W> {
    /// A writer to `output`; the form's head is written.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new(output: W, form: Form<'a>) -> Result<Self, WriteError> {
        Ok(match form.format {
            Format::Jsonl => Self::Jsonl(text::JsonLines::new(output, form)),
            Format::Csv => Self::Csv(Box::new(text::Csv::new(output, form)?)),
            Format::Parquet => Self::Parquet(Box::new(parquet::Parquet::new(output, form)?)),
        })
    }

    /// Writes what is buffered and the form's foot, and gives the stream back.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn into_inner(self) -> Result<W, WriteError> {
        match self {
            Self::Jsonl(writer) => writer.into_inner(),
            Self::Csv(writer) => writer.into_inner(),
            Self::Parquet(writer) => writer.into_inner(),
        }
    }
}

impl<W: Write + Send> Output for RowWriter<'_, W> {
    fn write(&mut self, row: &Row) -> Result<(), WriteError> {
        match self {
            Self::Jsonl(writer) => writer.write(row),
            Self::Csv(writer) => writer.write(row),
            Self::Parquet(writer) => writer.write(row),
        }
    }

    fn finish(&mut self) -> Result<(), WriteError> {
        match self {
            Self::Jsonl(writer) => writer.flush(),
            Self::Csv(writer) => writer.flush(),
            Self::Parquet(writer) => writer.finish(),
        }
    }
}

fn label(classes: &[Class], class: usize) -> &str {
    classes.get(class).map_or("", |class| class.label.as_str())
}

fn group(classes: &[Class], class: usize) -> Option<&'static str> {
    classes.get(class)?.group().map(Group::name)
}
