//! How many pictures are withheld as unlike the training pictures: of the test pictures, which are like them, and of others.

use std::sync::Arc;

use serde::Serialize;

use super::measure::{self, Weights};
use crate::bundle::Bundle;
use crate::classify::{Scorer, Seen};
use crate::data::Answers;
use crate::scores::{Familiarities, LogitsError};

/// Values of `unlike` that are reported, of those that the calibration images allow.
pub const UNLIKE_LEVELS: [f64; 3] = [0.01, 0.05, 0.1];

/// What `unlike` does.
#[derive(Debug, Clone, Serialize)]
pub struct FamiliarityFigures {
    /// Values of `unlike`.
    pub levels: Vec<f64>,
    /// Shares of the test pictures that are withheld, all classes counting the same, and those of each group; what is asked for
    /// is as much as the level.
    pub withheld: Vec<Withheld>,
    /// Pictures unlike the training pictures.
    pub foreign: Option<ForeignFigures>,
}

/// Shares of pictures that are withheld.
#[derive(Debug, Clone, Serialize)]
pub struct Withheld {
    /// `macro`, `many`, `medium` or `few`, by the true class.
    pub slice: &'static str,
    /// One for each level.
    pub shares: Vec<f64>,
}

/// Pictures unlike the training pictures.
#[derive(Debug, Clone, Serialize)]
pub struct ForeignFigures {
    /// Name of their folder.
    pub data: String,
    /// Pictures.
    pub images: usize,
    /// Share of pairs of a test picture and one of these in which this is the less familiar one; ties count half.
    pub auroc: f64,
    /// Shares that are withheld, one for each level.
    pub shares: Vec<f64>,
}

/// p of each of the pictures; none where the calibration knows nothing of familiarity.
fn ranked(scorer: &Scorer, answers: &Answers) -> Result<Option<Vec<f64>>, LogitsError> {
    let mut found = Vec::with_capacity(answers.logits.len());
    for row in 0..answers.logits.len() {
        let logits = answers.logits.logits(row)?;
        let features = answers.features.as_ref().map(|features| features[row].as_slice());
        let seen = Seen::new(&logits, features, answers.looks.get(row).map(Vec::as_slice));
        let Some(familiar) = scorer.familiarity(&seen) else { return Ok(None) };
        found.push(familiar.p);
    }
    Ok(Some(found))
}

/// Figures of the `test` pictures' familiarity, and of the `foreign` ones' in the folder of that name; none where the bundle's
/// calibration knows nothing of it.
///
/// # Errors
/// When a row of logits cannot be scored.
pub fn familiarity(
    bundle: &Bundle,
    test: &Answers,
    foreign: Option<(&str, &Answers)>,
) -> Result<Option<FamiliarityFigures>, LogitsError> {
    let scorer = Scorer::new(Arc::new(bundle.manifest.clone()), bundle.calibration.clone());
    let Some(own) = ranked(&scorer, test)? else { return Ok(None) };
    let least = scorer.familiarities().map_or(1.0, Familiarities::least);
    let levels: Vec<f64> = UNLIKE_LEVELS.into_iter().filter(|level| *level >= least).collect();
    let classes = &bundle.manifest.classes;
    let labels = test.logits.labels();
    let even = vec![1.0 / classes.len() as f64; classes.len()];
    let weights = Weights::new(labels, &even);
    let share_of = |values: &[f64], weights: &[f64], level: f64| {
        let (withheld, all) = values.iter().zip(weights).fold((0.0, 0.0), |(withheld, all), (p, weight)| {
            (withheld + if *p <= level { *weight } else { 0.0 }, all + weight)
        });
        withheld / all
    };
    let slices = measure::slices(classes);
    let withheld = slices.iter().filter(|slice| slice.name != "overall").filter_map(|slice| {
        let weights = slice.weights(&weights, labels);
        let has_some = weights.iter().any(|weight| *weight > 0.0);
        let shares = levels.iter().map(|&level| share_of(&own, &weights, level)).collect();
        has_some.then_some(Withheld { slice: slice.name, shares })
    });
    let withheld: Vec<Withheld> = withheld.collect();
    let foreign = match foreign {
        None => None,
        Some((data, answers)) => ranked(&scorer, answers)?.map(|theirs| {
            let even = vec![1.0; theirs.len()];
            ForeignFigures {
                data: data.to_owned(),
                images: theirs.len(),
                auroc: auroc(&own, &theirs),
                shares: levels.iter().map(|&level| share_of(&theirs, &even, level)).collect(),
            }
        }),
    };
    Ok(Some(FamiliarityFigures { levels, withheld, foreign }))
}

/// Share of pairs in which the `foreign` value is below the `own`; ties count half. Mann & Whitney 1947.
fn auroc(own: &[f64], foreign: &[f64]) -> f64 {
    let mut sorted = own.to_vec();
    sorted.sort_by(f64::total_cmp);
    let above = |p: &f64| {
        let at_most = sorted.partition_point(|own| own <= p);
        let below = sorted.partition_point(|own| own < p);
        (sorted.len() - at_most) as f64 + (at_most - below) as f64 / 2.0
    };
    foreign.iter().map(above).sum::<f64>() / (own.len() * foreign.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_and_ties_are_halves() {
        assert_eq!(auroc(&[0.5, 0.9], &[0.1, 0.2]), 1.0);
        assert_eq!(auroc(&[0.1, 0.2], &[0.5]), 0.0);
        assert_eq!(auroc(&[0.1, 0.5, 0.5], &[0.5]), 1.0 / 3.0);
    }
}
