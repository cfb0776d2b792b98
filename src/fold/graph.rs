//! The network as a list of operations in order of execution.

use ndarray::{Array2, Array4};

use super::FoldError;

/// Epsilon inside a BatchNorm's square root, unless the network has another.
pub const BATCH_NORM_EPSILON: f64 = 1e-5;

/// Index of a node, whose single output it stands for. Node 0 is the input.
pub type NodeId = usize;

/// A BatchNorm in evaluation mode: `y = weight · (x − mean) / √(variance + ε) + bias`, per channel.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchNorm {
    /// γ, or the effective α·γ/(‖γ‖ + 1e-6) of a normalised layer.
    pub weight: Vec<f64>,
    /// β, or the effective one.
    pub bias: Vec<f64>,
    /// Running mean.
    pub mean: Vec<f64>,
    /// Running variance, not negative.
    pub variance: Vec<f64>,
}

/// What a node does.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// The images, `[N, channels, height, width]`.
    Input {
        /// Channels.
        channels: usize,
    },
    /// 2-d convolution; weight `[out, in / groups, height, width]`.
    Conv {
        /// Kernel.
        weight: Array4<f32>,
        /// One per output channel.
        bias: Option<Vec<f64>>,
        /// Step in both directions.
        stride: usize,
        /// Zeros on every side.
        padding: usize,
        /// Groups of channels that do not mix.
        groups: usize,
    },
    /// Plain BatchNorm, over channels of `[N, C, H, W]` or over the classes of `[N, K]`.
    BatchNorm(BatchNorm),
    /// BatchNorm whose weight and bias are directions to be normalised and scaled by `alpha`.
    NormalizedBatchNorm {
        /// The stored directions and statistics.
        directions: BatchNorm,
        /// The shared magnitude.
        alpha: f64,
    },
    /// max(x, 0).
    Relu,
    /// x, or `slope` · x below 0.
    LeakyRelu {
        /// Its slope below 0.
        slope: f64,
    },
    /// x · sigmoid(x).
    Silu,
    /// 3×3 maximum, stride 2, padding 1.
    MaxPool,
    /// Sum of two inputs of one shape.
    Add,
    /// Every second row and column, with zero channels added before and after: the shortcut "option A".
    SubsamplePad {
        /// Step in both directions.
        stride: usize,
        /// Zero channels in front.
        before: usize,
        /// Zero channels behind.
        after: usize,
    },
    /// `[N, C, H, W]` → `[N, C]`.
    GlobalAveragePool,
    /// `[N, C, H, W]` → `[N, C]`.
    GlobalMaxPool,
    /// `[N, F]`: x / max(‖x‖₂, 1e-12) for each row, or x / (1 + ‖x‖₂).
    Normalize {
        /// The second.
        squashed: bool,
    },
    /// `x · weightᵀ + bias`; weight `[K, F]`.
    Gemm {
        /// Weight.
        weight: Array2<f64>,
        /// One per output.
        bias: Vec<f64>,
    },
    /// Side by side along the features.
    Concat,
    /// The mean of inputs of one shape.
    Mean,
    /// Inputs `[N, K]` → `[N, inputs, K]`.
    Stack,
}

/// An operation and where its inputs come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Name, unique; that of the checkpoint's layer where there is one.
    pub name: String,
    /// What it does.
    pub op: Op,
    /// Nodes before this one.
    pub inputs: Vec<NodeId>,
}

/// A network that may still hold norms.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    /// Height and width of the input in pixels.
    pub side: usize,
    /// Epsilon inside the square root of every BatchNorm.
    pub batch_norm_epsilon: f64,
    /// Nodes in order of execution; the first is the input.
    pub nodes: Vec<Node>,
    /// Output names and the nodes that give them; the first is `logits`.
    pub outputs: Vec<(String, NodeId)>,
}

impl Graph {
    /// A graph that only has its input.
    pub fn new(side: usize) -> Self {
        let input = Node { name: "images".into(), op: Op::Input { channels: 3 }, inputs: Vec::new() };
        Self { side, batch_norm_epsilon: BATCH_NORM_EPSILON, nodes: vec![input], outputs: Vec::new() }
    }

    /// Appends a node and returns its id.
    pub fn push(&mut self, name: impl Into<String>, op: Op, inputs: &[NodeId]) -> NodeId {
        self.nodes.push(Node { name: name.into(), op, inputs: inputs.to_vec() });
        self.nodes.len() - 1
    }

