//! Eight-bit networks: QuantizeLinear and DequantizeLinear around every layer that gains by it, in the form that ONNX Runtime
//! turns into layers of whole numbers.
//!
//! A value `x` stands as `round(x / scale) + zero` in 0..=255, a weight as `round(w / scale[o])` in ±64 or ±127 for each output
//! channel, a bias as a whole number of the product of both scales (ONNX, QuantizeLinear-13). A ReLU is the lower end of
//! its value's range. Outputs stay floats.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;

use super::super::network::quoted;
use super::super::proto::{Attribute, Node, Tensor, kind};
use super::super::value::Value;
use super::super::{Network, OnnxError, Uses};
use super::ends::LOGITS;

/// The oldest operators that scale each channel.
const LEAST_OPSET: i64 = 13;
/// Steps of a value.
const STEPS: f64 = 255.0;
/// Most of a bias, in its own steps, so that sums of products fit beside it.
const LARGEST_BIAS: f64 = (1 << 30) as f64;

/// Bits of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightBits {
    /// −64 to 64: sums of two products fit into 16 bits on every processor.
    #[default]
    Seven,
    /// −127 to 127, for processors that add products in 32 bits (VNNI, ARM's dot product).
    Eight,
}

impl WeightBits {
    /// Their number.
    pub fn number(self) -> u32 {
        if self == Self::Seven { 7 } else { 8 }
    }

    fn largest(self) -> f64 {
        if self == Self::Seven { 64.0 } else { 127.0 }
    }
}

/// Least and most of a value.
pub type Range = (f32, f32);

/// A layer with weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// Its operator.
    pub op: String,
    /// Why it stays in floats, if it does.
    pub kept: Option<&'static str>,
}

/// What is to be of whole numbers.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The layers with weights, in their order.
    pub layers: Vec<Layer>,
    /// Nodes of [`Self::layers`] that are quantized.
    nodes: BTreeSet<usize>,
    /// Other nodes that compute on whole numbers.
    others: BTreeSet<usize>,
    /// Activations that the layer before them does.
    clamps: BTreeSet<usize>,
    /// Values of whole numbers: how each is scaled.
    values: BTreeMap<String, Scale>,
}

#[derive(Debug, Clone, PartialEq)]
enum Scale {
    /// By the range that it has; least and most that it is cut off at.
    Own(Range),
    /// As another value.
    As(String),
}

