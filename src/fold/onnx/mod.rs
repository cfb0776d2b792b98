//! Networks as ONNX files: the one form in which checkpoints and exported networks are folded.
//!
//! [`wire`] reads and writes protobuf and keeps what it does not know; [`proto`] are ONNX's messages; [`Network`] is a
//! file with its weights, wherever they lie. [`inline`] and [`evaluate`] bring a file into a form in which layers can be
//! told; `passes` change it.

pub(crate) mod evaluate;
mod external;
pub(crate) mod inline;
mod lower;
mod network;
pub mod passes;
pub(crate) mod proto;
pub(crate) mod value;
pub(crate) mod wire;

use std::path::PathBuf;

pub use external::DataFile;
pub use lower::lower;
pub use network::Network;
pub(crate) use network::Uses;
pub use wire::WireError;

/// Added to the norm of a direction (arXiv 2501.03122, the authors' code).
pub const NORM_EPSILON: f64 = 1e-6;

/// Why an ONNX file cannot be folded.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// The file is damaged, or no ONNX.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A file that cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It is a network that cannot be folded; the sentence says why, and what to do.
    #[error("{0}")]
    Refused(String),
}

impl OnnxError {
    pub(crate) fn refused<T>(reason: impl Into<String>) -> Result<T, Self> {
        Err(Self::Refused(reason.into()))
    }
}
