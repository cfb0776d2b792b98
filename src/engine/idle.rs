//! How workers lie down and are woken. `checked` compiles this file a second time against loom, which tries every order of
//! steps of a few threads.

use super::sync::{Mutex, MutexGuard, PoisonError, Thread, current, park};

/// Workers that wait for work, the last to begin at the end. Without one, new work needs no call to the system: workers look
/// before they wait.
#[derive(Default)]
pub(super) struct Idle(Vec<Thread>);

/// A state that threads of several roles wait on.
pub(super) trait Awaited {
    /// What a thread waits for.
    type Role: Copy;

    /// Whether a thread of this role should not wait any longer.
    fn is_due(&self, role: Self::Role) -> bool;

    /// Those who wait in this role.
    fn idle(&mut self, role: Self::Role) -> &mut Idle;
}

pub(super) fn lock<S>(state: &Mutex<S>) -> MutexGuard<'_, S> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the state is due for `role`.
pub(super) fn wait<S: Awaited>(state: &Mutex<S>, role: S::Role) -> MutexGuard<'_, S> {
    let mut guard = lock(state);
    while !guard.is_due(role) {
        let me = current();
        guard.idle(role).0.push(me.clone());
        drop(guard);
        park();
        guard = lock(state);
        // Still there when nobody woke it.
        guard.idle(role).0.retain(|worker| worker.id() != me.id());
    }
    guard
}

/// Wakes up to `workers` of those who wait in `role`, after giving back the lock, which the woken take first. Those that were
/// busy last: their networks are still in the caches, and at low load the other processors keep the server's code.
pub(super) fn wake<S: Awaited>(mut guard: MutexGuard<'_, S>, role: S::Role, workers: usize) {
    let woken = guard.idle(role).take(workers);
    drop(guard);
    woken.into_iter().for_each(|worker| worker.unpark());
}

impl Idle {
    /// Up to `workers` of them, to be woken once the lock was given back.
    pub(super) fn take(&mut self, workers: usize) -> Vec<Thread> {
        self.0.split_off(self.0.len().saturating_sub(workers))
    }
}
