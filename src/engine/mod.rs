//! Threads that own classifiers, or their halves, behind one bounded queue counted in pictures.
//!
//! Where the processor runs the network, a worker takes what already waits, up to a batch, decodes it and runs the network on it
//! (`together`). Where a device of its own does, preparers decode and executors run (`apart`). Nothing is waited for to fill a
//! batch. Those who decode are the whole budget of processors, shared by all engines through a [`Budget`]. Work whose caller has
//! gone, or whose deadline has passed, is dropped before it costs anything; a running batch that nobody waits for any more is
//! ended, and so is the decoding of a picture. A panic costs one picture.

mod apart;
mod budget;
#[cfg(test)]
mod checked;
mod devices;
mod idle;
mod pace;
mod state;
mod stats;
mod ticket;
mod together;

/// What `idle` is made of.
mod sync {
    pub(super) use std::sync::{Mutex, MutexGuard, PoisonError};
    pub(super) use std::thread::{Thread, current, park};
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::classify::{Classifier, ClassifyError, Executor, Input, Prediction, Preparer, Ready};

pub use budget::Budget;
pub use devices::DeviceStats;
pub use stats::{BatchStats, EngineStats};
pub use ticket::{Lost, Ticket};

use devices::Device;
use state::{Shared, State};

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
    /// Every device has failed.
    #[error("no device is left that could run the network")]
    NoDevice,
}

/// The threads of an engine, by what they own.
pub enum Crew {
    /// Workers that decode and run the network.
    Together(Vec<Classifier>),
    /// Preparers, and the executors of each device by its name.
    Apart {
        /// As many as decode at once.
        preparers: Vec<Preparer>,
        /// Two keep a device busy.
        devices: Vec<(String, Vec<Executor>)>,
    },
}

