//! A graph of [`crate::fold`] as a network that learns: the same nodes, computed by burn.

use std::collections::BTreeMap;

use burn::tensor::module::{batch_norm, batch_norm_train, conv2d, max_pool2d};
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use burn::tensor::{Device, Tensor, TensorData, activation, s};
use serde::Serialize;

use super::TrainError;
use super::kernels::{self, Convolution, convolve};
use crate::bundle::Head;
use crate::fold::architecture::{self, SCALE_FACTOR};
use crate::fold::checkpoint::Tensor as Values;
use crate::fold::graph::{BATCH_NORM_EPSILON, Graph, Op};
use crate::fold::onnx::NORM_EPSILON;
use crate::fold::{Checkpoint, FoldError};

/// Share of the batch's statistics in the running ones, as PyTorch's default.
const MOMENTUM: f64 = 0.1;
/// Keeps the gradient of ‖v‖ finite at v = 0; far below what f32 can tell beside [`NORM_EPSILON`].
const TINY: f64 = 1e-30;

/// What a parameter is, which decides whether it decays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Of a convolution or a linear layer.
    Weight,
    /// γ or β of a plain BatchNorm.
    Norm,
    /// γ or β of a normalised one: only their direction acts.
    Direction,
    /// `scale_factor`.
    Magnitude,
}

/// One learned tensor, kept flat.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name in the checkpoint.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
}

/// The values of all parameters, in their order, and the running statistics of all norms. Neither is tracked.
#[derive(Debug, Clone)]
pub struct State {
    /// Flat.
    pub parameters: Vec<Tensor<1>>,
    /// Running mean and (unbiased) variance per norm.
    pub statistics: Vec<(Tensor<1>, Tensor<1>)>,
}

/// How large a norm's parameters are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Strength {
    /// The norm.
    pub name: String,
    /// C: its channels.
    pub channels: usize,
    /// ‖γ‖, of a normalised norm before it is normalised.
    pub gamma: f64,
    /// ‖β‖, likewise.
    pub beta: f64,
    /// α, where it is normalised: γ acts as α·γ/‖γ‖, whose elements are α/√C in the root mean square; where that is below 1,
    /// features shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
}

/// A network, without its values.
#[derive(Debug)]
pub struct Network {
    steps: Vec<(Step, Vec<usize>)>,
    /// The logits of each expert.
    logits: Vec<usize>,
    parameters: Vec<Parameter>,
    norms: Vec<String>,
    readers: Vec<usize>,
}

#[derive(Debug)]
enum Step {
    Input,
    Conv {
        weight: usize,
        stride: usize,
        padding: usize,
        groups: usize,
    },
    Norm {
        affine: Option<(usize, usize)>,
        statistics: usize,
        channels: usize,
        magnitude: Option<(usize, usize)>,
        rectified: bool,
    },
    Relu,
    MaxPool,
    Add {
        rectified: bool,
    },
    /// What it takes.
    Same,
    SubsamplePad {
        stride: usize,
        before: usize,
        after: usize,
    },
    GlobalAveragePool,
    Linear {
        weight: usize,
        bias: usize,
    },
}

#[derive(Clone)]
enum Value {
    Map(Tensor<4>),
    Row(Tensor<2>),
}

/// What a run over a training batch gives.
pub struct Trained {
    /// [N, K] of each expert.
    pub logits: Vec<Tensor<2>>,
    /// Running statistics with this batch in them.
    pub statistics: Vec<(Tensor<1>, Tensor<1>)>,
}

