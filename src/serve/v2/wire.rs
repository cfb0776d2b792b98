//! The protocol's JSON, with the descriptions that openapi.yaml carries.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::objects;
use super::super::wire::ClientId;
use super::tensors::JsonData;

/// A request for inference. With the header `Inference-Header-Content-Length`, tensors follow the JSON as bytes.
#[derive(Debug, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct WireInfer {
    /// Repeated in the answer; at most 1,024 bytes.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub(super) id: ClientId,
    /// `timeout` (µs), `nbn_top_k` (`classification` of every output that has scores), `nbn_alpha`, `nbn_prior`,
    /// `binary_data_output`; others are ignored, including `priority`, since there is one queue for all.
    #[serde(default, deserialize_with = "of_request")]
    pub(super) parameters: BTreeMap<String, Value>,
    /// One input: `images` or `image`.
    #[serde(deserialize_with = "objects::objects")]
    pub(super) inputs: Vec<WireInput>,
    /// All outputs by default.
    #[serde(default, deserialize_with = "objects::objects")]
    pub(super) outputs: Vec<WireOutput>,
}

/// The parameters that mean something here, of a request and of a tensor; the protocol has others ignored.
const OF_REQUEST: [&str; 5] = ["timeout", "nbn_top_k", "nbn_alpha", "nbn_prior", "binary_data_output"];
const OF_TENSOR: [&str; 4] = ["binary_data", "binary_data_size", "classification", SHARED_MEMORY];
/// Names a region of memory that client and server share, in Triton's extension of that name.
pub(super) const SHARED_MEMORY: &str = "shared_memory_region";

fn of_request<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Value>, D::Error> {
    deserializer.deserialize_map(Parameters(&OF_REQUEST))
}

fn of_tensor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Value>, D::Error> {
    deserializer.deserialize_map(Parameters(&OF_TENSOR))
}

/// Parameters of these names.
struct Parameters(&'static [&'static str]);

impl<'de> Visitor<'de> for Parameters {
    type Value = BTreeMap<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of parameters")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if !self.0.contains(&name.as_str()) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            // Only a prior is more than one value; a list or an object is one, too.
            let mut left = if name == "nbn_prior" { 1 + objects::MAX_ELEMENTS } else { 1 };
            let value = map.next_value_seed(FewValues(&mut left))?;
            found.insert(name, value);
        }
        Ok(found)
    }
}

/// A value of few values: each takes many times the two bytes that it may have in a body.
struct FewValues<'a>(&'a mut usize);

impl FewValues<'_> {
    fn one<E: de::Error>(&mut self, value: Value) -> Result<Value, E> {
        *self.0 = self.0.checked_sub(1).ok_or_else(|| E::custom("a parameter has too many values"))?;
        Ok(value)
    }
}

impl<'de> DeserializeSeed<'de> for FewValues<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FewValues<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(mut self) -> Result<Value, E> {
        self.one(Value::Null)
    }

    fn visit_bool<E: de::Error>(mut self, value: bool) -> Result<Value, E> {
        self.one(value.into())
    }

    fn visit_i64<E: de::Error>(mut self, value: i64) -> Result<Value, E> {
        self.one(value.into())
    }

    fn visit_u64<E: de::Error>(mut self, value: u64) -> Result<Value, E> {
        self.one(value.into())
    }

    fn visit_f64<E: de::Error>(mut self, value: f64) -> Result<Value, E> {
        self.one(value.into())
    }

    fn visit_str<E: de::Error>(mut self, value: &str) -> Result<Value, E> {
        self.one(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Value, A::Error> {
        // Before what is in it: lists of nothing take memory, too.
        self.one(Value::Null)?;
        let mut all = Vec::new();
        while let Some(one) = list.next_element_seed(FewValues(&mut *self.0))? {
            all.push(one);
        }
        Ok(all.into())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Value, A::Error> {
        self.one(Value::Null)?;
        let mut all = serde_json::Map::new();
        while let Some(name) = map.next_key()? {
            all.insert(name, map.next_value_seed(FewValues(&mut *self.0))?);
        }
        Ok(all.into())
    }
}

/// An input.
#[derive(Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct WireInput {
    /// `images` or `image`.
    pub(super) name: String,
    /// `FP32` for `images`, `BYTES` for `image`.
    pub(super) datatype: String,
    /// `[N, C, H, W]` or, where the network has its channels last, `[N, H, W, C]`; of `image`, `[N]`.
    #[serde(deserialize_with = "objects::list")]
    pub(super) shape: Vec<i64>,
    /// `binary_data_size`: the tensor's bytes after the JSON.
    #[serde(default, deserialize_with = "of_tensor")]
    pub(super) parameters: BTreeMap<String, Value>,
    /// Numbers, nested or flat; for BYTES, images in base64.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Vec<Value>>))]
    pub(super) data: Option<JsonData>,
}

impl fmt::Debug for WireInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WireInput").field("name", &self.name).field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// A requested output.
#[derive(Debug, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct WireOutput {
    /// `logits`, `probabilities` or `set`.
    pub(super) name: String,
    /// `classification` (how many of the best classes to give, as `value:index:label`), `binary_data`.
    #[serde(default, deserialize_with = "of_tensor")]
    pub(super) parameters: BTreeMap<String, Value>,
}

/// The answer.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct InferReply {
    pub(super) model_name: String,
    pub(super) model_version: String,
    #[serde(skip_serializing_if = "ClientId::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub(super) id: ClientId,
    pub(super) outputs: Vec<WireTensor>,
}

/// An output.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct WireTensor {
    pub(super) name: &'static str,
    pub(super) datatype: &'static str,
    pub(super) shape: Vec<usize>,
    /// `binary_data_size`, when the values follow the JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub(super) parameters: Option<Value>,
    /// Row-major.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Vec<Value>>))]
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

/// A process that is alive.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct Live {
    pub(super) live: bool,
}

/// A server that is ready.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct Ready {
    pub(super) live: bool,
    pub(super) ready: bool,
}

/// A model that is ready.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ModelReady {
    pub(super) name: String,
    pub(super) ready: bool,
}

/// Which lines of the index to give.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct IndexQuery {
    /// Only versions that are ready.
    #[serde(default)]
    pub(super) ready: bool,
}
