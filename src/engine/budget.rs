//! Places to work at: as many as the processors allow, shared by all engines.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

/// A number of places. A worker holds one while it decodes and runs a network.
pub struct Budget {
    state: Mutex<State>,
    freed: Condvar,
    ended: Condvar,
    /// Why an engine has no device left, once one has none.
    lost: watch::Sender<Option<String>>,
}

struct State {
    free: usize,
    /// Workers that wait for a place. Without one, freeing a place needs no call to the system.
    waiting: usize,
    /// Worker threads that share the places.
    workers: usize,
    panics: u64,
}

/// A worker thread that shares the places, until it is dropped at the thread's end.
pub(super) struct Worker(Arc<Budget>);

/// A place that is held; dropping it frees it.
pub struct Permit<'a>(&'a Budget);

impl Budget {
    /// `places` workers may be at work at once; at least one.
    pub fn new(places: usize) -> Self {
        Self {
            state: Mutex::new(State { free: places.max(1), waiting: 0, workers: 0, panics: 0 }),
            freed: Condvar::new(),
            ended: Condvar::new(),
            lost: watch::Sender::new(None),
        }
    }

    /// Waits for a place.
    pub fn take(&self) -> Permit<'_> {
        let mut state = self.lock();
        while state.free == 0 {
            state.waiting += 1;
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.free -= 1;
        Permit(self)
    }

    /// Counts one more worker thread.
    pub(super) fn worker(budget: &Arc<Self>) -> Worker {
        budget.lock().workers += 1;
        Worker(budget.clone())
    }

    /// Waits until every worker thread has ended, at most until `deadline`; says whether they have. Workers end once their
    /// engine was dropped and what it had queued is done.
    pub fn wait_for_workers(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        while state.workers > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Counts a panic of a worker outside of what guards each picture. The pictures at work are lost; the worker goes on.
    pub(super) fn note_panic(&self) {
        self.lock().panics += 1;
    }

    /// Notes that an engine has no device left.
    pub(super) fn note_lost(&self, reason: &str) {
        self.lost.send_replace(Some(reason.to_owned()));
    }

    /// Why an engine has no device left, once one has none: its model answers no more, and devices do not heal within a process.
    pub fn lost(&self) -> watch::Receiver<Option<String>> {
        self.lost.subscribe()
    }

    /// Panics that were counted.
    pub fn panics(&self) -> u64 {
        self.lock().panics
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.ended.notify_all();
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.free += 1;
        let wanted = state.waiting > 0;
        drop(state);
        if wanted {
            self.0.freed.notify_one();
        }
    }
}
