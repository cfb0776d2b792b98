//! Errors on the wire: RFC 9457 `application/problem+json`, one conversion for everything that goes wrong.

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::classify::{ClassifyError, ScoreError};
use crate::engine::Refused;
use crate::pixels::DecodeError;

/// Header that names a request in answers and logs.
const REQUEST_ID: &str = "x-request-id";

/// An error on its way to [`envelope`], which knows the rest.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) detail: String,
    limit: Option<u64>,
    retry_after: Option<Duration>,
}

/// An error, as RFC 9457 describes it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct ProblemBody {
    /// Always `about:blank`: `code` tells the kinds apart.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The status in words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// One sentence: the thing, the value, the limit, the way out.
    detail: String,
    /// Path of the request.
    instance: String,
    /// The kind of error, stable across releases.
    code: &'static str,
    /// The id in the server's log, also in the header `x-request-id`.
    request_id: String,
    /// The limit that was exceeded, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), limit: None, retry_after: None }
    }

    pub(crate) fn bad_request(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }

    pub(crate) fn with_limit(mut self, limit: u64) -> Self {
        self.limit = Some(limit);
        self
    }
}

impl From<&ClassifyError> for Problem {
    fn from(error: &ClassifyError) -> Self {
        let ClassifyError::Image(image) = error else {
            // The client gets a sentence, the log the chain.
            tracing::error!(%error, "classification failed");
            let detail = "the server failed on this image; its log has the reason under the request id";
            return Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail);
        };
        let of = |code| Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, image.to_string());
        match image {
            DecodeError::Empty => Self::bad_request("empty_image", image.to_string()),
            DecodeError::UnknownFormat => of("unknown_format"),
            DecodeError::TooManyPixels { limit, .. } => of("too_many_pixels").with_limit(*limit),
            DecodeError::TooManyBytes { limit, .. } => of("too_many_bytes").with_limit(*limit),
            DecodeError::Damaged { .. } => of("damaged_image"),
        }
    }
}

impl From<ScoreError> for Problem {
    fn from(error: ScoreError) -> Self {
        Self::bad_request("bad_option", error.to_string())
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full { retry_after } => {
                let detail = "the queue of waiting images is full: try again after the time in Retry-After";
                let problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, "queue_full", detail);
                Self { retry_after: Some(retry_after), ..problem }
            }
            Refused::TooMany { capacity, .. } => {
                let detail = format!("{refused}: send fewer at a time, or raise --queue");
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_many_images", detail).with_limit(capacity as u64)
            }
            Refused::Closed => draining(),
        }
    }
}

pub(crate) fn draining() -> Problem {
    let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "draining", "the server is shutting down");
    Problem { retry_after: Some(Duration::from_secs(5)), ..problem }
}

/// Carries the problem to [`envelope`], which knows the request.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

pub(crate) fn from_panic(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = text.unwrap_or("no message"), "a handler panicked");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the server failed; its log has the reason")
        .into_response()
}

/// Gives every request an id, and every error the problem form, the router's own rejections included.
pub(crate) async fn envelope(request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok());
    let id = given.filter(|v| is_id(v)).map_or_else(new_id, str::to_owned);
    let instance = request.uri().path().to_owned();
    let span = tracing::info_span!("request", id, method = %request.method(), path = instance);
    let response = tracing::Instrument::instrument(next.run(request), span).await;
    let mut response = if response.status().is_client_error() || response.status().is_server_error() {
        render(response, instance, id.clone())
    } else {
        response
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn render(response: Response, instance: String, request_id: String) -> Response {
    let (mut parts, _) = response.into_parts();
    let problem = parts.extensions.remove::<Problem>().unwrap_or_else(|| {
        let detail = parts.status.canonical_reason().unwrap_or("the request was refused");
        Problem::new(parts.status, "rejected", detail)
    });
    if let Some(wait) = problem.retry_after {
        parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs_f64().ceil() as u64));
    }
    let Problem { status, code, detail, limit, .. } = problem;
    tracing::debug!(%status, code, detail, request_id, "refused");
    let title = status.canonical_reason().unwrap_or("Error");
    let status = status.as_u16();
    let body = ProblemBody { kind: "about:blank", title, status, detail, instance, code, request_id, limit };
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    Response::from_parts(parts, Body::from(serde_json::to_vec(&body).unwrap_or_default()))
}

fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// 64 random bits: the standard library's hasher keys are random per process and differ per call.
fn new_id() -> String {
    format!("{:016x}", RandomState::new().hash_one(std::time::Instant::now()))
}
