//! Stratified cross-validation: every image is judged by fits that did not see it.
//!
//! Fits are compared under the uniform prior with every class counting the same, since that is how rare classes are
//! served: under the calibration set's own mix the frequent classes alone would decide how free the rare ones' maps are.

use std::collections::BTreeMap;

use super::ladder::{Kappa, Parameters, Problem};
use crate::bundle::{Rung, RungReport};
use crate::data::LabelledLogits;
use crate::scores::{argmax, softmax_in_place};

const FOLDS: usize = 5;
/// Strengths λ of the penalties that are tried, from the strongest: each fit begins where the one before ended.
const STRENGTHS: [f64; 5] = [8.0, 4.0, 2.0, 1.0, 0.5];
/// The one that stays unless another is clearly better: it was best, or near it, on two sets.
const USUAL: f64 = 1.0;
/// Standard errors by which another one is clearly better.
const CLEARLY: f64 = 2.0;
/// What the calibrated scores' accuracy may lose to the softmax's, with all classes counting the same.
const ACCURACY_LOSS: f64 = 0.005;

/// A fit to try.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) rung: Rung,
    /// λ.
    pub(super) strength: f64,
}

/// One candidate's answers for images its fits did not see.
pub(super) struct OutOfFold {
    pub(super) candidate: Candidate,
    /// By fold.
    fits: Vec<Parameters>,
    /// −log p of the label under the uniform prior, and whether the best class is the label.
    balanced_nll: Vec<f64>,
    balanced_hits: Vec<f64>,
    /// −log p of the label under the calibration set's class mix; so are the rest.
    pub(super) nll: Vec<f64>,
    pub(super) predicted: Vec<u32>,
    pub(super) confidence: Vec<f64>,
    pub(super) hits: Vec<f64>,
}

pub(super) struct CrossValidation {
    pub(super) tried: Vec<OutOfFold>,
    /// Fold of each row.
    folds: Vec<usize>,
    /// Weight of each row, so that all classes with images count the same.
    weights: Vec<f64>,
}

/// What is tried where the samples allow `highest`.
pub(super) fn candidates(highest: Rung) -> Vec<Candidate> {
    let lower = Rung::ALL.into_iter().filter(|rung| *rung <= highest && *rung < Rung::StructuredVectorScaling);
    let mut all: Vec<Candidate> = lower.map(|rung| Candidate { rung, strength: USUAL }).collect();
    if highest == Rung::StructuredVectorScaling {
        all.extend(STRENGTHS.map(|strength| Candidate { rung: highest, strength }));
    }
    all
}

/// Fits all of `candidates`, each from where the last of its kind, or the temperature, has ended.
pub(super) fn fit_all(problem: &Problem<'_>, candidates: &[Candidate]) -> Vec<Parameters> {
    let mut start: Option<(Rung, Parameters)> = None;
    let mut fits = Vec::new();
    for Candidate { rung, strength } in candidates {
        let from = start.as_ref().filter(|(of, _)| of == rung || *of == Rung::Temperature).map(|(_, fit)| fit);
        let fit = problem.fit(*rung, *strength, from);
        if *rung != Rung::TemperatureBias && *rung != Rung::PriorShift {
            start = Some((*rung, fit.clone()));
        }
        fits.push(fit);
    }
    fits
}

