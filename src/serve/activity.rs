//! When a connection is to be closed: it is idle, a request's head does not arrive, or an answer is not taken.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::Version;
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// Bytes of an answer that are handed to HTTP/2 at a time. It takes the next only when the client has room for it.
pub(super) const PIECE: usize = 16 << 10;

/// How long a client that will send nothing more is still answered over HTTP/1. It may have gone: that looks the same.
const HALF_CLOSED: Duration = Duration::from_secs(2);

/// How long a connection may wait for its peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For the rest of a request's head, and for the first one.
    pub(super) head: Duration,
    /// For the next request.
    pub(super) idle: Duration,
    /// For room to send more of an answer.
    pub(super) answer: Duration,
}

/// Why a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closing {
    /// Nothing is under way: the peer is told.
    Idle,
    /// The peer stopped in the middle of something.
    Stuck,
}

/// What a connection is at.
pub(super) struct Activity {
    patience: Patience,
    state: Mutex<State>,
}

struct State {
    /// Since when a request's head is under way; with HTTP/2 only until the first request.
    head: Option<Instant>,
    /// When the last answer ended.
    idle_since: Instant,
    http2: bool,
    /// Requests whose answer has not ended.
    open: usize,
    /// Of each answer over HTTP/2 that is being sent, when more of it was last taken.
    answers: HashMap<u64, Instant>,
    next: u64,
    /// Who waits for the end of the answer to a client that will send nothing more.
    last: Option<Waker>,
}

