//! What the protocol tells of a server and its models.

use serde::Serialize;

use super::Output;
use crate::registry::{IndexEntry, ModelState, ServedModel};

/// What the server speaks beside the protocol's core.
pub(super) const EXTENSIONS: [&str; 5] =
    ["binary_tensor_data", "classification", "statistics", "model_repository", "model_configuration"];

/// A server.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ServerInfo {
    pub(super) name: &'static str,
    pub(super) version: &'static str,
    pub(super) extensions: Vec<&'static str>,
}

/// A model.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ModelInfo {
    pub(super) name: String,
    /// The versions that are ready.
    pub(super) versions: Vec<String>,
    pub(super) platform: &'static str,
    /// The inputs, of which a request gives one.
    pub(super) inputs: Vec<TensorInfo>,
    pub(super) outputs: Vec<TensorInfo>,
}

/// A tensor; −1 stands for the number of images.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct TensorInfo {
    pub(super) name: &'static str,
    pub(super) datatype: &'static str,
    pub(super) shape: Vec<i64>,
}

pub(super) fn server() -> ServerInfo {
    ServerInfo { name: "nbn", version: env!("CARGO_PKG_VERSION"), extensions: EXTENSIONS.to_vec() }
}

pub(super) fn model(model: &ServedModel, versions: Vec<String>) -> ModelInfo {
    let [a, b, c] = model.manifest.preprocessing.shape().map(|length| length as i64);
    let classes = model.manifest.classes.len();
    let outputs = Output::ALL.into_iter().filter(|output| output.is_of(model));
    ModelInfo {
        name: model.name.clone(),
        versions,
        platform: "onnxruntime_onnx",
        inputs: vec![
            TensorInfo { name: "images", datatype: "FP32", shape: vec![-1, a, b, c] },
            TensorInfo { name: "image", datatype: "BYTES", shape: vec![-1, 1] },
        ],
        outputs: outputs
            .map(|o| TensorInfo { name: o.name(), datatype: o.datatype(), shape: vec![-1, o.values(classes) as i64] })
            .collect(),
    }
}

/// Triton's word and number for a data type.
pub(super) fn triton_type(datatype: &str) -> (&'static str, i32) {
    match datatype {
        "BOOL" => ("TYPE_BOOL", 1),
        "FP32" => ("TYPE_FP32", 11),
        _ => ("TYPE_STRING", 13),
    }
}

/// The part of Triton's model configuration that its clients read. `max_batch_size` is what one request may have.
pub(super) fn config(model: &ServedModel, max_images: usize) -> serde_json::Value {
    let info = self::model(model, Vec::new());
    let dims = |tensor: &TensorInfo| tensor.shape[1..].to_vec();
    let tensors = |tensors: &[TensorInfo]| -> Vec<serde_json::Value> {
        let one = |t: &TensorInfo| serde_json::json!({"name": t.name, "data_type": triton_type(t.datatype).0, "dims": dims(t)});
        tensors.iter().map(one).collect()
    };
    let mut inputs = tensors(&info.inputs);
    // Exactly one of them is given.
    inputs.iter_mut().for_each(|input| input["optional"] = true.into());
    serde_json::json!({
        "name": model.name,
        "platform": info.platform,
        "backend": "onnxruntime",
        "max_batch_size": max_images,
        "input": inputs,
        "output": tensors(&info.outputs),
        "parameters": {"precision": {"string_value": model.manifest.precision()}},
    })
}

/// A count and the total time.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct CountAndTime {
    pub(super) count: u64,
    /// Nanoseconds.
    pub(super) ns: u64,
}

/// Times of requests.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct InferStats {
    pub(super) success: CountAndTime,
    pub(super) fail: CountAndTime,
    pub(super) queue: CountAndTime,
    /// Decoding and preprocessing.
    pub(super) compute_input: CountAndTime,
    pub(super) compute_infer: CountAndTime,
    /// Scoring and encoding.
    pub(super) compute_output: CountAndTime,
    /// Always 0: answers are not cached.
    pub(super) cache_hit: CountAndTime,
    pub(super) cache_miss: CountAndTime,
}

/// Times of the network's runs with one batch size.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct BatchSizeStats {
    pub(super) batch_size: u64,
    pub(super) compute_input: CountAndTime,
    pub(super) compute_infer: CountAndTime,
    /// The time is always 0: outputs are made per request, not per batch.
    pub(super) compute_output: CountAndTime,
}

/// One version's statistics since it was loaded.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct VersionStats {
    pub(super) name: String,
    pub(super) version: String,
    /// When the last image was processed, in milliseconds since 1970; 0 if none was.
    pub(super) last_inference: u64,
    /// Number of images.
    pub(super) inference_count: u64,
    /// Number of runs of the network.
    pub(super) execution_count: u64,
    pub(super) inference_stats: InferStats,
    pub(super) batch_stats: Vec<BatchSizeStats>,
}

/// Statistics.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct Stats {
    pub(super) model_stats: Vec<VersionStats>,
}

pub(super) fn stats(model: &ServedModel) -> VersionStats {
    let engine = model.engine.stats();
    let requests = model.requests.snapshot();
    let ns = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let images = engine.succeeded;
    let runs = engine.batches.values().map(|b| b.runs).sum();
    let of = |count, time| CountAndTime { count, ns: ns(time) };
    VersionStats {
        name: model.name.clone(),
        version: model.version.clone(),
        last_inference: requests.last,
        inference_count: images,
        execution_count: runs,
        inference_stats: InferStats {
            success: of(requests.succeeded, requests.success_time),
            fail: of(requests.failed, requests.fail_time),
            // The protocol counts requests here; the times are sums over their images.
            queue: of(requests.succeeded, engine.queue),
            compute_input: of(requests.succeeded, engine.batches.values().map(|b| b.prepare).sum()),
            compute_infer: of(requests.succeeded, engine.batches.values().map(|b| b.infer).sum()),
            compute_output: of(requests.succeeded, requests.output_time),
            cache_hit: CountAndTime::default(),
            cache_miss: CountAndTime::default(),
        },
        batch_stats: engine
            .batches
            .iter()
            .map(|(&size, batch)| BatchSizeStats {
                batch_size: size as u64,
                compute_input: of(batch.runs, batch.prepare),
                compute_infer: of(batch.runs, batch.infer),
                compute_output: CountAndTime { count: batch.runs, ns: 0 },
            })
            .collect(),
    }
}

/// One line of the repository's index.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct IndexLine {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) state: IndexState,
    /// Why it is not ready, or why a newer state of its folder is not served.
    pub(super) reason: String,
}

/// Whether a version can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum IndexState {
    /// It is served.
    Ready,
    /// It is being opened.
    Loading,
    /// It is not served; `reason` says why.
    Unavailable,
}

impl IndexState {
    /// As on the wire.
    #[cfg(feature = "grpc")]
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Loading => "LOADING",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

impl From<IndexEntry> for IndexLine {
    fn from(entry: IndexEntry) -> Self {
        let IndexEntry { name, version, state, reason } = entry;
        let state = match state {
            ModelState::Ready => IndexState::Ready,
            ModelState::Loading => IndexState::Loading,
            ModelState::Unavailable => IndexState::Unavailable,
        };
        Self { name, version, state, reason }
    }
}
