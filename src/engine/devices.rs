//! What devices that run the network beside the processor do.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Reply;

/// What one device has done since the start.
#[derive(Debug, Clone, Default)]
pub struct DeviceStats {
    /// Its name, such as `cuda:0`.
    pub device: String,
    /// Pictures that were run.
    pub images: u64,
    /// Runs of the network, by the pictures in them; what was ended before it was run is none.
    pub batches: BTreeMap<usize, u64>,
    /// Time without any run: it waited for pictures.
    pub waiting: Duration,
    /// Time with a run under way, or two.
    pub network: Duration,
    /// Whether it failed, and was taken out.
    pub lost: bool,
}

/// A device while it is used.
pub(super) struct Device {
    stats: DeviceStats,
    /// Runs under way.
    running: usize,
    /// When the first of them began, or the last one ended.
    since: Instant,
}

impl Device {
    pub(super) fn new(device: String) -> Self {
        Self { stats: DeviceStats { device, ..DeviceStats::default() }, running: 0, since: Instant::now() }
    }

    pub(super) fn name(&self) -> &str {
        &self.stats.device
    }

    pub(super) fn is_lost(&self) -> bool {
        self.stats.lost
    }

    pub(super) fn lose(&mut self) {
        self.settle();
        self.stats.lost = true;
    }

    /// A run begins.
    pub(super) fn begin(&mut self) {
        self.settle();
        self.running += 1;
    }

    /// A run ended.
    pub(super) fn end(&mut self) {
        self.settle();
        self.running -= 1;
    }

    /// Counts what was answered.
    pub(super) fn count(&mut self, outcomes: &[Reply]) {
        for prediction in outcomes.iter().flatten() {
            self.stats.images += 1;
            if prediction.timings.leads_batch {
                *self.stats.batches.entry(prediction.timings.batch).or_default() += 1;
            }
        }
    }

    /// What it has done until now.
    pub(super) fn stats(&mut self) -> DeviceStats {
        self.settle();
        self.stats.clone()
    }

    /// Adds the time since the last change to what was going on.
    fn settle(&mut self) {
        let now = Instant::now();
        let passed = now - std::mem::replace(&mut self.since, now);
        if self.stats.lost {
            return;
        }
        *(if self.running > 0 { &mut self.stats.network } else { &mut self.stats.waiting }) += passed;
    }
}
