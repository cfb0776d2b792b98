//! The loop: epochs of steps, an evaluation, a checkpoint, and so on until the end or a stop.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use serde::Serialize;

use super::TrainError;
use super::blueprint;
use super::evaluation::{Accuracy, evaluate, highest};
use super::loader::{self, Loader};
use super::network::{Network, State, Strength, host};
use super::objective::Objective;
use super::optimizer::{Optimizer, learning_rate};
use super::recipe::Recipe;
use super::resume::{keep_finished, keep_lists, keep_metrics, resume};
use super::state::{self, Files, FirstSave, Progress, Resumable, SET_KEY};
use crate::bundle::{Class, sha256_hex};
use crate::data::{LabelledImages, Records};
use crate::fold::architecture;

/// What a run works on and with.
pub struct Job {
    /// What decides the result.
    pub recipe: Recipe,
    /// The classes, with the number of training images of each.
    pub classes: Vec<Class>,
    /// The images to train on.
    pub training: LabelledImages,
    /// Images that the network is measured on, and what they are called.
    pub evaluation: Option<(LabelledImages, String)>,
    /// Evaluates after every so many epochs, and after the last.
    pub evaluate_every: usize,
    /// Where the run is kept.
    pub files: Files,
    /// The list of images trained on, and that of those held out; written with the first save.
    pub records: [Records; 2],
    /// What the list of images that were left out says, in JSON, where there are such.
    pub broken: Option<String>,
    /// Goes on with a run that is there.
    pub resume: bool,
    /// Threads that prepare pictures.
    pub loaders: usize,
    /// Where the network is computed.
    pub device: Device,
}

/// What happens, for whoever watches.
pub enum Event<'a> {
    /// The run begins, or goes on, at this point.
    Start {
        /// Whole epochs done.
        epoch: usize,
        /// Steps done in the next.
        step: usize,
        /// Steps of an epoch.
        steps: usize,
        /// Where a run gets more epochs than it had, or fewer.
        length: Option<NewLength>,
        /// Learned values.
        parameters: usize,
    },
    /// A step is done.
    Step {
        /// Steps done in this epoch.
        step: usize,
        /// Mean loss of the epoch so far.
        loss: f64,
        /// Images per second of this epoch in this process.
        images_per_second: f64,
    },
    /// An epoch is done and saved.
    Epoch(&'a EpochReport),
}

/// A schedule that is laid over another number of epochs than before.
#[derive(Debug, Clone, PartialEq)]
pub struct NewLength {
    /// Epochs that it was laid over.
    pub before: usize,
    /// Learning rate of the next step.
    pub rate: f64,
    /// Epochs of the schedule's steps, which stay where they were.
    pub steps: Vec<usize>,
    /// The checkpoint of the run that had finished.
    pub kept: Option<PathBuf>,
}

/// One line of the metrics file.
#[derive(Debug, Clone, Serialize)]
pub struct EpochReport {
    /// Epochs done.
    pub epoch: usize,
    /// Epochs that the learning rate's schedule is laid over: from where it changes, the run was given another number.
    pub epochs: usize,
    /// Mean training loss.
    pub loss: f64,
    /// Top-1 accuracy on the varied training pictures, as they were learned from.
    pub training_accuracy: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Norm of the last step's gradient.
    pub gradient_norm: f64,
    /// The acting magnitudes.
    pub magnitudes: Vec<f32>,
    /// How large the norms are that may be normalised: those of the last stage.
    pub norms: Vec<Strength>,
    /// Training images per second, in this process.
    pub images_per_second: f64,
    /// Seconds of training so far, without evaluation.
    pub seconds: f64,
    /// What the evaluation gave, where there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Accuracy>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All epochs are done.
    Done,
    /// It was asked to stop, and is saved.
    Stopped,
}

