//! Worker threads that own classifiers, behind one bounded queue counted in pictures.
//!
//! A worker takes what already waits, up to a batch, decodes it and runs the network on it; nothing is waited for to fill
//! a batch. Workers × threads is the whole budget of processors, shared by all engines through a [`Budget`]. Work whose
//! caller has gone, or whose deadline has passed, is dropped before it costs anything; a running batch that nobody waits
//! for any more is ended, and so is the decoding of a picture. A panic costs one picture.

mod budget;
#[cfg(test)]
mod checked;
mod idle;
mod pace;
mod stats;
mod ticket;

/// What `idle` is made of.
mod sync {
    pub(super) use std::sync::{Mutex, MutexGuard, PoisonError};
    pub(super) use std::thread::{Thread, current, park};
}

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::classify::{Classifier, ClassifyError, Input, Prediction};
use crate::stop::Stop;

pub use budget::Budget;
pub use stats::{BatchStats, EngineStats};
pub use ticket::{Lost, Ticket};

use idle::{Awaited, Idle};
use pace::Pace;
use ticket::Caller;

/// What a submitted picture comes back as.
pub type Reply = Result<Prediction, ClassifyError>;

/// The queue has no room for all of the request's pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Full; try again after this long, from the queue's length and the measured rate.
    #[error("the queue is full")]
    Full {
        /// When there should be room.
        retry_after: Duration,
    },
    /// By the measured rate not to be answered within the deadline.
    #[error("the answer would come after the deadline")]
    TooSlow {
        /// When what is ahead now should be done.
        retry_after: Duration,
    },
    /// More pictures than the whole queue holds.
    #[error("{images} images in one request; the queue holds {capacity}")]
    TooMany {
        /// Pictures in the request.
        images: usize,
        /// The queue's capacity.
        capacity: usize,
    },
    /// The deadline has passed already.
    #[error("the deadline passed before the image could be queued")]
    Late,
    /// The engine was closed.
    #[error("the engine is closed")]
    Closed,
}

struct Job {
    input: Input,
    reply: oneshot::Sender<Reply>,
    caller: Arc<Caller>,
    submitted: Instant,
    deadline: Option<Instant>,
}

struct State {
    queue: VecDeque<Job>,
    running: usize,
    idle: Idle,
    /// Submitters that wait until the queue has room.
    waiting_for_room: usize,
    closed: bool,
    pace: Pace,
    stats: EngineStats,
}

struct Shared {
    state: Mutex<State>,
    room: Condvar,
    capacity: usize,
    workers: usize,
    budget: Arc<Budget>,
}

impl Awaited for State {
    fn is_due(&self) -> bool {
        self.closed || !self.queue.is_empty()
    }

    fn idle(&mut self) -> &mut Idle {
        &mut self.idle
    }
}

