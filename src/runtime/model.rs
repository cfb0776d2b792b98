//! A session over one network.

use std::fmt;

use ndarray::{ArrayD, ArrayView4};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::TensorRef;

use super::{Library, Runner};
use crate::pixels::PixelTensor;

/// Where a network runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU; an error when it cannot be used.
    Cuda,
    /// CUDA when it works, else the processor, with one line in the log.
    Auto,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Auto => "auto",
        })
    }
}

/// How a session is opened.
#[derive(Debug, Clone, Copy)]
pub struct SessionOptions {
    /// Where it runs.
    pub device: Device,
    /// Threads that work on one picture.
    pub threads: usize,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, threads: 1 }
    }
}

/// Why the runtime refused.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The network could not be opened.
    #[error("ONNX Runtime cannot open the network: {0}")]
    Open(String),
    /// CUDA was asked for and cannot be used.
    #[error(
        "--device cuda cannot be used: {0}: use --device auto or cpu, or install the CUDA build of ONNX Runtime and its driver"
    )]
    Cuda(String),
    /// A run failed.
    #[error("ONNX Runtime failed: {0}")]
    Run(String),
}

static SAID_ONCE: std::sync::Once = std::sync::Once::new();

/// One session.
pub struct OnnxModel {
    session: Session,
    device: Device,
}

impl OnnxModel {
    /// Opens `model` (ONNX bytes). With [`Device::Auto`], a CUDA failure is logged and the processor is used.
    ///
    /// # Errors
    /// When the bytes are no network that ONNX Runtime can open, or CUDA was demanded and fails.
    pub fn open(library: &Library, model: &[u8], options: SessionOptions) -> Result<Self, RuntimeError> {
        match options.device {
            Device::Cpu => {}
            Device::Cuda => return Self::on_cuda(library, model, options).map_err(RuntimeError::Cuda),
            Device::Auto => match Self::on_cuda(library, model, options) {
                Ok(session) => return Ok(session),
                // Every worker opens a session; one line tells it.
                Err(reason) => SAID_ONCE.call_once(|| tracing::info!(%reason, "CUDA is not used; running on the CPU")),
            },
        }
        let session = builder(library, options)
            .and_then(|mut b| b.commit_from_memory(model))
            .map_err(|error| RuntimeError::Open(error.to_string()))?;
        Ok(Self { session, device: Device::Cpu })
    }

    #[cfg(not(feature = "cuda"))]
    fn on_cuda(_: &Library, _: &[u8], _: SessionOptions) -> Result<Self, String> {
        Err("this build has no CUDA support (cargo feature `cuda`)".into())
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(library: &Library, model: &[u8], options: SessionOptions) -> Result<Self, String> {
        use ort::ep;
        // EXHAUSTIVE would stall on each new batch size.
        let cuda = ep::CUDA::default()
            .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic)
            .build()
            .error_on_failure();
        let session = builder(library, options)
            .and_then(|b| Ok(b.with_execution_providers([cuda])?))
            .and_then(|mut b| b.commit_from_memory(model))
            .map_err(|error| error.to_string())?;
        Ok(Self { session, device: Device::Cuda })
    }

    /// The device that runs: never [`Device::Auto`].
    pub fn device(&self) -> Device {
        self.device
    }

    /// Runs a batch `[N, 3, H, W]` and returns the outputs in order, the first being the logits `[N, K]`.
    ///
    /// # Errors
    /// When the runtime fails or the batch is empty.
    pub fn run_batch(&mut self, images: ArrayView4<'_, f32>) -> Result<Vec<ArrayD<f32>>, RuntimeError> {
        if images.shape()[0] == 0 {
            return Err(RuntimeError::Run("the batch is empty".into()));
        }
        let fail = |error: ort::Error| RuntimeError::Run(error.to_string());
        let input = TensorRef::from_array_view(images).map_err(fail)?;
        let outputs = self.session.run(ort::inputs!["images" => input]).map_err(fail)?;
        outputs.values().map(|value| Ok(value.try_extract_array::<f32>().map_err(fail)?.to_owned())).collect()
    }
}

impl Runner for OnnxModel {
    fn run(&mut self, pixels: &PixelTensor) -> Result<Vec<f32>, RuntimeError> {
        let shape = (1, 3, pixels.side(), pixels.side());
        let view =
            ArrayView4::from_shape(shape, pixels.values()).map_err(|error| RuntimeError::Run(error.to_string()))?;
        let logits = self.run_batch(view)?.swap_remove(0);
        Ok(logits.into_iter().collect())
    }
}

fn builder(library: &Library, options: SessionOptions) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(&library.environment)?
        .with_intra_threads(options.threads)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?)
}
