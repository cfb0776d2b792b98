//! What goes over the wire in JSON, with the descriptions that openapi.yaml carries.

use serde::{Deserialize, Serialize};

use super::code::Code;
use super::objects;
use super::options::{Include, RequestOptions};
use super::problem::Problem;
use crate::bundle::{BoundCalibration, Group, Manifest, Pixels, Question, Status};
use crate::classify::{Decision, Prediction, Scale, ScoreRule, Scored};
use crate::registry::ServedModel;
use crate::scores::{Familiar, Familiarities, PredictionSet, Prior, SetRequest, SetRung, SetScore};

/// Classes returned when `top_k` is absent.
const DEFAULT_TOP_K: usize = 5;

/// Several images in one JSON body.
#[derive(Debug, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({
    "images": [{"id": "one pixel", "b64": "UDYgMSAxIDI1NQr/gAA="}], "options": {"top_k": 2}
})))]
#[serde(deny_unknown_fields)]
pub(crate) struct ClassifyRequest {
    /// The images, answered in this order.
    #[cfg_attr(feature = "openapi", schema(min_items = 1))]
    #[serde(deserialize_with = "objects::objects")]
    pub(crate) images: Vec<JsonImage>,
    /// Options, which override the query parameters.
    #[serde(default, deserialize_with = "objects::object")]
    pub(crate) options: RequestOptions,
}

/// One image in a JSON body.
#[derive(Debug, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct JsonImage {
    /// The encoded file in base64, of the standard alphabet or that of URLs, or in a `data:` URL.
    pub(crate) b64: String,
    /// Repeated in the result; at most 1,024 bytes.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub(crate) id: Option<ClientId>,
}

/// Bytes of an id that a client chooses.
const MAX_ID: usize = 1024;

/// An id that a client chose, and that its answer repeats: at most [`MAX_ID`] bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct ClientId(String);

impl ClientId {
    pub(crate) fn try_new(id: String) -> Result<Self, Problem> {
        Self::try_from(id).map_err(|reason| Problem::new(Code::LongId, reason))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<String> for ClientId {
    type Error = String;

    fn try_from(id: String) -> Result<Self, String> {
        if id.len() <= MAX_ID {
            return Ok(Self(id));
        }
        Err(format!(
            "an id or file name has {} bytes; this server accepts up to {MAX_ID}: send a shorter one",
            id.len()
        ))
    }
}

impl From<ClientId> for String {
    fn from(id: ClientId) -> Self {
        id.0
    }
}

/// The answer to a classify request.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ClassifyReply {
    /// Name of the model.
    pub(crate) model: String,
    /// Its version.
    pub(crate) version: String,
    /// What a score is.
    pub(crate) scale: Scale,
    /// Id of the calibration behind the scores; absent if they are the softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibration: Option<String>,
    /// The class prior of the scores: `uniform`, `train` or `custom`; absent if they are the softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prior: Option<&'static str>,
    /// Which pixels of JPEGs were decoded: `fast`; absent if all were.
    #[serde(skip_serializing_if = "Pixels::is_exact")]
    #[cfg_attr(feature = "openapi", schema(required = false))]
    pub(crate) pixels: Pixels,
    /// One per image, in order.
    pub(crate) results: Vec<ImageResult>,
}

impl ClassifyReply {
    pub(crate) fn of(model: &ServedModel, rule: &ScoreRule, results: Vec<ImageResult>) -> Self {
        let calibration = model.scorer.calibration();
        Self {
            model: model.name.clone(),
            version: model.version.clone(),
            scale: model.scorer.scale(),
            calibration: calibration.map(|c| c.id.clone()),
            prior: rule.prior().map(Prior::name),
            pixels: model.pixels,
            results,
        }
    }
}

/// One image's answer: `predictions`, or `error` when this image, among several, could not be classified.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ImageResult {
    /// The image's id, or its file name in a multipart body.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub(crate) id: Option<ClientId>,
    /// The best classes, best first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) predictions: Option<Vec<ClassScore>>,
    /// The prediction set, on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) set: Option<WireSet>,
    /// How like the training images it is; on request, or if `unlike` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) familiarity: Option<WireFamiliarity>,
    /// `accept`, or `abstain` if a limit in the request says not to act on the best class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) decision: Option<WireDecision>,
    /// Why the decision is `abstain`; it begins with `unlike_training:` if the image is unlike the training images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
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
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ClassScore {
    /// Index of the class.
    pub(crate) class_id: usize,
    /// Its name.
    pub(crate) label: String,
    /// From 0 to 1; the scores of all classes sum to 1.
    pub(crate) score: f64,
    /// Softmax of the logits, on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uncalibrated: Option<f64>,
    /// `many` (over 100 training images), `medium` (20 to 100) or `few` (under 20).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<Group>,
    /// Training images of the class, when known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) training_images: Option<u64>,
    /// Calibration images of the class, on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) support: Option<u64>,
    /// How well founded the class's calibration is, on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<Status>,
}

/// A prediction set: classes that include the true one, except for a share `alpha` of the images.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct WireSet {
    /// The requested level.
    pub(crate) alpha: f64,
    /// The classes, the most likely under the set's score first. Never empty.
    pub(crate) labels: Vec<String>,
    /// Their indices.
    pub(crate) class_ids: Vec<usize>,
    /// The set's score.
    pub(crate) method: SetScore,
    /// Images over which the coverage was requested to hold.
    pub(crate) rung: SetRung,
    /// What each class's threshold is based on, in the order of `labels`: a class or group with too few calibration
    /// images falls back to a wider rung. Absent when `rung` is `marginal` or `shrunk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rungs: Option<Vec<SetRung>>,
    /// The class mix that the coverage holds for: `uniform`, `train`, or `calibration`, that of the calibration images.
    /// If the request gives a prior of its own, it is `calibration`, whatever that prior is.
    pub(crate) holds_for: &'static str,
}

