//! A session over one network.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ndarray::{Array2, ArrayD, ArrayView4, Ix2};
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{RunOptions, Session, SessionOutputs};
use ort::value::{Tensor, TensorRef};

use super::{FEATURES, Library, NetworkSource, Outputs, Runner};
use crate::stop::Stop;

/// Where a network runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU; an error if it cannot be used.
    Cuda,
    /// CUDA if it works, otherwise the processor, with one line in the log.
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
#[derive(Debug, Clone, thiserror::Error)]
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
    /// The run was ended because nobody waited for it.
    #[error("the run was stopped: its result is no longer needed")]
    Stopped,
}

/// Name of the input.
const INPUT: &str = "images";

static SAID_ONCE: std::sync::Once = std::sync::Once::new();

/// One session.
pub struct OnnxModel {
    session: Session,
    device: Device,
    /// Names of the outputs that a run gives: the first, which is the logits, and perhaps the features.
    wanted: Arc<[String]>,
}

impl OnnxModel {
    /// Opens `model`. With [`Device::Auto`], a CUDA failure is logged and the processor is used.
    ///
    /// # Errors
    /// When it is no network that ONNX Runtime can open, or CUDA was demanded and fails.
    pub fn open<'a>(
        library: &Library,
        model: impl Into<NetworkSource<'a>>,
        options: SessionOptions,
    ) -> Result<Self, RuntimeError> {
        let model = model.into();
        let on_cuda = || Self::on_cuda(library, model, options).map_err(|reason| concise(&reason));
        match options.device {
            Device::Cpu => {}
            Device::Cuda => return on_cuda().map_err(RuntimeError::Cuda),
            Device::Auto => match on_cuda() {
                Ok(session) => return Ok(session),
                // Every worker opens a session; one line tells it.
                Err(reason) => SAID_ONCE.call_once(|| tracing::info!(%reason, "CUDA is not used; running on the CPU")),
            },
        }
        let session = builder(library, options)
            .and_then(|b| commit(b, model))
            .map_err(|error| RuntimeError::Open(error.to_string()))?;
        Ok(Self::of(session, Device::Cpu))
    }

    /// Opens a graph that the runtime optimised before, on the processor; weights in its side file are mapped.
    pub(super) fn open_optimised(
        library: &Library,
        graph: &Path,
        options: SessionOptions,
    ) -> Result<Self, RuntimeError> {
        let session = builder(library, options)
            .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::Disable)?))
            .and_then(|mut b| b.commit_from_file(graph))
            .map_err(|error| RuntimeError::Open(error.to_string()))?;
        Ok(Self::of(session, Device::Cpu))
    }

    #[cfg(not(feature = "cuda"))]
    fn on_cuda(_: &Library, _: NetworkSource<'_>, _: SessionOptions) -> Result<Self, String> {
        Err("this build has no CUDA support (cargo feature `cuda`)".into())
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(library: &Library, model: NetworkSource<'_>, options: SessionOptions) -> Result<Self, String> {
        use ort::ep;
        // EXHAUSTIVE would stall on each new batch size.
        let cuda = ep::CUDA::default()
            .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic)
            .build()
            .error_on_failure();
        let session = builder(library, options)
            .and_then(|b| Ok(b.with_execution_providers([cuda])?))
            .and_then(|b| commit(b, model))
            .map_err(|error| error.to_string())?;
        Ok(Self::of(session, Device::Cuda))
    }

    fn of(session: Session, device: Device) -> Self {
        let wanted = session.outputs().iter().take(1).map(|output| output.name().to_owned()).collect();
        Self { session, device, wanted }
    }

    /// The device that runs: never [`Device::Auto`].
    pub fn device(&self) -> Device {
        self.device
    }

    /// Runs a batch `[N, C, H, W]` or `[N, H, W, C]` and returns all outputs in order, the first being the logits `[N, K]`.
    ///
    /// # Errors
    /// When the runtime fails or the batch is empty.
    pub fn run_batch(&mut self, images: ArrayView4<'_, f32>) -> Result<Vec<ArrayD<f32>>, RuntimeError> {
        let all: Vec<String> = self.session.outputs().iter().map(|output| output.name().to_owned()).collect();
        self.run_until(images, &Stop::default(), &all)
    }

    /// The outputs of the names `wanted`, in their order. The runtime computes no other.
    fn run_until(
        &mut self,
        images: ArrayView4<'_, f32>,
        stop: &Stop,
        wanted: &[String],
    ) -> Result<Vec<ArrayD<f32>>, RuntimeError> {
        if images.shape()[0] == 0 {
            return Err(RuntimeError::Run("the batch is empty".into()));
        }
        let fail = |error: ort::Error| RuntimeError::Run(error.to_string());
        if stop.asked() {
            return Err(RuntimeError::Stopped);
        }
        let options = Arc::new(RunOptions::new().map_err(fail)?);
        // Heard between two of the network's nodes, also when somebody asks before the run has begun.
        let running = Arc::downgrade(&options);
        stop.on_ask(move || {
            if let Some(Err(error)) = running.upgrade().map(|options| options.terminate()) {
                tracing::warn!(%error, "a run whose result is no longer needed could not be stopped");
            }
        });
        let took_place = |error| if stop.asked() { RuntimeError::Stopped } else { fail(error) };
        let take = |found: &SessionOutputs<'_>| {
            let take = |name: &String| {
                let value = found.get(name).ok_or_else(|| RuntimeError::Run(format!("there is no output {name:?}")))?;
                Ok(value.try_extract_array::<f32>().map_err(fail)?.to_owned())
            };
            wanted.iter().map(take).collect()
        };
        if wanted.len() == self.session.outputs().len() {
            let input = TensorRef::from_array_view(images).map_err(fail)?;
            let found = self.session.run_with_options(ort::inputs![INPUT => input], &options);
            return take(&found.map_err(took_place)?);
        }
        // A selection of outputs in the options could not be shared with who ends the run; bound ones can.
        let mut binding = self.session.create_binding().map_err(fail)?;
        // One that only borrows its values is copied by ort in a way that waits for itself (2.0.0-rc.15).
        let input = Tensor::from_array(images.to_owned()).map_err(fail)?;
        binding.bind_input(INPUT, &input).map_err(fail)?;
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput);
        let memory = memory.map_err(fail)?;
        for name in wanted {
            binding.bind_output_to_device(name, &memory).map_err(fail)?;
        }
        let found = self.session.run_binding_with_options(&binding, &options);
        take(&found.map_err(took_place)?)
    }
}