/// The front of the queue. Dropping it lets the workers finish what is queued and end; it does not wait for them, because it
/// may happen where nothing may block. [`Budget::wait_for_workers`] does.
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Starts a thread for each of the crew, with room for `capacity` waiting pictures. Who decodes holds a place in `budget`
    /// meanwhile.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(crew: Crew, capacity: usize, budget: Arc<Budget>) -> std::io::Result<Self> {
        let mut state = State::default();
        let (workers, executors, max_batch, shape) = match &crew {
            Crew::Together(classifiers) => (classifiers.len(), 0, 0, None),
            Crew::Apart { preparers, devices } => {
                let all = || devices.iter().flat_map(|(_, executors)| executors);
                let max_batch = all().map(Executor::max_batch).max().unwrap_or(1);
                state.devices = devices.iter().map(|(name, _)| Device::new(name.clone())).collect();
                // What a device takes next; as many lie in its executors' own memory.
                state.room_for_ready = max_batch * devices.len().max(1) + preparers.len();
                (preparers.len(), all().count(), max_batch, all().next().map(Executor::shape))
            }
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            room: Condvar::new(),
            capacity: capacity.max(1),
            workers,
            executors,
            max_batch,
            shape,
            budget,
        });
        let engine = Self { shared };
        match crew {
            Crew::Together(classifiers) => {
                for mut classifier in classifiers {
                    engine.spawn("nbn-worker", move |shared| together::turn(shared, &mut classifier))?;
                }
            }
            Crew::Apart { preparers, devices } => {
                for mut preparer in preparers {
                    engine.spawn("nbn-preparer", move |shared| apart::prepare(shared, &mut preparer))?;
                }
                for (device, (_, executors)) in devices.into_iter().enumerate() {
                    for mut executor in executors {
                        engine.spawn("nbn-executor", move |shared| apart::execute(shared, device, &mut executor))?;
                    }
                }
            }
        }
        Ok(engine)
    }

    /// Starts a thread that takes one `turn` after another, until one says that there is nothing more to do.
    fn spawn(&self, name: &str, mut turn: impl FnMut(&Shared) -> bool + Send + 'static) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let counted = Budget::worker(&shared.budget);
        thread::Builder::new().name(name.into()).spawn(move || {
            loop {
                // A picture's own panics are its answer. What panics beside them costs the pictures at work, never the thread:
                // without it, the queue would fill up and nobody would know why.
                match catch_unwind(AssertUnwindSafe(|| turn(&shared))) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => {
                        tracing::error!(
                            "a worker panicked between images: the images that it was working on are lost, and the worker \
                             continues"
                        );
                        shared.budget.note_panic();
                    }
                }
            }
            drop(turn);
            drop(counted);
        })?;
        Ok(())
    }

    /// Queues all of `inputs` or none. The tickets answer in the order of `inputs`. With a deadline, they are refused
    /// when by the measured rate they would not be answered in time.
    ///
    /// # Errors
    /// When they do not all fit.
    pub fn submit(&self, inputs: Vec<Input>, deadline: Option<Instant>) -> Result<Vec<Ticket>, Refused> {
        let Shared { capacity, workers, executors, max_batch, .. } = *self.shared;
        let mut state = self.shared.lock();
        state.is_open()?;
        if inputs.len() > capacity {
            return Err(Refused::TooMany { images: inputs.len(), capacity });
        }
        if state.waiting() + inputs.len() > capacity {
            state.drop_gone();
            // Their places may be what preparers waited for, whatever becomes of these pictures.
            let workers = state.idle_for_room();
            drop(state);
            workers.into_iter().for_each(|thread| thread.unpark());
            self.shared.told_room();
            state = self.shared.lock();
            state.is_open()?;
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Refused::Late);
        }
        let wait = state.wait(workers, executors, max_batch);
        let retry_after = wait.clamp(Duration::from_secs(1), Duration::from_secs(3600));
        if state.waiting() + inputs.len() > capacity {
            return Err(Refused::Full { retry_after });
        }
        if deadline.is_some_and(|deadline| Instant::now() + wait > deadline) {
            return Err(Refused::TooSlow { retry_after });
        }
        Ok(self.push(state, inputs, deadline))
    }

    /// Queues pictures, or has them ready at once, and wakes who takes them.
    fn push(&self, mut state: MutexGuard<'_, State>, inputs: Vec<Input>, deadline: Option<Instant>) -> Vec<Ticket> {
        let (mut queued, mut ready) = (0, 0);
        let tickets = inputs.into_iter().map(|input| match (&input, self.shared.shape) {
            (Input::Pixels(bytes), Some(shape)) => match Ready::sent(bytes.clone(), shape) {
                Ok(picture) => {
                    ready += 1;
                    state.push(input, Some(picture), deadline)
                }
                // A preparer says why it is none.
                Err(_) => {
                    queued += 1;
                    state.push(input, None, deadline)
                }
            },
            _ => {
                queued += 1;
                state.push(input, None, deadline)
            }
        });
        let tickets = tickets.collect();
        let workers = state.idle[0].take(queued);
        let executors = state.idle[1].take(ready);
        drop(state);
        workers.into_iter().chain(executors).for_each(|thread| thread.unpark());
        tickets
    }

    /// Queues one picture, waiting for room.
    ///
    /// # Errors
    /// Only when the engine is closed.
    pub fn submit_waiting(&self, input: Input) -> Result<Ticket, Refused> {
        let mut state = self.shared.lock();
        while state.waiting() >= self.shared.capacity && state.is_open().is_ok() {
            state.waiting_for_room += 1;
            state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting_for_room -= 1;
        }
        state.is_open()?;
        // One in, one out.
        self.push(state, vec![input], None).pop().ok_or(Refused::Closed)
    }

    /// Pictures that wait, for a worker or for a device, or are prepared for it.
    pub fn queued(&self) -> usize {
        self.shared.lock().waiting()
    }

    /// Pictures that workers, or devices, are at.
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
        let mut state = self.shared.lock();
        let devices = state.devices.iter_mut().map(Device::stats).collect();
        EngineStats { devices, ..state.stats.clone() }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let woken = state.all_idle();
        drop(state);
        woken.into_iter().for_each(|thread| thread.unpark());
        self.shared.room.notify_all();
    }
}
