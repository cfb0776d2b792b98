//! Places to work at: as many as the processors allow, shared by all engines.

use std::sync::{Condvar, Mutex, PoisonError};

/// A number of places. A worker holds one while it decodes and runs a network.
pub struct Budget {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A place that is held; dropping it frees it.
pub struct Place<'a>(&'a Budget);

impl Budget {
    /// `places` workers may be at work at once; at least one.
    pub fn new(places: usize) -> Self {
        Self { free: Mutex::new(places.max(1)), freed: Condvar::new() }
    }

    /// Waits for a place.
    pub fn take(&self) -> Place<'_> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Place(self)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}
