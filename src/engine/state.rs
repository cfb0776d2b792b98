//! What an engine's threads share.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::apart::Waiting;
use super::budget::Budget;
use super::devices::Device;
use super::idle::{self, Awaited, Idle};
use super::pace::Pace;
use super::ticket::{Caller, Ticket};
use super::{EngineStats, Refused, Reply};
use crate::classify::{ClassifyError, Input, Ready};
use crate::pixels::TensorBatch;
use crate::runtime::RuntimeError;

/// What a thread of the engine waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A picture in the queue, and, where it is only prepared, room for what is ready.
    Worker,
    /// A picture that is ready, for the device of this number.
    Executor(usize),
}

pub(super) struct Job {
    pub(super) input: Input,
    pub(super) reply: oneshot::Sender<Reply>,
    pub(super) caller: Arc<Caller>,
    pub(super) submitted: Instant,
    pub(super) deadline: Option<Instant>,
}

#[derive(Default)]
pub(super) struct State {
    /// Pictures that wait for a worker.
    pub(super) queue: VecDeque<Job>,
    /// Pictures that were prepared and wait for a device.
    pub(super) ready: VecDeque<Waiting>,
    /// Pictures that were sent as tensors and wait for a device.
    pub(super) sent: VecDeque<Waiting>,
    /// Memory of pictures that were run.
    pub(super) spare: Vec<TensorBatch>,
    /// Pictures that preparers are at.
    pub(super) preparing: usize,
    /// Pictures that the network runs on.
    pub(super) running: usize,
    /// Workers, and executors.
    pub(super) idle: [Idle; 2],
    /// Submitters that wait until the queue has room.
    pub(super) waiting_for_room: usize,
    pub(super) closed: bool,
    /// Of workers, per picture.
    pub(super) pace: Pace,
    /// Of executors, per run.
    pub(super) runs: Pace,
    pub(super) stats: EngineStats,
    /// Those beside the processor.
    pub(super) devices: Vec<Device>,
    /// Why no device is left.
    pub(super) dead: Option<RuntimeError>,
    /// Pictures that may be prepared or on the way there, at most; 0 where workers run the network themselves.
    pub(super) room_for_ready: usize,
}

impl Awaited for State {
    type Role = Role;

    fn is_due(&self, role: Role) -> bool {
        match role {
            Role::Worker if self.queue.is_empty() => self.closed,
            Role::Worker => self.has_room_for_ready(),
            Role::Executor(device) => {
                // What runs may come back from a device that is lost.
                let done = || self.closed && self.queue.is_empty() && self.preparing + self.running == 0;
                self.is_ready() || self.devices[device].is_lost() || done()
            }
        }
    }

    fn idle(&mut self, role: Role) -> &mut Idle {
        &mut self.idle[usize::from(role != Role::Worker)]
    }
}

impl State {
    /// Whether pictures are taken.
    pub(super) fn is_open(&self) -> Result<(), Refused> {
        if self.dead.is_some() {
            return Err(Refused::NoDevice);
        }
        if self.closed { Err(Refused::Closed) } else { Ok(()) }
    }