impl Plan {
    /// What can be of whole numbers in `network`, but for the layers named in `keep`, and what these read and write. With
    /// `only`, nothing but that layer.
    ///
    /// # Errors
    /// When the network has operators of an older version, or no layer of a name in `keep`.
    pub fn of(network: &Network, keep: &[String], only: Option<&str>) -> Result<Self, OnnxError> {
        if network.opset() < LEAST_OPSET {
            return OnnxError::refused(format!(
                "its operators are of opset {}; whole numbers need {LEAST_OPSET}: export the network with \
                 opset_version=17, and that file with `nbn fold export`",
                network.opset()
            ));
        }
        let graph = network.graph();
        if let Some(node) = graph.node.iter().find(|node| node.op().ends_with("QuantizeLinear")) {
            return OnnxError::refused(format!(
                "it is quantized already (node {}): quantize the network that it was made from",
                quoted(node.label())
            ));
        }
        let uses = Uses::of(graph);
        let constants: HashMap<&str, &Tensor> = graph.initializer.iter().map(|t| (t.name(), t)).collect();
        let mut sole: HashMap<&str, usize> = HashMap::new();
        for (n, node) in graph.node.iter().enumerate() {
            sole.extend(node.input.iter().map(|input| (input.as_str(), n)));
        }
        let output = |n: usize| graph.node[n].output.first().cloned().unwrap_or_default();
        // The activation that alone reads a value, if its range can do it.
        let clamp = |value: &str| {
            let n = *sole.get(value).filter(|_| uses.readers(value) == 1 && !uses.is_output(value))?;
            let node = &graph.node[n];
            if node.is("Relu") {
                return Some((n, (0.0, f32::INFINITY)));
            }
            let bound = |input: usize| {
                let tensor = constants.get(node.input(input)?)?;
                network.value_of(tensor).ok().flatten()?.floats()?.first().map(|v| *v as f32)
            };
            (node.is("Clip") && bound(1) == Some(0.0)).then(|| (n, (0.0, bound(2).unwrap_or(f32::INFINITY))))
        };
        let written =
            |n: usize| clamp(&output(n)).map_or((output(n), None), |(at, range)| (output(at), Some((at, range))));
        let is_linear = |node: &Node| match node.op() {
            "Conv" | "ConvTranspose" | "Gemm" => true,
            "MatMul" | "Einsum" => node.input.iter().any(|name| constants.contains_key(name.as_str())),
            _ => false,
        };
        let is_layer = |node: &Node| {
            let rank = |input: usize| node.input(input).and_then(|name| constants.get(name)).map(|t| t.dims.len());
            let plain = |name: &str| node.float(name).unwrap_or(1.0) == 1.0;
            let constant_bias = node.input(2).is_none_or(|name| constants.contains_key(name));
            match node.op() {
                "Conv" => rank(1) == Some(4) && constant_bias,
                "Gemm" => {
                    let turned = node.int("transB") == Some(1) && node.int("transA").unwrap_or(0) == 0;
                    rank(1) == Some(2) && turned && plain("alpha") && plain("beta") && constant_bias
                }
                "MatMul" => rank(1) == Some(2),
                _ => false,
            }
        };
        let numbers = |of: &dyn Fn(&Node) -> bool| -> Vec<usize> {
            let nodes = graph.node.iter().enumerate();
            nodes.filter(|(_, node)| node.is_standard() && of(node)).map(|(n, _)| n).collect()
        };
        let (layers, linear) = (numbers(&is_layer), numbers(&is_linear));
        let label = |n: usize| graph.node[n].label();
        if let Some(unknown) = keep.iter().find(|name| !linear.iter().any(|&n| label(n) == **name)) {
            let names: Vec<&str> = linear.iter().take(6).map(|&n| label(n)).collect();
            return OnnxError::refused(format!(
                "it has no layer with weights named {}; its layers are {}{}",
                quoted(unknown),
                names.join(", "),
                if linear.len() > names.len() { ", …" } else { "" }
            ));
        }
        let is_zero = |name: &str| {
            let value = constants.get(name).and_then(|tensor| network.value_of(tensor).ok().flatten());
            value.as_ref().and_then(Value::floats).is_some_and(|values| values.iter().all(|v| *v == 0.0))
        };
        let is_kept = |n: usize| keep.iter().any(|name| name == label(n));
        // What becomes the logits without a layer between has no steps, so that these have more than 256 values.
        let mut floats: HashSet<String> = HashSet::from([LOGITS.to_owned()]);
        for (n, node) in graph.node.iter().enumerate().rev() {
            if node.output.iter().any(|output| floats.contains(output)) && !linear.contains(&n) {
                floats.extend(node.input.iter().cloned());
            }
        }
        let tail = floats.clone();
        // Nor has what kept layers read and write.
        for &n in layers.iter().filter(|&&n| is_kept(n)) {
            floats.extend(graph.node[n].input(0).map(str::to_owned));
            floats.extend([output(n), written(n).0]);
        }
        let mut plan = Self::default();
        for (n, node) in graph.node.iter().enumerate() {
            let read = node.input(0).unwrap_or_default().to_owned();
            if layers.contains(&n) {
                let (value, activation) = written(n);
                let gives_floats = node.op() != "Conv";
                let kept = if is_kept(n) {
                    Some("asked for")
                } else if only.is_some_and(|only| only != label(n)) {
                    Some("another one is looked at")
                } else if !gives_floats && tail.contains(&value) {
                    Some("it gives the logits")
                } else if floats.contains(&read) || (!gives_floats && floats.contains(&value)) {
                    Some("next to a layer that is kept")
                } else {
                    None
                };
                plan.layers.push(Layer { name: label(n).to_owned(), op: node.op().to_owned(), kept });
                if kept.is_some() {
                    continue;
                }
                plan.nodes.insert(n);
                plan.values.entry(read).or_insert(Scale::Own((f32::NEG_INFINITY, f32::INFINITY)));
                if !gives_floats {
                    plan.write(value, activation);
                }
                continue;
            }
            if linear.contains(&n) {
                let kept = Some("its form is not one that 8 bits gain by");
                plan.layers.push(Layer { name: label(n).to_owned(), op: node.op().to_owned(), kept });
                continue;
            }
            if only.is_some() || !node.is_standard() || plan.clamps.contains(&n) {
                continue;
            }
            let whole = |name: Option<&str>| name.is_some_and(|name| plan.values.contains_key(name));
            match node.op() {
                "Add" | "Mul" if whole(node.input(0)) && whole(node.input(1)) => {
                    let (value, activation) = written(n);
                    if !floats.contains(&value) {
                        plan.others.insert(n);
                        plan.write(value, activation);
                    }
                }
                "Concat" if node.input.iter().all(|input| whole(Some(input))) && !floats.contains(&output(n)) => {
                    plan.others.insert(n);
                    plan.write(output(n), None);
                }
                "GlobalAveragePool" | "AveragePool" | "Sigmoid" | "LeakyRelu"
                    if whole(node.input(0)) && !floats.contains(&output(n)) =>
                {
                    plan.others.insert(n);
                    plan.write(output(n), None);
                }
                // Another border than 0 may lie outside of the range.
                "Pad" if node.input(2).is_some_and(|name| !is_zero(name)) => {}
                "MaxPool" | "Flatten" | "Reshape" | "Transpose" | "Squeeze" | "Unsqueeze" | "Slice" | "Pad"
                    if whole(node.input(0)) && !floats.contains(&output(n)) && node.output.len() == 1 =>
                {
                    plan.others.insert(n);
                    plan.values.insert(output(n), Scale::As(read));
                }
                _ => {}
            }
        }
        Ok(plan)
    }

