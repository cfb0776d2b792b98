//! Where networks run: what is asked for ([`Wanted`]), what runs ([`Device`]), and how it is set up ([`CudaOptions`]). An
//! execution provider is added here and nowhere else: a kind of device, its spelling, its registration with a session, and what
//! of it a kept network depends on.

use std::fmt;
use std::str::FromStr;

use ort::session::builder::SessionBuilder;

use super::{RuntimeError, SessionOptions};

/// The device or devices that are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA GPUs of these numbers; an error if one of them cannot be used.
    Cuda(Vec<u32>),
    /// The first NVIDIA GPU if it works, otherwise the processor, with one line in the log.
    Auto,
}

/// Where networks are to run, and how they are opened there.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// The devices that are asked for.
    pub wanted: Wanted,
    /// How a session is opened on each.
    pub session: SessionOptions,
}

/// A device that runs networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    /// The processor.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(u32),
}

/// How CUDA is set up. Names as ONNX Runtime documents its CUDA execution provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CudaOptions {
    /// Bytes of the GPU's memory that a network's arena may take (`gpu_mem_limit`): its weights and values; the libraries of
    /// CUDA take theirs beside it. None for as much as there is.
    pub memory: Option<usize>,
    /// How the arena grows (`arena_extend_strategy`).
    pub arena: ArenaGrowth,
    /// How cuDNN chooses among its convolutions (`cudnn_conv_algo_search`).
    pub convolutions: ConvolutionSearch,
    /// Whether the factors of products are rounded to TensorFloat-32 (`use_tf32`), which has ten bits of fraction, on GPUs that
    /// have it.
    pub tf32: bool,
}

/// How CUDA's arena grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ArenaGrowth {
    /// By what is asked for.
    #[default]
    Requested,
    /// By powers of two: fewer allocations, more memory.
    Doubling,
}

/// How cuDNN chooses among its convolutions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ConvolutionSearch {
    /// By rules.
    #[default]
    Heuristic,
    /// By trying all of them for each size of batch, while the model is opened.
    Exhaustive,
    /// None: always the same.
    Fixed,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("unknown device {text:?}: expected cpu, auto, cuda, cuda:1, or several GPUs as cuda:0,1");
        match text {
            "cpu" => return Ok(Self::Cpu),
            "auto" => return Ok(Self::Auto),
            "cuda" => return Ok(Self::Cuda(vec![0])),
            _ => {}
        }
        let numbers = text.strip_prefix("cuda:").ok_or_else(wrong)?;
        let numbers: Vec<u32> = numbers
            .split(',')
            .map(|n| n.parse().ok().filter(|n| *n < 1024).ok_or_else(wrong))
            .collect::<Result<_, _>>()?;
        let twice = numbers.iter().enumerate().find(|(at, number)| numbers[..*at].contains(number));
        match twice {
            Some((_, number)) => Err(format!("{text:?} names the GPU {number} twice")),
            None => Ok(Self::Cuda(numbers)),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Auto => f.write_str("auto"),
            Self::Cuda(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
        }
    }
}

static SAID_ONCE: std::sync::Once = std::sync::Once::new();

impl Wanted {
    /// The first of them alone.
    #[must_use]
    pub fn first(&self) -> Self {
        match self {
            Self::Cuda(numbers) => Self::Cuda(numbers.iter().copied().take(1).collect()),
            other => other.clone(),
        }
    }

    /// Whether the processor is taken where a device that opens cannot run the network: what it says is logged, once.
    pub fn falls_back(&self, error: &dyn fmt::Display) -> bool {
        if *self == Self::Auto {
            SAID_ONCE.call_once(|| tracing::info!(%error, "CUDA is not used; running on the CPU"));
        }
        *self == Self::Auto
    }

    /// Opens something on each of the devices that is not the processor; none where the processor is to run the network. With
    /// [`Wanted::Auto`], what CUDA says is logged, once, and the processor is used.
    ///
    /// # Errors
    /// The first device's that fails.
    pub fn apart<T, E>(&self, mut open: impl FnMut(Device) -> Result<T, E>) -> Result<Option<Vec<T>>, E>
    where
        E: CannotUse,
    {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(numbers) => {
                numbers.iter().map(|number| open(Device::Cuda(*number))).collect::<Result<_, _>>().map(Some)
            }
            Self::Auto => match open(Device::Cuda(0)) {
                Ok(opened) => Ok(Some(vec![opened])),
                Err(error) => {
                    let Some(reason) = error.cannot_use() else { return Err(error) };
                    // Every model opens sessions; one line tells it.
                    SAID_ONCE.call_once(|| tracing::info!(reason, "CUDA is not used; running on the CPU"));
                    Ok(None)
                }
            },
        }
    }
}

/// An error that may be that a device cannot be used.
pub trait CannotUse {
    /// What the device's driver says, if it is.
    fn cannot_use(&self) -> Option<&str>;
}

