//! Stratified cross-validation of the ladder: every image is judged by fits that did not see it.
//!
//! Rungs are compared under the uniform prior with every class counting the same, since that is how rare classes are
//! served: under the calibration set's own mix the frequent classes alone would decide how free the rare ones' maps are.

use std::collections::BTreeMap;

use super::ladder::{Kappa, Parameters, Problem};
use crate::bundle::{Rung, RungReport};
use crate::data::LabelledLogits;
use crate::scores::{argmax, softmax_in_place};

const FOLDS: usize = 5;

/// One rung's answers for images its fits did not see.
pub(super) struct OutOfFold {
    /// −log p of the label under the uniform prior.
    balanced_nll: Vec<f64>,
    /// −log p of the label under the calibration set's class mix; so are the rest.
    pub(super) nll: Vec<f64>,
    pub(super) predicted: Vec<u32>,
    pub(super) confidence: Vec<f64>,
    pub(super) hits: Vec<f64>,
}

pub(super) struct CrossValidation {
    /// By rung.
    pub(super) rungs: Vec<OutOfFold>,
    /// Fold of each row.
    folds: Vec<usize>,
    /// Fits by fold, then by rung.
    fits: Vec<Vec<Parameters>>,
    /// Weight of each row, so that all classes with images count the same.
    weights: Vec<f64>,
}

impl CrossValidation {
    pub(super) fn run<'a>(
        logits: &LabelledLogits,
        folds: &[usize],
        problem: &dyn Fn(Vec<u32>) -> Problem<'a>,
        highest: Rung,
        progress: &dyn Fn(&str),
    ) -> Self {
        let n = logits.len();
        let count = folds.iter().max().map_or(0, |last| last + 1);
        let zeros = || vec![0.0; n];
        let empty = || OutOfFold {
            balanced_nll: zeros(),
            nll: zeros(),
            predicted: vec![0; n],
            confidence: zeros(),
            hits: zeros(),
        };
        let mut rungs: Vec<OutOfFold> = (0..=highest as usize).map(|_| empty()).collect();
        let mut fits = Vec::new();
        for fold in 0..count {
            progress(&format!("cross-validation, fold {} of {count}", fold + 1));
            let rows = |inside: bool| (0..n as u32).filter(|&r| (folds[r as usize] == fold) == inside).collect();
            let problem = problem(rows(false));
            let of_fold = problem.fit(highest);
            let held_out: Vec<u32> = rows(true);
            for (rung, fit) in rungs.iter_mut().zip(&of_fold) {
                rung.judge(logits, &held_out, fit, &problem);
            }
            fits.push(of_fold);
        }
        let counts = logits.counts();
        let weights = logits.labels().iter().map(|&l| 1.0 / counts[l as usize] as f64).collect();
        Self { rungs, folds: folds.to_vec(), fits, weights }
    }

    /// The simplest rung that is at most one standard error less likely than the best, among those that beat the rung
    /// below them. The standard error is that of the paired difference.
    pub(super) fn choose(&self) -> Rung {
        let report = self.report();
        let best = report.iter().map(|r| r.balanced_nll).fold(f64::INFINITY, f64::min);
        let beats_below = |n: usize| n == 0 || report[n].balanced_nll < report[n - 1].balanced_nll;
        report
            .iter()
            .enumerate()
            .find(|&(n, r)| beats_below(n) && r.balanced_nll - best <= r.standard_error)
            .map_or(Rung::PriorShift, |(_, r)| r.rung)
    }

    pub(super) fn report(&self) -> Vec<RungReport> {
        let mean = |rung: &OutOfFold| weighted(&rung.balanced_nll, &self.weights).0;
        let Some(best) = self.rungs.iter().min_by(|a, b| mean(a).total_cmp(&mean(b))) else { return Vec::new() };
        let of = |(rung, found): (Rung, &OutOfFold)| RungReport {
            rung,
            balanced_nll: mean(found),
            standard_error: self.difference(found, best).1,
            nll: found.nll.iter().sum::<f64>() / found.nll.len() as f64,
        };
        Rung::ALL.into_iter().zip(&self.rungs).map(of).collect()
    }

    /// Balanced mean of `first` minus `second` and its standard error.
    fn difference(&self, first: &OutOfFold, second: &OutOfFold) -> (f64, f64) {
        let differences: Vec<f64> = first.balanced_nll.iter().zip(&second.balanced_nll).map(|(a, b)| a - b).collect();
        weighted(&differences, &self.weights)
    }

    /// The κ to go on with: of 0, 1 and learned, the first that is at most one standard error less likely than the best on
    /// the rung with one temperature (or the prior alone, where the samples allow no more). Learning it costs likelihood
    /// when the network took all of the prior out, or none.
    pub(super) fn choose_kappa(candidates: &[(Kappa, Self)]) -> Option<Kappa> {
        let rung = |(_, found): &(Kappa, Self)| found.rungs.len().min(2) - 1;
        let mean = |c: &(Kappa, Self)| weighted(&c.1.rungs[rung(c)].balanced_nll, &c.1.weights).0;
        let best = candidates.iter().min_by(|a, b| mean(a).total_cmp(&mean(b)))?;
        let within = |c: &&(Kappa, Self)| {
            let (difference, error) = best.1.difference(&c.1.rungs[rung(c)], &best.1.rungs[rung(best)]);
            difference <= error
        };
        candidates.iter().find(within).map(|(kappa, _)| *kappa)
    }

    /// Each image's probability of its own class under the training prior, by the fit that did not see it.
    pub(super) fn own_class_probabilities(&self, logits: &LabelledLogits, rung: Rung, log_train: &[f64]) -> Vec<f64> {
        let maps: Vec<(Vec<f64>, Vec<f64>)> =
            self.fits.iter().map(|f| &f[rung as usize]).map(|f| (f.a(), f.c(log_train))).collect();
        let mut p = vec![0.0; logits.classes()];
        let of_row = |(row, &label): (usize, &u32)| {
            let (a, c) = &maps[self.folds[row]];
            map(&mut p, logits.row(row), a, c);
            softmax_in_place(&mut p);
            p[label as usize]
        };
        logits.labels().iter().enumerate().map(of_row).collect()
    }
}

