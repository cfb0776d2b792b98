//! What a request asks for, in the query string or in JSON, with the descriptions that openapi.yaml carries.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::code::Code;
use super::cut::{self, quoted, shown};
use super::objects;
use super::problem::Problem;
use crate::bundle::Manifest;
use crate::classify::{Abstention, ScoreRequest};
use crate::scores::{NamedPrior, Prior, SetRung, SetScore};

/// What the answer holds.
#[derive(Debug, Clone, Default, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestOptions {
    /// Number of classes per image, best first; 5 by default, at most the number of classes.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub(crate) top_k: Option<usize>,
    /// Leave out classes with a lower score; abstain if none is left.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 0.0, maximum = 1.0))]
    pub(crate) min_score: Option<f64>,
    /// Class prior of the scores.
    #[serde(default)]
    pub(crate) prior: Option<WirePrior>,
    /// Add a prediction set; at most this share of the sets miss the true class.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 0.0, maximum = 1.0))]
    pub(crate) alpha: Option<f64>,
    /// Score that the prediction set is built from: by default `posterior`, or `pas` if a rung other than `shrunk` is given or the
    /// calibration is of an earlier version.
    #[serde(default)]
    pub(crate) set_score: Option<SetScore>,
    /// Images over which the coverage of sets must hold: by default `shrunk` with `posterior`, else `marginal`.
    #[serde(default)]
    pub(crate) set_rung: Option<SetRung>,
    /// Abstain if the set has more classes than this; needs `alpha`.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub(crate) max_set_size: Option<usize>,
    /// Abstain if the best class has no calibration images.
    #[serde(default)]
    pub(crate) abstain_prior_only: Option<bool>,
    /// Abstain if the image's familiarity is at most this: the share of images like the training images that may be withheld for
    /// nothing. The model must have been calibrated with its training images.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 0.0, maximum = 1.0))]
    pub(crate) unlike: Option<f64>,
    /// Extra parts of the answer.
    #[serde(default, deserialize_with = "objects::list")]
    pub(crate) include: Vec<Include>,
}

/// The same in a query string; here for openapi.yaml, as [`RequestOptions::from_query`] reads it.
#[cfg(feature = "openapi")]
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes what from_query reads")]
pub(crate) struct QueryOptions {
    /// Number of classes per image, best first; 5 by default.
    #[param(minimum = 1)]
    top_k: Option<usize>,
    /// Leave out classes with a lower score; abstain if none is left.
    #[param(minimum = 0.0, maximum = 1.0)]
    min_score: Option<f64>,
    /// Class prior of the scores; a JSON body can also give a prior of your own.
    #[param(inline)]
    prior: Option<NamedPrior>,
    /// Add a prediction set; at most this share of the sets miss the true class.
    #[param(minimum = 0.0, maximum = 1.0)]
    alpha: Option<f64>,
    /// Score that the set is built from: by default `posterior`, or `pas` if a rung other than `shrunk` is given or the
    /// calibration is of an earlier version.
    #[param(inline)]
    set_score: Option<SetScore>,
    /// Images over which the coverage of sets must hold: by default `shrunk` with `posterior`, else `marginal`.
    #[param(inline)]
    set_rung: Option<SetRung>,
    /// Abstain if the set has more classes than this; needs `alpha`.
    #[param(minimum = 1)]
    max_set_size: Option<usize>,
    /// Abstain if the best class has no calibration images.
    abstain_prior_only: Option<bool>,
    /// Abstain if the image's familiarity is at most this: the share of images like the training images that may be withheld for
    /// nothing. The model must have been calibrated with its training images.
    #[param(minimum = 0.0, maximum = 1.0)]
    unlike: Option<f64>,
    /// Extra parts of the answer, separated by commas.
    #[param(inline, style = Form, explode = false)]
    include: Option<Vec<Include>>,
}

/// How frequent each class is where the answer is used: `uniform`, `train`, a list with one number per class in order,
/// or an object that maps labels to numbers. Numbers must be above 0 and need not sum to 1.
// Serialised for openapi.yaml's sake, which reads `untagged` off it; what is read goes through `PriorVisitor`, bounded.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub(crate) enum WirePrior {
    /// `uniform` or `train`.
    Named(NamedPrior),
    /// One weight per class.
    Vector(Vec<f64>),
    /// A weight for every label.
    Map(BTreeMap<String, f64>),
}

fn unfit<E: de::Error>() -> E {
    E::custom("prior must be uniform, train, a list of numbers or an object that maps labels to numbers")
}

struct PriorVisitor;

impl<'de> Visitor<'de> for PriorVisitor {
    type Value = WirePrior;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prior: uniform, train, a list of numbers or an object that maps labels to numbers")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<WirePrior, E> {
        match name {
            "uniform" => Ok(WirePrior::Named(NamedPrior::Uniform)),
            "train" => Ok(WirePrior::Named(NamedPrior::Train)),
            _ => Err(unfit()),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<WirePrior, A::Error> {
        let mut weights = Vec::new();
        while let Some(weight) = list.next_element().map_err(|_| unfit())? {
            objects::few(weights.len())?;
            weights.push(weight);
        }
        Ok(WirePrior::Vector(weights))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WirePrior, A::Error> {
        let mut weights = BTreeMap::new();
        while let Some((label, weight)) = map.next_entry().map_err(|_| unfit())? {
            objects::few(weights.len())?;
            weights.insert(label, weight);
        }
        Ok(WirePrior::Map(weights))
    }
}

impl<'de> Deserialize<'de> for WirePrior {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PriorVisitor)
    }
}