    fn write(&mut self, value: String, activation: Option<(usize, Range)>) {
        let range = match activation {
            Some((n, range)) => {
                self.clamps.insert(n);
                range
            }
            None => (f32::NEG_INFINITY, f32::INFINITY),
        };
        self.values.insert(value, Scale::Own(range));
    }

    /// The values of whole numbers, whose ranges [`apply`] may need: with fewer layers, those that have another's scale here
    /// have their own.
    pub fn values(&self) -> Vec<&str> {
        self.values.keys().map(String::as_str).collect()
    }

    /// How many layers are quantized.
    pub fn quantized(&self) -> usize {
        self.nodes.len()
    }
}

/// Scale and zero point of a value.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Steps {
    scale: f32,
    zero: u8,
}

impl Steps {
    /// Of a range that is widened to hold 0, which padding and activations need.
    fn of((least, most): Range, (lower, upper): Range) -> Self {
        let (least, most) = (f64::from(least.max(lower)).min(0.0), f64::from(most.min(upper)).max(0.0));
        let scale = ((most - least) / STEPS) as f32;
        // A value that is always 0, or too small for its steps to be told apart.
        if !scale.is_normal() {
            return Self { scale: 1.0, zero: 0 };
        }
        Self { scale, zero: (-least / f64::from(scale)).round().clamp(0.0, STEPS) as u8 }
    }
}

/// Rewrites `network` by `plan`, with the `ranges` that its values had.
///
/// # Errors
/// When a weight cannot be read.
pub fn apply(
    network: &mut Network,
    plan: &Plan,
    ranges: &HashMap<String, Range>,
    bits: WeightBits,
) -> Result<(), OnnxError> {
    let steps = steps(plan, ranges);
    let mut writer = Writer::of(network);
    let graph = network.graph().clone();
    let outputs: HashSet<&str> = graph.output.iter().filter_map(|info| info.name.as_deref()).collect();
    // What stands for the value of a node whose activation is done by the node itself.
    let behind: HashMap<&str, &str> = plan
        .clamps
        .iter()
        .filter_map(|&n| Some((graph.node[n].input(0)?, graph.node[n].output.first()?.as_str())))
        .collect();
    let mut pairs: HashMap<&str, Pair> = HashMap::new();
    for input in graph.input.iter().filter_map(|info| info.name.as_deref()) {
        if let Some(steps) = steps.get(input) {
            pairs.insert(input, writer.pair(input, input, *steps, None));
        }
    }
    writer.behind = 0;
    for (n, node) in graph.node.iter().enumerate() {
        if plan.clamps.contains(&n) {
            continue;
        }
        let is_layer = plan.nodes.contains(&n);
        let whole = is_layer || plan.others.contains(&n);
        let mut written = node.clone();
        for input in &mut written.input {
            if let Some(pair) = pairs.get(input.as_str()).filter(|pair| whole || pair.only_whole) {
                input.clone_from(&pair.back);
            }
        }
        if is_layer {
            let read = node.input(0).and_then(|name| steps.get(name)).map_or(1.0, |steps| steps.scale);
            writer.weights(network, node, &mut written, read, bits)?;
        }
        for (at, output) in node.output.iter().enumerate() {
            let value = if whole { behind.get(output.as_str()).copied().unwrap_or(output) } else { output };
            let Some(steps) = steps.get(value) else { continue };
            // What whole numbers give is seen as floats by nobody but the step that makes it whole again: then the runtime
            // never makes floats of it.
            let is_shown = whole && outputs.contains(value);
            let made = if is_shown { writer.name(&format!("{value}.made")) } else { value.to_owned() };
            written.output[at].clone_from(&made);
            let pair = writer.pair(value, &made, *steps, is_shown.then_some(value));
            pairs.insert(value, Pair { only_whole: whole, ..pair });
        }
        let at = writer.nodes.len() - writer.behind;
        writer.nodes.insert(at, written);
        writer.behind = 0;
    }
    let Writer { nodes, tensors, .. } = writer;
    let graph = network.graph_mut();
    graph.node = nodes;
    graph.initializer.extend(tensors);
    // Shapes and types of values that are now others.
    graph.value_info.clear();
    graph.quantization_annotation.clear();
    network.prune();
    network.check("quantization")
}

