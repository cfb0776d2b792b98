//! Operations that move values and compute none: shapes, axes, and what is taken out of a tensor.

use ndarray::{ArrayD, ArrayViewD, Axis, IxDyn, Slice, concatenate};

use super::{MAX_VALUES, integers, small, zipped};
use crate::fold::onnx::proto::Node;
use crate::fold::onnx::value::Value;

/// Where values go.
pub(super) enum Move {
    /// Nowhere: only the shape is another.
    Shape(IxDyn),
    /// The axes change places; each once.
    Axes(Vec<usize>),
    /// Repeated along axes of length 1.
    Broadcast(IxDyn),
}

impl Move {
    fn of<T: Copy>(&self, values: &ArrayD<T>) -> Option<ArrayD<T>> {
        match self {
            Self::Shape(shape) => ArrayD::from_shape_vec(shape.clone(), values.iter().copied().collect()).ok(),
            Self::Axes(order) => (order.len() == values.ndim()).then(|| values.clone().permuted_axes(order.clone())),
            Self::Broadcast(shape) => Some(values.broadcast(shape.clone())?.to_owned()),
        }
    }
}

/// `value` with its values at other places.
pub(super) fn moved(value: &Value, by: &Move) -> Option<Value> {
    Some(match value {
        Value::Float(float, values) => Value::Float(*float, by.of(values)?),
        Value::Integer(kind, values) => Value::Integer(*kind, by.of(values)?),
    })
}

/// Of each pair, the first where `which` is true.
pub(super) fn chosen(which: &ArrayD<i64>, a: &Value, b: &Value) -> Option<Value> {
    fn choose<T: Copy>(which: &ArrayD<i64>, a: &ArrayD<T>, b: &ArrayD<T>) -> Option<ArrayD<T>> {
        zipped(which, &zipped(a, b, |a, b| (a, b))?, |which, (a, b)| if which != 0 { a } else { b })
    }
    match (a, b) {
        (Value::Float(float, a), Value::Float(other, b)) if float == other => {
            Some(Value::Float(*float, choose(which, a, b)?))
        }
        (Value::Integer(kind, a), Value::Integer(other, b)) if kind == other => {
            Some(Value::Integer(*kind, choose(which, a, b)?))
        }
        _ => None,
    }
}

pub(super) fn joined(values: &[&Value], axis: usize) -> Option<Value> {
    fn join<T: Copy>(arrays: &[Option<&ArrayD<T>>], axis: usize) -> Option<ArrayD<T>> {
        let views: Vec<ArrayViewD<T>> = arrays.iter().map(|a| a.map(|a| a.view())).collect::<Option<_>>()?;
        concatenate(Axis(axis), &views).ok()
    }
    let first = values[0].dims();
    let fits = |v: &&Value| {
        let dims = v.dims();
        v.kind() == values[0].kind()
            && dims.len() == first.len()
            && (0..dims.len()).all(|n| n == axis || dims[n] == first[n])
    };
    let count: usize = values.iter().map(|v| v.dims().iter().product::<usize>()).sum();
    if axis >= first.len() || !values.iter().all(fits) || count > MAX_VALUES {
        return None;
    }
    match values[0] {
        Value::Float(float, _) => {
            let arrays: Vec<_> = values.iter().map(|v| v.floats()).collect();
            Some(Value::Float(*float, join(&arrays, axis)?))
        }
        Value::Integer(kind, _) => {
            let arrays: Vec<_> = values.iter().map(|v| integers(v)).collect();
            Some(Value::Integer(*kind, join(&arrays, axis)?))
        }
    }
}

/// The axis of each index is replaced by the indices' own; a scalar index drops it.
pub(super) fn gather(value: &Value, indices: &ArrayD<i64>, axis: usize) -> Option<Value> {
    fn pick<T: Copy>(values: &ArrayD<T>, indices: &ArrayD<i64>, axis: usize) -> Option<ArrayD<T>> {
        let length = values.shape()[axis] as i64;
        let at: Vec<usize> = indices
            .iter()
            .map(|&i| usize::try_from(if i < 0 { i + length } else { i }).ok().filter(|&i| (i as i64) < length))
            .collect::<Option<_>>()?;
        let (before, after) = (&values.shape()[..axis], &values.shape()[axis + 1..]);
        let shape = [before, indices.shape(), after].concat();
        if !small(&shape) {
            return None;
        }
        let picked = values.select(Axis(axis), &at);
        ArrayD::from_shape_vec(IxDyn(&shape), picked.iter().copied().collect()).ok()
    }
    Some(match value {
        Value::Float(float, values) => Value::Float(*float, pick(values, indices, axis)?),
        Value::Integer(kind, values) => Value::Integer(*kind, pick(values, indices, axis)?),
    })
}

