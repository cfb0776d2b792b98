//! Labelled logits → how good a bundle's scores are: figures with intervals, a comparison, a report.
//!
//! Every figure stands under two class priors: the images are weighted to each class mix, and calibrated scores are
//! answered under it. Proper scores (NLL, Brier) decide; binned errors are biased upward on few images, so each has
//! beside it what perfect calibration would give.

mod describe;
mod familiarity;
mod figures;
pub mod html;
mod measure;
mod plots;
mod table;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use crate::bundle::{Bundle, train_prior};
use crate::classify::{ScoreError, ScoreRequest, Scorer};
use crate::data::LabelledLogits;
use crate::metrics::{BINS, Bin, Rows};
use crate::scores::{Logits, LogitsError, Prior, SetError, SetScore, softmax_in_place};
use measure::{SetHits, Slice, Subject, Weights};

pub use familiarity::{FamiliarityFigures, ForeignFigures, UNLIKE_LEVELS, Withheld, familiarity};
pub use figures::{
    ClassFigures, Comparison, Confusion, Evaluation, PriorFigures, ReliabilityBin, ScorerFigures, SliceFigures,
};
pub use measure::{Figure, METRICS};

/// Pairs of confused classes that are reported.
const PAIRS: usize = 20;

/// How to evaluate.
#[derive(Debug, Clone, Copy)]
pub struct EvaluateOptions {
    /// Level of the prediction sets.
    pub alpha: f64,
    /// Resamples for intervals and null bands.
    pub resamples: usize,
    /// Their seed.
    pub seed: u64,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// The sets cannot be had.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// A row of logits cannot be scored.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// The two bundles' logits are of different images.
    #[error("the two bundles were run on {0} and {1} images: they can be compared only on the same images")]
    OtherImages(usize, usize),
}

