//! The words that errors are told apart by.

use serde::{Serialize, Serializer};

use crate::pixels::DecodeError;

macro_rules! codes {
    ($($(#[$built:meta])* $name:ident = $word:literal,)*) => {
        /// What an error's `code` says. It steers what is counted and gRPC's status.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Code {
            $($(#[$built])* $name,)*
        }

        impl Code {
            /// As clients read it.
            pub(crate) fn word(self) -> &'static str {
                match self {
                    $($(#[$built])* Self::$name => $word,)*
                }
            }
        }
    };
}

codes! {
    BadBase64 = "bad_base64",
    BadJson = "bad_json",
    BadMultipart = "bad_multipart",
    BadOption = "bad_option",
    BadRequest = "bad_request",
    BadTensor = "bad_tensor",
    BodyBroken = "body_broken",
    BodyTooLarge = "body_too_large",
    ContentEncoding = "content_encoding",
    CrossSite = "cross_site",
    DamagedImage = "damaged_image",
    Deadline = "deadline",
    Draining = "draining",
    EmptyImage = "empty_image",
    #[cfg(any(not(feature = "grpc"), not(feature = "swagger-ui")))]
    FeatureMissing = "feature_missing",
    Internal = "internal",
    KeyConcurrency = "key_concurrency",
    KeyMissing = "key_missing",
    KeyUnknown = "key_unknown",
    LoadFailed = "load_failed",
    Loading = "loading",
    LongId = "long_id",
    MediaType = "media_type",
    Memory = "memory",
    MethodNotAllowed = "method_not_allowed",
    NoDefaultModel = "no_default_model",
    NoImages = "no_images",
    NoPixels = "no_pixels",
    #[cfg(feature = "grpc")]
    NoSuchMethod = "no_such_method",
    NoSuchModel = "no_such_model",
    NoSuchVersion = "no_such_version",
    NotAdmin = "not_admin",
    NotFound = "not_found",
    Overflow = "overflow",
    QueueFull = "queue_full",
    Rejected = "rejected",
    SlowBody = "slow_body",
    Stopped = "stopped",
    TooLate = "too_late",
    TooManyBytes = "too_many_bytes",
    TooManyImages = "too_many_images",
    TooManyPixels = "too_many_pixels",
    TooManyScans = "too_many_scans",
    UnknownFormat = "unknown_format",
    UnsupportedImage = "unsupported_image",
}

impl Code {
    /// Why an image could not be decoded.
    pub(crate) fn of_image(error: &DecodeError) -> Self {
        match error {
            DecodeError::Empty => Self::EmptyImage,
            DecodeError::UnknownFormat => Self::UnknownFormat,
            DecodeError::NoPixels { .. } => Self::NoPixels,
            DecodeError::TooManyScans { .. } => Self::TooManyScans,
            DecodeError::Unsupported { .. } => Self::UnsupportedImage,
            DecodeError::Stopped => Self::Stopped,
            DecodeError::TooManyPixels { .. } => Self::TooManyPixels,
            DecodeError::TooManyBytes { .. } | DecodeError::TooMuchMemory => Self::TooManyBytes,
            DecodeError::Damaged { .. } => Self::DamagedImage,
        }
    }

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
