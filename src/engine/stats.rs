//! What an engine has done.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{DeviceStats, Reply};

/// Counts and times since the start.
#[derive(Debug, Clone, Default)]
pub struct EngineStats {
    /// Pictures that were answered with a prediction.
    pub succeeded: u64,
    /// Time that answered pictures waited.
    pub queue: Duration,
    /// By pictures in a run of the network.
    pub batches: BTreeMap<usize, BatchStats>,
    /// Of the devices that run it beside the processor.
    pub devices: Vec<DeviceStats>,
}

/// Runs of the network with one batch size.
#[derive(Debug, Clone, Copy, Default)]
pub struct BatchStats {
    /// How many.
    pub runs: u64,
    /// Decoding and preprocessing of their pictures.
    pub prepare: Duration,
    /// The network.
    pub infer: Duration,
}

impl EngineStats {
    pub(super) fn record(&mut self, outcomes: &[Reply], queued: impl Iterator<Item = Duration>) {
        for (outcome, queued) in outcomes.iter().zip(queued) {
            let Ok(prediction) = outcome else { continue };
            let timings = &prediction.timings;
            self.succeeded += 1;
            self.queue += queued;
            let batch = self.batches.entry(timings.batch).or_default();
            batch.prepare += timings.decode + timings.preprocess;
            if timings.leads_batch {
                batch.runs += 1;
                batch.infer += timings.infer;
            }
        }
    }
}
