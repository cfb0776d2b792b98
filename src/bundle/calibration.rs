//! `calibration.json`: what turns a network's logits into probabilities per class, and into prediction sets.

use serde::{Deserialize, Serialize};

use super::familiarity::FamiliarityRecord;
use super::manifest::{MAX_COUNT, cut};
use super::{Class, Group, Manifest, Pixels, sha256_hex};

/// Version of the file's form that this build writes.
pub const CALIBRATION_SCHEMA_VERSION: u32 = 2;
/// The oldest that it reads. The first has neither a trend nor a strength of shrinkage, does not centre logits, and answers as
/// it did.
const OLDEST_SCHEMA_VERSION: u32 = 1;

/// The content of `calibration.json`. Formulas: docs/calibration.md.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Form of this file; [`CALIBRATION_SCHEMA_VERSION`].
    pub schema_version: u32,
    /// SHA-256 of the `model.onnx` whose logits were calibrated.
    pub model_sha256: String,
    /// [`inputs_sha256`] of the manifest: labels, training counts and preprocessing.
    pub inputs_sha256: String,
    /// The rung of the ladder that was chosen.
    pub rung: Rung,
    /// T: logits are divided by it.
    pub temperature: f64,
    /// κ: how much of the training prior the network took out of its logits; 0 none, 1 all of it.
    pub kappa: f64,
    /// Where κ comes from.
    pub kappa_source: KappaSource,
    /// t: the scale of a class's logits is exp(t·x) times its own, where x is its log π_train, standardised over the classes.
    #[serde(default)]
    pub trend: f64,
    /// λ: how strongly the parameters of the classes are shrunk; 0 in files of the first version, which do not say.
    #[serde(default)]
    pub shrinkage: f64,
    /// The temperature that fits best without prior, bias or scaling: the usual baseline, for comparison.
    pub temperature_alone: f64,
    /// One entry per class, in the order of the logits.
    pub classes: Vec<ClassCalibration>,
    /// Thresholds of prediction sets.
    pub sets: SetTables,
    /// What tells pictures like the training pictures from others; none in files of the first version, and where it was not
    /// asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub familiarity: Option<FamiliarityRecord>,
    /// What it was fitted on, and what that changed.
    pub fit: FitReport,
}

/// Where κ comes from.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum KappaSource {
    /// From the command line: the loss is known.
    Given,
    /// Fitted, and shrunk to what the checkpoint's loss implies.
    Checkpoint,
    /// Fitted, and shrunk to 0 or 1, whichever cross-validation preferred.
    Chosen,
    /// Fitted.
    Learned,
}

/// How much the calibration is free to change, from the least to the most.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// The class prior alone.
    PriorShift,
    /// One temperature, and the prior.
    Temperature,
    /// A bias per class, one temperature, and the prior.
    TemperatureBias,
    /// A scale and a bias per class, one temperature, and the prior.
    StructuredVectorScaling,
}

impl Rung {
    /// All rungs, from the least to the most.
    pub const ALL: [Self; 4] =
        [Self::PriorShift, Self::Temperature, Self::TemperatureBias, Self::StructuredVectorScaling];

    /// The rung in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::PriorShift => "prior shift",
            Self::Temperature => "temperature + shift",
            Self::TemperatureBias => "temperature + bias + shift",
            Self::StructuredVectorScaling => "structured vector scaling + shift",
        }
    }
}

/// One class's map and what it stands on. The calibrated log-score before normalisation is
/// a·z + c + log(π_deploy / π_train), where z is the logit less the median of the image's logits.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ClassCalibration {
    /// Its label, as in the manifest.
    pub label: String,
    /// a: above 0, so that a score rises with its logit.
    pub a: f64,
    /// c.
    pub c: f64,
    /// π_train: share of the training images.
    pub train_prior: f64,
    /// Calibration images of the class.
    pub support: u64,
    /// How well founded its map is.
    pub status: Status,
}

/// How well founded a class's calibration is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = CalibrationStatus))]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its own calibration images say more of its map than what all classes share.
    Fitted,
    /// Few calibration images, or a map shared by all classes: moved by shrinkage only.
    Pooled,
    /// No calibration image: only the prior and what all classes share.
    PriorOnly,
}

impl Status {
    /// As in calibration.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fitted => "fitted",
            Self::Pooled => "pooled",
            Self::PriorOnly => "prior_only",
        }
    }
}

