//! What a training run is told: everything that decides its result, and nothing else.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::TrainError;
use super::arch::Arch;
use crate::bundle::Preprocessing;
use crate::fold::architecture::{Magnitude, NbnLayers};

/// The norm of the layers that `nbn_layers` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// Normalised BatchNorm: weight and bias are unit directions times a learned magnitude
    Nbn,
    /// Plain BatchNorm in every layer
    Bn,
}

/// The classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    /// A linear layer
    Linear,
    /// Logit rectification: a BatchNorm over the logits, with weight and bias
    Lr,
    /// Logit rectification without weight and bias
    LrPlain,
}

/// The shortcut of a CIFAR block that changes its shape (arXiv 1512.03385, section 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Shortcut {
    /// Every second pixel, with added channels of zeros: no parameters
    A,
    /// A 1×1 convolution and a norm
    B,
}

/// How the bias of a normalised layer starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BiasStart {
    /// A random direction of length about 1
    Normal,
    /// Zero, as in the authors' code: the first gradient is then 10^6 times too large, and the direction that it sets
    /// never changes again
    Zero,
}

/// Which magnitudes learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MagnitudeMode {
    /// α is learned
    Learned,
    /// α keeps its initial value
    Fixed,
}

/// The loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Cross-entropy
    CrossEntropy,
    /// Balanced Softmax: logits plus log n per class in training (arXiv 2007.10740)
    BalancedSoftmax,
    /// Logit adjustment: logits plus tau · log prior in training (arXiv 2007.07314)
    LogitAdjustment,
    /// LDAM: margins that grow as classes get rarer (arXiv 1906.07413)
    Ldam,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine, from the learning rate to 0
    Cosine,
    /// Multiplied by --decay-factor at each of --milestones
    Step,
    /// It stays constant
    Constant,
}

/// What decays by weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Convolutions and classifiers
    Weights,
    /// Also the weights and biases of plain BatchNorm layers
    Norms,
    /// Also the directions of normalised layers, whose length has no meaning but slows how fast they turn
    Directions,
    /// Everything, including magnitudes
    All,
}

/// How training pictures are varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Augmentation {
    /// A random crop of the image after padding each side with black by an eighth of its length
    Crop,
    /// A random part with 8 to 100 % of the area, resized
    ResizedCrop,
    /// A horizontal flip with a probability of one half
    Flip,
    /// Brightness, contrast and saturation multiplied by 0.6 to 1.4
    ColorJitter,
    /// AutoAugment's policy for CIFAR (arXiv 1805.09501)
    AutoAugment,
    /// One operation at a random strength (arXiv 2103.10158)
    TrivialAugment,
    /// A square of half the image's side set to the mean (arXiv 1708.04552)
    Cutout,
}

/// Everything that decides the result of a run. Two runs of one recipe over the same images, by the same version with as many
/// threads on processors of one kind, give the same network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The network.
    #[serde(with = "text")]
    pub arch: Arch,
    /// Its norm.
    pub norm: Norm,
    /// The normalised layers.
    #[serde(with = "text")]
    pub nbn_layers: NbnLayers,
    /// Which of them share a magnitude.
    #[serde(with = "text")]
    pub magnitude: Magnitude,
    /// Where the magnitude starts.
    pub magnitude_start: f32,
    /// Whether it learns.
    pub magnitude_mode: MagnitudeMode,
    /// Its learning rate as a multiple of the others'; none is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub magnitude_rate: Option<f64>,
    /// Where a normalised bias starts.
    pub bias_start: BiasStart,
    /// The classifier.
    pub head: Head,
    /// The shortcut, for CIFAR networks.
    pub shortcut: Shortcut,
    /// The loss.
    pub loss: Loss,
    /// τ of logit adjustment.
    pub tau: f32,
    /// Largest margin of LDAM.
    pub ldam_margin: f32,
    /// Scale of LDAM's logits.
    pub ldam_scale: f32,
    /// Share of the target that is spread over all classes.
    pub label_smoothing: f32,
    /// Epoch from which rare classes weigh more; none never.
    pub reweight_from: Option<usize>,
    /// Epochs.
    pub epochs: usize,
    /// Images in a step.
    pub batch: usize,
    /// Learning rate at its highest.
    pub learning_rate: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Epochs of its linear rise.
    pub warm_up: usize,
    /// Epochs at which it falls, for [`Schedule::Step`].
    pub milestones: Vec<usize>,
    /// Factor of each fall.
    pub decay_factor: f64,
    /// Momentum.
    pub momentum: f64,
    /// Whether it is Nesterov's.
    pub nesterov: bool,
    /// Weight decay.
    pub weight_decay: f64,
    /// What decays.
    pub decay: Decay,
    /// Largest norm of all gradients together.
    pub clip: Option<f64>,
    /// Decay of the running mean of weights that is evaluated and saved; none saves the weights themselves.
    pub ema: Option<f64>,
    /// How pictures are varied, in this order.
    pub augment: Vec<Augmentation>,
    /// α of mixup's Beta distribution (arXiv 1710.09412); none does not mix.
    pub mixup: Option<f64>,
    /// From a picture to the network's input.
    pub preprocessing: Preprocessing,
    /// The exponential profile that the set was cut to.
    pub imbalance_factor: Option<f64>,
    /// Share of each class held out for calibration.
    pub calibration_fraction: f64,
    /// What keeps images on one side of that split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_by: Option<String>,
    /// Seed of everything random.
    pub seed: u64,
}

