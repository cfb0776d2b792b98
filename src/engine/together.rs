//! Workers that prepare pictures and run the network on them: for networks that run on the processor, where the two want the
//! same place.

use std::sync::Arc;
use std::time::Instant;

use super::state::{Role, Running, Shared};
use super::{idle, ticket};
use crate::classify::{Classifier, Input};
use crate::stop::Stop;

/// Waits for work, so that a place in the budget is not taken for nothing, and does some. False when the engine is closed and
/// everything is done.
pub(super) fn turn(shared: &Shared, classifier: &mut Classifier) -> bool {
    if idle::wait(&shared.state, Role::Worker).queue.is_empty() {
        return false;
    }
    let turn = Instant::now();
    let place = shared.budget.take();
    let jobs = shared.take(classifier.max_batch());
    if jobs.is_empty() {
        // Another worker was first, or nobody waits.
        return true;
    }
    let running = Running { shared, pictures: jobs.len() };
    let began = Instant::now();
    let stop = Arc::new(Stop::default());
    ticket::begin(jobs.iter().map(|job| &job.caller), &stop);
    let pictures: Vec<(&Input, &Stop)> = jobs.iter().map(|job| (&job.input, job.caller.stop())).collect();
    let outcomes = classifier.classify(&pictures, &stop);
    drop(place);
    // With the wait for a place: beside other busy models, this queue gets on only so fast.
    let took = turn.elapsed();
    // Freed before the answer is sent: whoever has it finds the engine's counts true.
    drop(running);
    {
        let mut state = shared.lock();
        // A batch that was ended says nothing of the pace.
        if !stop.asked() {
            state.pace.note(took, jobs.len());
        }
        state.stats.record(&outcomes, jobs.iter().map(|job| began - job.submitted));
    }
    for (job, outcome) in jobs.into_iter().zip(outcomes) {
        let reply = outcome.map(|mut prediction| {
            prediction.timings.queue = began - job.submitted;
            prediction
        });
        // The caller may have gone meanwhile.
        let _ = job.reply.send(reply);
    }
    true
}
