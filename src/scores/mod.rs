//! Logits → probabilities → the best classes and prediction sets. Pure arithmetic.

mod calibrator;
mod familiarity;
mod sets;

pub use calibrator::{Calibrator, NamedPrior, Offsets, Prior, PriorError};
pub use familiarity::{Evidence, Familiar, Familiarities, doubt, excess};
pub use sets::{ClassMix, PredictionSet, SetError, SetRequest, SetRule, SetRung, SetScore};

/// A network's answer for one picture: one finite value per class.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits(Vec<f32>);

/// Why a network's output is no [`Logits`].
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum LogitsError {
    /// Another number of values than there are classes.
    #[error("the network gave {found} logits for {expected} classes")]
    Length {
        /// Values in the output.
        found: usize,
        /// Classes in the manifest.
        expected: usize,
    },
    /// NaN or infinite.
    #[error("the logit of class {class} is {value}")]
    NotFinite {
        /// Index of the class.
        class: usize,
        /// The value.
        value: f32,
    },
}

impl Logits {
    /// Accepts `values` when there is one per class and all are finite.
    ///
    /// # Errors
    /// Says which of the two fails.
    pub fn try_new(values: Vec<f32>, classes: usize) -> Result<Self, LogitsError> {
        if values.len() != classes {
            return Err(LogitsError::Length { found: values.len(), expected: classes });
        }
        if let Some(class) = values.iter().position(|v| !v.is_finite()) {
            return Err(LogitsError::NotFinite { class, value: values[class] });
        }
        Ok(Self(values))
    }

    /// One value per class.
    pub fn values(&self) -> &[f32] {
        &self.0
    }

    /// The softmax of the logits: ranks classes, and is no probability of being right.
    pub fn softmax(&self) -> Probabilities {
        Probabilities::softmax(self.0.iter().map(|&z| f64::from(z)).collect())
    }
}

/// One number in 0..=1 per class; they sum to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Probabilities(Vec<f64>);

impl Probabilities {
    /// exp(xₖ − max x) / Σ exp(xⱼ − max x). `scores` must be finite. Sums to 1; monotone in each score.
    pub fn softmax(mut scores: Vec<f64>) -> Self {
        softmax_in_place(&mut scores);
        Self(scores)
    }

    /// One value per class.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// The `k` most probable classes as (class, probability), the best first; equal ones by class index.
    pub fn top(&self, k: usize) -> Vec<(usize, f64)> {
        let k = k.min(self.0.len());
        if k == 0 {
            return Vec::new();
        }
        let order = |&a: &usize, &b: &usize| self.0[b].total_cmp(&self.0[a]).then(a.cmp(&b));
        let mut classes: Vec<usize> = (0..self.0.len()).collect();
        if k < classes.len() {
            classes.select_nth_unstable_by(k - 1, order);
            classes.truncate(k);
        }
        classes.sort_unstable_by(order);
        classes.into_iter().map(|class| (class, self.0[class])).collect()
    }
}

/// The median of the logits: what calibration takes from each before it scales them by class. A constant that is added to all
/// of an image's logits says nothing of it, and must change nothing; a mean would follow a class that is masked by −10⁹.
/// 0 for none.
pub fn centre(logits: &[f32]) -> f64 {
    let mut values = logits.to_vec();
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    let odd = values.len() % 2 == 1;
    let (below, upper, _) = values.select_nth_unstable_by(middle, f32::total_cmp);
    let upper = f64::from(*upper);
    match below.iter().copied().max_by(f32::total_cmp) {
        Some(lower) if !odd => (f64::from(lower) + upper) / 2.0,
        _ => upper,
    }
}

/// Index of the largest value; the first of equal ones, as answers rank them.
pub fn argmax(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, k| if values[k] > values[best] { k } else { best })
}

/// Replaces `scores` by exp(xₖ − max x) / Σ exp(xⱼ − max x) and returns log Σ exp(xⱼ). An entry of −∞ becomes 0.
pub fn softmax_in_place(scores: &mut [f64]) -> f64 {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut total = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        total += *score;
    }
    scores.iter_mut().for_each(|v| *v /= total);
    max + total.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_sums_to_one_and_survives_large_logits() {
        let p = Logits::try_new(vec![1000.0, 999.0, -1000.0], 3).unwrap().softmax();
        assert!((p.values().iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((p.values()[0] - 1.0 / (1.0 + (-1.0f64).exp())).abs() < 1e-12);
    }

    #[test]
    fn top_orders_by_probability_then_class() {
        let p = Logits::try_new(vec![0.0, 2.0, 0.0, 1.0], 4).unwrap().softmax();
        assert_eq!(p.top(3).iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 0]);
        assert_eq!(p.top(9).len(), 4);
        assert!(p.top(0).is_empty());
    }

    #[test]
    fn the_centre_is_the_median_and_moves_with_a_constant() {
        assert_eq!(centre(&[]), 0.0);
        assert_eq!(centre(&[3.0]), 3.0);
        assert_eq!(centre(&[4.0, -1e9, 1.0, 2.0]), 1.5);
        assert_eq!(centre(&[9.0, 5.0, 7.0]), 7.0);
        assert_eq!(centre(&[f32::MAX, f32::MAX]), f64::from(f32::MAX));
    }

    #[test]
    fn logits_that_are_not_finite_or_too_few_are_refused() {
        assert!(matches!(Logits::try_new(vec![0.0, f32::NAN], 2), Err(LogitsError::NotFinite { class: 1, .. })));
        assert_eq!(Logits::try_new(vec![0.0], 2), Err(LogitsError::Length { found: 1, expected: 2 }));
    }
}
