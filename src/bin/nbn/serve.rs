//! `nbn serve`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use clap::{Args, ValueEnum};
use nbn::bundle::{Pixels, VersionPolicy};
use nbn::pixels::DecodeLimits;
use nbn::registry::{BatchChoice, ModelOptions, Registry, RegistryError, RegistryOptions};
use nbn::runtime::Library;
use nbn::scores::NamedPrior;
use nbn::serve::{self, ConnectionLimits, Ended, Keys, Listeners, RequestLimits, ServeOptions, Tls};
use nbn::stop::exit_at_once;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::address::address;
use crate::{DEFAULT_ADDR, EngineArgs, Unusable, configuration, share};

/// `MODE`, or `MODEL=MODE`.
#[derive(Debug, Clone)]
pub(crate) struct PixelsOf {
    model: Option<String>,
    pixels: Pixels,
}

impl FromStr for PixelsOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, mode) = match text.split_once('=') {
            Some((model, mode)) => (Some(model.to_owned()), mode),
            None => (None, text),
        };
        let pixels =
            Pixels::from_str(mode, false).map_err(|_| format!("{mode:?} is unknown; expected exact or fast"))?;
        Ok(Self { model, pixels })
    }
}

impl PixelsOf {
    /// Of models that are not named; the last one counts.
    fn of_all(given: &[Self]) -> Pixels {
        given.iter().rev().find(|of| of.model.is_none()).map_or(Pixels::Exact, |of| of.pixels)
    }

