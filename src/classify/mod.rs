//! Encoded bytes → [`Prediction`] → scores: the one composition of pixels, network and calibration, used by the server,
//! by batch scoring and by calibration alike.

mod prepare;
mod scorer;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::bundle::{self, Bundle, BundleError, Familiarity, Manifest};
use crate::pixels::{DecodeError, DecodeLimits, Picture, Preprocessor, TensorBatch, TensorLength, look};
use crate::runtime::{
    Device, Library, NetworkCache, NetworkFile, NetworkSource, OnnxModel, Outputs, Runner, RuntimeError, SessionOptions,
};
use crate::scores::{Logits, LogitsError};
use crate::stop::Stop;

pub use prepare::{Prepare, StageTimes};
pub use scorer::{Abstention, Decision, Scale, ScoreError, ScoreRequest, ScoreRule, Scored, Scorer, Seen};

/// A batch that takes longer than this alone is not worth measuring.
const LONGEST_BATCH: Duration = Duration::from_millis(250);
/// Rounds over all sizes: at least, and at most.
const MEASURED_ROUNDS: (usize, usize) = (3, 9);
/// Time after which no further round begins.
const MEASURED_TIME: Duration = Duration::from_millis(500);

/// One picture, as a caller sends it. Both kinds are shared, not copied.
#[derive(Debug, Clone)]
pub enum Input {
    /// An encoded picture.
    Encoded(Bytes),
    /// The network's own input, of the manifest's shape: normalised, row-major, f32 in little-endian bytes.
    Pixels(Bytes),
}

/// The answer for one picture.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// The network's own output.
    pub logits: Logits,
    /// What its classifier saw, where it was exported with that.
    pub features: Option<Vec<f32>>,
    /// What the picture looks like, where the classifier was asked for that.
    pub look: Option<Vec<f32>>,
    /// Where the time went.
    pub timings: Timings,
}

/// Time by stage, for one picture.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Waiting for a worker.
    pub queue: Duration,
    /// Decoding.
    pub decode: Duration,
    /// Resizing, cropping and normalising.
    pub preprocess: Duration,
    /// The network, for the whole batch that the picture was in.
    pub infer: Duration,
    /// Pictures in that batch.
    pub batch: usize,
    /// Whether this picture stands for its batch where batches are counted.
    pub leads_batch: bool,
}