/// Thresholds of split conformal prediction. A class is in the set when its score does not exceed the threshold.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct SetTables {
    /// Miscoverage levels, ascending; every list of thresholds has one entry for each.
    pub alphas: Vec<f64>,
    /// Prevalence-adjusted score: −p/π_train.
    pub pas: ScoreTable,
    /// Plain score: −p.
    pub plain: ScoreTable,
    /// −p under the prior of the answer; none in files of the first version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub posterior: Option<PosteriorTable>,
}

/// Thresholds of −p under the prior of the answer: a list per class, from images that are weighted towards it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PosteriorTable {
    /// For the class mix of the calibration set, of scores under the training prior.
    pub calibration: Vec<Thresholds>,
    /// All classes equally often, of scores under the uniform prior.
    pub uniform: Vec<Thresholds>,
    /// Classes as often as in training, of scores under the training prior.
    pub train: Vec<Thresholds>,
}

/// One threshold per level; none where the samples do not allow the level.
pub type Thresholds = Vec<Option<f64>>;

/// One score's thresholds.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ScoreTable {
    /// Over all calibration images.
    pub marginal: MixThresholds,
    /// Over the images of a group's classes.
    pub groups: Vec<GroupThresholds>,
    /// Over a class's own images; all none where they are too few.
    pub classes: Vec<Thresholds>,
}

/// Thresholds whose coverage holds for a class mix each.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct MixThresholds {
    /// Images of each class as often as in the calibration set.
    pub calibration: Thresholds,
    /// All classes equally often.
    pub uniform: Thresholds,
    /// Classes as often as in training.
    pub train: Thresholds,
}

/// Thresholds of one group.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct GroupThresholds {
    /// The group.
    pub group: Group,
    /// Its thresholds.
    pub thresholds: MixThresholds,
}

/// What a calibration was fitted on, and what it changed.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct FitReport {
    /// Program and version.
    pub by: String,
    /// When, in UTC.
    pub created: String,
    /// The command line, without the folders of the machine.
    pub command: String,
    /// Calibration images.
    pub images: u64,
    /// Whether they were compared with the training images.
    pub training_overlap: TrainingOverlap,
    /// Which pixels of JPEGs the network saw.
    #[serde(default, skip_serializing_if = "Pixels::is_exact")]
    pub pixels: Pixels,
    /// Cross-validation of every rung that the samples allow.
    pub ladder: Vec<RungReport>,
    /// The softmax of the logits, on the calibration images.
    pub before: FitMetrics,
    /// The chosen rung on images that its fit did not see (cross-validation), under the calibration set's class mix.
    pub after: FitMetrics,
    /// Images whose best class changes under the calibration set's class mix.
    pub top1_flips: u64,
}

/// Whether calibration images may have been trained on.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum TrainingOverlap {
    /// No training images were given to compare with.
    NotChecked,
    /// Compared by the hash of their pixels: none is shared.
    None,
}

/// One rung in cross-validation.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RungReport {
    /// Which.
    pub rung: Rung,
    /// Mean negative log-likelihood under the uniform prior, every class counting the same, in nats: what chooses.
    pub balanced_nll: f64,
    /// Standard error of its difference from the best rung's.
    pub standard_error: f64,
    /// Mean negative log-likelihood under the calibration set's class mix, in nats.
    pub nll: f64,
}

/// Three figures.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct FitMetrics {
    /// Mean negative log-likelihood, in nats.
    pub nll: f64,
    /// Expected calibration error: 15 equal-width bins of the best class's score; 0 to 1.
    pub ece: f64,
    /// Share of images whose best class is right.
    pub accuracy: f64,
}

/// A rule that a calibration breaks.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum CalibrationError {
    /// Written by another version.
    #[error(
        "schema_version is {0}; this build reads {OLDEST_SCHEMA_VERSION} to {CALIBRATION_SCHEMA_VERSION}: run `nbn fold calibrate` again"
    )]
    Schema(u32),
    /// Of another network, or other classes or preprocessing.
    #[error(
        "it belongs to another bundle: its {what} is {found}, this bundle's is {expected}: run `nbn fold calibrate` on this \
         bundle, or remove the file to serve the softmax"
    )]
    Foreign {
        /// Which hash differs.
        what: &'static str,
        /// In the file.
        found: String,
        /// Of the bundle.
        expected: String,
    },
    /// A number or a list that cannot be right.
    #[error("{what} is {value}; {limit}: run `nbn fold calibrate` again")]
    Value {
        /// Which.
        what: String,
        /// Its value, cut where it is long.
        value: String,
        /// What it must be.
        limit: &'static str,
    },
}

