//! Labelled image sets, as benchmarks and users have them, and a bundle's logits of them.
//!
//! A set is class folders, a list file, a table, CIFAR's binary form, IDX, or (in [`LabelledLogits`]) a file of logits and labels.

mod groups;
mod logits;
mod records;
mod source;
mod table;
mod training;

pub use groups::{GroupBy, hold_out_groups};
pub use logits::{
    Answers, Checked, LabelledLogits, PixelHash, answers_of, check_pictures, each_answer, in_turn, in_turn_by,
    pixel_hashes,
};
pub use records::{Purpose, Records};
pub use source::{Form, LabelledImages};
pub use training::{Split, TrainingSet, hold_out, long_tail};

use std::path::PathBuf;

/// Why a set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder could not be read.
    #[error("{path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The content is not of the expected form.
    #[error("{path}: {reason}")]
    Content {
        /// The file or folder.
        path: PathBuf,
        /// What does not fit, and the way out.
        reason: String,
    },
    /// Some images cannot be decoded.
    #[error("{failed} of {total} images cannot be read: repair or remove them\n{examples}")]
    Images {
        /// How many.
        failed: usize,
        /// Out of how many.
        total: usize,
        /// The first ones, with their reasons.
        examples: String,
    },
    /// The bundle's network cannot be run.
    #[error(transparent)]
    Network(#[from] crate::classify::ClassifyError),
}
