//! Constants: a tensor's values, and back.

use bytes::Bytes;
use ndarray::{ArrayD, IxDyn};

use super::proto::{Tensor, kind};

/// A constant. Floating-point values are held in f64, rounded to their type; everything else in i64.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// `float` or `double`.
    Float(Float, ArrayD<f64>),
    /// An integer type of at most 64 bits with a sign, or `bool`, by its number in ONNX.
    Integer(i32, ArrayD<i64>),
}

/// A floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float {
    Single,
    Double,
}

impl Float {
    /// Its number in ONNX.
    pub(crate) fn kind(self) -> i32 {
        match self {
            Self::Single => kind::FLOAT,
            Self::Double => kind::DOUBLE,
        }
    }

    /// `values`, each rounded to this type.
    pub(crate) fn round(self, values: ArrayD<f64>) -> Value {
        Value::Float(self, if self == Self::Single { values.mapv_into(|v| f64::from(v as f32)) } else { values })
    }
}

/// Whether integers of this type are held in i64.
fn is_integer(kind: i32) -> bool {
    use kind::{BOOL, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32};
    [BOOL, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32].contains(&kind)
}

/// Wraps as the type does; what is not 0 is true.
fn fit(kind: i32, value: i64) -> i64 {
    match kind {
        kind::BOOL => i64::from(value != 0),
        kind::INT8 => i64::from(value as i8),
        kind::INT16 => i64::from(value as i16),
        kind::INT32 => i64::from(value as i32),
        kind::UINT8 => i64::from(value as u8),
        kind::UINT16 => i64::from(value as u16),
        kind::UINT32 => i64::from(value as u32),
        _ => value,
    }
}

impl Value {
    /// Integers of type `kind`; none for a type that is not held.
    pub(crate) fn integers(kind: i32, values: ArrayD<i64>) -> Option<Self> {
        is_integer(kind).then(|| Self::Integer(kind, values.mapv_into(|v| fit(kind, v))))
    }

    /// Indices, sizes and the like.
    pub(crate) fn indices(values: &[i64]) -> Self {
        Self::Integer(kind::INT64, ArrayD::from_shape_fn(IxDyn(&[values.len()]), |at| values[at[0]]))
    }

    /// Its type's number in ONNX.
    pub(crate) fn kind(&self) -> i32 {
        match self {
            Self::Float(float, _) => float.kind(),
            Self::Integer(kind, _) => *kind,
        }
    }

    /// Its dimensions.
    pub(crate) fn dims(&self) -> &[usize] {
        match self {
            Self::Float(_, values) => values.shape(),
            Self::Integer(_, values) => values.shape(),
        }
    }

    /// Its values, if they are of a floating-point type.
    pub(crate) fn floats(&self) -> Option<&ArrayD<f64>> {
        if let Self::Float(_, values) = self { Some(values) } else { None }
    }

    /// Its values, one by one, if they are integers.
    pub(crate) fn list(&self) -> Option<Vec<i64>> {
        if let Self::Integer(_, values) = self { Some(values.iter().copied().collect()) } else { None }
    }

    /// Its values as numbers, whatever their type.
    pub(crate) fn numbers(&self) -> ArrayD<f64> {
        match self {
            Self::Float(_, values) => values.clone(),
            Self::Integer(_, values) => values.mapv(|v| v as f64),
        }
    }

