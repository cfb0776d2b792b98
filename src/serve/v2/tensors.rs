//! Tensors on the wire: JSON values nested or flat, little-endian bytes, BYTES elements with their lengths.

use axum::body::Bytes;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::super::base64;
use super::super::code::Code;
use super::super::cut::{quoted, shown};
use super::super::objects;
use super::{Problem, bad};
use crate::classify::Input;
use crate::registry::ServedModel;

/// An input as a request carries it.
pub(super) struct RawTensor {
    pub(super) name: String,
    pub(super) datatype: String,
    pub(super) shape: Vec<i64>,
    pub(super) data: RawData,
}

/// Its content.
pub(super) enum RawData {
    /// Little-endian values, or BYTES elements each behind its length in four bytes.
    Binary(Bytes),
    /// One BYTES element, without its length.
    One(Bytes),
    /// Values of an FP32 tensor, row-major.
    Floats(Vec<f32>),
    /// BYTES elements.
    Elements(Vec<Bytes>),
}

impl RawData {
    /// Bytes, all elements together.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Binary(bytes) | Self::One(bytes) => bytes.len(),
            Self::Floats(values) => size_of_val(values.as_slice()),
            // They are not looked into here.
            Self::Elements(elements) => size_of_val(elements.as_slice()),
        }
    }
}

/// An output.
pub(super) struct Tensor {
    pub(super) name: &'static str,
    pub(super) datatype: &'static str,
    pub(super) shape: Vec<usize>,
    pub(super) data: Data,
}

/// Its content, row-major.
pub(super) enum Data {
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Bytes(Vec<Vec<u8>>),
}

impl Data {
    /// As the binary extension and gRPC carry it.
    pub(super) fn binary(&self) -> Vec<u8> {
        match self {
            Self::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Bool(values) => values.iter().map(|&v| u8::from(v)).collect(),
            Self::Bytes(elements) => {
                let element = |e: &Vec<u8>| [&(e.len() as u32).to_le_bytes()[..], e].concat();
                elements.iter().flat_map(element).collect()
            }
        }
    }
}

/// JSON data, nested or flat, flattened in row-major order.
pub(super) enum JsonData {
    Floats(Vec<f32>),
    Strings(Vec<String>),
}

/// What a nested list may hold.
#[derive(Default)]
struct Flat {
    floats: Vec<f32>,
    strings: Vec<String>,
}

/// Adds one value, or a list of them, to a [`Flat`].
struct FlattenInto<'a>(&'a mut Flat);

impl<'de> serde::de::DeserializeSeed<'de> for FlattenInto<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FlattenInto<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("numbers or strings, nested or flat")
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.0.floats.push(value as f32);
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.0.floats.push(value as f32);
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.0.floats.push(value as f32);
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        objects::few(self.0.strings.len())?;
        self.0.strings.push(value.to_owned());
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(FlattenInto(self.0))?.is_some() {}
        Ok(())
    }
}

impl<'de> Deserialize<'de> for JsonData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut flat = Flat::default();
        deserializer.deserialize_any(FlattenInto(&mut flat))?;
        match flat {
            Flat { floats, strings } if strings.is_empty() => Ok(Self::Floats(floats)),
            Flat { floats, strings } if floats.is_empty() => Ok(Self::Strings(strings)),
            _ => Err(serde::de::Error::custom("data mixes numbers and strings")),
        }
    }
}

impl JsonData {
    /// Strings are pictures in base64: JSON cannot carry bytes.
    pub(super) fn raw(self) -> Result<RawData, Problem> {
        match self {
            Self::Floats(values) => Ok(RawData::Floats(values)),
            Self::Strings(strings) => {
                let decode = |(at, text): (usize, String)| {
                    let fail = |reason| bad(format!("element {at} of a BYTES tensor is not base64: {reason}"));
                    base64::decode(&text).map_err(fail)
                };
                strings.into_iter().enumerate().map(decode).collect::<Result<_, _>>().map(RawData::Elements)
            }
        }
    }
}

