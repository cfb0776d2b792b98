//! What goes over the wire in JSON, with the descriptions that openapi.yaml carries.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::Problem;
use super::registry::ServedModel;
use crate::bundle::{Calibration, Group, Manifest};
use crate::classify::Prediction;

/// Classes returned when `top_k` is absent.
const DEFAULT_TOP_K: usize = 5;

/// Several images in one JSON body.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClassifyRequest {
    /// The images, answered in this order.
    pub(crate) images: Vec<JsonImage>,
    /// Overrule the query parameters.
    #[serde(default)]
    pub(crate) options: Options,
}

/// One image in a JSON body.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct JsonImage {
    /// The encoded file in standard base64.
    pub(crate) b64: String,
    /// Echoed in the result.
    #[serde(default)]
    pub(crate) id: Option<String>,
}

/// What the answer holds.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Options {
    /// Classes per image, the best first; 5 when absent, at most the number of classes.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub(crate) top_k: Option<usize>,
    /// Leave out classes that score less.
    #[serde(default)]
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub(crate) min_score: Option<f64>,
    /// Extras.
    #[serde(default)]
    pub(crate) include: Vec<Include>,
}

/// An extra part of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Include {
    /// The network's output for every class.
    Logits,
    /// Milliseconds by stage.
    Timings,
}

impl Options {
    /// Reads the query string's options.
    pub(crate) fn from_query(query: Option<&str>) -> Result<Self, Problem> {
        let mut options = Self::default();
        for (key, value) in form_pairs(query.unwrap_or_default()) {
            let bad =
                |what: &str| Problem::bad_request("bad_option", format!("query parameter {key}={value:?}: {what}"));
            match key.as_str() {
                "top_k" => options.top_k = Some(value.parse().map_err(|_| bad("expected a whole number from 1"))?),
                "min_score" => {
                    options.min_score = Some(value.parse().map_err(|_| bad("expected a number from 0 to 1"))?)
                }
                "include" => {
                    for part in value.split(',') {
                        options.include.push(match part {
                            "logits" => Include::Logits,
                            "timings" => Include::Timings,
                            _ => return Err(bad("expected logits, timings, or both with a comma")),
                        });
                    }
                }
                "alpha" | "prior" => {
                    return Err(bad(
                        "prediction sets and priors need a calibrated bundle; this server's scores are softmax",
                    ));
                }
                _ => return Err(bad("unknown; top_k, min_score and include are known")),
            }
        }
        Ok(options)
    }

    /// Fills what `self` leaves open from `other`, and checks the ranges.
    pub(crate) fn or(mut self, other: Self) -> Result<Self, Problem> {
        self.top_k = self.top_k.or(other.top_k);
        self.min_score = self.min_score.or(other.min_score);
        if self.include.is_empty() {
            self.include = other.include;
        }
        if self.top_k == Some(0) {
            return Err(Problem::bad_request("bad_option", "top_k is 0; it must be at least 1"));
        }
        if let Some(score) = self.min_score.filter(|s| !(0.0..=1.0).contains(s)) {
            return Err(Problem::bad_request("bad_option", format!("min_score is {score}; it must lie in 0 to 1")));
        }
        Ok(self)
    }
}

/// Key and value pairs of a query string, percent-decoded.
fn form_pairs(query: &str) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((&byte, tail)) = rest.split_first() {
            let escaped = (byte == b'%')
                .then(|| {
                    tail.get(..2).and_then(|h| std::str::from_utf8(h).ok()).and_then(|h| u8::from_str_radix(h, 16).ok())
                })
                .flatten();
            bytes.push(escaped.unwrap_or(if byte == b'+' { b' ' } else { byte }));
            rest = if escaped.is_some() { &tail[2..] } else { tail };
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

/// The answer to a classify request.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ClassifyReply {
    /// Name of the model.
    pub(crate) model: String,
    /// Its version.
    pub(crate) version: String,
    /// What a score is.
    pub(crate) scale: Scale,
    /// One per image, in order.
    pub(crate) results: Vec<ImageResult>,
}

/// What a score is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scale {
    /// Softmax of the logits: it ranks classes, and is no probability of being right.
    Softmax,
}

impl From<Calibration> for Scale {
    fn from(calibration: Calibration) -> Self {
        match calibration {
            Calibration::Softmax => Self::Softmax,
        }
    }
}

