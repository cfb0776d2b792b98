//! A session over one network.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ndarray::{Array2, ArrayD, ArrayView4, Ix2};
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{RunOptions, Session, SessionOutputs};
use ort::value::{Tensor, TensorRef};

use super::provider::{CudaOptions, Device};
use super::{FEATURES, HostMemory, Library, NetworkSource, Outputs, Runner, plain_memory};
use crate::stop::Stop;

/// How a session is opened.
#[derive(Debug, Clone, Copy)]
pub struct SessionOptions {
    /// Where it runs.
    pub device: Device,
    /// Threads that work on one picture, on the processor.
    pub threads: usize,
    /// How CUDA is set up, where it runs there.
    pub cuda: CudaOptions,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self::on_processor(1)
    }
}

impl SessionOptions {
    /// On the processor, with so many threads.
    pub fn on_processor(threads: usize) -> Self {
        Self { device: Device::Cpu, threads, cuda: CudaOptions::default() }
    }
}

/// Why the runtime refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RuntimeError {
    /// The network could not be opened.
    #[error("ONNX Runtime cannot open the network: {0}")]
    Open(String),
    /// A device was asked for and cannot be used.
    #[error(
        "--device {device} cannot be used: {reason}: use --device auto or cpu, or install the CUDA build of ONNX Runtime and its driver"
    )]
    Device {
        /// The device.
        device: Device,
        /// What its driver says.
        reason: String,
    },
    /// A device that was used can be used no longer.
    #[error("the device {device} failed, and nothing more can run on it: {reason}")]
    Lost {
        /// The device.
        device: Device,
        /// What its driver says.
        reason: String,
    },
    /// A run failed.
    #[error("ONNX Runtime failed: {0}")]
    Run(String),
    /// The run was ended because nobody waited for it.
    #[error("the run was stopped: its result is no longer needed")]
    Stopped,
}

/// Name of the input.
const INPUT: &str = "images";

/// One session, or a handle on one that several threads share, which run a batch one after the other: ONNX Runtime's own locks do
/// not cover all that a run uses.
pub struct OnnxModel {
    session: Arc<Mutex<Session>>,
    device: Device,
    /// Names of all outputs, the first of which is the logits.
    outputs: Arc<[String]>,
    /// Names of the outputs that a run gives: the logits, and perhaps the features.
    wanted: Arc<[String]>,
    /// Whether the next run gives back memory.
    gives_back: bool,
    /// What the last run took.
    took: Duration,
}

