//! Readers, workers and the writer, at once.
//!
//! A reader takes the source's next picture and, still holding the source, a place among the rows to come: so rows keep the
//! source's order, whichever reader is first. Then it reads the file and hands it to the engine. The writer goes from place
//! to place. Places and bytes in flight are bounded, so the slowest stage sets the pace of all.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::rows::{Output, Row, Scoring, WriteError};
use super::source::{Content, Fault, Item, Source, Stopped};
use super::summary::{Summary, Tally};
use crate::classify::{ClassifyError, Input, Prediction};
use crate::engine::{Engine, Refused, Ticket};
use crate::pixels::DecodeError;

/// Rows that are under way, per worker.
const PLACES: usize = 64;
/// Bytes that a picture of unknown size counts as until it is read.
const UNKNOWN: u64 = 4 << 20;

/// 128 bits of a key's SHA-256.
pub(super) type KeyHash = u128;

pub(super) fn hash(key: &str) -> KeyHash {
    Sha256::digest(key.as_bytes()).iter().take(16).fold(0, |n, byte| n << 8 | u128::from(*byte))
}

/// How a run is done.
pub struct BatchOptions {
    /// Bytes of a file, at most.
    pub max_file_bytes: u64,
    /// Bytes of pictures that are read and not yet scored, at most.
    pub memory: u64,
    /// Files that are read at once.
    pub readers: usize,
    /// Whether a picture that the source names again is left out.
    pub skip_duplicates: bool,
    /// How often each key has a row already.
    pub committed: HashMap<KeyHash, u32>,
    /// When to take nothing more from the source; what is under way is finished.
    pub stopped: Stopped,
}

/// Scores what `source` names and writes a row for each to `output`, in its order. `progress` is called after every row.
///
/// # Errors
/// Only when a row cannot be written.
pub fn run(
    source: Source,
    engine: &Engine,
    scoring: &Scoring<'_>,
    output: &mut dyn Output,
    options: BatchOptions,
    mut progress: impl FnMut(&Summary),
) -> Result<Summary, WriteError> {
    let began = Instant::now();
    let BatchOptions { max_file_bytes, memory, readers, skip_duplicates, committed, stopped } = options;
    let counts = Counts::default();
    let seen = skip_duplicates.then(HashSet::new);
    let feed = Feed { source, committed, seen, counts: &counts, stopped: stopped.clone() };
    let reader = Reader {
        feed: Mutex::new(Some(feed)),
        memory: Memory::of(memory),
        engine,
        max_file_bytes,
        stopped: stopped.clone(),
        counts: &counts,
    };
    let mut tally = Tally::new(&scoring.manifest.classes);
    thread::scope(|scope| {
        let (places, ordered) = sync_channel(PLACES * engine.workers().max(1));
        for n in 0..readers.max(1) {
            let (reader, places) = (&reader, places.clone());
            let thread = thread::Builder::new().name(format!("nbn-reader-{n}"));
            let spawned = thread.spawn_scoped(scope, move || reader.work(&places));
            // The first is needed, the others help.
            if n == 0 {
                spawned?;
            }
        }
        drop(places);
        for place in ordered {
            let Pending { key, label, outcome, held } = place;
            let settled = settle(&outcome, &stopped);
            drop(held);
            let began = Instant::now();
            let outcome = match settled {
                Ok(prediction) => {
                    let (scores, best) = scoring.score(&prediction);
                    tally.scored(best, label.as_deref(), scores.abstained.is_some(), &prediction.timings);
                    Ok(scores)
                }
                Err(Failure::Picture(fault)) => {
                    tally.failed(&fault);
                    Err(fault.detail)
                }
                Err(Failure::Source(reason)) => {
                    // A device that was lost is told once, not for every picture.
                    if !tally.summary.broken.contains(&reason) {
                        tally.summary.broken.push(reason);
                    }
                    continue;
                }
            };
            output.write(&Row { key, label, outcome }).inspect_err(|_| stopped.end())?;
            tally.wrote(began.elapsed());
            counts.tell(&mut tally.summary);
            progress(&tally.summary);
        }
        let began = Instant::now();
        output.finish()?;
        tally.wrote(began.elapsed());
        Ok::<_, WriteError>(())
    })?;
    counts.tell(&mut tally.summary);
    tally.summary.interrupted = counts.cut.load(Ordering::Relaxed);
    Ok(tally.finish(began.elapsed(), Duration::from_nanos(counts.read_nanos.load(Ordering::Relaxed))))
}

