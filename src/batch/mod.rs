//! Batch scoring: pictures in, one row per picture out, in order; what cannot be scored is a row with its error.
//!
//! A [`Source`] names the pictures, readers fetch them and hand them to the engine, and one thread writes the rows in the
//! source's order: [`run`]. Rows go to a stream, or to [`Parts`] that are committed one by one.

mod parts;
mod pipeline;
mod rows;
mod shard;
mod source;
mod summary;

pub use parts::{Parts, PartsError, RunRecord};
pub use pipeline::{BatchOptions, run};
pub use rows::{Columns, Form, Format, Origin, Output, Row, RowWriter, Scores, Scoring, WriteError};
pub use shard::{Shard, ShardError};
pub use source::{Labels, Source, SourceError, SourceOptions, Stopped, Stores};
pub use summary::Summary;
