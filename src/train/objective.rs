//! The losses, all of one form: cross-entropy of shifted logits against weighted targets.
//!
//! loss = −Σ c ⊙ log softmax(s · (z + o)), where the shift o [N, K] and the weights c [N, K] are made from the targets
//! alone. Cross-entropy has o = 0; Balanced Softmax o = log n (arXiv 2007.10740); logit adjustment o = τ·log π (arXiv
//! 2007.07314); LDAM o = −m at the true class, m ∝ n^(−1/4), and s its scale (arXiv 1906.07413).

use burn::tensor::{Device, Tensor, TensorData, activation};

use super::recipe::{Loss, Recipe};

/// β of the effective number of images (arXiv 1901.05555), as in LDAM's deferred re-weighting.
const EFFECTIVE_NUMBER: f64 = 0.9999;

/// A recipe's loss for one set's class counts.
#[derive(Debug, Clone)]
pub struct Objective {
    /// Added to the logits, per class.
    offset: Vec<f32>,
    /// Taken from the true class's logit.
    margin: Vec<f32>,
    scale: f32,
    smoothing: f32,
    /// Weight of each class once re-weighting has begun.
    weight: Vec<f32>,
    reweight_from: Option<usize>,
}

/// What one batch's loss is made of, both [N, K].
#[derive(Debug, Clone, PartialEq)]
pub struct Terms {
    /// o.
    pub shift: Vec<f32>,
    /// c; sums to 1.
    pub weights: Vec<f32>,
    classes: usize,
}

impl Objective {
    /// The loss of `recipe` for classes of `counts` training images, none of them 0.
    pub fn new(recipe: &Recipe, counts: &[u64]) -> Self {
        let total: u64 = counts.iter().sum();
        let of = |value: &dyn Fn(f64) -> f64| counts.iter().map(|&n| value(n as f64) as f32).collect::<Vec<f32>>();
        let (offset, margin, scale) = match recipe.loss {
            Loss::CrossEntropy => (of(&|_| 0.0), of(&|_| 0.0), 1.0),
            Loss::BalancedSoftmax => (of(&|n| (n / total as f64).ln()), of(&|_| 0.0), 1.0),
            Loss::LogitAdjustment => (of(&|n| f64::from(recipe.tau) * (n / total as f64).ln()), of(&|_| 0.0), 1.0),
            Loss::Ldam => {
                let rarest = counts.iter().copied().min().unwrap_or(1) as f64;
                let largest = f64::from(recipe.ldam_margin);
                (of(&|_| 0.0), of(&|n| largest * (rarest / n).powf(0.25)), recipe.ldam_scale)
            }
        };
        let effective = of(&|n| (1.0 - EFFECTIVE_NUMBER) / (1.0 - EFFECTIVE_NUMBER.powf(n)));
        let mean = effective.iter().sum::<f32>() / effective.len().max(1) as f32;
        Self {
            offset,
            margin,
            scale,
            smoothing: recipe.label_smoothing,
            weight: effective.iter().map(|w| w / mean).collect(),
            reweight_from: recipe.reweight_from,
        }
    }

    /// The terms of a batch in `epoch` (from 0) with `targets` [N, K], each row of which sums to 1. Re-weighted, the loss
    /// is the mean weighted by the targets' classes, as PyTorch's with class weights.
    pub fn terms(&self, targets: &[f32], epoch: usize) -> Terms {
        let classes = self.offset.len();
        let reweighted = self.reweight_from.is_some_and(|from| epoch >= from);
        let class_weight = |k: usize| if reweighted { self.weight[k] } else { 1.0 };
        let total: f32 = targets.iter().enumerate().map(|(at, t)| class_weight(at % classes) * t).sum();
        let mut terms = Terms { shift: vec![0.0; targets.len()], weights: vec![0.0; targets.len()], classes };
        for (at, target) in targets.iter().enumerate() {
            let k = at % classes;
            terms.shift[at] = self.offset[k] - self.margin[k] * target;
            let smoothed = (1.0 - self.smoothing) * target + self.smoothing / classes as f32;
            terms.weights[at] = class_weight(k) * smoothed / total;
        }
        terms
    }

    /// The loss of the experts' `logits` [N, K], averaged over the experts, each of which learns from its own.
    pub fn loss(&self, logits: &[Tensor<2>], terms: &Terms, device: &Device) -> Tensor<1> {
        let shape = [terms.weights.len() / terms.classes, terms.classes];
        let constant = |values: &[f32]| Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device);
        let (shift, weights) = (constant(&terms.shift), constant(&terms.weights));
        let one = |z: &Tensor<2>| {
            let shifted = (z.clone() + shift.clone()) * self.scale;
            (activation::log_softmax(shifted, 1) * weights.clone()).sum().neg()
        };
        let sum = logits.iter().map(one).reduce(|a, b| a + b);
        sum.map_or_else(|| Tensor::zeros([1], device), |sum| sum / logits.len() as f64)
    }
}
