//! gRPC's own services, by tonic's crates: health, of the server and of each model, and reflection, by which `grpcurl` and
//! the like learn the messages. Neither needs a key: they say no more than `/readyz` and `/openapi.yaml`.

use std::pin::Pin;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::Version;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::post;
use futures_util::stream::{self, Stream, StreamExt};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until, timeout_at};
use tonic::Status;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{self, HealthCheckRequest, HealthCheckResponse};
use tower::ServiceExt;

use super::super::code::Code;
use super::super::infer;
use super::grpc::{must_be_grpc, no_such_method};
use super::{App, Problem};

/// `inference.proto`, compiled by `tests/clients/reflection.py --write`.
const DESCRIPTORS: &[u8] = include_bytes!("inference.pb");
/// The service that clients of the protocol ask about.
const OWN: &str = "inference.GRPCInferenceService";
/// Bytes of a message: a name, mostly.
const MAX_MESSAGE: usize = 4 << 10;
/// Watches at once, of all clients together: anybody may begin one, and none ends by itself.
const MAX_WATCHES: usize = 1024;
static WATCHES: Semaphore = Semaphore::const_new(MAX_WATCHES);
/// How late a watch may be told.
const WATCH_PERIOD: Duration = Duration::from_millis(500);

/// `grpc.health.v1.Health`, and `grpc.reflection` in the two versions that clients speak.
pub(crate) fn services(app: &App) -> Router<App> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
    };
    let mut router = Router::new();
    // They fail only over descriptors that are broken, which a test would see.
    if let (Ok(v1), Ok(v1alpha)) = (reflection().build_v1(), reflection().build_v1alpha()) {
        router = router
            .route_service("/grpc.reflection.v1.ServerReflection/{method}", v1.max_decoding_message_size(MAX_MESSAGE))
            .route_service(
                "/grpc.reflection.v1alpha.ServerReflection/{method}",
                v1alpha.max_decoding_message_size(MAX_MESSAGE),
            );
    }
    router.route_layer(from_fn_with_state(app.clone(), bounded)).route("/grpc.health.v1.Health/{method}", post(health))
}

/// Ends a stream of requests when a single one would have to be complete.
async fn bounded(State(app): State<App>, request: Request, next: Next) -> Result<Response, Problem> {
    must_be_grpc(request.headers())?;
    let deadline = infer::deadline(&app, request.headers());
    let request =
        request.map(|body| Body::from_stream(body.into_data_stream().take_until(Box::pin(sleep_until(deadline)))));
    Ok(next.run(request).await)
}

async fn health(State(app): State<App>, Path(method): Path<String>, request: Request) -> Result<Response, Problem> {
    if !["Check", "Watch"].contains(&method.as_str()) {
        return Err(no_such_method(&method));
    }
    must_be_grpc(request.headers())?;
    if method == "Watch" && request.version() != Version::HTTP_2 {
        // Over HTTP/1 nobody would notice that the client has gone.
        return Err(Problem::new(Code::BadRequest, "a watch needs HTTP/2: use Check over HTTP/1"));
    }
    let deadline = infer::deadline(&app, request.headers());
    let service = HealthServer::new(Probe { app: app.clone() }).max_decoding_message_size(MAX_MESSAGE);
    // Of a watch, too, this is the time until it begins.
    match timeout_at(deadline, service.oneshot(request)).await {
        Ok(Ok(response)) => Ok(response.map(Body::new)),
        Ok(Err(never)) => match never {},
        Err(_) => Err(infer::late(&app)),
    }
}

/// What the server's state says of its health.
#[derive(Clone)]
struct Probe {
    app: App,
}

impl Probe {
    /// Nothing when there is no such service. While the server is not ready, no model is known not to be there.
    fn status(&self, service: &str) -> Option<ServingStatus> {
        let is_ready = self.app.ready().is_ok();
        let is_known = service.is_empty() || service == OWN || self.app.registry.get(service, None).is_some();
        match (is_ready, is_known) {
            (true, true) => Some(ServingStatus::Serving),
            (true, false) => None,
            (false, _) => Some(ServingStatus::NotServing),
        }
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for Probe {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        // Without the names that there are: a key is needed to learn them.
        let unknown = || Status::not_found(format!("no model is named {}", super::quoted(service)));
        self.status(service).map(|status| tonic::Response::new(answer(status))).ok_or_else(unknown)
    }

    async fn watch(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, Status> {
        let Ok(place) = WATCHES.try_acquire() else {
            let detail = format!("{MAX_WATCHES} watches are open, and this server has no more: use Check");
            return Err(Status::resource_exhausted(detail));
        };
        let mut tick = interval(WATCH_PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let service = request.into_inner().service;
        let watch = Watch { probe: self.clone(), service, tick, told: None, _place: place };
        let told = |mut watch: Watch| async move { watch.change().await.map(|status| (Ok(answer(status)), watch)) };
        Ok(tonic::Response::new(Box::pin(stream::unfold(watch, told))))
    }
}

/// A client that is told of every change.
struct Watch {
    probe: Probe,
    service: String,
    tick: Interval,
    /// What it was told last.
    told: Option<ServingStatus>,
    _place: SemaphorePermit<'static>,
}

impl Watch {
    /// The state, once it is another than was told. Nothing when the server is shutting down and that was told.
    async fn change(&mut self) -> Option<ServingStatus> {
        loop {
            let now = self.probe.status(&self.service).unwrap_or(ServingStatus::ServiceUnknown);
            if self.told != Some(now) {
                self.told = Some(now);
                return Some(now);
            }
            if self.probe.app.is_draining() {
                return None;
            }
            self.tick.tick().await;
        }
    }
}
