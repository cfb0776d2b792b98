//! From an encoded picture to a place in a batch.

use std::time::{Duration, Instant};

use super::ClassifyError;
use crate::pixels::{Picture, Preprocessor, TensorBatch, TensorLength};
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
