//! What every request gets, whatever its protocol: an id, a place in the caller's trace, an entry in the metrics, and an error
//! in the form that its protocol wants, the router's own rejections included.

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Instrument;

use super::App;
use super::code::Code;
use super::coding;
use super::cut;
use super::notes::Notes;
use super::problem::{Problem, ProblemBody, panicked};
use crate::telemetry::{Ids, UNTRACED, join};

/// Header that names a request in answers and logs.
pub(super) const REQUEST_ID: &str = "x-request-id";
const TRACEPARENT: &str = "traceparent";
const SERVER_TIMING: &str = "server-timing";
/// Bytes of a path in the log and in errors.
const MAX_PATH: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Native,
    V2,
    Grpc,
}

impl Protocol {
    fn of(request: &Request) -> Self {
        let path = request.uri().path();
        if super::v2::is_grpc(request.headers()) {
            Self::Grpc
        } else if path == "/v2" || path.starts_with("/v2/") {
            Self::V2
        } else {
            Self::Native
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::V2 => "v2",
            Self::Grpc => "grpc",
        }
    }
}

/// Ends a request's share of the gauge, also when its future is dropped.
struct InFlight(App);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.telemetry.in_flight.dec();
    }
}

/// The outermost layer.
pub(crate) async fn envelope(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    app.telemetry.in_flight.inc();
    let _in_flight = InFlight(app.clone());
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok());
    let id = given.filter(|v| is_id(v)).map_or_else(random_hex, str::to_owned);
    let protocol = Protocol::of(&request);
    let instance = cut::head(request.uri().path(), MAX_PATH).into_owned();
    // A client may make methods up.
    let method = cut::shown(request.method());
    let parent = parent(request.headers());
    macro_rules! span {
        ($target:expr) => {
            tracing::info_span!(
                target: $target,
                "request",
                id,
                method,
                path = instance,
                trace_id = tracing::field::Empty,
                key = tracing::field::Empty,
                otel.kind = "server",
                otel.status_code = tracing::field::Empty,
                http.response.status_code = tracing::field::Empty
            )
        };
    }
    let span = if is_probe(request.uri().path()) { span!(UNTRACED) } else { span!(module_path!()) };
    let exported = join(&span, parent.as_ref());
    let is_exported = exported.is_some();
    // What is exported, else the caller's, else a fresh one; of those that nobody records, the flag says so.
    let Ids { trace, span: span_id, sampled } = exported.unwrap_or_else(|| match parent {
        Some(parent) => Ids { span: random_hex(), ..parent },
        None => Ids { trace: format!("{}{}", random_hex(), random_hex()), span: random_hex(), sampled: false },
    });
    span.record("trace_id", &trace);
    let notes = Notes::default();
    request.extensions_mut().insert(notes.clone());
    let response = if request.version() == Version::HTTP_11 && !request.headers().contains_key(header::HOST) {
        // RFC 9112, section 3.2.
        Problem::new(Code::BadRequest, "a request of HTTP/1.1 has the header `host`: send it").into_response()
    } else {
        next.run(request).instrument(span.clone()).await
    };
    let status = response.status();
    let mut response = if let Some(problem) = problem_of(&response) {
        app.telemetry.rejected_by(&problem);
        span.in_scope(|| tracing::debug!(%status, code = problem.code.word(), detail = %problem.detail, "refused"));
        render(response, problem, protocol, instance, id.clone())
    } else {
        response
    };
    if is_exported {
        // The log's lines would have all of the span's fields written anew, and have the code already.
        span.record("http.response.status_code", i64::from(response.status().as_u16()));
        if response.status().is_server_error() || is_grpc_failure(&response, protocol) {
            span.record("otel.status_code", "ERROR");
        }
    }
    let took = began.elapsed();
    let code = code(&response, protocol);
    app.telemetry.request(protocol.name(), &notes.model_name(), code, took);
    if app.access_log {
        let ms = took.as_secs_f64() * 1e3;
        span.in_scope(|| tracing::info!(code, ms, model = notes.model_name(), "{method}"));
    }
    let headers = response.headers_mut();
    let traceparent = format!("00-{trace}-{span_id}-{:02x}", u8::from(sampled));
    for (name, value) in [(REQUEST_ID, id), (TRACEPARENT, traceparent)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    if let Some(value) = notes.server_timing() {
        headers.insert(SERVER_TIMING, value);
    }
    response
}

