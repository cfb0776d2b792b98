//! Writes a folded graph as ONNX: ir_version 8, opset 17, one input `images`, dynamic batch.

use prost::Message;

use super::FoldedGraph;
use super::graph::Op;

/// The message types of onnx.proto that a folded network needs, with their field numbers.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Model {
        #[prost(int64, tag = "1")]
        pub ir_version: i64,
        #[prost(string, tag = "2")]
        pub producer_name: String,
        #[prost(string, tag = "3")]
        pub producer_version: String,
        #[prost(message, optional, tag = "7")]
        pub graph: Option<Graph>,
        #[prost(message, repeated, tag = "8")]
        pub opset_import: Vec<OperatorSet>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct OperatorSet {
        #[prost(string, tag = "1")]
        pub domain: String,
        #[prost(int64, tag = "2")]
        pub version: i64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Graph {
        #[prost(message, repeated, tag = "1")]
        pub node: Vec<Node>,
        #[prost(string, tag = "2")]
        pub name: String,
        #[prost(message, repeated, tag = "5")]
        pub initializer: Vec<Tensor>,
        #[prost(message, repeated, tag = "11")]
        pub input: Vec<ValueInfo>,
        #[prost(message, repeated, tag = "12")]
        pub output: Vec<ValueInfo>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Node {
        #[prost(string, repeated, tag = "1")]
        pub input: Vec<String>,
        #[prost(string, repeated, tag = "2")]
        pub output: Vec<String>,
        #[prost(string, tag = "3")]
        pub name: String,
        #[prost(string, tag = "4")]
        pub op_type: String,
        #[prost(message, repeated, tag = "5")]
        pub attribute: Vec<Attribute>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Attribute {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(int64, tag = "3")]
        pub i: i64,
        #[prost(int64, repeated, packed = "false", tag = "8")]
        pub ints: Vec<i64>,
        #[prost(int32, tag = "20")]
        pub kind: i32,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Tensor {
        #[prost(int64, repeated, packed = "false", tag = "1")]
        pub dims: Vec<i64>,
        #[prost(int32, tag = "2")]
        pub data_type: i32,
        #[prost(string, tag = "8")]
        pub name: String,
        #[prost(bytes = "vec", tag = "9")]
        pub raw_data: Vec<u8>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ValueInfo {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(message, optional, tag = "2")]
        pub r#type: Option<Type>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Type {
        #[prost(message, optional, tag = "1")]
        pub tensor: Option<TensorType>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct TensorType {
        #[prost(int32, tag = "1")]
        pub elem_type: i32,
        #[prost(message, optional, tag = "2")]
        pub shape: Option<Shape>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Shape {
        #[prost(message, repeated, tag = "1")]
        pub dim: Vec<Dimension>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Dimension {
        #[prost(oneof = "Size", tags = "1, 2")]
        pub size: Option<Size>,
    }
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Size {
        #[prost(int64, tag = "1")]
        Fixed(i64),
        #[prost(string, tag = "2")]
        Named(String),
    }
}

const FLOAT: i32 = 1;
const INT64: i32 = 7;
const ATTRIBUTE_INT: i32 = 2;
const ATTRIBUTE_INTS: i32 = 7;

/// Encodes `folded`. The f64 weights of classifiers and biases are rounded to f32 here, once.
pub fn write(folded: &FoldedGraph) -> Vec<u8> {
    let graph = folded.graph();
    let mut writer = Writer::default();
    let mut names: Vec<String> = graph.nodes.iter().map(|node| node.name.clone()).collect();
    for (output, id) in &graph.outputs {
        names[*id].clone_from(output);
    }
    for (node, name) in graph.nodes.iter().zip(&names) {
        let inputs: Vec<String> = node.inputs.iter().map(|&id| names[id].clone()).collect();
        writer.node(&node.op, name, inputs);
    }
    let shapes = graph.check("write").unwrap_or_default();
    let info = |name: &str, shape: &[usize]| proto::ValueInfo {
        name: name.into(),
        r#type: Some(proto::Type {
            tensor: Some(proto::TensorType { elem_type: FLOAT, shape: Some(batch_of(shape)) }),
        }),
    };
    let model = proto::Model {
        ir_version: 8,
        producer_name: "nbn fold".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(proto::Graph {
            node: writer.nodes,
            name: "folded".into(),
            initializer: writer.initializers,
            input: vec![info("images", &shapes[0])],
            output: graph.outputs.iter().map(|(name, id)| info(name, &shapes[*id])).collect(),
        }),
        opset_import: vec![proto::OperatorSet { domain: String::new(), version: 17 }],
    };
    model.encode_to_vec()
}

fn batch_of(shape: &[usize]) -> proto::Shape {
    let fixed = |&n: &usize| proto::Dimension { size: Some(proto::Size::Fixed(n as i64)) };
    let batch = proto::Dimension { size: Some(proto::Size::Named("batch".into())) };
    proto::Shape { dim: std::iter::once(batch).chain(shape.iter().map(fixed)).collect() }
}

#[derive(Default)]
struct Writer {
    nodes: Vec<proto::Node>,
    initializers: Vec<proto::Tensor>,
}

impl Writer {
    fn node(&mut self, op: &Op, name: &str, mut inputs: Vec<String>) {
        match op {
            Op::Input { .. } => {}
            Op::Conv { weight, bias, stride, padding, groups } => {
                let kernel = [weight.dim().2 as i64, weight.dim().3 as i64];
                let (stride, padding) = (*stride as i64, *padding as i64);
                inputs.push(self.floats(format!("{name}.weight"), weight.shape(), weight.iter().copied()));
                if let Some(bias) = bias {
                    let rounded = bias.iter().map(|&b| b as f32);
                    inputs.push(self.floats(format!("{name}.bias"), &[bias.len()], rounded));
                }
                let attributes = vec![
                    integers("kernel_shape", &kernel),
                    integers("strides", &[stride; 2]),
                    integers("pads", &[padding; 4]),
                    integer("group", *groups as i64),
                ];
                self.push("Conv", name, inputs, attributes);
            }
            Op::Relu => self.push("Relu", name, inputs, vec![]),
            Op::MaxPool => {
                let attributes =
                    vec![integers("kernel_shape", &[3; 2]), integers("strides", &[2; 2]), integers("pads", &[1; 4])];
                self.push("MaxPool", name, inputs, attributes);
            }
            Op::Add => self.push("Add", name, inputs, vec![]),
            Op::SubsamplePad { stride, before, after } => {
                inputs.push(self.indices(format!("{name}.starts"), &[0, 0]));
                inputs.push(self.indices(format!("{name}.ends"), &[i64::MAX, i64::MAX]));
                inputs.push(self.indices(format!("{name}.axes"), &[2, 3]));
                inputs.push(self.indices(format!("{name}.steps"), &[*stride as i64; 2]));
                let sliced = format!("{name}.sliced");
                self.push("Slice", &sliced, inputs, vec![]);
                let pads = [0, *before as i64, 0, 0, 0, *after as i64, 0, 0];
                let pads = self.indices(format!("{name}.pads"), &pads);
                self.push("Pad", name, vec![sliced, pads], vec![]);
            }
            Op::GlobalAveragePool => {
                let pooled = format!("{name}.pooled");
                self.push("GlobalAveragePool", &pooled, inputs, vec![]);
                self.push("Flatten", name, vec![pooled], vec![integer("axis", 1)]);
            }
            Op::Gemm { weight, bias } => {
                let rounded = weight.iter().map(|&w| w as f32);
                inputs.push(self.floats(format!("{name}.weight"), weight.shape(), rounded));
                inputs.push(self.floats(format!("{name}.bias"), &[bias.len()], bias.iter().map(|&b| b as f32)));
                self.push("Gemm", name, inputs, vec![integer("transB", 1)]);
            }
            Op::Concat => self.push("Concat", name, inputs, vec![integer("axis", 1)]),
            Op::Stack => {
                let axes = self.indices(format!("{name}.axes"), &[1]);
                let rows: Vec<String> = inputs
                    .into_iter()
                    .map(|input| {
                        let row = format!("{input}.row");
                        self.push("Unsqueeze", &row, vec![input, axes.clone()], vec![]);
                        row
                    })
                    .collect();
                self.push("Concat", name, rows, vec![integer("axis", 1)]);
            }
            // A FoldedGraph holds none of these.
            Op::BatchNorm(_) | Op::NormalizedBatchNorm { .. } | Op::Mean => {}
        }
    }

    fn push(&mut self, op_type: &str, output: &str, input: Vec<String>, attribute: Vec<proto::Attribute>) {
        self.nodes.push(proto::Node {
            input,
            output: vec![output.into()],
            name: output.into(),
            op_type: op_type.into(),
            attribute,
        });
    }

    fn floats(&mut self, name: String, shape: &[usize], values: impl Iterator<Item = f32>) -> String {
        self.initializer(name, FLOAT, shape, values.flat_map(f32::to_le_bytes).collect())
    }

    fn indices(&mut self, name: String, values: &[i64]) -> String {
        self.initializer(name, INT64, &[values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn initializer(&mut self, name: String, data_type: i32, shape: &[usize], raw_data: Vec<u8>) -> String {
        let dims = shape.iter().map(|&n| n as i64).collect();
        self.initializers.push(proto::Tensor { dims, data_type, name: name.clone(), raw_data });
        name
    }
}

fn integer(name: &str, i: i64) -> proto::Attribute {
    proto::Attribute { name: name.into(), i, ints: vec![], kind: ATTRIBUTE_INT }
}

fn integers(name: &str, ints: &[i64]) -> proto::Attribute {
    proto::Attribute { name: name.into(), i: 0, ints: ints.to_vec(), kind: ATTRIBUTE_INTS }
}
