//! Places to work at: as many as the processors allow, shared by all engines.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A number of places. A worker holds one while it decodes and runs a network.
pub struct Budget {
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    free: usize,
    /// Workers that wait for a place. Without one, freeing a place needs no call to the system.
    waiting: usize,
}

/// A place that is held; dropping it frees it.
pub struct Place<'a>(&'a Budget);

impl Budget {
    /// `places` workers may be at work at once; at least one.
    pub fn new(places: usize) -> Self {
        Self { state: Mutex::new(State { free: places.max(1), waiting: 0 }), freed: Condvar::new() }
    }

    /// Waits for a place.
    pub fn take(&self) -> Place<'_> {
        let mut state = self.lock();
        while state.free == 0 {
            state.waiting += 1;
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.free -= 1;
        Place(self)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
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