    fn by_model(given: &[Self]) -> BTreeMap<String, Pixels> {
        given.iter().filter_map(|of| Some((of.model.clone()?, of.pixels))).collect()
    }
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  nbn serve --models models\n  nbn serve --addr 0.0.0.0:8080 --admin-addr 127.0.0.1:8081 --api-keys-file keys"
)]
pub(crate) struct Serve {
    /// Model repository: the folder that holds NAME/VERSION/manifest.json
    #[arg(long, env = "NBN_MODELS", default_value = "models", help_heading = "Models")]
    models: PathBuf,
    /// Address to listen on for HTTP/1.1, HTTP/2 and gRPC
    #[arg(long, env = "NBN_ADDR", default_value = DEFAULT_ADDR, value_parser = address, help_heading = "Addresses")]
    addr: SocketAddr,
    /// Second address with the same services, for gRPC clients that expect a separate port
    #[arg(long, env = "NBN_GRPC_ADDR", value_parser = address, help_heading = "Addresses")]
    pub(crate) grpc_addr: Option<SocketAddr>,
    /// Separate address for /metrics and for loading and unloading models, which the main address then no longer offers
    #[arg(long, env = "NBN_ADMIN_ADDR", value_parser = address, help_heading = "Addresses")]
    admin_addr: Option<SocketAddr>,
    /// Allow loading and unloading models on the main address when there is no admin address and no key
    #[arg(long, env = "NBN_CONTROL", help_heading = "Models")]
    control: bool,
    /// Model that /v1/classify uses if there are several
    #[arg(long, env = "NBN_DEFAULT_MODEL", help_heading = "Models")]
    default_model: Option<String>,
    /// Versions of each model to serve: latest, all, or numbers separated by commas
    #[arg(long, env = "NBN_VERSIONS", default_value_t, help_heading = "Models")]
    versions: VersionPolicy,
    /// Refuse models that are not calibrated
    #[arg(long, env = "NBN_REQUIRE_CALIBRATION", help_heading = "Models")]
    require_calibration: bool,
    /// Pixels of JPEGs that are decoded: exact, all of them, as Pillow does; fast, every second, fourth or eighth where twice
    /// as many are left as the picture is resized to. MODEL=MODE is for one model; may be repeated
    #[arg(long, env = "NBN_PIXELS", value_name = "MODE|MODEL=MODE", value_delimiter = ',', help_heading = "Models")]
    pixels: Vec<PixelsOf>,
    /// Class prior for requests that do not name one
    #[arg(long, env = "NBN_PRIOR", default_value = "uniform", help_heading = "Models")]
    prior: NamedPrior,
    /// Withhold decisions on images that are unlike the training images: of those that are like them, at most this share is
    /// withheld, such as 0.01. For models whose calibration knows it, and requests that do not give `unlike`
    #[arg(long, env = "NBN_UNLIKE", value_name = "SHARE", value_parser = share, help_heading = "Models")]
    unlike: Option<f64>,
    /// Maximum number of images that wait for a worker, per model; beyond it, requests are answered with 503
    #[arg(long, env = "NBN_QUEUE", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Load")]
    queue: u32,
    /// Maximum number of images in one run of the network; auto measures at the first start which size is worthwhile
    #[arg(long, env = "NBN_MAX_BATCH", default_value = "auto", help_heading = "Load")]
    max_batch: BatchChoice,
    /// Maximum number of images in one request
    #[arg(long, env = "NBN_MAX_IMAGES", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000), help_heading = "Limits")]
    max_images: u32,
    /// Largest accepted request body, in MiB
    #[arg(long, env = "NBN_MAX_BODY_MB", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Limits")]
    pub(crate) max_body_mb: u32,
    /// Largest total size of the request bodies in memory, in MiB
    #[arg(long, env = "NBN_MAX_BUFFERED_MB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Limits")]
    pub(crate) max_buffered_mb: u32,
    /// Seconds that a request may take
    #[arg(long, env = "NBN_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600), help_heading = "Limits")]
    timeout: u32,
    /// Seconds that a client has to send a request's head; for the first request, counted from the start of the
    /// connection
    #[arg(long, env = "NBN_HEADER_TIMEOUT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600), help_heading = "Limits")]
    header_timeout: u32,
    /// Seconds that a connection may stay idle between requests. Keep this longer than a load balancer's idle timeout,
    /// which is usually 60: otherwise the balancer sends requests on connections that the server has just closed
    #[arg(long, env = "NBN_IDLE_TIMEOUT", default_value_t = 75, value_parser = clap::value_parser!(u32).range(1..=86_400), help_heading = "Limits")]
    idle_timeout: u32,
    /// Seconds that open requests have to finish after SIGTERM
    #[arg(long, env = "NBN_DRAIN_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3600), help_heading = "Limits")]
    drain_timeout: u32,
    /// Maximum number of open connections
    #[arg(long, env = "NBN_MAX_CONNECTIONS", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Limits")]
    max_connections: u32,
    /// File with one line per API key, `name sha256hex [concurrency=N] [admin]`; `nbn key` creates such lines
    #[arg(long, env = "NBN_API_KEYS_FILE", help_heading = "Access")]
    api_keys_file: Option<PathBuf>,
    /// The lines themselves, for use in the environment
    #[arg(
        long,
        env = "NBN_API_KEYS",
        hide = true,
        hide_env_values = true,
        conflicts_with = "api_keys_file",
        help_heading = "Access"
    )]
    api_keys: Option<String>,
    /// Maximum number of concurrent requests for each API key whose line sets no limit; 0 means no limit
    #[arg(long, env = "NBN_KEY_CONCURRENCY", default_value_t = 0, help_heading = "Access")]
    key_concurrency: u32,
    /// Certificate chain in PEM, read again on SIGHUP
    #[arg(long, env = "NBN_TLS_CERT", help_heading = "Access")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of the certificate, in PEM
    #[arg(long, env = "NBN_TLS_KEY", help_heading = "Access")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Origin whose pages may send requests, such as https://example.org, or * for any; can be given more than once
    #[arg(long, env = "NBN_CORS_ORIGIN", value_delimiter = ',', help_heading = "Access")]
    pub(crate) cors_origin: Vec<String>,
    /// Log every request
    #[arg(long, env = "NBN_ACCESS_LOG", help_heading = "Logs and traces")]
    access_log: bool,
    /// Send traces to an OpenTelemetry collector over gRPC, such as http://127.0.0.1:4317
    #[arg(long, env = "NBN_OTLP", help_heading = "Logs and traces")]
    otlp: Option<String>,
    /// TOML file whose keys are long flag names; flags and environment variables override it
    #[arg(long, env = "NBN_CONFIG", help_heading = "Configuration")]
    pub(crate) config: Option<PathBuf>,
    /// Print every option and where it comes from, and exit
    #[arg(long, help_heading = "Configuration")]
    pub(crate) print_config: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Serves until it is told to stop; logs from `level` on.
