//! The words that errors are told apart by, and the HTTP status of each.

use axum::http::StatusCode;
use serde::{Serialize, Serializer};

use crate::pixels::DecodeError;

/// The word for an image of no bytes, which is a mistake of the request rather than of the image.
const EMPTY_IMAGE: &str = DecodeError::Empty.code();

macro_rules! codes {
    ($($(#[$built:meta])* $name:ident = $status:ident $word:literal,)*) => {
        /// What an error's `code` says. Its HTTP status, gRPC's, and what is counted follow from it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Code {
            $($(#[$built])* $name,)*
            /// Why an image cannot be decoded, by `DecodeError`'s own word.
            Image(&'static str),
            /// What the router refuses by itself.
            Rejected(StatusCode),
        }

        impl Code {
            /// As clients read it.
            pub(crate) fn word(self) -> &'static str {
                match self {
                    $($(#[$built])* Self::$name => $word,)*
                    Self::Image(word) => word,
                    Self::Rejected(_) => "rejected",
                }
            }

            pub(crate) fn status(self) -> StatusCode {
                match self {
                    $($(#[$built])* Self::$name => StatusCode::$status,)*
                    Self::Image(EMPTY_IMAGE) => StatusCode::BAD_REQUEST,
                    Self::Image(_) => StatusCode::UNPROCESSABLE_ENTITY,
                    Self::Rejected(status) => status,
                }
            }
        }
    };
}

codes! {
    BadBase64 = BAD_REQUEST "bad_base64",
    BadJson = BAD_REQUEST "bad_json",
    BadMultipart = BAD_REQUEST "bad_multipart",
    BadOption = BAD_REQUEST "bad_option",
    BadRequest = BAD_REQUEST "bad_request",
    BadTensor = BAD_REQUEST "bad_tensor",
    BodyBroken = BAD_REQUEST "body_broken",
    BodyTooLarge = PAYLOAD_TOO_LARGE "body_too_large",
    ContentEncoding = UNSUPPORTED_MEDIA_TYPE "content_encoding",
    CrossSite = FORBIDDEN "cross_site",
    Deadline = GATEWAY_TIMEOUT "deadline",
    Draining = SERVICE_UNAVAILABLE "draining",
    #[cfg(any(not(feature = "grpc"), not(feature = "swagger-ui")))]
    FeatureMissing = NOT_IMPLEMENTED "feature_missing",
    Internal = INTERNAL_SERVER_ERROR "internal",
    KeyConcurrency = TOO_MANY_REQUESTS "key_concurrency",
    KeyMissing = UNAUTHORIZED "key_missing",
    KeyUnknown = UNAUTHORIZED "key_unknown",
    LoadFailed = BAD_REQUEST "load_failed",
    Loading = SERVICE_UNAVAILABLE "loading",
    LongId = BAD_REQUEST "long_id",
    MediaType = UNSUPPORTED_MEDIA_TYPE "media_type",
    Memory = SERVICE_UNAVAILABLE "memory",
    MethodNotAllowed = METHOD_NOT_ALLOWED "method_not_allowed",
    NoDefaultModel = NOT_FOUND "no_default_model",
    NoDevice = SERVICE_UNAVAILABLE "no_device",
    NoImages = BAD_REQUEST "no_images",
    #[cfg(feature = "grpc")]
    NoSuchMethod = NOT_FOUND "no_such_method",
    NoSuchModel = NOT_FOUND "no_such_model",
    NoSuchVersion = NOT_FOUND "no_such_version",
    NotAdmin = FORBIDDEN "not_admin",
    NotFound = NOT_FOUND "not_found",
    Overflow = UNPROCESSABLE_ENTITY "overflow",
    QueueFull = SERVICE_UNAVAILABLE "queue_full",
    SlowBody = REQUEST_TIMEOUT "slow_body",
    TooLate = SERVICE_UNAVAILABLE "too_late",
    TooManyImages = PAYLOAD_TOO_LARGE "too_many_images",
}

impl Code {
    /// The reason under which the metrics count a refusal that says something of load, limits or keys; none for a client's
    /// mistakes, which the requests' statuses count.
    pub(crate) fn counted(self) -> Option<&'static str> {
        match self {
            Self::KeyMissing | Self::KeyUnknown | Self::NotAdmin => Some("key"),
            Self::BodyTooLarge
            | Self::CrossSite
            | Self::Deadline
            | Self::Draining
            | Self::KeyConcurrency
            | Self::Loading
            | Self::Memory
            | Self::NoDevice
            | Self::QueueFull
            | Self::SlowBody
            | Self::TooLate
            | Self::TooManyImages => Some(self.word()),
            _ => None,
        }
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}