fn steps(plan: &Plan, ranges: &HashMap<String, Range>) -> HashMap<String, Steps> {
    let mut steps = HashMap::new();
    for name in plan.values.keys() {
        let mut at = name;
        // As long as there are values.
        for _ in 0..plan.values.len() {
            match plan.values.get(at) {
                Some(Scale::As(other)) => at = other,
                Some(Scale::Own(bounds)) => {
                    let range = ranges.get(at).copied().unwrap_or((0.0, 0.0));
                    steps.insert(name.clone(), Steps::of(range, *bounds));
                    break;
                }
                None => break,
            }
        }
    }
    steps
}

/// A value's way into whole numbers and back.
struct Pair {
    back: String,
    /// Whether nothing else may read what was made.
    only_whole: bool,
}

#[derive(Default)]
struct Writer {
    taken: HashSet<String>,
    /// How many of the last nodes come behind the one that is being written.
    behind: usize,
    nodes: Vec<Node>,
    tensors: Vec<Tensor>,
}

impl Writer {
    fn of(network: &Network) -> Self {
        let graph = network.graph();
        let made = graph.node.iter().flat_map(|node| node.output.iter().chain(&node.name));
        let taken = made.cloned().chain(graph.initializer.iter().map(|t| t.name().to_owned()));
        Self { taken: taken.collect(), ..Self::default() }
    }

    /// A name that nothing has.
    fn name(&mut self, wanted: &str) -> String {
        let mut name = wanted.to_owned();
        let mut n = 1;
        while !self.taken.insert(name.clone()) {
            n += 1;
            name = format!("{wanted}.{n}");
        }
        name
    }

    fn tensor(&mut self, wanted: &str, dims: &[usize], kind: i32, raw: Vec<u8>) -> String {
        let name = self.name(wanted);
        self.tensors.push(Tensor {
            dims: dims.iter().map(|&d| d as i64).collect(),
            data_type: Some(kind),
            name: Some(name.clone()),
            raw_data: Some(Bytes::from(raw)),
            ..Tensor::default()
        });
        name
    }

    fn push(&mut self, op: &str, input: Vec<String>, output: String, attribute: Vec<Attribute>) -> String {
        // Another node may have the name of this one's value.
        let name = self.name(&format!("{output}.{op}"));
        self.nodes.push(Node {
            input,
            output: vec![output.clone()],
            name: Some(name),
            op_type: Some(op.into()),
            attribute,
            ..Node::default()
        });
        output
    }

