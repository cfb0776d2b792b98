//! Evaluates an operation whose inputs are all constant: integers exactly, floats in f64 and rounded to their type.
//!
//! The operators are those that stand between a parameter and the layer that uses it, such as the normalisation of a
//! BatchNorm's weight, and those that compute shapes. Source: the operators' own definitions, onnx.ai/onnx/operators.

mod moves;

use ndarray::{ArrayD, Dimension, IxDyn, Zip};

use super::proto::{Node, kind};
use super::value::{Float, Value};
pub(crate) use moves::axis_of;
use moves::{Move, chosen, clamp, gather, joined, moved, reshaped, slice, squeezed, unsqueezed};

/// Largest constant that is made out of smaller ones, in values: larger ones are left to the runtime.
const MAX_VALUES: usize = 1 << 22;

/// Every operator that [`evaluate`] knows.
pub(crate) const OPERATORS: [&str; 57] = [
    "Abs",
    "Add",
    "And",
    "Cast",
    "CastLike",
    "Ceil",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "Gemm",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "Less",
    "LessOrEqual",
    "Log",
    "MatMul",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pow",
    "Range",
    "Reciprocal",
    "ReduceL1",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Relu",
    "Reshape",
    "Shape",
    "Sigmoid",
    "Sign",
    "Size",
    "Slice",
    "Softplus",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Tanh",
    "Transpose",
    "Unsqueeze",
    "Where",
];

