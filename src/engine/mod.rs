//! Worker threads that own classifiers, behind one bounded queue counted in pictures.
//!
//! A worker takes what already waits, up to a batch, decodes it and runs the network on it; nothing is waited for to fill
//! a batch. Workers × threads is the whole budget of processors, shared by all engines through a [`Budget`]. Work whose
//! caller has gone, or whose deadline has passed, is dropped before it costs anything; a running batch that nobody waits
//! for any more is ended. A panic costs one picture.

mod budget;
mod stats;
mod ticket;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::classify::{Classifier, ClassifyError, Input, Prediction};
use crate::runtime::Stop;

pub use budget::Budget;
pub use stats::{BatchStats, EngineStats};
pub use ticket::{Lost, Ticket};

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
    /// Workers that wait for work, the last to begin at the end. Without one, a new picture needs no call to the system:
    /// they look before they wait.
    idle: Vec<Thread>,
    /// Submitters that wait until the queue has room.
    waiting_for_room: usize,
    closed: bool,
    /// Smoothed seconds that one worker spends on one picture.
    seconds_per_image: f64,
    stats: EngineStats,
}

struct Shared {
    state: Mutex<State>,
    room: Condvar,
    capacity: usize,
    workers: usize,
    budget: Arc<Budget>,
}

/// The front of the queue. Dropping it finishes what is queued and joins the workers.
pub struct Engine {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
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
            idle: Vec::new(),
            waiting_for_room: 0,
            closed: false,
            seconds_per_image: 0.0,
            stats: EngineStats::default(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            room: Condvar::new(),
            capacity: capacity.max(1),
            workers: classifiers.len(),
            budget,
        });
        let mut engine = Self { shared, threads: Vec::new() };
        for (n, classifier) in classifiers.into_iter().enumerate() {
            let shared = engine.shared.clone();
            let worker = thread::Builder::new().name(format!("nbn-worker-{n}"));
            engine.threads.push(worker.spawn(move || work(&shared, classifier))?);
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
        self.shared.wake(state, tickets.len());
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
        self.shared.wake(state, 1);
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
        self.shared.wake(state, usize::MAX);
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches its panics; there is nothing to report here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long until a picture that came now would be begun.
    fn wait(&self, state: &State) -> Duration {
        let ahead = (state.queue.len() + state.running) as f64;
        let seconds = ahead * state.seconds_per_image / self.workers.max(1) as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn push(state: &mut State, input: Input, deadline: Option<Instant>) -> Ticket {
        let (reply, receiver) = oneshot::channel();
        let caller = Arc::new(Caller::default());
        state.queue.push_back(Job { input, reply, caller: caller.clone(), submitted: Instant::now(), deadline });
        Ticket::new(receiver, caller)
    }

    /// Wakes up to `workers` idle ones, after giving back the lock, which the woken take first. Those that were busy
    /// last: their networks are still in the caches, and at low load the other processors keep the server's code.
    fn wake(&self, mut state: MutexGuard<'_, State>, workers: usize) {
        let others = state.idle.len().saturating_sub(workers);
        let woken = state.idle.split_off(others);
        drop(state);
        for worker in woken {
            worker.unpark();
        }
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

    /// Waits until there is work, so that a place in the budget is not taken for nothing. False when the engine closes.
    fn wait_for_work(&self) -> bool {
        let mut state = self.lock();
        while state.queue.is_empty() {
            if state.closed {
                return false;
            }
            let me = thread::current();
            state.idle.push(me.clone());
            drop(state);
            thread::park();
            state = self.lock();
            // Still there when nobody woke it.
            state.idle.retain(|worker| worker.id() != me.id());
        }
        true
    }
}

fn work(shared: &Shared, mut classifier: Classifier) {
    while shared.wait_for_work() {
        let turn = Instant::now();
        let place = shared.budget.take();
        let jobs = shared.take(classifier.max_batch());
        if jobs.is_empty() {
            // Another worker was first, or nobody waits.
            continue;
        }
        let began = Instant::now();
        let stop = Arc::new(Stop::default());
        ticket::begin(jobs.iter().map(|job| &job.caller), &stop);
        let inputs: Vec<Input> = jobs.iter().map(|job| job.input.clone()).collect();
        let outcomes = classifier.classify(&inputs, &stop);
        drop(place);
        // With the wait for a place: beside other busy models, this queue gets on only so fast.
        let took = turn.elapsed();
        // Freed before the answer is sent: whoever has it finds the engine's counts true.
        {
            let mut state = shared.lock();
            state.running -= jobs.len();
            let seconds = took.as_secs_f64() / jobs.len() as f64;
            let old = state.seconds_per_image;
            state.seconds_per_image = if old == 0.0 { seconds } else { 0.9 * old + 0.1 * seconds };
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
    }
}