impl Network {
    /// The network that `found` describes, whose graph may have an output of the experts' logits.
    ///
    /// # Errors
    /// When the graph holds an operation that has no place in a network in training.
    pub fn new(found: &architecture::Network) -> Result<Self, TrainError> {
        let graph = &found.graph;
        let mut network = Self {
            steps: Vec::new(),
            logits: Vec::new(),
            parameters: Vec::new(),
            norms: Vec::new(),
            readers: graph.readers(),
        };
        let scale = (!found.alphas.is_empty()).then(|| network.parameter(SCALE_FACTOR.into(), &[0], Role::Magnitude));
        let magnitudes: BTreeMap<&str, usize> =
            found.normalized_layers.iter().map(String::as_str).zip(found.magnitude_indices.iter().copied()).collect();
        for node in &graph.nodes {
            let step = match &node.op {
                Op::Input { .. } => Step::Input,
                Op::Conv { weight, bias: None, stride, padding, groups } => Step::Conv {
                    weight: network.parameter(format!("{}.weight", node.name), weight.shape(), Role::Weight),
                    stride: *stride,
                    padding: *padding,
                    groups: *groups,
                },
                Op::BatchNorm(norm) => {
                    let affine = !is_head(&node.name) || found.head == Head::LrAffine;
                    network.norm(&node.name, norm.weight.len(), affine, Role::Norm, None)
                }
                Op::NormalizedBatchNorm { directions, .. } => {
                    let index = magnitudes.get(node.name.as_str()).copied().unwrap_or(0);
                    let magnitude = scale.map(|scale| (scale, index));
                    network.norm(&node.name, directions.weight.len(), true, Role::Direction, magnitude)
                }
                Op::Relu => Step::Relu,
                Op::MaxPool => Step::MaxPool,
                Op::Add => Step::Add { rectified: false },
                Op::SubsamplePad { stride, before, after } => {
                    Step::SubsamplePad { stride: *stride, before: *before, after: *after }
                }
                Op::GlobalAveragePool => Step::GlobalAveragePool,
                Op::Gemm { weight, bias } => Step::Linear {
                    weight: network.parameter(format!("{}.weight", node.name), weight.shape(), Role::Weight),
                    bias: network.parameter(format!("{}.bias", node.name), &[bias.len()], Role::Weight),
                },
                // Every expert learns from its own logits; their mean is taken by whoever reads them.
                Op::Mean | Op::Stack => break,
                Op::Conv { .. }
                | Op::Concat
                | Op::LeakyRelu { .. }
                | Op::Silu
                | Op::GlobalMaxPool
                | Op::Normalize { .. } => {
                    return Err(TrainError::Fold(FoldError::Graph {
                        pass: "train",
                        node: node.name.clone(),
                        reason: "has no place in a network in training".into(),
                    }));
                }
            };
            network.steps.push((step, node.inputs.clone()));
        }
        network.logits = logits(graph);
        network.rectify();
        Ok(network)
    }

    /// Lets norms and sums that only a ReLU reads do its work, which saves passes over memory.
    fn rectify(&mut self) {
        for at in 0..self.steps.len() {
            let (Step::Relu, inputs) = &self.steps[at] else { continue };
            let before = inputs[0];
            if self.readers[before] > 1 {
                continue;
            }
            if let Step::Norm { rectified, .. } | Step::Add { rectified } = &mut self.steps[before].0 {
                *rectified = true;
                self.steps[at].0 = Step::Same;
            }
        }
    }

    fn parameter(&mut self, name: String, shape: &[usize], role: Role) -> usize {
        self.parameters.push(Parameter { name, shape: shape.to_vec(), role });
        self.parameters.len() - 1
    }

    fn norm(
        &mut self,
        name: &str,
        channels: usize,
        affine: bool,
        role: Role,
        magnitude: Option<(usize, usize)>,
    ) -> Step {
        self.norms.push(name.into());
        let statistics = self.norms.len() - 1;
        let affine = affine.then(|| {
            let weight = self.parameter(format!("{name}.weight"), &[channels], role);
            (weight, self.parameter(format!("{name}.bias"), &[channels], role))
        });
        Step::Norm { affine, statistics, channels, magnitude, rectified: false }
    }

    /// The learned tensors, in the order of [`State::parameters`].
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The norms' names, in the order of [`State::statistics`].
    pub fn norms(&self) -> &[String] {
        &self.norms
    }

