//! Request bodies, within bounds on size, time, and the memory of all bodies together; and where large ones are parsed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use bytes::BytesMut;
use http_body_util::BodyExt;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::code::Code;
use super::coding::Coding;
use super::problem::{Detail, Problem};
use super::{App, RequestLimits, infer, problem};

/// Bytes that are accounted for at a time.
const BLOCK: usize = 64 << 10;

/// The memory that bodies may take together.
#[derive(Clone)]
pub(crate) struct BodyMemory(Arc<Semaphore>);

/// A body in memory. Its share of the bound is given back when this is dropped.
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    _share: Option<OwnedSemaphorePermit>,
}

impl BodyMemory {
    pub(crate) fn of(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new((bytes / BLOCK).clamp(1, Semaphore::MAX_PERMITS))))
    }
}

/// Bytes from which on a body is parsed by [`Parsers`]: a smaller one takes less than a millisecond.
const LARGE: usize = 256 << 10;

/// Threads on which large bodies are parsed, at most one per processor, so that those that serve connections stay free.
pub(crate) struct Parsers(Arc<Semaphore>);

impl Default for Parsers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))))
    }
}

impl Parsers {
    /// Does `work` on `bytes` bytes of a body; on a thread of its own when they are many. `work` may await nothing but
    /// what is in memory. A panic there costs this request only. Work that waits for its turn is not begun once the future
    /// is dropped.
    async fn run<T, W>(&self, bytes: usize, work: W) -> Result<T, Problem>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, Problem>> + Send + 'static,
    {
        if bytes < LARGE {
            return work.await;
        }
        let place = self.0.clone().acquire_owned().await;
        let runtime = Handle::current();
        let done = tokio::task::spawn_blocking(move || {
            let _place = place;
            runtime.block_on(work)
        });
        done.await.unwrap_or_else(|error| Err(problem::panicked(error.try_into_panic().ok())))
    }
}

/// Parses `bytes` bytes of a request by `work`, as [`Parsers::run`] does, until `deadline`.
pub(crate) async fn parse<T, W>(app: &App, bytes: usize, deadline: Instant, work: W) -> Result<T, Problem>
where
    T: Send + 'static,
    W: Future<Output = Result<T, Problem>> + Send + 'static,
{
    timeout_at(deadline, app.parsers.run(bytes, work)).await.unwrap_or_else(|_| Err(infer::late(app)))
}

/// Reads a body, which may be compressed, as [`read`] does.
pub(crate) async fn receive(app: &App, body: Body, headers: &HeaderMap, deadline: Instant) -> Result<Held, Problem> {
    let coding = Coding::of(headers)?;
    let packed = read_packed(body, headers, &app.limits, &app.memory, deadline).await?;
    match coding {
        None => Ok(packed),
        Some(coding) => {
            let (limit, memory) = (app.limits.max_body_bytes, app.memory.clone());
            parse(app, LARGE, deadline, async move { packed.unpacked(coding, limit, &memory) }).await
        }
    }
}

impl Held {
    /// Bytes that another share stands for.
    #[cfg(feature = "grpc")]
    pub(crate) fn of(bytes: Bytes) -> Self {
        Self { bytes, _share: None }
    }

    /// What it holds, at most `limit` bytes, and a share for as many.
    pub(crate) fn unpacked(self, coding: Coding, limit: usize, memory: &BodyMemory) -> Result<Self, Problem> {
        let mut share = None;
        let bytes = coding.unpack(&self.bytes, |length| {
            if length > limit {
                return Err(too_large(&format!("longer than {limit} bytes when it is unpacked"), limit));
            }
            grow(&mut share, memory, length)
        })?;
        Ok(Self { bytes, _share: share })
    }
}

fn too_large(size: &str, limit: usize) -> Problem {
    let detail =
        format!("the body is {size}; this server accepts up to {limit} bytes: send less, or raise --max-body-mb");
    Problem::new(Code::BodyTooLarge, detail).with_limit(limit as u64)
}

/// Makes `share` large enough for `length` bytes.
fn grow(share: &mut Option<OwnedSemaphorePermit>, memory: &BodyMemory, length: usize) -> Result<(), Problem> {
    let blocks = length.div_ceil(BLOCK);
    let held = share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
    if blocks > held {
        let more = u32::try_from(blocks - held).unwrap_or(u32::MAX);
        let more = memory.0.clone().try_acquire_many_owned(more).map_err(|_| full())?;
        match share {
            Some(share) => share.merge(more),
            None => *share = Some(more),
        }
    }
    Ok(())
}

/// Reads a body that is not compressed and must be complete at `deadline`.
pub(crate) async fn read(
    body: Body,
    headers: &HeaderMap,
    limits: &RequestLimits,
    memory: &BodyMemory,
    deadline: Instant,
) -> Result<Held, Problem> {
    Coding::none(headers)?;
    read_packed(body, headers, limits, memory, deadline).await
}