/// Trains until the recipe's epochs are done or `stop` is set.
///
/// # Errors
/// Whatever happens, the last good checkpoint and state stay on disk.
pub fn run(job: &Job, stop: &AtomicBool, watch: &mut dyn FnMut(Event<'_>)) -> Result<End, TrainError> {
    job.recipe.check()?;
    let _lock = state::lock(&job.files)?;
    state::settle(&job.files)?;
    let classes = job.classes.len();
    let (_, side) = job.recipe.sides()?;
    let (start, found) = blueprint::start(&job.recipe, classes, side)?;
    let mut network = Network::new(&found)?;
    let initial = network.load(&start, &job.device)?;
    let recipe = Arc::new(job.recipe.clone());
    let images = Arc::new(job.training.clone());
    let set = digest(&job.classes, &job.training);
    let per_epoch = loader::steps(images.len(), recipe.batch);
    let mut run =
        if job.resume { resume(job, &network, &initial, &set, per_epoch)? } else { begin(job, &network, initial, set) };
    let begun_with = run.progress.recipe.epochs;
    // Longer training may make it worse.
    let finished = begun_with < recipe.epochs && run.progress.epoch == begun_with;
    let finished = finished.then(|| checkpoint(job, &network, &run, per_epoch)).transpose()?;
    run.progress.recipe = job.recipe.clone();
    let counts: Vec<u64> = job.classes.iter().map(|c| c.count.unwrap_or(0)).collect();
    let objective = Objective::new(&recipe, &counts);
    let mut saved = job.resume;
    if job.resume {
        keep_lists(job)?;
        keep_metrics(&job.files, run.progress.epoch)?;
    }
    let kept = finished.map(|content| keep_finished(&job.files, begun_with, &content)).transpose()?;
    watch(Event::Start {
        epoch: run.progress.epoch,
        step: run.progress.step,
        steps: per_epoch,
        length: (begun_with != recipe.epochs).then(|| NewLength {
            before: begun_with,
            rate: learning_rate(&recipe, run.progress.epoch * per_epoch + run.progress.step, per_epoch),
            steps: recipe.milestones.clone(),
            kept,
        }),
        parameters: network.parameters().iter().map(|p| p.shape.iter().product::<usize>()).sum(),
    });
    if run.progress.epoch >= recipe.epochs {
        if begun_with != recipe.epochs {
            state::replace(&job.files.state, &state::state_content(&network, &run)?, "")?;
        }
        // The process that did the last epoch may have ended between the state and the checkpoint.
        save_checkpoint(job, &network, &run, per_epoch)?;
    }
    while run.progress.epoch < recipe.epochs {
        let epoch = run.progress.epoch;
        let begun = Instant::now();
        let (seconds, seen_before) = (run.progress.seconds, run.progress.seen);
        let batches = Loader::start(&images, classes, &recipe, epoch, run.progress.step, job.loaders.max(1));
        let (mut rate, mut gradient_norm) = (0.0, 0.0);
        for batch in batches {
            let batch = batch?;
            let step = epoch * per_epoch + run.progress.step;
            rate = learning_rate(&recipe, step, per_epoch);
            gradient_norm = one_step(job, &network, &objective, &mut run, batch, (step, rate))?;
            run.progress.step += 1;
            run.progress.seconds = seconds + begun.elapsed().as_secs_f64();
            watch(Event::Step {
                step: run.progress.step,
                loss: run.progress.loss / run.progress.seen as f64,
                images_per_second: (run.progress.seen - seen_before) as f64 / begun.elapsed().as_secs_f64(),
            });
            if stop.load(Ordering::Relaxed) && run.progress.step < per_epoch {
                save(job, &network, &run, per_epoch, None, &mut saved)?;
                return Ok(End::Stopped);
            }
        }
        let progress = run.progress.clone();
        run.progress = Progress { epoch: epoch + 1, step: 0, loss: 0.0, seen: 0, right: 0, ..progress.clone() };
        let due = (epoch + 1) % job.evaluate_every.max(1) == 0 || epoch + 1 == recipe.epochs;
        let evaluation = match &job.evaluation {
            Some((set, name)) if due => evaluate(job, &network, averaged(&run), set, name).map(Some),
            _ => Ok(None),
        };
        // What was learned is kept also where a test picture cannot be read.
        let (evaluation, unmeasured) = match evaluation {
            Ok(evaluation) => (evaluation, Ok(())),
            Err(error) => (None, Err(error)),
        };
        let report = EpochReport {
            epoch: epoch + 1,
            epochs: recipe.epochs,
            loss: progress.loss / progress.seen as f64,
            training_accuracy: progress.right as f64 / progress.seen as f64,
            learning_rate: rate,
            gradient_norm,
            magnitudes: magnitudes(&network, &run.state, &found),
            norms: last_stage(network.strengths(&run.state)),
            images_per_second: (progress.seen - seen_before) as f64 / (progress.seconds - seconds),
            seconds: progress.seconds,
            evaluation,
        };
        save(job, &network, &run, per_epoch, Some(&report), &mut saved)?;
        unmeasured?;
        watch(Event::Epoch(&report));
        if stop.load(Ordering::Relaxed) && epoch + 1 < recipe.epochs {
            return Ok(End::Stopped);
        }
    }
    Ok(End::Done)
}

fn begin(job: &Job, network: &Network, state: State, set: String) -> Resumable {
    Resumable {
        progress: Progress::new(job.recipe.clone(), set),
        ema: job.recipe.ema.map(|_| state.clone()),
        state,
        optimizer: Optimizer::new(network.parameters().len()),
    }
}

/// SHA-256 of the classes' names, and of the images' with their labels.
fn digest(classes: &[Class], images: &LabelledImages) -> String {
    let mut bytes = Vec::new();
    for class in classes {
        bytes.extend_from_slice(class.label.as_bytes());
        bytes.push(b'\n');
    }
    for (index, label) in images.labels().iter().enumerate() {
        bytes.extend_from_slice(images.id(index).as_bytes());
        bytes.extend_from_slice(&label.to_le_bytes());
    }
    sha256_hex(&bytes)
}

/// Learns from `batch`, in the run's step `step`, at learning rate `rate`. Returns the norm of the gradient.
fn one_step(
    job: &Job,
    network: &Network,
    objective: &Objective,
    run: &mut Resumable,
    batch: loader::Batch,
    (step, rate): (usize, f64),
) -> Result<f64, TrainError> {
    let (classes, (_, side)) = (job.classes.len(), job.recipe.sides()?);
    let images = TensorData::new(batch.images, [batch.size, 3, side, side]);
    let images = Tensor::<4>::from_data(images, &job.device);
    let tracked: Vec<Tensor<1>> =
        run.state.parameters.iter().map(|p| Tensor::from_inner(p.clone()).require_grad()).collect();
    let trained = network.train(&tracked, &run.state, images);
    let terms = objective.terms(&batch.targets, run.progress.epoch);
    let loss = objective.loss(&trained.logits, &terms, &job.device);
    let value = f64::from(loss.clone().inner().into_scalar::<f32>());
    if !value.is_finite() {
        return Err(diverged(job, network, run, ("the loss", value)));
    }
    run.progress.right += right(&trained.logits, &batch.targets, classes);
    run.progress.loss += value * batch.size as f64;
    run.progress.seen += batch.size;
    let mut gradients = loss.backward();
    let gradients = tracked.iter().map(|p| p.grad_remove(&mut gradients)).collect();
    drop(tracked);
    let values = &mut run.state.parameters;
    let gradient_norm = run.optimizer.step(&job.recipe, network.parameters(), values, gradients, rate);
    if !gradient_norm.is_finite() {
        return Err(diverged(job, network, run, ("the norm of the gradient", gradient_norm)));
    }
    run.state.statistics = trained.statistics;
    if let (Some(ema), Some(decay)) = (&mut run.ema, job.recipe.ema) {
        let decay = ema_decay(decay, step);
        let mean = |kept: &Tensor<1>, new: &Tensor<1>| kept.clone() * decay + new.clone() * (1.0 - decay);
        ema.parameters = ema.parameters.iter().zip(&run.state.parameters).map(|(e, p)| mean(e, p)).collect();
        let statistics = ema.statistics.iter().zip(&run.state.statistics);
        ema.statistics = statistics.map(|(e, s)| (mean(&e.0, &s.0), mean(&e.1, &s.1))).collect();
    }
    Ok(gradient_norm)
}

/// What the running mean keeps of itself in step `step`, counted from 0: little at first, so that the random start does not
/// stay in it, and `decay` in the end (the schedule of TensorFlow's ExponentialMovingAverage).
pub fn ema_decay(decay: f64, step: usize) -> f64 {
    decay.min((1 + step) as f64 / (10 + step) as f64)
}

/// Images of a batch whose largest logit, averaged over the experts, is that of the largest target.
fn right(logits: &[Tensor<2>], targets: &[f32], classes: usize) -> usize {
    let sum = logits.iter().map(|z| z.clone().inner()).reduce(|a, b| a + b);
    let values =
        sum.map(|sum| sum.into_data().convert::<f32>().try_into_vec::<f32>().unwrap_or_default()).unwrap_or_default();
    let rows = values.chunks_exact(classes).zip(targets.chunks_exact(classes));
    rows.filter(|(z, t)| highest(z) == highest(t)).count()
}

fn diverged(job: &Job, network: &Network, run: &Resumable, (what, value): (&'static str, f64)) -> TrainError {
    let norm = |t: &Tensor<1>| host(t).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let mut norms: Vec<(f64, &str)> =
        network.parameters().iter().zip(&run.state.parameters).map(|(p, t)| (norm(t), p.name.as_str())).collect();
    // NaN sorts above all numbers.
    norms.sort_by(|a, b| b.0.total_cmp(&a.0));
    let norms: Vec<String> = norms.iter().take(4).map(|(norm, name)| format!("{name} {norm:.3e}")).collect();
    TrainError::Diverged {
        what,
        value,
        step: run.progress.step + 1,
        epoch: run.progress.epoch + 1,
        norms: norms.join(", "),
        kept: match run.progress.epoch {
            0 => String::new(),
            epoch => format!("; {} holds epoch {epoch}", job.files.checkpoint.display()),
        },
    }
}

/// What an error can say of the files that are there.
fn kept(job: &Job, run: &Resumable) -> String {
    match run.progress.epoch {
        0 => String::new(),
        _ if job.files.checkpoint.exists() => {
            format!(
                "; {} and what --resume needs are intact: free some space or solve the problem, then continue with \
                 --resume",
                job.files.checkpoint.display()
            )
        }
        _ => String::new(),
    }
}

/// The values to measure and to serve.
fn averaged(run: &Resumable) -> &State {
    run.ema.as_ref().unwrap_or(&run.state)
}

/// Those of the last stage, whatever is normalised: so that runs with and without can be compared.
fn last_stage(strengths: Vec<Strength>) -> Vec<Strength> {
    let stage = |name: &str| name.split('.').find_map(|part| part.strip_prefix("layer")?.parse::<u32>().ok());
    let last = strengths.iter().filter_map(|strength| stage(&strength.name)).max();
    strengths.into_iter().filter(|strength| last.is_some() && stage(&strength.name) == last).collect()
}

fn magnitudes(network: &Network, state: &State, found: &architecture::Network) -> Vec<f32> {
    let scale = network.parameters().iter().position(|p| p.name == architecture::SCALE_FACTOR);
    let values = scale.map(|index| host(&state.parameters[index])).unwrap_or_default();
    found.alphas.iter().filter_map(|alpha| values.get(alpha.index).copied()).collect()
}

/// Saves the run, with the line of the epoch where one is done. The first save puts the run in the place of an earlier
/// one.
fn save(
    job: &Job,
    network: &Network,
    run: &Resumable,
    per_epoch: usize,
    report: Option<&EpochReport>,
    saved: &mut bool,
) -> Result<(), TrainError> {
    let line = report.map(line).transpose()?.unwrap_or_default();
    if !*saved {
        let first = FirstSave {
            state: state::state_content(network, run)?,
            checkpoint: checkpoint(job, network, run, per_epoch)?,
            metrics: line.into_bytes(),
            training: job.records[0].to_json().into_bytes(),
            calibration: job.records[1].to_json().into_bytes(),
            broken: job.broken.clone().map(String::into_bytes),
        };
        first.write(&job.files)?;
        *saved = true;
        return Ok(());
    }
    append_metrics(job, &line, &kept(job, run))?;
    state::replace(&job.files.state, &state::state_content(network, run)?, &kept(job, run))?;
    save_checkpoint(job, network, run, per_epoch)
}

fn save_checkpoint(job: &Job, network: &Network, run: &Resumable, per_epoch: usize) -> Result<(), TrainError> {
    let content = checkpoint(job, network, run, per_epoch)?;
    state::replace(&job.files.checkpoint, &content, &kept(job, run))
}

fn checkpoint(job: &Job, network: &Network, run: &Resumable, per_epoch: usize) -> Result<Vec<u8>, TrainError> {
    let steps = run.progress.epoch * per_epoch + run.progress.step;
    state::checkpoint_content(network, averaged(run), steps, metadata(job, run)?)
}

/// What `nbn fold export` and `nbn fold calibrate` want to know of a checkpoint.
fn metadata(job: &Job, run: &Resumable) -> Result<BTreeMap<String, String>, TrainError> {
    let recipe = &run.progress.recipe;
    let json = |value: serde_json::Result<String>| value.map_err(|e| TrainError::Input(format!("the metadata: {e}")));
    let mut metadata = BTreeMap::from(
        [
            ("nbn.format", "1".to_owned()),
            ("nbn.arch", recipe.arch.to_string()),
            (architecture::LAYERS_KEY, recipe.normalized().to_string()),
            (architecture::MAGNITUDE_KEY, recipe.magnitude.to_string()),
            ("nbn.norm_epsilon", crate::fold::onnx::NORM_EPSILON.to_string()),
            (architecture::EPSILON_KEY, crate::fold::graph::BATCH_NORM_EPSILON.to_string()),
            (crate::fold::EPOCH_KEY, run.progress.epoch.to_string()),
            ("nbn.by", format!("fold {}", env!("CARGO_PKG_VERSION"))),
            (crate::fold::CLASSES_KEY, json(serde_json::to_string(&job.classes))?),
            (crate::fold::PREPROCESSING_KEY, json(serde_json::to_string(&recipe.preprocessing))?),
            (crate::fold::RECIPE_KEY, json(serde_json::to_string(recipe))?),
            (SET_KEY, run.progress.set.clone()),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    if let Some(kappa) = recipe.kappa() {
        metadata.insert(crate::fold::KAPPA_KEY.into(), kappa.to_string());
    }
    Ok(metadata)
}

fn line(report: &EpochReport) -> Result<String, TrainError> {
    let line = serde_json::to_string(report).map_err(|e| TrainError::Input(format!("the metrics: {e}")))?;
    Ok(line + "\n")
}

fn append_metrics(job: &Job, line: &str, kept: &str) -> Result<(), TrainError> {
    let path = &job.files.metrics;
    let file = OpenOptions::new().append(true).create(true).open(path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(|cause| TrainError::File {
        path: path.clone(),
        cause,
        kept: kept.to_owned(),
    })
}
