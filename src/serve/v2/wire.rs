//! The protocol's JSON, with the descriptions that openapi.yaml carries.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::super::objects;
use super::tensors::JsonData;

/// A request for inference. With the header `Inference-Header-Content-Length`, tensors follow the JSON as bytes.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct WireInfer {
    /// Echoed.
    #[serde(default)]
    pub(super) id: String,
    /// `timeout` (µs), `nbn_alpha`, `nbn_prior`, `binary_data_output`; unknown ones are ignored.
    #[serde(default)]
    pub(super) parameters: BTreeMap<String, Value>,
    /// One input: `images` or `image`.
    #[serde(deserialize_with = "objects::objects")]
    pub(super) inputs: Vec<WireInput>,
    /// All there are when absent.
    #[serde(default, deserialize_with = "objects::objects")]
    pub(super) outputs: Vec<WireOutput>,
}

/// An input.
#[derive(Deserialize, ToSchema)]
pub(crate) struct WireInput {
    /// `images` or `image`.
    pub(super) name: String,
    /// `FP32` for `images`, `BYTES` for `image`.
    pub(super) datatype: String,
    /// `[N, 3, H, W]`, or `[N]`.
    pub(super) shape: Vec<i64>,
    /// `binary_data_size`: the tensor's bytes after the JSON.
    #[serde(default)]
    pub(super) parameters: BTreeMap<String, Value>,
    /// Numbers, nested or flat; for BYTES pictures in base64.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Value>>)]
    pub(super) data: Option<JsonData>,
}

impl std::fmt::Debug for WireInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WireInput").field("name", &self.name).field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// An output that is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct WireOutput {
    /// `logits`, `probabilities` or `set`.
    pub(super) name: String,
    /// `classification` (the best so many as `value:index:label`), `binary_data`.
    #[serde(default)]
    pub(super) parameters: BTreeMap<String, Value>,
}

/// The answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InferReply {
    pub(super) model_name: String,
    pub(super) model_version: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) id: String,
    pub(super) outputs: Vec<WireTensor>,
}

/// An output.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireTensor {
    pub(super) name: &'static str,
    pub(super) datatype: &'static str,
    pub(super) shape: Vec<usize>,
    /// `binary_data_size`, when the values follow the JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub(super) parameters: Option<Value>,
    /// Row-major.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>)]
    pub(super) data: Option<WireData>,
}

/// Values of an output.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum WireData {
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Strings(Vec<String>),
}

/// A model that answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelReady {
    pub(super) name: String,
    pub(super) ready: bool,
}

/// Which lines of the index are wanted.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct IndexQuery {
    /// Only versions that answer.
    #[serde(default)]
    pub(super) ready: bool,
}
