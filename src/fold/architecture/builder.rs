//! Builds the graph from the tensors, strictly: every tensor has a place and every place a tensor.

use std::cell::RefCell;
use std::collections::BTreeSet;

use ndarray::{Array2, Array4};

use super::super::checkpoint::Tensor;
use super::super::graph::{BatchNorm, NodeId, Op};
use super::super::{Checkpoint, FoldError, Graph};
use super::{Extras, Family, Magnitude, NbnLayers, SCALE_FACTOR, count};
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
}

pub(super) struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    arch: &'a str,
    layers: &'a NbnLayers,
    magnitude: Magnitude,
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
        side: usize,
    ) -> Self {
        let graph = Graph::new(side);
        let built = Built { graph, normalized: Vec::new(), magnitude_indices: Vec::new(), alphas: Vec::new() };
        Self { checkpoint, arch, layers, magnitude, used: RefCell::default(), groups: Vec::new(), built }
    }

    /// Returns the head and the number of classes.
    pub(super) fn network(
        &mut self,
        family: Family,
        experts: usize,
        extras: Extras,
    ) -> Result<(Head, usize), FoldError> {
        let stem = Site { last_stage: false, stage: 0, residual_output: false, expert: 0 };
        let kernel = if family == Family::Cifar { 3 } else { 7 };
        let stride = if family == Family::Cifar { 1 } else { 2 };
        let (mut x, mut channels) = self.conv("conv1", 0, 3, kernel, stride, 1)?;
        x = self.norm("bn1", x, channels, stem)?;
        x = self.built.graph.push("relu1", Op::Relu, &[x]);
        if family != Family::Cifar {
            x = self.built.graph.push("maxpool", Op::MaxPool, &[x]);
        }
        let stages = if family == Family::Cifar { 3 } else { 4 };
        let shared = if family == Family::MultiExpert { 2 } else { stages };
        for stage in 1..=shared {
            let place = Site { last_stage: stage == stages, stage, ..stem };
            (x, channels) = self.stage(&format!("layer{stage}."), x, channels, stage, family, place)?;
        }
        if family != Family::MultiExpert {
            x = self.built.graph.push("avgpool", Op::GlobalAveragePool, &[x]);
            let (logits, head, classes) = self.head("fc", x, channels)?;
            self.built.graph.outputs.push(("logits".into(), logits));
            if extras.features {
                self.built.graph.outputs.push((FEATURES.into(), x));
            }
            return Ok((head, classes));
        }
        let (mut logits, mut features) = (Vec::new(), Vec::new());
        let mut kind = None;
        for expert in 0..experts {
            let (mut y, mut width) = (x, channels);
            for stage in 3..=4 {
                let place = Site { last_stage: stage == 4, stage, residual_output: false, expert };
                (y, width) = self.stage(&format!("layer{stage}s.{expert}."), y, width, stage, family, place)?;
            }
            y = self.built.graph.push(format!("avgpool.{expert}"), Op::GlobalAveragePool, &[y]);
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

    fn stage(
        &mut self,
        prefix: &str,
        mut x: NodeId,
        mut channels: usize,
        stage: usize,
        family: Family,
        place: Site,
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
        place: Site,
    ) -> Result<(NodeId, usize), FoldError> {
        let output = Site { residual_output: true, ..place };
        let bottleneck = self.has(&format!("{name}.conv3.weight"));
        let (kernel, first_stride) = if bottleneck { (1, 1) } else { (3, stride) };
        let (mut y, width) = self.conv(&format!("{name}.conv1"), x, channels, kernel, first_stride, 1)?;
        y = self.norm(&format!("{name}.bn1"), y, width, place)?;
        y = self.built.graph.push(format!("{name}.relu1"), Op::Relu, &[y]);
        let mut out;
        if bottleneck {
            let key = format!("{name}.conv2.weight");
            let per_group = self.checkpoint.tensors.get(&key).and_then(|t| t.shape.get(1)).copied().unwrap_or(width);
            let groups = if per_group > 0 && width % per_group == 0 { width / per_group } else { 1 };
            (y, out) = self.conv(&format!("{name}.conv2"), y, width, 3, stride, groups)?;
            y = self.norm(&format!("{name}.bn2"), y, out, place)?;
            y = self.built.graph.push(format!("{name}.relu2"), Op::Relu, &[y]);
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
            self.built.graph.push(format!("{name}.shortcut"), op, &[x])
        } else {
            x
        };
        let sum = self.built.graph.push(format!("{name}.add"), Op::Add, &[y, shortcut]);
        Ok((self.built.graph.push(format!("{name}.relu"), Op::Relu, &[sum]), out))
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
            NbnLayers::Named(names) => names.iter().any(|n| n == name),
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
        let logits = self.built.graph.push(name, Op::Gemm { weight, bias }, &[x]);
        let bn = format!("{name}.bn");
        if !self.has(&format!("{bn}.running_mean")) {
            return Ok((logits, Head::Linear, classes));
        }
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

    /// The graph, when every tensor has been used, and every named layer met.
    pub(super) fn finish(self) -> Result<Built, FoldError> {
        let used = self.used.into_inner();
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
            && let Some(unknown) = names.iter().find(|n| !self.built.normalized.contains(n))
        {
            return Err(FoldError::NbnLayers(format!("{} has no BatchNorm named {unknown}", self.arch)));
        }
        Ok(self.built)
    }
}