impl Runner for OnnxModel {
    fn run(&mut self, pictures: ArrayView4<'_, f32>, stop: &Stop) -> Result<Outputs, RuntimeError> {
        let mut outputs = self.run_until(pictures, stop, &self.wanted.clone())?.into_iter();
        let logits = outputs.next().ok_or_else(|| RuntimeError::Run("the network has no output".into()))?;
        Ok(Outputs {
            logits: rows(logits, "logits")?,
            features: outputs.next().map(|f| rows(f, FEATURES)).transpose()?,
        })
    }

    fn give_features(&mut self) {
        let has = self.session.outputs().iter().any(|output| output.name() == FEATURES);
        if has && self.wanted.len() == 1 {
            self.wanted = self.wanted.iter().cloned().chain([FEATURES.to_owned()]).collect();
        }
    }
}

/// An output as [N, values].
fn rows(output: ArrayD<f32>, name: &str) -> Result<Array2<f32>, RuntimeError> {
    let shape = output.shape().to_vec();
    output
        .into_dimensionality::<Ix2>()
        .map_err(|_| RuntimeError::Run(format!("the output {name} has the shape {shape:?}; it must be [N, values]")))
}

/// What the driver said, out of the runtime's account of where it heard it.
fn concise(reason: &str) -> String {
    let said = reason.find("CUDA failure").map_or(reason, |at| &reason[at..]);
    said.split(" ; ").next().unwrap_or(said).trim().to_owned()
}

pub(super) fn builder(library: &Library, options: SessionOptions) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(&library.environment)?
        .with_intra_threads(options.threads)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?)
}

/// Opens `model`; weights in other files are mapped.
pub(super) fn commit(builder: SessionBuilder, model: NetworkSource<'_>) -> ort::Result<Session> {
    // Without a folder, ONNX Runtime would look into the one that the process happens to be in.
    let folder = model.folder.map_or("/no weights lie beside this network".into(), Path::to_string_lossy);
    builder
        .with_config_entry("session.model_external_initializers_file_folder_path", folder)?
        .commit_from_memory(model.graph)
}

/// Has the session write its optimised graph to `graph`, with weights of 1 KiB and more in `weights` beside it.
pub(super) fn optimised(builder: SessionBuilder, graph: &Path, weights: &str) -> ort::Result<SessionBuilder> {
    Ok(builder
        // It warns that the graph is for this machine alone, which the cache's key sees to.
        .with_log_level(LogLevel::Error)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_optimized_model_path(graph)?
        .with_config_entry("session.optimized_model_external_initializers_file_name", weights)?
        .with_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")?)
}

#[cfg(test)]
mod tests {
    use super::concise;

    #[test]
    fn a_cuda_failure_is_told_in_the_drivers_words() {
        let told =
            "a.cc:122 std::conditional_t<…> CUDA failure 35: CUDA driver version is insufficient ; GPU=-1 ; file=b.cc";
        assert_eq!(concise(told), "CUDA failure 35: CUDA driver version is insufficient");
        assert_eq!(concise("this build has no CUDA support"), "this build has no CUDA support");
    }
}
