//! Logits → scores: calibrated under a prior where the bundle is calibrated, else the softmax; prediction set; familiarity;
//! decision.

use std::sync::Arc;

use serde::Serialize;

use super::Prediction;
use crate::bundle::{BoundCalibration, Manifest, Status};
use crate::scores::{
    Calibrator, ClassMix, Evidence, Familiar, Familiarities, Logits, Offsets, PredictionSet, Prior, Probabilities,
    SetError, SetRequest, SetRule, SetRung, SetScore,
};

/// The word that reasons begin with where a picture is unlike the training pictures.
const UNLIKE_TRAINING: &str = "unlike_training";

/// What a score is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Softmax of the logits: it ranks classes, but is not the probability of being right.
    Softmax,
    /// Probability under the stated class prior, fitted to held-out images.
    Calibrated,
}

impl Scale {
    /// The name in answers and rows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Calibrated => "calibrated",
        }
    }
}

/// What a model's scores are: the softmax of its logits, or calibrated probabilities.
#[derive(Debug, Clone)]
pub struct Scorer {
    manifest: Arc<Manifest>,
    calibrated: Option<(BoundCalibration, Calibrator)>,
    familiarities: Option<(Familiarities, Offsets)>,
}

/// What is scored: a network's answer, and what else is known of the picture.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    logits: &'a Logits,
    features: Option<&'a [f32]>,
    look: Option<&'a [f32]>,
}

impl<'a> Seen<'a> {
    /// Of a picture whose logits, features and look are at hand.
    pub fn new(logits: &'a Logits, features: Option<&'a [f32]>, look: Option<&'a [f32]>) -> Self {
        Self { logits, features, look }
    }
}

impl<'a> From<&'a Logits> for Seen<'a> {
    fn from(logits: &'a Logits) -> Self {
        Self { logits, features: None, look: None }
    }
}

impl<'a> From<&'a Prediction> for Seen<'a> {
    fn from(prediction: &'a Prediction) -> Self {
        Self { logits: &prediction.logits, features: prediction.features.as_deref(), look: prediction.look.as_deref() }
    }
}

/// What a caller asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoreRequest {
    /// The class prior to answer under; the server's own when absent.
    pub prior: Option<Prior>,
    /// Level of the prediction set; no set when absent.
    pub alpha: Option<f64>,
    /// Score of the prediction set.
    pub set_score: Option<SetScore>,
    /// For whom the set's coverage shall hold.
    pub set_rung: Option<SetRung>,
    /// Whether to say how like the training pictures the picture is; it is said also when [`Abstention::unlike`] asks for it.
    pub familiarity: bool,
    /// When to withhold the decision.
    pub abstention: Abstention,
}

/// When a decision is withheld.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Abstention {
    /// The best score is below this.
    pub min_score: Option<f64>,
    /// The prediction set is larger than this.
    pub max_set_size: Option<usize>,
    /// The best class has no calibration image.
    pub prior_only: bool,
    /// The familiarity is at most this: of pictures like the training pictures, as large a share is withheld. 0 for none.
    pub unlike: Option<f64>,
}

/// Whether the best class should be acted on.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Nothing that was asked for speaks against it.
    Accept,
    /// It should not, for this reason.
    Abstain(String),
}

/// A [`ScoreRequest`] that was checked, with everything that does not depend on the image computed.
#[derive(Debug, Clone)]
pub struct ScoreRule {
    prior: Option<Prior>,
    offsets: Option<Offsets>,
    set: Option<(SetRule, Offsets)>,
    familiarity: bool,
    abstention: Abstention,
}

impl ScoreRule {
    /// The prior that scores are under; none where they are the softmax.
    pub fn prior(&self) -> Option<&Prior> {
        self.prior.as_ref()
    }

    /// The set that every image gets.
    pub fn set_request(&self) -> Option<&SetRequest> {
        self.set.as_ref().map(|(rule, _)| rule.request())
    }
}