impl OutOfFold {
    fn judge(&mut self, logits: &LabelledLogits, rows: &[u32], fit: &Parameters, problem: &Problem<'_>) {
        let (a, c) = (fit.a(), fit.c(problem.log_train));
        let uniform: Vec<f64> = c.iter().zip(problem.log_train).map(|(c, prior)| c - prior).collect();
        let own_mix: Vec<f64> = c.iter().zip(problem.shift).map(|(c, shift)| c + shift).collect();
        let mut p = vec![0.0; a.len()];
        for &row in rows {
            let row = row as usize;
            let label = logits.labels()[row] as usize;
            map(&mut p, logits.row(row), &a, &uniform);
            let own = p[label];
            self.balanced_nll[row] = softmax_in_place(&mut p) - own;
            map(&mut p, logits.row(row), &a, &own_mix);
            let own = p[label];
            self.nll[row] = softmax_in_place(&mut p) - own;
            let best = argmax(&p);
            self.predicted[row] = best as u32;
            self.confidence[row] = p[best];
            self.hits[row] = f64::from(u8::from(best == label));
        }
    }
}

/// Weighted mean and its standard error.
fn weighted(values: &[f64], weights: &[f64]) -> (f64, f64) {
    let total: f64 = weights.iter().sum();
    let mean = values.iter().zip(weights).map(|(v, w)| v * w).sum::<f64>() / total;
    let spread = values.iter().zip(weights).map(|(v, w)| (w * (v - mean)).powi(2)).sum::<f64>();
    (mean, spread.sqrt() / total)
}

fn map(out: &mut [f64], logits: &[f32], a: &[f64], offsets: &[f64]) {
    for ((out, z), (a, offset)) in out.iter_mut().zip(logits).zip(a.iter().zip(offsets)) {
        *out = a * f64::from(*z) + offset;
    }
}

/// A fold for each row, counted from 0 without gaps. Without groups, every class is dealt out in turn, in a seeded order, so
/// that folds are alike in size and mix.
pub(super) fn folds_of(logits: &LabelledLogits, groups: Option<&[usize]>, seed: u64) -> Vec<usize> {
    let mut random = fastrand::Rng::with_seed(seed);
    if let Some(groups) = groups {
        return folds_of_groups(logits, groups, &mut random);
    }
    let mut by_class: Vec<Vec<usize>> = vec![Vec::new(); logits.classes()];
    for (row, &label) in logits.labels().iter().enumerate() {
        by_class[label as usize].push(row);
    }
    let mut folds = vec![0; logits.len()];
    let mut dealt = 0;
    for rows in &mut by_class {
        random.shuffle(rows);
        for &row in rows.iter() {
            folds[row] = dealt % FOLDS;
            dealt += 1;
        }
    }
    folds
}

