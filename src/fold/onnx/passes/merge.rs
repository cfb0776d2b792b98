//! Merges what scales and shifts each channel into the convolution or linear layer before it: BatchNorm, and Mul, Div,
//! Add and Sub with constants.
//!
//! s = g/√(σ² + ε), W'\[o\] = s\[o\]·W\[o\], c'\[o\] = s\[o\]·(c\[o\] − μ\[o\]) + b\[o\], in f64, rounded to f32 once.

use bytes::Bytes;

use super::super::proto::{Attribute, Graph, Node, Tensor, kind};
use super::super::value::{Float, Value};
use super::super::{Network, OnnxError, Uses};

/// What became of the BatchNorms.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Merged {
    /// Names of those that are gone.
    pub merged: Vec<String>,
    /// Names of those that are left, with the reason.
    pub left: Vec<(String, &'static str)>,
}

/// ε of a BatchNormalization that does not give it.
const EPSILON: f32 = 1e-5;

/// `y = scale · x + shift`, for each channel, or for all alike.
struct Affine {
    scale: Vec<f64>,
    shift: Vec<f64>,
}

/// A layer that an affine step can go into.
struct Linear {
    /// The node, by its index.
    node: usize,
    /// The Add behind a MatMul that adds its bias, and which of its inputs that is.
    bias: Option<(usize, usize)>,
    form: Form,
    channels: usize,
}

/// Where the output channels are in the weight.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// `[out, …]`.
    Conv,
    /// `[in, out / groups, …]`.
    ConvTranspose { groups: usize },
    /// `[out, in]`.
    GemmTransposed,
    /// `[in, out]`.
    Gemm,
    /// `[in, out]`; the channels are the last axis, whatever the rank.
    MatMul,
}

/// Merges all that can be.
///
/// # Errors
/// When a weight cannot be read.
pub(crate) fn merge(network: &mut Network) -> Result<Merged, OnnxError> {
    let mut merged = Merged::default();
    let mut n = 0;
    let mut uses = Uses::of(network.graph());
    while n < network.graph().node.len() {
        let node = &network.graph().node[n];
        let is_norm = node.is("BatchNormalization");
        if is_norm || ["Mul", "Div", "Add", "Sub"].iter().any(|op| node.is(op)) {
            let name = node.label().to_owned();
            match step(network, &uses, n)? {
                Ok((output, maker)) => {
                    if is_norm {
                        merged.merged.push(name);
                    }
                    // All else is read and made as before, by nodes that keep their places.
                    uses.made.insert(output, maker);
                    continue;
                }
                Err(reason) if is_norm => merged.left.push((name, reason)),
                Err(_) => {}
            }
        }
        n += 1;
    }
    // Nodes that were merged have nothing left.
    network.graph_mut().node.retain(|node| !node.output.is_empty());
    network.prune();
    Ok(merged)
}

/// Merges node `n`, if it can be. Gives its output, and the node that makes it now.
fn step(network: &mut Network, uses: &Uses, n: usize) -> Result<Result<(String, usize), &'static str>, OnnxError> {
    let node = &network.graph().node[n];
    let Some((data, affine)) = affine(network, node)? else {
        return Ok(Err("its parameters are not constant, or it is in training mode"));
    };
    let linear = match linear(network, uses, &data, affine.scale.len(), node)? {
        Ok(linear) => linear,
        Err(reason) => return Ok(Err(reason)),
    };
    // The addition of a MatMul's bias is its own node already.
    if linear.form == Form::MatMul && linear.bias.is_none() && affine.scale.iter().all(|&s| s == 1.0) {
        return Ok(Err("it is a bias"));
    }
    apply(network, uses, n, &linear, &affine)
}

