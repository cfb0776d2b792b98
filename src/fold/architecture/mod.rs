//! Recognises the network from a checkpoint's names and shapes, and builds its graph, strictly: every tensor
//! has a place and every place a tensor.

mod builder;

use std::fmt;
use std::str::FromStr;

use super::{Checkpoint, FoldError, Graph};
use crate::bundle::{Alpha, Head};
use builder::Builder;

/// Key of the shared magnitudes.
pub const SCALE_FACTOR: &str = "scale_factor";
/// Metadata: which layers are normalised, as [`NbnLayers`] prints it.
pub const LAYERS_KEY: &str = "nbn.layers";
/// Metadata: which layers share a magnitude, as [`Magnitude`] prints it.
pub const MAGNITUDE_KEY: &str = "nbn.magnitude";
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
                "{other:?} is unknown; expected last-stage-outputs, last-stage-all, all, none, or layer names such as \
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

/// Which normalised layers share one element of `scale_factor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Magnitude {
    /// All of one expert: element e acts for expert e, element 0 for a single network, as in the authors' code.
    #[default]
    Expert,
    /// Those of one stage of one expert; elements in the order in which the stages come.
    Stage,
    /// None: every layer has its own, in the order of the layers.
    Layer,
}

impl FromStr for Magnitude {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "expert" => Ok(Self::Expert),
            "stage" => Ok(Self::Stage),
            "layer" => Ok(Self::Layer),
            other => Err(format!("magnitude {other:?} is unknown; expected expert, stage or layer")),
        }
    }
}

impl fmt::Display for Magnitude {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expert => "expert",
            Self::Stage => "stage",
            Self::Layer => "layer",
        })
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
    let magnitude = match checkpoint.metadata.get(MAGNITUDE_KEY) {
        Some(text) => text.parse().map_err(FoldError::NbnLayers)?,
        None => Magnitude::default(),
    };
    let mut builder = Builder::new(checkpoint, &arch, &layers, magnitude, side);
    let (head, classes) = builder.network(family, experts, extras)?;
    let built = builder.finish()?;
    Ok(Network {
        graph: built.graph,
        family,
        head,
        experts,
        classes,
        normalized_layers: built.normalized,
        magnitude_indices: built.magnitude_indices,
        alphas: built.alphas,
        arch,
    })
}

fn choose_layers(checkpoint: &Checkpoint, family: Family, overrides: &Overrides) -> Result<NbnLayers, FoldError> {
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
