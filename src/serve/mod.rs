//! HTTP: routes, request bodies, wire types, errors, the OpenAPI document; connections and their limits.

mod activity;
mod base64;
mod body;
mod code;
mod coding;
mod connections;
mod control;
mod cut;
mod document;
mod envelope;
#[cfg(feature = "openapi")]
pub mod generate;
mod handlers;
mod infer;
mod input;
mod keys;
mod notes;
mod objects;
mod options;
mod origins;
mod page;
mod problem;
mod prometheus;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
mod tls;
mod unread;
mod v2;
mod wire;

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, Predicate, SizeAbove};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use crate::registry::{Registry, ServedModel};
use crate::scores::Prior;

pub use document::{OPENAPI_JSON, OPENAPI_YAML};
pub use keys::Keys;
pub use tls::{Tls, TlsError};

use body::{BodyMemory, Parsers};
use control::Models;
use origins::Origins;
use problem::Problem;
use prometheus::Telemetry;

/// What one request may cost.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// Images in one request.
    pub max_images: usize,
    /// From the first byte of the body to the last of the answer.
    pub timeout: Duration,
    /// Bytes of all bodies together.
    pub max_buffered_bytes: usize,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            max_images: 32,
            timeout: Duration::from_secs(30),
            max_buffered_bytes: 512 << 20,
        }
    }
}

/// What connections may cost.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// Open at once; more are closed at once.
    pub max_connections: usize,
    /// For a request's head to arrive, the first one's from the connection's start.
    pub header_timeout: Duration,
    /// For the next request to begin.
    pub idle_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self { max_connections: 16_384, header_timeout: Duration::from_secs(10), idle_timeout: Duration::from_secs(75) }
    }
}

/// How a server serves.
pub struct ServeOptions {
    /// What one request may cost.
    pub limits: RequestLimits,
    /// What connections may cost.
    pub connections: ConnectionLimits,
    /// The class prior of requests that name none.
    pub prior: Prior,
    /// The familiarity up to which decisions are withheld by requests that say nothing of it, from models that know it.
    pub unlike: Option<f64>,
    /// What open requests have to finish after a stop.
    pub drain_timeout: Duration,
    /// Who may ask.
    pub keys: Arc<Keys>,
    /// Whether models may be loaded and unloaded on the main listener without keys.
    pub control: bool,
    /// Origins whose pages may ask; `*` for all.
    pub cors_origins: Vec<String>,
    /// Whether every request is logged.
    pub access_log: bool,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            limits: RequestLimits::default(),
            connections: ConnectionLimits::default(),
            prior: Prior::default(),
            unlike: None,
            drain_timeout: Duration::from_secs(30),
            keys: Arc::default(),
            control: false,
            cors_origins: Vec::new(),
            access_log: false,
        }
    }
}

/// Where a server listens.
pub struct Listeners {
    /// For everybody: HTTP/1.1, HTTP/2 and gRPC.
    pub main: TcpListener,
    /// The same once more, for gRPC clients that expect a port of their own.
    pub grpc: Option<TcpListener>,
    /// For metrics and repository control, which then are here only.
    pub admin: Option<TcpListener>,
    /// TLS on the first two.
    pub tls: Option<Arc<Tls>>,
}

/// What every handler sees.
pub(crate) struct Shared {
    pub(crate) registry: Models,
    pub(crate) limits: RequestLimits,
    pub(crate) prior: Prior,
    pub(crate) unlike: Option<f64>,
    /// Models, by name and version, of which it was told that this does not hold for them.
    pub(crate) told: Mutex<HashSet<(String, String)>>,
    pub(crate) draining: AtomicBool,
    pub(crate) memory: BodyMemory,
    pub(crate) parsers: Parsers,
    pub(crate) telemetry: Telemetry,
    pub(crate) keys: Arc<Keys>,
    pub(crate) origins: Origins,
    pub(crate) access_log: bool,
}