impl Activity {
    /// Of a connection that begins now.
    pub(super) fn new(patience: Patience) -> Arc<Self> {
        let now = Instant::now();
        let state = State {
            head: Some(now),
            idle_since: now,
            http2: false,
            open: 0,
            answers: HashMap::new(),
            next: 0,
            last: None,
        };
        Arc::new(Self { patience, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes have come.
    fn read(&self) {
        let mut state = self.lock();
        if state.open == 0 && !state.http2 && state.head.is_none() {
            state.head = Some(Instant::now());
        }
    }

    /// Whether a request over HTTP/1 is being answered; if so, `context` is woken when that ends.
    fn is_answering(&self, context: &Context<'_>) -> bool {
        let mut state = self.lock();
        let is_answering = state.open > 0 && !state.http2;
        state.last = is_answering.then(|| context.waker().clone());
        is_answering
    }

    /// A request's head is complete. Dropping the guard says that its answer has ended.
    pub(super) fn begin(self: &Arc<Self>, version: Version) -> Open {
        let mut state = self.lock();
        state.head = None;
        state.http2 = version == Version::HTTP_2;
        state.open += 1;
        Open { activity: self.clone(), answer: None }
    }

    /// When to look again, and what is to be done at that time if nothing happens.
    pub(super) fn due(&self) -> (Instant, Closing) {
        let state = self.lock();
        let waiting = match state.head {
            Some(since) if state.open == 0 => Some((since + self.patience.head, Closing::Stuck)),
            _ if state.open == 0 => Some((state.idle_since + self.patience.idle, Closing::Idle)),
            _ => None,
        };
        let stuck = state.answers.values().min().map(|taken| (*taken + self.patience.answer, Closing::Stuck));
        let later = (Instant::now() + self.patience.idle, Closing::Idle);
        [waiting, stuck].into_iter().flatten().min_by_key(|(due, _)| *due).unwrap_or(later)
    }

    /// What is to be done now, if anything.
    pub(super) fn overdue(&self) -> Option<Closing> {
        let (due, closing) = self.due();
        (due <= Instant::now()).then_some(closing)
    }
}

/// A request that is being answered.
pub(super) struct Open {
    activity: Arc<Activity>,
    answer: Option<u64>,
}

impl Open {
    /// Puts the guard into the answer's body.
    pub(super) fn guard(mut self, body: Body) -> Body {
        let pieces = {
            let mut state = self.activity.lock();
            if state.http2 {
                let id = state.next;
                state.next += 1;
                state.answers.insert(id, Instant::now());
                self.answer = Some(id);
            }
            state.http2
        };
        Body::new(Guarded { body, open: self, pieces, rest: Bytes::new(), begun: false })
    }

    /// More of the answer was taken.
    fn taken(&self) {
        if let Some(answer) = self.answer {
            self.activity.lock().answers.insert(answer, Instant::now());
        }
    }

    /// All there is of the answer was taken; more is still to come.
    fn is_ahead(&self) {
        if let Some(answer) = self.answer {
            self.activity.lock().answers.remove(&answer);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.activity.lock();
        state.open -= 1;
        state.idle_since = Instant::now();
        if let Some(answer) = self.answer {
            state.answers.remove(&answer);
        }
        let last = if state.open == 0 { state.last.take() } else { None };
        drop(state);
        if let Some(last) = last {
            last.wake();
        }
    }
}

/// An answer's body, which HTTP/2 gets in pieces: of a body in one piece it would keep what the client has no room for, and
/// nobody could tell whether the client takes it.
struct Guarded {
    body: Body,
    open: Open,
    pieces: bool,
    /// Of a frame that is handed out in pieces.
    rest: Bytes,
    /// Whether a piece was handed out.
    begun: bool,
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.open.taken();
        if self.rest.is_empty() {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) if self.pieces => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Poll::Pending => {
                    self.open.is_ahead();
                    return Poll::Pending;
                }
                other => return other,
            }
        }
        self.begun = true;
        let piece = self.rest.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        // After a piece, the end is told only when it is asked for: once the piece was taken. Of an empty body it is known at
        // once, and gRPC wants its errors' heads to say so.
        !self.begun && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.body.size_hint();
        let rest = self.rest.len() as u64;
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

/// A stream that notes when bytes come, and keeps their end to itself for a while when a request is being answered: to hyper,
/// it means that nobody waits for the answer.
pub(super) struct Noted<S> {
    stream: S,
    activity: Arc<Activity>,
    /// Until when, once the end was seen.
    ended: Option<Pin<Box<Sleep>>>,
}

impl<S> Noted<S> {
    pub(super) fn new(stream: S, activity: Arc<Activity>) -> Self {
        Self { stream, activity, ended: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        if self.ended.is_none() {
            let read = Pin::new(&mut self.stream).poll_read(context, buffer);
            let is_end = matches!(read, Poll::Ready(Ok(()))) && buffer.filled().len() == before && room > 0;
            if !is_end {
                self.note(&buffer.filled()[before..]);
                return read;
            }
            self.ended = Some(Box::pin(sleep(HALF_CLOSED)));
        }
        let is_answering = self.activity.is_answering(context);
        match &mut self.ended {
            Some(until) if is_answering => until.as_mut().poll(context).map(Ok),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl<S> Noted<S> {
    fn note(&self, bytes: &[u8]) {
        // Empty lines before a request are passed over (RFC 9112, 2.2): no head begins with them.
        if bytes.iter().any(|byte| !b"\r\n".contains(byte)) {
            self.activity.read();
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noted<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience =
        Patience { head: Duration::from_secs(10), idle: Duration::from_secs(75), answer: Duration::from_secs(30) };

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_less_time_than_an_idle_connection() {
        let activity = Activity::new(PATIENCE);
        pass(9).await;
        assert_eq!(activity.overdue(), None);
        pass(1).await;
        assert_eq!(activity.overdue(), Some(Closing::Stuck), "the first request does not come");
        let open = activity.begin(Version::HTTP_11);
        pass(1000).await;
        assert_eq!(activity.overdue(), None, "it is being answered");
        drop(open);
        pass(74).await;
        assert_eq!(activity.overdue(), None);
        pass(1).await;
        assert_eq!(activity.overdue(), Some(Closing::Idle));
        activity.read();
        assert_eq!(activity.overdue(), None, "the next head begins");
        pass(10).await;
        assert_eq!(activity.overdue(), Some(Closing::Stuck), "and does not end");
    }

    #[tokio::test(start_paused = true)]
    async fn what_http_2_sends_between_requests_does_not_keep_a_connection() {
        let activity = Activity::new(PATIENCE);
        drop(activity.begin(Version::HTTP_2));
        for _ in 0..5 {
            pass(15).await;
            // Pings.
            activity.read();
        }
        assert_eq!(activity.overdue(), Some(Closing::Idle));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_over_http_2_must_be_taken_piece_by_piece() {
        let activity = Activity::new(PATIENCE);
        let answer = vec![7; PIECE + 5];
        let mut body = activity.begin(Version::HTTP_2).guard(Body::from(answer.clone()));
        assert_eq!(body.size_hint().exact(), Some(answer.len() as u64));
        let mut taken = Vec::new();
        for expected in [PIECE, 5] {
            pass(29).await;
            assert_eq!(activity.overdue(), None);
            let frame = http_body_util::BodyExt::frame(&mut body).await.unwrap().unwrap();
            let data = frame.into_data().unwrap();
            assert_eq!(data.len(), expected);
            taken.extend(data);
        }
        assert_eq!(taken, answer);
        assert!(!body.is_end_stream());
        assert!(activity.begin(Version::HTTP_2).guard(Body::empty()).is_end_stream());
        pass(30).await;
        assert_eq!(activity.overdue(), Some(Closing::Stuck), "nobody asked for the end");
        assert!(http_body_util::BodyExt::frame(&mut body).await.is_none());
        assert_eq!(activity.overdue(), None);
        drop(body);
        pass(75).await;
        assert_eq!(activity.overdue(), Some(Closing::Idle));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_goes_on_later_waits_for_nobody() {
        let activity = Activity::new(PATIENCE);
        let (sender, pieces) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(1);
        let stream = futures_util::stream::unfold(pieces, |mut pieces| async { Some((pieces.recv().await?, pieces)) });
        let mut body = activity.begin(Version::HTTP_2).guard(Body::from_stream(stream));
        let mut context = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut body).poll_frame(&mut context).is_pending());
        pass(1000).await;
        assert_eq!(activity.overdue(), None, "nothing was there to be taken");
        sender.send(Ok(Bytes::from("more"))).await.unwrap();
        assert!(Pin::new(&mut body).poll_frame(&mut context).is_ready());
        pass(30).await;
        assert_eq!(activity.overdue(), Some(Closing::Stuck), "nobody asked for what follows");
    }
}
