//! Recognises the network from a checkpoint's names and shapes, and builds its graph, strictly: every tensor
//! has a place and every place a tensor.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use ndarray::{Array2, Array4};

use super::checkpoint::Tensor;
use super::graph::{BatchNorm, NodeId, Op};
use super::{Checkpoint, FoldError, Graph};
use crate::bundle::Alpha;

/// Key of the shared magnitudes.
const SCALE_FACTOR: &str = "scale_factor";
/// More and "layer4s.1" is a prefix of "layer4s.10", which the authors' code confuses.
const MAX_EXPERTS: usize = 10;

/// Which BatchNorm layers are normalised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbnLayers {
    /// The last norm of each residual branch and the shortcut's, in the last stage.
    LastStageOutputs,
    /// Every norm of the last stage.
    LastStageAll,
    /// Every norm.
    All,
    /// None.
    None,
    /// These, by name.
    Named(Vec<String>),
}

impl FromStr for NbnLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "last-stage-outputs" => Ok(Self::LastStageOutputs),
            "last-stage-all" => Ok(Self::LastStageAll),
            "all" => Ok(Self::All),
            "none" => Ok(Self::None),
            names if names.contains('.') || names.contains("bn") => {
                Ok(Self::Named(names.split(',').map(|n| n.trim().to_owned()).collect()))
            }
            other => Err(format!(
                "{other:?} is none of last-stage-outputs, last-stage-all, all, none, or layer names such as \
                 layer4.0.bn3,layer4.1.bn3"
            )),
        }
    }
}

impl fmt::Display for NbnLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LastStageOutputs => f.write_str("last-stage-outputs"),
            Self::LastStageAll => f.write_str("last-stage-all"),
            Self::All => f.write_str("all"),
            Self::None => f.write_str("none"),
            Self::Named(names) => f.write_str(&names.join(",")),
        }
    }
}

/// What overrules the names and shapes.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// The network that the tensors must be of.
    pub arch: Option<String>,
    /// The layers that are normalised.
    pub nbn_layers: Option<NbnLayers>,
}

/// The families of networks, which differ in stem and stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// torchvision's ResNet and ResNeXt: 7×7 stem, max-pool, four stages.
    ImageNet,
    /// CIFAR ResNet: 3×3 stem, three stages.
    Cifar,
    /// RIDE: the ImageNet stem and two shared stages, then two stages and a classifier per expert.
    MultiExpert,
}

impl Family {
    /// Height and width that the authors' evaluation uses, in pixels.
    pub fn default_side(self) -> usize {
        if self == Self::Cifar { 32 } else { 224 }
    }
}

/// A checkpoint as a graph, and what was recognised.
#[derive(Debug)]
pub struct Network {
    /// The graph, norms still in it. First output: `logits`.
    pub graph: Graph,
    /// Its name, e.g. `resnet50`.
    pub arch: String,
    /// Its family.
    pub family: Family,
    /// `linear`, `lr-affine` or `lr-plain`.
    pub head: &'static str,
    /// Classifiers whose logits are averaged.
    pub experts: usize,
    /// Classes.
    pub classes: usize,
    /// Normalised layers.
    pub normalized_layers: Vec<String>,
    /// Acting magnitudes.
    pub alphas: Vec<Alpha>,
}

/// The family, told from the names alone.
///
/// # Errors
/// When the names are of no known network, or of too many experts.
pub fn family(checkpoint: &Checkpoint) -> Result<Family, FoldError> {
    // By any tensor of a stage, so that a single missing one is reported as missing.
    let has = |stage: &str| checkpoint.tensors.keys().any(|name| name.starts_with(stage));
    match () {
        () if has("layer3s.0.") => Ok(Family::MultiExpert),
        () if has("layer4.") => Ok(Family::ImageNet),
        () if has("layer3.") => Ok(Family::Cifar),
        () => Err(FoldError::UnknownArchitecture {
            keys: checkpoint.tensors.len(),
            example: checkpoint.tensors.keys().next().cloned().unwrap_or_else(|| "no key".into()),
        }),
    }
}

