//! Thresholds of split conformal prediction, plain and weighted for another class mix.

use crate::bundle::{Class, Group, GroupThresholds, MixThresholds, ScoreTable, Thresholds};

/// Levels that thresholds are kept for.
pub(super) const ALPHAS: [f64; 16] =
    [0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5];
/// What rounding may take from a sum that should reach a bound.
const ROUNDING: f64 = 1e-9;

/// The score at rank ⌈(n+1)(1−α)⌉ of `ascending`; none when that exceeds n. Vovk, Gammerman & Shafer 2005.
pub fn threshold(ascending: &[f64], alpha: f64) -> Option<f64> {
    let rank = ((ascending.len() + 1) as f64 * (1.0 - alpha) - ROUNDING).ceil().max(1.0) as usize;
    ascending.get(rank - 1).copied()
}

/// The least score at which the weights of `ascending` (score, weight) reach 1−α of the total, `own` being the weight
/// of the image in question. Tibshirani et al. 2019; under label shift, Podkopaev & Ramdas 2021.
pub fn weighted_threshold(ascending: &[(f64, f64)], own: f64, alpha: f64) -> Option<f64> {
    let total: f64 = ascending.iter().map(|(_, w)| w).sum::<f64>() + own;
    let goal = (1.0 - alpha) * total - ROUNDING * total;
    let mut sum = 0.0;
    ascending
        .iter()
        .find(|(_, weight)| {
            sum += weight;
            sum >= goal
        })
        .map(|(score, _)| *score)
}

/// Tables of one score: `scores[i]` is that of image i's own class `labels[i]`.
pub(super) fn table(scores: &[f64], labels: &[u32], classes: &[Class], train_prior: &[f64]) -> ScoreTable {
    let mut by_class: Vec<Vec<f64>> = vec![Vec::new(); classes.len()];
    for (score, label) in scores.iter().zip(labels) {
        by_class[*label as usize].push(*score);
    }
    by_class.iter_mut().for_each(|scores| scores.sort_by(f64::total_cmp));
    let everyone: Vec<usize> = (0..classes.len()).collect();
    let groups = [Group::Many, Group::Medium, Group::Few].into_iter().filter_map(|group| {
        let members: Vec<usize> = (0..classes.len()).filter(|&k| classes[k].group() == Some(group)).collect();
        (!members.is_empty()).then(|| GroupThresholds { group, thresholds: mixes(&by_class, &members, train_prior) })
    });
    ScoreTable {
        marginal: mixes(&by_class, &everyone, train_prior),
        groups: groups.collect(),
        classes: by_class.iter().map(|own| ALPHAS.iter().map(|&alpha| threshold(own, alpha)).collect()).collect(),
    }
}

fn mixes(by_class: &[Vec<f64>], members: &[usize], train_prior: &[f64]) -> MixThresholds {
    let mut all: Vec<f64> = members.iter().flat_map(|&k| by_class[k].iter().copied()).collect();
    all.sort_by(f64::total_cmp);
    let weighted = |target: &dyn Fn(usize) -> f64| -> Thresholds {
        let mut pairs = Vec::with_capacity(all.len());
        let mut own = 0.0f64;
        for &k in members.iter().filter(|&&k| !by_class[k].is_empty()) {
            let weight = target(k) / by_class[k].len() as f64;
            own = own.max(weight);
            pairs.extend(by_class[k].iter().map(|score| (*score, weight)));
        }
        pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
        ALPHAS.iter().map(|&alpha| weighted_threshold(&pairs, own, alpha)).collect()
    };
    MixThresholds {
        calibration: ALPHAS.iter().map(|&alpha| threshold(&all, alpha)).collect(),
        uniform: weighted(&|_| 1.0),
        train: weighted(&|k| train_prior[k]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_is_the_ceiling_of_n_plus_one_times_one_minus_alpha() {
        let scores: Vec<f64> = (1..=19).map(f64::from).collect();
        assert_eq!(threshold(&scores, 0.1), Some(18.0));
        assert_eq!(threshold(&scores, 0.05), Some(19.0));
        assert_eq!(threshold(&scores, 0.04), None);
        assert_eq!(threshold(&scores[..9], 0.1), Some(9.0));
        assert_eq!(threshold(&scores[..8], 0.1), None);
    }

    #[test]
    fn equal_weights_give_the_plain_threshold() {
        for n in [5, 9, 19, 100, 1234] {
            let scores: Vec<f64> = (0..n).map(|i| f64::from(i).sin()).collect();
            let mut sorted = scores.clone();
            sorted.sort_by(f64::total_cmp);
            let pairs: Vec<(f64, f64)> = sorted.iter().map(|s| (*s, 0.37)).collect();
            for alpha in ALPHAS {
                assert_eq!(weighted_threshold(&pairs, 0.37, alpha), threshold(&sorted, alpha), "{n} {alpha}");
            }
        }
    }
}