/// Whether the path is one that monitoring asks for all the time.
fn is_probe(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz" | "/metrics" | "/v2/health/live" | "/v2/health/ready")
        || path.starts_with("/grpc.health.v1.Health/")
}

/// Whether a gRPC call failed on the server's side: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE or
/// DATA_LOSS, as OpenTelemetry's conventions have it.
fn is_grpc_failure(response: &Response, protocol: Protocol) -> bool {
    protocol == Protocol::Grpc && [2, 4, 12, 13, 14, 15].contains(&code(response, protocol))
}

/// The HTTP status, or for gRPC its own.
fn code(response: &Response, protocol: Protocol) -> u16 {
    let grpc = || response.headers().get("grpc-status").and_then(|v| v.to_str().ok()?.parse().ok());
    match protocol {
        // A trailer says it when all went well.
        Protocol::Grpc => grpc().unwrap_or(0),
        _ => response.status().as_u16(),
    }
}

fn problem_of(response: &Response) -> Option<Problem> {
    let status = response.status();
    if let Some(problem) = response.extensions().get::<Problem>() {
        return Some(problem.clone());
    }
    (status.is_client_error() || status.is_server_error()).then(|| {
        let detail = status.canonical_reason().unwrap_or("the request was refused");
        Problem::new(Code::Rejected(status), detail)
    })
}

fn render(response: Response, problem: Problem, protocol: Protocol, instance: String, request_id: String) -> Response {
    let (mut parts, _) = response.into_parts();
    let wait = problem.retry_after.map(|wait| HeaderValue::from(wait.as_secs_f64().ceil() as u64));
    if protocol == Protocol::Grpc {
        let mut response = super::v2::refusal(&problem);
        if let Some(wait) = wait {
            response.headers_mut().insert(header::RETRY_AFTER, wait);
        }
        return response;
    }
    if let Some(wait) = wait {
        parts.headers.insert(header::RETRY_AFTER, wait);
    }
    if problem.code == Code::ContentEncoding {
        parts.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(coding::ACCEPTED));
    }
    if problem.status() == StatusCode::UNAUTHORIZED {
        parts.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    let Problem { code, detail, limit, .. } = problem;
    let status = code.status();
    parts.headers.remove(header::CONTENT_LENGTH);
    let (content_type, body) = if protocol == Protocol::V2 {
        ("application/json", serde_json::to_vec(&super::v2::ErrorBody { error: detail.into() }))
    } else {
        let title = status.canonical_reason().unwrap_or("Error");
        let status = status.as_u16();
        let detail = detail.into();
        let body = ProblemBody { kind: "about:blank", title, status, detail, instance, code, request_id, limit };
        ("application/problem+json", serde_json::to_vec(&body))
    };
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Response::from_parts(parts, Body::from(body.unwrap_or_default()))
}

/// For a layer outside of the router's handlers.
pub(crate) fn from_panic(panic: Box<dyn Any + Send + 'static>) -> Response {
    panicked(Some(panic)).into_response()
}

/// The caller's span, by the W3C's Trace Context: `00-<32 hex>-<16 hex>-<2 hex>`; nothing when it is not of that form.
fn parent(headers: &HeaderMap) -> Option<Ids> {
    let text = headers.get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, n| text.len() == n && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let zero = |text: &str| text.bytes().all(|b| b == b'0');
    let later = version != "00";
    if !hex(version, 2) || version == "ff" || !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
        return None;
    }
    if zero(trace) || zero(span) || (parts.next().is_some() && !later) {
        return None;
    }
    let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
    Some(Ids { trace: trace.into(), span: span.into(), sampled })
}

fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// 64 random bits: the standard library's hasher keys are random per process and differ per call.
pub(super) fn random_hex() -> String {
    format!("{:016x}", RandomState::new().hash_one(Instant::now()))
}