#[derive(Default)]
struct Counts {
    resumed: AtomicU64,
    duplicates: AtomicU64,
    read_nanos: AtomicU64,
    /// Whether a stop left out what the source may still have.
    cut: AtomicBool,
}

impl Counts {
    fn tell(&self, summary: &mut Summary) {
        summary.resumed = self.resumed.load(Ordering::Relaxed);
        summary.duplicates = self.duplicates.load(Ordering::Relaxed);
    }
}

/// The source, less what has a row already.
struct Feed<'a> {
    source: Source,
    committed: HashMap<KeyHash, u32>,
    seen: Option<HashSet<KeyHash>>,
    counts: &'a Counts,
    stopped: Stopped,
}

impl Feed<'_> {
    fn next(&mut self) -> Option<Item> {
        while !self.stopped.now() {
            let item = self.source.next()?;
            if self.stopped.now() {
                // A source that a stop cut short looks like one at its end: this would be the next one's first.
                break;
            }
            if item.is_broken() || (self.seen.is_none() && self.committed.is_empty()) {
                return Some(item);
            }
            let key = hash(&item.key);
            if self.seen.as_mut().is_some_and(|seen| !seen.insert(key)) {
                self.counts.duplicates.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            match self.committed.get_mut(&key) {
                Some(left) if *left > 0 => *left -= 1,
                _ => return Some(item),
            }
            self.counts.resumed.fetch_add(1, Ordering::Relaxed);
        }
        None
    }
}

/// A row to come.
struct Pending<'a> {
    key: String,
    label: Option<String>,
    outcome: Receiver<Result<Ticket, Failure>>,
    held: Arc<Held<'a>>,
}

/// Why there is no ticket.
enum Failure {
    /// The picture's fault.
    Picture(Fault),
    /// The source cannot be read further.
    Source(String),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Picture(fault)
    }
}

/// A picture that a reader took, and where it tells what became of it.
struct Taken<'a> {
    content: Content,
    outcome: SyncSender<Result<Ticket, Failure>>,
    held: Arc<Held<'a>>,
}

struct Reader<'a> {
    /// None once nothing more is taken.
    feed: Mutex<Option<Feed<'a>>>,
    memory: Memory,
    engine: &'a Engine,
    max_file_bytes: u64,
    stopped: Stopped,
    counts: &'a Counts,
}

