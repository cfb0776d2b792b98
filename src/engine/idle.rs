//! How workers lie down and are woken. `checked` compiles this file a second time against loom, which tries every order of
//! steps of a few threads.

use super::sync::{Mutex, MutexGuard, PoisonError, Thread, current, park};

/// Workers that wait for work, the last to begin at the end. Without one, new work needs no call to the system: workers look
/// before they wait.
#[derive(Default)]
pub(super) struct Idle(Vec<Thread>);

/// A state that workers wait on.
pub(super) trait Awaited {
    /// Whether a worker should not wait any longer.
    fn is_due(&self) -> bool;

    /// Those who wait.
    fn idle(&mut self) -> &mut Idle;
}

pub(super) fn lock<S>(state: &Mutex<S>) -> MutexGuard<'_, S> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the state is due.
pub(super) fn wait<S: Awaited>(state: &Mutex<S>) -> MutexGuard<'_, S> {
    let mut guard = lock(state);
    while !guard.is_due() {
        let me = current();
        guard.idle().0.push(me.clone());
        drop(guard);
        park();
        guard = lock(state);
        // Still there when nobody woke it.
        guard.idle().0.retain(|worker| worker.id() != me.id());
    }
    guard
}

/// Wakes up to `workers` of those who wait, after giving back the lock, which the woken take first. Those that were busy last:
/// their networks are still in the caches, and at low load the other processors keep the server's code.
pub(super) fn wake<S: Awaited>(mut guard: MutexGuard<'_, S>, workers: usize) {
    let waiting = &mut guard.idle().0;
    let woken = waiting.split_off(waiting.len().saturating_sub(workers));
    drop(guard);
    for worker in woken {
        worker.unpark();
    }
}