/// The front of the queue. Dropping it lets the workers finish what is queued and end; it does not wait for them, because it
/// may happen where nothing may block. [`Budget::wait_for_workers`] does.
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Starts one worker per classifier, with room for `capacity` waiting pictures. Each worker holds a place in `budget`
    /// while it works.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(classifiers: Vec<Classifier>, capacity: usize, budget: Arc<Budget>) -> std::io::Result<Self> {
        let state = State {
            queue: VecDeque::new(),
            running: 0,
            idle: Idle::default(),
            waiting_for_room: 0,
            closed: false,
            pace: Pace::default(),
            stats: EngineStats::default(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            room: Condvar::new(),
            capacity: capacity.max(1),
            workers: classifiers.len(),
            budget,
        });
        let engine = Self { shared };
        for (n, classifier) in classifiers.into_iter().enumerate() {
            let shared = engine.shared.clone();
            let worker = thread::Builder::new().name(format!("nbn-worker-{n}"));
            let counted = Budget::worker(&shared.budget);
            worker.spawn(move || {
                work(&shared, classifier);
                drop(counted);
            })?;
        }
        Ok(engine)
    }

    /// Queues all of `inputs` or none. The tickets answer in the order of `inputs`. With a deadline, they are refused
    /// when by the measured rate they would not be answered in time.
    ///
    /// # Errors
    /// When they do not all fit.
    pub fn submit(&self, inputs: Vec<Input>, deadline: Option<Instant>) -> Result<Vec<Ticket>, Refused> {
        let capacity = self.shared.capacity;
        let mut state = self.shared.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if inputs.len() > capacity {
            return Err(Refused::TooMany { images: inputs.len(), capacity });
        }
        if state.queue.len() + inputs.len() > capacity {
            state.queue.retain(|job| !job.caller.gone());
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Refused::Late);
        }
        let wait = self.shared.wait(&state);
        let retry_after = wait.clamp(Duration::from_secs(1), Duration::from_secs(3600));
        if state.queue.len() + inputs.len() > capacity {
            return Err(Refused::Full { retry_after });
        }
        if deadline.is_some_and(|deadline| Instant::now() + wait > deadline) {
            return Err(Refused::TooSlow { retry_after });
        }
        let tickets: Vec<Ticket> = inputs.into_iter().map(|input| Shared::push(&mut state, input, deadline)).collect();
        idle::wake(state, tickets.len());
        Ok(tickets)
    }

    /// Queues one picture, waiting for room.
    ///
    /// # Errors
    /// Only when the engine is closed.
    pub fn submit_waiting(&self, input: Input) -> Result<Ticket, Refused> {
        let mut state = self.shared.lock();
        while state.queue.len() >= self.shared.capacity && !state.closed {
            state.waiting_for_room += 1;
            state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting_for_room -= 1;
        }
        if state.closed {
            return Err(Refused::Closed);
        }
        let ticket = Shared::push(&mut state, input, None);
        idle::wake(state, 1);
        Ok(ticket)
    }

    /// Pictures waiting for a worker.
    pub fn queued(&self) -> usize {
        self.shared.lock().queue.len()
    }

    /// Pictures that workers are at.
    pub fn running(&self) -> usize {
        self.shared.lock().running
    }

    /// Pictures that can wait at most.
    pub fn capacity(&self) -> usize {
        self.shared.capacity
    }

    /// Worker threads.
    pub fn workers(&self) -> usize {
        self.shared.workers
    }

    /// What was done since the start.
    pub fn stats(&self) -> EngineStats {
        self.shared.lock().stats.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        idle::wake(state, usize::MAX);
        self.shared.room.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        idle::lock(&self.state)
    }

    /// How long until a picture that came now would be begun.
    fn wait(&self, state: &State) -> Duration {
        let ahead = (state.queue.len() + state.running) as f64;
        let seconds = ahead * state.pace.seconds() / self.workers.max(1) as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn push(state: &mut State, input: Input, deadline: Option<Instant>) -> Ticket {
        let (reply, receiver) = oneshot::channel();
        let caller = Arc::new(Caller::until(deadline));
        state.queue.push_back(Job { input, reply, caller: caller.clone(), submitted: Instant::now(), deadline });
        Ticket::new(receiver, caller)
    }

    /// The next pictures that somebody waits for; empty when there are none.
    fn take(&self, max_batch: usize) -> Vec<Job> {
        let mut state = self.lock();
        // A share each: what waits should not go to one worker while another idles.
        let share = state.queue.len().div_ceil(self.workers.max(1)).min(max_batch);
        let now = Instant::now();
        let mut jobs = Vec::with_capacity(share);
        while jobs.len() < share
            && let Some(job) = state.queue.pop_front()
        {
            if job.caller.gone() {
                continue;
            }
            if job.deadline.is_some_and(|deadline| deadline <= now) {
                // The caller may go at the same moment.
                let _ = job.reply.send(Err(ClassifyError::Deadline));
            } else {
                jobs.push(job);
            }
        }
        state.running += jobs.len();
        let wanted = state.waiting_for_room > 0;
        drop(state);
        if wanted {
            self.room.notify_all();
        }
        jobs
    }
}

/// Pictures that count as running, until this is dropped: also by a panic.
struct Running<'a> {
    shared: &'a Shared,
    pictures: usize,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.shared.lock().running -= self.pictures;
    }
}

fn work(shared: &Shared, mut classifier: Classifier) {
    loop {
        // A picture's own panics are its answer. What panics beside them costs the pictures at work, never the worker: without
        // it, the queue would fill up and nobody would know why.
        match catch_unwind(AssertUnwindSafe(|| turn(shared, &mut classifier))) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => {
                tracing::error!(
                    "a worker panicked between images: the images that it was working on are lost, and the worker \
                     continues"
                );
                shared.budget.note_panic();
            }
        }
    }
}

/// Waits for work, so that a place in the budget is not taken for nothing, and does some. False when the engine is closed and
/// everything is done.
fn turn(shared: &Shared, classifier: &mut Classifier) -> bool {
    if idle::wait(&shared.state).queue.is_empty() {
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