/// One image's scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// One per class.
    pub probabilities: Probabilities,
    /// The prediction set, when asked for.
    pub set: Option<PredictionSet>,
    /// How like the training pictures it is, when asked for.
    pub familiarity: Option<Familiar>,
    /// Whether the decision is withheld because it is unlike them.
    pub is_unlike_training: bool,
    /// Whether to act on the best class.
    pub decision: Decision,
}

/// Why a request's scores cannot be given.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ScoreError {
    /// Priors and sets need a calibrated bundle.
    #[error(
        "{0} needs a calibrated model; this one's scores are the softmax of its logits: run `nbn fold calibrate` on it"
    )]
    NotCalibrated(&'static str),
    /// The level cannot be had.
    #[error(transparent)]
    Set(#[from] SetError),
    /// Familiarity needs a calibration that has it.
    #[error(
        "{0} needs a model that knows its training pictures: run `nbn fold calibrate` on it anew, with --training-data"
    )]
    NotFamiliar(&'static str),
    /// A share of false alarms that is none, or cannot be had.
    #[error(
        "unlike is {unlike}; it must be 0, for none, or from {least} to 1: with this model's calibration images, a picture's \
         familiarity is never below that"
    )]
    Unlike {
        /// What was asked for.
        unlike: f64,
        /// The smallest that the calibration images allow.
        least: f64,
    },
    /// A set's size is limited, but no set is asked for.
    #[error("max_set_size needs a prediction set: give alpha as well")]
    NoSet,
}

impl Scorer {
    /// The scorer of a bundle whose calibration was checked.
    pub fn new(manifest: Arc<Manifest>, calibration: Option<BoundCalibration>) -> Self {
        let calibrated = calibration.map(|bound| {
            let calibrator = Calibrator::of(&bound.content);
            (bound, calibrator)
        });
        let familiarities = calibrated.as_ref().and_then(|(bound, calibrator)| {
            let (content, record) = (bound.familiarity.clone()?, bound.content.familiarity.as_ref()?);
            let offsets = calibrator.offsets(&Prior::Uniform);
            Some((Familiarities::new(content, record, &manifest.classes), offsets))
        });
        Self { manifest, calibrated, familiarities }
    }

    /// What tells pictures like the training pictures from others; none where the calibration has nothing of it.
    pub fn familiarities(&self) -> Option<&Familiarities> {
        self.familiarities.as_ref().map(|(familiarities, _)| familiarities)
    }

    /// The calibration behind the scores.
    pub fn calibration(&self) -> Option<&BoundCalibration> {
        self.calibrated.as_ref().map(|(bound, _)| bound)
    }

    /// What the scores are.
    pub fn scale(&self) -> Scale {
        if self.calibrated.is_some() { Scale::Calibrated } else { Scale::Softmax }
    }

    /// Prepares a request; `default` is the prior of one that names none.
    ///
    /// # Errors
    /// When the model is not calibrated but a prior or a set is asked for, or the set's level cannot be had.
    pub fn rule(&self, request: ScoreRequest, default: &Prior) -> Result<ScoreRule, ScoreError> {
        let ScoreRequest { prior, alpha, set_score, set_rung, familiarity, abstention } = request;
        let abstention = Abstention { unlike: abstention.unlike.filter(|unlike| *unlike != 0.0), ..abstention };
        self.check_familiarity(familiarity, abstention.unlike)?;
        let familiarity = familiarity || abstention.unlike.is_some();
        if abstention.max_set_size.is_some() && alpha.is_none() {
            return Err(ScoreError::NoSet);
        }
        let Some((bound, calibrator)) = &self.calibrated else {
            return match (prior, alpha, abstention.prior_only) {
                (Some(_), ..) => Err(ScoreError::NotCalibrated("a prior")),
                (_, Some(_), _) => Err(ScoreError::NotCalibrated("a prediction set (alpha)")),
                (.., true) => Err(ScoreError::NotCalibrated("abstain_prior_only")),
                _ => Ok(ScoreRule { prior: None, offsets: None, set: None, familiarity, abstention }),
            };
        };
        let prior = prior.unwrap_or_else(|| default.clone());
        let mix = match prior {
            Prior::Uniform => ClassMix::Uniform,
            Prior::Train => ClassMix::Train,
            Prior::Custom(_) => ClassMix::Calibration,
        };
        let rule = |alpha| {
            let (score, rung) = SetRequest::meant(set_score, set_rung, bound.content.sets.posterior.is_some())?;
            let request = SetRequest { alpha, score, rung, mix };
            let rule = SetRule::resolve(&bound.content.sets, &self.manifest.classes, request)?;
            // What the thresholds were fitted to.
            let scored = match (score, mix) {
                (SetScore::Posterior, ClassMix::Uniform) => Prior::Uniform,
                _ => Prior::Train,
            };
            Ok::<_, SetError>((rule, calibrator.offsets(&scored)))
        };
        let set = alpha.map(rule).transpose()?;
        Ok(ScoreRule { offsets: Some(calibrator.offsets(&prior)), prior: Some(prior), set, familiarity, abstention })
    }

