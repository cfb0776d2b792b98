//! The network's ends: one input `images`, the outputs `logits` and, where they can be told, `features`.

use std::collections::HashSet;

use super::super::network::quoted;
use super::super::proto::{Attribute, Dimension, Graph, Node, Shape, TensorType, Type, ValueInfo, kind};
use super::super::value::Value;
use super::super::{Network, OnnxError};
use crate::bundle::{Ending, Layout};
use crate::runtime::FEATURES;

/// Name of the input.
pub(crate) const IMAGES: &str = "images";
/// Name of the output of raw scores.
pub(crate) const LOGITS: &str = "logits";
/// Name of the dimension that may differ from run to run.
const BATCH: &str = "batch";

/// The network's input, as the file declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The file's own name.
    pub name: String,
    /// Where the channels are.
    pub layout: Layout,
    /// 1 or 3.
    pub channels: usize,
    /// In pixels; none when the file leaves it open.
    pub height: Option<usize>,
    /// In pixels; none when the file leaves it open.
    pub width: Option<usize>,
    /// Pictures of one run, where the file says how many.
    pub batch: Option<usize>,
}

/// How many pictures a network takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    /// Any number.
    Free,
    /// One.
    One,
}

/// The ends that a file has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    /// Its input.
    pub input: Input,
    /// The file's own name of the output that is served.
    pub output: String,
    /// The file's own name of what is served.
    pub value: String,
    /// What was cut off.
    pub ending: Ending,
    /// The file's own name of what the classifier sees, where that was found.
    pub features: Option<String>,
    /// How many pictures the network takes now.
    pub batch: Batch,
}

/// The one input that is no constant.
///
/// # Errors
/// When there is not exactly one, or it is no picture.
pub(crate) fn input(network: &Network) -> Result<Input, OnnxError> {
    let graph = network.graph();
    let constant = |info: &&ValueInfo| graph.initializer.iter().any(|t| Some(t.name()) == info.name.as_deref());
    let inputs: Vec<&ValueInfo> = graph.input.iter().filter(|info| !constant(info)).collect();
    let [info] = inputs[..] else {
        let names: Vec<String> = inputs.iter().map(|info| quoted(info.name.as_deref().unwrap_or_default())).collect();
        return OnnxError::refused(format!(
            "it has {} inputs ({}); a classifier of images has one: export the part that takes the image",
            inputs.len(),
            names.join(", ")
        ));
    };
    let name = info.name.clone().unwrap_or_default();
    let tensor = info.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let element = tensor.and_then(|t| t.elem_type).unwrap_or_default();
    if element != kind::FLOAT {
        return OnnxError::refused(format!(
            "its input {} is of {}; pictures are handed over as 32-bit floats: export the network so that it takes float",
            quoted(&name),
            kind::name(element)
        ));
    }
    let dims = tensor.and_then(|t| t.shape.as_ref()).map(|shape| shape.dim.as_slice()).unwrap_or_default();
    let size = |n: usize| dims[n].dim_value.and_then(|d| usize::try_from(d).ok()).filter(|&d| d > 0);
    let is_image = |channels: usize| [Some(1), Some(3)].contains(&size(channels));
    let (layout, channels, height, width) = match dims.len() {
        4 if is_image(1) => (Layout::Nchw, 1, 2, 3),
        4 if is_image(3) => (Layout::Nhwc, 3, 1, 2),
        _ => {
            let shape: Vec<String> = (0..dims.len()).map(|n| size(n).map_or("?".into(), |d| d.to_string())).collect();
            return OnnxError::refused(format!(
                "its input {} has the shape [{}]; expected [N, channels, height, width] or [N, height, width, channels] \
                 with 1 or 3 channels",
                quoted(&name),
                shape.join(", ")
            ));
        }
    };
    Ok(Input {
        name,
        layout,
        channels: size(channels).unwrap_or(3),
        height: size(height),
        width: size(width),
        batch: size(0),
    })
}

