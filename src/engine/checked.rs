//! Workers that wait and are woken, in every order of steps that a few threads can take.

use loom::sync::Arc;

mod sync {
    pub(super) use std::sync::PoisonError;

    pub(super) use loom::sync::{Mutex, MutexGuard};
    pub(super) use loom::thread::{Thread, current, park};
}

#[path = "idle.rs"]
#[expect(clippy::duplicate_mod, reason = "the same steps, made of loom's locks and threads")]
mod idle;

use idle::{Awaited, Idle, lock, wait, wake};

#[derive(Default)]
struct Queue {
    work: usize,
    done: usize,
    closed: bool,
    idle: Idle,
}

impl Awaited for Queue {
    type Role = ();

    fn is_due(&self, (): ()) -> bool {
        self.work > 0 || self.closed
    }

    fn idle(&mut self, (): ()) -> &mut Idle {
        &mut self.idle
    }
}

/// Does what there is until the queue is closed and empty.
fn work(queue: &sync::Mutex<Queue>) {
    loop {
        let mut queue = wait(queue, ());
        if queue.work == 0 {
            return;
        }
        queue.work -= 1;
        queue.done += 1;
    }
}

/// Hands in pieces of work, one by one or together, waking as many workers; closes; and expects everything done. loom fails the
/// test when a worker is never woken.
fn try_every_order(workers: usize, pieces: &'static [usize]) {
    let mut model = loom::model::Builder::new();
    // Every order in which up to three threads are interrupted where they need not be; more take minutes and find no more.
    model.preemption_bound = Some(3);
    model.check(move || {
        let queue = Arc::new(sync::Mutex::new(Queue::default()));
        let threads: Vec<_> = (0..workers)
            .map(|_| {
                let queue = queue.clone();
                loom::thread::spawn(move || work(&queue))
            })
            .collect();
        for &several in pieces {
            let mut guard = lock(&queue);
            guard.work += several;
            wake(guard, (), several);
        }
        let mut guard = lock(&queue);
        guard.closed = true;
        wake(guard, (), usize::MAX);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let queue = lock(&queue);
        assert_eq!((queue.work, queue.done), (0, pieces.iter().sum()));
    });
}

#[test]
fn one_worker_sleeps_through_nothing() {
    try_every_order(1, &[1, 1]);
    try_every_order(1, &[2]);
}

#[test]
fn of_two_workers_none_sleeps_through_work_or_the_end() {
    try_every_order(2, &[1]);
    try_every_order(2, &[2]);
    try_every_order(2, &[1, 1]);
}
