//! Batch scoring: files in, one row per image out, in order; a bad file is a row with its error.

mod sink;
mod source;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;

use crate::classify::{ClassifyError, Input};
use crate::engine::{Engine, Ticket};
use crate::pixels::DecodeError;

pub use sink::{Format, Scoring, Sink};
pub use source::{SourceError, expand, from_list};

/// How many images were scored, and how many could not be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Rows with predictions.
    pub scored: u64,
    /// Rows with an error.
    pub failed: u64,
}

/// A file on its way through the engine.
enum Pending {
    Waiting(Ticket),
    Unread(String),
}

/// Scores `paths` and writes a row for each to `sink`, in their order. `progress` is called after every row.
/// Files larger than `max_file_bytes` are rows with an error.
///
/// # Errors
/// Only when a row cannot be written.
pub fn run<W: Write>(
    paths: impl Iterator<Item = PathBuf>,
    engine: &Engine,
    max_file_bytes: u64,
    sink: &mut Sink<'_, W>,
    mut progress: impl FnMut(&Summary),
) -> io::Result<Summary> {
    // Enough in flight that no worker waits for the reading or the writing of a row.
    let ahead = engine.capacity() + engine.workers();
    let mut pending: VecDeque<(PathBuf, Pending)> = VecDeque::new();
    let mut summary = Summary::default();
    let mut settle = |(path, pending): (PathBuf, Pending), sink: &mut Sink<'_, W>| -> io::Result<()> {
        let outcome = match pending {
            Pending::Unread(reason) => Err(reason),
            Pending::Waiting(reply) => match reply.wait() {
                Ok(Ok(prediction)) => Ok(prediction),
                Ok(Err(error)) => Err(sentence(&error)),
                Err(_) => Err("the worker gave no answer".to_owned()),
            },
        };
        match outcome {
            Ok(prediction) => {
                sink.prediction(&path, &prediction)?;
                summary.scored += 1;
            }
            Err(reason) => {
                sink.error(&path, &reason)?;
                summary.failed += 1;
            }
        }
        progress(&summary);
        Ok(())
    };
    for path in paths {
        let job = match source::read(&path, max_file_bytes) {
            Ok(bytes) => match engine.submit_waiting(Input::Encoded(bytes.into())) {
                Ok(ticket) => Pending::Waiting(ticket),
                Err(refused) => Pending::Unread(refused.to_string()),
            },
            Err(reason) => Pending::Unread(reason),
        };
        pending.push_back((path, job));
        if pending.len() >= ahead
            && let Some(first) = pending.pop_front()
        {
            settle(first, sink)?;
        }
    }
    for last in pending {
        settle(last, sink)?;
    }
    sink.flush()?;
    Ok(summary)
}

fn sentence(error: &ClassifyError) -> String {
    match error {
        ClassifyError::Image(DecodeError::Empty) => "the file is empty (0 bytes)".into(),
        error => error.to_string(),
    }
}
