//! What became of a model's requests.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Counts and times of requests since the model was loaded.
#[derive(Debug, Default)]
pub struct RequestStats(Mutex<RequestCounts>);

/// The same at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// Answered.
    pub succeeded: u64,
    /// Their time.
    pub success_time: Duration,
    /// Of that, scoring and writing the answer.
    pub output_time: Duration,
    /// Answered with an error.
    pub failed: u64,
    /// Their time.
    pub fail_time: Duration,
    /// When the last one was answered, in milliseconds since 1970; 0 when there was none.
    pub last: u64,
}

impl RequestStats {
    fn with<T>(&self, look: impl FnOnce(&mut RequestCounts) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A request that took `took`, of which `output` went into scoring and writing the answer.
    pub fn succeeded(&self, took: Duration, output: Duration) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.with(|counts| {
            counts.succeeded += 1;
            counts.success_time += took;
            counts.output_time += output;
            counts.last = u64::try_from(now.as_millis()).unwrap_or(0);
        });
    }

    /// A request that was answered with an error.
    pub fn failed(&self, took: Duration) {
        self.with(|counts| {
            counts.failed += 1;
            counts.fail_time += took;
        });
    }

    /// The counts now.
    pub fn snapshot(&self) -> RequestCounts {
        self.with(|counts| *counts)
    }
}