/// Builds the graph for square inputs of `side` pixels. With `expert_logits`, a second output of that name gives
/// `[N, experts, K]`.
///
/// # Errors
/// Names the tensor that is missing, left over, of the wrong shape or out of range.
pub fn build(
    checkpoint: &Checkpoint,
    side: usize,
    expert_logits: bool,
    overrides: &Overrides,
) -> Result<Network, FoldError> {
    let family = family(checkpoint)?;
    let experts = if family == Family::MultiExpert { count(checkpoint, "layer3s.") } else { 1 };
    if experts > MAX_EXPERTS {
        return Err(FoldError::TooManyExperts(experts));
    }
    let layers = choose_layers(checkpoint, family, overrides)?;
    let arch = name(checkpoint, family, experts);
    if let Some(asked) = overrides.arch.as_ref().filter(|asked| **asked != arch) {
        return Err(FoldError::Arch { asked: asked.clone(), found: arch });
    }
    let mut builder = Builder {
        checkpoint,
        arch: &arch,
        layers: &layers,
        used: RefCell::default(),
        graph: Graph::new(side),
        normalized: Vec::new(),
        alphas: Vec::new(),
    };
    let (head, classes) = builder.network(family, experts, expert_logits)?;
    builder.finish()?;
    let Builder { graph, normalized, alphas, .. } = builder;
    Ok(Network { graph, family, head, experts, classes, normalized_layers: normalized, alphas, arch })
}

fn choose_layers(checkpoint: &Checkpoint, family: Family, overrides: &Overrides) -> Result<NbnLayers, FoldError> {
    let has_scale = checkpoint.tensors.contains_key(SCALE_FACTOR);
    let named = match (&overrides.nbn_layers, checkpoint.metadata.get("nbn.layers")) {
        (Some(layers), _) => Some(layers.clone()),
        (None, Some(text)) => Some(text.parse().map_err(FoldError::NbnLayers)?),
        (None, None) => None,
    };
    match named {
        Some(NbnLayers::None) | None if !has_scale => Ok(NbnLayers::None),
        Some(layers) if has_scale => Ok(layers),
        Some(layers) => Err(FoldError::NbnLayers(format!(
            "{layers} was asked for, but the checkpoint has no {SCALE_FACTOR}: it was not trained with NBN"
        ))),
        None if family == Family::MultiExpert => Ok(NbnLayers::LastStageAll),
        None => Ok(NbnLayers::LastStageOutputs),
    }
}

/// How many of `prefix0.…`, `prefix1.…` there are, counting up to the highest index.
fn count(checkpoint: &Checkpoint, prefix: &str) -> usize {
    let index = |name: &String| name.strip_prefix(prefix)?.split_once('.')?.0.parse::<usize>().ok();
    checkpoint.tensors.keys().filter_map(index).max().map_or(0, |highest| highest + 1)
}

fn name(checkpoint: &Checkpoint, family: Family, experts: usize) -> String {
    let shape =
        |key: &str, axis: usize| checkpoint.tensors.get(key).and_then(|t| t.shape.get(axis)).copied().unwrap_or(0);
    let stages: &[&str] = match family {
        Family::ImageNet => &["layer1.", "layer2.", "layer3.", "layer4."],
        Family::Cifar => &["layer1.", "layer2.", "layer3."],
        Family::MultiExpert => &["layer1.", "layer2.", "layer3s.0.", "layer4s.0."],
    };
    let blocks: usize = stages.iter().map(|stage| count(checkpoint, stage)).sum();
    let bottleneck = checkpoint.tensors.contains_key("layer1.0.conv3.weight");
    let depth = blocks * if bottleneck { 3 } else { 2 } + 2;
    let (width, per_group) = (shape("layer1.0.conv1.weight", 0), shape("layer1.0.conv2.weight", 1));
    let base = match (family, bottleneck, width, per_group) {
        (Family::Cifar, _, 16, _) => format!("cifar_resnet{depth}"),
        (Family::Cifar, ..) => format!("cifar_resnet{depth}_w{width}"),
        (_, _, 64, 64) => format!("resnet{depth}"),
        (_, true, 128, 128) => format!("wide_resnet{depth}_2"),
        (_, true, w, g) if g > 0 && g < w => format!("resnext{depth}_{}x{g}d", w / g),
        _ => format!("resnet{depth}_w{width}"),
    };
    if family == Family::MultiExpert { format!("{base}_ride{experts}") } else { base }
}

