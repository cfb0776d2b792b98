//! What a run leaves on disk: the checkpoint that `nbn fold export` reads, and beside it what `--resume` needs.
//!
//! Both are written under another name and renamed, the state first: whatever interrupts a run, the last good files stay.
//!
//! A run that begins anew over an earlier one ([`FirstSave`]) first writes all of its files whole beside the earlier
//! ones, under waiting names, the state before the others. The run changes when the new state takes its place. A process
//! that ends before that moment has changed nothing; when one ends after it, the next process puts the other files into
//! their places ([`settle`]).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::network::{Network, State, host};
use super::optimizer::Optimizer;
use super::recipe::Recipe;
use crate::bundle::Class;
use crate::files;
use crate::fold::checkpoint::Tensor as Values;

/// Version of the state file's form.
const FORMAT: u32 = 1;
/// Key of the progress in the state file's metadata.
const PROGRESS: &str = "nbn.progress";
/// Key of [`Progress::set`] in the checkpoint's metadata.
pub const SET_KEY: &str = "nbn.set";

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

    /// Checks that a run over `images` images, in epochs of `steps` steps, can have come this far.
    ///
    /// # Errors
    /// Names the number that is out of range, and the range.
    pub fn check(&self, images: usize, steps: usize) -> Result<(), String> {
        let numbers = [
            ("epoch", self.epoch, self.recipe.epochs),
            ("step", self.step, steps.saturating_sub(1)),
            ("seen", self.seen, images),
            ("right", self.right, self.seen),
        ];
        if let Some((what, value, most)) = numbers.into_iter().find(|(_, value, most)| value > most) {
            return Err(format!("its {what} is {value}; in this run it can be at most {most}"));
        }
        for (what, value) in [("loss", self.loss), ("seconds", self.seconds)] {
            if !(0.0..=1e50).contains(&value) {
                return Err(format!("its {what} is {value}; it must lie in 0..=1e50"));
            }
        }
        Ok(())
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
    /// `NAME.broken.json`: the images left out because they cannot be decoded, where there are such.
    pub broken: PathBuf,
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
            broken: beside("broken.json"),
        }
    }

    /// All of them.
    pub fn every(&self) -> impl Iterator<Item = &Path> {
        self.after_the_state().into_iter().chain([self.state.as_path()])
    }

    /// All but the state, in the order in which they take their places.
    fn after_the_state(&self) -> [&Path; 5] {
        [&self.checkpoint, &self.metrics, &self.training, &self.calibration, &self.broken]
    }

    /// Removes `names` beside the checkpoint, in this order. The folder holds the lock and so stays.
    fn remove(&self, names: &[String]) {
        let folder = self.checkpoint.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        // The user may have put a link in the folder's place.
        files::remove_own(&fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned()), &names);
    }
}

/// Takes the run for this process, as long as the file is kept open.
///
/// # Errors
/// When another process has it, or the folder cannot be written.
pub fn lock(files: &Files) -> Result<File, TrainError> {
    let name = files.checkpoint.file_stem().unwrap_or_default().to_string_lossy();
    let path = files.checkpoint.with_file_name(format!(".{name}.lock"));
    let file = File::create(&path).map_err(|cause| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match cause.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                TrainError::Input(format!("{}: {cause}: give --out in a folder that can be written", folder.display()))
            }
            _ => TrainError::File { path: path.clone(), cause, kept: String::new() },
        }
    })?;
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
    files::replace_through(&partial(path), path, content).map_err(failed(path, kept))
}

