//! Encoded bytes → [`Prediction`] → scores: the one composition of pixels, network and calibration, used by the server,
//! by batch scoring and by calibration alike.

mod scorer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bundle::{Bundle, Manifest};
use crate::pixels::{DecodeError, DecodeLimits, Preprocessor, RgbImage};
use crate::runtime::{Library, OnnxModel, Runner, RuntimeError, SessionOptions};
use crate::scores::{Logits, LogitsError};

pub use scorer::{Abstention, Decision, ScoreError, ScoreRequest, ScoreRule, Scored, Scorer};

/// The answer for one picture.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// The network's own output.
    pub logits: Logits,
    /// Where the time went.
    pub timings: Timings,
}

/// Seconds by stage, for one picture.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Waiting for a worker.
    pub queue: Duration,
    /// Decoding, resizing, cropping and normalising.
    pub decode: Duration,
    /// The network.
    pub infer: Duration,
}

/// Why a picture got no prediction.
#[derive(Debug, thiserror::Error)]
pub enum ClassifyError {
    /// The picture's own fault.
    #[error(transparent)]
    Image(#[from] DecodeError),
    /// The runtime's fault.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The network gave no usable logits.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// The worker's code panicked on this picture.
    #[error("the worker panicked: {0}")]
    Panic(String),
}

/// One worker's own session and preprocessing.
pub struct Classifier {
    preprocessor: Preprocessor,
    runner: Box<dyn Runner>,
    manifest: Arc<Manifest>,
}

impl Classifier {
    /// A classifier for `manifest` over any runner.
    pub fn new(manifest: Arc<Manifest>, limits: DecodeLimits, runner: Box<dyn Runner>) -> Self {
        let preprocessor = Preprocessor::new(manifest.preprocessing.clone(), limits);
        Self { preprocessor, runner, manifest }
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
    ) -> Result<(Self, crate::runtime::Device), ClassifyError> {
        let model = OnnxModel::open(library, &bundle.model, options)?;
        let device = model.device();
        let mut classifier = Self::new(Arc::new(bundle.manifest.clone()), limits, Box::new(model));
        let blank = classifier.preprocessor.blank();
        Logits::try_new(classifier.runner.run(&blank)?, classifier.manifest.classes.len())?;
        Ok((classifier, device))
    }

    /// Classifies one encoded picture.
    ///
    /// # Errors
    /// When the picture cannot be decoded within the limits, or the network fails on it.
    pub fn classify(&mut self, bytes: &[u8]) -> Result<Prediction, ClassifyError> {
        let began = Instant::now();
        let pixels = self.preprocessor.prepare(bytes)?;
        let decoded = Instant::now();
        let values = self.runner.run(&pixels)?;
        let timings = Timings { queue: Duration::ZERO, decode: decoded - began, infer: decoded.elapsed() };
        Ok(Prediction { logits: Logits::try_new(values, self.manifest.classes.len())?, timings })
    }

    /// The logits of a decoded picture.
    ///
    /// # Errors
    /// When the network fails on it.
    pub fn logits(&mut self, picture: &RgbImage) -> Result<Logits, ClassifyError> {
        let values = self.runner.run(&self.preprocessor.normalize(picture))?;
        Ok(Logits::try_new(values, self.manifest.classes.len())?)
    }
}