/// The one output of `node`, whose inputs have the values `inputs`; an input that is left out has none. `opset` is the
/// version of ONNX's own operators. None when the node is not of the list, its inputs do not fit it, or one is NaN, which
/// the runtime's maxima and minima treat in ways of their own.
pub(crate) fn evaluate(node: &Node, inputs: &[Option<&Value>], opset: i64) -> Option<Value> {
    if !node.is_standard() || node.output.len() != 1 || !OPERATORS.contains(&node.op()) {
        return None;
    }
    let is_nan = |value: &&Value| value.floats().is_some_and(|values| values.iter().any(|v| v.is_nan()));
    if inputs.iter().flatten().any(is_nan) {
        return None;
    }
    let input = |n: usize| inputs.get(n).copied().flatten();
    let first = || input(0);
    let unary = |f: fn(f64) -> f64| match first()? {
        Value::Float(float, values) => Some(float.round(values.mapv(f))),
        Value::Integer(..) => None,
    };
    let reduced = |fold: fn(&mut dyn Iterator<Item = f64>) -> f64| reduce(node, first()?, input(1), opset, fold);
    match node.op() {
        "Constant" => constant(node),
        "Identity" => first().cloned(),
        "Add" => binary(first()?, input(1)?, |a, b| a + b, i64::checked_add),
        "Sub" => binary(first()?, input(1)?, |a, b| a - b, i64::checked_sub),
        "Mul" => binary(first()?, input(1)?, |a, b| a * b, i64::checked_mul),
        "Div" => binary(first()?, input(1)?, |a, b| a / b, i64::checked_div),
        "Pow" => power(first()?, input(1)?),
        "Max" => fold(inputs, f64::max, |a, b| Some(a.max(b))),
        "Min" => fold(inputs, f64::min, |a, b| Some(a.min(b))),
        "Equal" => compare(first()?, input(1)?, |a, b| a == b),
        "Greater" => compare(first()?, input(1)?, |a, b| a > b),
        "GreaterOrEqual" => compare(first()?, input(1)?, |a, b| a >= b),
        "Less" => compare(first()?, input(1)?, |a, b| a < b),
        "LessOrEqual" => compare(first()?, input(1)?, |a, b| a <= b),
        "And" => compare(first()?, input(1)?, |a, b| a != 0.0 && b != 0.0),
        "Or" => compare(first()?, input(1)?, |a, b| a != 0.0 || b != 0.0),
        "Not" => Value::integers(kind::BOOL, integers(first()?)?.mapv(|v| i64::from(v == 0))),
        "Neg" => signed(first()?, |v| -v, i64::checked_neg),
        "Abs" => signed(first()?, f64::abs, i64::checked_abs),
        "Sign" => signed(first()?, |v| if v == 0.0 { 0.0 } else { v.signum() }, |v| Some(v.signum())),
        "Relu" => signed(first()?, |v| v.max(0.0), |v| Some(v.max(0))),
        "Sqrt" => unary(f64::sqrt),
        "Reciprocal" => unary(f64::recip),
        "Exp" => unary(f64::exp),
        "Log" => unary(f64::ln),
        "Tanh" => unary(f64::tanh),
        "Sigmoid" => unary(|v| 1.0 / (1.0 + (-v).exp())),
        "Softplus" => unary(|v| v.max(0.0) + (-v.abs()).exp().ln_1p()),
        "Floor" => unary(f64::floor),
        "Ceil" => unary(f64::ceil),
        "Clip" => clip(node, first()?, input(1), input(2)),
        "Cast" => cast(first()?, i32::try_from(node.int("to")?).ok()?),
        "CastLike" => cast(first()?, input(1)?.kind()),
        "ReduceL1" => reduced(|values| values.map(f64::abs).sum()),
        "ReduceL2" => reduced(|values| values.map(|v| v * v).sum::<f64>().sqrt()),
        "ReduceSum" => reduced(|values| values.sum()),
        "ReduceSumSquare" => reduced(|values| values.map(|v| v * v).sum()),
        "ReduceMean" => reduced(|values| {
            let (sum, count) = values.fold((0.0, 0.0), |(sum, count), v| (sum + v, count + 1.0));
            sum / count
        }),
        "ReduceMax" => reduced(|values| values.fold(f64::NEG_INFINITY, f64::max)),
        "ReduceMin" => reduced(|values| values.fold(f64::INFINITY, f64::min)),
        "ReduceProd" => reduced(|values| values.product()),
        "MatMul" => product(first()?, input(1)?),
        "Gemm" => gemm(node, first()?, input(1)?, input(2)),
        "Shape" => {
            let dims: Vec<i64> = first()?.dims().iter().map(|&d| d as i64).collect();
            let at = |name: &str, default: i64| clamp(node.int(name).unwrap_or(default), dims.len());
            Some(Value::indices(dims.get(at("start", 0)..at("end", dims.len() as i64))?))
        }
        "Size" => {
            let count = first()?.dims().iter().product::<usize>() as i64;
            Value::integers(kind::INT64, ArrayD::from_elem(IxDyn(&[]), count))
        }
        "ConstantOfShape" => {
            let shape = sizes(&first()?.list()?)?;
            match node.tensor("value").map(|t| Value::of(t, None)) {
                None => Some(Float::Single.round(ArrayD::zeros(shape))),
                Some(Some(Value::Float(float, v))) => Some(float.round(ArrayD::from_elem(shape, *v.first()?))),
                Some(Some(Value::Integer(kind, v))) => Value::integers(kind, ArrayD::from_elem(shape, *v.first()?)),
                Some(None) => None,
            }
        }
        "Range" => {
            let [start, limit, delta] = [first()?, input(1)?, input(2)?].map(|v| v.list());
            let [start, limit, delta] = [*start?.first()?, *limit?.first()?, *delta?.first()?];
            let count =
                limit.checked_sub(start)?.checked_add(delta.checked_sub(delta.signum())?)?.checked_div(delta)?;
            let count = usize::try_from(count.max(0)).ok().filter(|&n| n <= MAX_VALUES)?;
            let values = ArrayD::from_shape_fn(IxDyn(&[count]), |at| start + at[0] as i64 * delta);
            Value::integers(first()?.kind(), values)
        }
        "Reshape" => {
            let shape = reshaped(first()?.dims(), &input(1)?.list()?, node.int("allowzero") == Some(1))?;
            moved(first()?, &Move::Shape(shape))
        }
        "Flatten" => {
            let dims = first()?.dims();
            let at = clamp(node.int("axis").unwrap_or(1), dims.len());
            let shape = [dims[..at].iter().product(), dims[at..].iter().product()];
            moved(first()?, &Move::Shape(IxDyn(&shape)))
        }
        "Squeeze" | "Unsqueeze" => {
            let axes = match node.ints("axes") {
                Some(axes) => Some(axes.to_vec()),
                None => input(1).map(Value::list).map_or(Some(None), |axes| axes.map(Some))?,
            };
            let dims = first()?.dims();
            let shape = if node.op() == "Squeeze" { squeezed(dims, axes)? } else { unsqueezed(dims, &axes?)? };
            moved(first()?, &Move::Shape(shape))
        }
        "Transpose" => {
            let rank = first()?.dims().len();
            let order: Vec<usize> = match node.ints("perm") {
                Some(order) => order.iter().map(|&axis| usize::try_from(axis)).collect::<Result<_, _>>().ok()?,
                None => (0..rank).rev().collect(),
            };
            let mut sorted = order.clone();
            sorted.sort_unstable();
            if sorted != (0..rank).collect::<Vec<_>>() {
                return None;
            }
            moved(first()?, &Move::Axes(order))
        }
        "Expand" => {
            let wanted = sizes(&input(1)?.list()?)?;
            let shape = common(first()?.dims(), wanted.slice())?;
            moved(first()?, &Move::Broadcast(shape))
        }
        "Concat" => {
            let values: Vec<&Value> = inputs.iter().map(|v| v.as_ref().copied()).collect::<Option<_>>()?;
            let axis = axis_of(node.int("axis")?, values.first()?.dims().len())?;
            joined(&values, axis)
        }
        "Gather" => {
            let axis = axis_of(node.int("axis").unwrap_or(0), first()?.dims().len())?;
            gather(first()?, integers(input(1)?)?, axis)
        }
        "Slice" => slice(node, inputs),
        "Where" => chosen(integers(first()?)?, input(1)?, input(2)?),
        _ => None,
    }
}