impl CannotUse for RuntimeError {
    fn cannot_use(&self) -> Option<&str> {
        match self {
            Self::Device { reason, .. } => Some(reason),
            _ => None,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl Device {
    /// What a network that was optimised for it depends on: the provider, the precision that it computes in, and its options.
    pub(super) fn identity(self, cuda: &CudaOptions) -> String {
        match self {
            Self::Cpu => "cpu f32".into(),
            Self::Cuda(_) => format!("cuda {} {cuda:?}", if cuda.tf32 { "tf32" } else { "f32" }),
        }
    }

    /// Registers its provider with a session to be.
    pub(super) fn register(self, builder: SessionBuilder, cuda: &CudaOptions) -> Result<SessionBuilder, RuntimeError> {
        match self {
            Self::Cpu => Ok(builder),
            Self::Cuda(number) => on_cuda(builder, number, cuda).map_err(|reason| self.failed(&reason)),
        }
    }

    /// That it cannot be used, in its driver's words.
    pub(super) fn failed(self, reason: &str) -> RuntimeError {
        RuntimeError::Device { device: self, reason: concise(reason) }
    }

    /// What a failed run on it means: a fault of the device, after which nothing more can be run on it, or of this run.
    pub(super) fn fault(self, reason: String) -> RuntimeError {
        // A CUDA context does not heal, but what failed for want of memory, or of a way to compute this, has not harmed it.
        let lost = ["CUDA failure", "CUDA error", "CUDNN failure", "CUBLAS failure", "CUFFT failure"];
        let harmless = ["out of memory", "ALLOC_FAILED", "NOT_SUPPORTED"];
        let says = |words: &[&str]| words.iter().any(|word| reason.contains(word));
        match self {
            Self::Cuda(_) if says(&lost) && !says(&harmless) => {
                RuntimeError::Lost { device: self, reason: concise(&reason) }
            }
            _ => RuntimeError::Run(reason),
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(_: SessionBuilder, _: u32, _: &CudaOptions) -> Result<SessionBuilder, String> {
    Err("this build has no CUDA support (cargo feature `cuda`)".into())
}

#[cfg(feature = "cuda")]
fn on_cuda(builder: SessionBuilder, number: u32, options: &CudaOptions) -> Result<SessionBuilder, String> {
    use ort::ep::cuda::ConvAlgorithmSearch;
    use ort::ep::{ArenaExtendStrategy, CUDA};
    let CudaOptions { memory, arena, convolutions, tf32 } = *options;
    let cuda = CUDA::default()
        .with_device_id(i32::try_from(number).map_err(|_| format!("there is no GPU {number}"))?)
        .with_arena_extend_strategy(match arena {
            ArenaGrowth::Requested => ArenaExtendStrategy::SameAsRequested,
            ArenaGrowth::Doubling => ArenaExtendStrategy::NextPowerOfTwo,
        })
        .with_conv_algorithm_search(match convolutions {
            ConvolutionSearch::Heuristic => ConvAlgorithmSearch::Heuristic,
            ConvolutionSearch::Exhaustive => ConvAlgorithmSearch::Exhaustive,
            ConvolutionSearch::Fixed => ConvAlgorithmSearch::Default,
        })
        .with_tf32(tf32);
    let cuda = match memory {
        Some(bytes) => cuda.with_memory_limit(bytes),
        None => cuda,
    };
    builder.with_execution_providers([cuda.build().error_on_failure()]).map_err(|error| error.to_string())
}

/// What the driver said, out of the runtime's account of where it heard it.
fn concise(reason: &str) -> String {
    let said = reason.find("CUDA failure").map_or(reason, |at| &reason[at..]);
    said.split(" ; ").next().unwrap_or(said).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cuda_failure_is_told_in_the_drivers_words() {
        let told =
            "a.cc:122 std::conditional_t<…> CUDA failure 35: CUDA driver version is insufficient ; GPU=-1 ; file=b.cc";
        assert_eq!(concise(told), "CUDA failure 35: CUDA driver version is insufficient");
        assert_eq!(concise("this build has no CUDA support"), "this build has no CUDA support");
        let lost = Device::Cuda(1).fault(told.into());
        assert!(matches!(lost, RuntimeError::Lost { device: Device::Cuda(1), .. }), "{lost}");
        for not_lost in
            ["a bad shape", "CUDA failure 2: out of memory ; GPU=0", "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"]
        {
            assert!(matches!(Device::Cuda(1).fault(not_lost.into()), RuntimeError::Run(_)), "{not_lost}");
        }
        assert!(matches!(Device::Cpu.fault(told.into()), RuntimeError::Run(_)));
    }

    #[test]
    fn devices_are_spelled_as_they_are_read() {
        for text in ["cpu", "auto", "cuda:0", "cuda:1", "cuda:0,1,7"] {
            assert_eq!(text.parse::<Wanted>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Wanted::Cuda(vec![0])));
        for wrong in ["", "gpu", "cuda:", "cuda:a", "cuda:0,", "cuda:-1", "cuda:0,0", "cuda:4096", "CPU"] {
            assert!(wrong.parse::<Wanted>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn auto_takes_the_processor_where_cuda_fails_and_nothing_else_does() {
        let no_gpu = |device: Device| Err::<Device, _>(device.failed("no driver"));
        assert!(matches!(Wanted::Auto.apart(no_gpu), Ok(None)));
        assert!(matches!(Wanted::Cuda(vec![0, 1]).apart(no_gpu), Err(RuntimeError::Device { .. })));
        assert!(matches!(Wanted::Cpu.apart(|device| Err::<(), _>(device.failed("asked"))), Ok(None)));
        let broken = |_: Device| Err::<Device, _>(RuntimeError::Open("no network".into()));
        assert!(matches!(Wanted::Auto.apart(broken), Err(RuntimeError::Open(_))));
        let two = Wanted::Cuda(vec![1, 0]).apart(Ok::<_, RuntimeError>).unwrap();
        assert_eq!(two, Some(vec![Device::Cuda(1), Device::Cuda(0)]));
    }
}
