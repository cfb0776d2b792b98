//! A caller's claim on one picture's answer. Dropping it says that nobody waits any more.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::sync::oneshot;

use super::Reply;
use crate::stop::Stop;

/// Whether somebody waits for a picture, and the batch it is in.
pub(super) struct Caller {
    /// Ends the picture's own decoding.
    stop: Stop,
    batch: Mutex<Option<Arc<Batch>>>,
}

/// A batch at work.
struct Batch {
    waiting: AtomicUsize,
    stop: Arc<Stop>,
}

/// A claim on an answer: a future of it.
pub struct Ticket {
    receiver: oneshot::Receiver<Reply>,
    caller: Arc<Caller>,
}

/// The engine went away without an answer; it cannot, short of a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the worker gave no answer")]
pub struct Lost;

impl Caller {
    /// Waits until `deadline`.
    pub(super) fn until(deadline: Option<Instant>) -> Self {
        Self { stop: Stop::at(deadline), batch: Mutex::default() }
    }

    /// What ends the work on this picture alone.
    pub(super) fn stop(&self) -> &Stop {
        &self.stop
    }

    pub(super) fn gone(&self) -> bool {
        self.stop.asked_by_somebody()
    }
}

/// Notes that the pictures of `callers` are in one batch, which `stop` ends once all of them have gone.
pub(super) fn begin<'a>(callers: impl ExactSizeIterator<Item = &'a Arc<Caller>>, stop: &Arc<Stop>) {
    let batch = Arc::new(Batch { waiting: AtomicUsize::new(callers.len()), stop: stop.clone() });
    for caller in callers {
        let mut place = caller.batch.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(batch.clone());
        // Under the lock: a caller who goes now either was seen here, or sees the batch.
        if caller.gone() {
            batch.leave();
        }
    }
}

impl Batch {
    fn leave(&self) {
        if self.waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.stop.ask();
        }
    }
}

impl Ticket {
    pub(super) fn new(receiver: oneshot::Receiver<Reply>, caller: Arc<Caller>) -> Self {
        Self { receiver, caller }
    }

    /// Waits for the answer on a thread that may block.
    ///
    /// # Errors
    /// When the engine went away.
    pub fn wait(mut self) -> Result<Reply, Lost> {
        let (_, empty) = oneshot::channel();
        std::mem::replace(&mut self.receiver, empty).blocking_recv().map_err(|_| Lost)
    }
}

impl Future for Ticket {
    type Output = Result<Reply, Lost>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receiver).poll(context).map_err(|_| Lost)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let place = self.caller.batch.lock().unwrap_or_else(PoisonError::into_inner);
        self.caller.stop.ask();
        if let Some(batch) = place.as_ref() {
            batch.leave();
        }
    }
}
