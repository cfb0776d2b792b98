//! Logits → calibrated probabilities under a stated class prior.

use serde::{Deserialize, Serialize};

use super::{Logits, Probabilities, centre};
use crate::bundle::{Calibration, Class};

/// The class prior that scores are answered under: how often each class is expected where the network is used.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Prior {
    /// Every class equally often.
    #[default]
    Uniform,
    /// As often as in training.
    Train,
    /// The caller's own, one entry per class, above 0, summing to 1.
    Custom(Vec<f64>),
}

/// A prior with a name.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum NamedPrior {
    /// Every class is equally frequent
    Uniform,
    /// Classes are as frequent as in training
    Train,
}

impl From<NamedPrior> for Prior {
    fn from(prior: NamedPrior) -> Self {
        match prior {
            NamedPrior::Uniform => Self::Uniform,
            NamedPrior::Train => Self::Train,
        }
    }
}

/// Why a prior was refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PriorError {
    /// Another number of entries than there are classes.
    #[error("the prior has {found} entries; the model has {expected} classes: give one entry per class, in order")]
    Length {
        /// Entries given.
        found: usize,
        /// Classes of the model.
        expected: usize,
    },
    /// A class that the map leaves out.
    #[error("the prior has no entry for class {label:?}: give every class a number above 0 ({missing} are missing)")]
    Missing {
        /// The first class without an entry.
        label: String,
        /// How many have none.
        missing: usize,
    },
    /// An entry that is no class.
    #[error("the prior names {0:?}, which is not a class of this model")]
    Unknown(String),
    /// Zero, negative, NaN or infinite.
    #[error(
        "the prior of class {label:?} is {value}; every entry must be a finite number above 0: give a class that you \
         hardly expect a small number"
    )]
    Value {
        /// The class.
        label: String,
        /// Its entry.
        value: f64,
    },
}

impl Prior {
    /// A prior from one weight per class; weights need not sum to 1.
    ///
    /// # Errors
    /// When there is not one finite weight above 0 for every class.
    pub fn custom(weights: Vec<f64>, classes: &[Class]) -> Result<Self, PriorError> {
        if weights.len() != classes.len() {
            return Err(PriorError::Length { found: weights.len(), expected: classes.len() });
        }
        let bad = |k: usize| PriorError::Value { label: classes[k].label.clone(), value: weights[k] };
        if let Some(k) = weights.iter().position(|w| !(w.is_finite() && *w > 0.0)) {
            return Err(bad(k));
        }
        let largest = weights.iter().copied().fold(0.0, f64::max);
        // Below the largest by more than f64 can hold, a weight is zero.
        if let Some(k) = weights.iter().position(|w| w / largest < f64::MIN_POSITIVE) {
            return Err(bad(k));
        }
        let total: f64 = weights.iter().map(|w| w / largest).sum();
        Ok(Self::Custom(weights.into_iter().map(|w| w / largest / total).collect()))
    }

    /// A prior from a weight per label.
    ///
    /// # Errors
    /// As [`Prior::custom`], and when a label is no class.
    pub fn from_labels<'a>(
        weights: impl IntoIterator<Item = (&'a str, f64)>,
        classes: &[Class],
    ) -> Result<Self, PriorError> {
        let index: std::collections::HashMap<&str, usize> =
            classes.iter().enumerate().map(|(k, class)| (class.label.as_str(), k)).collect();
        let mut values = vec![None; classes.len()];
        for (label, weight) in weights {
            let k = index.get(label).ok_or_else(|| PriorError::Unknown(label.to_owned()))?;
            values[*k] = Some(weight);
        }
        let missing = values.iter().filter(|v| v.is_none()).count();
        if let Some(k) = values.iter().position(Option::is_none) {
            return Err(PriorError::Missing { label: classes[k].label.clone(), missing });
        }
        Self::custom(values.into_iter().flatten().collect(), classes)
    }

    /// `uniform`, `train` or `custom`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Train => "train",
            Self::Custom(_) => "custom",
        }
    }
}

/// The fitted map a·z + c of every class, and the training prior.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrator {
    /// Whether z is the logit less the [`centre`] of all of the image's.
    centred: bool,
    scale: Vec<f64>,
    offset: Vec<f64>,
    train_prior: Vec<f64>,
}

/// The additive vector of one prior: c + log(π_deploy / π_train). Made once per request.
#[derive(Debug, Clone, PartialEq)]
pub struct Offsets(Vec<f64>);

impl Calibrator {
    /// The map of a checked calibration.
    pub fn of(calibration: &Calibration) -> Self {
        let classes = &calibration.classes;
        let map = Self::new(
            classes.iter().map(|c| c.a).collect(),
            classes.iter().map(|c| c.c).collect(),
            classes.iter().map(|c| c.train_prior).collect(),
        );
        Self { centred: calibration.is_centred(), ..map }
    }

    /// A map of centred logits, with `scale` a, `offset` c and π_train, each with one entry per class.
    pub fn new(scale: Vec<f64>, offset: Vec<f64>, train_prior: Vec<f64>) -> Self {
        Self { centred: true, scale, offset, train_prior }
    }