/// Gives the ends their names, cuts a softmax off, and leaves no other output. `wanted` is the output that the user
/// named; `height` and `width` are the input's.
///
/// # Errors
/// When it cannot be told which output is the logits, or they end in a sigmoid.
pub(crate) fn name(
    network: &mut Network,
    wanted: Option<&str>,
    (height, width): (usize, usize),
    features: bool,
    batch: Batch,
) -> Result<Ends, OnnxError> {
    let input = input(network)?;
    if let (Batch::Free, Some(fixed)) = (batch, input.batch) {
        free_batch(network.graph_mut(), fixed);
    }
    let graph = network.graph();
    let outputs: Vec<&str> = graph.output.iter().filter_map(|info| info.name.as_deref()).collect();
    let all = || outputs.iter().map(|name| quoted(name)).collect::<Vec<_>>().join(", ");
    let output = match (wanted, &outputs[..]) {
        // A value that is no output will do, too.
        (Some(wanted), _) if maker(graph, wanted).is_some() => wanted.to_owned(),
        (Some(wanted), _) => {
            return OnnxError::refused(format!("it has no value {}; its outputs are {}", quoted(wanted), all()));
        }
        (None, [output]) => (*output).to_owned(),
        (None, _) if outputs.contains(&LOGITS) => LOGITS.to_owned(),
        (None, _) => {
            return OnnxError::refused(format!(
                "it has {} outputs ({}): name the one with a score for each class by --logits NAME",
                outputs.len(),
                all()
            ));
        }
    };
    let (mut logits, ending) = ending(network, &output)?;
    if maker(graph, &logits).is_none() {
        return OnnxError::refused(format!(
            "nothing computes its output {}: it is an input or a constant; name another value by --logits NAME",
            quoted(&output)
        ));
    }
    let value = logits.clone();
    let mut found = if features { classifier_input(network, &logits) } else { None };
    let graph = network.graph_mut();
    // Only what is served is left.
    graph.output = vec![info(&logits, batch, &[None])];
    if let Some((value, length)) = &found {
        graph.output.push(info(value, batch, &[Some(*length)]));
    }
    if let Some((value, _)) = found.as_mut().filter(|(value, _)| *value == logits || *value == input.name) {
        // It is an end already.
        *value = String::new();
        graph.output.truncate(1);
    }
    let found = found.filter(|(value, _)| !value.is_empty());
    let mut classifier_sees = found.as_ref().map(|(value, _)| value.clone()).unwrap_or_default();
    rename(graph, &input.name, IMAGES, &mut [&mut logits, &mut classifier_sees]);
    rename(graph, &logits.clone(), LOGITS, &mut [&mut classifier_sees]);
    if found.is_some() {
        rename(graph, &classifier_sees.clone(), FEATURES, &mut []);
    }
    let shape = match input.layout {
        Layout::Nchw => [input.channels, height, width],
        Layout::Nhwc => [height, width, input.channels],
    };
    graph.input = vec![info(IMAGES, batch, &shape.map(Some))];
    network.prune();
    Ok(Ends { input, output, value, ending, features: found.map(|(value, _)| value), batch })
}

/// Lets a graph that was exported for `fixed` pictures take any number. Pictures are the outermost axis, so a Reshape to
/// `[1, 6, 64, 50]` becomes one to `[-1, 6, 64, 50]`, and what is joined to every picture, such as a class token, is
/// repeated. Whether that is enough, the proof tells.
fn free_batch(graph: &mut Graph, fixed: usize) {
    // What the file says of shapes between holds no longer.
    graph.value_info.clear();
    let mut n = 0;
    while n < graph.node.len() {
        if graph.node[n].is("Reshape") {
            free_reshape(graph, n, fixed);
        } else if graph.node[n].is("Concat") && graph.node[n].int("axis") != Some(0) {
            n += repeat_constants(graph, n);
        }
        n += 1;
    }
}

fn free_reshape(graph: &mut Graph, n: usize, fixed: usize) {
    let Some(name) = graph.node[n].input(1).map(str::to_owned) else { return };
    let Some(tensor) = graph.initializer.iter().find(|tensor| tensor.name() == name) else { return };
    let Some(mut shape) = Value::of(tensor, None).as_ref().and_then(Value::list) else { return };
    let Some((first, rest)) = shape.split_first_mut() else { return };
    if rest.iter().all(|&d| d > 0) && *first > 0 {
        *first = -1;
    } else if *first == fixed as i64 {
        // 0 takes over the first dimension that is there.
        *first = 0;
        graph.node[n].attribute.retain(|attribute| attribute.name.as_deref() != Some("allowzero"));
    } else {
        return;
    }
    let free = format!("{name}.free{n}");
    graph.initializer.push(Value::indices(&shape).tensor(&free));
    graph.node[n].input[1] = free;
}