/// Reads a body as it comes.
async fn read_packed(
    mut body: Body,
    headers: &HeaderMap,
    limits: &RequestLimits,
    memory: &BodyMemory,
    deadline: Instant,
) -> Result<Held, Problem> {
    let limit = limits.max_body_bytes;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if let Some(size) = announced.filter(|&size| size > limit as u64) {
        return Err(too_large(&format!("{size} bytes"), limit));
    }
    let mut share: Option<OwnedSemaphorePermit> = None;
    let mut whole = BytesMut::new();
    loop {
        let frame = timeout_at(deadline, body.frame()).await.map_err(|_| slow(limits.timeout))?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| {
            Problem::new(
                Code::BodyBroken,
                "the body ended before its announced length, or its transfer coding is broken",
            )
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > limit {
            return Err(too_large(&format!("longer than {limit} bytes"), limit));
        }
        grow(&mut share, memory, whole.len() + data.len())?;
        if whole.is_empty() {
            // What has come with the first frame need not be moved.
            if axum::body::HttpBody::is_end_stream(&body) {
                return Ok(Held { bytes: data, _share: share });
            }
            whole.reserve(announced.map_or(data.len(), |n| n as usize).min(1 << 20).max(data.len()));
        }
        whole.extend_from_slice(&data);
    }
    Ok(Held { bytes: whole.freeze(), _share: share })
}

/// As [`read`], of a request that has little to say: at most `most` bytes.
pub(crate) async fn read_little(
    body: Body,
    headers: &HeaderMap,
    limits: &RequestLimits,
    memory: &BodyMemory,
    deadline: Instant,
    most: usize,
) -> Result<Held, Problem> {
    let most = limits.max_body_bytes.min(most);
    let limits = RequestLimits { max_body_bytes: most, ..*limits };
    read(body, headers, &limits, memory, deadline).await.map_err(|problem| match problem.status() {
        // No flag raises this.
        StatusCode::PAYLOAD_TOO_LARGE => Problem {
            detail: Detail::new(format!("the body is too large; a request of this kind has at most {most} bytes")),
            ..problem
        },
        _ => problem,
    })
}

fn slow(limit: Duration) -> Problem {
    let detail = format!("the body did not arrive within {} s (--timeout)", limit.as_secs_f64());
    Problem::new(Code::SlowBody, detail).with_limit(limit.as_secs())
}

fn full() -> Problem {
    let detail = "the requests in progress fill the memory for request bodies (--max-buffered-mb): try again";
    Problem::new(Code::Memory, detail).retry_in(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Ends when the test's own thread, which also serves the future, has sent a word.
    async fn waits_for(word: mpsc::Receiver<()>) -> Result<&'static str, Problem> {
        word.recv_timeout(Duration::from_secs(10))
            .map_err(|_| Problem::new(Code::Internal, "nobody else could run"))?;
        Ok("parsed")
    }

    #[tokio::test]
    async fn the_thread_that_serves_connections_goes_on_while_a_large_body_is_parsed() {
        let parsers = Parsers::default();
        let (sender, word) = mpsc::channel();
        let others = async { sender.send(()).unwrap() };
        let (parsed, ()) = tokio::join!(parsers.run(LARGE, waits_for(word)), others);
        assert_eq!(parsed.unwrap(), "parsed");
    }

    #[tokio::test]
    async fn no_more_large_bodies_are_parsed_at_once_than_there_are_processors() {
        let parsers = Parsers(Arc::new(Semaphore::new(1)));
        let (sender, word) = mpsc::channel();
        // What is done says so itself: an answer may be seen later than the next piece of work begins.
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let says = |name| {
            let order = order.clone();
            move || order.lock().unwrap().push(name)
        };
        let (first, second) = (says("first"), says("second"));
        let first = parsers.run(LARGE, async move {
            waits_for(word).await?;
            first();
            Ok(())
        });
        let second = parsers.run(LARGE, async move {
            second();
            Ok(())
        });
        let (first, second, ()) = tokio::join!(first, second, async { sender.send(()).unwrap() });
        first.and(second).unwrap();
        assert_eq!(*order.lock().unwrap(), ["first", "second"]);
    }

    #[tokio::test]
    async fn a_panic_over_a_large_body_is_a_500_that_keeps_the_reason_to_the_log() {
        let parsers = Parsers(Arc::new(Semaphore::new(1)));
        for _ in 0..2 {
            let failed = parsers.run::<(), _>(LARGE, async { panic!("on purpose") }).await.unwrap_err();
            assert_eq!(failed.status(), StatusCode::INTERNAL_SERVER_ERROR);
            assert!(!failed.detail.to_string().contains("on purpose"));
        }
    }
}
