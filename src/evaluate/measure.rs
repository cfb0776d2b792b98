//! Metrics of slices, with bootstrap intervals and null bands.

use std::thread;

use serde::Serialize;

use crate::bundle::{Class, Group};
use crate::metrics::{Rows, mean};

/// Metrics in the order of every list of figures.
pub const METRICS: [&str; 16] = [
    "top1",
    "top5",
    "nll",
    "brier",
    "ece",
    "ece_equal_mass",
    "classwise_ece",
    "pas_coverage",
    "pas_size",
    "plain_coverage",
    "plain_size",
    "posterior_coverage",
    "posterior_size",
    "pas_gap",
    "plain_gap",
    "posterior_gap",
];
/// Positions in [`METRICS`] of those that are computed over bins, and so biased upward on few images.
pub(super) const BINNED: std::ops::Range<usize> = 4..7;
const CLASSWISE: usize = 6;
/// Products of images, classes and resamples beyond which classwise ECE gets no interval and no null band.
const MAX_CLASSWISE_WORK: u64 = 50_000_000_000;

/// A value, where it could lie, and what chance alone would give.
#[derive(Debug, Clone, Copy, Serialize, PartialEq)]
pub struct Figure {
    /// Over the images.
    pub value: f64,
    /// 2.5 % and 97.5 % quantiles over resamples of the images, stratified by class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// 95 % quantile if the scores were perfectly calibrated: labels drawn from them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub null: Option<f64>,
}

impl Figure {
    /// Of a difference: none, in any resample.
    pub(super) fn is_zero(&self) -> bool {
        self.value == 0.0 && self.interval.is_none_or(|interval| interval == [0.0; 2])
    }
}

/// The images that a figure is over.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slice {
    pub(super) name: &'static str,
    /// Whether an image of the class counts, by class.
    classes: Vec<bool>,
    /// Every class counts the same, whatever the prior.
    balanced: bool,
}

/// All images; all classes equally; the classes of each group that there is.
pub(super) fn slices(classes: &[Class]) -> Vec<Slice> {
    let all = vec![true; classes.len()];
    let mut slices = vec![
        Slice { name: "overall", classes: all.clone(), balanced: false },
        Slice { name: "macro", classes: all, balanced: true },
    ];
    for group in [Group::Many, Group::Medium, Group::Few] {
        let members: Vec<bool> = classes.iter().map(|c| c.group() == Some(group)).collect();
        if members.contains(&true) {
            slices.push(Slice { name: group.name(), classes: members, balanced: false });
        }
    }
    slices
}

impl Slice {
    /// The weights of the rows whose label is in the slice, 0 for the others.
    pub(super) fn weights(&self, weights: &Weights, labels: &[u32]) -> Vec<f64> {
        let weight = |(at, &label): (usize, &u32)| match self.classes[label as usize] {
            true if self.balanced => weights.balanced(at, label),
            true => weights.prior[at],
            false => 0.0,
        };
        labels.iter().enumerate().map(weight).collect()
    }
}

/// Whether each image's set holds its class, and how large it is.
#[derive(Debug, Clone, Default)]
pub(super) struct SetHits {
    pub(super) covered: Vec<f64>,
    pub(super) size: Vec<f64>,
}

/// One way of scoring the images, under one prior.
pub(super) struct Subject<'a> {
    pub(super) rows: &'a Rows,
    /// PAS, plain and posterior, or none.
    pub(super) sets: Option<&'a [SetHits; 3]>,
    /// The coverage that they are to have, 1 − α.
    pub(super) coverage: f64,
}

/// Row weights under a prior.
pub(super) struct Weights {
    pub(super) prior: Vec<f64>,
    /// Each class's share under it.
    target: Vec<f64>,
}

impl Weights {
    /// Weights that give the images the class mix `target` (one share per class).
    pub(super) fn new(labels: &[u32], target: &[f64]) -> Self {
        let mut counts = vec![0.0; target.len()];
        labels.iter().for_each(|&l| counts[l as usize] += 1.0);
        let n = labels.len() as f64;
        let prior = labels.iter().map(|&l| target[l as usize] * n / counts[l as usize]).collect();
        Self { prior, target: target.to_vec() }
    }

    /// The weight of a row with every class the same. `label` may be drawn from the row's scores, which hold under the
    /// prior: the row keeps its place in that mix, and the label decides how much of it is left.
    fn balanced(&self, row: usize, label: u32) -> f64 {
        let share = self.target[label as usize];
        if share > 0.0 { self.prior[row] / (share * self.target.len() as f64) } else { 0.0 }
    }

    fn times(&self, counts: &[f64]) -> Self {
        let prior = self.prior.iter().zip(counts).map(|(w, c)| w * c).collect();
        Self { prior, target: self.target.clone() }
    }
}

/// Figures by slice, then by metric.
pub(super) type Table = Vec<Vec<f64>>;