pub(crate) fn run(args: Serve, level: tracing::Level) -> anyhow::Result<ExitCode> {
    // Beside the workers, who decode and infer, connections take a tenth of the time; threads that wait for work wake
    // each other at every request.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads((processors / 2).max(1)).enable_all().build()?;
    let result = runtime.block_on(traced(args, level));
    // What still runs on threads of its own is not waited for: a network that is being opened, or spans on their way.
    runtime.shutdown_background();
    result
}

async fn traced(args: Serve, level: tracing::Level) -> anyhow::Result<ExitCode> {
    configuration::check(&args).context(Unusable)?;
    let traces = nbn::telemetry::init_traced(level, args.otlp.as_deref());
    let traces = traces.map_err(|reason| anyhow!(reason)).context(Unusable)?;
    let result = serve(args).await;
    if let Some(traces) = traces {
        // What has not been sent yet is worth a moment, not more.
        let _ = tokio::task::spawn_blocking(move || traces.finish()).await;
    }
    result
}

async fn serve(args: Serve) -> anyhow::Result<ExitCode> {
    let (stop, stopped) = nbn::shutdown::on_signal()?;
    let drain_timeout = Duration::from_secs(args.drain_timeout.into());
    let last_exit = LastExit::after(stopped.clone(), drain_timeout)?;
    raise_file_limit(args.max_connections);
    let keys = Arc::new(keys(&args).context(Unusable)?);
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some(Arc::new(Tls::load(certificate, key).context(Unusable)?)),
        _ => None,
    };
    let library = Library::load(args.engine.onnxruntime.as_deref())?;
    tracing::info!(onnxruntime = %library.path().display(), "ONNX Runtime loaded");
    ensure!(
        args.models.is_dir(),
        "--models {}: there is no such folder; it must have NAME/VERSION/manifest.json for each model",
        args.models.display()
    );
    // Ports are taken before the models are loaded: a clash is found at once.
    let listeners = Listeners {
        main: listen("--addr", args.addr).await?,
        grpc: match args.grpc_addr {
            Some(addr) => Some(listen("--grpc-addr", addr).await?),
            None => None,
        },
        admin: match args.admin_addr {
            Some(addr) => Some(listen("--admin-addr", addr).await?),
            None => None,
        },
        tls: tls.clone(),
    };
    let engine = &args.engine;
    let options = RegistryOptions {
        repository: args.models.clone(),
        versions: args.versions.clone(),
        default_model: args.default_model.clone(),
        require_calibration: args.require_calibration,
        model: ModelOptions {
            workers: engine.workers(),
            place: engine.place(),
            limits: DecodeLimits { pixels: PixelsOf::of_all(&args.pixels), ..engine.limits() },
            queue: args.queue as usize,
            batch: args.max_batch,
            features: false,
            cache: engine.cache(),
        },
        pixels: PixelsOf::by_model(&args.pixels),
    };
    let registry = Arc::new(Registry::over(options, library));
    announce(&listeners, &args, keys.len())?;
    let filled = tokio::task::spawn_blocking({
        let registry = registry.clone();
        move || registry.fill()
    });
    let (failure, mut failed) = oneshot::channel();
    tokio::spawn(watch_filling(filled, failure, stop.clone()));
    let mut lost = registry.lost_devices();
    let watched = lost.clone();
    tokio::spawn(watch_devices(watched, stop));
    on_hangup(registry.clone(), keys.clone(), tls, args.api_keys_file.clone())?;
    let options = ServeOptions {
        limits: RequestLimits {
            max_body_bytes: (args.max_body_mb as usize) << 20,
            max_images: args.max_images as usize,
            timeout: Duration::from_secs(args.timeout.into()),
            max_buffered_bytes: (args.max_buffered_mb as usize) << 20,
        },
        connections: ConnectionLimits {
            max_connections: args.max_connections as usize,
            header_timeout: Duration::from_secs(args.header_timeout.into()),
            idle_timeout: Duration::from_secs(args.idle_timeout.into()),
        },
        prior: args.prior.into(),
        unlike: args.unlike,
        drain_timeout,
        keys,
        control: args.control,
        cors_origins: args.cors_origin.clone(),
        access_log: args.access_log,
    };
    let ended = serve::run(listeners, registry.clone(), options, stopped).await;
    if let Ok(error) = failed.try_recv() {
        return Err(error);
    }
    if let Some(reason) = lost.borrow_and_update().clone() {
        // What its driver holds for other models is as lost, and may not let go: nothing waits for it.
        tracing::error!(reason, "a model has no device left: the server ends, to be started anew");
        exit_at_once(1);
    }
    if ended == Ended::DeadlinePassed {
        tracing::error!(seconds = args.drain_timeout, "requests were still open at the end of --drain-timeout");
        // Not waiting for the workers: the deadline has passed.
        exit_at_once(1);
    }
    last_exit.all_answered();
    // A thread that opens a network cannot be stopped, nor one that decodes the last lines of a picture nobody waits for.
    let deadline = last_exit.deadline();
    let closed = tokio::task::spawn_blocking(move || registry.close(deadline)).await?;
    if !closed {
        tracing::warn!(
            seconds = args.drain_timeout,
            "a model was still being opened, or was still running, at the end of --drain-timeout"
        );
        exit_at_once(0);
    }
    tracing::info!("drained");
    Ok(ExitCode::SUCCESS)
}

