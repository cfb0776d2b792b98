//! Ends a run from another thread.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::session::RunOptions;

use super::RuntimeError;

/// Tells one run, from any thread, that nobody waits for it. The runtime ends between two of the network's nodes.
#[derive(Default)]
pub struct Stop {
    asked: AtomicBool,
    /// Set once the run begins.
    options: OnceLock<RunOptions>,
}

impl Stop {
    /// Asks the run to end, also when it has not begun.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(options) = self.options.get()
            && let Err(error) = options.terminate()
        {
            tracing::warn!(%error, "a run that nobody waits for could not be ended");
        }
    }

    /// Whether the run was asked to end.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// The options to run with. Whoever asks later than this is heard by the runtime, whoever asked before, here.
    pub(super) fn begin(&self) -> Result<&RunOptions, RuntimeError> {
        if self.options.get().is_none() {
            let options = RunOptions::new().map_err(|error| RuntimeError::Run(error.to_string()))?;
            // A second run under the same stop uses the first one's options.
            let _ = self.options.set(options);
        }
        match self.options.get() {
            Some(options) if !self.asked() => Ok(options),
            _ => Err(RuntimeError::Stopped),
        }
    }
}
