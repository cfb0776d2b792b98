//! One version of a model, ready to answer.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::{ModelOptions, RegistryError, RequestStats};
use crate::bundle::{Bundle, Manifest, Pixels};
use crate::classify::{Classifier, ClassifyError, Executor, Network, Preparer, Scorer, network_file, on_device};
use crate::engine::{Budget, Crew, Engine};
use crate::pixels::Preprocessor;
use crate::runtime::{Device, Library, OnnxModel, SessionOptions};

/// The largest batch that is tried when its size is chosen by measuring.
const LARGEST_BATCH: usize = 32;
/// The same on a device beside the processor.
const LARGEST_BATCH_APART: usize = 128;
/// Batches that a device has at once: one loads or is answered while the other runs.
const BATCHES_IN_FLIGHT: usize = 2;
/// A larger batch is taken when it saves more than this share of the time per picture. Below, a batch costs latency, and a
/// start that warms it, for what may be noise.
const WORTH_IT: f64 = 0.1;

/// How many pictures a run of the network may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchChoice {
    /// As many as measuring shows to pay.
    Measured,
    /// This many.
    Fixed(usize),
}

impl std::str::FromStr for BatchChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::Measured),
            Ok(n @ 1..=1024) => Ok(Self::Fixed(n)),
            _ => Err("expected auto, or a number from 1 to 1024".into()),
        }
    }
}

impl std::fmt::Display for BatchChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Measured => f.write_str("auto"),
            Self::Fixed(n) => write!(f, "{n}"),
        }
    }
}

/// One model and its workers.
pub struct ServedModel {
    /// Name in the repository.
    pub name: String,
    /// Version that is served.
    pub version: String,
    /// Its description.
    pub manifest: Arc<Manifest>,
    /// What its scores are.
    pub scorer: Scorer,
    /// What `nbn fold evaluate --card` measured.
    pub evaluation: Option<serde_json::Value>,
    /// Where it runs.
    pub devices: Vec<Device>,
    /// The most pictures in one run of the network.
    pub max_batch: usize,
    /// Which pixels of JPEGs it sees.
    pub pixels: Pixels,
    /// Its queue and workers.
    pub engine: Engine,
    /// What became of its requests.
    pub requests: RequestStats,
}

impl ServedModel {
    /// Opens the options' sessions over `bundle`, chooses the batch size, warms every session with each size, and starts
    /// their engine, whose workers share `budget`. On devices beside the processor, each has one session, and the options'
    /// workers prepare pictures for all of them.
    ///
    /// # Errors
    /// When the network does not open or does not fit its manifest, or a device that was named cannot be used.
    pub fn start(
        bundle: Bundle,
        library: &'static Library,
        options: &ModelOptions,
        budget: Arc<Budget>,
    ) -> Result<Self, RegistryError> {
        let failed = |cause: ClassifyError| RegistryError::Model {
            name: bundle.name.clone(),
            version: bundle.version.clone(),
            cause: Box::new(cause),
        };
        let open = |device| on_device(&bundle, library, device, options.place.session);
        let opened = options.place.wanted.apart(open).map_err(failed)?;
        let apart = opened.map(|opened| apart(&bundle, options, opened));
        let (crew, devices, max_batch) = match apart {
            Some(Err(error)) if options.place.wanted.falls_back(&error) => together(&bundle, library, options),
            Some(started) => started,
            None => together(&bundle, library, options),
        }
        .map_err(failed)?;
        let engine = Engine::start(crew, options.queue, budget)?;
        let Bundle { name, version, manifest, calibration, evaluation, .. } = bundle;
        let manifest = Arc::new(manifest);
        let scorer = Scorer::new(manifest.clone(), calibration);
        let requests = RequestStats::default();
        let pixels = options.limits.pixels;
        let fitted = scorer.calibration().map(|calibration| calibration.content.fit.pixels);
        if let Some(fitted) = fitted.filter(|fitted| *fitted != pixels) {
            tracing::warn!(
                model = %name, version = %version, pixels = pixels.name(), calibration = fitted.name(),
                "the model's calibration was fitted to other pixels: run `nbn fold calibrate --pixels` as it is served"
            );
        }
        Ok(Self { name, version, manifest, scorer, evaluation, devices, max_batch, pixels, engine, requests })
    }
}

/// What a crew runs on, and the most pictures in one of its runs.
type Opened = (Crew, Vec<Device>, usize);

/// Workers with a session each on the processor.
fn together(bundle: &Bundle, library: &'static Library, options: &ModelOptions) -> Result<Opened, ClassifyError> {
    let ModelOptions { workers, limits, batch, ref cache, ref place, .. } = *options;
    let mut max_batch = None;
    let warmed = thread::scope(|scope| {
        let mut warming = Vec::with_capacity(workers);
        // One is warmed while the next is opened.
        let opened = Classifier::open_each(bundle, library, place.session, limits, cache, workers, |mut classifier| {
            let max_batch = match (batch, max_batch) {
                (BatchChoice::Fixed(n), _) | (BatchChoice::Measured, Some(n)) => n,
                (BatchChoice::Measured, None) => {
                    *max_batch.insert(measured(bundle, classifier.network(), Device::Cpu, options)?)
                }
            };
            warming.push(scope.spawn(move || {
                let mut classifier = classifier.map_network(|network| asked(network, bundle, options, max_batch));
                classifier.network().warm().map(|()| classifier)
            }));
            Ok(())
        });
        // All are joined, whatever failed: a scope panics with the threads that it has to join itself.
        let warmed: Vec<Result<Classifier, ClassifyError>> =
            warming.into_iter().map(|t| t.join().unwrap_or_else(died)).collect();
        opened.and_then(|()| warmed.into_iter().collect::<Result<Vec<_>, _>>())
    });
    let classifiers = warmed?;
    let max_batch = classifiers.first().map_or(1, Classifier::max_batch);
    Ok((Crew::Together(classifiers), vec![Device::Cpu], max_batch))
}

