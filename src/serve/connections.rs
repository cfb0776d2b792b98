//! Connections: accepting, bounding, draining.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::tls::Tls;
use super::{ConnectionLimits, Ended, Shared};

/// Bytes of a request's head.
const MAX_HEAD: usize = 64 << 10;
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
    let graceful = Arc::new(GracefulShutdown::new());
    let places = Arc::new(Semaphore::new(limits.max_connections.min(Semaphore::MAX_PERMITS)));
    let mut accepting = JoinSet::new();
    for server in servers {
        let (shared, graceful, places) = (shared.clone(), graceful.clone(), places.clone());
        accepting.spawn(accept(server, shared, limits, graceful, places));
    }
    // An error means that nobody can stop us any more; that is a stop, too.
    let _ = stop.wait_for(|stop| *stop).await;
    shared.draining.store(true, Ordering::Release);
    tracing::info!(connections = shared.telemetry.connections.get(), "draining");
    accepting.shutdown().await;
    let Some(graceful) = Arc::into_inner(graceful) else { return Ended::DeadlinePassed };
    match tokio::time::timeout(drain_timeout, graceful.shutdown()).await {
        Ok(()) => Ended::Drained,
        Err(_) => Ended::DeadlinePassed,
    }
}

async fn accept(
    server: Server,
    shared: Arc<Shared>,
    limits: ConnectionLimits,
    graceful: Arc<GracefulShutdown>,
    places: Arc<Semaphore>,
) {
    let Server { listener, router, tls } = server;
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
        let (router, tls, shared, watcher) = (router.clone(), tls.clone(), shared.clone(), graceful.watcher());
        tokio::spawn(async move {
            shared.telemetry.connections.inc();
            let stuck = shared.limits.timeout;
            let _open = Open { shared, _place: place };
            match tls {
                None => connection(stream, router, limits, stuck, watcher).await,
                Some(tls) => {
                    if let Some(stream) = handshake(&tls, stream, limits.header_timeout).await {
                        connection(stream, router, limits, stuck, watcher).await;
                    }
                }
            }
        });
    }
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

async fn handshake(
    tls: &Tls,
    stream: TcpStream,
    limit: Duration,
) -> Option<tokio_rustls::server::TlsStream<TcpStream>> {
    match tokio::time::timeout(limit, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a TLS handshake failed");
            None
        }
        Err(_) => None,
    }
}

/// `stuck`: how long a peer may leave an answer unread.
async fn connection<S>(stream: S, router: Router, limits: ConnectionLimits, stuck: Duration, watcher: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(stuck));
    let begun = Arc::new(AtomicBool::new(false));
    let noted = begun.clone();
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        noted.store(true, Ordering::Relaxed);
        router.clone().oneshot(request.map(Body::new))
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // Also ends connections that stay idle.
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD as u32)
        .keep_alive_interval(limits.header_timeout)
        .keep_alive_timeout(limits.header_timeout);
    let connection = watcher.watch(builder.serve_connection(TokioIo::new(Box::pin(stream)), service).into_owned());
    tokio::pin!(connection);
    let ended = match tokio::time::timeout(limits.header_timeout, &mut connection).await {
        Ok(ended) => ended,
        // hyper's own limit begins once it knows the protocol, which it never does of a connection that stays silent.
        Err(_) if !begun.load(Ordering::Relaxed) => return,
        Err(_) => connection.await,
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended");
    }
}