/// Repeats the constants that Concat `n` joins to values, as often as there are pictures. Gives the number of nodes that
/// were put before it.
fn repeat_constants(graph: &mut Graph, n: usize) -> usize {
    let constant = |name: &str| graph.initializer.iter().find(|tensor| tensor.name() == name);
    let inputs = graph.node[n].input.clone();
    let Some(data) = inputs.iter().find(|name| constant(name).is_none()).cloned() else { return 0 };
    let mut before = Vec::new();
    let mut constants = Vec::new();
    for (at, name) in inputs.iter().enumerate() {
        let Some(tensor) = constant(name).filter(|tensor| tensor.dims.first() == Some(&1)) else { continue };
        let value = |part: &str| format!("{name}.{part}{n}");
        let rest: Vec<i64> = tensor.dims[1..].to_vec();
        constants.push((value("zero"), Value::indices(&[0])));
        constants.push((value("rest"), Value::indices(&rest)));
        let node = |op: &str, input: Vec<String>, output: String, attribute: Vec<Attribute>| Node {
            input,
            output: vec![output.clone()],
            name: Some(output),
            op_type: Some(op.into()),
            attribute,
            ..Node::default()
        };
        before.push(node("Shape", vec![data.clone()], value("shape"), vec![]));
        before.push(node("Gather", vec![value("shape"), value("zero")], value("pictures"), vec![]));
        let sizes = vec![value("pictures"), value("rest")];
        before.push(node("Concat", sizes, value("size"), vec![Attribute::int("axis", 0)]));
        before.push(node("Expand", vec![name.clone(), value("size")], value("each"), vec![]));
        graph.node[n].input[at] = value("each");
    }
    graph.initializer.extend(constants.iter().map(|(name, value)| value.tensor(name)));
    let count = before.len();
    graph.node.splice(n..n, before);
    count
}

/// A value of floats, `[batch, …]`.
fn info(name: &str, batch: Batch, sizes: &[Option<usize>]) -> ValueInfo {
    let batch = match batch {
        Batch::Free => Dimension { dim_param: Some(BATCH.into()), ..Dimension::default() },
        Batch::One => Dimension { dim_value: Some(1), ..Dimension::default() },
    };
    let size = |n: &Option<usize>| Dimension { dim_value: n.map(|n| n as i64), ..Dimension::default() };
    let shape = Shape { dim: std::iter::once(batch).chain(sizes.iter().map(size)).collect(), ..Shape::default() };
    let tensor = TensorType { elem_type: Some(kind::FLOAT), shape: Some(shape), ..TensorType::default() };
    let kind = Type { tensor_type: Some(tensor), ..Type::default() };
    ValueInfo { name: Some(name.into()), r#type: Some(kind), ..ValueInfo::default() }
}

fn maker<'a>(graph: &'a Graph, name: &str) -> Option<&'a Node> {
    graph.node.iter().find(|node| node.output.iter().any(|output| output == name))
}