/// Why a picture got no prediction.
#[derive(Debug, thiserror::Error)]
pub enum ClassifyError {
    /// The picture's own fault.
    #[error(transparent)]
    Image(#[from] DecodeError),
    /// A tensor of another size than the network's input.
    #[error(transparent)]
    Tensor(#[from] TensorLength),
    /// The runtime's fault.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The network's file is not the bundle's.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The network gave no usable logits.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// The network gave another number of rows than pictures.
    #[error("the network gave {found} rows for {pictures} pictures")]
    Rows {
        /// Rows given.
        found: usize,
        /// Pictures put in.
        pictures: usize,
    },
    /// The worker's code panicked on this picture.
    #[error("the worker panicked: {0}")]
    Panic(String),
    /// The deadline passed before the picture's turn came, or while it was decoded.
    #[error("the deadline passed before the image was classified")]
    Deadline,
}

/// One worker's own session and preprocessing.
pub struct Classifier {
    manifest: Arc<Manifest>,
    prepare: Box<dyn Prepare>,
    runner: Box<dyn Runner>,
    /// Batch sizes that the network is run with, ascending from 1.
    sizes: Vec<usize>,
    /// The pictures of the batch at work.
    batch: TensorBatch,
    looks: bool,
}

impl Classifier {
    /// A classifier for `manifest` over any runner, one picture a batch.
    pub fn new(manifest: Arc<Manifest>, limits: DecodeLimits, runner: Box<dyn Runner>) -> Self {
        let preprocessor = Preprocessor::new(manifest.preprocessing.clone(), limits);
        Self::with_parts(manifest, Box::new(preprocessor), runner)
    }

    /// A classifier of any parts, one picture a batch.
    pub fn with_parts(manifest: Arc<Manifest>, prepare: Box<dyn Prepare>, runner: Box<dyn Runner>) -> Self {
        let batch = TensorBatch::new(prepare.shape());
        Self { manifest, prepare, runner, sizes: vec![1], batch, looks: false }
    }

    /// Opens a session over `bundle`'s network and runs it once, so that the first picture is no slower and a
    /// network that does not fit its manifest is found now.
    ///
    /// # Errors
    /// When the network cannot be opened, run, or gives another number of logits than the manifest's classes.
    pub fn open(
        bundle: &Bundle,
        library: &Library,
        options: SessionOptions,
        limits: DecodeLimits,
    ) -> Result<(Self, Device), ClassifyError> {
        let (mut opened, device) = Self::open_many(bundle, library, options, limits, &NetworkCache::none(), 1)?;
        let mut classifier = opened.remove(0);
        classifier.warm()?;
        Ok((classifier, device))
    }

    /// Opens `workers` sessions over `bundle`'s network, on the processor through `cache`. They are not warm.
    ///
    /// # Errors
    /// When the network is not the bundle's or cannot be opened.
    pub fn open_many(
        bundle: &Bundle,
        library: &Library,
        options: SessionOptions,
        limits: DecodeLimits,
        cache: &NetworkCache,
        workers: usize,
    ) -> Result<(Vec<Self>, Device), ClassifyError> {
        let (mut classifiers, mut found) = (Vec::with_capacity(workers), options.device);
        Self::open_each(bundle, library, options, limits, cache, workers, |classifier, device| {
            classifiers.push(classifier);
            found = device;
            Ok(())
        })?;
        Ok((classifiers, found))
    }

    /// As [`Self::open_many`], but hands each classifier and where it runs to `opened` before the next is opened.
    ///
    /// # Errors
    /// `opened`'s, too.
    pub fn open_each(
        bundle: &Bundle,
        library: &Library,
        options: SessionOptions,
        limits: DecodeLimits,
        cache: &NetworkCache,
        workers: usize,
        mut opened: impl FnMut(Self, Device) -> Result<(), ClassifyError>,
    ) -> Result<(), ClassifyError> {
        let manifest = Arc::new(bundle.manifest.clone());
        let opened = |model: OnnxModel| {
            let device = model.device();
            opened(Self::new(manifest.clone(), limits, Box::new(model)), device)
        };
        // What CUDA makes of a network is not kept.
        let no_cache = NetworkCache::none();
        let cache = if options.device == Device::Cpu { cache } else { &no_cache };
        cache.open(library, &network_file(bundle), || Ok(source(bundle)?), options, workers, opened)
    }

    /// Lets up to `max_batch` pictures into one run of the network: 1, 2, 4 … and `max_batch` itself.
    #[must_use]
    pub fn with_max_batch(mut self, max_batch: usize) -> Self {
        self.sizes = self.batch_sizes(max_batch);
        self
    }

    /// Sizes up to `limit`, and up to what the network itself takes.
    fn batch_sizes(&self, limit: usize) -> Vec<usize> {
        batch_sizes(limit.min(self.manifest.max_batch().unwrap_or(usize::MAX)))
    }

    /// Has predictions hold what the classifier of the network sees, if the network gives it.
    #[must_use]
    pub fn with_features(mut self) -> Self {
        self.runner.give_features();
        self
    }

    /// Has predictions hold what the picture looks like.
    #[must_use]
    pub fn with_looks(mut self) -> Self {
        self.looks = true;
        self
    }

    /// Has predictions hold what `familiarity` asks for.
    #[must_use]
    pub fn with_what_it_asks(self, familiarity: &Familiarity) -> Self {
        let classifier = if familiarity.distance.is_some() { self.with_features() } else { self };
        if familiarity.look.is_some() { classifier.with_looks() } else { classifier }
    }

    /// The most pictures in one run of the network.
    pub fn max_batch(&self) -> usize {
        self.sizes.last().copied().unwrap_or(1)
    }

    /// Runs the network once with each of its batch sizes.
    ///
    /// # Errors
    /// When it fails, or gives another number of logits than the manifest's classes.
    pub fn warm(&mut self) -> Result<(), ClassifyError> {
        for size in self.sizes.clone() {
            self.time(size)?;
        }
        Ok(())
    }

    /// Measures how long batches of 1, 2, 4 … up to `limit` pictures take, each as the shortest of a few runs; without the
    /// sizes that take longer than a quarter of a second.
    ///
    /// # Errors
    /// As [`Self::warm`].
    pub fn measure(&mut self, limit: usize) -> Result<Vec<(usize, Duration)>, ClassifyError> {
        let mut found = Vec::new();
        for size in self.batch_sizes(limit) {
            let first = self.time(size)?;
            if first > LONGEST_BATCH && !found.is_empty() {
                break;
            }
            found.push((size, first));
        }
        // The sizes take turns: whatever else the machine does falls on all of them.
        let began = Instant::now();
        for round in 0..MEASURED_ROUNDS.1 {
            if round >= MEASURED_ROUNDS.0 && began.elapsed() > MEASURED_TIME {
                break;
            }
            for (size, shortest) in &mut found {
                *shortest = self.time(*size)?.min(*shortest);
            }
        }
        Ok(found)
    }

    /// One run over `size` blank pictures.
    fn time(&mut self, size: usize) -> Result<Duration, ClassifyError> {
        self.batch.fill(size);
        let began = Instant::now();
        let rows = self.run(0..size, &Stop::default())?;
        let took = began.elapsed();
        rows.into_iter().try_for_each(|row| row.map(|_| ()))?;
        Ok(took)
    }

    /// Classifies pictures together, each as long as its own stop is not asked for, and all until `stop` is. Answers in their
    /// order; the fault of one is not the others'.
    pub fn classify(&mut self, pictures: &[(&Input, &Stop)], stop: &Stop) -> Vec<Result<Prediction, ClassifyError>> {
        self.batch.clear();
        let mut outcomes: Vec<Result<Prediction, ClassifyError>> = Vec::with_capacity(pictures.len());
        // Where each usable picture stands in `pictures`, and what it has cost so far.
        let mut ready: Vec<(usize, StageTimes)> = Vec::with_capacity(pictures.len());
        for (at, (input, own_stop)) in pictures.iter().enumerate() {
            match self.add(input, own_stop, ready.len()) {
                Ok(times) => {
                    ready.push((at, times));
                    // Replaced below, once it has run.
                    outcomes.push(Err(ClassifyError::Runtime(RuntimeError::Stopped)));
                }
                Err(error) => outcomes.push(Err(error)),
            }
        }
        let mut done = 0;
        while done < ready.len() && !stop.asked() {
            let left = ready.len() - done;
            let size = self.sizes.iter().copied().filter(|&s| s <= left).max().unwrap_or(1);
            let began = Instant::now();
            let rows = match self.run(done..done + size, stop) {
                // One picture's fault must not be its neighbours'.
                Err(error) if size > 1 && !stop.asked() => {
                    tracing::warn!(%error, size, "a batch failed; its images are tried one by one");
                    (done..done + size).map(|n| self.run(n..n + 1, stop).and_then(|mut r| r.remove(0))).collect()
                }
                Err(error) => vec![Err(error)],
                Ok(rows) => rows,
            };
            let infer = began.elapsed();
            let mut leads_batch = true;
            for ((at, times), row) in ready[done..].iter().zip(rows) {
                let timings = Timings {
                    queue: Duration::ZERO,
                    decode: times.decode,
                    preprocess: times.preprocess,
                    infer,
                    batch: size,
                    leads_batch: leads_batch && row.is_ok(),
                };
                leads_batch &= row.is_err();
                outcomes[*at] = row.map(|(logits, features, look)| Prediction { logits, features, look, timings });
            }
            done += size;
        }
        outcomes
    }

    /// The answer for a decoded picture.
    ///
    /// # Errors
    /// When the network fails on it.
    pub fn answer(&mut self, picture: &Picture) -> Result<Prediction, ClassifyError> {
        self.batch.clear();
        self.prepare.normalize_into(picture, &mut self.batch)?;
        let (logits, features, look) = self.run(0..1, &Stop::default())?.remove(0)?;
        Ok(Prediction { logits, features, look, timings: Timings::default() })
    }

    /// Adds a picture to a batch of `before` pictures. When that fails, in whatever way, the batch is as it was.
    fn add(&mut self, input: &Input, stop: &Stop, before: usize) -> Result<StageTimes, ClassifyError> {
        let (prepare, batch) = (&*self.prepare, &mut self.batch);
        let added = catch_unwind(AssertUnwindSafe(|| match input {
            Input::Encoded(bytes) => prepare.prepare_into(bytes, stop, batch),
            Input::Pixels(bytes) => {
                let began = Instant::now();
                batch.push_bytes(bytes)?;
                Ok(StageTimes { decode: Duration::ZERO, preprocess: began.elapsed() })
            }
        }));
        let added = added.unwrap_or_else(|panic| Err(ClassifyError::Panic(panic_text(&*panic))));
        // A caller who has gone does not read it.
        let added = added.map_err(|error| match error {
            ClassifyError::Image(DecodeError::Stopped) => ClassifyError::Deadline,
            error => error,
        });
        let added = added.and_then(|times| match self.batch.len() - before {
            1 => Ok(times),
            found => Err(ClassifyError::Panic(format!("one picture became {found} tensors"))),
        });
        added.inspect_err(|_| self.batch.truncate(before))
    }

    /// Runs the network on pictures of the batch.
    fn run(
        &mut self,
        pictures: Range<usize>,
        stop: &Stop,
    ) -> Result<Vec<Result<Answer, ClassifyError>>, ClassifyError> {
        let n = pictures.len();
        let view = self.batch.view(pictures).ok_or_else(|| RuntimeError::Run("the batch has fewer pictures".into()))?;
        let runner = &mut self.runner;
        let outputs: Outputs = catch_unwind(AssertUnwindSafe(|| runner.run(view, stop)))
            .unwrap_or_else(|panic| Err(RuntimeError::Run(format!("panicked: {}", panic_text(&*panic)))))?;
        let Outputs { logits, features } = outputs;
        for found in [Some(logits.nrows()), features.as_ref().map(|f| f.nrows())].into_iter().flatten() {
            if found != n {
                return Err(ClassifyError::Rows { found, pictures: n });
            }
        }
        let classes = self.manifest.classes.len();
        let looks =
            self.looks.then(|| view.outer_iter().map(|picture| look(picture, self.manifest.preprocessing.layout)));
        let mut looks = looks.into_iter().flatten();
        let answer = |(at, row): (usize, ndarray::ArrayView1<'_, f32>)| {
            let look = looks.next();
            Ok((Logits::try_new(row.to_vec(), classes)?, features.as_ref().map(|f| f.row(at).to_vec()), look))
        };
        Ok(logits.rows().into_iter().enumerate().map(answer).collect())
    }
}

/// The logits of a picture, its features where the network gives them, and its look where it is asked for.
type Answer = (Logits, Option<Vec<f32>>, Option<Vec<f32>>);

/// The file behind `bundle`'s network.
pub fn network_file(bundle: &Bundle) -> NetworkFile {
    let bundle::Network { path, sha256, .. } = &bundle.network;
    NetworkFile { path: path.clone(), sha256: sha256.clone(), data: bundle.network.data_files() }
}

/// The network, its files checked.
fn source(bundle: &Bundle) -> Result<NetworkSource<'_>, BundleError> {
    let folder = (!bundle.manifest.model_data.is_empty()).then_some(bundle.folder.as_path());
    Ok(NetworkSource { graph: bundle.network.bytes()?, folder })
}

/// 1, 2, 4 … below `max_batch`, and `max_batch`.
fn batch_sizes(max_batch: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> =
        std::iter::successors(Some(1), |size| Some(size * 2)).take_while(|&size| size < max_batch).collect();
    sizes.push(max_batch.max(1));
    sizes
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
