//! `nbn`: serve a model repository over HTTP and gRPC, or score files from the command line.

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
use nbn::runtime::{Device, NetworkCache, SessionOptions, disable_telemetry};

/// Decoding is ended when it takes more memory than it may.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEFAULT_ADDR: &str = "127.0.0.1:8080";
/// Exit status for a configuration that cannot be used, as sysexits.h numbers it.
const BAD_CONFIGURATION: u8 = 78;

/// Serves image classifiers that were trained on long-tailed data.
#[derive(Parser)]
#[command(name = "nbn", version, long_version = long_version(), arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the model that comes with the program, shows an answer, and opens the page to try pictures on
    Demo(demo::Demo),
    /// Answers POSTed images with class scores over HTTP and gRPC
    Serve(Box<serve::Serve>),
    /// Scores files and folders; one row per image
    Score(Box<score::Score>),
    /// Trains, exports, calibrates, evaluates and inspects networks: runs nbn-fold
    Fold(fold::Fold),
    /// Asks a running server whether it is ready; for container health checks
    Health(health::Health),
    /// Makes an API key, and the line for the server's key file
    Key {
        /// Whose key it is
        name: String,
        /// May load and unload models
        #[arg(long)]
        admin: bool,
        /// Requests at once with this key
        #[arg(long)]
        concurrency: Option<u32>,
    },
    /// Prints the HTTP interface's OpenAPI document
    Openapi {
        /// yaml or json
        #[arg(long, default_value = "yaml")]
        format: DocumentFormat,
    },
    /// Prints a shell's completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DocumentFormat {
    Yaml,
    Json,
}

#[derive(Args)]
struct EngineArgs {
    /// Sessions that work side by side [default: processors that the machine or container may use / threads]
    #[arg(long, env = "NBN_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Threads that work on one batch together
    #[arg(long, env = "NBN_THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Where the networks run; auto is CUDA when it works, else the processor
    #[arg(long, env = "NBN_DEVICE", default_value = "cpu")]
    device: Device,
    /// Largest accepted image, in pixels (width × height)
    #[arg(long, env = "NBN_MAX_PIXELS", default_value_t = DecodeLimits::default().max_pixels)]
    max_pixels: u64,
    /// ONNX Runtime's shared library, when not found by itself
    #[arg(long, env = "NBN_ONNXRUNTIME")]
    onnxruntime: Option<PathBuf>,
    /// Folder where optimised networks are kept, or none; whoever can write it can change what runs
    /// [default: nbn/networks in the user's cache folder]
    #[arg(long, env = "NBN_CACHE")]
    cache: Option<PathBuf>,
}

fn main() -> ExitCode {
    disable_telemetry();
    memory::give_back();
    let matches = Cli::command().get_matches();
    // What clap has matched it can read.
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Command::Serve(args) => {
            let matches = matches.subcommand_matches("serve");
            return match configuration::complete(*args, matches) {
                Ok(args) => finish(serve::run(args, tracing::Level::INFO)),
                Err(error) => {
                    eprintln!("nbn: {error:#}");
                    ExitCode::from(BAD_CONFIGURATION)
                }
            };
        }
        Command::Demo(args) => demo::demo(args),
        Command::Score(args) => {
            nbn::telemetry::init(tracing::Level::WARN);
            score::score(*args)
        }
        Command::Fold(args) => fold::fold(args),
        Command::Health(args) => health::health(&args),
        Command::Key { name, admin, concurrency } => key(&name, admin, concurrency),
        Command::Openapi { format } => {
            let document = match format {
                DocumentFormat::Yaml => nbn::serve::document(),
                DocumentFormat::Json => nbn::serve::document_json(),
            };
            io::stdout().write_all(document.as_bytes()).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "nbn", &mut io::stdout());
            Ok(ExitCode::SUCCESS)
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
        eprintln!("nbn: {error:#}");
        ExitCode::from(if error.is::<Unusable>() { BAD_CONFIGURATION } else { 1 })
    })
}

impl EngineArgs {
    fn workers(&self) -> usize {
        // Counts what a cgroup's quota and the affinity leave.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.map_or((processors / usize::from(self.threads)).max(1), usize::from)
    }

    fn session(&self) -> SessionOptions {
        SessionOptions { device: self.device, threads: self.threads.into() }
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
        "the name {name:?} does not fit: use letters, digits, and - _ ."
    );
    let key = nbn::serve::Keys::generate().context("the system gives no random bits")?;
    let mut line = format!("{name} {}", nbn::bundle::sha256_hex(key.as_bytes()));
    if let Some(n) = concurrency {
        line += &format!(" concurrency={n}");
    }
    if admin {
        line += " admin";
    }
    eprintln!("Give the key to {name}; it is shown once. The second line is for --api-keys-file.");
    println!("{key}\n{line}");
    Ok(ExitCode::SUCCESS)
}
