//! Worker threads that own classifiers, behind one bounded queue counted in images.
//!
//! A worker decodes and infers, so that workers × threads is the whole CPU budget. Work whose caller has gone is
//! dropped before it costs anything; a panic costs one picture.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::classify::{Classifier, ClassifyError, Prediction};

/// What a submitted picture comes back as.
pub type Reply = Result<Prediction, ClassifyError>;
/// An encoded picture, shared without copying.
pub type EncodedImage = Arc<[u8]>;

/// The queue has no room for all of the request's pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Full; try again after this long, from the queue's length and the measured rate.
    #[error("the queue is full")]
    Full {
        /// When there should be room.
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
    /// The engine was closed.
    #[error("the engine is closed")]
    Closed,
}

struct Job {
    image: EncodedImage,
    reply: oneshot::Sender<Reply>,
    submitted: Instant,
}

struct State {
    queue: VecDeque<Job>,
    running: usize,
    closed: bool,
    /// Smoothed seconds that one worker spends on one picture.
    seconds_per_image: f64,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    room: Condvar,
    capacity: usize,
    workers: usize,
}

/// The front of the queue. Dropping it finishes what is queued and joins the workers.
pub struct Engine {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Engine {
    /// Starts one worker per classifier, with room for `capacity` waiting pictures.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(classifiers: Vec<Classifier>, capacity: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { queue: VecDeque::new(), running: 0, closed: false, seconds_per_image: 0.0 }),
            work: Condvar::new(),
            room: Condvar::new(),
            capacity: capacity.max(1),
            workers: classifiers.len(),
        });
        let mut engine = Self { shared, threads: Vec::new() };
        for (n, classifier) in classifiers.into_iter().enumerate() {
            let shared = engine.shared.clone();
            let worker = thread::Builder::new().name(format!("nbn-worker-{n}"));
            engine.threads.push(worker.spawn(move || work(&shared, classifier))?);
        }
        Ok(engine)
    }

    /// Queues all of `images` or none. The receivers answer in the order of `images`.
    ///
    /// # Errors
    /// When they do not all fit.
    pub fn submit(&self, images: Vec<EncodedImage>) -> Result<Vec<oneshot::Receiver<Reply>>, Refused> {
        let mut state = self.shared.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if images.len() > self.shared.capacity {
            return Err(Refused::TooMany { images: images.len(), capacity: self.shared.capacity });
        }
        if state.queue.len() + images.len() > self.shared.capacity {
            state.queue.retain(|job| !job.reply.is_closed());
        }
        if state.queue.len() + images.len() > self.shared.capacity {
            let ahead = (state.queue.len() + state.running) as f64;
            let seconds = ahead * state.seconds_per_image / self.shared.workers.max(1) as f64;
            return Err(Refused::Full { retry_after: Duration::from_secs_f64(seconds.clamp(1.0, 3600.0)) });
        }
        Ok(images.into_iter().map(|image| self.shared.push(&mut state, image)).collect())
    }

    /// Queues one picture, waiting for room.
    ///
    /// # Errors
    /// Only when the engine is closed.
    pub fn submit_waiting(&self, image: EncodedImage) -> Result<oneshot::Receiver<Reply>, Refused> {
        let mut state = self.shared.lock();
        while state.queue.len() >= self.shared.capacity && !state.closed {
            state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(Refused::Closed);
        }
        Ok(self.shared.push(&mut state, image))
    }

    /// Pictures waiting for a worker.
    pub fn queued(&self) -> usize {
        self.shared.lock().queue.len()
    }

    /// Pictures that can wait at most.
    pub fn capacity(&self) -> usize {
        self.shared.capacity
    }

    /// Worker threads.
    pub fn workers(&self) -> usize {
        self.shared.workers
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
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

    fn push(&self, state: &mut State, image: EncodedImage) -> oneshot::Receiver<Reply> {
        let (reply, receiver) = oneshot::channel();
        state.queue.push_back(Job { image, reply, submitted: Instant::now() });
        self.work.notify_one();
        receiver
    }

    /// The next picture that somebody waits for; none when the engine closes.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            match state.queue.pop_front() {
                Some(job) => {
                    self.room.notify_one();
                    if !job.reply.is_closed() {
                        state.running += 1;
                        return Some(job);
                    }
                }
                None if state.closed => return None,
                None => state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

fn work(shared: &Shared, mut classifier: Classifier) {
    while let Some(job) = shared.next() {
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| classifier.classify(&job.image)));
        let reply = match outcome {
            Ok(reply) => reply.map(|mut prediction| {
                prediction.timings.queue = began - job.submitted;
                prediction
            }),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(ToString::to_string);
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                Err(ClassifyError::Panic(text.unwrap_or_else(|| "no message".into())))
            }
        };
        {
            let mut state = shared.lock();
            state.running -= 1;
            let seconds = began.elapsed().as_secs_f64();
            let old = state.seconds_per_image;
            state.seconds_per_image = if old == 0.0 { seconds } else { 0.9 * old + 0.1 * seconds };
        }
        // The caller may have gone meanwhile.
        let _ = job.reply.send(reply);
    }
}
