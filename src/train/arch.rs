//! Names of networks that can be trained.

use std::fmt;
use std::str::FromStr;

/// Depths that name an ImageNet network, with the blocks of its four stages.
pub(super) const IMAGENET_DEPTHS: [(usize, [usize; 4]); 5] =
    [(18, [2, 2, 2, 2]), (34, [3, 4, 6, 3]), (50, [3, 4, 6, 3]), (101, [3, 4, 23, 3]), (152, [3, 8, 36, 3])];

/// A network's name, parsed: `resnet20` (CIFAR, depth 6n+2, `_w8` for another width than 16), `resnet50` (ImageNet),
/// `resnext50_32x4d`, `wide_resnet50_2`, `resnet50_ride3` (three experts).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arch {
    /// Three stages of basic blocks over a 3×3 stem.
    Cifar {
        /// 6n + 2.
        depth: usize,
        /// Channels of the first stage.
        width: usize,
    },
    /// Four stages over a 7×7 stem.
    ImageNet {
        /// 18, 34, 50, 101 or 152.
        depth: usize,
        /// Groups of the 3×3 convolutions.
        groups: usize,
        /// Channels per group in the first stage: 64 for ResNet.
        per_group: usize,
        /// Experts, which share the stem and two stages; 1 is a single network.
        experts: usize,
    },
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a network that can be trained; expected resnet20, resnet32, resnet44, resnet56 … \
                 (CIFAR, depth 6n+2; resnet20_w8 for 8 channels in the first stage), resnet18, resnet34, resnet50, \
                 resnet101, resnet152, resnext50_32x4d, resnext101_32x8d, wide_resnet50_2, or one of these four-stage \
                 networks with _ride3 for three experts"
            )
        };
        let number = |t: &str| t.parse::<usize>().ok().filter(|n| (1..=4096).contains(n));
        let (name, cifar) = text.strip_prefix("cifar_").map_or((text, false), |rest| (rest, true));
        let (base, experts) = match name.split_once("_ride") {
            Some((base, n)) => (base, number(n).filter(|n| (2..=10).contains(n)).ok_or_else(wrong)?),
            None => (name, 1),
        };
        let known = |depth: usize| IMAGENET_DEPTHS.iter().any(|(d, _)| *d == depth);
        if let Some(rest) = base.strip_prefix("resnext") {
            let (depth, shape) = rest.split_once('_').ok_or_else(wrong)?;
            let (groups, per_group) = shape.strip_suffix('d').and_then(|s| s.split_once('x')).ok_or_else(wrong)?;
            let (depth, groups, per_group) = (number(depth), number(groups), number(per_group));
            let (Some(depth), Some(groups), Some(per_group)) = (depth, groups, per_group) else { return Err(wrong()) };
            return if known(depth) && depth >= 50 && groups > 1 {
                Ok(Self::ImageNet { depth, groups, per_group, experts })
            } else {
                Err(wrong())
            };
        }
        if let Some(depth) = base.strip_prefix("wide_resnet").and_then(|r| r.strip_suffix("_2")).and_then(number) {
            return if known(depth) && depth >= 50 {
                Ok(Self::ImageNet { depth, groups: 1, per_group: 128, experts })
            } else {
                Err(wrong())
            };
        }
        let rest = base.strip_prefix("resnet").ok_or_else(wrong)?;
        let (depth, width) = match rest.split_once("_w") {
            Some((depth, width)) => (number(depth).ok_or_else(wrong)?, Some(number(width).ok_or_else(wrong)?)),
            None => (number(rest).ok_or_else(wrong)?, None),
        };
        if known(depth) && !cifar && width.is_none() {
            Ok(Self::ImageNet { depth, groups: 1, per_group: 64, experts })
        } else if depth % 6 == 2 && depth >= 8 && experts == 1 {
            Ok(Self::Cifar { depth, width: width.unwrap_or(16) })
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for Arch {
    /// As `nbn fold export` names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Cifar { depth, width: 16 } => write!(f, "cifar_resnet{depth}"),
            Self::Cifar { depth, width } => write!(f, "cifar_resnet{depth}_w{width}"),
            Self::ImageNet { depth, groups, per_group, experts } => {
                match (groups, per_group) {
                    (1, 64) => write!(f, "resnet{depth}")?,
                    (1, _) => write!(f, "wide_resnet{depth}_2")?,
                    _ => write!(f, "resnext{depth}_{groups}x{per_group}d")?,
                }
                if experts > 1 { write!(f, "_ride{experts}") } else { Ok(()) }
            }
        }
    }
}

impl Arch {
    /// Whether it is of the CIFAR family.
    pub fn is_cifar(&self) -> bool {
        matches!(self, Self::Cifar { .. })
    }
}
