//! Writes the network that a checkpoint was recognised as in ONNX, as PyTorch would export it: opset 17, one input
//! `images`, dynamic batch, every norm still there.

use super::proto::{
    Attribute, Dimension, Graph, Model, Node, OperatorSet, Shape, Tensor, TensorType, Type, ValueInfo, kind,
};
use super::value::{Float, Value};
use super::{NORM_EPSILON, Network};
use crate::fold::graph::{self, BatchNorm, Op};
use crate::fold::reference::LEAST_LENGTH;

/// The network in ONNX. Names of nodes are those of the checkpoint's layers.
pub fn lower(source: &graph::Graph) -> Network {
    let mut writer = Writer { epsilon: source.batch_norm_epsilon, ..Writer::default() };
    let mut names: Vec<String> = source.nodes.iter().map(|node| node.name.clone()).collect();
    for (output, id) in &source.outputs {
        names[*id].clone_from(output);
    }
    for (node, name) in source.nodes.iter().zip(&names) {
        let inputs: Vec<String> = node.inputs.iter().map(|&id| names[id].clone()).collect();
        writer.node(&node.op, &node.name, name, inputs);
    }
    // Checked when it was built.
    let shapes = source.check("lower").unwrap_or_default();
    let shape = |id: usize| shapes.get(id).map(Vec::as_slice).unwrap_or_default();
    Network::of_model(Model {
        ir_version: Some(8),
        producer_name: Some("nbn fold".into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        graph: Some(Graph {
            node: writer.nodes,
            name: Some("folded".into()),
            initializer: writer.initializers,
            input: vec![info("images", shape(0))],
            output: source.outputs.iter().map(|(name, id)| info(name, shape(*id))).collect(),
            ..Graph::default()
        }),
        opset_import: vec![OperatorSet { version: Some(17), ..OperatorSet::default() }],
        ..Model::default()
    })
}

/// A value of floats, `[batch, …]`.
fn info(name: &str, shape: &[usize]) -> ValueInfo {
    let batch = Dimension { dim_param: Some("batch".into()), ..Dimension::default() };
    let fixed = |&n: &usize| Dimension { dim_value: Some(n as i64), ..Dimension::default() };
    let shape = Shape { dim: std::iter::once(batch).chain(shape.iter().map(fixed)).collect(), ..Shape::default() };
    let tensor = TensorType { elem_type: Some(kind::FLOAT), shape: Some(shape), ..TensorType::default() };
    ValueInfo {
        name: Some(name.into()),
        r#type: Some(Type { tensor_type: Some(tensor), ..Type::default() }),
        ..ValueInfo::default()
    }
}

#[derive(Default)]
struct Writer {
    /// Of every BatchNorm.
    epsilon: f64,
    nodes: Vec<Node>,
    initializers: Vec<Tensor>,
}

impl Writer {
    /// `name` is the layer's, `output` the value's.
    fn node(&mut self, op: &Op, name: &str, output: &str, mut inputs: Vec<String>) {
        match op {
            Op::Input { .. } => {}
            Op::Conv { weight, bias, stride, padding, groups } => {
                let kernel = [weight.dim().2 as i64, weight.dim().3 as i64];
                let (stride, padding) = (*stride as i64, *padding as i64);
                inputs.push(self.floats(format!("{name}.weight"), weight.shape(), weight.iter().map(|&w| w.into())));
                if let Some(bias) = bias {
                    inputs.push(self.floats(format!("{name}.bias"), &[bias.len()], bias.iter().copied()));
                }
                let attributes = vec![
                    Attribute::ints("kernel_shape", &kernel),
                    Attribute::ints("strides", &[stride; 2]),
                    Attribute::ints("pads", &[padding; 4]),
                    Attribute::int("group", *groups as i64),
                ];
                self.push("Conv", name, output, inputs, attributes);
            }
            Op::BatchNorm(norm) => {
                let weight = self.vector(format!("{name}.weight"), &norm.weight);
                let bias = self.vector(format!("{name}.bias"), &norm.bias);
                self.batch_norm(norm, name, output, inputs, weight, bias);
            }
            Op::NormalizedBatchNorm { directions, alpha } => {
                let alpha = self.floats(format!("{name}.alpha"), &[], std::iter::once(*alpha));
                let weight = self.direction(format!("{name}.weight"), &directions.weight, &alpha);
                let bias = self.direction(format!("{name}.bias"), &directions.bias, &alpha);
                self.batch_norm(directions, name, output, inputs, weight, bias);
            }
            Op::Relu => self.push("Relu", name, output, inputs, vec![]),
            Op::LeakyRelu { slope } => {
                self.push("LeakyRelu", name, output, inputs, vec![Attribute::float("alpha", *slope as f32)]);
            }
            Op::Silu => {
                let gate = format!("{name}.gate");
                self.push("Sigmoid", &gate, &gate, inputs.clone(), vec![]);
                self.push("Mul", name, output, inputs.into_iter().chain([gate]).collect(), vec![]);
            }
            Op::Normalize { squashed } => {
                let length = format!("{name}.length");
                let axes = vec![Attribute::ints("axes", &[1]), Attribute::int("keepdims", 1)];
                self.push("ReduceL2", &length, &length, inputs.clone(), axes);
                let divisor = format!("{name}.divisor");
                let (op, bound) = if *squashed { ("Add", 1.0) } else { ("Max", LEAST_LENGTH) };
                let bound = self.floats(format!("{name}.bound"), &[], std::iter::once(bound));
                self.push(op, &divisor, &divisor, vec![length, bound], vec![]);
                self.push("Div", name, output, inputs.into_iter().chain([divisor]).collect(), vec![]);
            }
            Op::MaxPool => {
                let attributes = vec![
                    Attribute::ints("kernel_shape", &[3; 2]),
                    Attribute::ints("strides", &[2; 2]),
                    Attribute::ints("pads", &[1; 4]),
                ];
                self.push("MaxPool", name, output, inputs, attributes);
            }
            Op::Add => self.push("Add", name, output, inputs, vec![]),
            Op::Mean => self.push("Mean", name, output, inputs, vec![]),
            Op::SubsamplePad { stride, before, after } => {
                inputs.push(self.indices(format!("{name}.starts"), &[0, 0]));
                inputs.push(self.indices(format!("{name}.ends"), &[i64::MAX, i64::MAX]));
                inputs.push(self.indices(format!("{name}.axes"), &[2, 3]));
                inputs.push(self.indices(format!("{name}.steps"), &[*stride as i64; 2]));
                let sliced = format!("{name}.sliced");
                self.push("Slice", &sliced, &sliced, inputs, vec![]);
                let pads = [0, *before as i64, 0, 0, 0, *after as i64, 0, 0];
                let pads = self.indices(format!("{name}.pads"), &pads);
                self.push("Pad", name, output, vec![sliced, pads], vec![]);
            }
            Op::GlobalAveragePool | Op::GlobalMaxPool => {
                let pooled = format!("{name}.pooled");
                let op = if *op == Op::GlobalMaxPool { "GlobalMaxPool" } else { "GlobalAveragePool" };
                self.push(op, &pooled, &pooled, inputs, vec![]);
                self.push("Flatten", name, output, vec![pooled], vec![Attribute::int("axis", 1)]);
            }
            Op::Gemm { weight, bias } => {
                inputs.push(self.floats(format!("{name}.weight"), weight.shape(), weight.iter().copied()));
                inputs.push(self.vector(format!("{name}.bias"), bias));
                self.push("Gemm", name, output, inputs, vec![Attribute::int("transB", 1)]);
            }
            Op::Concat => self.push("Concat", name, output, inputs, vec![Attribute::int("axis", 1)]),
            Op::Stack => {
                let axes = self.indices(format!("{name}.axes"), &[1]);
                let rows: Vec<String> = inputs
                    .into_iter()
                    .map(|input| {
                        let row = format!("{input}.row");
                        self.push("Unsqueeze", &row, &row, vec![input, axes.clone()], vec![]);
                        row
                    })
                    .collect();
                self.push("Concat", name, output, rows, vec![Attribute::int("axis", 1)]);
            }
        }
    }

    fn batch_norm(
        &mut self,
        norm: &BatchNorm,
        name: &str,
        output: &str,
        mut inputs: Vec<String>,
        weight: String,
        bias: String,
    ) {
        let mean = self.vector(format!("{name}.running_mean"), &norm.mean);
        let variance = self.vector(format!("{name}.running_var"), &norm.variance);
        inputs.extend([weight, bias, mean, variance]);
        let epsilon = Attribute::float("epsilon", self.epsilon as f32);
        self.push("BatchNormalization", name, output, inputs, vec![epsilon]);
    }

    /// α·v / (‖v‖₂ + 1e-6); 0 where v is 0. Source: arXiv 2501.03122, the authors' code.
    fn direction(&mut self, name: String, vector: &[f64], alpha: &str) -> String {
        let stored = self.vector(format!("{name}.direction"), vector);
        let epsilon = self.floats(format!("{name}.epsilon"), &[], std::iter::once(NORM_EPSILON));
        let value = |part: &str| format!("{name}.{part}");
        let keep = vec![Attribute::ints("axes", &[0]), Attribute::int("keepdims", 1)];
        self.push("ReduceL2", &value("norm"), &value("norm"), vec![stored.clone()], keep);
        self.push("Add", &value("length"), &value("length"), vec![value("norm"), epsilon], vec![]);
        self.push("Div", &value("unit"), &value("unit"), vec![stored, value("length")], vec![]);
        self.push("Mul", &name, &name, vec![value("unit"), alpha.to_owned()], vec![]);
        name
    }

    fn push(&mut self, op_type: &str, name: &str, output: &str, input: Vec<String>, attribute: Vec<Attribute>) {
        self.nodes.push(Node {
            input,
            output: vec![output.into()],
            name: Some(name.into()),
            op_type: Some(op_type.into()),
            attribute,
            ..Node::default()
        });
    }

    fn vector(&mut self, name: String, values: &[f64]) -> String {
        self.floats(name, &[values.len()], values.iter().copied())
    }

    fn floats(&mut self, name: String, shape: &[usize], values: impl Iterator<Item = f64>) -> String {
        let raw: Vec<u8> = values.flat_map(|v| (v as f32).to_le_bytes()).collect();
        self.initializers.push(Tensor {
            dims: shape.iter().map(|&n| n as i64).collect(),
            data_type: Some(Float::Single.kind()),
            name: Some(name.clone()),
            raw_data: Some(raw.into()),
            ..Tensor::default()
        });
        name
    }

    fn indices(&mut self, name: String, values: &[i64]) -> String {
        self.initializers.push(Value::indices(values).tensor(&name));
        name
    }
}
