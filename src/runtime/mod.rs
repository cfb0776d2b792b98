//! One ONNX model, one caller at a time. The only room that names `ort`.

mod cache;
mod library;
mod model;
mod stop;

pub use cache::{NetworkCache, NetworkFile};
pub use library::{Library, LibraryError, disable_telemetry};
pub use model::{Device, OnnxModel, RuntimeError, SessionOptions};
pub use stop::Stop;

use ndarray::{Array2, ArrayView4};

/// Something that turns a batch of pictures into rows of logits.
pub trait Runner: Send {
    /// Runs the network on `pictures` `[N, 3, H, W]`. Returns `[N, K]`.
    ///
    /// # Errors
    /// When the runtime fails, or was told to end by `stop`.
    fn run(&mut self, pictures: ArrayView4<'_, f32>, stop: &Stop) -> Result<Array2<f32>, RuntimeError>;
}