/// Operators that a last function can hide behind: they move values or leave them as they are.
const THROUGH: [&str; 9] =
    ["Cast", "Clip", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"];

/// The value before the function that ends the network, and which that is.
fn ending(network: &Network, output: &str) -> Result<(String, Ending), OnnxError> {
    let graph = network.graph();
    let mut name = output.to_owned();
    let mut between: Option<String> = None;
    // A graph has no circle, so this ends; an empty name is nobody's.
    while let Some(node) = maker(graph, &name).filter(|node| node.is_standard()) {
        let before = node.input(0).unwrap_or_default().to_owned();
        let op = node.op();
        if THROUGH.contains(&op) && !before.is_empty() {
            if op != "Identity" {
                between = between.or_else(|| Some(op.to_owned()));
            }
            name = before;
            continue;
        }
        let after_softmax = op == "Log" && maker(graph, &before).is_some_and(|node| node.is("Softmax"));
        let softmax = if after_softmax { maker(graph, &before).unwrap_or(node) } else { node };
        match op {
            "Sigmoid" | "HardSigmoid" => {
                return OnnxError::refused(format!(
                    "its output {} ends in a sigmoid: its classes do not exclude each other, and nbn's scores are for \
                     exactly one class an image",
                    quoted(output)
                ));
            }
            "Softmax" | "LogSoftmax" | "Log" if op != "Log" || after_softmax => {
                let axis = softmax.int("axis").unwrap_or(if network.opset() < 13 { 1 } else { -1 });
                if let Some(between) = between {
                    return OnnxError::refused(format!(
                        "its output {} ends in a softmax and then {between}: name the values before the softmax by \
                         --logits NAME, or export the network so that it gives them",
                        quoted(output)
                    ));
                }
                if ![1, -1].contains(&axis) {
                    return OnnxError::refused(format!(
                        "its output {} ends in a softmax over axis {axis}; over the classes it is 1 or -1: export the \
                         network without it",
                        quoted(output)
                    ));
                }
                let ending = if op == "Softmax" { Ending::Softmax } else { Ending::LogSoftmax };
                return Ok((softmax.input(0).unwrap_or_default().to_owned(), ending));
            }
            _ => break,
        }
    }
    Ok((output.to_owned(), Ending::Logits))
}

/// What the last linear layer sees, and how many values that is.
fn classifier_input(network: &Network, logits: &str) -> Option<(String, usize)> {
    let graph = network.graph();
    let mut node = maker(graph, logits)?;
    loop {
        let size = |name: Option<&str>, axis: usize| {
            let tensor = graph.initializer.iter().find(|t| Some(t.name()) == name)?;
            (tensor.dims.len() == 2).then(|| usize::try_from(tensor.dims[axis]).ok()).flatten()
        };
        match node.op() {
            _ if !node.is_standard() => return None,
            "Gemm" if node.int("transA").unwrap_or(0) == 0 => {
                let axis = usize::from(node.int("transB") == Some(1));
                return Some((node.input(0)?.to_owned(), size(node.input(1), axis)?));
            }
            "MatMul" => return Some((node.input(0)?.to_owned(), size(node.input(1), 0)?)),
            "Identity" => node = maker(graph, node.input(0)?)?,
            // A bias, a temperature, logit rectification.
            "Add" | "Mul" | "Div" | "Sub" | "BatchNormalization" => {
                let is_constant = |name: &str| graph.initializer.iter().any(|t| t.name() == name);
                let data: Vec<&str> =
                    [0, 1].into_iter().filter_map(|n| node.input(n)).filter(|name| !is_constant(name)).collect();
                // Of two classifiers that are joined, neither sees what the network sees.
                let [data] = data[..] else { return None };
                node = maker(graph, data)?;
            }
            _ => return None,
        }
    }
}

/// Gives the value `from` the name `to` everywhere. What was called `to` is called something else then, also in `kept`.
fn rename(graph: &mut Graph, from: &str, to: &str, kept: &mut [&mut String]) {
    if from == to {
        return;
    }
    let mut names = HashSet::new();
    collect(graph, &mut names);
    let free = (1..).map(|n| format!("{to}.{n}")).find(|name| !names.contains(name) && name != from);
    let other = free.unwrap_or_default();
    let renamed = |name: &mut String| {
        if name == from {
            *name = to.to_owned();
        } else if name == to {
            name.clone_from(&other);
        }
    };
    kept.iter_mut().for_each(|name| renamed(name));
    everywhere(graph, &renamed);
}

/// Every name of a value.
fn collect(graph: &Graph, names: &mut HashSet<String>) {
    names.extend(graph.initializer.iter().map(|tensor| tensor.name().to_owned()));
    names.extend(graph.input.iter().filter_map(|info| info.name.clone()));
    for node in &graph.node {
        names.extend(node.output.iter().chain(&node.input).cloned());
        node.graphs().for_each(|graph| collect(graph, names));
    }
}

fn everywhere(graph: &mut Graph, renamed: &dyn Fn(&mut String)) {
    for node in &mut graph.node {
        node.input.iter_mut().chain(&mut node.output).for_each(renamed);
        node.graphs_mut().for_each(|graph| everywhere(graph, renamed));
    }
    graph.initializer.iter_mut().filter_map(|tensor| tensor.name.as_mut()).for_each(renamed);
    let infos = graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info);
    infos.filter_map(|info| info.name.as_mut()).for_each(renamed);
    graph.quantization_annotation.iter_mut().filter_map(|a| a.tensor_name.as_mut()).for_each(renamed);
}