impl Recipe {
    /// Checks what the types alone cannot hold.
    ///
    /// # Errors
    /// Names the flag, its value and the limit.
    pub fn check(&self) -> Result<(), TrainError> {
        let refuse = |flag: &'static str, value: String, limit: &str| {
            Err(TrainError::Flag { flag, value, limit: limit.to_owned() })
        };
        let within = |flag: &'static str, value: f64, fits: bool, limit: &str| {
            if fits { Ok(()) } else { refuse(flag, value.to_string(), limit) }
        };
        let finite = |v: f64| v.is_finite() && v > 0.0;
        // Beyond, steps could not be counted.
        if !(1..=1_000_000).contains(&self.epochs) {
            return refuse("--epochs", self.epochs.to_string(), "1 to 1000000");
        }
        if !(2..=1_000_000).contains(&self.batch) {
            let limit = "at least 2, because BatchNorm needs the variance of several images, and at most 1000000";
            return refuse("--batch", self.batch.to_string(), limit);
        }
        within("--lr", self.learning_rate, finite(self.learning_rate), "above 0, and finite")?;
        within("--momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "at least 0 and below 1")?;
        let decay = self.weight_decay;
        within("--weight-decay", decay, decay.is_finite() && decay >= 0.0, "at least 0, and finite")?;
        within("--decay-factor", self.decay_factor, finite(self.decay_factor), "above 0, and finite")?;
        let smoothing = f64::from(self.label_smoothing);
        within("--label-smoothing", smoothing, (0.0..1.0).contains(&smoothing), "at least 0 and below 1")?;
        // Bundles hold it as κ, which is bounded there, too.
        let tau = f64::from(self.tau);
        within("--tau", tau, finite(tau) && tau <= 10.0, "above 0, at most 10")?;
        within("--ldam-margin", self.ldam_margin.into(), finite(self.ldam_margin.into()), "above 0, and finite")?;
        within("--ldam-scale", self.ldam_scale.into(), finite(self.ldam_scale.into()), "above 0, and finite")?;
        let start = f64::from(self.magnitude_start);
        within(
            "--magnitude-start",
            start,
            start.is_finite() && start.abs() >= 1e-3,
            "at least 0.001 in absolute value",
        )?;
        if let Some(factor) = self.magnitude_rate {
            within("--magnitude-lr", factor, finite(factor), "above 0, and finite")?;
        }
        let share = self.calibration_fraction;
        within("--calibration-fraction", share, (0.0..=0.5).contains(&share), "0 to 0.5")?;
        if let Some(factor) = self.imbalance_factor {
            within("--imbalance-factor", factor, factor.is_finite() && factor >= 1.0, "at least 1, and finite")?;
        }
        if let Some(clip) = self.clip {
            within("--clip", clip, finite(clip), "above 0, and finite")?;
        }
        if let Some(ema) = self.ema {
            within("--ema", ema, (0.0..1.0).contains(&ema), "at least 0 and below 1, such as 0.999")?;
        }
        if let Some(alpha) = self.mixup {
            within("--mixup", alpha, finite(alpha) && alpha <= 1.0, "above 0, at most 1")?;
        }
        if self.warm_up >= self.epochs && self.warm_up > 0 {
            let limit = format!("less than --epochs, which is {}", self.epochs);
            return refuse("--warm-up", self.warm_up.to_string(), &limit);
        }
        if self.schedule == Schedule::Step && self.milestones.is_empty() {
            let limit = "given with --milestones, the epochs at which the learning rate falls, such as 30,50";
            return refuse("--schedule", "step".into(), limit);
        }
        if self.schedule != Schedule::Step && !self.milestones.is_empty() {
            let limit = "given with --schedule step, the only schedule with milestones";
            return refuse("--milestones", self.steps(), limit);
        }
        if self.nesterov && self.momentum == 0.0 {
            within("--momentum", 0.0, false, "above 0 with --nesterov")?;
        }
        self.preprocessing.check().map_err(|error| TrainError::Input(error.to_string()))?;
        self.sides().map(|_| ())
    }

    /// Length that the shorter side is resized to in evaluation, and the side of the network's input.
    ///
    /// # Errors
    /// When the preprocessing is of another kind than the trainer's.
    pub fn sides(&self) -> Result<(u32, usize), TrainError> {
        let sides = self.preprocessing.trained().map(|(shorter_side, side)| (shorter_side, side as usize));
        sides.ok_or_else(|| {
            TrainError::Input("the trainer takes square RGB inputs, cut from pictures by their shorter side".into())
        })
    }

    /// The milestones, as one gives them.
    pub fn steps(&self) -> String {
        self.milestones.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
    }

    /// The layers that are normalised in the end: none with plain BatchNorm.
    pub fn normalized(&self) -> NbnLayers {
        if self.norm == Norm::Nbn { self.nbn_layers.clone() } else { NbnLayers::None }
    }

    /// How much of the training prior the loss takes out of the logits: 0 none, 1 all; τ for logit adjustment. What
    /// `nbn fold calibrate` calls κ. None where it does not follow from the loss: classes that weigh differently, or margins.
    pub fn kappa(&self) -> Option<f64> {
        if self.reweight_from.is_some_and(|epoch| epoch < self.epochs) {
            return None;
        }
        match self.loss {
            Loss::BalancedSoftmax => Some(1.0),
            Loss::LogitAdjustment => Some(f64::from(self.tau)),
            Loss::CrossEntropy => Some(0.0),
            Loss::Ldam => None,
        }
    }

    /// What stands in the way of going on by this recipe where `begun` was begun: all [differences](Self::differences), but
    /// the number of epochs.
    pub fn obstacles(&self, begun: &Self) -> Vec<String> {
        self.differences(&Self { epochs: self.epochs, ..begun.clone() })
    }

    /// The settings in which `other` differs, by their flags: `--flag is mine, was theirs`.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let json = |recipe: &Self| serde_json::to_value(recipe).unwrap_or_default();
        let mut found = Vec::new();
        for (name, mine, theirs) in unequal(&json(self), &json(other)) {
            let parts = unequal(&mine, &theirs);
            match parts.is_empty() {
                true => found.push(format!("{} is {}, was {}", flag(&name), shown(&mine), shown(&theirs))),
                false => found.extend(parts.into_iter().map(|(part, mine, theirs)| {
                    format!("{part} of {} is {}, was {}", flag(&name), shown(&mine), shown(&theirs))
                })),
            }
        }
        found
    }
}

/// The fields of two objects that differ; one that is not there is none.
fn unequal(mine: &Value, theirs: &Value) -> Vec<(String, Value, Value)> {
    let (Value::Object(mine), Value::Object(theirs)) = (mine, theirs) else { return Vec::new() };
    let names: BTreeSet<&String> = mine.keys().chain(theirs.keys()).collect();
    let value = |of: &serde_json::Map<_, _>, name: &str| of.get(name).cloned().unwrap_or_default();
    let both = names.into_iter().map(|name| (name.clone(), value(mine, name), value(theirs, name)));
    both.filter(|(_, mine, theirs)| mine != theirs).collect()
}

/// The flag that sets a field.
fn flag(field: &str) -> String {
    match field {
        "learning_rate" => "--lr".to_owned(),
        "magnitude_rate" => "--magnitude-lr".to_owned(),
        "preprocessing" => "--preprocessing or --input-size".to_owned(),
        other => format!("--{}", other.replace('_', "-")),
    }
}

/// As one would give it.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "not given".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(parts) if parts.is_empty() => "none".to_owned(),
        Value::Array(parts) => parts.iter().map(shown).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Types that are written as they print.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(Error::custom)
    }
}
