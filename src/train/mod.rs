//! Trains networks with a normalised BatchNorm: `nbn fold train`. burn is the engine, and the network is the graph that
//! [`crate::fold`] reads off a checkpoint, so what is trained is what is folded.

pub mod arch;
pub mod augment;
pub mod blueprint;
pub mod evaluation;
pub mod kernels;
pub mod loader;
pub mod network;
pub mod objective;
pub mod optimizer;
pub mod recipe;
mod resume;
pub mod run;
pub mod state;

use std::path::PathBuf;

/// Why a run cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A flag's value is out of range.
    #[error("{flag} is {value}; it must be {limit}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        limit: String,
    },
    /// An input does not fit.
    #[error("{0}")]
    Input(String),
    /// A training image cannot be read.
    #[error("{name}: {reason}: repair it, or remove it from the set")]
    Image {
        /// Its path or record.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A run goes on with another recipe.
    #[error(
        "{path} was started with other settings: {differences}: give the same flags, or start again with --overwrite"
    )]
    OtherRecipe {
        /// The state file.
        path: PathBuf,
        /// The flags that differ, and how.
        differences: String,
    },
    /// The loss or its gradient is no number any more.
    #[error(
        "{what} is {value} at step {step} of epoch {epoch}: training diverged. Largest norms: {norms}. Try a lower --lr or \
         --weight-decay, --warm-up 5, or --clip 1{kept}"
    )]
    Diverged {
        /// What it is that is not finite.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Steps done in the epoch.
        step: usize,
        /// The epoch, from 1.
        epoch: usize,
        /// The largest parameters' norms.
        norms: String,
        /// What is still on disk.
        kept: String,
    },
    /// A file of the run could not be written or read.
    #[error("{path}: {cause}{kept}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
        /// What is still on disk.
        kept: String,
    },
    /// Two processes on one run.
    #[error("another process is training {checkpoint}: wait until it ends, or give another --out")]
    Busy {
        /// The run's checkpoint.
        checkpoint: PathBuf,
    },
    /// A checkpoint or a network does not fit.
    #[error(transparent)]
    Fold(#[from] crate::fold::FoldError),
    /// A set cannot be read.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
}