fn integers(value: &Value) -> Option<&ArrayD<i64>> {
    if let Value::Integer(_, values) = value { Some(values) } else { None }
}

fn constant(node: &Node) -> Option<Value> {
    let [attribute] = &node.attribute[..] else { return None };
    let scalar = IxDyn(&[]);
    match attribute.name.as_deref()? {
        "value" => Value::of(attribute.t.as_ref().filter(|t| !t.is_external())?, None),
        "value_float" => Some(Float::Single.round(ArrayD::from_elem(scalar, attribute.f?.into()))),
        "value_int" => Value::integers(kind::INT64, ArrayD::from_elem(scalar, attribute.i?)),
        "value_ints" => Some(Value::indices(&attribute.ints)),
        "value_floats" => {
            let values = attribute.floats.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            Some(Float::Single.round(ArrayD::from_shape_vec(IxDyn(&[values.len()]), values).ok()?))
        }
        _ => None,
    }
}

/// The shape that both broadcast to, if they do and it is not too large.
fn common(a: &[usize], b: &[usize]) -> Option<IxDyn> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], n: usize| (n + dims.len()).checked_sub(rank).map_or(1, |n| dims[n]);
    let dims: Vec<usize> = (0..rank)
        .map(|n| match (at(a, n), at(b, n)) {
            (x, y) if x == y || y == 1 => Some(x),
            (1, y) => Some(y),
            _ => None,
        })
        .collect::<Option<_>>()?;
    small(&dims).then(|| IxDyn(&dims))
}

fn small(dims: &[usize]) -> bool {
    // An axis of length 0 makes the others no smaller.
    dims.iter().try_fold(1usize, |count, &d| count.checked_mul(d.max(1))).is_some_and(|count| count <= MAX_VALUES)
}

fn sizes(list: &[i64]) -> Option<IxDyn> {
    let dims: Vec<usize> = list.iter().map(|&d| usize::try_from(d)).collect::<Result<_, _>>().ok()?;
    small(&dims).then(|| IxDyn(&dims))
}

