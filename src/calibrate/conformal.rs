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

/// Images of a class, or of its group, that say as much of its threshold as what is wider does.
const SHRINKAGE: f64 = 30.0;

/// A list of thresholds for each class, whose image i has the score `scores[i]` of its own class `labels[i]`; the classes' mix
/// is `target`. The images are weighted towards the class: with n of its own, they have n/(n + 30) of the weight; those of its
/// group, as many as their weights are worth, m/(m + 30) of the rest; and all images what is left. So a class with many images
/// has a threshold of its own, one with few that of its group or of all, and none jumps from one to the other.
///
/// Between class and marginal thresholds, as in arXiv 2507.06867, which interpolates the thresholds themselves.
pub(super) fn shrunk(
    scores: &[f64],
    labels: &[u32],
    classes: &[Class],
    target: &dyn Fn(usize) -> f64,
) -> Vec<Thresholds> {
    let mut counts = vec![0.0f64; classes.len()];
    labels.iter().for_each(|&label| counts[label as usize] += 1.0);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let of_class = |k: usize| if counts[k] > 0.0 { target(k) / counts[k] } else { 0.0 };
    let each: Vec<f64> = (0..classes.len()).map(of_class).collect();
    let group_of: Vec<Option<Group>> = classes.iter().map(Class::group).collect();
    let all: f64 = counts.iter().zip(&each).map(|(count, each)| count * each).sum();
    // Of each group, the sum of its images' weights and of their squares.
    let sums_of = |group: Option<Group>| {
        let members = (0..classes.len()).filter(|&k| group_of[k] == group);
        members
            .fold((0.0, 0.0), |(sum, squares), k| (sum + counts[k] * each[k], squares + counts[k] * each[k] * each[k]))
    };
    let groups = [None, Some(Group::Many), Some(Group::Medium), Some(Group::Few)].map(|g| (g, sums_of(g)));
    let of_each = |k: usize| {
        let (_, (sum, squares)) = groups.into_iter().find(|(group, _)| *group == group_of[k]).unwrap_or_default();
        let worth = if squares > 0.0 { sum * sum / squares } else { 0.0 };
        let (group, own) = (worth / (worth + SHRINKAGE), counts[k] / (counts[k] + SHRINKAGE));
        let weight = |row: usize| {
            let label = labels[row] as usize;
            let in_group = if group_of[label] == group_of[k] && sum > 0.0 { each[label] / sum } else { 0.0 };
            let wider = group * in_group + (1.0 - group) * each[label] / all;
            (1.0 - own) * wider + if label == k { own / counts[k] } else { 0.0 }
        };
        let pairs: Vec<(f64, f64)> = order.iter().map(|&row| (scores[row], weight(row))).collect();
        // The weights sum to 1: the image in question has the weight that one has on average.
        let squares: f64 = pairs.iter().map(|(_, weight)| weight * weight).sum();
        ALPHAS.iter().map(|&alpha| weighted_threshold(&pairs, squares, alpha)).collect()
    };
    (0..classes.len()).map(of_each).collect()
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
    fn a_class_moves_from_all_images_to_its_own_as_it_has_more() {
        let classes: Vec<Class> =
            [500, 400, 5].iter().map(|n| Class { label: n.to_string(), count: Some(*n) }).collect();
        let ten = ALPHAS.iter().position(|alpha| *alpha == 0.1).unwrap();
        // The first class has scores of −0.9 to −1, the second of −0.5 to −0.6, the third of −0.1 to −0.2.
        let threshold = |counts: [usize; 3]| {
            let (mut scores, mut labels) = (Vec::new(), Vec::new());
            for (k, count) in counts.into_iter().enumerate() {
                for n in 0..count {
                    scores.push(-1.0 + 0.4 * k as f64 + 0.1 * n as f64 / count as f64);
                    labels.push(k as u32);
                }
            }
            shrunk(&scores, &labels, &classes, &|_| 1.0).into_iter().map(|list| list[ten].unwrap()).collect::<Vec<_>>()
        };
        let few = threshold([300, 300, 3]);
        let many = threshold([3000, 3000, 3000]);
        // With images enough, each class has its own ninth tenth.
        for (k, found) in many.iter().enumerate() {
            let own = -1.0 + 0.4 * k as f64 + 0.09;
            assert!((found - own).abs() < 0.012, "{k}: {found}, {own}");
        }
        // With three, the third class has what all have, by the weights of the mix.
        assert!(few[2] > -0.2 && few[0] < -0.85, "{few:?}");
        let alone = threshold([300, 300, 0]);
        assert!(alone[2] < -0.4, "a class without images has what the others have: {alone:?}");
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
