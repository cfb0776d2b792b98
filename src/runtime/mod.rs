//! One ONNX model, one caller at a time. The only room that names `ort`.

mod library;
mod model;

pub use library::{Library, LibraryError, disable_telemetry};
pub use model::{Device, OnnxModel, RuntimeError, SessionOptions};

use crate::pixels::PixelTensor;

/// Something that turns one picture's tensor into one row of logits.
pub trait Runner: Send {
    /// Runs the network on `pixels`. Returns one value per class.
    ///
    /// # Errors
    /// When the runtime fails.
    fn run(&mut self, pixels: &PixelTensor) -> Result<Vec<f32>, RuntimeError>;
}
