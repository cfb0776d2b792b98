//! From an encoded picture to a place in a batch.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{ClassifyError, Input, panic_text};
use crate::pixels::{DecodeError, Picture, Preprocessor, TensorBatch, TensorLength};
use crate::stop::Stop;

/// What one picture's way into a batch cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTimes {
    /// Decoding.
    pub decode: Duration,
    /// Resizing, cropping and normalising.
    pub preprocess: Duration,
}

/// Something that adds a picture's tensor to a batch.
pub trait Prepare: Send {
    /// The shape of the tensor.
    fn shape(&self) -> [usize; 3];

    /// Adds the tensor of a decoded picture.
    ///
    /// # Errors
    /// When the batch is of another shape.
    fn normalize_into(&self, picture: &Picture, batch: &mut TensorBatch) -> Result<(), TensorLength>;

    /// Decodes and adds the tensor, unless `stop` is asked for meanwhile.
    ///
    /// # Errors
    /// When the bytes are no picture that can be decoded within the limits.
    fn prepare_into(&self, bytes: &[u8], stop: &Stop, batch: &mut TensorBatch) -> Result<StageTimes, ClassifyError>;
}

impl Prepare for Preprocessor {
    fn shape(&self) -> [usize; 3] {
        self.shape()
    }

    fn normalize_into(&self, picture: &Picture, batch: &mut TensorBatch) -> Result<(), TensorLength> {
        self.normalize_into(picture, batch)
    }

    fn prepare_into(&self, bytes: &[u8], stop: &Stop, batch: &mut TensorBatch) -> Result<StageTimes, ClassifyError> {
        let began = Instant::now();
        let picture = self.decode(bytes, stop)?;
        let decoded = Instant::now();
        self.normalize_into(&picture, batch)?;
        Ok(StageTimes { decode: decoded - began, preprocess: decoded.elapsed() })
    }
}

/// Adds a picture to a batch. When that fails, in whatever way, the batch is as it was.
pub(super) fn add(
    prepare: &dyn Prepare,
    batch: &mut TensorBatch,
    input: &Input,
    stop: &Stop,
) -> Result<StageTimes, ClassifyError> {
    let before = batch.len();
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
    let added = added.and_then(|times| match batch.len().saturating_sub(before) {
        1 => Ok(times),
        found => Err(ClassifyError::Panic(format!("one picture became {found} tensors"))),
    });
    added.inspect_err(|_| batch.truncate(before))
}
