//! One ONNX model, one caller at a time. The only room that names `ort`.

mod cache;
mod library;
mod model;
mod plain;
mod provider;

pub use cache::{NetworkCache, NetworkFile};
pub use library::{Library, LibraryError, disable_telemetry};
pub use model::{OnnxModel, RuntimeError, SessionOptions};
pub use plain::PlainSession;
pub use provider::{ArenaGrowth, CannotUse, ConvolutionSearch, CudaOptions, Device, Place, Wanted};

use std::ops::DerefMut;
use std::path::Path;
use std::time::Duration;

use ndarray::{Array2, ArrayView4};

use crate::stop::Stop;

/// Name of the network's output that [`Outputs::features`] is read from.
pub const FEATURES: &str = "features";

/// A network in ONNX.
#[derive(Debug, Clone, Copy)]
pub struct NetworkSource<'a> {
    /// The file's bytes.
    pub graph: &'a [u8],
    /// Where the files lie that hold weights which are not in `graph`.
    pub folder: Option<&'a Path>,
}

impl<'a, B: AsRef<[u8]> + ?Sized> From<&'a B> for NetworkSource<'a> {
    fn from(graph: &'a B) -> Self {
        Self { graph: graph.as_ref(), folder: None }
    }
}

/// What a network gives for a batch of N pictures.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// `[N, K]`.
    pub logits: Array2<f32>,
    /// What its classifier sees, `[N, D]`, where it was exported with that.
    pub features: Option<Array2<f32>>,
}

impl From<Array2<f32>> for Outputs {
    fn from(logits: Array2<f32>) -> Self {
        Self { logits, features: None }
    }
}

/// Something that turns a batch of pictures into rows of logits.
pub trait Runner: Send {
    /// Runs the network on `pictures`, `[N, C, H, W]` or `[N, H, W, C]`.
    ///
    /// # Errors
    /// When the runtime fails, or was told to end by `stop`.
    fn run(&mut self, pictures: ArrayView4<'_, f32>, stop: &Stop) -> Result<Outputs, RuntimeError>;

    /// Has the features given, too, if the network has them. Until then only the logits are.
    fn give_features(&mut self) {}

    /// Has the next run give back the memory that larger batches before it took, and that it does not need.
    fn give_back(&mut self) {}

    /// What the last run took, without waiting for others, where that is known.
    fn last_run(&self) -> Option<Duration> {
        None
    }

    /// Memory for so many values that pictures are copied from with the least effort.
    fn host_memory(&self, values: usize) -> HostMemory {
        plain_memory(values)
    }
}

/// Values in the processor's memory, all 0 at first.
pub type HostMemory = Box<dyn DerefMut<Target = [f32]> + Send>;

/// Memory like any other.
pub fn plain_memory(values: usize) -> HostMemory {
    Box::new(vec![0.0; values])
}