/// All metrics of all slices; `drawn` replaces the labels (binned metrics only make sense then).
pub(super) fn measure(
    subject: &Subject<'_>,
    weights: &Weights,
    slices: &[Slice],
    drawn: Option<&[u32]>,
    classwise: bool,
) -> Table {
    let rows = subject.rows;
    let labels = drawn.unwrap_or(rows.labels());
    let drawn_hits: Vec<f64>;
    let hits = if drawn.is_some() {
        drawn_hits = labels.iter().zip(&rows.predicted).map(|(l, p)| f64::from(u8::from(l == p))).collect();
        &drawn_hits
    } else {
        &rows.top1
    };
    let of_classes = |weights: &[f64]| if classwise { rows.classwise_ece(labels, weights) } else { Vec::new() };
    let balanced: Vec<f64> = labels.iter().enumerate().map(|(row, &l)| weights.balanced(row, l)).collect();
    let by_class = [of_classes(&weights.prior), of_classes(&balanced)];
    let mut seen = vec![false; weights.target.len()];
    rows.labels().iter().for_each(|&label| seen[label as usize] = true);
    let of_slice = |slice: &Slice| {
        let inside = slice.weights(weights, labels);
        // A class without images counts in no figure.
        let members = by_class[usize::from(slice.balanced)].iter().zip(&slice.classes).zip(&seen);
        let members = members.filter(|((_, member), seen)| **member && **seen);
        let (sum, count) = members.fold((0.0, 0.0), |(sum, count), ((e, _), _)| (sum + e, count + 1.0));
        let set = |n: usize, of: fn(&SetHits) -> &[f64]| match subject.sets.map(|s| of(&s[n])) {
            Some(hits) if !hits.is_empty() => mean(hits, &inside),
            _ => f64::NAN,
        };
        let gap = |n: usize| match subject.sets.map(|s| &s[n].covered) {
            Some(covered) if !covered.is_empty() => {
                under_coverage(covered, labels, &inside, slice.classes.len(), subject.coverage)
            }
            _ => f64::NAN,
        };
        vec![
            mean(hits, &inside),
            mean(&rows.top5, &inside),
            mean(&rows.nll, &inside),
            mean(&rows.brier, &inside),
            rows.ece(hits, &inside),
            rows.ece_equal_mass(hits, &inside),
            sum / count,
            set(0, |s| &s.covered),
            set(0, |s| &s.size),
            set(1, |s| &s.covered),
            set(1, |s| &s.size),
            set(2, |s| &s.covered),
            set(2, |s| &s.size),
            gap(0),
            gap(1),
            gap(2),
        ]
    };
    slices.iter().map(of_slice).collect()
}

/// The mean over the classes with images of how much less than `goal` of a class's images have sets that hold it; no class makes
/// up for another. The under-coverage gap of arXiv 2507.06867.
fn under_coverage(covered: &[f64], labels: &[u32], weights: &[f64], classes: usize, goal: f64) -> f64 {
    let mut sums = vec![(0.0, 0.0); classes];
    for ((covered, &label), weight) in covered.iter().zip(labels).zip(weights) {
        let (hits, all): &mut (f64, f64) = &mut sums[label as usize];
        *hits += weight * covered;
        *all += weight;
    }
    let gaps: Vec<f64> =
        sums.iter().filter(|(_, all)| *all > 0.0).map(|(hits, all)| (goal - hits / all).max(0.0)).collect();
    gaps.iter().sum::<f64>() / gaps.len() as f64
}

/// Whether resampling classwise ECE is affordable.
pub(super) fn classwise_affordable(rows: &Rows, resamples: usize) -> bool {
    (rows.len() * rows.classes()) as u64 * resamples as u64 <= MAX_CLASSWISE_WORK
}

/// Runs `one` for every resample on all processors.
fn each<T: Send>(resamples: usize, one: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(resamples.max(1));
    let one = &one;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|t| scope.spawn(move || (t..resamples).step_by(threads).map(one).collect::<Vec<T>>()))
            .collect();
        threads.into_iter().filter_map(|t| t.join().ok()).flatten().collect()
    })
}

/// A table per resample of the images, drawn with replacement within each class. Equal `seed`s draw equal images.
pub(super) fn bootstrap(
    resamples: usize,
    seed: u64,
    labels: &[u32],
    classes: usize,
    weights: &Weights,
    of: impl Fn(&Weights) -> Table + Sync,
) -> Vec<Table> {
    let mut by_class: Vec<Vec<usize>> = vec![Vec::new(); classes];
    labels.iter().enumerate().for_each(|(row, &l)| by_class[l as usize].push(row));
    each(resamples, |n| {
        let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(n as u64));
        let mut counts = vec![0.0; labels.len()];
        for rows in by_class.iter().filter(|rows| !rows.is_empty()) {
            for _ in 0..rows.len() {
                counts[rows[random.usize(..rows.len())]] += 1.0;
            }
        }
        of(&weights.times(&counts))
    })
}