    /// Pictures that wait, or are prepared, for something to run the network.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len() + self.preparing + self.ready.len() + self.sent.len()
    }

    /// Whether a device has something to do.
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty() || !self.sent.is_empty()
    }

    /// Drops the pictures that nobody waits for any more.
    pub(super) fn drop_gone(&mut self) {
        self.queue.retain(|job| !job.caller.gone());
        self.ready.retain(|waiting| !waiting.job.caller.gone());
        self.sent.retain(|waiting| !waiting.job.caller.gone());
    }

    /// Whether one more picture may be prepared.
    pub(super) fn has_room_for_ready(&self) -> bool {
        self.room_for_ready == 0 || self.ready.len() + self.preparing < self.room_for_ready
    }

    /// The next picture of the queue that somebody waits for.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        let now = Instant::now();
        std::iter::from_fn(|| self.queue.pop_front()).find_map(|job| awaited(job, now))
    }

    /// Up to `most` pictures that are ready and that somebody waits for, in the order in which they came.
    pub(super) fn next_ready(&mut self, most: usize) -> Vec<Waiting> {
        let now = Instant::now();
        let mut taken = Vec::with_capacity(most.min(self.ready.len() + self.sent.len()));
        while taken.len() < most {
            let came = |waiting: &VecDeque<Waiting>| waiting.front().map(|waiting| waiting.job.submitted);
            let from = match (came(&self.ready), came(&self.sent)) {
                (Some(ready), Some(sent)) if sent < ready => &mut self.sent,
                (Some(_), _) => &mut self.ready,
                _ => &mut self.sent,
            };
            let Some(Waiting { job, ready, queued, since }) = from.pop_front() else { break };
            match awaited(job, now) {
                Some(job) => taken.push(Waiting { job, ready, queued, since }),
                None => self.spare.extend(ready.emptied()),
            }
        }
        taken
    }

    /// Workers that can go on now that there is room again, to be woken once the lock was given back.
    pub(super) fn idle_for_room(&mut self) -> Vec<Thread> {
        let room = self.room_for_ready.saturating_sub(self.ready.len() + self.preparing);
        self.idle[0].take(room.min(self.queue.len()))
    }

    /// Everybody who waits, to be woken once the lock was given back.
    pub(super) fn all_idle(&mut self) -> Vec<Thread> {
        self.idle.iter_mut().flat_map(|idle| idle.take(usize::MAX)).collect()
    }

    /// How long until a picture that came now would be begun, with so many workers, and executors of so large a batch.
    pub(super) fn wait(&self, workers: usize, executors: usize, max_batch: usize) -> Duration {
        let ahead = self.queue.len() + self.preparing + if executors == 0 { self.running } else { 0 };
        let prepared = ahead as f64 * self.pace.seconds() / workers.max(1) as f64;
        let live = self.devices.iter().filter(|device| !device.is_lost()).count();
        let executors = executors * live / self.devices.len().max(1);
        let runs = (self.waiting() + self.running).div_ceil(max_batch.max(1));
        let run = runs as f64 * self.runs.seconds() / executors.max(1) as f64;
        Duration::try_from_secs_f64(prepared.max(run)).unwrap_or(Duration::MAX)
    }

    pub(super) fn push(&mut self, input: Input, ready: Option<Ready>, deadline: Option<Instant>) -> Ticket {
        let (reply, receiver) = oneshot::channel();
        let caller = Arc::new(Caller::until(deadline));
        let now = Instant::now();
        let job = Job { input, reply, caller: caller.clone(), submitted: now, deadline };
        match ready {
            Some(ready) => self.sent.push_back(Waiting { job, ready, queued: Duration::ZERO, since: now }),
            None => self.queue.push_back(job),
        }
        Ticket::new(receiver, caller)
    }
}

/// The picture, if somebody waits for it still; who waits beyond the deadline is told.
fn awaited(job: Job, now: Instant) -> Option<Job> {
    if job.caller.gone() {
        return None;
    }
    if job.deadline.is_some_and(|deadline| deadline <= now) {
        // The caller may go at the same moment.
        let _ = job.reply.send(Err(ClassifyError::Deadline));
        return None;
    }
    Some(job)
}

pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) room: Condvar,
    pub(super) capacity: usize,
    pub(super) workers: usize,
    pub(super) executors: usize,
    /// Of executors.
    pub(super) max_batch: usize,
    /// Of a picture that is sent as a tensor, where that is ready as it comes.
    pub(super) shape: Option<[usize; 3]>,
    pub(super) budget: Arc<Budget>,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        idle::lock(&self.state)
    }

    /// The next pictures that somebody waits for; empty when there are none.
    pub(super) fn take(&self, max_batch: usize) -> Vec<Job> {
        let mut state = self.lock();
        // A share each: what waits should not go to one worker while another idles.
        let share = state.queue.len().div_ceil(self.workers.max(1)).min(max_batch);
        let mut jobs = Vec::with_capacity(share);
        while jobs.len() < share
            && let Some(job) = state.next_job()
        {
            jobs.push(job);
        }
        state.running += jobs.len();
        let wanted = state.waiting_for_room > 0;
        drop(state);
        if wanted {
            self.room.notify_all();
        }
        jobs
    }

    /// Tells those who wait for room in the queue to look.
    pub(super) fn told_room(&self) {
        if self.lock().waiting_for_room > 0 {
            self.room.notify_all();
        }
    }
}

/// Pictures that count as running, until this is dropped: also by a panic.
pub(super) struct Running<'a> {
    pub(super) shared: &'a Shared,
    pub(super) pictures: usize,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.running -= self.pictures;
        if state.closed && state.running == 0 {
            // They may have waited for these alone.
            idle::wake(state, Role::Executor(0), usize::MAX);
        }
    }
}