/// One image's answer: `predictions`, or `error` when this image, among several, could not be classified.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ImageResult {
    /// The image's id, or its file name in a multipart body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// The best classes, best first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) predictions: Option<Vec<ClassScore>>,
    /// The network's output for every class, on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) logits: Option<Vec<f32>>,
    /// Milliseconds by stage, on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timings: Option<StageMillis>,
    /// Why this image has no predictions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<ImageError>,
}

/// One class and its score.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ClassScore {
    /// Index of the class.
    pub(crate) class_id: usize,
    /// Its name.
    pub(crate) label: String,
    /// In 0 to 1; over all classes the scores sum to 1.
    pub(crate) score: f64,
    /// `many` (over 100 training images), `medium` (20 to 100) or `few`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<WireGroup>,
    /// Training images of the class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) support: Option<u64>,
}

/// Class group by training images.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WireGroup {
    /// Over 100.
    Many,
    /// 20 to 100.
    Medium,
    /// Under 20.
    Few,
}

impl From<Group> for WireGroup {
    fn from(group: Group) -> Self {
        match group {
            Group::Many => Self::Many,
            Group::Medium => Self::Medium,
            Group::Few => Self::Few,
        }
    }
}

/// Milliseconds by stage.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StageMillis {
    /// Waiting for a worker.
    pub(crate) queue_ms: f64,
    /// Decoding, resizing, cropping and normalising.
    pub(crate) decode_ms: f64,
    /// The network.
    pub(crate) infer_ms: f64,
}

/// Why one image among several has no predictions.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ImageError {
    /// The status that the image alone would have got.
    pub(crate) status: u16,
    /// The kind of error.
    pub(crate) code: String,
    /// One sentence.
    pub(crate) detail: String,
}

impl ImageResult {
    pub(crate) fn of(id: Option<String>, prediction: &Prediction, manifest: &Manifest, options: &Options) -> Self {
        let min_score = options.min_score.unwrap_or(0.0);
        let best = prediction.probabilities.top(options.top_k.unwrap_or(DEFAULT_TOP_K));
        let score = |(class_id, score): (usize, f64)| {
            let class = &manifest.classes[class_id];
            let group = class.group().map(WireGroup::from);
            ClassScore { class_id, label: class.label.clone(), score, group, support: class.count }
        };
        let millis = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let timings = &prediction.timings;
        Self {
            id,
            predictions: Some(best.into_iter().filter(|(_, s)| *s >= min_score).map(score).collect()),
            logits: options.include.contains(&Include::Logits).then(|| prediction.logits.values().to_vec()),
            timings: options.include.contains(&Include::Timings).then(|| StageMillis {
                queue_ms: millis(timings.queue),
                decode_ms: millis(timings.decode),
                infer_ms: millis(timings.infer),
            }),
            error: None,
        }
    }

    pub(crate) fn failed(id: Option<String>, problem: Problem) -> Self {
        let error = ImageError { status: problem.status.as_u16(), code: problem.code.into(), detail: problem.detail };
        Self { id, predictions: None, logits: None, timings: None, error: Some(error) }
    }
}

/// The models that this server has.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// By name.
    pub(crate) models: Vec<ModelSummary>,
}

/// One model in the list.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelSummary {
    /// Its name.
    pub(crate) name: String,
    /// The version served.
    pub(crate) version: String,
    /// Whether `/v1/classify` uses it.
    pub(crate) default: bool,
    /// The network.
    pub(crate) arch: String,
    /// Number of classes.
    pub(crate) classes: usize,
}

/// A model's card.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard {
    /// Its name.
    pub(crate) name: String,
    /// The version served.
    pub(crate) version: String,
    /// Where it runs: `cpu` or `cuda`.
    pub(crate) device: String,
    /// What a score is.
    pub(crate) scale: Scale,
    /// Always null: this release has no calibrated scores.
    #[schema(required)]
    pub(crate) calibration: Option<String>,
    /// The bundle's manifest: arch, classes with counts, preprocessing, fold report and proof, digests, and the
    /// measured accuracy under `evaluation` when it was given to `fold export`.
    #[schema(value_type = Object)]
    pub(crate) manifest: serde_json::Value,
}

impl ModelCard {
    pub(crate) fn of(model: &ServedModel) -> Result<Self, Problem> {
        let manifest = serde_json::to_value(&*model.manifest).map_err(|error| {
            tracing::error!(%error, "the manifest cannot be written as JSON");
            Problem::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, "internal", "the card cannot be written")
        })?;
        Ok(Self {
            name: model.name.clone(),
            version: model.version.clone(),
            device: model.device.to_string(),
            scale: Calibration::Softmax.into(),
            calibration: None,
            manifest,
        })
    }
}