    /// How many nodes read each node; an output counts as one reader.
    pub fn readers(&self) -> Vec<usize> {
        let mut readers = vec![0; self.nodes.len()];
        for &id in self.nodes.iter().flat_map(|n| &n.inputs).chain(self.outputs.iter().map(|(_, id)| id)) {
            readers[id] += 1;
        }
        readers
    }

    /// Checks that the nodes fit together and returns each one's output shape for a batch of one:
    /// `[C, H, W]`, `[F]`, or `[E, K]`.
    ///
    /// # Errors
    /// Names `pass` and the first node that does not fit.
    pub fn check(&self, pass: &'static str) -> Result<Vec<Vec<usize>>, FoldError> {
        let mut shapes: Vec<Vec<usize>> = Vec::with_capacity(self.nodes.len());
        for (id, node) in self.nodes.iter().enumerate() {
            let fail = |reason: String| FoldError::Graph { pass, node: node.name.clone(), reason };
            if let Some(later) = node.inputs.iter().find(|&&input| input >= id) {
                return Err(fail(format!("reads node {later}, which comes later")));
            }
            let inputs: Vec<&[usize]> = node.inputs.iter().map(|&i| shapes[i].as_slice()).collect();
            shapes.push(output_shape(&node.op, &inputs, self.side).map_err(fail)?);
        }
        Ok(shapes)
    }
}

fn output_shape(op: &Op, inputs: &[&[usize]], side: usize) -> Result<Vec<usize>, String> {
    let unfit = || format!("cannot take inputs of shape {inputs:?}");
    let halved = |size: usize, kernel: usize, stride: usize, padding: usize| {
        (size + 2 * padding).checked_sub(kernel).map(|n| n / stride + 1).ok_or_else(unfit)
    };
    match (op, inputs) {
        (Op::Input { channels }, []) => Ok(vec![*channels, side, side]),
        (Op::Conv { weight, bias, stride, padding, groups }, [[c, h, w]]) => {
            let (out, per_group, kh, kw) = weight.dim();
            if *groups == 0 || per_group * groups != *c || out % groups != 0 {
                return Err(format!("{c} channels in, weight {:?}, {groups} groups", weight.shape()));
            }
            if bias.as_ref().is_some_and(|b| b.len() != out) {
                return Err(format!("the bias does not have {out} values"));
            }
            Ok(vec![out, halved(*h, kh, *stride, *padding)?, halved(*w, kw, *stride, *padding)?])
        }
        (Op::BatchNorm(norm) | Op::NormalizedBatchNorm { directions: norm, .. }, [shape @ [c, ..]]) => {
            let lengths = [norm.weight.len(), norm.bias.len(), norm.mean.len(), norm.variance.len()];
            if lengths.iter().any(|n| n != c) {
                return Err(format!("{c} channels in, vectors of {lengths:?}"));
            }
            Ok(shape.to_vec())
        }
        (Op::Relu | Op::LeakyRelu { .. } | Op::Silu, [shape]) => Ok(shape.to_vec()),
        (Op::Normalize { .. }, [shape @ [_]]) => Ok(shape.to_vec()),
        (Op::MaxPool, [[c, h, w]]) => Ok(vec![*c, halved(*h, 3, 2, 1)?, halved(*w, 3, 2, 1)?]),
        (Op::Add, [a, b]) if a == b => Ok(a.to_vec()),
        (Op::SubsamplePad { stride, before, after }, [[c, h, w]]) => {
            Ok(vec![c + before + after, h.div_ceil(*stride), w.div_ceil(*stride)])
        }
        (Op::GlobalAveragePool | Op::GlobalMaxPool, [[c, _, _]]) => Ok(vec![*c]),
        (Op::Gemm { weight, bias }, [[f]]) if weight.ncols() == *f && weight.nrows() == bias.len() => {
            Ok(vec![bias.len()])
        }
        (Op::Concat, [first, ..]) if first.len() == 1 && inputs.iter().all(|s| s.len() == 1) => {
            Ok(vec![inputs.iter().map(|s| s[0]).sum()])
        }
        (Op::Mean, [first, rest @ ..]) if rest.iter().all(|s| s == first) => Ok(first.to_vec()),
        (Op::Stack, [first, rest @ ..]) if first.len() == 1 && rest.iter().all(|s| s == first) => {
            Ok(vec![inputs.len(), first[0]])
        }
        _ => Err(unfit()),
    }
}
