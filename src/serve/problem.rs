//! What goes wrong, in one form; [`super::envelope`] puts it on the wire as the protocol wants it.

use std::any::Any;
use std::fmt;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::code::Code;
use super::cut;
use crate::classify::{ClassifyError, ScoreError};
use crate::engine::Refused;
use crate::pixels::DecodeError;
use crate::registry::RegistryError;

/// An error on its way to [`super::envelope`], which knows the rest.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) code: Code,
    pub(crate) detail: Detail,
    pub(crate) limit: Option<u64>,
    pub(crate) retry_after: Option<Duration>,
}

/// Bytes of an error's sentence.
const MAX_DETAIL: usize = 1000;

/// An error's sentence: the thing, the value, the limit, the way out. It is at most about [`MAX_DETAIL`] bytes long,
/// whatever it was made from; of a longer one the middle is left out.
#[derive(Debug, Clone)]
pub(crate) struct Detail(String);

impl Detail {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(cut::middle(text.into(), MAX_DETAIL))
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Detail> for String {
    fn from(detail: Detail) -> Self {
        detail.0
    }
}

/// An error, as RFC 9457 describes it.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = Problem))]
pub(crate) struct ProblemBody {
    /// Always `about:blank`; `code` tells the kinds of errors apart.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// The status in words.
    pub(crate) title: &'static str,
    /// The HTTP status.
    pub(crate) status: u16,
    /// One sentence: what is wrong, the value, the limit, and what to do.
    pub(crate) detail: String,
    /// Path of the request; only its beginning if it is long.
    pub(crate) instance: String,
    /// The kind of error, stable across releases.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub(crate) code: Code,
    /// The id in the server's log, also in the header `x-request-id`.
    pub(crate) request_id: String,
    /// The limit that was exceeded, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) limit: Option<u64>,
}

impl Problem {
    pub(crate) fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: Detail::new(detail), limit: None, retry_after: None }
    }

    /// The request needs what this build leaves out.
    #[cfg(any(not(feature = "grpc"), not(feature = "swagger-ui")))]
    pub(crate) fn missing(missing: &crate::features::Missing) -> Self {
        Self::new(Code::FeatureMissing, missing.to_string())
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.code.status()
    }

    pub(crate) fn with_limit(mut self, limit: u64) -> Self {
        self.limit = Some(limit);
        self
    }

    pub(crate) fn retry_in(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

impl From<&ClassifyError> for Problem {
    fn from(error: &ClassifyError) -> Self {
        if let ClassifyError::Deadline = error {
            return Self::new(Code::Deadline, "the deadline passed while the image waited");
        }
        if error.is_lost_device() {
            return no_device();
        }
        if let ClassifyError::Tensor { .. } = error {
            return Self::new(Code::BadTensor, error.to_string());
        }
        let ClassifyError::Image(image) = error else {
            // The client gets a sentence, the log the chain.
            tracing::error!(%error, "classification failed");
            let detail = "the server failed on this image; its log has the reason under the request id";
            return Self::new(Code::Internal, detail);
        };
        let problem = Self::new(Code::Image(image.code()), image.to_string());
        match image {
            DecodeError::TooManyPixels { limit, .. } | DecodeError::TooManyBytes { limit, .. } => {
                problem.with_limit(*limit)
            }
            DecodeError::TooManyScans { limit, .. } => problem.with_limit(*limit as u64),
            DecodeError::Empty
            | DecodeError::UnknownFormat
            | DecodeError::Foreign { .. }
            | DecodeError::NoPixels { .. }
            | DecodeError::Unsupported { .. }
            | DecodeError::Stopped
            | DecodeError::TooMuchMemory
            | DecodeError::Damaged { .. } => problem,
        }
    }
}

impl From<ScoreError> for Problem {
    fn from(error: ScoreError) -> Self {
        Self::new(Code::BadOption, cut::sentence(&error.to_string()))
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full { retry_after } => {
                let detail = "the queue of waiting images is full: try again after the time in Retry-After";
                let problem = Self::new(Code::QueueFull, detail);
                Self { retry_after: Some(retry_after), ..problem }
            }
            Refused::TooSlow { retry_after } => {
                let detail = "the images already waiting will take longer than this request may: try again after the \
                              time in Retry-After, or allow more time";
                let problem = Self::new(Code::TooLate, detail);
                Self { retry_after: Some(retry_after), ..problem }
            }
            Refused::TooMany { capacity, .. } => {
                let detail = format!("{refused}: send fewer at a time, or raise --queue");
                Self::new(Code::TooManyImages, detail).with_limit(capacity as u64)
            }
            Refused::Late => Self::new(Code::Deadline, refused.to_string()),
            Refused::Closed => draining(),
            Refused::NoDevice => no_device(),
        }
    }
}

impl From<&RegistryError> for Problem {
    fn from(error: &RegistryError) -> Self {
        match error {
            RegistryError::Closing => draining(),
            RegistryError::NoModel(_) | RegistryError::NotLoaded(_) => {
                Self::new(Code::NoSuchModel, cut::sentence(&error.to_string()))
            }
            // The reason stands in the index, which whoever may control the repository may read, and in the log.
            _ => Self::new(Code::LoadFailed, "the model cannot be loaded; /v2/repository/index says why"),
        }
    }
}

pub(crate) fn loading() -> Problem {
    let detail = "the server is still opening its models: try again";
    Problem::new(Code::Loading, detail).retry_in(Duration::from_secs(1))
}

/// Every device of a model has failed, and the process ends.
fn no_device() -> Problem {
    let detail = "the server has lost the device that ran the network, and ends: try again once it was started anew";
    let problem = Problem::new(Code::NoDevice, detail);
    Problem { retry_after: Some(Duration::from_secs(5)), ..problem }
}

pub(crate) fn draining() -> Problem {
    let problem = Problem::new(Code::Draining, "the server is shutting down");
    Problem { retry_after: Some(Duration::from_secs(5)), ..problem }
}

/// Work for a request panicked, or was dropped without one.
pub(crate) fn panicked(panic: Option<Box<dyn Any + Send + 'static>>) -> Problem {
    let panic = panic.as_ref();
    let text = panic.and_then(|panic| {
        panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
    });
    tracing::error!(panic = text.unwrap_or("no message"), "a handler panicked");
    Problem::new(Code::Internal, "the server failed; its log has the reason")
}

/// Carries the problem to [`super::envelope`], which knows the request.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}
