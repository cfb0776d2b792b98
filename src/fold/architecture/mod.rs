//! Recognises the network from a checkpoint's names and shapes, and builds its graph, strictly: every tensor
//! has a place and every place a tensor.

mod builder;
mod classifier;

use std::fmt;
use std::str::FromStr;

use super::checkpoint::Choice;
use super::{Checkpoint, FoldError, Graph};
use crate::bundle::{Alpha, Head};
use builder::Builder;

/// Key of the shared magnitudes.
pub const SCALE_FACTOR: &str = "scale_factor";
/// Metadata: which layers are normalised, as [`NbnLayers`] prints it.
pub const LAYERS_KEY: &str = "nbn.layers";
/// Metadata: which layers share a magnitude, as [`Magnitude`] prints it.
pub const MAGNITUDE_KEY: &str = "nbn.magnitude";
/// Metadata of checkpoints of `nbn fold train`: ε of every BatchNorm.
pub const EPSILON_KEY: &str = "nbn.batch_norm_epsilon";
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

/// What overrules the names and shapes, and says what they cannot tell.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Which of the file's tensors are the network's.
    pub choice: Choice,
    /// The network that the tensors must be of.
    pub arch: Option<String>,
    /// The layers that are normalised.
    pub nbn_layers: Option<NbnLayers>,
    /// Which of them share a magnitude.
    pub magnitude: Option<Magnitude>,
    /// How the classifier computes.
    pub classifier: Option<ClassifierForm>,
    /// ε of every BatchNorm, [`BATCH_NORM_EPSILON`](super::graph::BATCH_NORM_EPSILON) by default.
    pub batch_norm_epsilon: Option<f64>,
    /// What follows the norms, ReLU by default.
    pub activation: Option<Activation>,
    /// Which convolution of a bottleneck block has its stride, the second by default.
    pub stride_in: Option<StrideIn>,
    /// Stride of the stem, 2 for one of 7×7 and 1 for one of 3×3 by default.
    pub stem_stride: Option<usize>,
    /// What follows the stem, [`StemPool::Max`] by default for one of 7×7 and [`StemPool::None`] for one of 3×3.
    pub stem_pool: Option<StemPool>,
    /// What the last map becomes features by, the average by default.
    pub global_pool: Option<GlobalPool>,
}

impl Overrides {
    /// The first flag of the command line that was given.
    pub fn given(&self) -> Option<&'static str> {
        let flags = [
            (self.arch.is_some(), "--arch"),
            (self.nbn_layers.is_some(), "--nbn-layers"),
            (self.magnitude.is_some(), "--magnitude"),
            (self.choice.weights.is_some(), "--weights"),
            (self.choice.classifier.is_some(), "--classifier"),
            (!self.choice.ignore.is_empty(), "--ignore"),
            (self.classifier.is_some(), "--classifier-form"),
            (self.batch_norm_epsilon.is_some(), "--batch-norm-epsilon"),
            (self.activation.is_some(), "--activation"),
            (self.stride_in.is_some(), "--stride-in"),
            (self.stem_stride.is_some(), "--stem-stride"),
            (self.stem_pool.is_some(), "--stem-pool"),
            (self.global_pool.is_some(), "--global-pool"),
        ];
        flags.into_iter().find(|(given, _)| *given).map(|(_, flag)| flag)
    }

    /// Networks that differ from this one in one thing that names do not tell, each with the flag that asks for it.
    pub(super) fn others(&self) -> Vec<(String, Self)> {
        let mut others = Vec::new();
        let mut add = |flag: String, change: &dyn Fn(&mut Self)| {
            let mut other = self.clone();
            change(&mut other);
            others.push((flag, other));
        };
        add("--stride-in conv1".into(), &|o| o.stride_in = Some(StrideIn::Conv1));
        add("--stem-stride 1".into(), &|o| o.stem_stride = Some(1));
        add("--stem-stride 2".into(), &|o| o.stem_stride = Some(2));
        add("--stem-pool none".into(), &|o| o.stem_pool = Some(StemPool::None));
        add("--stem-pool max".into(), &|o| o.stem_pool = Some(StemPool::Max));
        add("--global-pool max".into(), &|o| o.global_pool = Some(GlobalPool::Max));
        for epsilon in [1e-3, 1e-4, 1e-6] {
            add(format!("--batch-norm-epsilon {epsilon:e}"), &|o| o.batch_norm_epsilon = Some(epsilon));
        }
        for slope in [0.01, 0.1, 0.2] {
            let activation = Activation::LeakyRelu { slope };
            add(format!("--activation leaky-relu:{slope}"), &|o| o.activation = Some(activation));
        }
        add("--activation silu".into(), &|o| o.activation = Some(Activation::Silu));
        let forms = [
            ClassifierForm::Linear,
            ClassifierForm::Cosine { scale: 1.0 },
            ClassifierForm::NormedLinear { scale: 1.0 },
            ClassifierForm::SquashedCosine { scale: 1.0 },
        ];
        for form in forms {
            add(format!("--classifier-form {form}"), &|o| o.classifier = Some(form));
        }
        others
    }
}