impl CrossValidation {
    pub(super) fn run<'a>(
        logits: &LabelledLogits,
        folds: &[usize],
        problem: &dyn Fn(Vec<u32>) -> Problem<'a>,
        candidates: &[Candidate],
        progress: &dyn Fn(&str),
    ) -> Self {
        let n = logits.len();
        let count = folds.iter().max().map_or(0, |last| last + 1);
        let zeros = || vec![0.0; n];
        let empty = |candidate: &Candidate| OutOfFold {
            candidate: *candidate,
            fits: Vec::new(),
            balanced_nll: zeros(),
            balanced_hits: zeros(),
            nll: zeros(),
            predicted: vec![0; n],
            confidence: zeros(),
            hits: zeros(),
        };
        let mut tried: Vec<OutOfFold> = candidates.iter().map(empty).collect();
        for fold in 0..count {
            progress(&format!("cross-validation, fold {} of {count}", fold + 1));
            let rows = |inside: bool| (0..n as u32).filter(|&r| (folds[r as usize] == fold) == inside).collect();
            let problem = problem(rows(false));
            let held_out: Vec<u32> = rows(true);
            for (one, fit) in tried.iter_mut().zip(fit_all(&problem, candidates)) {
                one.judge(logits, &held_out, &fit, &problem);
                one.fits.push(fit);
            }
        }
        let counts = logits.counts();
        let weights = logits.labels().iter().map(|&l| 1.0 / counts[l as usize] as f64).collect();
        Self { tried, folds: folds.to_vec(), weights }
    }

    /// The candidate to take: the usual strength of the highest rung, unless another is more likely by more than two standard
    /// errors of the paired difference; then a stronger one, or the temperature alone, as long as accuracy is lost. Where all
    /// of them lose it, none is better than the first.
    pub(super) fn choose(&self, logits: &LabelledLogits) -> usize {
        let Some(highest) = self.tried.iter().map(|one| one.candidate.rung).max() else { return 0 };
        let mean = |one: &OutOfFold| weighted(&one.balanced_nll, &self.weights).0;
        let of =
            |strength: f64| self.tried.iter().position(|one| one.candidate == Candidate { rung: highest, strength });
        let Some(usual) = of(USUAL) else { return self.tried.len() - 1 };
        let others = (0..self.tried.len()).filter(|&n| self.tried[n].candidate.rung == highest);
        let best = others.min_by(|&a, &b| mean(&self.tried[a]).total_cmp(&mean(&self.tried[b]))).unwrap_or(usual);
        let (gain, error) = self.difference(&self.tried[usual], &self.tried[best]);
        let chosen = if gain > CLEARLY * error { best } else { usual };
        // Weaker fits first, then stronger ones, then the temperature.
        let strength = self.tried[chosen].candidate.strength;
        let mut guarded: Vec<usize> = (0..self.tried.len())
            .rev()
            .filter(|&n| self.tried[n].candidate.rung == highest && self.tried[n].candidate.strength >= strength)
            .collect();
        guarded.extend(self.tried.iter().position(|one| one.candidate.rung == Rung::Temperature));
        let before: Vec<f64> = logits
            .labels()
            .iter()
            .enumerate()
            .map(|(row, &label)| {
                let z: Vec<f64> = logits.row(row).iter().map(|z| f64::from(*z)).collect();
                f64::from(u8::from(argmax(&z) == label as usize))
            })
            .collect();
        let loses = |n: &usize| {
            let lost: Vec<f64> = before.iter().zip(&self.tried[*n].balanced_hits).map(|(a, b)| a - b).collect();
            let (lost, error) = weighted(&lost, &self.weights);
            lost > ACCURACY_LOSS + error
        };
        guarded.iter().copied().find(|n| !loses(n)).unwrap_or(chosen)
    }

    /// Of the candidate `n` and what stands below it: one line a rung, the strength being that of `n`.
    pub(super) fn report(&self, n: usize) -> Vec<RungReport> {
        let chosen = self.tried[n].candidate;
        let shown = |one: &&OutOfFold| {
            let highest = one.candidate.rung == Rung::StructuredVectorScaling;
            !highest
                || one.candidate.strength == if chosen.rung == one.candidate.rung { chosen.strength } else { USUAL }
        };
        let shown: Vec<&OutOfFold> = self.tried.iter().filter(shown).collect();
        let mean = |one: &OutOfFold| weighted(&one.balanced_nll, &self.weights).0;
        let Some(best) = shown.iter().min_by(|a, b| mean(a).total_cmp(&mean(b))) else { return Vec::new() };
        let of = |found: &&OutOfFold| RungReport {
            rung: found.candidate.rung,
            balanced_nll: mean(found),
            standard_error: self.difference(found, best).1,
            nll: found.nll.iter().sum::<f64>() / found.nll.len() as f64,
        };
        shown.iter().map(of).collect()
    }

    /// Balanced mean of `first` minus `second` and its standard error.
    fn difference(&self, first: &OutOfFold, second: &OutOfFold) -> (f64, f64) {
        let differences: Vec<f64> = first.balanced_nll.iter().zip(&second.balanced_nll).map(|(a, b)| a - b).collect();
        weighted(&differences, &self.weights)
    }

    /// The κ to go on with: of 0, 1 and learned, the first that is at most one standard error less likely than the best, each
    /// with its one candidate. Learning it costs likelihood when the network took all of the prior out, or none.
    pub(super) fn choose_kappa(candidates: &[(Kappa, Self)]) -> Option<Kappa> {
        let last = |(_, found): &(Kappa, Self)| found.tried.len() - 1;
        let mean = |c: &(Kappa, Self)| weighted(&c.1.tried[last(c)].balanced_nll, &c.1.weights).0;
        let best = candidates.iter().min_by(|a, b| mean(a).total_cmp(&mean(b)))?;
        let within = |c: &&(Kappa, Self)| {
            let (difference, error) = best.1.difference(&c.1.tried[last(c)], &best.1.tried[last(best)]);
            difference <= error
        };
        candidates.iter().find(within).map(|(kappa, _)| *kappa)
    }

    /// Each image's probability of its own class, by the candidate's fit that did not see it: under the training prior, or
    /// the uniform one.
    pub(super) fn own_class_probabilities(
        &self,
        logits: &LabelledLogits,
        n: usize,
        log_train: &[f64],
        uniform: bool,
    ) -> Vec<f64> {
        let offsets = |fit: &Parameters| -> Vec<f64> {
            let c = fit.c(log_train).into_iter().zip(log_train);
            c.map(|(c, prior)| if uniform { c - prior } else { c }).collect()
        };
        let maps: Vec<(Vec<f64>, Vec<f64>)> = self.tried[n].fits.iter().map(|f| (f.a(), offsets(f))).collect();
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
            self.balanced_hits[row] = f64::from(u8::from(argmax(&p) == label));
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
