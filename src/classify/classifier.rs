//! The two halves on one thread: a worker's own preprocessing and network.

use std::sync::Arc;
use std::time::Duration;

use super::prepare::{Prepare, StageTimes, add};
use super::{ClassifyError, Input, Network, Prediction, Timings, network_file, predict, source};
use crate::bundle::{Bundle, Manifest};
use crate::pixels::{DecodeLimits, Picture, Preprocessor, TensorBatch};
use crate::runtime::{Device, Library, NetworkCache, OnnxModel, Place, Runner, RuntimeError, SessionOptions};
use crate::stop::Stop;

/// One worker's own network and preprocessing.
pub struct Classifier {
    prepare: Box<dyn Prepare>,
    network: Network,
    /// The pictures of the batch at work.
    batch: TensorBatch,
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
        Self { prepare, network: Network::new(manifest, runner), batch }
    }

    /// Opens a session over `bundle`'s network, on the first of the devices that are wanted, and runs it once, so that the
    /// first picture is no slower and a network that does not fit its manifest is found now.
    ///
    /// # Errors
    /// When the network cannot be opened, run, or gives another number of logits than the manifest's classes.
    pub fn open(
        bundle: &Bundle,
        library: &Library,
        place: &Place,
        limits: DecodeLimits,
    ) -> Result<(Self, Device), ClassifyError> {
        let open = |device| on_device(bundle, library, device, place.session);
        let warm = |model: OnnxModel| {
            let device = model.device();
            let mut classifier = Self::new(Arc::new(bundle.manifest.clone()), limits, Box::new(model));
            classifier.network.warm()?;
            Ok((classifier, device))
        };
        match place.wanted.first().apart(open)?.and_then(|mut opened| opened.pop()).map(warm) {
            Some(Err(error)) if place.wanted.falls_back(&error) => {}
            Some(warmed) => return warmed,
            None => {}
        }
        warm(open(Device::Cpu)?)
    }

    /// Opens `workers` sessions over `bundle`'s network on the processor, through `cache`. They are not warm.
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
    ) -> Result<Vec<Self>, ClassifyError> {
        let mut classifiers = Vec::with_capacity(workers);
        Self::open_each(bundle, library, options, limits, cache, workers, |classifier| {
            classifiers.push(classifier);
            Ok(())
        })?;
        Ok(classifiers)
    }

    /// As [`Self::open_many`], but hands each classifier to `opened` before the next is opened.
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
        mut opened: impl FnMut(Self) -> Result<(), ClassifyError>,
    ) -> Result<(), ClassifyError> {
        let manifest = Arc::new(bundle.manifest.clone());
        let options = SessionOptions { device: Device::Cpu, ..options };
        let opened = |model: OnnxModel| opened(Self::new(manifest.clone(), limits, Box::new(model)));
        cache.open(library, &network_file(bundle), || Ok(source(bundle)?), options, workers, opened)
    }

    /// The same classifier, its network changed.
    #[must_use]
    pub fn map_network(mut self, change: impl FnOnce(Network) -> Network) -> Self {
        self.network = change(self.network);
        self
    }

    /// As [`Network::with_max_batch`].
    #[must_use]
    pub fn with_max_batch(self, max_batch: usize) -> Self {
        self.map_network(|network| network.with_max_batch(max_batch))
    }

    /// Its network.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    /// The most pictures in one run of the network.
    pub fn max_batch(&self) -> usize {
        self.network.max_batch()
    }

    /// Classifies pictures together, each as long as its own stop is not asked for, and all until `stop` is. Answers in their
    /// order; the fault of one is not the others'.
    pub fn classify(&mut self, pictures: &[(&Input, &Stop)], stop: &Stop) -> Vec<Result<Prediction, ClassifyError>> {
        self.batch.clear();
        let mut outcomes: Vec<Result<Prediction, ClassifyError>> = Vec::with_capacity(pictures.len());
        // Where each usable picture stands in `pictures`, and what it has cost so far.
        let mut ready: Vec<(usize, StageTimes)> = Vec::with_capacity(pictures.len());
        for (at, (input, own_stop)) in pictures.iter().enumerate() {
            match add(&*self.prepare, &mut self.batch, input, own_stop) {
                Ok(times) => {
                    ready.push((at, times));
                    // Replaced below, once it has run.
                    outcomes.push(Err(ClassifyError::Runtime(RuntimeError::Stopped)));
                }
                Err(error) => outcomes.push(Err(error)),
            }
        }
        let Some(view) = self.batch.view(0..ready.len()).filter(|_| !ready.is_empty()) else { return outcomes };
        let (ran, lost) = self.network.run_all(view, ready.len(), stop);
        if let Some(lost) = lost {
            ready[ran.len()..].iter().for_each(|(at, _)| outcomes[*at] = Err(lost.clone().into()));
        }
        for (&(at, times), ran) in ready.iter().zip(ran) {
            outcomes[at] = predict(ran, times, Duration::ZERO);
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
        let view = self.batch.view(0..1).ok_or_else(|| RuntimeError::Run("the batch is empty".into()))?;
        let (logits, features, look) = self.network.answer(view)?;
        Ok(Prediction { logits, features, look, timings: Timings::default() })
    }
}

/// Opens a session over `bundle`'s network on `device`.
///
/// # Errors
/// When the device cannot be used, or the network is not the bundle's or cannot be opened.
pub fn on_device(
    bundle: &Bundle,
    library: &Library,
    device: Device,
    options: SessionOptions,
) -> Result<OnnxModel, ClassifyError> {
    OnnxModel::open_read(library, SessionOptions { device, ..options }, || Ok(source(bundle)?))
}
