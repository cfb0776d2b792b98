//! `nbn`: serve a model repository over HTTP, or score files from the command line.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use nbn::bundle::{Bundle, Class};
use nbn::classify::{Abstention, ScoreRequest};
use nbn::pixels::DecodeLimits;
use nbn::runtime::{Device, Library, SessionOptions, disable_telemetry};
use nbn::score::{self, Format, Scoring, Sink};
use nbn::scores::{Prior, SetRung, SetScore};
use nbn::serve::{self, Ended, LoadOptions, Registry, RequestLimits, ServeOptions, ServedModel};

const DEFAULT_ADDR: &str = "127.0.0.1:8080";

/// Serves image classifiers that were trained on long-tailed data.
#[derive(Parser)]
#[command(name = "nbn", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers POSTed images with class scores over HTTP
    Serve(Serve),
    /// Scores files and folders; one row per image
    Score(Score),
    /// Asks a running server whether it is ready; for container health checks
    Health {
        /// Address of the server
        #[arg(long, env = "NBN_ADDR", default_value = DEFAULT_ADDR)]
        addr: SocketAddr,
    },
    /// Prints the HTTP interface's OpenAPI document
    Openapi {
        /// yaml or json
        #[arg(long, default_value = "yaml")]
        format: DocumentFormat,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DocumentFormat {
    Yaml,
    Json,
}

#[derive(Args)]
struct EngineArgs {
    /// Sessions that work side by side, each on one image [default: processors / threads]
    #[arg(long, env = "NBN_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Threads that work on one image together
    #[arg(long, env = "NBN_THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Where the networks run; auto is CUDA when it works, else the processor
    #[arg(long, env = "NBN_DEVICE", default_value = "cpu")]
    device: Device,
    /// Largest accepted image, in pixels (width × height)
    #[arg(long, env = "NBN_MAX_PIXELS", default_value_t = DecodeLimits::default().max_pixels)]
    max_pixels: u64,
    /// ONNX Runtime's shared library, when not found by itself
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
}

#[derive(Args)]
struct Serve {
    /// Folder with NAME/VERSION/manifest.json; the highest version of each model is served
    #[arg(long, env = "NBN_MODELS", default_value = "models")]
    models: PathBuf,
    /// Address to listen on
    #[arg(long, env = "NBN_ADDR", default_value = DEFAULT_ADDR)]
    addr: SocketAddr,
    /// The model that /v1/classify uses, when there are several
    #[arg(long, env = "NBN_DEFAULT_MODEL")]
    default_model: Option<String>,
    /// Refuse to start when a model is not calibrated
    #[arg(long, env = "NBN_REQUIRE_CALIBRATION")]
    require_calibration: bool,
    /// Class prior of answers to requests that name none
    #[arg(long, env = "NBN_PRIOR", default_value = "uniform")]
    prior: NamedPrior,
    /// Images that may wait for a worker, per model; more are answered with 503
    #[arg(long, env = "NBN_QUEUE", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    queue: u32,
    /// Images in one request
    #[arg(long, env = "NBN_MAX_IMAGES", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_images: u32,
    /// Largest body, in MiB
    #[arg(long, env = "NBN_MAX_BODY_MB", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_body_mb: u32,
    /// Seconds that a request may take
    #[arg(long, env = "NBN_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    /// Seconds that open requests have to finish after SIGTERM
    #[arg(long, env = "NBN_DRAIN_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3600))]
    drain_timeout: u32,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Args)]