fn zipped<A: Copy, B: Copy, C>(a: &ArrayD<A>, b: &ArrayD<B>, f: impl Fn(A, B) -> C) -> Option<ArrayD<C>> {
    let shape = common(a.shape(), b.shape())?;
    let (a, b) = (a.broadcast(shape.clone())?, b.broadcast(shape)?);
    Some(Zip::from(&a).and(&b).map_collect(|&a, &b| f(a, b)))
}

fn whole(values: ArrayD<Option<i64>>, kind: i32) -> Option<Value> {
    let shape = values.raw_dim();
    let values: Vec<i64> = values.into_iter().collect::<Option<_>>()?;
    Value::integers(kind, ArrayD::from_shape_vec(shape, values).ok()?)
}

fn binary(
    a: &Value,
    b: &Value,
    floats: impl Fn(f64, f64) -> f64,
    wholes: impl Fn(i64, i64) -> Option<i64>,
) -> Option<Value> {
    match (a, b) {
        (Value::Float(float, a), Value::Float(other, b)) if float == other => Some(float.round(zipped(a, b, floats)?)),
        (Value::Integer(kind, a), Value::Integer(other, b)) if kind == other => whole(zipped(a, b, wholes)?, *kind),
        _ => None,
    }
}

fn fold(inputs: &[Option<&Value>], floats: fn(f64, f64) -> f64, wholes: fn(i64, i64) -> Option<i64>) -> Option<Value> {
    let (first, rest) = inputs.split_first()?;
    rest.iter().try_fold((*first)?.clone(), |folded, value| binary(&folded, (*value)?, floats, wholes))
}

/// The exponent may be of another type.
fn power(base: &Value, exponent: &Value) -> Option<Value> {
    match base {
        Value::Float(float, values) => Some(float.round(zipped(values, &exponent.numbers(), f64::powf)?)),
        Value::Integer(kind, values) => {
            let power = |b: i64, e: i64| b.checked_pow(u32::try_from(e).ok()?);
            whole(zipped(values, integers(exponent)?, power)?, *kind)
        }
    }
}

fn compare(a: &Value, b: &Value, holds: fn(f64, f64) -> bool) -> Option<Value> {
    if a.kind() != b.kind() {
        return None;
    }
    // f64 holds integers up to 2^53 exactly.
    let exact = |v: &Value| integers(v).is_none_or(|v| v.iter().all(|v| v.unsigned_abs() <= 1 << 53));
    let found = zipped(&a.numbers(), &b.numbers(), |a, b| i64::from(holds(a, b)))?;
    if exact(a) && exact(b) { Value::integers(kind::BOOL, found) } else { None }
}

fn signed(value: &Value, floats: fn(f64) -> f64, wholes: fn(i64) -> Option<i64>) -> Option<Value> {
    match value {
        Value::Float(float, values) => Some(float.round(values.mapv(floats))),
        Value::Integer(kind, values) => whole(values.mapv(wholes), *kind),
    }
}

/// The limits are attributes up to opset 10, and inputs since.
fn clip(node: &Node, value: &Value, low: Option<&Value>, high: Option<&Value>) -> Option<Value> {
    let limit = |input: Option<&Value>, name: &str, none: f64| match input {
        Some(value) => value.numbers().first().copied(),
        None => Some(node.float(name).map_or(none, f64::from)),
    };
    let (low, high) = (limit(low, "min", f64::NEG_INFINITY)?, limit(high, "max", f64::INFINITY)?);
    match value {
        Value::Float(float, values) => Some(float.round(values.mapv(|v| v.max(low).min(high)))),
        Value::Integer(..) => None,
    }
}