/// Ends the process at the end of the drain, whatever its other threads do.
struct LastExit {
    begun: Arc<OnceLock<Instant>>,
    answered: Arc<AtomicBool>,
    drain: Duration,
}

impl LastExit {
    /// What an orderly end may take beyond the drain.
    const GRACE: Duration = Duration::from_millis(500);
    /// What workers have to end when there is no time to drain.
    const LEAST: Duration = Duration::from_millis(100);

    /// Waits for `stopped` on a thread of its own.
    fn after(mut stopped: watch::Receiver<bool>, drain: Duration) -> std::io::Result<Self> {
        let this = Self { begun: Arc::default(), answered: Arc::default(), drain };
        let (begun, answered) = (this.begun.clone(), this.answered.clone());
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new().name("nbn-last-exit".into()).spawn(move || {
            // An error means that nobody can stop the server any more; then it has ended.
            if runtime.block_on(stopped.wait_for(|stopped| *stopped)).is_err() {
                return;
            }
            let begun = *begun.get_or_init(Instant::now);
            std::thread::sleep((begun + drain + Self::GRACE).saturating_duration_since(Instant::now()));
            tracing::error!(
                seconds = drain.as_secs(),
                "the server had not stopped at the end of --drain-timeout: exiting now"
            );
            exit_at_once(i32::from(!answered.load(Ordering::SeqCst)));
        })?;
        Ok(this)
    }

    /// Every request was answered: what still runs is no failure.
    fn all_answered(&self) {
        self.answered.store(true, Ordering::SeqCst);
    }

    /// When the drain ends that has begun.
    fn deadline(&self) -> Instant {
        *self.begun.get_or_init(Instant::now) + self.drain.max(Self::LEAST)
    }
}

/// Stops the server when its models cannot be opened.
async fn watch_filling(
    filled: JoinHandle<Result<(), RegistryError>>,
    failure: oneshot::Sender<anyhow::Error>,
    stop: watch::Sender<bool>,
) {
    let error = match filled.await {
        Ok(Ok(())) => {
            tracing::info!("ready");
            return;
        }
        // Stopped before it was ready.
        Ok(Err(RegistryError::Closing)) => return,
        Ok(Err(error)) => error.into(),
        Err(panic) => panic.into(),
    };
    // Told before the stop: whoever sees that must find the reason.
    let _ = failure.send(error);
    let _ = stop.send(true);
}

