//! What flags say of a network that its tensors do not, or say otherwise.

use std::fmt;
use std::str::FromStr;

use crate::fold::checkpoint::Choice;

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
    /// ε of every BatchNorm, [`BATCH_NORM_EPSILON`](crate::fold::graph::BATCH_NORM_EPSILON) by default.
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
    pub(in crate::fold) fn others(&self) -> Vec<(String, Self)> {
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

/// The scale of RIDE's, ProCo's and LDAM's cosines.
pub(super) const COSINE_SCALE: f64 = 30.0;
/// The scale of classifier-balancing's.
pub(super) const SQUASHED_SCALE: f64 = 16.0;

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