    /// The values of `tensor`, which lie in the file itself or are `external`. None when its type is not held, or its
    /// values do not fill its shape.
    pub(crate) fn of(tensor: &Tensor, external: Option<&[u8]>) -> Option<Self> {
        let dims: Vec<usize> = tensor.dims.iter().map(|&d| usize::try_from(d)).collect::<Result<_, _>>().ok()?;
        let count = dims.iter().try_fold(1usize, |count, &d| count.checked_mul(d))?;
        let raw = external.or(tensor.raw_data.as_deref());
        let shape = IxDyn(&dims);
        let kind = tensor.data_type.unwrap_or_default();
        match kind {
            kind::FLOAT => {
                let values = match raw {
                    Some(raw) => split(raw, count, |b| f32::from_le_bytes(b).into())?,
                    None => tensor.float_data.0.iter().map(|&v| v.into()).collect(),
                };
                Some(Self::Float(Float::Single, ArrayD::from_shape_vec(shape, values).ok()?))
            }
            kind::DOUBLE => {
                let values = match raw {
                    Some(raw) => split(raw, count, f64::from_le_bytes)?,
                    None => tensor.double_data.0.clone(),
                };
                Some(Self::Float(Float::Double, ArrayD::from_shape_vec(shape, values).ok()?))
            }
            _ => {
                let values = match raw {
                    Some(raw) => match kind {
                        kind::INT64 => split(raw, count, i64::from_le_bytes)?,
                        kind::INT32 => split(raw, count, |b| i32::from_le_bytes(b).into())?,
                        kind::UINT32 => split(raw, count, |b| u32::from_le_bytes(b).into())?,
                        kind::INT16 => split(raw, count, |b| i16::from_le_bytes(b).into())?,
                        kind::UINT16 => split(raw, count, |b| u16::from_le_bytes(b).into())?,
                        kind::INT8 => split(raw, count, |b| i8::from_le_bytes(b).into())?,
                        kind::UINT8 | kind::BOOL => split(raw, count, |b| u8::from_le_bytes(b).into())?,
                        _ => return None,
                    },
                    None if kind == kind::INT64 => tensor.int64_data.0.clone(),
                    None if kind == kind::UINT32 => {
                        tensor.uint64_data.0.iter().map(|&v| i64::try_from(v).ok()).collect::<Option<_>>()?
                    }
                    None => tensor.int32_data.0.iter().map(|&v| v.into()).collect(),
                };
                Self::integers(kind, ArrayD::from_shape_vec(shape, values).ok()?)
            }
        }
    }

    /// The tensor, its values in the file itself.
    pub(crate) fn tensor(&self, name: &str) -> Tensor {
        let raw: Vec<u8> = match self {
            Self::Float(Float::Single, values) => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
            Self::Float(Float::Double, values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Integer(kind, values) => match *kind {
                kind::INT32 | kind::UINT32 => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
                kind::INT16 | kind::UINT16 => values.iter().flat_map(|&v| (v as i16).to_le_bytes()).collect(),
                kind::INT8 | kind::UINT8 | kind::BOOL => values.iter().map(|&v| v as u8).collect(),
                _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            },
        };
        Tensor {
            dims: self.dims().iter().map(|&d| d as i64).collect(),
            data_type: Some(self.kind()),
            name: Some(name.to_owned()),
            raw_data: Some(Bytes::from(raw)),
            ..Tensor::default()
        }
    }
}

/// `count` values of `N` bytes each.
fn split<const N: usize, T>(raw: &[u8], count: usize, value: impl Fn([u8; N]) -> T) -> Option<Vec<T>> {
    let (values, rest) = raw.as_chunks::<N>();
    (rest.is_empty() && values.len() == count).then(|| values.iter().map(|&bytes| value(bytes)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_comes_back() {
        let kinds = [kind::BOOL, kind::INT8, kind::INT16, kind::INT32, kind::INT64, kind::UINT8, kind::UINT16];
        for kind in kinds.into_iter().chain([kind::UINT32]) {
            let values = ArrayD::from_shape_fn(IxDyn(&[2, 3]), |at| at[1] as i64 - 1);
            let value = Value::integers(kind, values).unwrap();
            assert_eq!(Value::of(&value.tensor("x"), None), Some(value));
        }
        for float in [Float::Single, Float::Double] {
            // A scalar keeps its shape of no dimensions.
            let value = float.round(ArrayD::from_elem(IxDyn(&[]), 0.1));
            assert_eq!(Value::of(&value.tensor("x"), None), Some(value));
        }
        // 64 bits without a sign.
        assert_eq!(Value::integers(13, ArrayD::zeros(IxDyn(&[1]))), None);
        let short = Tensor {
            dims: vec![2],
            data_type: Some(kind::FLOAT),
            raw_data: Some(Bytes::from_static(&[0; 4])),
            ..Tensor::default()
        };
        assert_eq!(Value::of(&short, None), None);
    }
}