/// Limits, axes and steps are inputs since opset 10.
pub(super) fn slice(node: &Node, inputs: &[Option<&Value>]) -> Option<Value> {
    fn cut<T: Copy>(values: &ArrayD<T>, cuts: &[(usize, i64, i64, i64)]) -> Option<ArrayD<T>> {
        let mut values = values.clone();
        for &(axis, start, end, step) in cuts {
            let length = values.shape()[axis] as i64;
            let wrapped = |at: i64| if at < 0 { at.saturating_add(length) } else { at };
            // Backwards slices are left to the runtime.
            let (start, end) = (wrapped(start).clamp(0, length), wrapped(end).clamp(0, length));
            let step = usize::try_from(step).ok().filter(|&step| step > 0)?;
            let end = end.max(start);
            let part = Slice::new(start as isize, Some(end as isize), step as isize);
            values = values.slice_axis(Axis(axis), part).to_owned();
        }
        Some(values)
    }
    let value = inputs.first().copied().flatten()?;
    let rank = value.dims().len();
    let list = |n: usize, name: &str| match inputs.get(n).copied().flatten() {
        Some(value) => value.list(),
        None => node.ints(name).map(<[i64]>::to_vec),
    };
    let (starts, ends) = (list(1, "starts")?, list(2, "ends")?);
    let axes = list(3, "axes").unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = list(4, "steps").unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
        return None;
    }
    let cuts: Vec<(usize, i64, i64, i64)> = (0..starts.len())
        .map(|n| Some((axis_of(axes[n], rank)?, starts[n], ends[n], steps[n])))
        .collect::<Option<_>>()?;
    Some(match value {
        Value::Float(float, values) => Value::Float(*float, cut(values, &cuts)?),
        Value::Integer(kind, values) => Value::Integer(*kind, cut(values, &cuts)?),
    })
}

/// An axis, counted from the end when it is negative.
pub(crate) fn axis_of(axis: i64, rank: usize) -> Option<usize> {
    let axis = if axis < 0 { axis.checked_add(i64::try_from(rank).ok()?)? } else { axis };
    usize::try_from(axis).ok().filter(|&axis| axis < rank)
}

/// A position from 0 to `rank`, counted from the end when it is negative.
pub(super) fn clamp(at: i64, rank: usize) -> usize {
    let rank = rank as i64;
    (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize
}

/// 0 is the length that was there, -1 what is left over.
pub(super) fn reshaped(dims: &[usize], wanted: &[i64], zero_is_zero: bool) -> Option<IxDyn> {
    let mut shape = Vec::with_capacity(wanted.len());
    let mut rest = None;
    for (n, &d) in wanted.iter().enumerate() {
        shape.push(match d {
            0 if !zero_is_zero => *dims.get(n)?,
            -1 if rest.is_none() => {
                rest = Some(n);
                1
            }
            d => usize::try_from(d).ok()?,
        });
    }
    let (count, known) = (dims.iter().product::<usize>(), shape.iter().try_fold(1usize, |c, &d| c.checked_mul(d))?);
    if let Some(n) = rest {
        shape[n] = count.checked_div(known)?;
    }
    (shape.iter().try_fold(1usize, |c, &d| c.checked_mul(d)) == Some(count)).then(|| IxDyn(&shape))
}

pub(super) fn squeezed(dims: &[usize], axes: Option<Vec<i64>>) -> Option<IxDyn> {
    let axes: Vec<usize> = match axes {
        Some(axes) => axes.into_iter().map(|axis| axis_of(axis, dims.len())).collect::<Option<_>>()?,
        None => (0..dims.len()).filter(|&axis| dims[axis] == 1).collect(),
    };
    if axes.iter().any(|&axis| dims[axis] != 1) {
        return None;
    }
    let left: Vec<usize> = (0..dims.len()).filter(|axis| !axes.contains(axis)).map(|axis| dims[axis]).collect();
    Some(IxDyn(&left))
}

pub(super) fn unsqueezed(dims: &[usize], axes: &[i64]) -> Option<IxDyn> {
    let rank = dims.len() + axes.len();
    let axes: Vec<usize> = axes.iter().map(|&axis| axis_of(axis, rank)).collect::<Option<_>>()?;
    let mut left = dims.iter();
    let shape: Vec<usize> = (0..rank)
        .map(|axis| if axes.contains(&axis) { Some(1) } else { left.next().copied() })
        .collect::<Option<_>>()?;
    left.next().is_none().then(|| IxDyn(&shape))
}