/// Where a norm stands, which decides whether it is normalised.
#[derive(Clone, Copy)]
struct Place {
    last_stage: bool,
    residual_output: bool,
    expert: usize,
}

struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    arch: &'a str,
    layers: &'a NbnLayers,
    used: RefCell<BTreeSet<String>>,
    graph: Graph,
    normalized: Vec<String>,
    alphas: Vec<Alpha>,
}

impl<'a> Builder<'a> {
    /// Returns the head and the number of classes.
    fn network(&mut self, family: Family, experts: usize, stack: bool) -> Result<(&'static str, usize), FoldError> {
        let stem = Place { last_stage: false, residual_output: false, expert: 0 };
        let kernel = if family == Family::Cifar { 3 } else { 7 };
        let stride = if family == Family::Cifar { 1 } else { 2 };
        let (mut x, mut channels) = self.conv("conv1", 0, 3, kernel, stride, 1)?;
        x = self.norm("bn1", x, channels, stem)?;
        x = self.graph.push("relu1", Op::Relu, &[x]);
        if family != Family::Cifar {
            x = self.graph.push("maxpool", Op::MaxPool, &[x]);
        }
        let stages = if family == Family::Cifar { 3 } else { 4 };
        let shared = if family == Family::MultiExpert { 2 } else { stages };
        for stage in 1..=shared {
            let place = Place { last_stage: stage == stages, ..stem };
            (x, channels) = self.stage(&format!("layer{stage}."), x, channels, stage, family, place)?;
        }
        if family != Family::MultiExpert {
            x = self.graph.push("avgpool", Op::GlobalAveragePool, &[x]);
            let (logits, head, classes) = self.head("fc", x, channels)?;
            self.graph.outputs.push(("logits".into(), logits));
            return Ok((head, classes));
        }
        let mut logits = Vec::new();
        let mut kind = None;
        for expert in 0..experts {
            let (mut y, mut width) = (x, channels);
            for stage in 3..=4 {
                let place = Place { last_stage: stage == 4, residual_output: false, expert };
                (y, width) = self.stage(&format!("layer{stage}s.{expert}."), y, width, stage, family, place)?;
            }
            y = self.graph.push(format!("avgpool.{expert}"), Op::GlobalAveragePool, &[y]);
            let (z, head, classes) = self.head(&format!("linears.{expert}"), y, width)?;
            let kind = kind.get_or_insert((head, classes));
            if *kind != (head, classes) {
                return Err(FoldError::Graph {
                    pass: "build",
                    node: format!("linears.{expert}"),
                    reason: format!("{head} head of {classes} classes; expert 0 has {} of {}", kind.0, kind.1),
                });
            }
            logits.push(z);
        }
        let mean = self.graph.push("experts.mean", Op::Mean, &logits);
        self.graph.outputs.push(("logits".into(), mean));
        if stack {
            let stacked = self.graph.push("experts.stack", Op::Stack, &logits);
            self.graph.outputs.push(("expert_logits".into(), stacked));
        }
        Ok(kind.unwrap_or(("linear", 0)))
    }

    fn stage(
        &mut self,
        prefix: &str,
        mut x: NodeId,
        mut channels: usize,
        stage: usize,
        family: Family,
        place: Place,
    ) -> Result<(NodeId, usize), FoldError> {
        for block in 0..count(self.checkpoint, prefix).max(1) {
            let stride = if stage > 1 && block == 0 { 2 } else { 1 };
            let name = format!("{prefix}{block}");
            (x, channels) = self.block(&name, x, channels, stride, family, place)?;
        }
        Ok((x, channels))
    }