/// Stops the server once a model has no device left: within a process, a device does not heal.
async fn watch_devices(mut lost: watch::Receiver<Option<String>>, stop: watch::Sender<bool>) {
    if lost.wait_for(Option::is_some).await.is_ok() {
        let _ = stop.send(true);
    }
}

async fn listen(flag: &str, addr: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| format!("cannot listen on {addr}: choose another {flag}"))
}

fn announce(listeners: &Listeners, args: &Serve, keys: usize) -> anyhow::Result<()> {
    let addr = listeners.main.local_addr()?;
    let grpc = listeners.grpc.as_ref().map(TcpListener::local_addr).transpose()?;
    let admin = listeners.admin.as_ref().map(TcpListener::local_addr).transpose()?;
    let scheme = if listeners.tls.is_some() { "https" } else { "http" };
    let (workers, threads) = (args.engine.workers(), args.engine.threads);
    let show = |addr: Option<SocketAddr>| addr.map_or_else(|| "none".to_owned(), |addr| addr.to_string());
    tracing::info!(
        %addr, scheme, grpc = show(grpc), admin = show(admin), keys, workers, threads,
        "listening: POST an image to /v1/classify, or open {scheme}://{addr}/ in a browser"
    );
    if keys == 0 && !addr.ip().is_loopback() {
        tracing::warn!("anyone who can reach {addr} can send requests: set --api-keys-file to require keys");
    }
    Ok(())
}

/// As many files as the connections need, and the system allows.
fn raise_file_limit(connections: u32) {
    let wanted = u64::from(connections) + 256;
    #[cfg(unix)]
    match rlimit::increase_nofile_limit(wanted) {
        Ok(limit) if limit >= wanted => {}
        Ok(limit) => tracing::warn!(
            limit,
            "the system allows fewer open files than --max-connections needs; connections beyond its limit are refused"
        ),
        Err(error) => tracing::warn!(%error, "the limit on open files cannot be raised"),
    }
    #[cfg(not(unix))]
    let _ = wanted;
}

fn keys(args: &Serve) -> anyhow::Result<Keys> {
    let concurrency = args.key_concurrency as usize;
    let (text, name) = match (&args.api_keys_file, &args.api_keys) {
        (Some(path), _) => (read_keys(path)?, format!("--api-keys-file {}", path.display())),
        (None, Some(text)) => (text.clone(), "NBN_API_KEYS".to_owned()),
        (None, None) => return Ok(Keys::default()),
    };
    Keys::parse(&text, concurrency).map_err(|reason| anyhow!("{name}: {reason}"))
}

fn read_keys(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("--api-keys-file {}", path.display()))
}

/// On SIGHUP: reads the repository, the keys and the certificate again. What cannot be read leaves what was.
#[cfg(unix)]
fn on_hangup(
    registry: Arc<Registry>,
    keys: Arc<Keys>,
    tls: Option<Arc<Tls>>,
    keys_file: Option<PathBuf>,
) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!("SIGHUP: reading models, keys and certificate again");
            if let Some(path) = &keys_file {
                match read_keys(path).and_then(|text| keys.replace(&text).map_err(|reason| anyhow!(reason))) {
                    Ok(()) => tracing::info!(keys = keys.len(), "keys read"),
                    Err(error) => tracing::error!(
                        error = format!("{error:#}"),
                        "the keys cannot be read; the previous ones stay in use"
                    ),
                }
            }
            if let Some(tls) = &tls {
                match tls.reload() {
                    Ok(()) => tracing::info!("certificate read"),
                    Err(error) => {
                        tracing::error!(%error, "the certificate cannot be read; the previous one stays in use")
                    }
                }
            }
            let registry = registry.clone();
            // Not waited for: the next signal may take a key away.
            drop(tokio::task::spawn_blocking(move || registry.refresh()));
        }
    });
    Ok(())
}

#[cfg(not(unix))]
fn on_hangup(_: Arc<Registry>, _: Arc<Keys>, _: Option<Arc<Tls>>, _: Option<PathBuf>) -> std::io::Result<()> {
    Ok(())
}
