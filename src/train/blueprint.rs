//! The tensors of a network that is to be trained, by name and at their random start.
//!
//! Only names, shapes and starting values stand here. What the network computes is read off them by
//! [`crate::fold::architecture`], the same code that reads a checkpoint: what is trained is what is folded.

use std::f64::consts::TAU;

use fastrand::Rng;

use super::TrainError;
use super::arch::{Arch, IMAGENET_DEPTHS};
use super::recipe::{BiasStart, Head, Recipe, Shortcut};
use crate::fold::Checkpoint;
use crate::fold::architecture::{
    self, Extras, LAYERS_KEY, MAGNITUDE_KEY, Magnitude, NbnLayers, Network, Overrides, SCALE_FACTOR,
};
use crate::fold::checkpoint::Tensor;

/// Length of `scale_factor` in the authors' single networks; element 0 acts.
const SINGLE_MAGNITUDES: usize = 20;
/// Length of `scale_factor` in the authors' multi-expert networks; element e acts for expert e.
const EXPERT_MAGNITUDES: usize = 111;

/// A network at its random start: the recipe's, for `classes` classes and inputs of `side` pixels.
///
/// # Errors
/// When the recipe names layers that the network has not.
pub fn start(recipe: &Recipe, classes: usize, side: usize) -> Result<(Checkpoint, Network), TrainError> {
    let mut start = Start { checkpoint: Checkpoint::default(), rng: Rng::with_seed(recipe.seed), norms: 0 };
    match recipe.arch {
        Arch::Cifar { depth, width } => start.cifar(depth, width, recipe.shortcut),
        Arch::ImageNet { depth, groups, per_group, experts } => start.imagenet(depth, groups, per_group, experts),
    }
    match recipe.arch {
        Arch::Cifar { width, .. } => start.head("fc", 4 * width, classes, recipe.head),
        Arch::ImageNet { depth, experts: 1, .. } => start.head("fc", features(depth), classes, recipe.head),
        Arch::ImageNet { depth, experts, .. } => {
            (0..experts).for_each(|e| start.head(&format!("linears.{e}"), features(depth), classes, recipe.head))
        }
    }
    let experts = matches!(recipe.arch, Arch::ImageNet { experts, .. } if experts > 1);
    let Start { mut checkpoint, mut rng, norms } = start;
    let layers = recipe.normalized();
    if layers != NbnLayers::None {
        let least = if experts { EXPERT_MAGNITUDES } else { SINGLE_MAGNITUDES };
        let magnitudes = if recipe.magnitude == Magnitude::Expert { least } else { least.max(norms) };
        checkpoint.tensors.insert(
            SCALE_FACTOR.into(),
            Tensor { shape: vec![magnitudes], values: vec![recipe.magnitude_start; magnitudes] },
        );
        checkpoint.metadata.insert(MAGNITUDE_KEY.into(), recipe.magnitude.to_string());
    }
    checkpoint.metadata.insert(LAYERS_KEY.into(), layers.to_string());
    let extras = Extras { expert_logits: true, features: false };
    let network = architecture::build(&checkpoint, side, extras, &Overrides::default())?;
    if recipe.bias_start == BiasStart::Normal {
        for layer in &network.normalized_layers {
            if let Some(bias) = checkpoint.tensors.get_mut(&format!("{layer}.bias")) {
                let deviation = (bias.values.len() as f64).powf(-0.5);
                bias.values.iter_mut().for_each(|b| *b = (deviation * normal(&mut rng)) as f32);
            }
        }
    }
    Ok((checkpoint, network))
}

fn features(depth: usize) -> usize {
    if depth < 50 { 512 } else { 2048 }
}