/// Preparers on the processor, and executors on each device, which share the device's session.
fn apart(bundle: &Bundle, options: &ModelOptions, opened: Vec<OnnxModel>) -> Result<Opened, ClassifyError> {
    let manifest = Arc::new(bundle.manifest.clone());
    let found: Vec<Device> = opened.iter().map(OnnxModel::device).collect();
    let mut max_batch = match options.batch {
        BatchChoice::Fixed(n) => Some(n),
        BatchChoice::Measured => None,
    };
    let mut devices = Vec::with_capacity(opened.len());
    for model in opened {
        let device = model.device();
        let max_batch = match max_batch {
            Some(n) => n,
            None => {
                let mut network = Network::new(manifest.clone(), Box::new(model.shared()));
                *max_batch.insert(measured(bundle, &mut network, device, options)?)
            }
        };
        let handles: Vec<OnnxModel> = (0..BATCHES_IN_FLIGHT).map(|_| model.shared()).collect();
        // At once, as they will run: what a device needs for each of them is made now.
        let warmed: Vec<Result<Executor, ClassifyError>> = thread::scope(|scope| {
            let warm = |handle| {
                let network = Network::new(manifest.clone(), Box::new(handle));
                let mut network = asked(network, bundle, options, max_batch).filling_up();
                scope.spawn(move || network.warm().map(|()| Executor::new(network)))
            };
            let warming: Vec<_> = handles.into_iter().map(warm).collect();
            warming.into_iter().map(|t| t.join().unwrap_or_else(died)).collect()
        });
        devices.push((device.to_string(), warmed.into_iter().collect::<Result<Vec<_>, _>>()?));
    }
    let preparer = || Preprocessor::new(manifest.preprocessing.clone(), options.limits);
    let preparers = (0..options.workers).map(|_| Preparer::new(Box::new(preparer()))).collect();
    let max_batch = devices.iter().flat_map(|(_, executors)| executors).map(Executor::max_batch).max().unwrap_or(1);
    Ok((Crew::Apart { preparers, devices }, found, max_batch))
}

/// A network that gives what the options and the bundle's calibration ask for.
fn asked(network: Network, bundle: &Bundle, options: &ModelOptions, max_batch: usize) -> Network {
    let network = if options.features { network.with_features() } else { network };
    let familiarity = bundle.calibration.as_ref().and_then(|calibration| calibration.familiarity.as_deref());
    let network = match familiarity {
        Some(familiarity) => network.with_what_it_asks(familiarity),
        None => network,
    };
    network.with_max_batch(max_batch)
}

fn died<T>(_: Box<dyn std::any::Any + Send>) -> Result<T, ClassifyError> {
    Err(ClassifyError::Panic("while warming the model".into()))
}

/// The smallest batch size beyond which larger ones do not pay, from the cache or by measuring.
fn measured(
    bundle: &Bundle,
    network: &mut Network,
    device: Device,
    options: &ModelOptions,
) -> Result<usize, ClassifyError> {
    let (cache, file) = (&options.cache, network_file(bundle));
    let session = SessionOptions { device, ..options.place.session };
    let name = format!("batches-{}-threads.json", session.threads);
    let kept: Option<Vec<(usize, f64)>> = cache.note(&file, session, &name);
    let limit = if device == Device::Cpu { LARGEST_BATCH } else { LARGEST_BATCH_APART };
    let times = match kept {
        Some(times) => times,
        None => {
            let times = network.measure(limit)?;
            let times: Vec<(usize, f64)> = times.into_iter().map(|(n, time)| (n, millis(time))).collect();
            cache.keep_note(&file, session, &name, &times);
            times
        }
    };
    let chosen = choose(&times);
    let per_image: Vec<String> = times.iter().map(|(n, ms)| format!("{n}: {:.3}", ms / *n as f64)).collect();
    tracing::info!(
        model = %bundle.name, version = %bundle.version, %device, max_batch = chosen, milliseconds_per_image = per_image.join(", "),
        "batch size chosen by measuring; --max-batch overrides it"
    );
    Ok(chosen)
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The first size whose time per picture is within [`WORTH_IT`] of the best.
fn choose(times: &[(usize, f64)]) -> usize {
    let per_picture = |&(size, time): &(usize, f64)| time / size.max(1) as f64;
    let best = times.iter().map(per_picture).fold(f64::INFINITY, f64::min);
    times.iter().find(|t| per_picture(t) <= best * (1.0 + WORTH_IT)).map_or(1, |t| t.0.clamp(1, LARGEST_BATCH_APART))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_batch_is_chosen_only_where_it_pays() {
        assert_eq!(choose(&[(1, 100.0), (2, 199.0), (4, 396.0)]), 1);
        assert_eq!(choose(&[(1, 1.0), (2, 1.5), (4, 2.6), (8, 5.1)]), 4);
        assert_eq!(choose(&[]), 1);
    }
}