    fn block(
        &mut self,
        name: &str,
        x: NodeId,
        channels: usize,
        stride: usize,
        family: Family,
        place: Place,
    ) -> Result<(NodeId, usize), FoldError> {
        let output = Place { residual_output: true, ..place };
        let bottleneck = self.has(&format!("{name}.conv3.weight"));
        let (kernel, first_stride) = if bottleneck { (1, 1) } else { (3, stride) };
        let (mut y, width) = self.conv(&format!("{name}.conv1"), x, channels, kernel, first_stride, 1)?;
        y = self.norm(&format!("{name}.bn1"), y, width, place)?;
        y = self.graph.push(format!("{name}.relu1"), Op::Relu, &[y]);
        let mut out;
        if bottleneck {
            let key = format!("{name}.conv2.weight");
            let per_group = self.checkpoint.tensors.get(&key).and_then(|t| t.shape.get(1)).copied().unwrap_or(width);
            let groups = if per_group > 0 && width % per_group == 0 { width / per_group } else { 1 };
            (y, out) = self.conv(&format!("{name}.conv2"), y, width, 3, stride, groups)?;
            y = self.norm(&format!("{name}.bn2"), y, out, place)?;
            y = self.graph.push(format!("{name}.relu2"), Op::Relu, &[y]);
            (y, out) = self.conv(&format!("{name}.conv3"), y, out, 1, 1, 1)?;
            y = self.norm(&format!("{name}.bn3"), y, out, output)?;
        } else {
            (y, out) = self.conv(&format!("{name}.conv2"), y, width, 3, 1, 1)?;
            y = self.norm(&format!("{name}.bn2"), y, out, output)?;
        }
        let changes = stride != 1 || out != channels;
        let has_projection = self.has(&format!("{name}.downsample.0.weight"));
        let shortcut = if has_projection || (changes && family != Family::Cifar) {
            let (z, width) = self.conv(&format!("{name}.downsample.0"), x, channels, 1, stride, 1)?;
            self.norm(&format!("{name}.downsample.1"), z, width, output)?
        } else if changes {
            let added = out.saturating_sub(channels);
            let op = Op::SubsamplePad { stride, before: added / 2, after: added - added / 2 };
            self.graph.push(format!("{name}.shortcut"), op, &[x])
        } else {
            x
        };
        let sum = self.graph.push(format!("{name}.add"), Op::Add, &[y, shortcut]);
        Ok((self.graph.push(format!("{name}.relu"), Op::Relu, &[sum]), out))
    }

    /// A convolution without bias and its number of output channels.
    fn conv(
        &mut self,
        name: &str,
        x: NodeId,
        channels: usize,
        kernel: usize,
        stride: usize,
        groups: usize,
    ) -> Result<(NodeId, usize), FoldError> {
        let key = format!("{name}.weight");
        let tensor = self.take(&key)?;
        let per_group = channels / groups;
        let unfit = || FoldError::Shape {
            name: key.clone(),
            found: tensor.shape.clone(),
            expected: format!("[n, {per_group}, {kernel}, {kernel}]"),
        };
        let [out, c, h, w] = tensor.shape[..] else { return Err(unfit()) };
        if out == 0 || c != per_group || h != kernel || w != kernel || out % groups != 0 {
            return Err(unfit());
        }
        let weight = Array4::from_shape_vec((out, c, h, w), tensor.values.clone()).map_err(|_| unfit())?;
        let op = Op::Conv { weight, bias: None, stride, padding: kernel / 2, groups };
        Ok((self.graph.push(name, op, &[x]), out))
    }

    fn norm(&mut self, name: &str, x: NodeId, channels: usize, place: Place) -> Result<NodeId, FoldError> {
        let norm = BatchNorm {
            weight: self.vector(&format!("{name}.weight"), channels)?,
            bias: self.vector(&format!("{name}.bias"), channels)?,
            mean: self.vector(&format!("{name}.running_mean"), channels)?,
            variance: self.variance(name, channels)?,
        };
        let normalized = match self.layers {
            NbnLayers::LastStageOutputs => place.last_stage && place.residual_output,
            NbnLayers::LastStageAll => place.last_stage,
            NbnLayers::All => true,
            NbnLayers::None => false,
            NbnLayers::Named(names) => names.iter().any(|n| n == name),
        };
        if !normalized {
            return Ok(self.graph.push(name, Op::BatchNorm(norm), &[x]));
        }
        let alpha = self.alpha(place.expert)?;
        self.normalized.push(name.into());
        Ok(self.graph.push(name, Op::NormalizedBatchNorm { directions: norm, alpha }, &[x]))
    }