impl WireSet {
    fn of(set: &PredictionSet, request: &SetRequest, manifest: &Manifest) -> Self {
        let rungs = set.members.iter().map(|(_, rung)| *rung).collect();
        Self {
            alpha: request.alpha,
            labels: set.members.iter().map(|(k, _)| manifest.classes[*k].label.clone()).collect(),
            class_ids: set.members.iter().map(|(k, _)| *k).collect(),
            method: request.score,
            rung: request.rung,
            rungs: matches!(request.rung, SetRung::Group | SetRung::Class).then_some(rungs),
            holds_for: request.mix.name(),
        }
    }
}

/// How like the training images an image is.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct WireFamiliarity {
    /// A conformal p-value: the share of images like the training images that stand out as much or more. Small for what is
    /// unlike them.
    pub(crate) p: f64,
    /// The calibration images that it was ranked among: `group`, those whose best class is of the same group, or `marginal`, all.
    pub(crate) rung: SetRung,
    /// By what it stands out most: `look` (brightness, colours, details), `distance` (what the network sees in it is far from
    /// every class) or `confidence` (no class is convincing).
    pub(crate) question: Question,
}

/// Whether to act on the best class.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub(crate) enum WireDecision {
    /// No limit in the request says otherwise.
    Accept,
    /// A limit in the request says not to; `reason` says which.
    Abstain,
}

/// Milliseconds by stage.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct StageMillis {
    /// Waiting for a worker.
    pub(crate) queue_ms: f64,
    /// Decoding.
    pub(crate) decode_ms: f64,
    /// Resizing, cropping and normalising.
    pub(crate) preprocess_ms: f64,
    /// The network, for the whole batch that the image was in.
    pub(crate) infer_ms: f64,
    /// Images in that batch.
    pub(crate) batch: usize,
}

/// Why one image among several has no predictions.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ImageError {
    /// The HTTP status of a request with this image alone.
    pub(crate) status: u16,
    /// The kind of error.
    pub(crate) code: String,
    /// One sentence.
    pub(crate) detail: String,
}

impl ImageResult {
    pub(crate) fn of(
        id: Option<ClientId>,
        prediction: &Prediction,
        scored: &Scored,
        model: &ServedModel,
        rule: &ScoreRule,
        options: &RequestOptions,
    ) -> Self {
        let min_score = options.min_score.unwrap_or(0.0);
        let best = scored.probabilities.top(options.top_k.unwrap_or(DEFAULT_TOP_K));
        let softmax = options.includes(Include::Uncalibrated).then(|| prediction.logits.softmax());
        let calibration = model.scorer.calibration().filter(|_| options.includes(Include::Support));
        let score = |(class_id, score): (usize, f64)| {
            let class = &model.manifest.classes[class_id];
            let founded = calibration.and_then(|c| c.content.classes.get(class_id));
            ClassScore {
                class_id,
                label: class.label.clone(),
                score,
                uncalibrated: softmax.as_ref().map(|p| p.values()[class_id]),
                group: class.group(),
                training_images: class.count,
                support: founded.map(|c| c.support),
                status: founded.map(|c| c.status),
            }
        };
        let millis = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let timings = &prediction.timings;
        let (decision, reason) = match &scored.decision {
            Decision::Accept => (WireDecision::Accept, None),
            Decision::Abstain(reason) => (WireDecision::Abstain, Some(reason.clone())),
        };
        let set = scored.set.as_ref().zip(rule.set_request());
        Self {
            id,
            predictions: Some(best.into_iter().filter(|(_, s)| *s >= min_score).map(score).collect()),
            set: set.map(|(set, request)| WireSet::of(set, request, &model.manifest)),
            familiarity: scored.familiarity.map(|Familiar { p, rung, question }| WireFamiliarity { p, rung, question }),
            decision: Some(decision),
            reason,
            logits: options.includes(Include::Logits).then(|| prediction.logits.values().to_vec()),
            timings: options.includes(Include::Timings).then(|| StageMillis {
                queue_ms: millis(timings.queue),
                decode_ms: millis(timings.decode),
                preprocess_ms: millis(timings.preprocess),
                infer_ms: millis(timings.infer),
                batch: timings.batch,
            }),
            error: None,
        }
    }

