//! Recognises the network from a checkpoint's names and shapes, and builds its graph, strictly: every tensor
//! has a place and every place a tensor.

mod builder;
mod classifier;
mod overrides;

use super::{Checkpoint, FoldError, Graph};
use crate::bundle::{Alpha, Head};
use builder::Builder;
pub use overrides::{Activation, ClassifierForm, GlobalPool, Magnitude, NbnLayers, Overrides, StemPool, StrideIn};

/// Key of the shared magnitudes.
pub const SCALE_FACTOR: &str = "scale_factor";
/// Metadata: which layers are normalised, as [`NbnLayers`] prints it.
pub const LAYERS_KEY: &str = "nbn.layers";
/// Metadata: which layers share a magnitude, as [`Magnitude`] prints it.
pub const MAGNITUDE_KEY: &str = "nbn.magnitude";
/// Metadata of checkpoints of `nbn fold train`: ε of every BatchNorm.
pub const EPSILON_KEY: &str = "nbn.batch_norm_epsilon";
/// Characters of names in what is assumed.
const MAX_ASSUMED: usize = 900;
/// More and "layer4s.1" is a prefix of "layer4s.10", which the authors' code confuses.
const MAX_EXPERTS: usize = 10;

/// The families of networks, by the pictures that they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// torchvision's ResNet and ResNeXt: 7×7 stem, max-pool, four stages.
    ImageNet,
    /// CIFAR ResNet: 3×3 stem without pooling, three stages, or four as in ImageNet's.
    Cifar,
}

impl Family {
    /// Height and width that the authors' evaluation uses, in pixels.
    pub fn default_side(self) -> usize {
        if self == Self::Cifar { 32 } else { 224 }
    }
}

/// Where a network's stages lie, told from the names alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    family: Family,
    /// Number of the last stage.
    stages: usize,
    /// The first stage that every expert has for itself; one behind the last where they share all.
    split: usize,
    /// Classifiers, each with the name `linears.E`; one alone is `fc`.
    experts: usize,
    has_experts: bool,
}

impl Layout {
    /// # Errors
    /// When the names are of no known network, or of too many experts.
    fn of(checkpoint: &Checkpoint) -> Result<Self, FoldError> {
        // By any tensor of a stage, so that a single missing one is reported as missing.
        let has = |stage: &str| checkpoint.tensors.keys().any(|name| name.starts_with(stage));
        let own = |stage: usize| has(&format!("layer{stage}s.0."));
        let stages = (1..=4).rfind(|&stage| own(stage) || has(&format!("layer{stage}."))).filter(|&last| last >= 3);
        let Some(stages) = stages else {
            return Err(FoldError::UnknownArchitecture {
                keys: checkpoint.tensors.len(),
                example: checkpoint.tensors.keys().next().cloned().unwrap_or_else(|| "no key".into()),
            });
        };
        let split = (1..=stages).find(|&stage| own(stage)).unwrap_or(stages + 1);
        let numbers = (split..=stages).map(|stage| count(checkpoint, &format!("layer{stage}s.")));
        let experts = numbers.chain([count(checkpoint, "linears.")]).max().unwrap_or(0);
        if experts > MAX_EXPERTS {
            return Err(FoldError::TooManyExperts(experts));
        }
        let kernel = checkpoint.tensors.get("conv1.weight").and_then(|stem| stem.shape.last());
        let small = stages == 3 || kernel == Some(&3);
        Ok(Self {
            family: if small { Family::Cifar } else { Family::ImageNet },
            stages,
            split,
            experts: experts.max(1),
            has_experts: experts > 0,
        })
    }

    fn prefix(&self, stage: usize, expert: usize) -> String {
        if stage < self.split { format!("layer{stage}.") } else { format!("layer{stage}s.{expert}.") }
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
    /// What the network ends in.
    pub head: Head,
    /// Classifiers whose logits are averaged.
    pub experts: usize,
    /// Classes.
    pub classes: usize,
    /// Normalised layers.
    pub normalized_layers: Vec<String>,
    /// For each of them, the element of `scale_factor` that is its magnitude.
    pub magnitude_indices: Vec<usize>,
    /// Acting magnitudes.
    pub alphas: Vec<Alpha>,
    /// What names and shapes do not tell, and was taken, a few words each. Empty for checkpoints of `nbn fold train`.
    pub assumed: Vec<String>,
}

/// The family, told from the names alone.
///
/// # Errors
/// When the names are of no known network, or of too many experts.
pub fn family(checkpoint: &Checkpoint) -> Result<Family, FoldError> {
    Layout::of(checkpoint).map(|layout| layout.family)
}

/// Outputs beside the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extras {
    /// `expert_logits` `[N, experts, K]`, of a network with experts.
    pub expert_logits: bool,
    /// `features` `[N, D]`: what the classifier sees, of all experts one after the other.
    pub features: bool,
}

