//! Connections: accepting, bounding, draining.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::activity::{Activity, Closing, Noted, PIECE, Patience};
use super::tls::Tls;
use super::unread::Worded;
use super::{ConnectionLimits, Ended, Shared};

/// Bytes of a request's head.
pub(super) const MAX_HEAD: usize = 64 << 10;
/// Bytes of an answer that the system holds for a client. It grows them to megabytes by itself, and says that there is room
/// again only when a third is free: a client that reads slowly but steadily would look stuck.
const SEND_BUFFER: usize = 128 << 10;
/// Requests at once on an HTTP/2 connection.
const MAX_STREAMS: u32 = 128;

/// A listener and what it answers with.
pub(super) struct Server {
    pub(super) listener: TcpListener,
    pub(super) router: Router,
    pub(super) tls: Option<Arc<Tls>>,
}

/// Serves all of `servers` until `stop`, then drains them.
pub(super) async fn serve(
    servers: Vec<Server>,
    shared: Arc<Shared>,
    limits: ConnectionLimits,
    drain_timeout: Duration,
    mut stop: watch::Receiver<bool>,
) -> Ended {
    // Told once, when open requests are the last; closed when every connection has ended.
    let (drain, draining) = watch::channel(());
    let places = Arc::new(Semaphore::new(limits.max_connections.min(Semaphore::MAX_PERMITS)));
    let mut accepting = JoinSet::new();
    for server in servers {
        accepting.spawn(accept(server, shared.clone(), limits, draining.clone(), places.clone()));
    }
    // An error means that nobody can stop us any more; that is a stop, too.
    let _ = stop.wait_for(|stop| *stop).await;
    shared.draining.store(true, Ordering::Release);
    tracing::info!(connections = shared.telemetry.connections.get(), "draining");
    accepting.shutdown().await;
    drop(draining);
    let _ = drain.send(());
    match tokio::time::timeout(drain_timeout, drain.closed()).await {
        Ok(()) => Ended::Drained,
        Err(_) => Ended::DeadlinePassed,
    }
}

async fn accept(
    server: Server,
    shared: Arc<Shared>,
    limits: ConnectionLimits,
    draining: watch::Receiver<()>,
    places: Arc<Semaphore>,
) {
    let Server { listener, router, tls } = server;
    // A connection inherits them.
    if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(&listener, SEND_BUFFER) {
        tracing::debug!(%error, "the size of send buffers cannot be set");
    }
    if let Err(error) = keep_alive(&listener, limits.idle_timeout) {
        tracing::debug!(%error, "lost peers cannot be told from silent ones");
    }
    let patience = Patience { head: limits.header_timeout, idle: limits.idle_timeout, answer: shared.limits.timeout };
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) if is_the_peers(&error) => continue,
            Err(error) => {
                // Out of file descriptors, as a rule: open connections will free some.
                tracing::error!(%error, "a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            shared.telemetry.rejected("connections");
            continue;
        };
        // Small answers must not wait for more to come.
        let _ = stream.set_nodelay(true);
        let (router, tls, shared, draining) = (router.clone(), tls.clone(), shared.clone(), draining.clone());
        tokio::spawn(async move {
            shared.telemetry.connections.inc();
            let _open = Open { shared, _place: place };
            match tls {
                None => connection(stream, router, patience, draining).await,
                Some(tls) => {
                    if let Some(stream) = tls.accept(stream, limits.header_timeout).await {
                        connection(stream, router, patience, draining).await;
                    }
                }
            }
        });
    }
}

/// Asks a peer from which nothing has come for `idle` whether it is still there: a watch of the server's health has nothing to
/// send for days.
fn keep_alive(listener: &TcpListener, idle: Duration) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, idle.clamp(Duration::from_secs(1), Duration::from_secs(3600)))?;
    sockopt::set_tcp_keepintvl(listener, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(listener, 4)
}

/// An open connection's place and count.
struct Open {
    shared: Arc<Shared>,
    _place: OwnedSemaphorePermit,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.telemetry.connections.dec();
    }
}

fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection<S>(stream: S, router: Router, patience: Patience, mut draining: watch::Receiver<()>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience.answer));
    let activity = Activity::new(patience);
    let begins = activity.clone();
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let open = begins.begin(request.version());
        let answer = router.clone().oneshot(request.map(Body::new));
        async move { Ok::<_, Infallible>(answer.await?.map(|body| open.guard(body))) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    // A head that does not arrive is `activity`'s to see: hyper's own limit ends idle connections, too.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        // So that an answer is at work until nearly all of it was taken: behind it, the connection counts as idle.
        .max_send_buf_size(2 * PIECE)
        // No pings: their answers wait behind an answer that a slow client still reads. A peer that has gone is idle, or takes
        // nothing more.
        .max_header_list_size(MAX_HEAD as u32);
    let stream = TokioIo::new(Noted::new(Worded::new(Box::pin(stream)), activity.clone()));
    let mut connection = pin!(builder.serve_connection(stream, service));
    let mut due = pin!(sleep_until(activity.due().0));
    let mut drain = pin!(draining.changed());
    let (mut closing, mut drains) = (false, false);
    let ended = poll_fn(|context| {
        if let Poll::Ready(ended) = connection.as_mut().poll(context) {
            return Poll::Ready(Some(ended));
        }
        if !drains && drain.as_mut().poll(context).is_ready() {
            drains = true;
            connection.as_mut().graceful_shutdown();
            // It may have nothing left to do.
            context.waker().wake_by_ref();
        }
        let (next, _) = activity.due();
        if !closing && next < due.deadline() {
            due.as_mut().reset(next);
        }
        while due.as_mut().poll(context).is_ready() {
            match activity.overdue() {
                // It was told to close, and has not.
                _ if closing => return Poll::Ready(None),
                Some(Closing::Stuck) => return Poll::Ready(None),
                Some(Closing::Idle) => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                    context.waker().wake_by_ref();
                    due.as_mut().reset(Instant::now() + patience.head);
                }
                None => due.as_mut().reset(activity.due().0.max(Instant::now() + Duration::from_millis(1))),
            }
        }
        Poll::Pending
    })
    .await;
    match ended {
        Some(Err(error)) => tracing::debug!(error, "a connection ended"),
        Some(Ok(())) => {}
        None => tracing::debug!("a connection was closed: its peer was idle or had stalled"),
    }
}