impl OnnxModel {
    /// Opens `model` on the device of `options`.
    ///
    /// # Errors
    /// When it is no network that ONNX Runtime can open, or the device cannot be used.
    pub fn open<'a>(
        library: &Library,
        model: impl Into<NetworkSource<'a>>,
        options: SessionOptions,
    ) -> Result<Self, RuntimeError> {
        Self::open_read(library, options, || Ok(model.into()))
    }

    /// As [`Self::open`], but has the network read only once the device is found to be there.
    ///
    /// # Errors
    /// `read`'s, too.
    pub fn open_read<'a, E: From<RuntimeError>>(
        library: &Library,
        options: SessionOptions,
        read: impl FnOnce() -> Result<NetworkSource<'a>, E>,
    ) -> Result<Self, E> {
        let open = |error: ort::Error| match options.device {
            Device::Cpu => RuntimeError::Open(error.to_string()),
            // Without a driver, a provider may register, and the session not open.
            device => device.failed(&error.to_string()),
        };
        let builder = builder(library, options).map_err(open)?;
        let builder = options.device.register(builder, &options.cuda)?;
        Ok(Self::of(commit(builder, read()?).map_err(open)?, options.device))
    }

    /// Another handle on the same session, so on the same weights.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self {
            session: self.session.clone(),
            device: self.device,
            outputs: self.outputs.clone(),
            wanted: self.wanted.clone(),
            gives_back: false,
            took: Duration::ZERO,
        }
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

    fn of(session: Session, device: Device) -> Self {
        let outputs: Arc<[String]> = session.outputs().iter().map(|output| output.name().to_owned()).collect();
        let wanted = outputs.iter().take(1).cloned().collect();
        Self {
            session: Arc::new(Mutex::new(session)),
            device,
            outputs,
            wanted,
            gives_back: false,
            took: Duration::ZERO,
        }
    }

    /// The device that runs it.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Runs a batch `[N, C, H, W]` or `[N, H, W, C]` and returns all outputs in order, the first being the logits `[N, K]`.
    ///
    /// # Errors
    /// When the runtime fails or the batch is empty.
    pub fn run_batch(&mut self, images: ArrayView4<'_, f32>) -> Result<Vec<ArrayD<f32>>, RuntimeError> {
        self.run_until(images, &Stop::default(), &self.outputs.clone())
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
        let fail = |error: ort::Error| self.device.fault(error.to_string());
        if stop.asked() {
            return Err(RuntimeError::Stopped);
        }
        let mut options = RunOptions::new().map_err(fail)?;
        if std::mem::take(&mut self.gives_back) {
            let arena = match self.device {
                Device::Cpu => "cpu:0".to_owned(),
                Device::Cuda(number) => format!("gpu:{number}"),
            };
            options.set("memory.enable_memory_arena_shrinkage", arena).map_err(fail)?;
        }
        let options = Arc::new(options);
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
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        // Not with the wait for another handle's run.
        let began = Instant::now();
        // On a device, all outputs are asked for: a bound input would be copied there on a stream of its own, which a run of a session
        // that is shared does not wait for.
        if self.device != Device::Cpu || wanted.len() == self.outputs.len() {
            let input = TensorRef::from_array_view(images).map_err(fail)?;
            let found = session.run_with_options(ort::inputs![INPUT => input], &options);
            let taken = take(&found.map_err(took_place)?);
            self.took = began.elapsed();
            return taken;
        }
        // A selection of outputs in the options could not be shared with who ends the run; bound ones can.
        let mut binding = session.create_binding().map_err(fail)?;
        // One that only borrows its values is copied by ort in a way that waits for itself (2.0.0-rc.15).
        let input = Tensor::from_array(images.to_owned()).map_err(fail)?;
        binding.bind_input(INPUT, &input).map_err(fail)?;
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput);
        let memory = memory.map_err(fail)?;
        for name in wanted {
            binding.bind_output_to_device(name, &memory).map_err(fail)?;
        }
        let found = session.run_binding_with_options(&binding, &options);
        let taken = take(&found.map_err(took_place)?);
        self.took = began.elapsed();
        taken
    }
}

/// Memory that a device copies from without another copy.
struct Pinned {
    tensor: Tensor<f32>,
}

impl Deref for Pinned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.tensor.extract_tensor().1
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.tensor.extract_tensor_mut().1
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
        let has = self.outputs.iter().any(|output| output == FEATURES);
        if has && self.wanted.len() == 1 {
            self.wanted = self.wanted.iter().cloned().chain([FEATURES.to_owned()]).collect();
        }
    }

    fn give_back(&mut self) {
        self.gives_back = true;
    }

    fn last_run(&self) -> Option<Duration> {
        Some(self.took)
    }

    fn host_memory(&self, values: usize) -> HostMemory {
        let Device::Cuda(number) = self.device else { return plain_memory(values) };
        let pinned = || {
            let number = i32::try_from(number).unwrap_or_default();
            let info =
                MemoryInfo::new(AllocationDevice::CUDA_PINNED, number, AllocatorType::Device, MemoryType::CPUInput)?;
            let allocator = Allocator::new(&self.session.lock().unwrap_or_else(PoisonError::into_inner), info)?;
            let mut tensor = Tensor::<f32>::new(&allocator, [values])?;
            tensor.extract_tensor_mut().1.fill(0.0);
            Ok::<_, ort::Error>(Pinned { tensor })
        };
        match pinned() {
            Ok(pinned) => Box::new(pinned),
            Err(error) => {
                tracing::warn!(%error, device = %self.device, "no memory could be pinned for the device; copies to it take longer");
                plain_memory(values)
            }
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