/// What the node does to each channel of its one input that is not constant.
fn affine(network: &Network, node: &Node) -> Result<Option<(String, Affine)>, OnnxError> {
    let constant = |n: usize| -> Result<Option<Value>, OnnxError> {
        let Some(name) = node.input(n) else { return Ok(None) };
        let tensor = network.graph().initializer.iter().find(|tensor| tensor.name() == name);
        tensor.map_or(Ok(None), |tensor| network.value_of(tensor))
    };
    let list = |value: &Value| value.floats().map(|values| values.iter().copied().collect::<Vec<f64>>());
    if node.is("BatchNormalization") {
        let outputs = node.output.iter().filter(|name| !name.is_empty()).count();
        if outputs != 1 || node.int("training_mode").unwrap_or(0) != 0 {
            return Ok(None);
        }
        let mut parameters = Vec::new();
        for n in 1..5 {
            match constant(n)?.as_ref().and_then(list) {
                Some(values) => parameters.push(values),
                None => return Ok(None),
            }
        }
        let [weight, bias, mean, variance] = &parameters[..] else { return Ok(None) };
        if [bias, mean, variance].iter().any(|values| values.len() != weight.len()) {
            return Ok(None);
        }
        let epsilon = f64::from(node.float("epsilon").unwrap_or(EPSILON));
        let scale: Vec<f64> = weight.iter().zip(variance).map(|(g, v)| g / (v + epsilon).sqrt()).collect();
        let shift = (0..scale.len()).map(|o| bias[o] - scale[o] * mean[o]).collect();
        return Ok(node.input(0).map(|data| (data.to_owned(), Affine { scale, shift })));
    }
    let (at, value) = match (constant(0)?, constant(1)?) {
        (None, Some(value)) => (0, value),
        (Some(value), None) if node.is("Mul") || node.is("Add") => (1, value),
        _ => return Ok(None),
    };
    let Some(data) = node.input(at).map(str::to_owned) else { return Ok(None) };
    let Some(values) = list(&value) else { return Ok(None) };
    // Its channels are told by `linear`, from the shape.
    let n = values.len();
    let affine = match node.op() {
        "Mul" => Affine { scale: values, shift: vec![0.0; n] },
        "Div" => Affine { scale: values.iter().map(|v| 1.0 / v).collect(), shift: vec![0.0; n] },
        "Add" => Affine { scale: vec![1.0; n], shift: values },
        _ => Affine { scale: vec![1.0; n], shift: values.iter().map(|v| -v).collect() },
    };
    Ok(Some((data, affine)))
}

/// The layer that makes `data`, if an affine step with `count` parameters, which `step` is, can go into it.
fn linear(
    network: &Network,
    uses: &Uses,
    data: &str,
    count: usize,
    step: &Node,
) -> Result<Result<Linear, &'static str>, OnnxError> {
    let graph = network.graph();
    let alone = |name: &str| uses.readers(name) == 1 && !uses.is_output(name);
    if !alone(data) {
        return Ok(Err("what it scales is used elsewhere, too"));
    }
    let not = "it does not follow a convolution or a linear layer";
    let Some(&made) = uses.made.get(data) else { return Ok(Err(not)) };
    let weight = |name: Option<&str>| graph.initializer.iter().find(|tensor| Some(tensor.name()) == name);
    let node = &graph.node[made];
    let (at, bias) = if node.is("Add") {
        // The bias of a MatMul.
        let found = [0, 1].into_iter().find_map(|n| {
            let (data, bias) = (node.input(n)?, node.input(1 - n)?);
            let matmul = *uses.made.get(data)?;
            // Along the last axis: one of another shape is no bias of the channels.
            let along = weight(Some(bias)).is_some_and(|bias| bias.dims.len() == 1);
            let fits = graph.node[matmul].is("MatMul") && along && alone(data);
            fits.then_some((matmul, Some((made, 1 - n))))
        });
        match found {
            Some(found) => found,
            None => return Ok(Err(not)),
        }
    } else {
        (made, None)
    };
    let node = &graph.node[at];
    if !node.is_standard() {
        return Ok(Err(not));
    }
    if !["Conv", "ConvTranspose", "Gemm", "MatMul"].contains(&node.op()) {
        return Ok(Err(not));
    }
    let Some(tensor) = weight(node.input(1)) else { return Ok(Err("the weight before it is not constant")) };
    if tensor.data_type != Some(kind::FLOAT) {
        return Ok(Err("the weight before it is not of 32-bit floats"));
    }
    let dim = |n: usize| tensor.dims.get(n).and_then(|&d| usize::try_from(d).ok()).unwrap_or(0);
    let (form, channels) = match node.op() {
        "Conv" if tensor.dims.len() > 2 => (Form::Conv, dim(0)),
        "ConvTranspose" if tensor.dims.len() > 2 => {
            let groups = node.int("group").and_then(|g| usize::try_from(g).ok()).unwrap_or(1);
            (Form::ConvTranspose { groups }, dim(1) * groups)
        }
        "Gemm" if tensor.dims.len() == 2 && node.int("transB") == Some(1) => (Form::GemmTransposed, dim(0)),
        "Gemm" if tensor.dims.len() == 2 => (Form::Gemm, dim(1)),
        "MatMul" if tensor.dims.len() == 2 => (Form::MatMul, dim(1)),
        _ => return Ok(Err(not)),
    };
    // A convolution's bias, where it has one, must be constant too.
    if form != Form::MatMul && node.input(2).is_some() {
        let Some(bias) = weight(node.input(2)) else { return Ok(Err("the bias before it is not constant")) };
        if bias.dims.split_last().is_some_and(|(last, rest)| {
            (*last == 1 && channels > 1 && !rest.is_empty()) || rest.iter().any(|&d| d != 1)
        }) {
            return Ok(Err("the bias before it does not lie along the channels"));
        }
    }
    if count != channels && count != 1 {
        return Ok(Err("it has another number of channels than the layer before it"));
    }
    if step.is("BatchNormalization") {
        // It is over the second axis, which is the last one only where there are two.
        if form == Form::MatMul && rank(network, data) != Some(2) {
            return Ok(Err("it follows a MatMul whose output may have more than two axes"));
        }
    } else {
        // By its shape, the constant must lie along the channels.
        let constant = [0, 1].into_iter().find_map(|n| weight(step.input(n)));
        let dims: Vec<usize> =
            constant.map_or(Vec::new(), |t| t.dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect());
        let spatial = match form {
            Form::Conv | Form::ConvTranspose { .. } => tensor.dims.len().saturating_sub(2),
            _ => 0,
        };
        let behind = dims.iter().rev().take(spatial).all(|&d| d == 1) && dims.len() > spatial;
        let axis = dims.len().checked_sub(spatial + 1);
        let along = behind && axis.is_some_and(|axis| dims[axis] == channels && dims[..axis].iter().all(|&d| d == 1));
        // More axes than the layer's output has would change its rank.
        let outputs = match form {
            Form::Conv | Form::ConvTranspose { .. } => tensor.dims.len(),
            Form::MatMul => rank(network, data).unwrap_or(dims.len().min(1)),
            Form::Gemm | Form::GemmTransposed => 2,
        };
        let single = count == 1 && dims.iter().all(|&d| d == 1);
        if !(along || single) || dims.len() > outputs.max(1) {
            return Ok(Err("it does not scale channels"));
        }
    }
    Ok(Ok(Linear { node: at, bias, form, channels }))
}