/// One prior's scores of every image.
struct Scored {
    prior: Prior,
    weights: Weights,
    subjects: Vec<(&'static str, Rows, Option<[SetHits; 3]>)>,
}

/// Those of a calibration of the first schema lack the last.
const SETS: [SetScore; 3] = [SetScore::Pas, SetScore::Plain, SetScore::Posterior];

/// Measures `bundle` on its `logits` of `data`.
///
/// # Errors
/// When α cannot be had from the bundle's calibration.
pub fn evaluate(
    bundle: &Bundle,
    logits: &LabelledLogits,
    data: &str,
    options: &EvaluateOptions,
    progress: &dyn Fn(&str),
) -> Result<Evaluation, EvaluateError> {
    let classes = &bundle.manifest.classes;
    let slices = measure::slices(classes);
    let mut priors = Vec::new();
    let mut of_classes = None;
    for scored in priors_of(bundle) {
        progress(&format!("figures under the {} prior", scored.name()));
        let scored = score(bundle, logits, scored, options)?;
        let scorers = scored.subjects.iter().map(|(name, rows, sets)| {
            let subject = Subject { rows, sets: sets.as_ref(), coverage: 1.0 - options.alpha };
            ScorerFigures {
                scorer: name,
                slices: of_subject(&subject, &scored.weights, &slices, options),
                agreement: None,
            }
        });
        priors.push(PriorFigures { prior: scored.prior.name(), scorers: scorers.collect() });
        if scored.prior == Prior::Uniform {
            of_classes = Some((by_class(bundle, &scored), confusions(bundle, &scored), set_sizes(&scored)));
        }
    }
    let (classes, confusions, set_sizes) = of_classes.unwrap_or_default();
    Ok(Evaluation {
        bundle: format!("{}/{}", bundle.name, bundle.version),
        model_sha256: bundle.manifest.model.sha256.clone(),
        calibration: bundle.calibration.as_ref().map(|c| c.id.clone()),
        rung: bundle.calibration.as_ref().map(|bound| bound.content.rung.name()),
        data: data.to_owned(),
        images: logits.len(),
        left_out: 0,
        created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        alpha: options.alpha,
        resamples: options.resamples,
        absent_classes: logits.counts().iter().filter(|&&n| n == 0).count(),
        priors,
        classes,
        confusions,
        set_sizes,
        familiarity: None,
    })
}

/// Compares two bundles of the same classes on their logits of the same images: calibrated where both are, else softmax.
///
/// # Errors
/// When the images differ in number, or α cannot be had.
pub fn compare(
    first: &Bundle,
    first_logits: &LabelledLogits,
    second: &Bundle,
    second_logits: &LabelledLogits,
    options: &EvaluateOptions,
) -> Result<Comparison, EvaluateError> {
    if first_logits.labels() != second_logits.labels() {
        return Err(EvaluateError::OtherImages(first_logits.len(), second_logits.len()));
    }
    let slices = measure::slices(&first.manifest.classes);
    let mut differences = Vec::new();
    // Both are weighted to the first one's training prior.
    for prior in priors_of(first) {
        let (one, two) =
            (score(first, first_logits, prior.clone(), options)?, score(second, second_logits, prior, options)?);
        let mut scorers = Vec::new();
        for (name, rows, sets) in &one.subjects {
            let Some((_, other_rows, other_sets)) = two.subjects.iter().find(|(other, ..)| other == name) else {
                continue;
            };
            let (a, b) = (
                Subject { rows, sets: sets.as_ref(), coverage: 1.0 - options.alpha },
                Subject { rows: other_rows, sets: other_sets.as_ref(), coverage: 1.0 - options.alpha },
            );
            let classwise = measure::classwise_affordable(rows, options.resamples);
            let difference = |weights: &Weights, classwise: bool| {
                let mut table = measure::measure(&a, weights, &slices, None, classwise);
                let other = measure::measure(&b, weights, &slices, None, classwise);
                for (row, other) in table.iter_mut().zip(&other) {
                    row.iter_mut().zip(other).for_each(|(a, b)| *a -= b);
                }
                table
            };
            let values = difference(&one.weights, true);
            let labels = rows.labels();
            let resampled =
                measure::bootstrap(options.resamples, options.seed, labels, rows.classes(), &one.weights, |w| {
                    difference(w, classwise)
                });
            let figures = measure::figures(&values, &resampled, &[], classwise);
            let agreed = rows.predicted.iter().zip(&other_rows.predicted).filter(|(a, b)| a == b).count();
            let agreement = Some(agreed as f64 / rows.predicted.len().max(1) as f64);
            scorers.push(ScorerFigures { scorer: name, slices: named(&slices, figures), agreement });
        }
        differences.push(PriorFigures { prior: one.prior.name(), scorers });
    }
    let name = |bundle: &Bundle| format!("{}/{}", bundle.name, bundle.version);
    Ok(Comparison { bundle: name(first), against: name(second), differences })
}

fn priors_of(bundle: &Bundle) -> Vec<Prior> {
    let mut priors = vec![Prior::Uniform];
    priors.extend(train_prior(&bundle.manifest.classes).map(|_| Prior::Train));
    priors
}

fn score(
    bundle: &Bundle,
    logits: &LabelledLogits,
    prior: Prior,
    options: &EvaluateOptions,
) -> Result<Scored, EvaluateError> {
    let k = logits.classes();
    let uniform = || vec![1.0 / k as f64; k];
    let target = match prior {
        Prior::Train => train_prior(&bundle.manifest.classes).unwrap_or_else(uniform),
        _ => uniform(),
    };
    let weights = Weights::new(logits.labels(), &target);
    let rows = |p: Vec<f64>| Rows::new(k, p, logits.labels().to_vec());
    let softmax = |temperature: f64| {
        let mut p = Vec::with_capacity(logits.len() * k);
        for row in 0..logits.len() {
            let from = p.len();
            p.extend(logits.row(row).iter().map(|z| f64::from(*z) / temperature));
            softmax_in_place(&mut p[from..]);
        }
        rows(p)
    };
    let mut subjects = vec![("softmax", softmax(1.0), None)];
    if let Some(bound) = &bundle.calibration {
        subjects.push(("temperature", softmax(bound.content.temperature_alone), None));
        let (p, sets) = calibrated(bundle, logits, &prior, options)?;
        subjects.push(("calibrated", rows(p), Some(sets)));
    }
    Ok(Scored { prior, weights, subjects })
}

/// Probabilities [N, K] and set hits, through the scorer that serves.
fn calibrated(
    bundle: &Bundle,
    logits: &LabelledLogits,
    prior: &Prior,
    options: &EvaluateOptions,
) -> Result<(Vec<f64>, [SetHits; 3]), EvaluateError> {
    let scorer = Scorer::new(Arc::new(bundle.manifest.clone()), bundle.calibration.clone());
    let rule = |set_score| {
        let request = ScoreRequest {
            prior: Some(prior.clone()),
            alpha: Some(options.alpha),
            set_score: Some(set_score),
            ..ScoreRequest::default()
        };
        scorer.rule(request, prior)
    };
    let posterior = match rule(SETS[2]) {
        Err(ScoreError::Set(SetError::NoPosterior)) => None,
        found => Some(found?),
    };
    let rules = [Some(rule(SETS[0])?), Some(rule(SETS[1])?), posterior];
    let mut p = Vec::with_capacity(logits.len() * logits.classes());
    let mut sets = [SetHits::default(), SetHits::default(), SetHits::default()];
    for (row, &label) in logits.labels().iter().enumerate() {
        let z: Logits = logits.logits(row)?;
        for (n, rule) in rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            let scored = scorer.score(&z, rule);
            let members = scored.set.map(|set| set.members).unwrap_or_default();
            sets[n].covered.push(f64::from(u8::from(members.iter().any(|(k, _)| *k == label as usize))));
            sets[n].size.push(members.len() as f64);
            if n == 0 {
                p.extend_from_slice(scored.probabilities.values());
            }
        }
    }
    Ok((p, sets))
}