/// An extra part of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub(crate) enum Include {
    /// The network's output for every class.
    Logits,
    /// Beside each score the softmax of the logits.
    Uncalibrated,
    /// Beside each score the class's calibration images and status.
    Support,
    /// Milliseconds by stage.
    Timings,
    /// How like the training images the image is.
    Familiarity,
}

impl RequestOptions {
    /// Reads the query string's options.
    pub(crate) fn from_query(query: Option<&str>) -> Result<Self, Problem> {
        let mut options = Self::default();
        for (key, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            let bad = |what: &str| {
                Problem::new(
                    Code::BadOption,
                    format!("query parameter {}={}: expected {what}", shown(&key), quoted(&value)),
                )
            };
            let number = || value.parse::<f64>().map_err(|_| bad("a number from 0 to 1"));
            let whole = || value.parse::<usize>().map_err(|_| bad("a whole number from 1"));
            match &*key {
                "top_k" => options.top_k = Some(whole()?),
                "min_score" => options.min_score = Some(number()?),
                "alpha" => options.alpha = Some(number()?),
                "unlike" => options.unlike = Some(number()?),
                "max_set_size" => options.max_set_size = Some(whole()?),
                "prior" => {
                    let prior =
                        word(&value).ok_or_else(|| bad("uniform or train; give a prior of your own in a JSON body"))?;
                    options.prior = Some(WirePrior::Named(prior));
                }
                "set_score" => options.set_score = Some(word(&value).ok_or_else(|| bad("posterior, pas or plain"))?),
                "set_rung" => {
                    options.set_rung = Some(word(&value).ok_or_else(|| bad("marginal, group, class or shrunk"))?)
                }
                "abstain_prior_only" => {
                    options.abstain_prior_only = Some(value.parse().map_err(|_| bad("true or false"))?);
                }
                "include" => {
                    for part in value.split(',') {
                        let what =
                            "logits, uncalibrated, support, timings, familiarity, or several separated by commas";
                        options.include.push(word(part).ok_or_else(|| bad(what))?);
                    }
                }
                _ => {
                    return Err(bad("top_k, min_score, prior, alpha, set_score, set_rung, max_set_size, \
                                    abstain_prior_only, unlike or include as the name"));
                }
            }
        }
        Ok(options)
    }

    /// Fills what `self` leaves open from `other`, and checks the ranges.
    pub(crate) fn or(self, other: Self) -> Result<Self, Problem> {
        // Also what is overridden must be right.
        self.check()?;
        other.check()?;
        // The level that holds is held to the calibration as well, later.
        if let Some(alpha) = other.alpha.filter(|alpha| self.alpha.is_some() && !(0.0..=1.0).contains(alpha)) {
            return Err(Problem::new(Code::BadOption, format!("alpha is {alpha}; it must lie between 0 and 1")));
        }
        let include = if self.include.is_empty() { other.include } else { self.include };
        Ok(Self {
            top_k: self.top_k.or(other.top_k),
            min_score: self.min_score.or(other.min_score),
            prior: self.prior.or(other.prior),
            alpha: self.alpha.or(other.alpha),
            set_score: self.set_score.or(other.set_score),
            set_rung: self.set_rung.or(other.set_rung),
            max_set_size: self.max_set_size.or(other.max_set_size),
            abstain_prior_only: self.abstain_prior_only.or(other.abstain_prior_only),
            unlike: self.unlike.or(other.unlike),
            include,
        })
    }

    fn check(&self) -> Result<(), Problem> {
        for (name, value) in [("top_k", self.top_k), ("max_set_size", self.max_set_size)] {
            if value == Some(0) {
                return Err(Problem::new(Code::BadOption, format!("{name} is 0; it must be at least 1")));
            }
        }
        for (name, value) in [("min_score", self.min_score), ("unlike", self.unlike)] {
            if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
                return Err(Problem::new(Code::BadOption, format!("{name} is {value}; it must be from 0 to 1")));
            }
        }
        Ok(())
    }

    /// What the scorer is asked for.
    pub(crate) fn score_request(&self, manifest: &Manifest) -> Result<ScoreRequest, Problem> {
        let prior = match &self.prior {
            None => None,
            Some(WirePrior::Named(named)) => Some(Ok((*named).into())),
            Some(WirePrior::Vector(weights)) => Some(Prior::custom(weights.clone(), &manifest.classes)),
            Some(WirePrior::Map(weights)) => {
                let weights = weights.iter().map(|(label, weight)| (label.as_str(), *weight));
                Some(Prior::from_labels(weights, &manifest.classes))
            }
        };
        let prior =
            prior.transpose().map_err(|error| Problem::new(Code::BadOption, cut::sentence(&error.to_string())))?;
        Ok(ScoreRequest {
            prior,
            alpha: self.alpha,
            set_score: self.set_score,
            set_rung: self.set_rung,
            familiarity: self.includes(Include::Familiarity),
            abstention: Abstention {
                unlike: self.unlike,
                min_score: self.min_score,
                max_set_size: self.max_set_size,
                prior_only: self.abstain_prior_only.unwrap_or(false),
            },
        })
    }

    pub(crate) fn includes(&self, extra: Include) -> bool {
        self.include.contains(&extra)
    }
}

/// The variant of a wire enum that is written `text`.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).ok()
}