/// The groups with what is divided all the same: of a class whose images are all of one group, each image becomes a group of
/// its own, since a fold that lacks a whole class says nothing of it. Also those classes.
pub fn divided(logits: &LabelledLogits, groups: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let mut of_class: Vec<Option<usize>> = vec![None; logits.classes()];
    let mut several = vec![false; logits.classes()];
    for (&label, &group) in logits.labels().iter().zip(groups) {
        let first = *of_class[label as usize].get_or_insert(group);
        several[label as usize] |= first != group;
    }
    let mut next = groups.iter().max().map_or(0, |last| last + 1);
    let own = |(&label, &group): (&u32, &usize)| {
        if several[label as usize] {
            return group;
        }
        next += 1;
        next - 1
    };
    let divided = logits.labels().iter().zip(groups).map(own).collect();
    (divided, (0..logits.classes()).filter(|&k| of_class[k].is_some() && !several[k]).collect())
}

/// Folds of whole groups: the largest group chooses first, in a seeded order, the fold that has the least of its classes.
fn folds_of_groups(logits: &LabelledLogits, groups: &[usize], random: &mut fastrand::Rng) -> Vec<usize> {
    let totals = logits.counts();
    let mut rows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    groups.iter().enumerate().for_each(|(row, &group)| rows.entry(group).or_default().push(row));
    let mut order: Vec<Vec<usize>> = rows.into_values().collect();
    random.shuffle(&mut order);
    order.sort_by_key(|rows| std::cmp::Reverse(rows.len()));
    let count = FOLDS.min(order.len());
    // What a fold has of each class, as a share of the class.
    let mut shares = vec![vec![0.0; logits.classes()]; count];
    let mut folds = vec![0; logits.len()];
    for (dealt, rows) in order.iter().enumerate() {
        let labels = || rows.iter().map(|&row| logits.labels()[row] as usize);
        let has = |fold: &usize| labels().map(|class| shares[*fold][class]).sum::<f64>();
        // First one for each fold, so that none stays empty.
        let fold = if dealt < count { dealt } else { (0..count).min_by(|a, b| has(a).total_cmp(&has(b))).unwrap_or(0) };
        labels().for_each(|class| shares[fold][class] += 1.0 / totals[class] as f64);
        rows.iter().for_each(|&row| folds[row] = fold);
    }
    folds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_of_one_group_is_divided_so_that_no_fold_lacks_it() {
        // Class 0 has two groups, class 1 one, class 2 shares one with class 0.
        let logits = LabelledLogits::try_new(4, vec![0.0; 32], vec![0, 0, 0, 0, 1, 1, 2, 2]).unwrap();
        let groups = [7, 7, 8, 8, 9, 9, 8, 8];
        let (divided, alone) = divided(&logits, &groups);
        assert_eq!(alone, [1, 2]);
        assert_eq!(divided[..4], groups[..4]);
        let own: std::collections::BTreeSet<usize> = divided[4..].iter().copied().collect();
        assert!(own.len() == 4 && own.iter().all(|group| *group > 9), "{divided:?}");
    }

    #[test]
    fn no_group_is_divided_and_no_fold_is_empty() {
        let mut random = fastrand::Rng::with_seed(3);
        for groups in [2, 3, 5, 6, 40] {
            let sizes: Vec<usize> = (0..groups).map(|_| random.usize(1..12)).collect();
            let of: Vec<usize> = (0..groups).flat_map(|group| vec![group; sizes[group]]).collect();
            let labels: Vec<u32> = of.iter().map(|_| random.u32(0..3)).collect();
            let logits = LabelledLogits::try_new(3, vec![0.0; 3 * of.len()], labels).unwrap();
            let folds = folds_of(&logits, Some(&of), 1);
            for (row, group) in of.iter().enumerate() {
                assert_eq!(folds[row], folds[of.iter().position(|other| other == group).unwrap()]);
            }
            let count = groups.min(FOLDS);
            let filled: Vec<usize> = (0..count).map(|fold| folds.iter().filter(|f| **f == fold).count()).collect();
            assert_eq!(filled.iter().sum::<usize>(), of.len());
            assert!(filled.iter().all(|n| *n > 0), "{filled:?}");
            if groups == 40 {
                assert!(filled.iter().all(|n| (of.len() / 8..of.len() / 3).contains(n)), "{filled:?}");
            }
            assert_eq!(folds, folds_of(&logits, Some(&of), 1));
        }
    }
}