/// The pictures of a request: exactly one of the inputs `images` and `image`.
pub(super) fn inputs(tensors: Vec<RawTensor>, model: &ServedModel, limit: usize) -> Result<Vec<Input>, Problem> {
    let given: Vec<_> = tensors.iter().take(10).map(|tensor| quoted(&tensor.name)).collect();
    let [tensor] = <[RawTensor; 1]>::try_from(tensors).map_err(|_| {
        let given = given.join(", ");
        bad(format!("the request has the inputs [{given}]; expected one: images (FP32), or image (BYTES)"))
    })?;
    let own = model.manifest.preprocessing.shape();
    let RawTensor { name, datatype, shape, data } = tensor;
    let (expected_type, expected_shape) = match name.as_str() {
        "images" => ("FP32", format!("[N, {}, {}, {}]", own[0], own[1], own[2])),
        "image" => ("BYTES", "[N]".to_owned()),
        _ => {
            return Err(bad(format!(
                "no input is named {}; the inputs are images (FP32) and image (BYTES)",
                quoted(&name)
            )));
        }
    };
    if datatype != expected_type {
        return Err(bad(format!("input {name} has datatype {}; expected {expected_type}", quoted(&datatype))));
    }
    let fits = match (name.as_str(), shape.as_slice()) {
        ("images", &[n, a, b, c]) => n >= 1 && [a, b, c] == own.map(|length| length as i64),
        ("image", &[n] | &[n, 1]) => n >= 1,
        _ => false,
    };
    if !fits {
        let shape = shown(format_args!("{shape:?}"));
        return Err(bad(format!("input {name} has shape {shape}; expected {expected_shape} with N from 1")));
    }
    let count = usize::try_from(shape[0]).unwrap_or(usize::MAX);
    if count > limit {
        let detail = format!(
            "input {name} has {count} images; this server accepts up to {limit}: send several requests, or raise \
             --max-images"
        );
        return Err(Problem::new(Code::TooManyImages, detail).with_limit(limit as u64));
    }
    if name == "image" {
        let elements = match data {
            RawData::Binary(bytes) => split(&bytes, count)?,
            RawData::One(bytes) => vec![bytes],
            RawData::Elements(elements) => elements,
            RawData::Floats(values) => {
                return Err(bad(format!("input image has {} numbers; expected strings", values.len())));
            }
        };
        if elements.len() != count {
            return Err(bad(format!("input image has {} elements; its shape says {count}", elements.len())));
        }
        return Ok(elements.into_iter().map(Input::Encoded).collect());
    }
    let item: usize = own.iter().product();
    let bytes = match data {
        RawData::Binary(bytes) => bytes,
        RawData::Floats(values) if values.len() == count * item => {
            values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into()
        }
        RawData::Floats(values) => {
            let product = count * item;
            return Err(bad(format!("input images has {} values; its shape says {product}", values.len())));
        }
        RawData::One(_) | RawData::Elements(_) => return Err(bad("input images has strings; expected numbers")),
    };
    let expected = 4 * count * item;
    if bytes.len() != expected {
        return Err(bad(format!("input images has {} bytes; its shape says {expected}", bytes.len())));
    }
    let finite = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite();
    if let Some(at) = bytes.chunks_exact(4).position(|value| !finite(value)) {
        return Err(bad(format!("value {} of image {} in input images is not finite", at % item, at / item)));
    }
    Ok((0..count).map(|n| Input::Pixels(bytes.slice(4 * n * item..4 * (n + 1) * item))).collect())
}

/// The elements of a BYTES tensor that should have `count`.
fn split(bytes: &Bytes, count: usize) -> Result<Vec<Bytes>, Problem> {
    let mut elements = Vec::with_capacity(count);
    let mut at = 0;
    while at < bytes.len() {
        if elements.len() == count {
            let rest = bytes.len() - at;
            return Err(bad(format!("input image has {rest} bytes after the {count} elements that its shape says")));
        }
        let broken = || {
            let n = elements.len();
            bad(format!("element {n} of a BYTES tensor is cut short: expected a length in four bytes, then that many"))
        };
        let length = bytes.get(at..at + 4).ok_or_else(broken)?;
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let end = (at + 4).checked_add(length).filter(|&end| end <= bytes.len()).ok_or_else(broken)?;
        elements.push(bytes.slice(at + 4..end));
        at = end;
    }
    Ok(elements)
}
