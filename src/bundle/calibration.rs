//! `calibration.json`: what turns a network's logits into probabilities per class, and into prediction sets.

use serde::{Deserialize, Serialize};

use super::{Class, Group, Manifest, sha256_hex};

/// Version of the file's form that this build writes and reads.
pub const CALIBRATION_SCHEMA_VERSION: u32 = 1;

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
    /// The temperature that fits best without prior, bias or scaling: the usual baseline, for comparison.
    pub temperature_alone: f64,
    /// One entry per class, in the order of the logits.
    pub classes: Vec<ClassCalibration>,
    /// Thresholds of prediction sets.
    pub sets: SetTables,
    /// What it was fitted on, and what that changed.
    pub fit: FitReport,
}

/// Where κ comes from.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum KappaSource {
    /// From the command line: the loss is known.
    Given,
    /// From the checkpoint, which says what loss it was trained with.
    Checkpoint,
    /// 0 or 1, which cross-validation preferred.
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
/// a·z + c + log(π_deploy / π_train).
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
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Enough calibration images for a map of its own.
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
    #[error("schema_version is {0}; this build reads {CALIBRATION_SCHEMA_VERSION}: run `fold calibrate` again")]
    Schema(u32),
    /// Of another network, or other classes or preprocessing.
    #[error(
        "it belongs to another bundle: its {what} is {found}, this bundle's is {expected}: run `fold calibrate` on this \
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
    #[error("{what} is {value}; {limit}: run `fold calibrate` again")]
    Value {
        /// Which.
        what: String,
        /// Its value.
        value: String,
        /// What it must be.
        limit: &'static str,
    },
}

impl Calibration {
    /// Checks that the file is of `manifest`'s bundle and consistent in itself.
    ///
    /// # Errors
    /// Names the first rule that is broken.
    pub fn check(&self, manifest: &Manifest) -> Result<(), CalibrationError> {
        if self.schema_version != CALIBRATION_SCHEMA_VERSION {
            return Err(CalibrationError::Schema(self.schema_version));
        }
        let inputs = inputs_sha256(manifest);
        let hashes = [
            ("model_sha256", &self.model_sha256, &manifest.model.sha256),
            ("inputs_sha256", &self.inputs_sha256, &inputs),
        ];
        for (what, found, expected) in hashes {
            if found != expected {
                return Err(CalibrationError::Foreign { what, found: found.clone(), expected: expected.clone() });
            }
        }
        let bad = |what: String, value: &dyn std::fmt::Display, limit| {
            Err(CalibrationError::Value { what, value: value.to_string(), limit })
        };
        if self.classes.len() != manifest.classes.len() {
            return bad("the number of classes".into(), &self.classes.len(), "it must be the manifest's");
        }
        for class in &self.classes {
            let of = |what: &str| format!("{what} of class {:?}", class.label);
            if !(class.a.is_finite() && class.a > 0.0) {
                return bad(of("a"), &class.a, "it must be above 0");
            }
            if !class.c.is_finite() {
                return bad(of("c"), &class.c, "it must be finite");
            }
            if !(class.train_prior > 0.0 && class.train_prior <= 1.0) {
                return bad(of("train_prior"), &class.train_prior, "it must lie in 0 to 1, above 0");
            }
        }
        self.sets.check(self.classes.len())
    }
}

impl SetTables {
    fn check(&self, classes: usize) -> Result<(), CalibrationError> {
        let bad = |what: &str, value: usize, limit| {
            Err(CalibrationError::Value { what: what.into(), value: value.to_string(), limit })
        };
        if !self.alphas.is_sorted() || !self.alphas.iter().all(|a| *a > 0.0 && *a < 1.0) {
            return bad("sets.alphas", self.alphas.len(), "levels must be ascending and lie between 0 and 1");
        }
        for table in [&self.pas, &self.plain] {
            if table.classes.len() != classes {
                return bad(
                    "the length of a class table in sets",
                    table.classes.len(),
                    "one entry per class is needed",
                );
            }
            let mixes = std::iter::once(&table.marginal).chain(table.groups.iter().map(|g| &g.thresholds));
            let lists = mixes.flat_map(|m| [&m.calibration, &m.uniform, &m.train]).chain(&table.classes);
            for list in lists {
                if list.len() != self.alphas.len() {
                    return bad("the length of a threshold list in sets", list.len(), "one entry per level is needed");
                }
            }
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