    /// The checkpoint's values on `device`.
    ///
    /// # Errors
    /// Names a tensor that is missing.
    pub fn load(&mut self, checkpoint: &Checkpoint, device: &Device) -> Result<State, TrainError> {
        let tensor = |name: &str| -> Result<(Tensor<1>, Vec<usize>), TrainError> {
            let found = checkpoint.tensors.get(name).ok_or_else(|| FoldError::Missing {
                name: name.into(),
                arch: "the network".into(),
                likely: None,
            })?;
            let data = TensorData::new(found.values.clone(), [found.values.len()]);
            Ok((Tensor::from_data(data, device), found.shape.clone()))
        };
        let mut parameters = Vec::new();
        for parameter in &mut self.parameters {
            let (values, shape) = tensor(&parameter.name)?;
            parameter.shape = shape;
            parameters.push(values);
        }
        let statistics = self
            .norms
            .iter()
            .map(|n| Ok((tensor(&format!("{n}.running_mean"))?.0, tensor(&format!("{n}.running_var"))?.0)))
            .collect::<Result<_, TrainError>>()?;
        Ok(State { parameters, statistics })
    }

    /// The values as a checkpoint's tensors.
    pub fn store(&self, state: &State) -> BTreeMap<String, Values> {
        let mut tensors = BTreeMap::new();
        for (parameter, values) in self.parameters.iter().zip(&state.parameters) {
            tensors.insert(parameter.name.clone(), Values { shape: parameter.shape.clone(), values: host(values) });
        }
        for (norm, (mean, variance)) in self.norms.iter().zip(&state.statistics) {
            for (part, values) in [("running_mean", mean), ("running_var", variance)] {
                let values = host(values);
                tensors.insert(format!("{norm}.{part}"), Values { shape: vec![values.len()], values });
            }
        }
        tensors
    }

    /// One run in training mode over `images` [N, 3, H, W] with the tracked `parameters`.
    pub fn train(&self, parameters: &[Tensor<1>], state: &State, images: Tensor<4>) -> Trained {
        let mut statistics = state.statistics.clone();
        let logits = self.run(parameters, images, None, |index, x, gamma, beta, rectified| {
            let count = x.samples();
            let (y, mean, variance) = x.normalize(gamma, beta, rectified);
            // PyTorch keeps the unbiased variance.
            let variance = variance.inner() * (count / (count - 1.0).max(1.0));
            let (kept_mean, kept_variance) = statistics[index].clone();
            statistics[index] = (
                kept_mean * (1.0 - MOMENTUM) + mean.inner() * MOMENTUM,
                kept_variance * (1.0 - MOMENTUM) + variance * MOMENTUM,
            );
            y
        });
        Trained { logits, statistics }
    }

    /// The mean of the experts' logits [N, K] for `images`, in evaluation mode.
    pub fn evaluate(&self, state: &State, images: Tensor<4>) -> Tensor<2> {
        self.evaluate_with_features(state, images).0
    }

    /// As [`Self::evaluate`], and what the classifiers see, [N, D]: the experts' one after the other.
    pub fn evaluate_with_features(&self, state: &State, images: Tensor<4>) -> (Tensor<2>, Tensor<2>) {
        let mut features = Vec::new();
        let logits = self.run(&state.parameters, images, Some(&mut features), |index, x, gamma, beta, rectified| {
            let (mean, variance) = state.statistics[index].clone();
            x.apply(gamma, beta, mean, variance).rectify(rectified)
        });
        let experts = logits.len() as f64;
        let sum = logits.into_iter().reduce(|a, b| a + b);
        let none = || Tensor::zeros([0, 0], &Device::flex());
        // A network has one classifier at least.
        let logits = sum.map_or_else(none, |sum| sum / experts);
        (logits, if features.is_empty() { none() } else { Tensor::cat(features, 1) })
    }

    /// How large each norm's weight and bias are as they act, in the order of [`Self::norms`], of those that have them.
    pub fn strengths(&self, state: &State) -> Vec<Strength> {
        let norm_of = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let values = |index: usize| host(&state.parameters[index]);
        let of = |(step, _): &(Step, Vec<usize>)| {
            let Step::Norm { affine: Some((gamma, beta)), statistics, channels, magnitude, .. } = step else {
                return None;
            };
            let [gamma, beta] = [gamma, beta].map(|index| norm_of(&values(*index)));
            let alpha = magnitude.and_then(|(scale, index)| values(scale).get(index).copied()).map(f64::from);
            let name = self.norms[*statistics].clone();
            Some(Strength { name, channels: *channels, gamma, beta, alpha })
        };
        self.steps.iter().filter_map(of).collect()
    }

