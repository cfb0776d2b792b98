//! HTTP: routes, request bodies, wire types, errors, the OpenAPI document.

mod handlers;
mod input;
mod openapi;
mod options;
mod problem;
mod registry;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;

use crate::scores::Prior;

pub use openapi::{document, document_json};
pub use registry::{LoadOptions, Registry, RegistryError, ServedModel};

/// What one request may cost.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// Images in one request.
    pub max_images: usize,
    /// From the first byte of the body to the last of the answer.
    pub timeout: Duration,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self { max_body_bytes: 32 << 20, max_images: 32, timeout: Duration::from_secs(30) }
    }
}

/// How a server serves.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// What one request may cost.
    pub limits: RequestLimits,
    /// The class prior of requests that name none.
    pub prior: Prior,
    /// What open requests have to finish after a stop.
    pub drain_timeout: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { limits: RequestLimits::default(), prior: Prior::default(), drain_timeout: Duration::from_secs(30) }
    }
}

/// What every handler sees.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) registry: Arc<Registry>,
    pub(crate) limits: RequestLimits,
    pub(crate) prior: Arc<Prior>,
    pub(crate) draining: Arc<AtomicBool>,
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered.
    Drained,
    /// The drain's deadline passed with requests still open.
    DeadlinePassed,
}

fn router(app: App) -> Router {
    Router::new()
        .route("/v1/classify", post(handlers::classify_default))
        .route("/v1/models", get(handlers::models))
        .route("/v1/models/{model}", get(handlers::model))
        .route("/v1/models/{model}/classify", post(handlers::classify_model))
        .route("/v1/models/{model}/versions/{version}/classify", post(handlers::classify_version))
        .route("/livez", get(handlers::live))
        .route("/readyz", get(handlers::ready))
        .route("/openapi.yaml", get(handlers::openapi))
        .fallback(handlers::not_found)
        .method_not_allowed_fallback(handlers::method_not_allowed)
        .layer(CatchPanicLayer::custom(problem::from_panic))
        .layer(axum::middleware::from_fn(problem::envelope))
        .with_state(app)
}

/// Serves until `stop` becomes true, then drains: readiness fails, no connection is accepted, and open requests
/// have the options' `drain_timeout` to finish.
///
/// # Errors
/// When the listener fails.
pub async fn run(
    listener: TcpListener,
    registry: Registry,
    options: ServeOptions,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<Ended> {
    let ServeOptions { limits, prior, drain_timeout } = options;
    let draining = Arc::new(AtomicBool::new(false));
    let app = App { registry: Arc::new(registry), limits, prior: Arc::new(prior), draining: draining.clone() };
    let mut stopped = stop.clone();
    let server = axum::serve(listener, router(app)).with_graceful_shutdown(async move {
        // An error means that nobody can stop us any more; that is a stop, too.
        let _ = stopped.wait_for(|stop| *stop).await;
        draining.store(true, Ordering::Release);
        tracing::info!("draining");
    });
    let deadline = async {
        let _ = stop.wait_for(|stop| *stop).await;
        tokio::time::sleep(drain_timeout).await;
    };
    tokio::select! {
        result = async { server.await } => result.map(|()| Ended::Drained),
        () = deadline => Ok(Ended::DeadlinePassed),
    }
}
