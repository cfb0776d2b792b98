//! What a run leaves on disk: the checkpoint that `fold export` reads, and beside it what `--resume` needs.
//!
//! Both are written under another name and renamed, the state first: whatever interrupts a run, the last good files stay.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::network::{Network, State, host};
use super::optimizer::Optimizer;
use super::recipe::Recipe;
use crate::files;
use crate::fold::checkpoint::Tensor as Values;

/// Version of the state file's form.
const FORMAT: u32 = 1;
/// Key of the progress in the state file's metadata.
const PROGRESS: &str = "nbn.progress";

/// How far a run has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Form of the file.
    pub format: u32,
    /// What decides the result.
    pub recipe: Recipe,
    /// SHA-256 of the classes' names and of the training records with their labels.
    pub set: String,
    /// Whole epochs done.
    pub epoch: usize,
    /// Steps done in the next one.
    pub step: usize,
    /// Sum of its losses so far, one per image.
    pub loss: f64,
    /// Its images so far.
    pub seen: usize,
    /// Of them, classified right.
    pub right: usize,
    /// Seconds of training so far.
    pub seconds: f64,
}

impl Progress {
    /// Nothing done.
    pub fn new(recipe: Recipe, set: String) -> Self {
        Self { format: FORMAT, recipe, set, epoch: 0, step: 0, loss: 0.0, seen: 0, right: 0, seconds: 0.0 }
    }
}

/// Everything that a run goes on with.
#[derive(Debug, Clone)]
pub struct Resumable {
    /// How far it is.
    pub progress: Progress,
    /// The network's values.
    pub state: State,
    /// Their running mean, where the recipe wants one.
    pub ema: Option<State>,
    /// The velocities.
    pub optimizer: Optimizer,
}

/// The files of a run whose checkpoint is `NAME.safetensors`.
#[derive(Debug, Clone)]
pub struct Files {
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// `NAME.state`: for `--resume`.
    pub state: PathBuf,
    /// `NAME.metrics.jsonl`: a line per epoch.
    pub metrics: PathBuf,
    /// `NAME.training.json`: the records trained on.
    pub training: PathBuf,
    /// `NAME.calibration.json`: the records held out.
    pub calibration: PathBuf,
}

impl Files {
    /// The names beside `checkpoint`.
    pub fn of(checkpoint: &Path) -> Self {
        let beside = |ending: &str| checkpoint.with_extension(ending);
        Self {
            checkpoint: checkpoint.to_owned(),
            state: beside("state"),
            metrics: beside("metrics.jsonl"),
            training: beside("training.json"),
            calibration: beside("calibration.json"),
        }
    }
}

/// Takes the run for this process, as long as the file is kept open.
///
/// # Errors
/// When another process has it, or the folder cannot be written.
pub fn lock(files: &Files) -> Result<File, TrainError> {
    let name = files.checkpoint.file_stem().unwrap_or_default().to_string_lossy();
    let path = files.checkpoint.with_file_name(format!(".{name}.lock"));
    let file = File::create(&path).map_err(|cause| TrainError::File { path, cause, kept: String::new() })?;
    // A file system without locks: two processes on one run are the user's to avoid.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(TrainError::Busy { checkpoint: files.checkpoint.clone() });
    }
    Ok(file)
}

/// Writes the whole of `path`, or leaves it as it was. `kept` says in an error what is still on disk.
///
/// # Errors
/// When the disk is full or the folder cannot be written.
pub fn replace(path: &Path, content: &[u8], kept: &str) -> Result<(), TrainError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    // The lock on the run keeps others away.
    files::replace_through(&partial, path, content).map_err(|cause| TrainError::File {
        path: path.to_owned(),
        cause,
        kept: kept.into(),
    })
}

/// The bytes of a safetensors file.
fn serialize(
    floats: &BTreeMap<String, Values>,
    counters: &BTreeMap<String, i64>,
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, TrainError> {
    let refuse = |error: safetensors::SafeTensorError| TrainError::Input(format!("the checkpoint: {error}"));
    let bytes: Vec<(&String, &[usize], Vec<u8>)> = floats
        .iter()
        .map(|(name, t)| (name, t.shape.as_slice(), t.values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let counted: Vec<(&String, Vec<u8>)> = counters.iter().map(|(n, c)| (n, c.to_le_bytes().to_vec())).collect();
    let mut views = Vec::new();
    for (name, shape, data) in &bytes {
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), data).map_err(refuse)?));
    }
    for (name, data) in &counted {
        views.push((name.as_str(), TensorView::new(Dtype::I64, Vec::new(), data).map_err(refuse)?));
    }
    safetensors::serialize(views, Some(metadata)).map_err(refuse)
}