/// A range that a number must lie in, both ends included, and the range in words.
pub(super) type Limit = (f64, f64, &'static str);

/// Temperatures. Fits keep to 0.05..=20.
const TEMPERATURE: Limit = (1e-6, 1e6, "it must lie in 0.000001..=1000000");
/// a, as a temperature's reciprocal.
const SCALE: Limit = TEMPERATURE;
/// c. With a logit in f32 and [`SCALE`], a·z + c stays far from what f64 can hold.
const OFFSET: Limit = (-1e6, 1e6, "it must lie in -1000000..=1000000");
/// κ. Fits keep to -1..=2, and checkpoints to 0..=10.
const KAPPA: Limit = (-1.0, 10.0, "it must lie in -1..=10");
/// t. Fits keep to -1.5..=1.5.
const TREND: Limit = (-10.0, 10.0, "it must lie in -10..=10");
/// λ. Fits keep to 0.5..=8.
const STRENGTH: Limit = (0.0, 1e6, "it must lie in 0..=1000000");
/// π_train: the smallest is far below 1 in 2^60 images, and its reciprocal far from infinite.
const PRIOR: Limit = (1e-30, 1.0, "it must lie in 1e-30..=1");
/// Shares.
pub(super) const SHARE: Limit = (0.0, 1.0, "it must lie in 0..=1");
/// Mean negative log-likelihoods, in nats, and errors of them. A logit in f32 keeps them below 1e46.
const NATS: Limit = (0.0, 1e50, "it must lie in 0..=1e50");
/// The smallest level of a prediction set. Fits keep to 0.001 and above.
const MIN_ALPHA: f64 = 1e-6;
/// Thresholds of -p/π_train.
const ADJUSTED: Limit = (-1e30, 0.0, "it must lie in -1e30..=0");
/// Thresholds of -p.
const PLAIN: Limit = (-1.0, 0.0, "it must lie in -1..=0");
/// How far from 1 the sum of π_train may be.
const ROUNDING: f64 = 1e-6;

pub(super) fn within(what: impl Into<String>, value: f64, (least, most, limit): Limit) -> Result<(), CalibrationError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(bad(what, &value, limit)) }
}

pub(super) fn bad(what: impl Into<String>, value: &dyn std::fmt::Display, limit: &'static str) -> CalibrationError {
    CalibrationError::Value { what: what.into(), value: value.to_string(), limit }
}

impl Calibration {
    /// Whether the median of an image's logits is taken from each before it is scaled.
    pub fn is_centred(&self) -> bool {
        self.schema_version > OLDEST_SCHEMA_VERSION
    }

    /// Checks that the file is of `manifest`'s bundle and consistent in itself: every logit gives finite scores then.
    ///
    /// # Errors
    /// Names the first rule that is broken.
    pub fn check(&self, manifest: &Manifest) -> Result<(), CalibrationError> {
        if !(OLDEST_SCHEMA_VERSION..=CALIBRATION_SCHEMA_VERSION).contains(&self.schema_version) {
            return Err(CalibrationError::Schema(self.schema_version));
        }
        let inputs = inputs_sha256(manifest);
        let hashes = [
            ("model_sha256", &self.model_sha256, &manifest.model.sha256),
            ("inputs_sha256", &self.inputs_sha256, &inputs),
        ];
        for (what, found, expected) in hashes {
            if found != expected {
                return Err(CalibrationError::Foreign { what, found: cut(found), expected: expected.clone() });
            }
        }
        within("temperature", self.temperature, TEMPERATURE)?;
        within("temperature_alone", self.temperature_alone, TEMPERATURE)?;
        within("kappa", self.kappa, KAPPA)?;
        within("trend", self.trend, TREND)?;
        within("shrinkage", self.shrinkage, STRENGTH)?;
        self.check_classes(&manifest.classes)?;
        self.sets.check(self.classes.len())?;
        self.familiarity.iter().try_for_each(FamiliarityRecord::check)?;
        self.fit.check()
    }