    fn check_familiarity(&self, wanted: bool, unlike: Option<f64>) -> Result<(), ScoreError> {
        match (self.familiarities(), unlike) {
            (None, Some(_)) => Err(ScoreError::NotFamiliar("unlike")),
            (None, None) if wanted => Err(ScoreError::NotFamiliar("familiarity")),
            (Some(known), Some(unlike)) if !(known.least()..=1.0).contains(&unlike) => {
                // Rounded up: what is shown is accepted.
                Err(ScoreError::Unlike { unlike, least: (known.least() * 1e6).ceil() / 1e6 })
            }
            _ => Ok(()),
        }
    }

    /// Scores one image.
    pub fn score<'a>(&self, seen: impl Into<Seen<'a>>, rule: &ScoreRule) -> Scored {
        let seen = seen.into();
        let logits = seen.logits;
        let (probabilities, set) = match (&self.calibrated, &rule.offsets) {
            (Some((_, calibrator)), Some(offsets)) => {
                let set = rule.set.as_ref().map(|(rule, offsets)| {
                    rule.apply(&calibrator.probabilities(logits, offsets), calibrator.train_prior())
                });
                (calibrator.probabilities(logits, offsets), set)
            }
            _ => (logits.softmax(), None),
        };
        let familiarity = if rule.familiarity { self.familiarity(&seen) } else { None };
        let unlike = rule.abstention.unlike.zip(familiarity).filter(|(limit, found)| found.p <= *limit);
        let decision = match unlike {
            Some((limit, found)) => Decision::Abstain(format!(
                "{UNLIKE_TRAINING}: familiarity {:.6}, not above unlike {limit}: {}",
                found.p,
                found.question.told()
            )),
            None => self.decide(&probabilities, set.as_ref(), &rule.abstention),
        };
        Scored { probabilities, set, familiarity, is_unlike_training: unlike.is_some(), decision }
    }

    /// How like the training pictures a picture is; none where the calibration has nothing of it.
    pub fn familiarity(&self, seen: &Seen<'_>) -> Option<Familiar> {
        let ((_, calibrator), (familiarities, uniform)) = self.calibrated.as_ref().zip(self.familiarities.as_ref())?;
        let best = *calibrator.probabilities(seen.logits, uniform).top(1).first()?;
        Some(familiarities.rank(&Evidence { look: seen.look, features: seen.features, best }))
    }

    fn decide(&self, probabilities: &Probabilities, set: Option<&PredictionSet>, rule: &Abstention) -> Decision {
        let Some(&(best, score)) = probabilities.top(1).first() else { return Decision::Accept };
        if let Some(limit) = rule.min_score.filter(|limit| score < *limit) {
            return Decision::Abstain(format!("the best score is {score:.4}, below min_score {limit}"));
        }
        if let (Some(limit), Some(set)) = (rule.max_set_size, set)
            && set.members.len() > limit
        {
            let size = set.members.len();
            return Decision::Abstain(format!("the set has {size} classes, more than max_set_size {limit}"));
        }
        let status = self.calibration().and_then(|c| Some(c.content.classes.get(best)?.status));
        if rule.prior_only && status == Some(Status::PriorOnly) {
            let label = &self.manifest.classes[best].label;
            return Decision::Abstain(format!("the best class, {label}, has no calibration image"));
        }
        Decision::Accept
    }
}