/// Writes the checkpoint: the authors' names, raw directions and magnitudes, and `metadata`.
///
/// # Errors
/// As [`replace`].
pub fn save_checkpoint(
    path: &Path,
    network: &Network,
    state: &State,
    steps: usize,
    metadata: BTreeMap<String, String>,
    kept: &str,
) -> Result<(), TrainError> {
    // PyTorch's BatchNorm counts its batches, and a strict load wants the counter.
    let counters = network.norms().iter().map(|n| (format!("{n}.num_batches_tracked"), steps as i64)).collect();
    let content = serialize(&network.store(state), &counters, metadata.into_iter().collect())?;
    replace(path, &content, kept)
}

/// Writes the state.
///
/// # Errors
/// As [`replace`].
pub fn save(path: &Path, network: &Network, run: &Resumable, kept: &str) -> Result<(), TrainError> {
    let mut tensors = BTreeMap::new();
    let mut put = |prefix: &str, values: BTreeMap<String, Values>| {
        tensors.extend(values.into_iter().map(|(name, t)| (format!("{prefix}/{name}"), t)));
    };
    put("weights", network.store(&run.state));
    if let Some(ema) = &run.ema {
        put("ema", network.store(ema));
    }
    let velocities = network.parameters().iter().zip(&run.optimizer.velocities);
    put(
        "velocity",
        velocities
            .filter_map(|(p, v)| Some((p.name.clone(), Values { shape: p.shape.clone(), values: host(v.as_ref()?) })))
            .collect(),
    );
    let progress = serde_json::to_string(&run.progress).map_err(|e| TrainError::Input(format!("the state: {e}")))?;
    let content = serialize(&tensors, &BTreeMap::new(), HashMap::from([(PROGRESS.to_owned(), progress)]))?;
    replace(path, &content, kept)
}

/// The recipe of the state at `path`, when there is one.
pub fn recipe(path: &Path) -> Option<Recipe> {
    let bytes = fs::read(path).ok()?;
    let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
    let progress: Progress = serde_json::from_str(header.metadata().as_ref()?.get(PROGRESS)?).ok()?;
    Some(progress.recipe)
}

/// Reads the state that [`save`] wrote for the same `network`.
///
/// # Errors
/// When the file cannot be read or is of another network.
pub fn load(path: &Path, network: &Network, device: &Device) -> Result<Resumable, TrainError> {
    let fail = |cause| TrainError::File { path: path.to_owned(), cause, kept: String::new() };
    let refuse = |reason: String| {
        TrainError::Input(format!(
            "{}: not the state of such a run: {reason}: begin anew with --overwrite",
            path.display()
        ))
    };
    let bytes = fs::read(path).map_err(fail)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| refuse(e.to_string()))?;
    let text = header.metadata().as_ref().and_then(|m| m.get(PROGRESS)).ok_or_else(|| refuse("no progress".into()))?;
    let progress: Progress = serde_json::from_str(text).map_err(|e| refuse(e.to_string()))?;
    if progress.format != FORMAT {
        return Err(refuse(format!("its format is {}, this build reads {FORMAT}", progress.format)));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| refuse(e.to_string()))?;
    let tensor = |name: String| -> Option<Tensor<1>> {
        let view = file.tensor(&name).ok()?;
        let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let length = values.len();
        Some(Tensor::from_data(TensorData::new(values, [length]), device))
    };
    let state = |prefix: &str| -> Result<State, TrainError> {
        let need = |name: String| tensor(name.clone()).ok_or_else(|| refuse(format!("it lacks {name}")));
        Ok(State {
            parameters: network
                .parameters()
                .iter()
                .map(|p| need(format!("{prefix}/{}", p.name)))
                .collect::<Result<_, _>>()?,
            statistics: network
                .norms()
                .iter()
                .map(|n| Ok((need(format!("{prefix}/{n}.running_mean"))?, need(format!("{prefix}/{n}.running_var"))?)))
                .collect::<Result<_, TrainError>>()?,
        })
    };
    let velocities = network.parameters().iter().map(|p| tensor(format!("velocity/{}", p.name))).collect();
    Ok(Resumable {
        state: state("weights")?,
        ema: progress.recipe.ema.map(|_| state("ema")).transpose()?,
        optimizer: Optimizer { velocities },
        progress,
    })
}
