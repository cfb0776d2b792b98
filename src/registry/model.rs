//! One version of a model, ready to answer.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::{ModelOptions, RegistryError, RequestStats};
use crate::bundle::{Bundle, Manifest, Pixels};
use crate::classify::{Classifier, ClassifyError, Scorer, network_file};
use crate::engine::{Budget, Engine};
use crate::runtime::{Device, Library, NetworkCache};

/// The largest batch that is tried when its size is chosen by measuring.
const LARGEST_BATCH: usize = 32;
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
    pub device: Device,
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
    /// their engine, whose workers share `budget`.
    ///
    /// # Errors
    /// When the network does not open or does not fit its manifest.
    pub fn start(
        bundle: Bundle,
        library: &'static Library,
        options: &ModelOptions,
        budget: Arc<Budget>,
    ) -> Result<Self, RegistryError> {
        let failed = |cause| RegistryError::Model {
            name: bundle.name.clone(),
            version: bundle.version.clone(),
            cause: Box::new(cause),
        };
        let familiarity = bundle.calibration.as_ref().and_then(|calibration| calibration.familiarity.clone());
        let familiarity = familiarity.as_deref();
        let ModelOptions { workers, session, limits, queue, batch, features, ref cache } = *options;
        let no_cache = NetworkCache::none();
        let (mut device, mut max_batch) = (session.device, None);
        let warmed = thread::scope(|scope| {
            let mut warming = Vec::with_capacity(workers);
            // One is warmed while the next is opened.
            let opened =
                Classifier::open_each(&bundle, library, session, limits, cache, workers, |mut classifier, runs_on| {
                    device = runs_on;
                    let max_batch = match (batch, max_batch) {
                        (BatchChoice::Fixed(n), _) | (BatchChoice::Measured, Some(n)) => n,
                        (BatchChoice::Measured, None) => {
                            let notes = if device == Device::Cpu { cache } else { &no_cache };
                            *max_batch.insert(measured(&bundle, &mut classifier, notes, session.threads)?)
                        }
                    };
                    warming.push(scope.spawn(move || {
                        let classifier = if features { classifier.with_features() } else { classifier };
                        let classifier = match familiarity {
                            Some(familiarity) => classifier.with_what_it_asks(familiarity),
                            None => classifier,
                        };
                        let mut classifier = classifier.with_max_batch(max_batch);
                        classifier.warm().map(|()| classifier)
                    }));
                    Ok(())
                });
            let died = |_| Err(ClassifyError::Panic("while warming the model".into()));
            // All are joined, whatever failed: a scope panics with the threads that it has to join itself.
            let warmed: Vec<Result<Classifier, ClassifyError>> =
                warming.into_iter().map(|t| t.join().unwrap_or_else(died)).collect();
            opened.and_then(|()| warmed.into_iter().collect::<Result<Vec<_>, _>>())
        });
        let classifiers = warmed.map_err(failed)?;
        let max_batch = classifiers.first().map_or(1, Classifier::max_batch);
        let engine = Engine::start(classifiers, queue, budget)?;
        let Bundle { name, version, manifest, calibration, evaluation, .. } = bundle;
        let manifest = Arc::new(manifest);
        let scorer = Scorer::new(manifest.clone(), calibration);
        let requests = RequestStats::default();
        let pixels = limits.pixels;
        let fitted = scorer.calibration().map(|calibration| calibration.content.fit.pixels);
        if let Some(fitted) = fitted.filter(|fitted| *fitted != pixels) {
            tracing::warn!(
                model = %name, version = %version, pixels = pixels.name(), calibration = fitted.name(),
                "the model's calibration was fitted to other pixels: run `nbn fold calibrate --pixels` as it is served"
            );
        }
        Ok(Self { name, version, manifest, scorer, evaluation, device, max_batch, pixels, engine, requests })
    }
}

/// The smallest batch size beyond which larger ones do not pay, from the cache or by measuring.
fn measured(
    bundle: &Bundle,
    classifier: &mut Classifier,
    cache: &NetworkCache,
    threads: usize,
) -> Result<usize, ClassifyError> {
    let network = network_file(bundle);
    let name = format!("batches-{threads}-threads.json");
    let kept: Option<Vec<(usize, f64)>> = cache.note(&network, &name);
    let times = match kept {
        Some(times) => times,
        None => {
            let times = classifier.measure(LARGEST_BATCH)?;
            let times: Vec<(usize, f64)> = times.into_iter().map(|(n, time)| (n, millis(time))).collect();
            cache.keep_note(&network, &name, &times);
            times
        }
    };
    let chosen = choose(&times);
    let per_image: Vec<String> = times.iter().map(|(n, ms)| format!("{n}: {:.3}", ms / *n as f64)).collect();
    tracing::info!(
        model = %bundle.name, version = %bundle.version, max_batch = chosen, milliseconds_per_image = per_image.join(", "),
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
    times.iter().find(|t| per_picture(t) <= best * (1.0 + WORTH_IT)).map_or(1, |t| t.0.clamp(1, LARGEST_BATCH))
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
