//! Preparers and executors: for networks that run on a device of their own, which would wait while pictures are decoded.
//!
//! A preparer takes a picture from the queue and hands it on; an executor takes what is ready, up to a batch, waits for nothing
//! more, and runs the network on it. Several executors on one device keep it busy: one loads and hands out answers while another's
//! batch runs. Pictures that were sent as tensors are ready as they come. A device that fails is taken out, and its pictures are
//! ready again for the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::state::{Job, Role, Running, Shared};
use super::{idle, ticket};
use crate::classify::{ClassifyError, Executed, Executor, Preparer, Ready};
use crate::runtime::RuntimeError;
use crate::stop::Stop;

/// A picture that waits for a device.
pub(super) struct Waiting {
    pub(super) job: Job,
    pub(super) ready: Ready,
    /// How long it had waited for a preparer.
    pub(super) queued: Duration,
    /// Since when it waits for a device.
    pub(super) since: Instant,
}

/// A picture that a preparer is at counts until this is dropped: also by a panic.
struct Preparing<'a>(&'a Shared);

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.preparing -= 1;
        if state.closed && state.preparing == 0 {
            // They may have waited for this one alone.
            idle::wake(state, Role::Executor(0), usize::MAX);
        }
    }
}

/// Prepares one picture. False when the engine is closed and nothing is left to prepare.
pub(super) fn prepare(shared: &Shared, preparer: &mut Preparer) -> bool {
    if idle::wait(&shared.state, Role::Worker).queue.is_empty() {
        // Whoever waits for the last picture to be prepared learns that there is none.
        let everybody = shared.lock().all_idle();
        everybody.into_iter().for_each(|thread| thread.unpark());
        return false;
    }
    let turn = Instant::now();
    let place = shared.budget.take();
    let taken = {
        let mut state = shared.lock();
        if !state.has_room_for_ready() {
            return true;
        }
        let job = state.next_job();
        state.preparing += usize::from(job.is_some());
        job.map(|job| (job, state.spare.pop()))
    };
    shared.told_room();
    // Of those that waited, nobody may be left.
    let Some((job, memory)) = taken else { return true };
    let preparing = Preparing(shared);
    let began = Instant::now();
    let prepared = preparer.prepare(&job.input, job.caller.stop(), memory);
    drop(place);
    let queued = began - job.submitted;
    let ready = match prepared {
        Ok(ready) => ready,
        Err(error) => {
            drop(preparing);
            let _ = job.reply.send(Err(error));
            return true;
        }
    };
    let mut state = shared.lock();
    state.pace.note(turn.elapsed(), 1);
    let waiting = Waiting { job, ready, queued, since: Instant::now() };
    let refused = match &state.dead {
        Some(dead) => Some((waiting, dead.clone())),
        None => {
            state.ready.push_back(waiting);
            None
        }
    };
    idle::wake(state, Role::Executor(0), 1);
    drop(preparing);
    if let Some((waiting, dead)) = refused {
        let _ = waiting.job.reply.send(Err(dead.into()));
    }
    true
}

