//! Encoded bytes → [`Prediction`] → scores: the one composition of pixels, network and calibration, used by the server,
//! by batch scoring and by calibration alike.

mod apart;
mod classifier;
mod network;
mod prepare;
mod scorer;

use std::time::Duration;

use bytes::Bytes;

use crate::bundle::{self, Bundle, BundleError};
use crate::pixels::{DecodeError, TensorLength};
use crate::runtime::{CannotUse, NetworkFile, NetworkSource, RuntimeError};
use crate::scores::{Logits, LogitsError};

use network::Ran;

pub use apart::{Executed, Executor, Preparer, Ready};
pub use classifier::{Classifier, on_device};
pub use network::Network;
pub use prepare::{Prepare, StageTimes};
pub use scorer::{Abstention, Decision, Scale, ScoreError, ScoreRequest, ScoreRule, Scored, Scorer, Seen};

/// One picture, as a caller sends it. Both kinds are shared, not copied.
#[derive(Debug, Clone)]
pub enum Input {
    /// An encoded picture.
    Encoded(Bytes),
    /// The network's own input, of the manifest's shape: normalised, row-major, f32 in little-endian bytes.
    Pixels(Bytes),
}

/// The answer for one picture.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// The network's own output.
    pub logits: Logits,
    /// What its classifier saw, where it was exported with that.
    pub features: Option<Vec<f32>>,
    /// What the picture looks like, where the classifier was asked for that.
    pub look: Option<Vec<f32>>,
    /// Where the time went.
    pub timings: Timings,
}

/// Time by stage, for one picture.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Waiting for a worker.
    pub queue: Duration,
    /// Decoding.
    pub decode: Duration,
    /// Resizing, cropping and normalising.
    pub preprocess: Duration,
    /// The network, for the whole batch that the picture was in.
    pub infer: Duration,
    /// Pictures in that batch.
    pub batch: usize,
    /// Whether this picture stands for its batch where batches are counted.
    pub leads_batch: bool,
}

/// Why a picture got no prediction.
#[derive(Debug, thiserror::Error)]
pub enum ClassifyError {
    /// The picture's own fault.
    #[error(transparent)]
    Image(#[from] DecodeError),
    /// A tensor of another size than the network's input.
    #[error(transparent)]
    Tensor(#[from] TensorLength),
    /// The runtime's fault.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The network's file is not the bundle's.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The network gave no usable logits.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// The network gave another number of rows than pictures.
    #[error("the network gave {found} rows for {pictures} pictures")]
    Rows {
        /// Rows given.
        found: usize,
        /// Pictures put in.
        pictures: usize,
    },
    /// The worker's code panicked on this picture.
    #[error("the worker panicked: {0}")]
    Panic(String),
    /// The deadline passed before the picture's turn came, or while it was decoded.
    #[error("the deadline passed before the image was classified")]
    Deadline,
}

/// What a run gave for a picture that had waited for `queue`, with what it had cost before.
fn predict(ran: Ran, times: StageTimes, queue: Duration) -> Result<Prediction, ClassifyError> {
    let (logits, features, look) = ran.answer?;
    let timings = Timings {
        queue,
        decode: times.decode,
        preprocess: times.preprocess,
        infer: ran.infer,
        batch: ran.batch,
        leads_batch: ran.leads,
    };
    Ok(Prediction { logits, features, look, timings })
}

impl ClassifyError {
    /// Whether no device is left that could run the network.
    pub fn is_lost_device(&self) -> bool {
        matches!(self, Self::Runtime(RuntimeError::Lost { .. }))
    }
}

impl CannotUse for ClassifyError {
    fn cannot_use(&self) -> Option<&str> {
        match self {
            Self::Runtime(error) => error.cannot_use(),
            _ => None,
        }
    }
}

/// The file behind `bundle`'s network.
pub fn network_file(bundle: &Bundle) -> NetworkFile {
    let bundle::Network { path, sha256, .. } = &bundle.network;
    NetworkFile { path: path.clone(), sha256: sha256.clone(), data: bundle.network.data_files() }
}

/// The network, its files checked.
fn source(bundle: &Bundle) -> Result<NetworkSource<'_>, BundleError> {
    let folder = (!bundle.manifest.model_data.is_empty()).then_some(bundle.folder.as_path());
    Ok(NetworkSource { graph: bundle.network.bytes()?, folder })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