/// A draw from the standard normal distribution, by the method of Box and Muller.
pub(super) fn normal(rng: &mut Rng) -> f64 {
    (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (TAU * rng.f64()).cos()
}

struct Start {
    checkpoint: Checkpoint,
    rng: Rng,
    norms: usize,
}

impl Start {
    fn put(&mut self, name: String, shape: &[usize], value: impl FnMut(&mut Rng) -> f64) {
        let mut value = value;
        let values = (0..shape.iter().product::<usize>()).map(|_| value(&mut self.rng) as f32).collect();
        self.checkpoint.tensors.insert(name, Tensor { shape: shape.to_vec(), values });
    }

    /// He's normal start over the outputs ("fan out"), as torchvision's ResNets have it (arXiv 1502.01852).
    fn conv(&mut self, name: &str, out: usize, per_group: usize, kernel: usize) {
        let deviation = (2.0 / (out * kernel * kernel) as f64).sqrt();
        self.put(format!("{name}.weight"), &[out, per_group, kernel, kernel], |rng| deviation * normal(rng));
    }

    fn norm(&mut self, name: &str, channels: usize) {
        for (part, value) in [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)] {
            self.put(format!("{name}.{part}"), &[channels], |_| value);
        }
        self.norms += 1;
    }

    fn cifar(&mut self, depth: usize, width: usize, shortcut: Shortcut) {
        self.conv("conv1", width, 3, 3);
        self.norm("bn1", width);
        let mut channels = width;
        for stage in 1..=3 {
            let out = width << (stage - 1);
            for block in 0..(depth - 2) / 6 {
                let name = format!("layer{stage}.{block}");
                self.conv(&format!("{name}.conv1"), out, channels, 3);
                self.norm(&format!("{name}.bn1"), out);
                self.conv(&format!("{name}.conv2"), out, out, 3);
                self.norm(&format!("{name}.bn2"), out);
                if shortcut == Shortcut::B && stage > 1 && block == 0 {
                    self.projection(&name, channels, out);
                }
                channels = out;
            }
        }
    }

    fn projection(&mut self, block: &str, channels: usize, out: usize) {
        self.conv(&format!("{block}.downsample.0"), out, channels, 1);
        self.norm(&format!("{block}.downsample.1"), out);
    }

    fn imagenet(&mut self, depth: usize, groups: usize, per_group: usize, experts: usize) {
        self.conv("conv1", 64, 3, 7);
        self.norm("bn1", 64);
        let blocks = IMAGENET_DEPTHS.iter().find(|(d, _)| *d == depth).map_or([2; 4], |(_, blocks)| *blocks);
        let shared = if experts > 1 { 2 } else { 4 };
        let mut channels = 64;
        for stage in 1..=shared {
            channels = self.stage(&format!("layer{stage}"), stage, blocks, channels, depth, groups, per_group);
        }
        for expert in 0..if experts > 1 { experts } else { 0 } {
            let mut own = channels;
            for stage in 3..=4 {
                own = self.stage(&format!("layer{stage}s.{expert}"), stage, blocks, own, depth, groups, per_group);
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the shape of a stage; one caller")]
    fn stage(
        &mut self,
        prefix: &str,
        stage: usize,
        blocks: [usize; 4],
        mut channels: usize,
        depth: usize,
        groups: usize,
        per_group: usize,
    ) -> usize {
        let planes = 64 << (stage - 1);
        let (bottleneck, stride) = (depth >= 50, if stage > 1 { 2 } else { 1 });
        let out = if bottleneck { 4 * planes } else { planes };
        for block in 0..blocks[stage - 1] {
            let name = format!("{prefix}.{block}");
            if bottleneck {
                let width = planes * per_group * groups / 64;
                self.conv(&format!("{name}.conv1"), width, channels, 1);
                self.norm(&format!("{name}.bn1"), width);
                self.conv(&format!("{name}.conv2"), width, width / groups, 3);
                self.norm(&format!("{name}.bn2"), width);
                self.conv(&format!("{name}.conv3"), out, width, 1);
                self.norm(&format!("{name}.bn3"), out);
            } else {
                self.conv(&format!("{name}.conv1"), out, channels, 3);
                self.norm(&format!("{name}.bn1"), out);
                self.conv(&format!("{name}.conv2"), out, out, 3);
                self.norm(&format!("{name}.bn2"), out);
            }
            if block == 0 && (stride != 1 || channels != out) {
                self.projection(&name, channels, out);
            }
            channels = out;
        }
        channels
    }

    /// A linear layer starts as PyTorch's `nn.Linear`; below logit rectification, whose BatchNorm takes its scale and
    /// shift away, by He's normal start with no bias.
    fn head(&mut self, name: &str, features: usize, classes: usize, head: Head) {
        let bound = (features as f64).powf(-0.5);
        let uniform = |rng: &mut Rng| bound * (2.0 * rng.f64() - 1.0);
        if head == Head::Linear {
            self.put(format!("{name}.weight"), &[classes, features], uniform);
            self.put(format!("{name}.bias"), &[classes], uniform);
            return;
        }
        let deviation = (2.0 / features as f64).sqrt();
        self.put(format!("{name}.weight"), &[classes, features], |rng| deviation * normal(rng));
        self.put(format!("{name}.bias"), &[classes], |_| 0.0);
        let parts = [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)];
        let skipped = if head == Head::LrPlain { 2 } else { 0 };
        for (part, value) in &parts[skipped..] {
            self.put(format!("{name}.bn.{part}"), &[classes], |_| *value);
        }
    }
}
