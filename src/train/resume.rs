//! A run that goes on: what must be as it was, and what of its files is kept.

use std::fs;
use std::path::PathBuf;

use super::TrainError;
use super::network::{Network, State};
use super::run::Job;
use super::state::{self, Files, Resumable};
use crate::data::Records;

pub(super) fn resume(
    job: &Job,
    network: &Network,
    start: &State,
    set: &str,
    per_epoch: usize,
) -> Result<Resumable, TrainError> {
    let path = &job.files.state;
    // Another network would only be found out by a tensor that does not fit: the recipe says it better.
    let run = state::load(path, network, start, &job.device);
    let begun = match &run {
        Ok(run) => Some(run.progress.clone()),
        Err(_) => state::progress(path),
    };
    if let Some(begun) = begun {
        let mut differences = job.recipe.obstacles(&begun.recipe);
        // Other settings, as another seed, choose other images: of those, nothing need be said.
        if begun.set != set && differences.is_empty() {
            differences.push(other_images(job));
        }
        if !differences.is_empty() {
            return Err(TrainError::OtherRecipe { path: path.clone(), differences: differences.join("; ") });
        }
    }
    let run = run?;
    run.progress.check(job.training.len(), per_epoch).map_err(|reason| {
        TrainError::Input(format!("{} is damaged: {reason}: start again with --overwrite", path.display()))
    })?;
    let (epochs, done) = (job.recipe.epochs, run.progress.epoch + usize::from(run.progress.step > 0));
    if epochs < done {
        return Err(TrainError::Input(format!(
            "--epochs is {epochs}, and the run of {} has {}: give at least {done}, or start again with --overwrite",
            path.display(),
            if run.progress.step > 0 { format!("begun epoch {done}") } else { format!("done {done}") }
        )));
    }
    state::check_checkpoint(&job.files, &run.progress)?;
    Ok(run)
}

/// What tells the images of the run from those of its list.
fn other_images(job: &Job) -> String {
    let begun = Records::load(&job.files.training).ok();
    let difference = begun.and_then(|begun| job.records[0].difference(&begun));
    difference
        .or_else(|| other_class(job))
        .unwrap_or_else(|| "the training images or classes differ, or are in another order".into())
}

/// A class that has another name than in the run's checkpoint.
fn other_class(job: &Job) -> Option<String> {
    let begun = state::classes(&job.files.checkpoint)?;
    let mut both = job.classes.iter().zip(&begun).enumerate();
    let (index, (now, was)) = both.find(|(_, (now, was))| now.label != was.label)?;
    Some(format!("class {index} is {:?}, was {:?}", now.label, was.label))
}

/// Writes the checkpoint of a run that had finished, `NAME.epoch-N.safetensors`.
pub(super) fn keep_finished(files: &Files, epochs: usize, content: &[u8]) -> Result<PathBuf, TrainError> {
    let path = files.checkpoint.with_extension(format!("epoch-{epochs}.safetensors"));
    state::replace(&path, content, "").map(|()| path)
}

/// Drops the lines of epochs that are to be trained again.
pub(super) fn keep_metrics(files: &Files, epochs: usize) -> Result<(), TrainError> {
    let text = match fs::read_to_string(&files.metrics) {
        Ok(text) if epochs > 0 => text,
        Ok(_) => String::new(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(cause) => {
            return Err(TrainError::File { path: files.metrics.clone(), cause, kept: String::new() });
        }
    };
    let lines = text.lines().filter(|line| {
        let epoch = serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v["epoch"].as_u64());
        epoch.is_some_and(|epoch| epoch as usize <= epochs)
    });
    let kept: String = lines.map(|line| format!("{line}\n")).collect();
    state::replace(&files.metrics, kept.as_bytes(), "")
}

/// Writes the lists of records where one is missing: they follow from the recipe and the images. Where another list stands,
/// images were added to the set or removed from it.
pub(super) fn keep_lists(job: &Job) -> Result<(), TrainError> {
    for (path, records) in [&job.files.training, &job.files.calibration].into_iter().zip(&job.records) {
        if !path.exists() {
            state::replace(path, records.to_json().as_bytes(), "")?;
            continue;
        }
        let found = Records::load_any(path)
            .map_err(|error| TrainError::Input(format!("{error}: remove it to have it written anew")))?;
        if !found.is_same_as(records) {
            let differences = records.difference(&found).unwrap_or_else(|| "they are others".to_owned());
            return Err(TrainError::Input(format!(
                "the images that {} lists are others now: {differences}: continue with the images that the run had, or start \
                 again with --overwrite",
                path.display()
            )));
        }
        if found.is_outdated() {
            state::replace(path, records.to_json().as_bytes(), "")?;
        }
    }
    // What is left out may be more by now.
    match &job.broken {
        Some(broken) => state::replace(&job.files.broken, broken.as_bytes(), ""),
        None => Ok(()),
    }
}