fn of_subject(
    subject: &Subject<'_>,
    weights: &Weights,
    slices: &[Slice],
    options: &EvaluateOptions,
) -> Vec<SliceFigures> {
    let rows = subject.rows;
    let EvaluateOptions { resamples, seed, .. } = *options;
    let classwise = measure::classwise_affordable(rows, resamples);
    let values = measure::measure(subject, weights, slices, None, true);
    let resampled = measure::bootstrap(resamples, seed, rows.labels(), rows.classes(), weights, |w| {
        measure::measure(subject, w, slices, None, classwise)
    });
    let null = measure::null(resamples, seed, subject, weights, slices, classwise);
    let mut named = named(slices, measure::figures(&values, &resampled, &null, classwise));
    for (slice, out) in slices.iter().zip(&mut named) {
        out.reliability = reliability(&rows.reliability(&slice.weights(weights, rows.labels())));
    }
    named
}

fn named(slices: &[Slice], figures: Vec<Vec<Figure>>) -> Vec<SliceFigures> {
    let metrics = |row: Vec<Figure>| METRICS.into_iter().zip(row).filter(|(_, f)| f.value.is_finite()).collect();
    let of = |(slice, row): (&Slice, Vec<Figure>)| SliceFigures {
        slice: slice.name,
        metrics: metrics(row),
        reliability: Vec::new(),
    };
    slices.iter().zip(figures).map(of).collect()
}

fn reliability(bins: &[Bin; BINS]) -> Vec<ReliabilityBin> {
    let total: f64 = bins.iter().map(|b| b.weight).sum();
    bins.iter()
        .filter(|b| b.weight > 0.0)
        .map(|b| ReliabilityBin {
            images: b.count,
            share: b.weight / total,
            confidence: b.confidence / b.weight,
            accuracy: b.hits / b.weight,
        })
        .collect()
}

fn by_class(bundle: &Bundle, scored: &Scored) -> Vec<ClassFigures> {
    let labels = scored.subjects[0].1.labels();
    let share = |k: usize, of: &[f64]| {
        let own = labels.iter().zip(of).filter(|(l, _)| **l as usize == k);
        let (sum, count) = own.fold((0.0, 0.0), |(sum, count), (_, v)| (sum + v, count + 1.0));
        sum / count
    };
    let of = |(k, class): (usize, &crate::bundle::Class)| {
        let sets = scored.subjects.iter().filter_map(|(_, _, sets)| sets.as_ref()).flat_map(|s| SETS.iter().zip(s));
        let sets = sets.filter(|(_, hits)| !hits.covered.is_empty());
        ClassFigures {
            label: class.label.clone(),
            group: class.group(),
            training_images: class.count,
            images: labels.iter().filter(|&&l| l as usize == k).count() as u64,
            recall: scored.subjects.iter().map(|(name, rows, _)| (*name, share(k, &rows.top1))).collect(),
            coverage: sets.map(|(method, hits)| (method.name(), share(k, &hits.covered))).collect(),
        }
    };
    bundle.manifest.classes.iter().enumerate().map(of).collect()
}

fn confusions(bundle: &Bundle, scored: &Scored) -> Vec<Confusion> {
    let Some((_, rows, _)) = scored.subjects.last() else { return Vec::new() };
    let mut totals = vec![0u64; rows.classes()];
    let mut pairs: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for (&label, &predicted) in rows.labels().iter().zip(&rows.predicted) {
        totals[label as usize] += 1;
        if label != predicted {
            *pairs.entry((label, predicted)).or_default() += 1;
        }
    }
    let label = |k: u32| bundle.manifest.classes[k as usize].label.clone();
    let mut confusions: Vec<Confusion> = pairs
        .into_iter()
        .map(|((own, other), images)| Confusion {
            label: label(own),
            taken_for: label(other),
            images,
            share: images as f64 / totals[own as usize] as f64,
        })
        .collect();
    confusions.sort_by(|a, b| b.share.total_cmp(&a.share).then(b.images.cmp(&a.images)));
    confusions.truncate(PAIRS);
    confusions
}

fn set_sizes(scored: &Scored) -> BTreeMap<&'static str, Vec<u64>> {
    let Some((_, _, Some(sets))) = scored.subjects.last() else { return BTreeMap::new() };
    let of = |hits: &SetHits| {
        let largest = hits.size.iter().copied().fold(1.0, f64::max) as usize;
        let mut counts = vec![0; largest];
        hits.size.iter().for_each(|size| counts[*size as usize - 1] += 1);
        counts
    };
    let given = SETS.iter().zip(sets).filter(|(_, hits)| !hits.covered.is_empty());
    given.map(|(method, hits)| (method.name(), of(hits))).collect()
}
