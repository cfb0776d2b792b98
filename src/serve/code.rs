//! The words that errors are told apart by.

use serde::{Serialize, Serializer};

macro_rules! codes {
    ($($(#[$built:meta])* $name:ident = $word:literal,)*) => {
        /// What an error's `code` says. It steers what is counted and gRPC's status.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Code {
            $($(#[$built])* $name,)*
            /// Why an image cannot be decoded, by `DecodeError`'s own word.
            Image(&'static str),
        }

        impl Code {
            /// As clients read it.
            pub(crate) fn word(self) -> &'static str {
                match self {
                    $($(#[$built])* Self::$name => $word,)*
                    Self::Image(word) => word,
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
    Deadline = "deadline",
    Draining = "draining",
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
    TooLate = "too_late",
    TooManyImages = "too_many_images",
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