/// A table per draw of every label from the subject's own scores.
pub(super) fn null(
    resamples: usize,
    seed: u64,
    subject: &Subject<'_>,
    weights: &Weights,
    slices: &[Slice],
    classwise: bool,
) -> Vec<Table> {
    each(resamples, |n| {
        let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(1_000_033).wrapping_add(n as u64));
        let draw = |row: usize, at: f64| {
            let mut sum = 0.0;
            let p = subject.rows.row(row);
            p.iter()
                .position(|p| {
                    sum += p;
                    sum > at
                })
                .unwrap_or(p.len() - 1) as u32
        };
        let labels: Vec<u32> = (0..subject.rows.len()).map(|row| draw(row, random.f64())).collect();
        measure(subject, weights, slices, Some(&labels), classwise)
    })
}

/// Values with their intervals and null bands.
pub(super) fn figures(values: &Table, resampled: &[Table], null: &[Table], classwise: bool) -> Vec<Vec<Figure>> {
    let figure = |slice: usize, metric: usize| {
        let known = metric != CLASSWISE || classwise;
        let over = |tables: &[Table]| {
            let mut values: Vec<f64> =
                tables.iter().map(|t| t[slice][metric]).filter(|v| known && v.is_finite()).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (resampled, null) = (over(resampled), over(if BINNED.contains(&metric) { null } else { &[] }));
        Figure {
            value: values[slice][metric],
            interval: quantile(&resampled, 0.025).zip(quantile(&resampled, 0.975)).map(|(low, high)| [low, high]),
            null: quantile(&null, 0.95),
        }
    };
    (0..values.len()).map(|slice| (0..METRICS.len()).map(|metric| figure(slice, metric)).collect()).collect()
}

/// By linear interpolation between the nearest ranks.
fn quantile(ascending: &[f64], q: f64) -> Option<f64> {
    let at = q * ascending.len().checked_sub(1)? as f64;
    let (below, part) = (at as usize, at.fract());
    let above = ascending.get(below + 1).unwrap_or(&ascending[below]);
    Some(ascending[below] * (1.0 - part) + above * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(count: u64) -> Class {
        Class { label: count.to_string(), count: Some(count) }
    }

    /// Scores that are the training mix itself know nothing and are perfectly calibrated under it.
    #[test]
    fn chance_alone_explains_what_a_calibrated_scorer_shows_on_every_slice() {
        let labels: Vec<u32> = (0..2000).map(|n| n % 2).collect();
        let rows = Rows::new(2, [0.9, 0.1].repeat(2000), labels.clone());
        let (subject, slices) = (Subject { rows: &rows, sets: None, coverage: 0.9 }, slices(&[class(900), class(100)]));
        let weights = Weights::new(&labels, &[0.9, 0.1]);
        let found = measure(&subject, &weights, &slices, None, true);
        let null = null(100, 0, &subject, &weights, &slices, true);
        let figures = figures(&found, &[], &null, true);
        for (slice, figures) in slices.iter().zip(figures) {
            for figure in &figures[BINNED] {
                assert!(figure.value <= figure.null.unwrap() + 1e-9, "{}: {figure:?}", slice.name);
            }
        }
    }

    #[test]
    fn no_class_makes_up_for_anothers_gap() {
        let (labels, weights) = ([0, 0, 1, 1, 2, 2], [1.0, 1.0, 5.0, 5.0, 0.0, 0.0]);
        // The first is covered half of the time, the second always; the third has no weight.
        let found = under_coverage(&[1.0, 0.0, 1.0, 1.0, 0.0, 0.0], &labels, &weights, 3, 0.9);
        assert!((found - 0.4 / 2.0).abs() < 1e-12, "{found}");
        assert!(under_coverage(&[0.0; 6], &labels, &[0.0; 6], 3, 0.9).is_nan());
    }

    #[test]
    fn a_class_without_images_counts_in_no_figure() {
        let classes = [class(900), class(50), class(5)];
        let rows = Rows::new(3, [0.6, 0.3, 0.1].repeat(10), [0, 1].repeat(5));
        let subject = Subject { rows: &rows, sets: None, coverage: 0.9 };
        let weights = Weights::new(rows.labels(), &[1.0 / 3.0; 3]);
        let found = measure(&subject, &weights, &slices(&classes), None, true);
        // Class 0 has scores of .6 and is half of the images, class 1 .3 and half.
        assert!((found[0][CLASSWISE] - (0.1 + 0.2) / 2.0).abs() < 1e-12, "{}", found[0][CLASSWISE]);
        // Of the few-shot class there is nothing to be said.
        assert!(found[4].iter().all(|value| value.is_nan()), "{:?}", found[4]);
    }
}
