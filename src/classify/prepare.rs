//! From an encoded picture to a place in a batch.

use std::time::{Duration, Instant};

use crate::pixels::{DecodeError, Preprocessor, RgbImage};

/// What one picture's way into a batch cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTimes {
    /// Decoding.
    pub decode: Duration,
    /// Resizing, cropping and normalising.
    pub preprocess: Duration,
}

/// Something that writes a picture's tensor `[3, side, side]` into a batch.
pub trait Prepare: Send {
    /// Height and width of the tensor, in pixels.
    fn side(&self) -> usize;

    /// Writes the tensor of a decoded picture into `out`, whose length is 3 × side × side.
    fn normalize_into(&self, picture: &RgbImage, out: &mut [f32]);

    /// Decodes and writes the tensor.
    ///
    /// # Errors
    /// When the bytes are no picture that can be decoded within the limits.
    fn prepare_into(&self, bytes: &[u8], out: &mut [f32]) -> Result<StageTimes, DecodeError>;
}

impl Prepare for Preprocessor {
    fn side(&self) -> usize {
        self.side()
    }

    fn normalize_into(&self, picture: &RgbImage, out: &mut [f32]) {
        self.normalize_into(picture, out);
    }

    fn prepare_into(&self, bytes: &[u8], out: &mut [f32]) -> Result<StageTimes, DecodeError> {
        let began = Instant::now();
        let picture = self.decode(bytes)?;
        let decoded = Instant::now();
        self.normalize_into(&picture, out);
        Ok(StageTimes { decode: decoded - began, preprocess: decoded.elapsed() })
    }
}
