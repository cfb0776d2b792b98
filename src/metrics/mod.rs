//! Accuracy, likelihood and calibration errors of labelled probabilities. Pure arithmetic; every mean may be weighted.
//!
//! ECE: Σ_b w_b/w · |accuracy_b − confidence_b| over 15 bins of the best class's score (Guo et al. 2017), of equal width or
//! of equal mass (Nguyen & O'Connor 2015). Classwise ECE of class k bins every image's score of k instead and compares it
//! with how often k is the label (Kull et al. 2019). Brier: Σ_k (p_k − 1[y = k])², summed over classes.

use crate::scores::argmax;

/// Bins of every binned error.
pub const BINS: usize = 15;

/// Probabilities [N, K] with labels, and what follows from each row alone.
#[derive(Debug, Clone)]
pub struct Rows {
    classes: usize,
    probabilities: Vec<f64>,
    labels: Vec<u32>,
    /// −log p of the label, in nats.
    pub nll: Vec<f64>,
    /// Brier score.
    pub brier: Vec<f64>,
    /// Best class.
    pub predicted: Vec<u32>,
    /// Its score.
    pub confidence: Vec<f64>,
    /// 1 when the best class is the label.
    pub top1: Vec<f64>,
    /// 1 when the label is among the best five.
    pub top5: Vec<f64>,
    /// Row numbers by rising confidence.
    by_confidence: Vec<u32>,
}

impl Rows {
    /// `probabilities` are row-major [N, K] with N = `labels.len()` and every label below K; rows sum to 1.
    pub fn new(classes: usize, probabilities: Vec<f64>, labels: Vec<u32>) -> Self {
        let mut rows = Self {
            classes,
            nll: Vec::new(),
            brier: Vec::new(),
            predicted: Vec::new(),
            confidence: Vec::new(),
            top1: Vec::new(),
            top5: Vec::new(),
            by_confidence: (0..labels.len() as u32).collect(),
            probabilities,
            labels,
        };
        for (p, &label) in rows.probabilities.chunks_exact(classes).zip(&rows.labels) {
            let label = label as usize;
            let own = p[label];
            let best = argmax(p);
            // Equal scores rank by class index, as in answers.
            let above = p.iter().enumerate().filter(|&(k, v)| *v > own || (*v == own && k < label)).count();
            rows.nll.push(-own.max(f64::MIN_POSITIVE).ln());
            rows.brier.push(p.iter().map(|v| v * v).sum::<f64>() - 2.0 * own + 1.0);
            rows.predicted.push(best as u32);
            rows.confidence.push(p[best]);
            rows.top1.push(f64::from(u8::from(above == 0)));
            rows.top5.push(f64::from(u8::from(above < 5)));
        }
        let confidence = &rows.confidence;
        rows.by_confidence.sort_by(|&a, &b| confidence[a as usize].total_cmp(&confidence[b as usize]));
        rows
    }

    /// N.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// K.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// One row's probabilities.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.probabilities[row * self.classes..(row + 1) * self.classes]
    }

    /// The class of each row.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// The bins of the best class's score.
    pub fn reliability(&self, weights: &[f64]) -> [Bin; BINS] {
        bins(&self.confidence, &self.top1, weights)
    }

    /// ECE over bins of equal width. `hits` says for each row whether the best class is right: `self.top1`, or drawn.
    pub fn ece(&self, hits: &[f64], weights: &[f64]) -> f64 {
        error(&bins(&self.confidence, hits, weights))
    }

    /// ECE over bins of equal weight.
    pub fn ece_equal_mass(&self, hits: &[f64], weights: &[f64]) -> f64 {
        let total: f64 = weights.iter().sum();
        let mut bins = [Bin::default(); BINS];
        let mut before = 0.0;
        for &row in &self.by_confidence {
            let row = row as usize;
            let middle = before + weights[row] / 2.0;
            before += weights[row];
            let bin = ((BINS as f64 * middle / total) as usize).min(BINS - 1);
            bins[bin].add(self.confidence[row], hits[row], weights[row]);
        }
        error(&bins)
    }

    /// Classwise ECE of every class, `labels` being the rows' own or drawn.
    pub fn classwise_ece(&self, labels: &[u32], weights: &[f64]) -> Vec<f64> {
        let mut gaps = vec![[0.0; BINS]; self.classes];
        let mut total = 0.0;
        for ((p, &label), &weight) in self.probabilities.chunks_exact(self.classes).zip(labels).zip(weights) {
            if weight == 0.0 {
                continue;
            }
            total += weight;
            for (gap, &p) in gaps.iter_mut().zip(p) {
                gap[bin_of(p)] += weight * p;
            }
            let label = label as usize;
            gaps[label][bin_of(p[label])] -= weight;
        }
        gaps.iter().map(|gap| gap.iter().map(|g| g.abs()).sum::<f64>() / total).collect()
    }
}