fn failed(path: &Path, kept: &str) -> impl FnOnce(io::Error) -> TrainError {
    let (path, kept) = (path.to_owned(), kept.to_owned());
    move |cause| TrainError::File { path, cause, kept }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The name under which `path` is written; the lock on the run keeps others away.
fn partial(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.partial", name(path)))
}

/// The name under which a new run's file, written whole, waits to take the place of the earlier run's.
fn waiting(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.next", name(path)))
}

/// The files with which a run begins.
pub struct FirstSave {
    /// As [`state_content`] gives it.
    pub state: Vec<u8>,
    /// As [`checkpoint_content`] gives it.
    pub checkpoint: Vec<u8>,
    /// A line per epoch that is done.
    pub metrics: Vec<u8>,
    /// The records trained on.
    pub training: Vec<u8>,
    /// The records held out.
    pub calibration: Vec<u8>,
    /// The images left out, where there are such.
    pub broken: Option<Vec<u8>>,
}

impl FirstSave {
    /// Puts the run in the place of an earlier one, of which nothing changes until all is written.
    ///
    /// # Errors
    /// When the disk is full or the folder cannot be written.
    pub fn write(&self, files: &Files) -> Result<(), TrainError> {
        let parts = [
            (&files.state, &self.state),
            (&files.checkpoint, &self.checkpoint),
            (&files.metrics, &self.metrics),
            (&files.training, &self.training),
            (&files.calibration, &self.calibration),
        ];
        let kept = if files.state.exists() || files.checkpoint.exists() {
            "; the earlier run is unchanged: free some space or solve the problem, then start again"
        } else {
            ""
        };
        let broken = self.broken.as_ref().map(|broken| (&files.broken, broken));
        for (path, content) in parts.into_iter().chain(broken) {
            let written = files::replace_through(&partial(path), &waiting(path), content);
            written.map_err(failed(path, kept)).inspect_err(|_| give_up(files))?;
        }
        take_place(&files.state)?;
        take_places(files)
    }
}

/// Ends what a process that was putting one run in the place of another has left in between: the new one stands whole
/// when its state had taken its place, else the earlier one does. To be called with the lock held.
///
/// # Errors
/// When the folder cannot be written.
pub fn settle(files: &Files) -> Result<(), TrainError> {
    if waiting(&files.state).exists() {
        give_up(files);
        return Ok(());
    }
    take_places(files)
}

/// Removes what waits, the state last: as long as it is there, nothing of the rest counts.
fn give_up(files: &Files) {
    let paths = files.after_the_state().into_iter().chain([files.state.as_path()]);
    let names: Vec<String> = paths.flat_map(|path| [name(&partial(path)), name(&waiting(path))]).collect();
    files.remove(&names);
}

/// Puts the files of a run whose state stands into their places. The earlier run's lists and metrics go before its
/// checkpoint does: no moment leaves a checkpoint beside lists of images that another run trained on.
fn take_places(files: &Files) -> Result<(), TrainError> {
    if waiting(&files.checkpoint).exists() {
        files.remove(&[&files.training, &files.calibration, &files.broken, &files.metrics].map(|path| name(path)));
    }
    files.after_the_state().into_iter().filter(|path| waiting(path).exists()).try_for_each(take_place)
}

fn take_place(path: impl AsRef<Path>) -> Result<(), TrainError> {
    let path = path.as_ref();
    let draft = waiting(path);
    let file = OpenOptions::new().write(true).open(&draft);
    file.and_then(|file| files::commit(&file, &draft, path)).map_err(failed(path, ""))
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

/// The checkpoint's bytes: the authors' names, raw directions and magnitudes, and `metadata`.
///
/// # Errors
/// When the values do not make a safetensors file.
pub fn checkpoint_content(
    network: &Network,
    state: &State,
    steps: usize,
    metadata: BTreeMap<String, String>,
) -> Result<Vec<u8>, TrainError> {
    // PyTorch's BatchNorm counts its batches, and a strict load wants the counter.
    let counters = network.norms().iter().map(|n| (format!("{n}.num_batches_tracked"), steps as i64)).collect();
    serialize(&network.store(state), &counters, metadata.into_iter().collect())
}

/// The state's bytes, as [`load`] reads them.
///
/// # Errors
/// As [`checkpoint_content`].
pub fn state_content(network: &Network, run: &Resumable) -> Result<Vec<u8>, TrainError> {
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
    serialize(&tensors, &BTreeMap::new(), HashMap::from([(PROGRESS.to_owned(), progress)]))
}

/// The metadata of the safetensors file at `path`, when there is one that can be read.
fn metadata(path: &Path) -> Option<HashMap<String, String>> {
    let bytes = fs::read(path).ok()?;
    let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
    header.metadata().clone()
}

/// Refuses to go on with the run at `progress` where the checkpoint is another run's: it would be overwritten.
///
/// # Errors
/// When the checkpoint tells of another recipe or other images.
pub fn check_checkpoint(files: &Files, progress: &Progress) -> Result<(), TrainError> {
    let Some(found) = metadata(&files.checkpoint) else { return Ok(()) };
    let recipe = found.get(crate::fold::RECIPE_KEY).and_then(|text| serde_json::from_str::<Recipe>(text).ok());
    // A run that got more epochs, or fewer, may have ended before its first checkpoint.
    let other_recipe = recipe.is_some_and(|recipe| !progress.recipe.obstacles(&recipe).is_empty());
    if !other_recipe && found.get(SET_KEY).is_none_or(|set| *set == progress.set) {
        return Ok(());
    }
    Err(TrainError::Input(format!(
        "{} belongs to another run than {}: move it elsewhere and continue with --resume, or replace both with \
         --overwrite",
        files.checkpoint.display(),
        files.state.display()
    )))
}

/// The classes of the checkpoint at `path`, when it tells.
pub fn classes(path: &Path) -> Option<Vec<Class>> {
    serde_json::from_str(metadata(path)?.get(crate::fold::CLASSES_KEY)?).ok()
}

/// How far the run of the state at `path` has come, when it tells.
pub fn progress(path: &Path) -> Option<Progress> {
    serde_json::from_str(metadata(path)?.get(PROGRESS)?).ok()
}

/// Reads the state that [`state_content`] made for the same `network`, whose tensors are as long as those in `start`.
///
/// # Errors
/// When the file cannot be read or is of another network, or holds values that are not finite.
pub fn load(path: &Path, network: &Network, start: &State, device: &Device) -> Result<Resumable, TrainError> {
    let refuse = |reason: String| {
        TrainError::Input(format!(
            "{}: not the state of this run: {reason}: start again with --overwrite",
            path.display()
        ))
    };
    let bytes = fs::read(path).map_err(failed(path, ""))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| refuse(e.to_string()))?;
    let text = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get(PROGRESS))
        .ok_or_else(|| refuse("it has no record of its progress".into()))?;
    let progress: Progress = serde_json::from_str(text).map_err(|e| refuse(e.to_string()))?;
    if progress.format != FORMAT {
        return Err(refuse(format!("its format is {}, this build reads {FORMAT}", progress.format)));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| refuse(e.to_string()))?;
    let tensor = |name: String, like: &Tensor<1>| tensor(&file, &name, like, device).map_err(refuse);
    let need =
        |name: String, like: &Tensor<1>| tensor(name.clone(), like)?.ok_or_else(|| refuse(format!("it lacks {name}")));
    let state = |prefix: &str| -> Result<State, TrainError> {
        let parameters = network.parameters().iter().zip(&start.parameters);
        let statistics = network.norms().iter().zip(&start.statistics);
        Ok(State {
            parameters: parameters
                .map(|(p, like)| need(format!("{prefix}/{}", p.name), like))
                .collect::<Result<_, _>>()?,
            statistics: statistics
                .map(|(n, (mean, variance))| {
                    let mean = need(format!("{prefix}/{n}.running_mean"), mean)?;
                    Ok((mean, need(format!("{prefix}/{n}.running_var"), variance)?))
                })
                .collect::<Result<_, TrainError>>()?,
        })
    };
    let parameters = network.parameters().iter().zip(&start.parameters);
    let velocities =
        parameters.map(|(p, like)| tensor(format!("velocity/{}", p.name), like)).collect::<Result<_, _>>()?;
    Ok(Resumable {
        state: state("weights")?,
        ema: progress.recipe.ema.map(|_| state("ema")).transpose()?,
        optimizer: Optimizer { velocities },
        progress,
    })
}

/// The tensor `name` of `file`, where there is one: f32, as long as `like`, and finite.
fn tensor(file: &SafeTensors<'_>, name: &str, like: &Tensor<1>, device: &Device) -> Result<Option<Tensor<1>>, String> {
    let Ok(view) = file.tensor(name) else { return Ok(None) };
    let [expected] = like.dims();
    let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    if view.dtype() != Dtype::F32 || values.len() != expected {
        return Err(format!(
            "{name} has the shape {:?} and the type {:?}; expected {expected} values of F32",
            view.shape(),
            view.dtype()
        ));
    }
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(format!("{name} holds {value}"));
    }
    Ok(Some(Tensor::from_data(TensorData::new(values, [expected]), device)))
}
