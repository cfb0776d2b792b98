//! Requests whose head hyper cannot read. It answers them by itself, with a status alone; here a body is put behind it that
//! says what is wrong.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::StatusCode;
use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::code::Code;
use super::connections::MAX_HEAD;
use super::envelope::{REQUEST_ID, random_hex};
use super::problem::ProblemBody;

/// How long the rest of such a request is read: a connection that is closed before would be reset, and its client might
/// never see the answer.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of it that are read at most.
const LINGER_BYTES: usize = 1 << 20;

/// A stream to which an answer without a word is written with one.
pub(super) struct Worded<S> {
    stream: S,
    /// Of an answer with words, what was not yet written.
    rest: Bytes,
    /// After such an answer.
    end: Option<End>,
}

struct End {
    told: bool,
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl<S> Worded<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, rest: Bytes::new(), end: None }
    }

    fn answer(&mut self, answer: Bytes) {
        self.rest = answer;
        self.end = Some(End { told: false, until: Box::pin(sleep(LINGER)), left: LINGER_BYTES });
    }
}

impl<S: AsyncRead + Unpin> Worded<S> {
    /// Reads what comes, for a while, and forgets it.
    fn poll_to_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(end) = &mut self.end else { return Poll::Ready(()) };
        let mut piece = [0; 8 << 10];
        while end.left > 0 && end.until.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut piece);
            match ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => end.left = end.left.saturating_sub(buffer.filled().len()),
                _ => break,
            }
        }
        Poll::Ready(())
    }
}

impl<S: AsyncWrite + Unpin> Worded<S> {
    fn poll_rest(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.rest.has_remaining() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, &self.rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.rest.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

/// In place of `head`, when it is all that hyper says by itself to a request that it could not read.
fn worded(head: &[u8]) -> Option<Bytes> {
    if !head.starts_with(b"HTTP/1.1 4") || !head.ends_with(b"\r\n\r\n") {
        return None;
    }
    let text = std::str::from_utf8(head).ok()?.strip_suffix("\r\n\r\n")?;
    let (status, fields) = text.split_once("\r\n")?;
    let status = StatusCode::from_bytes(status.split(' ').nth(1)?.as_bytes()).ok()?;
    let detail = match status {
        StatusCode::BAD_REQUEST => {
            "the request's head is not valid HTTP/1.1: look at its first line and its header lines, or at the protocol, if \
             it was not meant to be HTTP"
                .into()
        }
        StatusCode::URI_TOO_LONG => "the request's path is too long: send options in the body, or fewer".into(),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            format!("the request's head is longer than {MAX_HEAD} bytes, or has more than 100 headers: send fewer")
        }
        _ => return None,
    };
    // Whatever a handler answers has a name.
    if fields.contains(REQUEST_ID) || !fields.split("\r\n").any(|field| field == "content-length: 0") {
        return None;
    }
    let request_id = random_hex();
    tracing::debug!(id = request_id, %status, "refused: the head cannot be read");
    let body = ProblemBody {
        kind: "about:blank",
        title: status.canonical_reason()?,
        status: status.as_u16(),
        detail,
        instance: String::new(),
        code: if status == StatusCode::BAD_REQUEST { Code::BadRequest } else { Code::Rejected(status) },
        request_id: request_id.clone(),
        limit: None,
    };
    let body = serde_json::to_string(&body).ok()?;
    let length = format!("content-length: {}", body.len());
    let fields = fields.replace("content-length: 0", &length);
    let status = status.to_string();
    Some(
        format!(
            "HTTP/1.1 {status}\r\n{fields}\r\ncontent-type: application/problem+json\r\n{REQUEST_ID}: {request_id}\r\n\r\n{body}"
        )
        .into(),
    )
}

impl<S: AsyncRead + Unpin> AsyncRead for Worded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Worded<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_rest(context))?;
        match worded(bytes) {
            Some(answer) => {
                self.answer(answer);
                Poll::Ready(Ok(bytes.len()))
            }
            None => Pin::new(&mut self.stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_rest(context))?;
        match parts {
            [head] if let Some(answer) = worded(head) => {
                self.answer(answer);
                Poll::Ready(Ok(head.len()))
            }
            _ => Pin::new(&mut self.stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(context))?;
        if !self.end.as_ref().is_some_and(|end| end.told) {
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        }
        if let Some(end) = &mut self.end {
            end.told = true;
        }
        self.poll_to_end(context).map(Ok)
    }
}