/// One bin of a reliability diagram.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Bin {
    /// Rows of any weight.
    pub count: u64,
    /// Sum of weights.
    pub weight: f64,
    /// Weighted sum of scores.
    pub confidence: f64,
    /// Weighted sum of hits.
    pub hits: f64,
}

impl Bin {
    fn add(&mut self, confidence: f64, hit: f64, weight: f64) {
        self.count += u64::from(weight > 0.0);
        self.weight += weight;
        self.confidence += weight * confidence;
        self.hits += weight * hit;
    }
}

fn bins(confidence: &[f64], hits: &[f64], weights: &[f64]) -> [Bin; BINS] {
    let mut bins = [Bin::default(); BINS];
    for ((confidence, hit), weight) in confidence.iter().zip(hits).zip(weights) {
        bins[bin_of(*confidence)].add(*confidence, *hit, *weight);
    }
    bins
}

/// ECE over bins of equal width, every row counting the same.
pub fn ece(confidence: &[f64], hits: &[f64]) -> f64 {
    error(&bins(confidence, hits, &vec![1.0; hits.len()]))
}

fn bin_of(score: f64) -> usize {
    ((score * BINS as f64) as usize).min(BINS - 1)
}

/// NaN without any weight.
fn error(bins: &[Bin; BINS]) -> f64 {
    let total: f64 = bins.iter().map(|b| b.weight).sum();
    if total == 0.0 { f64::NAN } else { bins.iter().map(|b| (b.confidence - b.hits).abs()).sum::<f64>() / total }
}

/// Σ wᵢ·xᵢ / Σ wᵢ; NaN without any weight.
pub fn mean(values: &[f64], weights: &[f64]) -> f64 {
    let total: f64 = weights.iter().sum();
    values.iter().zip(weights).map(|(v, w)| v * w).sum::<f64>() / total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows {
        Rows::new(2, vec![0.9, 0.1, 0.6, 0.4, 0.2, 0.8], vec![0, 1, 1])
    }

    #[test]
    fn each_row_has_its_likelihood_brier_score_and_hits() {
        let rows = rows();
        assert_eq!(rows.predicted, [0, 0, 1]);
        assert_eq!(rows.top1, [1.0, 0.0, 1.0]);
        assert!((rows.nll[1] + 0.4f64.ln()).abs() < 1e-12);
        assert!((rows.brier[1] - (0.36 + 0.36)).abs() < 1e-12);
    }

    #[test]
    fn a_binned_error_is_the_weighted_gap_of_each_bin() {
        let rows = rows();
        let ece = rows.ece(&rows.top1, &[1.0; 3]);
        assert!((ece - (0.1 + 0.6 + 0.2) / 3.0).abs() < 1e-12);
        let only_first = rows.ece(&rows.top1, &[2.0, 0.0, 0.0]);
        assert!((only_first - 0.1).abs() < 1e-12);
        // No image is no evidence of calibration.
        assert!(rows.ece(&rows.top1, &[0.0; 3]).is_nan() && rows.ece_equal_mass(&rows.top1, &[0.0; 3]).is_nan());
        // Class 0: scores .9, .6, .2 against labels 1, 0, 0, each in a bin of its own.
        let classwise = rows.classwise_ece(rows.labels(), &[1.0; 3]);
        assert!((classwise[0] - (0.1 + 0.6 + 0.2) / 3.0).abs() < 1e-12);
    }

    #[test]
    fn equal_mass_bins_hold_equal_weight() {
        let n = 45;
        let p: Vec<f64> = (0..n).flat_map(|i| [0.5 + 0.01 * i as f64, 0.5 - 0.01 * i as f64]).collect();
        let rows = Rows::new(2, p, vec![0; n]);
        let expected = (0..n).map(|i| 0.5 - 0.01 * i as f64).sum::<f64>() / n as f64;
        assert!((rows.ece_equal_mass(&rows.top1, &vec![1.0; n]) - expected).abs() < 1e-12);
    }
}