    fn run(
        &self,
        parameters: &[Tensor<1>],
        images: Tensor<4>,
        mut features_seen: Option<&mut Vec<Tensor<2>>>,
        mut norm: impl FnMut(usize, Value, Tensor<1>, Tensor<1>, bool) -> Value,
    ) -> Vec<Tensor<2>> {
        let on_processor = kernels::on_processor(&images.device());
        let mut images = Some(images);
        let mut readers = self.readers.clone();
        let mut values: Vec<Option<Value>> = Vec::with_capacity(self.steps.len());
        let shaped = |index: usize| -> Tensor<4> {
            let shape: [usize; 4] = std::array::from_fn(|axis| self.parameters[index].shape[axis]);
            parameters[index].clone().reshape(shape)
        };
        for (step, inputs) in &self.steps {
            // The last reader takes the value, so that nothing is kept that no one needs.
            let mut take = |at: usize| -> Value {
                let id = inputs[at];
                readers[id] -= 1;
                let value = if readers[id] == 0 { values[id].take() } else { values[id].clone() };
                value.unwrap_or_else(|| unreachable!("nodes come after their inputs"))
            };
            let value = match step {
                Step::Input => Value::Map(images.take().unwrap_or_else(|| unreachable!("a graph has one input"))),
                Step::Conv { weight, stride, padding, groups } => {
                    let (x, weight) = (take(0).map(), shaped(*weight));
                    let (stride, padding, groups) = (*stride, *padding, *groups);
                    Value::Map(if on_processor {
                        convolve(x, weight, Convolution { stride, padding, groups })
                    } else {
                        conv2d(x, weight, None, ConvOptions::new([stride; 2], [padding; 2], [1; 2], groups))
                    })
                }
                Step::Norm { affine, statistics, channels, magnitude, rectified } => {
                    let x = take(0);
                    let device = x.device();
                    let (gamma, beta) = match (affine, magnitude) {
                        (None, _) => (Tensor::ones([*channels], &device), Tensor::zeros([*channels], &device)),
                        (Some((gamma, beta)), None) => (parameters[*gamma].clone(), parameters[*beta].clone()),
                        (Some((gamma, beta)), Some((scale, index))) => {
                            let alpha = parameters[*scale].clone().slice(s![*index..*index + 1]);
                            (
                                scaled_direction(parameters[*gamma].clone(), alpha.clone()),
                                scaled_direction(parameters[*beta].clone(), alpha),
                            )
                        }
                    };
                    norm(*statistics, x, gamma, beta, *rectified)
                }
                Step::Relu => Value::Map(activation::relu(take(0).map())),
                Step::MaxPool => {
                    let pool = MaxPoolOptions::new([3; 2]).with_stride([2; 2]).with_padding([1; 2]);
                    Value::Map(max_pool2d(take(0).map(), pool))
                }
                Step::Add { rectified: true } if on_processor => {
                    Value::Map(kernels::add_rectified(take(0).map(), take(1).map()))
                }
                Step::Add { rectified } => Value::Map(take(0).map() + take(1).map()).rectify(*rectified),
                Step::Same => take(0),
                Step::SubsamplePad { stride, before, after } => {
                    Value::Map(subsample_pad(take(0).map(), *stride, *before, *after))
                }
                Step::GlobalAveragePool => {
                    let x = take(0).map();
                    let [n, c, h, w] = x.dims();
                    Value::Row(x.reshape([n, c, h * w]).mean_dim(2).reshape([n, c]))
                }
                Step::Linear { weight, bias } => {
                    let shape = &self.parameters[*weight].shape;
                    let (classes, features) = (shape[0], shape[1]);
                    let weight = parameters[*weight].clone().reshape([classes, features]).transpose();
                    let x = take(0).row();
                    if let Some(seen) = &mut features_seen {
                        seen.push(x.clone());
                    }
                    Value::Row(x.matmul(weight) + parameters[*bias].clone().reshape([1, classes]))
                }
            };
            values.push(Some(value));
        }
        self.logits.iter().filter_map(|&id| values[id].clone()).map(Value::row).collect()
    }
}