/// Builds the graph for square inputs of `side` pixels.
///
/// # Errors
/// Names the tensor that is missing, left over, of the wrong shape or out of range.
pub fn build(
    checkpoint: &Checkpoint,
    side: usize,
    extras: Extras,
    overrides: &Overrides,
) -> Result<Network, FoldError> {
    let layout = Layout::of(checkpoint)?;
    let layers = choose_layers(checkpoint, &layout, overrides)?;
    let arch = name(checkpoint, &layout);
    if let Some(asked) = overrides.arch.as_ref().filter(|asked| **asked != arch) {
        return Err(FoldError::Arch { asked: asked.clone(), found: arch });
    }
    let told = match checkpoint.metadata.get(MAGNITUDE_KEY) {
        Some(text) => Some(text.parse().map_err(FoldError::NbnLayers)?),
        None => None,
    };
    let magnitude = overrides.magnitude.or(told);
    let mut builder = Builder::new(checkpoint, &arch, &layers, magnitude.unwrap_or_default(), overrides, side);
    let (head, classes) = builder.network(&layout, extras)?;
    let built = builder.finish()?;
    // Who asks for one for all says that the others do not act.
    if overrides.magnitude != Some(Magnitude::Expert) && told.is_none() && built.normalized.len() > layout.experts {
        check_magnitudes(checkpoint, &built.alphas)?;
    }
    let without = |flag: &str, what: &str| FoldError::Input(format!("{flag}: the network has no {what}: leave it out"));
    if overrides.magnitude.is_some() && built.normalized.is_empty() {
        return Err(without("--magnitude", "normalised BatchNorm"));
    }
    if overrides.stride_in.is_some() && !checkpoint.tensors.contains_key("layer1.0.conv3.weight") {
        return Err(without("--stride-in", "bottleneck blocks"));
    }
    let mut assumed = built.assumed;
    if !built.normalized.is_empty() && told.is_none() {
        assumed.push(match magnitude.unwrap_or_default() {
            Magnitude::Expert if layout.experts > 1 => "a magnitude for all normalised layers of each expert".into(),
            Magnitude::Expert => "one magnitude for all normalised layers".into(),
            Magnitude::Stage => "a magnitude for the normalised layers of each stage".into(),
            Magnitude::Layer => "a magnitude for each normalised layer".into(),
        });
    }
    if !checkpoint.idle.is_empty() {
        let idle: String = checkpoint.idle.join(", ").chars().take(MAX_ASSUMED).collect();
        assumed.push(format!("no part in the logits of {idle}"));
    }
    if checkpoint.metadata.contains_key(EPSILON_KEY) {
        // Of `nbn fold train`, whose networks these are.
        assumed.clear();
    }
    Ok(Network {
        graph: built.graph,
        family: layout.family,
        head,
        experts: layout.experts,
        classes,
        normalized_layers: built.normalized,
        magnitude_indices: built.magnitude_indices,
        alphas: built.alphas,
        assumed,
        arch,
    })
}

/// Refuses magnitudes of which others than the `acting` ones were trained. Those that nothing uses all decay alike, from the
/// same start to nothing.
fn check_magnitudes(checkpoint: &Checkpoint, acting: &[Alpha]) -> Result<(), FoldError> {
    const DECAYED: f32 = 1e-3;
    let values = checkpoint.tensors.get(SCALE_FACTOR).map(|tensor| tensor.values.as_slice()).unwrap_or_default();
    let idle: Vec<f32> =
        values.iter().enumerate().filter(|(n, _)| !acting.iter().any(|a| a.index == *n)).map(|(_, v)| *v).collect();
    let untrained = match idle.as_slice() {
        [only] => only.abs() < DECAYED || *only == 1.0,
        idle => idle.iter().all(|v| v.abs() < DECAYED) || idle.windows(2).all(|pair| pair[0] == pair[1]),
    };
    if untrained {
        return Ok(());
    }
    let name = checkpoint.own_name(SCALE_FACTOR).to_owned();
    Err(FoldError::Magnitudes { name, values: values.len(), acting: acting.len() })
}

fn choose_layers(checkpoint: &Checkpoint, layout: &Layout, overrides: &Overrides) -> Result<NbnLayers, FoldError> {
    let has_scale = checkpoint.tensors.contains_key(SCALE_FACTOR);
    let named = match (&overrides.nbn_layers, checkpoint.metadata.get(LAYERS_KEY)) {
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
        None if layout.has_experts => Ok(NbnLayers::LastStageAll),
        None => Ok(NbnLayers::LastStageOutputs),
    }
}

/// How many of `prefix0.…`, `prefix1.…` there are, counting up to the highest index.
fn count(checkpoint: &Checkpoint, prefix: &str) -> usize {
    let index = |name: &String| name.strip_prefix(prefix)?.split_once('.')?.0.parse::<usize>().ok();
    checkpoint.tensors.keys().filter_map(index).max().map_or(0, |highest| highest + 1)
}

fn name(checkpoint: &Checkpoint, layout: &Layout) -> String {
    let shape =
        |key: &str, axis: usize| checkpoint.tensors.get(key).and_then(|t| t.shape.get(axis)).copied().unwrap_or(0);
    let blocks: usize = (1..=layout.stages).map(|stage| count(checkpoint, &layout.prefix(stage, 0))).sum();
    let bottleneck = checkpoint.tensors.contains_key("layer1.0.conv3.weight");
    let depth = blocks * if bottleneck { 3 } else { 2 } + 2;
    let (width, per_group) = (shape("layer1.0.conv1.weight", 0), shape("layer1.0.conv2.weight", 1));
    let base = match (layout.stages, bottleneck, width, per_group) {
        (3, _, 16, _) => format!("cifar_resnet{depth}"),
        (3, ..) => format!("cifar_resnet{depth}_w{width}"),
        (_, _, 64, 64) => format!("resnet{depth}"),
        (_, true, 128, 128) => format!("wide_resnet{depth}_2"),
        (_, true, w, g) if g > 0 && g < w => format!("resnext{depth}_{}x{g}d", w / g),
        _ => format!("resnet{depth}_w{width}"),
    };
    let base = if layout.stages == 4 && layout.family == Family::Cifar { format!("{base}_3x3") } else { base };
    if layout.has_experts { format!("{base}_ride{}", layout.experts) } else { base }
}