/// How a classifier makes logits of features `x` and the weights `w` of a class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ClassifierForm {
    /// w · x, and a bias where there is one.
    Linear,
    /// scale · cos(w, x), without bias; a weight `[classes, features]`, or `[features, classes]` where that is the other way
    /// round.
    Cosine {
        /// Its scale.
        scale: f64,
    },
    /// The same of a weight `[features, classes]`, as RIDE, ProCo and LDAM have it, where both numbers are equal.
    NormedLinear {
        /// Its scale.
        scale: f64,
    },
    /// scale · w/‖w‖ · x/(1 + ‖x‖), as classifier-balancing's cosine has it.
    SquashedCosine {
        /// Its scale.
        scale: f64,
    },
}

/// Characters of names in what is assumed.
const MAX_ASSUMED: usize = 900;
/// The scale of RIDE's, ProCo's and LDAM's cosines.
const COSINE_SCALE: f64 = 30.0;
/// The scale of classifier-balancing's.
const SQUASHED_SCALE: f64 = 16.0;

impl FromStr for ClassifierForm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (form, scale) = match text.split_once(':') {
            Some((form, scale)) => (form, Some(scale)),
            None => (text, None),
        };
        let scale = |usual: f64| match scale {
            None => Ok(usual),
            Some(text) => {
                let scale = text.parse().ok().filter(|scale: &f64| scale.is_finite() && *scale > 0.0 && *scale <= 1e6);
                scale.ok_or_else(|| format!("the scale {text:?} must be a number above 0 and up to 1000000"))
            }
        };
        match form {
            "linear" if text == "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine { scale: scale(COSINE_SCALE)? }),
            "normed-linear" => Ok(Self::NormedLinear { scale: scale(COSINE_SCALE)? }),
            "squashed-cosine" => Ok(Self::SquashedCosine { scale: scale(SQUASHED_SCALE)? }),
            _ => Err(format!(
                "{text:?} is unknown; expected linear, cosine:SCALE, normed-linear:SCALE or squashed-cosine:SCALE"
            )),
        }
    }
}

impl fmt::Display for ClassifierForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear => f.write_str("linear"),
            Self::Cosine { scale } => write!(f, "cosine:{scale}"),
            Self::NormedLinear { scale } => write!(f, "normed-linear:{scale}"),
            Self::SquashedCosine { scale } => write!(f, "squashed-cosine:{scale}"),
        }
    }
}

/// What follows a norm.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// max(x, 0).
    #[default]
    Relu,
    /// x, or `slope` · x below 0.
    LeakyRelu {
        /// Its slope below 0.
        slope: f64,
    },
    /// x · sigmoid(x).
    Silu,
}

impl FromStr for Activation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("relu", _) => Ok(Self::Relu),
            ("silu", _) => Ok(Self::Silu),
            // PyTorch's default.
            ("leaky-relu", _) => Ok(Self::LeakyRelu { slope: 0.01 }),
            (_, Some(("leaky-relu", slope))) => {
                let slope = slope.parse().ok().filter(|slope: &f64| (0.0..1.0).contains(slope));
                slope.map(|slope| Self::LeakyRelu { slope }).ok_or_else(|| "a slope lies from 0 to below 1".into())
            }
            _ => Err(format!("{text:?} is unknown; expected relu, leaky-relu:SLOPE or silu")),
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relu => f.write_str("ReLU"),
            Self::LeakyRelu { slope } => write!(f, "LeakyReLU of slope {slope}"),
            Self::Silu => f.write_str("SiLU"),
        }
    }
}

/// The convolution of a bottleneck block that has its stride.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum StrideIn {
    /// The first, of 1×1, as in the original ResNet (Caffe, MSRA).
    Conv1,
    /// The second, of 3×3, as torchvision, timm and the NBN authors have it.
    #[default]
    Conv2,
}

/// What follows the stem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StemPool {
    /// 3×3 maximum of stride 2.
    Max,
    /// Nothing.
    None,
}

/// What the last map becomes features by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum GlobalPool {
    /// The mean over the map.
    #[default]
    Average,
    /// The maximum over the map.
    Max,
}

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