    /// The acting element of the shared magnitudes; the others decay in training and mean nothing.
    fn alpha(&mut self, index: usize) -> Result<f64, FoldError> {
        let tensor = self.take(SCALE_FACTOR)?;
        let value = tensor.values.get(index).copied().ok_or_else(|| FoldError::Shape {
            name: SCALE_FACTOR.into(),
            found: tensor.shape.clone(),
            expected: format!("at least {} elements", index + 1),
        })?;
        let value = f64::from(value);
        if !self.alphas.iter().any(|a| a.index == index) {
            self.alphas.push(Alpha { index, value });
        }
        Ok(value)
    }

    /// The classifier, with the BatchNorm over its logits where there is one.
    fn head(&mut self, name: &str, x: NodeId, features: usize) -> Result<(NodeId, &'static str, usize), FoldError> {
        let key = format!("{name}.weight");
        let tensor = self.take(&key)?;
        let unfit = || FoldError::Shape {
            name: key.clone(),
            found: tensor.shape.clone(),
            expected: format!("[classes, {features}] with at least 2 classes"),
        };
        let [classes, f] = tensor.shape[..] else { return Err(unfit()) };
        if f != features || classes < 2 {
            return Err(unfit());
        }
        let values = tensor.values.iter().map(|&w| f64::from(w)).collect();
        let weight = Array2::from_shape_vec((classes, f), values).map_err(|_| unfit())?;
        let bias = self.vector(&format!("{name}.bias"), classes)?;
        let logits = self.graph.push(name, Op::Gemm { weight, bias }, &[x]);
        let bn = format!("{name}.bn");
        if !self.has(&format!("{bn}.running_mean")) {
            return Ok((logits, "linear", classes));
        }
        let affine = self.has(&format!("{bn}.weight"));
        let norm = BatchNorm {
            weight: if affine { self.vector(&format!("{bn}.weight"), classes)? } else { vec![1.0; classes] },
            bias: if affine { self.vector(&format!("{bn}.bias"), classes)? } else { vec![0.0; classes] },
            mean: self.vector(&format!("{bn}.running_mean"), classes)?,
            variance: self.variance(&bn, classes)?,
        };
        let head = if affine { "lr-affine" } else { "lr-plain" };
        Ok((self.graph.push(bn, Op::BatchNorm(norm), &[logits]), head, classes))
    }

    fn variance(&self, name: &str, channels: usize) -> Result<Vec<f64>, FoldError> {
        let key = format!("{name}.running_var");
        let variance = self.vector(&key, channels)?;
        match variance.iter().position(|&v| v < 0.0) {
            Some(channel) => Err(FoldError::NegativeVariance { name: key, channel, value: variance[channel] }),
            None => Ok(variance),
        }
    }

    fn vector(&self, key: &str, length: usize) -> Result<Vec<f64>, FoldError> {
        let tensor = self.take(key)?;
        if tensor.shape != [length] {
            let (found, expected) = (tensor.shape.clone(), format!("[{length}]"));
            return Err(FoldError::Shape { name: key.into(), found, expected });
        }
        Ok(tensor.values.iter().map(|&v| f64::from(v)).collect())
    }

    fn has(&self, key: &str) -> bool {
        self.checkpoint.tensors.contains_key(key)
    }

    fn take(&self, key: &str) -> Result<&'a Tensor, FoldError> {
        self.used.borrow_mut().insert(key.to_owned());
        self.checkpoint.tensors.get(key).ok_or_else(|| FoldError::Missing { name: key.into(), arch: self.arch.into() })
    }

    /// Every tensor has been used, and every named layer met.
    fn finish(&self) -> Result<(), FoldError> {
        let used = self.used.borrow();
        let left: Vec<&str> = self
            .checkpoint
            .tensors
            .keys()
            .map(String::as_str)
            .filter(|key| !used.contains(*key) && *key != SCALE_FACTOR)
            .collect();
        if !left.is_empty() {
            let mut names = left.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            if left.len() > 5 {
                names += &format!(" and {} more", left.len() - 5);
            }
            return Err(FoldError::Unexpected { names, arch: self.arch.into() });
        }
        if let NbnLayers::Named(names) = self.layers
            && let Some(unknown) = names.iter().find(|n| !self.normalized.contains(n))
        {
            return Err(FoldError::NbnLayers(format!("{} has no BatchNorm named {unknown}", self.arch)));
        }
        Ok(())
    }
}