/// The number of axes of a value, where the file says so.
fn rank(network: &Network, name: &str) -> Option<usize> {
    let infos = network.graph().value_info.iter().chain(&network.graph().output);
    let info = infos.into_iter().find(|info| info.name.as_deref() == Some(name))?;
    Some(info.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?.dim.len())
}

/// A name that nothing has yet.
fn free_name(graph: &Graph, uses: &Uses, output: &str, part: &str) -> String {
    let taken = |name: &str| {
        uses.made.contains_key(name)
            || uses.readers(name) > 0
            || graph.initializer.iter().any(|tensor| tensor.name() == name)
            || graph.input.iter().any(|info| info.name.as_deref() == Some(name))
    };
    let names = (0..).map(|n| if n == 0 { format!("{output}.{part}") } else { format!("{output}.{part}{n}") });
    // There are more names than values.
    names.into_iter().find(|name| !taken(name)).unwrap_or_default()
}

fn apply(
    network: &mut Network,
    uses: &Uses,
    n: usize,
    linear: &Linear,
    affine: &Affine,
) -> Result<Result<(String, usize), &'static str>, OnnxError> {
    let channels = linear.channels;
    let along = |values: &[f64]| if values.len() == 1 { vec![values[0]; channels] } else { values.to_vec() };
    let (scale, shift) = (along(&affine.scale), along(&affine.shift));
    let graph = network.graph();
    let layer = &graph.node[linear.node];
    let tensor = |name: Option<&str>| graph.initializer.iter().find(|t| Some(t.name()) == name && name.is_some());
    let Some(weight) = tensor(layer.input(1)) else { return Ok(Err("the weight before it is not constant")) };
    let scaled = scaled(network, weight, linear.form, &scale)?;
    let Some(scaled) = scaled else { return Ok(Err("the weight before it does not fill its shape")) };
    // The bias that is there, one for each channel.
    let (holder, at) = linear.bias.unwrap_or((linear.node, 2));
    let has_bias = linear.form != Form::MatMul || linear.bias.is_some();
    let before = match tensor(graph.node[holder].input(at)).filter(|_| has_bias) {
        None => vec![0.0; channels],
        Some(bias) => match network.value_of(bias)?.as_ref().and_then(Value::floats) {
            Some(values) if values.len() == channels => values.iter().copied().collect(),
            Some(values) if values.len() == 1 => values.iter().copied().cycle().take(channels).collect(),
            _ => return Ok(Err("the bias before it has another number of values than it has channels")),
        },
    };
    let beta = if matches!(linear.form, Form::Gemm | Form::GemmTransposed) {
        f64::from(layer.float("beta").unwrap_or(1.0))
    } else {
        1.0
    };
    let after: Vec<f64> = (0..channels).map(|o| scale[o] * beta * before[o] + shift[o]).collect();
    let no_shift = after.iter().all(|&v| v == 0.0);
    let bias = Float::Single.round(ndarray::Array1::from_vec(after).into_dyn());
    let output = graph.node[n].output.first().cloned().unwrap_or_default();
    let (weight_name, bias_name) = (free_name(graph, uses, &output, "weight"), free_name(graph, uses, &output, "bias"));
    let (layer_node, form, add) = (linear.node, linear.form, linear.bias);
    let graph = network.graph_mut();
    graph.initializer.push(Tensor { name: Some(weight_name.clone()), ..scaled });
    graph.initializer.push(bias.tensor(&bias_name));
    graph.node[layer_node].input[1] = weight_name;
    match (form, add) {
        (Form::MatMul, None) if no_shift => graph.node[layer_node].output[0] = output.clone(),
        (Form::MatMul, None) => {
            // The step becomes the addition of the bias.
            let data = graph.node[layer_node].output.first().cloned().unwrap_or_default();
            let step = &mut graph.node[n];
            *step = Node {
                input: vec![data, bias_name],
                output: vec![output.clone()],
                name: step.name.take(),
                op_type: Some("Add".into()),
                ..Node::default()
            };
            return Ok(Ok((output, n)));
        }
        (Form::MatMul, Some((add, at))) => {
            graph.node[add].input[at] = bias_name;
            graph.node[add].output[0] = output.clone();
        }
        _ => {
            let node = &mut graph.node[layer_node];
            node.input.truncate(2);
            node.input.push(bias_name);
            node.output[0] = output.clone();
            for attribute in node.attribute.iter_mut().filter(|a| a.name.as_deref() == Some("beta")) {
                *attribute = Attribute::float("beta", 1.0);
            }
        }
    }
    graph.node[n] = Node::default();
    Ok(Ok((output, add.map_or(layer_node, |(add, _)| add))))
}

