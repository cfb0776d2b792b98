//! `nbn`: serve a model repository over HTTP and gRPC, or score files from the command line.

// `tell!` and `show!` instead.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod address;
mod configuration;
mod demo;
mod fold;
mod health;
mod score;
mod serve;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use nbn::features::long_version;
use nbn::memory::{self, Counting};
use nbn::pixels::DecodeLimits;
use nbn::runtime::{
    ArenaGrowth, ConvolutionSearch, CudaOptions, NetworkCache, Place, SessionOptions, Wanted, disable_telemetry,
};
use nbn::{show, tell};

/// Decoding is ended when it takes more memory than it may.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEFAULT_ADDR: &str = "127.0.0.1:8080";
/// Exit status for a configuration that cannot be used, as sysexits.h numbers it.
const BAD_CONFIGURATION: u8 = 78;

/// A share of images, or a probability.
fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(|| "it must be a number from 0 to 1".into())
}

/// Serves image classifiers that were trained on long-tailed data.
#[derive(Parser)]
#[command(name = "nbn", version, long_version = long_version(), arg_required_else_help = true)]
#[command(after_help = "The offline tool, fold, trains, exports, calibrates and evaluates: nbn fold --help.\n\
    docs/ and README.md of the project explain all of it; a running server shows its interface at /docs.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the model that comes with the program, shows one answer, and opens the web page
    Demo(demo::Demo),
    /// Serves models over HTTP and gRPC: post an image, get class scores
    Serve(Box<serve::Serve>),
    /// Scores files and folders, and writes one row per image
    Score(Box<score::Score>),
    /// Trains, exports, calibrates, evaluates and inspects networks (runs nbn-fold)
    Fold(fold::Fold),
    /// Checks that a running server is ready, for container health checks
    Health(health::Health),
    /// Creates an API key, and the line for the server's key file
    #[command(after_help = "Examples:\n  nbn key camera-1\n  nbn key deploy --admin")]
    Key {
        /// Name of the client that will use the key
        name: String,
        /// Allow the key to load and unload models
        #[arg(long)]
        admin: bool,
        /// Maximum number of concurrent requests with this key [default: the server's --key-concurrency]
        #[arg(long)]
        concurrency: Option<u32>,
    },
    /// Prints the HTTP interface's OpenAPI document
    #[command(after_help = "Examples:\n  nbn openapi > openapi.yaml\n  nbn openapi --format json")]
    Openapi {
        /// Format of the document
        #[arg(long, default_value = "yaml")]
        format: DocumentFormat,
    },
    /// Prints a completion script for a shell
    #[command(
        after_help = "Examples:\n  nbn completions bash > ~/.local/share/bash-completion/completions/nbn\n  nbn completions zsh > ~/.zfunc/_nbn"
    )]
    Completions {
        /// Shell that the script is for
        shell: clap_complete::Shell,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DocumentFormat {
    Yaml,
    Json,
}

#[derive(Args)]
#[command(next_help_heading = "Networks and processors")]
struct EngineArgs {
    /// Number of images that are decoded in parallel; on the processor, each worker runs the network in a session of its own
    /// [default: available processors / threads]
    #[arg(long, env = "NBN_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Threads per session, on the processor
    #[arg(long, env = "NBN_THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Device that runs the networks: cpu, cuda (the first GPU), cuda:1, cuda:0,1, or auto, which uses CUDA if it works and
    /// otherwise the processor
    #[arg(long, env = "NBN_DEVICE", default_value = "cpu", value_name = "DEVICE")]
    device: Wanted,
    /// Most memory of a GPU that the weights and values of one model may take, in MiB [default: all]
    #[arg(long, env = "NBN_CUDA_MEMORY_MB", value_name = "MIB", value_parser = clap::value_parser!(u32).range(16..))]
    cuda_memory_mb: Option<u32>,
    /// How this memory grows: by what is requested, or by doubling, which takes more and asks the driver less often
    #[arg(long, env = "NBN_CUDA_ARENA", default_value = "requested", value_name = "GROWTH")]
    cuda_arena: ArenaGrowth,
    /// How cuDNN chooses among its convolutions: by heuristic rules; exhaustive, by trying all of them for every batch size while
    /// a model is opened; or fixed, always the same
    #[arg(long, env = "NBN_CUDA_CONVOLUTIONS", default_value = "heuristic", value_name = "SEARCH")]
    cuda_convolutions: ConvolutionSearch,
    /// Let GPUs round the factors of products to TensorFloat-32, ten bits of fraction, for speed; scores change
    #[arg(long, env = "NBN_CUDA_TF32")]
    cuda_tf32: bool,
    /// Largest accepted image, in pixels (width × height)
    #[arg(long, env = "NBN_MAX_PIXELS", default_value_t = DecodeLimits::default().max_pixels)]
    max_pixels: u64,
    /// Path of ONNX Runtime's shared library, if it is not found automatically
    #[arg(long, env = "NBN_ONNXRUNTIME")]
    onnxruntime: Option<PathBuf>,
    /// Folder that keeps optimised networks, or none; anyone who can write to it can change the networks that run
    /// [default: nbn/networks in the user's cache folder]
    #[arg(long, env = "NBN_CACHE")]
    cache: Option<PathBuf>,
}

fn main() -> ExitCode {
    disable_telemetry();
    memory::give_back();
    // A negative number is out of range of most flags, which say so; it is not an unknown flag.
    let command = Cli::command().mut_subcommands(|command| command.allow_negative_numbers(true));
    let matches = command.get_matches();
    // What clap has matched it can read.
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Command::Serve(args) => {
            let matches = matches.subcommand_matches("serve");
            return match configuration::complete(*args, matches) {
                Ok(args) => finish(serve::run(args, tracing::Level::INFO)),
                Err(error) => {
                    tell!("nbn: {error:#}");
                    ExitCode::from(BAD_CONFIGURATION)
                }
            };
        }
        Command::Demo(args) => demo::demo(args),
        Command::Score(args) => {
            nbn::telemetry::init_command(tracing::Level::WARN);
            score::score(*args)
        }
        Command::Fold(args) => fold::fold(args),
        Command::Health(args) => health::health(&args),
        Command::Key { name, admin, concurrency } => key(&name, admin, concurrency),
        Command::Openapi { format } => {
            #[cfg(feature = "openapi")]
            let document = match format {
                DocumentFormat::Yaml => nbn::serve::generate::yaml(),
                DocumentFormat::Json => nbn::serve::generate::json(),
            };
            #[cfg(not(feature = "openapi"))]
            let document = match format {
                DocumentFormat::Yaml => nbn::serve::OPENAPI_YAML,
                DocumentFormat::Json => nbn::serve::OPENAPI_JSON,
            };
            show!("{document}").map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "nbn", &mut script);
            show!("{}", String::from_utf8_lossy(&script)).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    finish(result)
}

/// A configuration that can be read but not used.
#[derive(Debug)]
struct Unusable;

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the configuration cannot be used")
    }
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        tell!("nbn: {error:#}");
        ExitCode::from(if error.is::<Unusable>() { BAD_CONFIGURATION } else { 1 })
    })
}