/// The value as another type.
pub(crate) fn cast(value: &Value, to: i32) -> Option<Value> {
    match (value, to) {
        (_, kind::FLOAT) => Some(Float::Single.round(value.numbers())),
        (_, kind::DOUBLE) => Some(Float::Double.round(value.numbers())),
        (Value::Integer(_, values), _) => Value::integers(to, values.clone()),
        (Value::Float(_, values), kind::BOOL) => Value::integers(to, values.mapv(|v| i64::from(v != 0.0))),
        // Towards zero; what does not fit is left to the runtime.
        (Value::Float(_, values), _) => {
            let fits = values.iter().all(|v| v.is_finite() && v.abs() < 2f64.powi(31));
            if fits { Value::integers(to, values.mapv(|v| v as i64)) } else { None }
        }
    }
}

/// Axes are an attribute up to opset 12 or 17, and an input since.
fn reduce(
    node: &Node,
    value: &Value,
    axes: Option<&Value>,
    opset: i64,
    fold: fn(&mut dyn Iterator<Item = f64>) -> f64,
) -> Option<Value> {
    let rank = value.dims().len();
    let given = match (node.ints("axes"), axes) {
        (Some(axes), _) => axes.to_vec(),
        (None, Some(axes)) => axes.list()?,
        (None, None) => Vec::new(),
    };
    if given.is_empty() && opset >= 13 && node.int("noop_with_empty_axes") == Some(1) {
        return None;
    }
    let mut axes: Vec<usize> = given.iter().map(|&axis| axis_of(axis, rank)).collect::<Option<_>>()?;
    if axes.is_empty() {
        axes = (0..rank).collect();
    }
    let Value::Float(float, values) = value else { return None };
    // The axes that are folded away come last, as one.
    let kept: Vec<usize> = (0..rank).filter(|axis| !axes.contains(axis)).collect();
    let order: Vec<usize> =
        kept.iter().chain((0..rank).collect::<Vec<_>>().iter().filter(|a| axes.contains(a))).copied().collect();
    let outer: usize = kept.iter().map(|&axis| values.shape()[axis]).product();
    let all = values.view().permuted_axes(order);
    let all: Vec<f64> = all.iter().copied().collect();
    let inner = all.len().checked_div(outer).unwrap_or(0);
    if inner == 0 {
        return None;
    }
    let folded: Vec<f64> = all.chunks(inner).map(|chunk| fold(&mut chunk.iter().copied())).collect();
    let keep = node.int("keepdims").unwrap_or(1) != 0;
    let shape: Vec<usize> = (0..rank)
        .filter_map(|axis| match (axes.contains(&axis), keep) {
            (false, _) => Some(values.shape()[axis]),
            (true, true) => Some(1),
            (true, false) => None,
        })
        .collect();
    Some(float.round(ArrayD::from_shape_vec(IxDyn(&shape), folded).ok()?))
}

fn product(a: &Value, b: &Value) -> Option<Value> {
    let (Value::Float(float, a), Value::Float(other, b)) = (a, b) else { return None };
    let a = a.view().into_dimensionality::<ndarray::Ix2>().ok()?;
    let b = b.view().into_dimensionality::<ndarray::Ix2>().ok()?;
    let fits = float == other && a.ncols() == b.nrows() && small(&[a.nrows(), b.ncols()]);
    fits.then(|| float.round(a.dot(&b).into_dyn()))
}

fn gemm(node: &Node, a: &Value, b: &Value, c: Option<&Value>) -> Option<Value> {
    let turned = |value: &Value, name: &str| match node.int(name) {
        Some(1) => moved(value, &Move::Axes(vec![1, 0])),
        _ => Some(value.clone()),
    };
    let scale = |name: &str| f64::from(node.float(name).unwrap_or(1.0));
    let Value::Float(float, mut values) = product(&turned(a, "transA")?, &turned(b, "transB")?)? else { return None };
    values.mapv_inplace(|v| v * scale("alpha"));
    if let Some(c) = c {
        let c = c.floats()?.broadcast(values.raw_dim())?.to_owned();
        values.zip_mut_with(&c, |v, c| *v += c * scale("beta"));
    }
    Some(float.round(values))
}

#[cfg(test)]
mod tests;