    pub(crate) fn failed(id: Option<ClientId>, problem: Problem) -> Self {
        let error = ImageError {
            status: problem.status().as_u16(),
            code: problem.code.word().into(),
            detail: problem.detail.into(),
        };
        Self {
            id,
            predictions: None,
            set: None,
            familiarity: None,
            decision: None,
            reason: None,
            logits: None,
            timings: None,
            error: Some(error),
        }
    }
}

/// The models that this server has.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ModelList {
    /// Sorted by name.
    pub(crate) models: Vec<ModelSummary>,
}

/// One model in the list.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
    /// What it computes with: `float32` or `int8`.
    pub(crate) precision: &'static str,
}

/// A model's card.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ModelCard {
    /// Its name.
    pub(crate) name: String,
    /// The version served.
    pub(crate) version: String,
    /// Where it runs: `cpu`, or GPUs, such as `cuda:0,cuda:1`.
    pub(crate) device: String,
    /// What it computes with: `float32` or `int8`.
    pub(crate) precision: &'static str,
    /// Which pixels of JPEGs it sees: `exact` or `fast`.
    pub(crate) pixels: Pixels,
    /// What a score is.
    pub(crate) scale: Scale,
    /// The content of `calibration.json` without its tables; null if scores are the softmax.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub(crate) calibration: Option<CalibrationCard>,
    /// The bundle's manifest: arch, classes with counts, preprocessing, fold report and proof, digests, and the
    /// measured accuracy under `evaluation` when it was given to `nbn fold export`.
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub(crate) manifest: serde_json::Value,
    /// What `nbn fold evaluate --card` measured on a test set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub(crate) evaluation: Option<serde_json::Value>,
}

/// How a model's scores were calibrated.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct CalibrationCard {
    /// Its id, as in answers.
    pub(crate) id: String,
    /// The chosen rung: `prior-shift`, `temperature`, `temperature-bias` or `structured-vector-scaling`.
    pub(crate) rung: serde_json::Value,
    /// The temperature T.
    pub(crate) temperature: f64,
    /// κ: how much of the training prior the network has removed from its logits.
    pub(crate) kappa: f64,
    /// How the scale of a class changes with its frequency in training; 0 where it does not.
    pub(crate) trend: f64,
    /// λ: how strongly the parameters of the classes are shrunk; 0 in calibrations that do not say.
    pub(crate) shrinkage: f64,
    /// Calibration images and status per class, in the order of the logits.
    pub(crate) classes: Vec<ClassFoundation>,
    /// What tells images like the training images from others; null if it knows nothing of that.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub(crate) familiarity: Option<FamiliarityCard>,
    /// What it was fitted to, and what it changed.
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub(crate) fit: serde_json::Value,
}

/// What a model knows of its training images.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct FamiliarityCard {
    /// What is looked at.
    pub(crate) questions: Vec<Question>,
    /// Training images behind `look` and `distance`.
    pub(crate) training_images: u64,
    /// The smallest `unlike` that the calibration images allow.
    pub(crate) least: f64,
}

/// What a class's calibration is based on.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ClassFoundation {
    /// The class.
    pub(crate) label: String,
    /// Its calibration images.
    pub(crate) support: u64,
    /// How well founded that makes it.
    pub(crate) status: Status,
}

impl CalibrationCard {
    fn of(bound: &BoundCalibration, known: Option<&Familiarities>) -> serde_json::Result<Self> {
        let content = &bound.content;
        let familiarity = content.familiarity.as_ref().zip(known).map(|(record, known)| FamiliarityCard {
            questions: record.questions.iter().map(|asked| asked.question).collect(),
            training_images: record.training_images,
            least: known.least(),
        });
        Ok(Self {
            id: bound.id.clone(),
            rung: serde_json::to_value(content.rung)?,
            temperature: content.temperature,
            kappa: content.kappa,
            trend: content.trend,
            shrinkage: content.shrinkage,
            classes: content
                .classes
                .iter()
                .map(|c| ClassFoundation { label: c.label.clone(), support: c.support, status: c.status })
                .collect(),
            familiarity,
            fit: serde_json::to_value(&content.fit)?,
        })
    }
}

impl ModelCard {
    pub(crate) fn of(model: &ServedModel) -> Result<Self, Problem> {
        let failed = |error: serde_json::Error| {
            tracing::error!(%error, "the card cannot be written as JSON");
            Problem::new(Code::Internal, "the card cannot be written")
        };
        let calibration = model.scorer.calibration();
        Ok(Self {
            name: model.name.clone(),
            version: model.version.clone(),
            precision: model.manifest.precision(),
            pixels: model.pixels,
            device: model.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            scale: model.scorer.scale(),
            calibration: calibration
                .map(|bound| CalibrationCard::of(bound, model.scorer.familiarities()))
                .transpose()
                .map_err(failed)?,
            manifest: serde_json::to_value(&*model.manifest).map_err(failed)?,
            evaluation: model.evaluation.clone(),
        })
    }
}