impl<'a> Reader<'a> {
    fn work(&'a self, places: &SyncSender<Pending<'a>>) {
        while let Some(Taken { content, outcome, held }) = self.take(places) {
            let began = Instant::now();
            let bytes = match content {
                Content::At(place) => place.read(self.max_file_bytes).map_err(Failure::Picture),
                Content::Bytes(bytes) => Ok(bytes),
                Content::Lost(fault) => Err(Failure::Picture(fault)),
                Content::Broken(reason) => Err(Failure::Source(reason)),
            };
            held.keep(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64));
            drop(held);
            self.counts.read_nanos.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
            let ticket = bytes.and_then(|bytes| {
                let ticket = self.engine.submit_waiting(Input::Encoded(bytes));
                ticket.map_err(|refused| match refused {
                    Refused::NoDevice => no_device(&self.stopped, refused.to_string()),
                    _ => Fault::new("internal", refused.to_string()).into(),
                })
            });
            // The writer may have given up.
            let _ = outcome.send(ticket);
        }
    }

    /// The next picture, with a place for its row.
    fn take(&'a self, places: &SyncSender<Pending<'a>>) -> Option<Taken<'a>> {
        let mut feed = lock(&self.feed);
        let next = feed.as_mut()?.next();
        if next.is_none() && self.stopped.told() {
            self.counts.cut.store(true, Ordering::Relaxed);
        }
        let Some(Item { key, label, content }) = next else {
            *feed = None;
            return None;
        };
        let size = match &content {
            Content::At(place) => place.size().unwrap_or(UNKNOWN),
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Lost(_) | Content::Broken(_) => 0,
        };
        // In the rows' order: what comes later cannot keep the memory that an earlier picture waits for.
        let held = Arc::new(self.memory.take(size.min(self.max_file_bytes)));
        let (sender, outcome) = sync_channel(1);
        let sent = places.send(Pending { key, label, outcome, held: held.clone() });
        if sent.is_err() {
            *feed = None;
            return None;
        }
        Some(Taken { content, outcome: sender, held })
    }
}

/// Bytes that may be held.
struct Memory {
    /// Below 0 where pictures were larger than was known.
    free: Mutex<i64>,
    freed: Condvar,
    all: i64,
}

struct Held<'a> {
    memory: &'a Memory,
    bytes: AtomicI64,
}

fn signed(bytes: u64) -> i64 {
    bytes.try_into().unwrap_or(i64::MAX)
}

impl Held<'_> {
    /// Holds `bytes` from now on. More than before is not waited for, as earlier pictures may wait for this one's row: it is
    /// a debt, until whose end nothing more is taken.
    fn keep(&self, bytes: u64) {
        let bytes = signed(bytes);
        let before = self.bytes.swap(bytes, Ordering::Relaxed);
        // As a rule nothing changes.
        if before != bytes {
            *lock(&self.memory.free) += before - bytes;
            self.memory.freed.notify_all();
        }
    }
}

impl Memory {
    fn of(bytes: u64) -> Self {
        let all = signed(bytes).max(1);
        Self { free: Mutex::new(all), freed: Condvar::new(), all }
    }

    /// Waits until there are `bytes`; more than all are taken for all.
    fn take(&self, bytes: u64) -> Held<'_> {
        let bytes = signed(bytes).min(self.all);
        let mut free = lock(&self.free);
        while *free < bytes {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        Held { memory: self, bytes: bytes.into() }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.keep(0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes nothing more from the source: no device is left. What has no row yet is for the next run.
fn no_device(stopped: &Stopped, reason: String) -> Failure {
    stopped.end();
    Failure::Source(reason)
}

fn settle(outcome: &Receiver<Result<Ticket, Failure>>, stopped: &Stopped) -> Result<Prediction, Failure> {
    let gone = || Fault::new("internal", "the worker gave no answer");
    let ticket = outcome.recv().map_err(|_| gone())??;
    let reply = ticket.wait().map_err(|_| gone())?;
    reply.map_err(|error| match &error {
        ClassifyError::Image(DecodeError::Empty) => Fault::new("empty_image", "the file is empty (0 bytes)").into(),
        ClassifyError::Image(image) => Fault::new(image.code(), error.to_string()).into(),
        lost if lost.is_lost_device() => no_device(stopped, Refused::NoDevice.to_string()),
        _ => Fault::new("internal", error.to_string()).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_larger_than_was_known_is_a_debt_that_is_repaid() {
        let memory = Memory::of(10);
        let first = memory.take(4);
        first.keep(13);
        assert_eq!(*lock(&memory.free), -3);
        thread::scope(|scope| {
            let next = scope.spawn(|| memory.take(100).bytes.load(Ordering::Relaxed));
            drop(first);
            assert_eq!(next.join().unwrap_or(0), 10);
        });
        assert_eq!(*lock(&memory.free), 10);
    }
}
