//! In place of `traces` in builds without the feature `otlp`.

use tracing::{Level, Span};

use super::{Ids, init};
use crate::features::Feature;

/// The way to the collector: there is none.
pub enum Traces {}

impl Traces {
    /// Sends what is left.
    pub fn finish(self) {
        match self {}
    }
}

/// As [`init`].
///
/// # Errors
/// When a collector is named.
pub fn init_traced(level: Level, otlp: Option<&str>) -> Result<Option<Traces>, String> {
    if otlp.is_some() {
        return Err(Feature::Otlp.missing("--otlp").to_string());
    }
    init(level);
    Ok(None)
}

/// Nothing: no span is exported.
pub fn join(_: &Span, _: Option<&Ids>) -> Option<Ids> {
    None
}