/// The weight, each output channel times its scale.
fn scaled(network: &Network, weight: &Tensor, form: Form, scale: &[f64]) -> Result<Option<Tensor>, OnnxError> {
    let external;
    let raw: Bytes = if weight.is_external() {
        external = network.external_bytes(weight)?;
        Bytes::from(external)
    } else if let Some(raw) = &weight.raw_data {
        raw.clone()
    } else {
        Bytes::from(weight.float_data.0.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    };
    let (values, rest) = raw.as_chunks::<4>();
    let count = weight.dims.iter().try_fold(1usize, |count, &d| count.checked_mul(usize::try_from(d).ok()?));
    if !rest.is_empty() || count != Some(values.len()) {
        return Ok(None);
    }
    let dim = |n: usize| usize::try_from(weight.dims[n]).unwrap_or(1).max(1);
    let inner: usize = weight.dims.iter().skip(2).map(|&d| usize::try_from(d).unwrap_or(1)).product();
    let channel = |at: usize| match form {
        Form::Conv | Form::GemmTransposed => at / (values.len() / dim(0)).max(1),
        Form::Gemm | Form::MatMul => at % dim(1),
        Form::ConvTranspose { groups } => {
            let (row, column) = (at / inner.max(1) / dim(1), at / inner.max(1) % dim(1));
            row / (dim(0) / groups.max(1)).max(1) * dim(1) + column
        }
    };
    let mut out = Vec::with_capacity(raw.len());
    for (at, value) in values.iter().enumerate() {
        let Some(s) = scale.get(channel(at)) else { return Ok(None) };
        out.extend_from_slice(&((f64::from(f32::from_le_bytes(*value)) * s) as f32).to_le_bytes());
    }
    Ok(Some(Tensor {
        dims: weight.dims.clone(),
        data_type: Some(kind::FLOAT),
        raw_data: Some(Bytes::from(out)),
        ..Tensor::default()
    }))
}