/// α·v/(‖v‖₂ + 1e-6) (arXiv 2501.03122 and its authors' code); `alpha` has one element.
pub fn scaled_direction(v: Tensor<1>, alpha: Tensor<1>) -> Tensor<1> {
    let norm = (v.clone() * v.clone()).sum().add_scalar(TINY).sqrt().add_scalar(NORM_EPSILON);
    v * (alpha / norm)
}

fn subsample_pad(x: Tensor<4>, stride: usize, before: usize, after: usize) -> Tensor<4> {
    let [_, _, height, width] = x.dims();
    let step = stride as isize;
    let x = x.slice(s![.., .., 0..height;step, 0..width;step]);
    let [n, _, h, w] = x.dims();
    let zeros = |channels| Tensor::<4>::zeros([n, channels, h, w], &x.device());
    if before + after == 0 {
        return x;
    }
    let (front, back) = (zeros(before), zeros(after));
    Tensor::cat(vec![front, x, back], 1)
}

/// The nodes that give each expert's logits.
fn logits(graph: &Graph) -> Vec<usize> {
    let id = graph.outputs.first().map_or(0, |(_, id)| *id);
    match graph.nodes[id].op {
        Op::Mean => graph.nodes[id].inputs.clone(),
        _ => vec![id],
    }
}

/// Whether this BatchNorm is the one over the logits.
fn is_head(name: &str) -> bool {
    name == "fc.bn" || name.starts_with("linears.")
}

/// The tensor's values.
pub fn host(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.clone().into_data().convert::<f32>().try_into_vec().unwrap_or_default()
}

impl Value {
    fn map(self) -> Tensor<4> {
        match self {
            Self::Map(map) => map,
            Self::Row(_) => unreachable!("the graph was checked"),
        }
    }

    fn row(self) -> Tensor<2> {
        match self {
            Self::Row(row) => row,
            Self::Map(_) => unreachable!("the graph was checked"),
        }
    }

    fn device(&self) -> Device {
        match self {
            Self::Map(x) => x.device(),
            Self::Row(x) => x.device(),
        }
    }

    /// Values per channel.
    fn samples(&self) -> f64 {
        let count = match self {
            Self::Map(x) => x.shape().num_elements() / x.dims()[1].max(1),
            Self::Row(x) => x.dims()[0],
        };
        count as f64
    }

    /// By the batch's own statistics, and by a ReLU where it is to be `rectified`; returns the statistics, the variance biased.
    fn normalize(self, gamma: Tensor<1>, beta: Tensor<1>, rectified: bool) -> (Self, Tensor<1>, Tensor<1>) {
        match self {
            Self::Map(x) if kernels::on_processor(&x.device()) => {
                let (y, mean, variance) = kernels::normalize(x, gamma, beta, BATCH_NORM_EPSILON, rectified);
                (Self::Map(y), mean, variance)
            }
            Self::Map(x) => {
                let result = batch_norm_train(x, gamma, beta, BATCH_NORM_EPSILON);
                (Self::Map(result.output).rectify(rectified), result.mean, result.variance)
            }
            Self::Row(x) => {
                let result = batch_norm_train(x, gamma, beta, BATCH_NORM_EPSILON);
                (Self::Row(result.output).rectify(rectified), result.mean, result.variance)
            }
        }
    }

    /// The ReLU of it, where it is to be.
    fn rectify(self, rectified: bool) -> Self {
        match self {
            Self::Map(x) if rectified => Self::Map(activation::relu(x)),
            Self::Row(x) if rectified => Self::Row(activation::relu(x)),
            same => same,
        }
    }

    /// By given statistics.
    fn apply(self, gamma: Tensor<1>, beta: Tensor<1>, mean: Tensor<1>, variance: Tensor<1>) -> Self {
        match self {
            Self::Map(x) => Self::Map(batch_norm(x, gamma, beta, mean, variance, BATCH_NORM_EPSILON)),
            Self::Row(x) => Self::Row(batch_norm(x, gamma, beta, mean, variance, BATCH_NORM_EPSILON)),
        }
    }
}