    /// Into whole numbers and back, of `made`, which stands for `value`; with `tap`, once more back, under that name.
    fn pair(&mut self, value: &str, made: &str, steps: Steps, tap: Option<&str>) -> Pair {
        let scale = self.tensor(&format!("{value}.scale"), &[], kind::FLOAT, steps.scale.to_le_bytes().to_vec());
        let zero = self.tensor(&format!("{value}.zero"), &[], kind::UINT8, vec![steps.zero]);
        let [whole, back] = ["whole", "back"].map(|part| format!("{value}.{part}")).map(|name| self.name(&name));
        let first = self.nodes.len();
        let whole = self.push("QuantizeLinear", vec![made.into(), scale.clone(), zero.clone()], whole, vec![]);
        if let Some(tap) = tap {
            let inputs = vec![whole.clone(), scale.clone(), zero.clone()];
            self.push("DequantizeLinear", inputs, tap.into(), vec![]);
        }
        let back = self.push("DequantizeLinear", vec![whole, scale, zero], back, vec![]);
        self.behind += self.nodes.len() - first;
        Pair { back, only_whole: false }
    }

    /// Weights and bias of `node` as whole numbers, which `written` then reads; `read` is the scale of what it reads.
    fn weights(
        &mut self,
        network: &Network,
        node: &Node,
        written: &mut Node,
        read: f32,
        bits: WeightBits,
    ) -> Result<(), OnnxError> {
        let values = |input: usize| {
            let Some(name) = node.input(input) else { return Ok(None) };
            let tensor = network.graph().initializer.iter().find(|tensor| tensor.name() == name);
            tensor.map_or(Ok(None), |tensor| network.value_of(tensor))
        };
        let weight = values(1)?;
        let Some(weight) = weight.as_ref().and_then(Value::floats) else {
            return OnnxError::refused(format!("the weight of layer {} is not of floats", quoted(node.label())));
        };
        let bias = values(2)?;
        let bias: Option<Vec<f64>> = bias.as_ref().and_then(Value::floats).map(|bias| bias.iter().copied().collect());
        let axis = if node.op() == "MatMul" { 1 } else { 0 };
        let channels = weight.shape()[axis];
        let most = |lane: ndarray::ArrayViewD<'_, f64>| lane.iter().fold(0.0f64, |most, w| most.max(w.abs()));
        let scales: Vec<f32> = (0..channels)
            .map(|channel| {
                let most = most(weight.index_axis(ndarray::Axis(axis), channel));
                let mut scale = most / bits.largest();
                // A bias that its own steps cannot hold makes them larger, and the weights' with them.
                if let Some(bias) = bias.as_ref().and_then(|bias| bias.get(channel)) {
                    scale = scale.max(bias.abs() / (f64::from(read) * LARGEST_BIAS));
                }
                let scale = scale as f32;
                if scale.is_normal() { scale } else { 1.0 }
            })
            .collect();
        let mut whole = Vec::with_capacity(weight.len());
        for (at, w) in weight.indexed_iter() {
            let q = (w / f64::from(scales[at[axis]])).round_ties_even().clamp(-bits.largest(), bits.largest());
            whole.push((q as i8).cast_unsigned());
        }
        let label = node.label().to_owned();
        let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let name = |part: &str| format!("{label}.{part}");
        let dims = weight.shape().to_vec();
        let stored = self.tensor(&name("weight.whole"), &dims, kind::INT8, whole);
        let scale = self.tensor(&name("weight.scale"), &[channels], kind::FLOAT, floats(&scales));
        let zero = self.tensor(&name("weight.zero"), &[channels], kind::INT8, vec![0; channels]);
        let back = self.name(&name("weight.back"));
        let along = vec![Attribute::int("axis", axis as i64)];
        written.input[1] = self.push("DequantizeLinear", vec![stored, scale, zero], back, along);
        if let Some(bias) = bias.filter(|bias| bias.len() == channels) {
            let products: Vec<f32> = scales.iter().map(|scale| scale * read).collect();
            let whole = bias.iter().zip(&products).map(|(b, scale)| (b / f64::from(*scale)).round_ties_even() as i32);
            let raw = whole.flat_map(i32::to_le_bytes).collect();
            let stored = self.tensor(&name("bias.whole"), &[channels], kind::INT32, raw);
            let scale = self.tensor(&name("bias.scale"), &[channels], kind::FLOAT, floats(&products));
            let zero = self.tensor(&name("bias.zero"), &[channels], kind::INT32, vec![0; 4 * channels]);
            let back = self.name(&name("bias.back"));
            let along = vec![Attribute::int("axis", 0)];
            written.input[2] = self.push("DequantizeLinear", vec![stored, scale, zero], back, along);
        }
        Ok(())
    }
}