/// [`Shared`], and what holds for one listener.
#[derive(Clone)]
pub(crate) struct App {
    shared: Arc<Shared>,
    /// Models may be loaded and unloaded without keys.
    pub(crate) control: bool,
    /// The repository is spoken of here.
    pub(crate) administers: bool,
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl App {
    /// Says, once for each version of a model, that the server's `unlike` does not hold for it: it knows nothing of that, or not
    /// below `least`.
    pub(crate) fn without_unlike(&self, model: &ServedModel, least: Option<f64>) {
        let name = (model.name.clone(), model.version.clone());
        if self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(name) {
            let reason = least.map_or_else(
                || "it was not calibrated with its training images".to_owned(),
                |least| format!("its calibration images allow no share below {least:.5}"),
            );
            tracing::warn!(model = %model.name, version = %model.version, reason, "--unlike does not hold for this model");
        }
    }

    /// Whether requests should be sent here.
    pub(crate) fn ready(&self) -> Result<(), Problem> {
        if self.is_draining() {
            Err(problem::draining())
        } else if self.registry.is_filled() {
            Ok(())
        } else {
            Err(problem::loading())
        }
    }

    /// Whether open requests are the last.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered.
    Drained,
    /// The drain's deadline passed with requests still open.
    DeadlinePassed,
}

/// What is open to everybody on each listener.
fn health() -> Router<App> {
    Router::new()
        .route("/livez", get(handlers::live))
        .route("/readyz", get(handlers::ready))
        .route("/v2/health/live", get(v2::live))
        .route("/v2/health/ready", get(v2::ready))
}

/// Metrics and repository control.
fn administration() -> Router<App> {
    Router::new()
        .route("/metrics", get(handlers::metrics))
        .route("/v2/repository/index", post(v2::index))
        .route("/v2/repository/models/{model}/load", post(v2::load))
        .route("/v2/repository/models/{model}/unload", post(v2::unload))
}

fn main_routes(app: &App, with_administration: bool, cors_origins: &[String]) -> Router {
    let guarded = Router::new()
        .route("/v1/classify", post(handlers::classify_default))
        .route("/v1/models", get(handlers::models))
        .route("/v1/models/{model}", get(handlers::model))
        .route("/v1/models/{model}/classify", post(handlers::classify_model))
        .route("/v1/models/{model}/versions/{version}/classify", post(handlers::classify_version))
        .route("/v2", get(v2::server))
        .route("/v2/models/stats", get(v2::all_stats))
        .route("/v2/models/{model}", get(v2::metadata))
        .route("/v2/models/{model}/ready", get(v2::model_ready))
        .route("/v2/models/{model}/stats", get(v2::stats))
        .route("/v2/models/{model}/config", get(v2::config))
        .route("/v2/models/{model}/infer", post(v2::infer))
        .route("/v2/models/{model}/versions/{version}", get(v2::metadata_version))
        .route("/v2/models/{model}/versions/{version}/ready", get(v2::model_ready_version))
        .route("/v2/models/{model}/versions/{version}/stats", get(v2::stats_version))
        .route("/v2/models/{model}/versions/{version}/config", get(v2::config_version))
        .route("/v2/models/{model}/versions/{version}/infer", post(v2::infer_version))
        .route("/inference.GRPCInferenceService/{method}", post(v2::method));
    let guarded = if with_administration { guarded.merge(administration()) } else { guarded };
    let open = health().merge(v2::services(app)).route("/openapi.yaml", get(handlers::openapi)).merge(page::routes());
    let router = guarded.route_layer(from_fn_with_state(app.clone(), admit)).merge(open);
    let router = enveloped(router, app);
    if cors_origins.is_empty() { router } else { router.layer(cors(cors_origins)) }
}

fn admin_routes(app: &App) -> Router {
    let control = administration()
        .route("/inference.GRPCInferenceService/{method}", post(v2::method))
        .route_layer(from_fn_with_state(app.clone(), admit_metrics_freely));
    enveloped(control.merge(health()), app)
}

fn enveloped(router: Router<App>, app: &App) -> Router {
    router
        .fallback(handlers::not_found)
        .method_not_allowed_fallback(handlers::method_not_allowed)
        .layer(CatchPanicLayer::custom(envelope::from_panic))
        .layer(from_fn_with_state(app.clone(), envelope::envelope))
        // What is small, or compressed already, stays as it is; so do gRPC's messages.
        .layer(CompressionLayer::new().gzip(true).compress_when(DefaultPredicate::new().and(SizeAbove::new(1024))))
        .with_state(app.clone())
}

/// Origins were checked when the options were read.
fn cors(origins: &[String]) -> CorsLayer {
    // Mirrored: to browsers, `*` does not mean Authorization.
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(Any);
    if origins.iter().any(|origin| origin == "*") {
        return layer.allow_origin(Any);
    }
    layer.allow_origin(AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())))
}

/// Lets requests in whose key is known and within its limit.
async fn admit(State(app): State<App>, mut request: Request, next: Next) -> Result<Response, Problem> {
    let caller = Arc::new(app.keys.admit(request.headers())?);
    request.extensions_mut().insert(caller.clone());
    let response = next.run(request).await;
    drop(caller);
    Ok(response)
}

/// As [`admit`], but for metrics, which on the admin listener need no key.
async fn admit_metrics_freely(state: State<App>, request: Request, next: Next) -> Result<Response, Problem> {
    if request.uri().path() == "/metrics" { Ok(next.run(request).await) } else { admit(state, request, next).await }
}

/// Serves until `stop` becomes true, then drains: readiness fails, no connection is accepted, and open requests
/// have the options' `drain_timeout` to finish. The registry may be filled meanwhile; until then readiness fails.
pub fn run(
    listeners: Listeners,
    registry: Arc<Registry>,
    options: ServeOptions,
    stop: watch::Receiver<bool>,
) -> Pin<Box<dyn Future<Output = Ended> + Send>> {
    // Boxed here: else every program that calls this would compile hyper and all of this room anew.
    Box::pin(serve(listeners, registry, options, stop))
}

async fn serve(
    listeners: Listeners,
    registry: Arc<Registry>,
    options: ServeOptions,
    stop: watch::Receiver<bool>,
) -> Ended {
    let ServeOptions { limits, connections, prior, unlike, drain_timeout, keys, control, cors_origins, access_log } =
        options;
    let shared = Arc::new(Shared {
        registry: Models::of(registry),
        limits,
        prior,
        unlike,
        told: Mutex::default(),
        draining: AtomicBool::new(false),
        memory: BodyMemory::of(limits.max_buffered_bytes),
        parsers: Parsers::default(),
        telemetry: Telemetry::new(),
        keys,
        origins: Origins::named(&cors_origins),
        access_log,
    });
    let Listeners { main, grpc, admin, tls } = listeners;
    let with_administration = admin.is_none();
    let app = App { shared: shared.clone(), control: control && with_administration, administers: with_administration };
    let router = main_routes(&app, with_administration, &cors_origins);
    let mut servers = vec![connections::Server { listener: main, router: router.clone(), tls: tls.clone() }];
    servers.extend(grpc.map(|listener| connections::Server { listener, router, tls }));
    servers.extend(admin.map(|listener| {
        let app = App { shared: shared.clone(), control: true, administers: true };
        connections::Server { listener, router: admin_routes(&app), tls: None }
    }));
    connections::serve(servers, shared, connections, drain_timeout, stop).await
}