/// Runs one batch on the device of this number. False when the device was lost, or the engine is closed and everything is done.
pub(super) fn execute(shared: &Shared, device: usize, executor: &mut Executor) -> bool {
    let mut state = idle::wait(&shared.state, Role::Executor(device));
    if !state.is_ready() || state.devices[device].is_lost() {
        return false;
    }
    let turn = Instant::now();
    let taken = state.next_ready(executor.max_batch());
    state.running += taken.len();
    let waited_for = state.idle_for_room();
    drop(state);
    waited_for.into_iter().for_each(|worker| worker.unpark());
    shared.told_room();
    if taken.is_empty() {
        return true;
    }
    let running = Running { shared, pictures: taken.len() };
    let (batch, memories) = load(executor, taken);
    let stop = Arc::new(Stop::default());
    ticket::begin(batch.iter().map(|(job, _)| &job.caller), &stop);
    {
        let mut state = shared.lock();
        state.spare.extend(memories);
        let kept = state.room_for_ready;
        state.spare.truncate(kept);
        state.devices[device].begin();
    }
    let busy = Busy { shared, device };
    let waited: Vec<Duration> = batch.iter().map(|(_, waited)| *waited).collect();
    let Executed { outcomes, lost } = executor.execute(&waited, &stop);
    drop(busy);
    let mut batch = batch.into_iter();
    let answered: Vec<_> = outcomes.into_iter().zip(batch.by_ref()).collect();
    if let Some(lost) = lost {
        lose(shared, device, executor, lost, batch.collect());
    }
    // Freed and counted before the answers are sent: whoever has one finds the engine's counts true.
    drop(running);
    let (outcomes, answered): (Vec<_>, Vec<_>) = answered.into_iter().unzip();
    {
        let mut state = shared.lock();
        // A run that was ended says nothing of the pace.
        if !stop.asked() {
            state.runs.note(turn.elapsed(), 1);
        }
        state.stats.record(&outcomes, waited.iter().copied());
        state.devices[device].count(&outcomes);
    }
    for (outcome, (job, _)) in outcomes.into_iter().zip(answered) {
        // The caller may have gone meanwhile.
        let _ = job.reply.send(outcome);
    }
    true
}

/// A run that the device is at, until this is dropped: also by a panic.
struct Busy<'a> {
    shared: &'a Shared,
    device: usize,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.shared.lock().devices[self.device].end();
    }
}

/// Loads pictures for a run, in their order, and gives back the memory of those that were prepared. A picture that cannot be
/// loaded is answered so.
fn load(executor: &mut Executor, taken: Vec<Waiting>) -> (Vec<(Job, Duration)>, Vec<crate::pixels::TensorBatch>) {
    executor.clear();
    let (mut batch, mut memories) = (Vec::with_capacity(taken.len()), Vec::with_capacity(taken.len()));
    for Waiting { job, ready, queued, since } in taken {
        match executor.load(&ready) {
            Ok(()) => batch.push((job, queued + since.elapsed())),
            Err(error) => drop(job.reply.send(Err(error.into()))),
        }
        memories.extend(ready.emptied());
    }
    (batch, memories)
}

/// Takes a device out. The pictures that it left, numbered as they were loaded, are ready for the others; without any other,
/// whatever waits is answered that there is no device.
fn lose(shared: &Shared, device: usize, executor: &Executor, lost: RuntimeError, left: Vec<(Job, Duration)>) {
    let first = executor.loaded() - left.len();
    let now = Instant::now();
    let again: Vec<Waiting> = left
        .into_iter()
        .enumerate()
        .filter_map(|(n, (job, queued))| {
            // It was loaded, so it can be unloaded.
            let ready = executor.unload(first + n).ok()?;
            Some(Waiting { job, ready, queued, since: now })
        })
        .collect();
    let mut state = shared.lock();
    let name = state.devices[device].name().to_owned();
    if !state.devices[device].is_lost() {
        tracing::error!(device = name, error = %lost, "a device failed, and is used no longer");
    }
    state.devices[device].lose();
    let mut refused = Vec::new();
    if state.devices.iter().all(super::devices::Device::is_lost) {
        refused.extend(again.into_iter().map(|waiting| waiting.job));
        refused.extend(state.ready.drain(..).map(|waiting| waiting.job));
        refused.extend(state.sent.drain(..).map(|waiting| waiting.job));
        refused.extend(state.queue.drain(..));
        state.dead = Some(lost.clone());
        shared.budget.note_lost(&lost.to_string());
    } else {
        again.into_iter().rev().for_each(|waiting| state.ready.push_front(waiting));
    }
    let everybody = state.all_idle();
    drop(state);
    everybody.into_iter().for_each(|thread| thread.unpark());
    shared.told_room();
    for job in refused {
        let _ = job.reply.send(Err(ClassifyError::from(lost.clone())));
    }
}