    fn check_classes(&self, expected: &[Class]) -> Result<(), CalibrationError> {
        if self.classes.len() != expected.len() {
            return Err(bad("the number of classes", &self.classes.len(), "it must match the manifest"));
        }
        for (k, (class, expected)) in self.classes.iter().zip(expected).enumerate() {
            if class.label != expected.label {
                let found = format!("{:?}", cut(&class.label));
                return Err(bad(format!("the label of class {k}"), &found, "it must match the manifest"));
            }
            let of = |what: &str| format!("{what} of class {:?}", cut(&class.label));
            within(of("a"), class.a, SCALE)?;
            within(of("c"), class.c, OFFSET)?;
            within(of("train_prior"), class.train_prior, PRIOR)?;
            if class.support > MAX_COUNT {
                return Err(bad(of("support"), &class.support, "it must be at most 2^40"));
            }
        }
        let total: f64 = self.classes.iter().map(|class| class.train_prior).sum();
        within("the sum of train_prior", total, (1.0 - ROUNDING, 1.0 + ROUNDING, "it must be 1"))
    }
}

impl FitReport {
    fn check(&self) -> Result<(), CalibrationError> {
        for (what, count) in [("fit.images", self.images), ("fit.top1_flips", self.top1_flips)] {
            if count > MAX_COUNT {
                return Err(bad(what, &count, "it must be at most 2^40"));
            }
        }
        for rung in &self.ladder {
            let of = |what: &str| format!("{what} of rung {:?} in fit.ladder", rung.rung.name());
            within(of("balanced_nll"), rung.balanced_nll, NATS)?;
            within(of("standard_error"), rung.standard_error, NATS)?;
            within(of("nll"), rung.nll, NATS)?;
        }
        for (when, figures) in [("before", &self.before), ("after", &self.after)] {
            within(format!("fit.{when}.nll"), figures.nll, NATS)?;
            within(format!("fit.{when}.ece"), figures.ece, SHARE)?;
            within(format!("fit.{when}.accuracy"), figures.accuracy, SHARE)?;
        }
        Ok(())
    }
}

impl SetTables {
    fn check(&self, classes: usize) -> Result<(), CalibrationError> {
        if !self.alphas.is_sorted() || !self.alphas.iter().all(|a| (MIN_ALPHA..1.0).contains(a)) {
            let levels = cut(&format!("{:?}", self.alphas));
            return Err(bad("sets.alphas", &levels, "levels must be ascending, at least 0.000001, and below 1"));
        }
        for (name, table, limit) in [("pas", &self.pas, ADJUSTED), ("plain", &self.plain, PLAIN)] {
            if table.classes.len() != classes {
                let what = format!("the length of sets.{name}.classes");
                return Err(bad(what, &table.classes.len(), "one entry per class is needed"));
            }
            let mixes = std::iter::once(&table.marginal).chain(table.groups.iter().map(|g| &g.thresholds));
            let lists = mixes.flat_map(|m| [&m.calibration, &m.uniform, &m.train]).chain(&table.classes);
            for list in lists {
                if list.len() != self.alphas.len() {
                    let what = format!("the length of a threshold list in sets.{name}");
                    return Err(bad(what, &list.len(), "one entry per level is needed"));
                }
                let mut thresholds = list.iter().flatten();
                thresholds.try_for_each(|t| within(format!("a threshold in sets.{name}"), *t, limit))?;
            }
        }
        let Some(posterior) = &self.posterior else { return Ok(()) };
        for lists in [&posterior.calibration, &posterior.uniform, &posterior.train] {
            if lists.len() != classes {
                return Err(bad(
                    "the length of a list in sets.posterior",
                    &lists.len(),
                    "one entry per class is needed",
                ));
            }
            if let Some(list) = lists.iter().find(|list| list.len() != self.alphas.len()) {
                let what = "the length of a threshold list in sets.posterior";
                return Err(bad(what, &list.len(), "one entry per level is needed"));
            }
            let mut thresholds = lists.iter().flatten().flatten();
            thresholds.try_for_each(|t| within("a threshold in sets.posterior", *t, PLAIN))?;
        }
        Ok(())
    }
}

/// SHA-256 of what a calibration assumes beside the network: labels, training counts, and preprocessing.
pub fn inputs_sha256(manifest: &Manifest) -> String {
    // Both are plain data: writing them as JSON cannot fail.
    let text = serde_json::to_vec(&(&manifest.classes, &manifest.preprocessing)).unwrap_or_default();
    sha256_hex(&text)
}

/// π_train from the training counts; none when a count is unknown or zero.
pub fn train_prior(classes: &[Class]) -> Option<Vec<f64>> {
    let counts: Option<Vec<f64>> = classes.iter().map(|c| c.count.filter(|&n| n > 0).map(|n| n as f64)).collect();
    let counts = counts?;
    let total: f64 = counts.iter().sum();
    Some(counts.into_iter().map(|n| n / total).collect())
}