struct Score {
    /// The bundle: models/NAME (its highest version) or models/NAME/VERSION
    #[arg(long)]
    model: PathBuf,
    /// Form of the rows
    #[arg(long, default_value = "jsonl")]
    format: Format,
    /// File for the rows [default: stdout]
    #[arg(long)]
    output: Option<PathBuf>,
    /// Classes per image, the best first
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    /// Class prior to score under: uniform, train, or a JSON file with a number per class or an object from label to
    /// number [default: uniform]
    #[arg(long)]
    prior: Option<String>,
    /// Add prediction sets that miss the true class at most this often
    #[arg(long)]
    alpha: Option<f64>,
    /// Score of the prediction sets
    #[arg(long, default_value = "pas", requires = "alpha")]
    set_score: SetScore,
    /// For whom the sets' coverage shall hold
    #[arg(long, default_value = "marginal", requires = "alpha")]
    set_rung: SetRung,
    /// Leave out classes that score less; abstain when that leaves none
    #[arg(long, value_parser = probability)]
    min_score: Option<f64>,
    /// Abstain when the set is larger
    #[arg(long, requires = "alpha", value_parser = clap::value_parser!(u32).range(1..))]
    max_set_size: Option<u32>,
    /// Abstain when the best class has no calibration image
    #[arg(long)]
    abstain_prior_only: bool,
    /// Largest file, in MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_file_mb: u32,
    #[command(flatten)]
    engine: EngineArgs,
    /// Image files and folders; without any, or with -, a list of paths on stdin
    inputs: Vec<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum NamedPrior {
    /// Every class equally often
    Uniform,
    /// As often as in training
    Train,
}

impl From<NamedPrior> for Prior {
    fn from(prior: NamedPrior) -> Self {
        match prior {
            NamedPrior::Uniform => Self::Uniform,
            NamedPrior::Train => Self::Train,
        }
    }
}

fn probability(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(|| "it must be a number from 0 to 1".into())
}

fn main() -> ExitCode {
    disable_telemetry();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(args) => {
            nbn::telemetry::init("info");
            serve(args)
        }
        Command::Score(args) => {
            nbn::telemetry::init("warn");
            score(args)
        }
        Command::Health { addr } => health(addr),
        Command::Openapi { format } => {
            let document = match format {
                DocumentFormat::Yaml => serve::document(),
                DocumentFormat::Json => serve::document_json(),
            };
            io::stdout().write_all(document.as_bytes()).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("nbn: {error:#}");
        ExitCode::from(1)
    })
}

impl EngineArgs {
    fn workers(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.map_or((processors / usize::from(self.threads)).max(1), usize::from)
    }

    fn session(&self) -> SessionOptions {
        SessionOptions { device: self.device, threads: self.threads.into() }
    }

    fn limits(&self) -> DecodeLimits {
        DecodeLimits { max_pixels: self.max_pixels, ..DecodeLimits::default() }
    }
}

#[tokio::main]
async fn serve(args: Serve) -> anyhow::Result<ExitCode> {
    let stop = nbn::shutdown::on_signal()?;
    let library = Library::load(args.engine.onnxruntime.as_deref())?;
    tracing::info!(onnxruntime = %library.path().display(), "ONNX Runtime loaded");
    // The port is taken before the models are loaded: a clash is found at once.
    let listener = tokio::net::TcpListener::bind(args.addr)
        .await
        .with_context(|| format!("cannot listen on {}: choose another --addr", args.addr))?;
    let addr = listener.local_addr()?;
    let engine = &args.engine;
    let options = LoadOptions {
        default_model: args.default_model.clone(),
        require_calibration: args.require_calibration,
        workers: engine.workers(),
        session: engine.session(),
        limits: engine.limits(),
        queue: args.queue as usize,
    };
    let models = args.models.clone();
    let registry = tokio::task::spawn_blocking(move || Registry::load(&models, library, &options)).await??;
    tracing::info!(%addr, "listening: POST an image to /v1/classify");
    let limits = RequestLimits {
        max_body_bytes: (args.max_body_mb as usize) << 20,
        max_images: args.max_images as usize,
        timeout: Duration::from_secs(args.timeout.into()),
    };
    let drain_timeout = Duration::from_secs(args.drain_timeout.into());
    let options = ServeOptions { limits, prior: args.prior.into(), drain_timeout };
    match serve::run(listener, registry, options, stop).await? {
        Ended::Drained => {
            tracing::info!("drained");
            Ok(ExitCode::SUCCESS)
        }
        Ended::DeadlinePassed => {
            tracing::error!(seconds = args.drain_timeout, "requests were still open at the end of --drain-timeout");
            // Not waiting for the workers: the deadline has passed.
            std::process::exit(1);
        }
    }
}