    /// π_train, one entry per class.
    pub fn train_prior(&self) -> &[f64] {
        &self.train_prior
    }

    /// What `prior` adds to each class. A [`Prior::Custom`] must have been made for the same classes.
    pub fn offsets(&self, prior: &Prior) -> Offsets {
        let uniform = 1.0 / self.train_prior.len() as f64;
        let deploy = |k: usize| match prior {
            Prior::Uniform => uniform,
            Prior::Train => self.train_prior[k],
            Prior::Custom(values) => values.get(k).copied().unwrap_or(uniform),
        };
        Offsets(
            self.offset
                .iter()
                .zip(&self.train_prior)
                .enumerate()
                .map(|(k, (c, train))| c + (deploy(k) / train).ln())
                .collect(),
        )
    }

    /// softmax(a ⊙ z + offsets), where z are the logits less their [`centre`]: one probability per class, summing to 1.
    pub fn probabilities(&self, logits: &Logits, offsets: &Offsets) -> Probabilities {
        let centre = if self.centred { centre(logits.values()) } else { 0.0 };
        let map = logits.values().iter().zip(&self.scale).zip(&offsets.0);
        Probabilities::softmax(map.map(|((&z, a), offset)| a * (f64::from(z) - centre) + offset).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes() -> Vec<Class> {
        ["a", "b", "c"].iter().map(|l| Class { label: (*l).into(), count: Some(1) }).collect()
    }

    fn calibrator() -> Calibrator {
        Calibrator::new(vec![0.5, 1.0, 2.0], vec![0.1, -0.3, 0.0], vec![0.9, 0.09, 0.01])
    }

    /// Small deterministic numbers in −3..3.
    fn logits(seed: u64) -> Logits {
        let mut state = seed;
        let values = (0..3)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 24) as f32 * 6.0 - 3.0
            })
            .collect();
        Logits::try_new(values, 3).unwrap()
    }

    #[test]
    fn a_constant_in_all_logits_changes_nothing() {
        let calibrator = calibrator();
        let offsets = calibrator.offsets(&Prior::Uniform);
        for seed in 0..50 {
            let z = logits(seed);
            let moved = Logits::try_new(z.values().iter().map(|z| z + 64.0).collect(), 3).unwrap();
            let (p, q) = (calibrator.probabilities(&z, &offsets), calibrator.probabilities(&moved, &offsets));
            assert!(p.values().iter().zip(q.values()).all(|(p, q)| (p - q).abs() < 1e-4));
        }
    }

    #[test]
    fn a_score_rises_with_its_own_logit_and_all_sum_to_one() {
        let calibrator = calibrator();
        for prior in [Prior::Uniform, Prior::Train, Prior::custom(vec![1.0, 5.0, 1e-6], &classes()).unwrap()] {
            let offsets = calibrator.offsets(&prior);
            for seed in 0..200 {
                let z = logits(seed);
                let p = calibrator.probabilities(&z, &offsets);
                assert!((p.values().iter().sum::<f64>() - 1.0).abs() < 1e-6);
                for k in 0..3 {
                    let mut raised = z.values().to_vec();
                    raised[k] += 0.25;
                    let q = calibrator.probabilities(&Logits::try_new(raised, 3).unwrap(), &offsets);
                    assert!(q.values()[k] > p.values()[k]);
                }
            }
        }
    }

    #[test]
    fn the_training_prior_reweighted_is_the_uniform_prior() {
        let calibrator = calibrator();
        for seed in 0..200 {
            let z = logits(seed);
            let train = calibrator.probabilities(&z, &calibrator.offsets(&Prior::Train));
            let uniform = calibrator.probabilities(&z, &calibrator.offsets(&Prior::Uniform));
            let weighted: Vec<f64> = train.values().iter().zip(calibrator.train_prior()).map(|(p, t)| p / t).collect();
            let total: f64 = weighted.iter().sum();
            for (w, u) in weighted.iter().zip(uniform.values()) {
                assert!((w / total - u).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn a_prior_is_refused_with_the_class_that_is_wrong() {
        let classes = classes();
        assert_eq!(Prior::custom(vec![1.0, 3.0, 4.0], &classes).unwrap(), Prior::Custom(vec![0.125, 0.375, 0.5]));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = Prior::custom(vec![1.0, bad, 1.0], &classes).unwrap_err();
            assert!(error.to_string().contains("\"b\""), "{error}");
        }
        assert!(matches!(Prior::custom(vec![1.0], &classes), Err(PriorError::Length { found: 1, expected: 3 })));
        let missing = Prior::from_labels([("a", 1.0), ("c", 1.0)], &classes).unwrap_err();
        assert_eq!(missing, PriorError::Missing { label: "b".into(), missing: 1 });
        assert_eq!(Prior::from_labels([("x", 1.0)], &classes).unwrap_err(), PriorError::Unknown("x".into()));
    }
}
