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

use crate::classify::ClassifyError;
use crate::engine::Refused;
use crate::pixels::DecodeError;

/// Header that names a request in answers and logs.
const REQUEST_ID: &str = "x-request-id";

/// An error, as RFC 9457 describes it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Problem {
    /// Always `about:blank`: `code` tells the kinds apart.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// The status in words.
    pub(crate) title: String,
    /// The HTTP status.
    pub(crate) status: u16,
    /// One sentence: the thing, the value, the limit, the way out.
    pub(crate) detail: String,
    /// Path of the request.
    pub(crate) instance: String,
    /// The kind of error, stable across releases.
    pub(crate) code: &'static str,
    /// The id in the server's log, also in the header `x-request-id`.
    pub(crate) request_id: String,
    /// The limit that was exceeded, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) limit: Option<u64>,
    #[serde(skip)]
    pub(crate) retry_after: Option<Duration>,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank",
            title: status.canonical_reason().unwrap_or("Error").into(),
            status: status.as_u16(),
            detail: detail.into(),
            instance: String::new(),
            code,
            request_id: String::new(),
            limit: None,
            retry_after: None,
        }
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
        let mut response =
            StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR).into_response();
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
    let problem = Problem { instance, request_id, ..problem };
    if let Some(wait) = problem.retry_after {
        parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs_f64().ceil() as u64));
    }
    tracing::debug!(
        status = problem.status,
        code = problem.code,
        detail = problem.detail,
        id = problem.request_id,
        "refused"
    );
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    Response::from_parts(parts, Body::from(serde_json::to_vec(&problem).unwrap_or_default()))
}

fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// 64 random bits: the standard library's hasher keys are random per process and differ per call.
fn new_id() -> String {
    format!("{:016x}", RandomState::new().hash_one(std::time::Instant::now()))
}