impl EngineArgs {
    fn workers(&self) -> usize {
        // Counts what a cgroup's quota and the affinity leave.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.map_or((processors / usize::from(self.threads)).max(1), usize::from)
    }

    fn place(&self) -> Place {
        let cuda = CudaOptions {
            memory: self.cuda_memory_mb.map(|mib| (mib as usize) << 20),
            arena: self.cuda_arena,
            convolutions: self.cuda_convolutions,
            tf32: self.cuda_tf32,
        };
        let session = SessionOptions { cuda, ..SessionOptions::on_processor(self.threads.into()) };
        Place { wanted: self.device.clone(), session }
    }

    fn limits(&self) -> DecodeLimits {
        DecodeLimits::of_pixels(self.max_pixels)
    }

    fn cache(&self) -> NetworkCache {
        match self.cache.clone().or_else(NetworkCache::default_folder) {
            Some(folder) if folder.as_os_str() != "none" => NetworkCache::at(folder),
            _ => NetworkCache::none(),
        }
    }
}

fn key(name: &str, admin: bool, concurrency: Option<u32>) -> anyhow::Result<ExitCode> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    anyhow::ensure!(
        !name.is_empty() && name.chars().all(plain),
        "the name {name:?} is not allowed: use letters, digits, and - _ ."
    );
    let key = nbn::serve::Keys::generate().context("the system provides no random bits")?;
    let mut line = format!("{name} {}", nbn::bundle::sha256_hex(key.as_bytes()));
    if let Some(n) = concurrency {
        line += &format!(" concurrency={n}");
    }
    if admin {
        line += " admin";
    }
    tell!("Give the key to {name}; it is shown once. The second line is for --api-keys-file.");
    // A reader that is gone has lost it.
    let mut to = io::stdout();
    writeln!(to, "{key}\n{line}").and_then(|()| to.flush()).context("the key cannot be written to standard output")?;
    Ok(ExitCode::SUCCESS)
}
