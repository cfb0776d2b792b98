//! How many images a network in training gets right.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use serde::Serialize;

use super::TrainError;
use super::network::{Network, State};
use super::run::Job;
use crate::bundle::Group;
use crate::data::LabelledImages;
use crate::pixels::{DecodeLimits, Preprocessor};

/// Images of one evaluation step.
const EVALUATION_BATCH: usize = 100;

/// Top-1 accuracy, from 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Accuracy {
    /// The images that it was measured on.
    pub set: String,
    /// How many.
    pub images: usize,
    /// How many were right.
    pub right: usize,
    /// Share that was right.
    pub overall: f64,
    /// Mean recall of the classes of more than 100, 20 to 100, and fewer than 20 training images.
    pub groups: BTreeMap<Group, f64>,
    /// Share of each class that was right; none without images of it.
    pub recall: Vec<Option<f64>>,
    /// Mean length ‖f‖₂ of what the classifier sees, of the images of each group's classes.
    pub feature_strength: BTreeMap<Group, f64>,
}

/// Index of the first of the largest values.
pub(super) fn highest(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (k, v)| if *v > values[best] { k } else { best })
}

/// Top-1 accuracy of `state` on `images`, prepared as they will be when served.
///
/// # Errors
/// When an image cannot be decoded.
pub(super) fn evaluate(
    job: &Job,
    network: &Network,
    state: &State,
    images: &LabelledImages,
    name: &str,
) -> Result<Accuracy, TrainError> {
    let (classes, (_, side)) = (job.classes.len(), job.recipe.sides()?);
    let limits = DecodeLimits::OFFLINE;
    let preprocessor = Preprocessor::new(job.recipe.preprocessing.clone(), limits);
    let (mut hits, mut totals, mut lengths) = (vec![0usize; classes], vec![0usize; classes], vec![0.0; classes]);
    let pixels = 3 * side * side;
    for first in (0..images.len()).step_by(EVALUATION_BATCH) {
        let size = EVALUATION_BATCH.min(images.len() - first);
        let mut values = vec![0.0; size * pixels];
        values.par_chunks_exact_mut(pixels).enumerate().try_for_each(|(at, out)| {
            let picture = images
                .picture(first + at, job.recipe.preprocessing.exif, &limits)
                .map_err(|reason| TrainError::Image { name: images.name(first + at), reason })?;
            out.copy_from_slice(&preprocessor.normalize(&picture));
            Ok::<_, TrainError>(())
        })?;
        let input = Tensor::<4>::from_data(TensorData::new(values, [size, 3, side, side]), &job.device);
        let (logits, features) = network.evaluate_with_features(state, input);
        let [_, dimensions] = features.dims();
        let [logits, features] =
            [logits, features].map(|rows| rows.into_data().convert::<f32>().try_into_vec::<f32>().unwrap_or_default());
        let rows = logits.chunks_exact(classes).zip(features.chunks_exact(dimensions.max(1)));
        for ((row, seen), &label) in rows.zip(&images.labels()[first..first + size]) {
            totals[label as usize] += 1;
            hits[label as usize] += usize::from(highest(row) == label as usize);
            lengths[label as usize] += seen.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        }
    }
    let recall: Vec<Option<f64>> =
        hits.iter().zip(&totals).map(|(&hit, &total)| (total > 0).then(|| hit as f64 / total as f64)).collect();
    let mut groups: BTreeMap<Group, Vec<f64>> = BTreeMap::new();
    for (class, recall) in job.classes.iter().zip(&recall) {
        if let (Some(group), Some(recall)) = (class.group(), recall) {
            groups.entry(group).or_default().push(*recall);
        }
    }
    let mut strength: BTreeMap<Group, (f64, usize)> = BTreeMap::new();
    for (class, (length, total)) in job.classes.iter().zip(lengths.iter().zip(&totals)) {
        if let Some(group) = class.group() {
            let (lengths, images) = strength.entry(group).or_default();
            (*lengths, *images) = (*lengths + length, *images + total);
        }
    }
    strength.retain(|_, (_, images)| *images > 0);
    let right: usize = hits.iter().sum();
    Ok(Accuracy {
        set: name.to_owned(),
        images: images.len(),
        right,
        overall: right as f64 / images.len() as f64,
        groups: groups.into_iter().map(|(g, r)| (g, r.iter().sum::<f64>() / r.len() as f64)).collect(),
        recall,
        feature_strength: strength.into_iter().map(|(g, (lengths, images))| (g, lengths / images as f64)).collect(),
    })
}