fn score(args: Score) -> anyhow::Result<ExitCode> {
    let from_stdin = args.inputs.is_empty() || args.inputs == [Path::new("-")];
    let paths = if from_stdin { score::from_list(io::stdin().lock())? } else { score::expand(&args.inputs)? };
    let library = Library::load(args.engine.onnxruntime.as_deref())?;
    let (session, limits, workers) = (args.engine.session(), args.engine.limits(), args.engine.workers());
    let bundle = Bundle::load(&args.model)?;
    let model = ServedModel::start(bundle, library, workers, session, limits, 4 * workers)?;
    let top_k = (args.top_k as usize).min(model.manifest.classes.len());
    let request = ScoreRequest {
        prior: args.prior.as_deref().map(|text| prior(text, &model.manifest.classes)).transpose()?,
        alpha: args.alpha,
        set_score: args.set_score,
        set_rung: args.set_rung,
        abstention: Abstention {
            min_score: args.min_score,
            max_set_size: args.max_set_size.map(|n| n as usize),
            prior_only: args.abstain_prior_only,
        },
    };
    let rule = model.scorer.rule(request, &Prior::default())?;
    let min_score = args.min_score.unwrap_or(0.0);
    let scoring = Scoring { manifest: &model.manifest, scorer: &model.scorer, rule, top_k, min_score };
    let output: Box<dyn Write> = match &args.output {
        Some(path) => Box::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?),
        None => Box::new(io::stdout().lock()),
    };
    let mut sink = Sink::new(BufWriter::new(output), args.format, scoring)?;
    let bar = if io::stderr().is_terminal() {
        let style =
            indicatif::ProgressStyle::with_template("{bar:32} {pos}/{len} images, {per_sec}, {eta} left {msg}")?;
        indicatif::ProgressBar::new(paths.len() as u64).with_style(style)
    } else {
        indicatif::ProgressBar::hidden()
    };
    let limit = u64::from(args.max_file_mb) << 20;
    let result = score::run(paths.into_iter(), &model.engine, limit, &mut sink, |summary| {
        bar.inc(1);
        if summary.failed > 0 {
            bar.set_message(format!("({} failed)", summary.failed));
        }
    });
    bar.finish_and_clear();
    let summary = match result {
        // The reader of a pipe has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
        result => result.context("a row could not be written")?,
    };
    eprintln!("{} images scored, {} failed", summary.scored, summary.failed);
    Ok(ExitCode::from(u8::from(summary.failed > 0)))
}

/// A prior by its name, or from a JSON file.
fn prior(text: &str, classes: &[Class]) -> anyhow::Result<Prior> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Weights {
        Vector(Vec<f64>),
        Map(std::collections::BTreeMap<String, f64>),
    }
    match text {
        "uniform" => return Ok(Prior::Uniform),
        "train" => return Ok(Prior::Train),
        _ => {}
    }
    let bytes =
        std::fs::read(text).with_context(|| format!("--prior {text}: neither uniform, train, nor a file to read"))?;
    let weights = serde_json::from_slice(&bytes).with_context(|| {
        format!("--prior {text}: expected JSON, a list of numbers or an object from label to number")
    })?;
    let prior = match weights {
        Weights::Vector(weights) => Prior::custom(weights, classes),
        Weights::Map(weights) => Prior::from_labels(weights.iter().map(|(l, w)| (l.as_str(), *w)), classes),
    };
    prior.with_context(|| format!("--prior {text}"))
}

fn health(addr: SocketAddr) -> anyhow::Result<ExitCode> {
    let timeout = Duration::from_secs(3);
    let mut target = addr;
    if addr.ip().is_unspecified() {
        target.set_ip(if addr.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    let mut stream = TcpStream::connect_timeout(&target, timeout).with_context(|| format!("no server at {target}"))?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write!(stream, "GET /readyz HTTP/1.1\r\nhost: {target}\r\nconnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.take(4096).read_to_string(&mut reply)?;
    let status = reply.split_whitespace().nth(1).unwrap_or("nothing");
    anyhow::ensure!(status == "200", "the server at {target} is not ready: it answered {status}");
    println!("ready");
    Ok(ExitCode::SUCCESS)
}
