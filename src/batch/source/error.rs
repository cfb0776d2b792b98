//! Why an input cannot be opened.

use std::io;
use std::path::PathBuf;

use crate::features::Missing;
use crate::pixels::ENDINGS;

/// An input that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Not there, or not readable.
    #[error("{path}: {cause}")]
    Io {
        /// The input.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A folder without a picture.
    #[error(
        "{}: the folder holds no file that ends in .{}{}", folder.display(), ENDINGS.join(", ."),
        if others.is_empty() { String::new() } else { format!("; it holds files {others}") }
    )]
    NoImages {
        /// The folder.
        folder: PathBuf,
        /// The endings that its files have, in words.
        others: String,
    },
    /// A URL that names no object store.
    #[error("{0}")]
    Url(String),
    /// A pattern that is none, or that nothing matches.
    #[error("the pattern {pattern}: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong.
        reason: String,
    },
    /// A kind of input that this build does not read.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// An option that none of the inputs can use.
    #[error("{option} needs {wanted}, but no input is one: leave it out")]
    Unused {
        /// The option.
        option: &'static str,
        /// What it is for.
        wanted: &'static str,
    },
    /// A list or table of another form.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
}
