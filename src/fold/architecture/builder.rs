//! Builds the graph from the tensors, strictly: every tensor has a place and every place a tensor.

use std::cell::RefCell;
use std::collections::BTreeSet;

use ndarray::Array4;

use super::super::checkpoint::Tensor;
use super::super::graph::{BatchNorm, NodeId, Op};
use super::super::{Checkpoint, FoldError, Graph};
use super::classifier::Weights;
use super::{
    Activation, Extras, Family, GlobalPool, Layout, Magnitude, NbnLayers, Overrides, SCALE_FACTOR, StemPool, StrideIn,
    count,
};
use crate::bundle::{Alpha, Head};
use crate::runtime::FEATURES;

/// Where a norm stands, which decides whether it is normalised.
#[derive(Clone, Copy)]
struct Site {
    last_stage: bool,
    stage: usize,
    residual_output: bool,
    expert: usize,
}

/// What a [`Builder`] has built.
pub(super) struct Built {
    pub(super) graph: Graph,
    pub(super) normalized: Vec<String>,
    pub(super) magnitude_indices: Vec<usize>,
    pub(super) alphas: Vec<Alpha>,
    pub(super) assumed: Vec<String>,
}

pub(super) struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    arch: &'a str,
    layers: &'a NbnLayers,
    magnitude: Magnitude,
    overrides: &'a Overrides,
    used: RefCell<BTreeSet<String>>,
    /// The groups of layers met so far that share a magnitude: expert, stage, and the layer's number.
    groups: Vec<(usize, usize, usize)>,
    built: Built,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        arch: &'a str,
        layers: &'a NbnLayers,
        magnitude: Magnitude,
        overrides: &'a Overrides,
        side: usize,
    ) -> Self {
        let mut graph = Graph::new(side);
        graph.batch_norm_epsilon = overrides.batch_norm_epsilon.unwrap_or(graph.batch_norm_epsilon);
        let built = Built {
            graph,
            normalized: Vec::new(),
            magnitude_indices: Vec::new(),
            alphas: Vec::new(),
            assumed: Vec::new(),
        };
        Self { checkpoint, arch, layers, magnitude, overrides, used: RefCell::default(), groups: Vec::new(), built }
    }

    /// Returns the head and the number of classes.
    pub(super) fn network(&mut self, layout: &Layout, extras: Extras) -> Result<(Head, usize), FoldError> {
        let stem = Site { last_stage: false, stage: 0, residual_output: false, expert: 0 };
        let small = layout.family == Family::Cifar;
        let kernel = if small { 3 } else { 7 };
        let stride = self.overrides.stem_stride.unwrap_or(if small { 1 } else { 2 });
        let (mut x, mut channels) = self.conv("conv1", 0, 3, kernel, stride, 1)?;
        x = self.norm("bn1", x, channels, stem)?;
        x = self.activation("relu1", x);
        let pool = self.overrides.stem_pool.unwrap_or(if small { StemPool::None } else { StemPool::Max });
        if pool == StemPool::Max {
            x = self.built.graph.push("maxpool", Op::MaxPool, &[x]);
        }
        self.assume(layout, pool);
        let place = |stage: usize, expert| Site { last_stage: stage == layout.stages, stage, expert, ..stem };
        for stage in 1..layout.split {
            (x, channels) = self.stage(&layout.prefix(stage, 0), x, channels, layout, place(stage, 0))?;
        }
        if !layout.has_experts {
            x = self.global_pool("avgpool".into(), x);
            let (logits, head, classes) = self.head("fc", x, channels)?;
            self.built.graph.outputs.push(("logits".into(), logits));
            if extras.features {
                self.built.graph.outputs.push((FEATURES.into(), x));
            }
            return Ok((head, classes));
        }
        let (mut logits, mut features) = (Vec::new(), Vec::new());
        let mut kind = None;
        for expert in 0..layout.experts {
            let (mut y, mut width) = (x, channels);
            for stage in layout.split..=layout.stages {
                let place = place(stage, expert);
                (y, width) = self.stage(&layout.prefix(stage, expert), y, width, layout, place)?;
            }
            y = self.global_pool(format!("avgpool.{expert}"), y);
            let (z, head, classes) = self.head(&format!("linears.{expert}"), y, width)?;
            let kind = kind.get_or_insert((head, classes));
            if *kind != (head, classes) {
                return Err(FoldError::Graph {
                    pass: "build",
                    node: format!("linears.{expert}"),
                    reason: format!(
                        "it has a {head} head with {classes} classes; expert 0 has a {} head with {}",
                        kind.0, kind.1
                    ),
                });
            }
            logits.push(z);
            features.push(y);
        }
        self.suppose(format!("the mean of the logits of {} experts", layout.experts));
        let mean = self.built.graph.push("experts.mean", Op::Mean, &logits);
        self.built.graph.outputs.push(("logits".into(), mean));
        if extras.expert_logits {
            let stacked = self.built.graph.push("experts.stack", Op::Stack, &logits);
            self.built.graph.outputs.push(("expert_logits".into(), stacked));
        }
        if extras.features {
            let all = self.built.graph.push(FEATURES, Op::Concat, &features);
            self.built.graph.outputs.push((FEATURES.into(), all));
        }
        Ok(kind.unwrap_or((Head::Linear, 0)))
    }

    /// Notes what the network is taken to do that no name tells.
    fn suppose(&mut self, what: String) {
        if !self.built.assumed.contains(&what) {
            self.built.assumed.push(what);
        }
    }

    fn assume(&mut self, layout: &Layout, pool: StemPool) {
        let stride = self.overrides.stem_stride.unwrap_or(if layout.family == Family::Cifar { 1 } else { 2 });
        self.suppose(format!("inputs as they are after mean and deviation, a stem of stride {stride}"));
        self.suppose(match pool {
            StemPool::Max => "a max-pool behind the stem".into(),
            StemPool::None => "no pooling behind the stem".into(),
        });
        let activation = self.overrides.activation.unwrap_or_default();
        self.suppose(format!("{activation} behind norms and sums"));
        if self.has("layer1.0.conv3.weight") {
            let stride_in = match self.overrides.stride_in.unwrap_or_default() {
                StrideIn::Conv1 => "conv1",
                StrideIn::Conv2 => "conv2",
            };
            self.suppose(format!("stride in {stride_in} of the first block of a stage"));
        }
        self.suppose(format!("stride 2 in stages 2 to {}, no dilation, no blur", layout.stages));
        self.suppose(format!("BatchNorm's epsilon {:e}", self.built.graph.batch_norm_epsilon));
        self.suppose(match self.overrides.global_pool.unwrap_or_default() {
            GlobalPool::Average => "the average over the last map".into(),
            GlobalPool::Max => "the maximum over the last map".into(),
        });
    }

    fn activation(&mut self, name: impl Into<String>, x: NodeId) -> NodeId {
        let op = match self.overrides.activation.unwrap_or_default() {
            Activation::Relu => Op::Relu,
            Activation::LeakyRelu { slope } => Op::LeakyRelu { slope },
            Activation::Silu => Op::Silu,
        };
        self.built.graph.push(name, op, &[x])
    }

    fn global_pool(&mut self, name: String, x: NodeId) -> NodeId {
        let op = match self.overrides.global_pool.unwrap_or_default() {
            GlobalPool::Average => Op::GlobalAveragePool,
            GlobalPool::Max => Op::GlobalMaxPool,
        };
        self.built.graph.push(name, op, &[x])
    }

    fn stage(
        &mut self,
        prefix: &str,
        mut x: NodeId,
        mut channels: usize,
        layout: &Layout,
        place: Site,
    ) -> Result<(NodeId, usize), FoldError> {
        for block in 0..count(self.checkpoint, prefix).max(1) {
            let stride = if place.stage > 1 && block == 0 { 2 } else { 1 };
            let name = format!("{prefix}{block}");
            (x, channels) = self.block(&name, x, channels, stride, layout, place)?;
        }
        Ok((x, channels))
    }

    fn block(
        &mut self,
        name: &str,
        x: NodeId,
        channels: usize,
        stride: usize,
        layout: &Layout,
        place: Site,
    ) -> Result<(NodeId, usize), FoldError> {
        let output = Site { residual_output: true, ..place };
        let bottleneck = self.has(&format!("{name}.conv3.weight"));
        let first = !bottleneck || self.overrides.stride_in == Some(StrideIn::Conv1);
        let (first_stride, second_stride) = if first { (stride, 1) } else { (1, stride) };
        let kernel = if bottleneck { 1 } else { 3 };
        let (mut y, width) = self.conv(&format!("{name}.conv1"), x, channels, kernel, first_stride, 1)?;
        y = self.norm(&format!("{name}.bn1"), y, width, place)?;
        y = self.activation(format!("{name}.relu1"), y);
        let mut out;
        if bottleneck {
            let key = format!("{name}.conv2.weight");
            let per_group = self.checkpoint.tensors.get(&key).and_then(|t| t.shape.get(1)).copied().unwrap_or(width);
            let groups = if per_group > 0 && width % per_group == 0 { width / per_group } else { 1 };
            (y, out) = self.conv(&format!("{name}.conv2"), y, width, 3, second_stride, groups)?;
            y = self.norm(&format!("{name}.bn2"), y, out, place)?;
            y = self.activation(format!("{name}.relu2"), y);
            (y, out) = self.conv(&format!("{name}.conv3"), y, out, 1, 1, 1)?;
            y = self.norm(&format!("{name}.bn3"), y, out, output)?;
        } else {
            (y, out) = self.conv(&format!("{name}.conv2"), y, width, 3, 1, 1)?;
            y = self.norm(&format!("{name}.bn2"), y, out, output)?;
        }
        let changes = stride != 1 || out != channels;
        let has_projection = self.has(&format!("{name}.downsample.0.weight"));
        let shortcut = if has_projection || (changes && layout.stages != 3) {
            self.suppose("shortcuts that are convolutions with the stride in them".into());
            let (z, width) = self.conv(&format!("{name}.downsample.0"), x, channels, 1, stride, 1)?;
            self.norm(&format!("{name}.downsample.1"), z, width, output)?
        } else if changes {
            let added = out.saturating_sub(channels);
            let op = Op::SubsamplePad { stride, before: added / 2, after: added - added / 2 };
            self.suppose("shortcuts without weights (option A), half of the new channels on either side".into());
            self.built.graph.push(format!("{name}.shortcut"), op, &[x])
        } else {
            x
        };
        let sum = self.built.graph.push(format!("{name}.add"), Op::Add, &[y, shortcut]);
        Ok((self.activation(format!("{name}.relu"), sum), out))
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
        let unfit = || self.unfit(&key, tensor, format!("[n, {per_group}, {kernel}, {kernel}]"));
        let [out, c, h, w] = tensor.shape[..] else { return Err(unfit()) };
        if out == 0 || c != per_group || h != kernel || w != kernel || out % groups != 0 {
            return Err(unfit());
        }
        let weight = Array4::from_shape_vec((out, c, h, w), tensor.values.clone()).map_err(|_| unfit())?;
        let op = Op::Conv { weight, bias: None, stride, padding: kernel / 2, groups };
        Ok((self.built.graph.push(name, op, &[x]), out))
    }

    fn norm(&mut self, name: &str, x: NodeId, channels: usize, place: Site) -> Result<NodeId, FoldError> {
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
            NbnLayers::Named(names) => names.iter().any(|n| n == name || self.is_own_name(n, name)),
        };
        if !normalized {
            return Ok(self.built.graph.push(name, Op::BatchNorm(norm), &[x]));
        }
        let index = self.magnitude_index(place);
        let alpha = self.alpha(index)?;
        self.built.normalized.push(name.into());
        self.built.magnitude_indices.push(index);
        Ok(self.built.graph.push(name, Op::NormalizedBatchNorm { directions: norm, alpha }, &[x]))
    }

    /// The element of `scale_factor` that acts on the next normalised layer, which stands at `place`.
    fn magnitude_index(&mut self, place: Site) -> usize {
        let group = match self.magnitude {
            Magnitude::Expert => return place.expert,
            Magnitude::Stage => (place.expert, place.stage, 0),
            Magnitude::Layer => (place.expert, place.stage, self.built.normalized.len()),
        };
        self.groups.iter().position(|g| *g == group).unwrap_or_else(|| {
            self.groups.push(group);
            self.groups.len() - 1
        })
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
        if !self.built.alphas.iter().any(|a| a.index == index) {
            self.built.alphas.push(Alpha { index, value });
        }
        Ok(value)
    }

    /// The classifier, with the BatchNorm over its logits where there is one.
    fn head(&mut self, name: &str, x: NodeId, features: usize) -> Result<(NodeId, Head, usize), FoldError> {
        let Weights { weight, bias, squashed, assumed } = self.classifier(name, features)?;
        let classes = bias.len();
        self.suppose(assumed);
        let mut y = x;
        let mut head = Head::Linear;
        if let Some(squashed) = squashed {
            y = self.built.graph.push(format!("{name}.direction"), Op::Normalize { squashed }, &[x]);
            head = Head::Cosine;
        }
        let logits = self.built.graph.push(name, Op::Gemm { weight, bias }, &[y]);
        let bn = format!("{name}.bn");
        if !self.has(&format!("{bn}.running_mean")) {
            return Ok((logits, head, classes));
        }
        self.suppose("a BatchNorm over the logits (logit rectification), not over the features".into());
        let affine = self.has(&format!("{bn}.weight"));
        let norm = BatchNorm {
            weight: if affine { self.vector(&format!("{bn}.weight"), classes)? } else { vec![1.0; classes] },
            bias: if affine { self.vector(&format!("{bn}.bias"), classes)? } else { vec![0.0; classes] },
            mean: self.vector(&format!("{bn}.running_mean"), classes)?,
            variance: self.variance(&bn, classes)?,
        };
        let head = if affine { Head::LrAffine } else { Head::LrPlain };
        Ok((self.built.graph.push(bn, Op::BatchNorm(norm), &[logits]), head, classes))
    }

    fn variance(&self, name: &str, channels: usize) -> Result<Vec<f64>, FoldError> {
        let key = format!("{name}.running_var");
        let variance = self.vector(&key, channels)?;
        match variance.iter().position(|&v| v < 0.0) {
            Some(channel) => {
                let name = self.checkpoint.own_name(&key).to_owned();
                Err(FoldError::NegativeVariance { name, channel, value: variance[channel] })
            }
            None => Ok(variance),
        }
    }

    pub(super) fn vector(&self, key: &str, length: usize) -> Result<Vec<f64>, FoldError> {
        let tensor = self.take(key)?;
        if tensor.shape != [length] {
            return Err(self.unfit(key, tensor, format!("[{length}]")));
        }
        Ok(tensor.values.iter().map(|&v| f64::from(v)).collect())
    }

    pub(super) fn unfit(&self, key: &str, tensor: &Tensor, expected: String) -> FoldError {
        FoldError::Shape { name: self.checkpoint.own_name(key).to_owned(), found: tensor.shape.clone(), expected }
    }

    /// Whether the file has it, in a form that is read or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.checkpoint.tensors.contains_key(key) || self.checkpoint.unread.contains_key(key)
    }

    pub(super) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    pub(super) fn overrides(&self) -> &'a Overrides {
        self.overrides
    }

    pub(super) fn take(&self, key: &str) -> Result<&'a Tensor, FoldError> {
        self.used.borrow_mut().insert(key.to_owned());
        self.checkpoint.tensors.get(key).ok_or_else(|| match self.checkpoint.unread.get(key) {
            Some(kind) => {
                FoldError::ElementType { name: self.checkpoint.own_name(key).to_owned(), dtype: kind.clone() }
            }
            None => {
                let likely = likely(self.checkpoint, key);
                let name = match &self.checkpoint.root {
                    Some(root) if root != "." => format!("{root}.{key}"),
                    _ => key.to_owned(),
                };
                FoldError::Missing { name, arch: self.arch.into(), likely }
            }
        })
    }

    /// Whether `asked` is how the file itself calls the layer `name`.
    fn is_own_name(&self, asked: &str, name: &str) -> bool {
        let own = self.checkpoint.own_name(&format!("{name}.weight")).trim_end_matches(".weight").to_owned();
        let root = self.checkpoint.root.as_deref().filter(|root| *root != ".").unwrap_or_default();
        own == asked || own.strip_prefix(root).map(|own| own.trim_start_matches('.')) == Some(asked)
    }

    /// The graph, when every tensor has been used, and every named layer met.
    pub(super) fn finish(self) -> Result<Built, FoldError> {
        let used = self.used.borrow();
        let left: Vec<&str> = self
            .checkpoint
            .tensors
            .keys()
            .filter(|key| !used.contains(*key) && *key != SCALE_FACTOR)
            .map(|key| self.checkpoint.own_name(key))
            .collect();
        if !left.is_empty() {
            let mut names = left.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            if left.len() > 5 {
                names += &format!(" and {} more", left.len() - 5);
            }
            if left.iter().any(|name| name.contains("expert_help_pred")) {
                names += "; they choose how many experts look at a picture: with --ignore expert_help_pred all do, and their \
                          mean is served";
            }
            return Err(FoldError::Unexpected { names, arch: self.arch.into() });
        }
        drop(used);
        let is_met = |asked: &String| self.built.normalized.iter().any(|n| n == asked || self.is_own_name(asked, n));
        if let NbnLayers::Named(names) = self.layers
            && let Some(unknown) = names.iter().find(|name| !is_met(name))
        {
            return Err(FoldError::NbnLayers(format!("{} has no BatchNorm named {unknown}", self.arch)));
        }
        Ok(self.built)
    }
}

/// Least likeness of two names, from 0 to 1, of which one may be meant by the other.
const ALIKE: f64 = 0.6;

/// The tensor in the file that is most likely called `key` there, among those that have no place under their own names.
fn likely(checkpoint: &Checkpoint, key: &str) -> Option<String> {
    if let (Some(part), Some(classifier)) = (key.strip_prefix("fc."), checkpoint.likely_classifiers.first()) {
        return Some(format!("{classifier}.{part} (--classifier {classifier})"));
    }
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let strange = checkpoint.tensors.keys().filter(|name| !is_place(name) && last(name) == last(key));
    let alike = |name: &String| (strsim::normalized_levenshtein(name, key), name.clone());
    let best = strange.map(alike).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then(|| checkpoint.own_name(&best.1).to_owned())
}

/// Whether some network here has a tensor of this name.
fn is_place(name: &str) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    match parts.as_slice() {
        [first, ..] if ["conv1", "bn1", "fc", "linears", SCALE_FACTOR].contains(first) => true,
        [stage, rest @ ..] if stage.starts_with("layer") => {
            let known = ["conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "downsample"];
            rest.iter().any(|part| known.contains(part))
        }
        _ => false,
    }
}
