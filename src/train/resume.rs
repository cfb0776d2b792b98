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
        Ok(run) => Some(run.progress.recipe.clone()),
        Err(_) => state::recipe(path),
    };
    let mut differences = begun.map(|begun| job.recipe.obstacles(&begun)).unwrap_or_default();
    if run.as_ref().is_ok_and(|run| run.progress.set != set) {
        differences.insert(0, other_images(job));
    }
    if !differences.is_empty() {
        return Err(TrainError::OtherRecipe { path: path.clone(), differences: differences.join("; ") });
    }
    let run = run?;
    run.progress.check(job.training.len(), per_epoch).map_err(|reason| {
        TrainError::Input(format!("{} is damaged: {reason}: start again with --overwrite", path.display()))
    })?;
    state::check_checkpoint(&job.files, &run.progress)?;
    Ok(run)
}

/// What tells the images of the run from those of its list.
fn other_images(job: &Job) -> String {
    let begun = Records::load(&job.files.training).ok();
    let difference = begun.and_then(|begun| job.records[0].difference(&begun));
    difference.unwrap_or_else(|| "the training images or classes differ, or are in another order".into())
}

/// Copies the checkpoint of a run that had finished, to `NAME.epoch-N.safetensors`: longer training may make it worse.
pub(super) fn keep_finished(files: &Files, epochs: usize) -> Result<Option<PathBuf>, TrainError> {
    let path = files.checkpoint.with_extension(format!("epoch-{epochs}.safetensors"));
    match fs::read(&files.checkpoint) {
        Ok(content) => state::replace(&path, &content, "").map(|()| Some(path)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(TrainError::File { path: files.checkpoint.clone(), cause, kept: String::new() }),
    }
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
            let differences = format!(
                "the images that {} lists are others now: some were added to the set or removed from it",
                path.display()
            );
            return Err(TrainError::OtherRecipe { path: job.files.state.clone(), differences });
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
