//! The accept loop: deadlines, caps and socket options of every connection, and the orderly end of them all.
//!
//! `hyper`'s plain HTTP/1 connection with a timer closes silent and half-sent headers, also between two requests of one
//! connection; its `half_close(false)` notices a client that left, or closed its half, while it waits for an answer, and
//! [`Socket::left`] does where bytes behind the request keep `hyper` from looking.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri};
use hyper::body::{Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::socket::Socket;
use super::{Limits, Phase, Server};
use crate::telemetry::Event;

/// How long accepting pauses when the system has no descriptor or memory for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A connection that is silent below HTTP for so long is probed, three times at this interval's third.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// The other end of the connection; an extension of every request that came through a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were still open when the drain deadline passed.
    pub forced: usize,
}

/// Serves until `shutdown`, then drains: readiness fails, nothing is accepted, requests in flight run to their end or to
/// `drain_timeout`; what is left then is ended with error events. [`Server::stop`] cuts the wait short.
pub async fn serve(listener: TcpListener, server: Arc<Server>, shutdown: impl Future<Output = ()>, drain_timeout: Duration) -> Drained {
    let limits = &server.config.limits;
    let router = server.router();
    let slots = Arc::new(Semaphore::new(limits.connections));
    let open = Arc::new(AtomicUsize::new(0));
    let closing = watch::Sender::new(false);
    let mut connections = JoinSet::new();

    let mut shutdown = std::pin::pin!(shutdown);
    let stopping = server.reached(Phase::Stopping);
    let mut stopping = std::pin::pin!(stopping);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            () = &mut stopping => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &slots) => accepted,
        };
        let (stream, peer, slot) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "accepting failed; trying again shortly");
                server.telemetry.emit(Event::AcceptFailed);
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = set_options(&stream, limits) {
            // The other end may be gone already; then the connection ends by itself.
            tracing::debug!(%error, "socket options were not set");
        }
        let (server, router, open, closing) = (server.clone(), router.clone(), open.clone(), closing.subscribe());
        connections.spawn(async move {
            let _slot = slot;
            server.telemetry.emit(Event::Connections { open: open.fetch_add(1, Ordering::Relaxed) + 1 });
            connection(Socket::new(stream), peer, router, &server.config.limits, closing).await;
            server.telemetry.emit(Event::Connections { open: open.fetch_sub(1, Ordering::Relaxed) - 1 });
        });
    }

    drop(listener);
    server.drain();
    closing.send_replace(true);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    let in_time = tokio::select! {
        done = tokio::time::timeout(drain_timeout, all_closed) => done.is_ok(),
        // Asked anew: the one above has given its answer where it ended the loop, and may not be asked again.
        () = server.reached(Phase::Stopping) => false,
    };
    let forced = if in_time { 0 } else { open.load(Ordering::Relaxed) };
    // Also when all went well: the engine's thread ends with the server.
    server.stop();
    if forced > 0 {
        server.telemetry.emit(Event::DrainForced { connections: forced });
        tracing::warn!(connections = forced, "the drain deadline passed; ending what is left");
        let all_closed = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(limits.stop_grace, all_closed).await.is_err() {
            connections.shutdown().await;
        }
    }
    Drained { forced }
}

/// Waits for a free slot before accepting, so that surplus connections wait in the kernel's queue and cost nothing here.
async fn accept(listener: &TcpListener, slots: &Arc<Semaphore>) -> io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, slot))
}

/// Whether a failed accept concerns only the connection that was not accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}

fn set_options(stream: &TcpStream, limits: &Limits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_send_buffer_size(limits.send_buffer)?;
    let probe = socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE / 3);
    socket.set_tcp_keepalive(&probe)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(limits.write_stall))?;
    Ok(())
}

async fn connection(socket: Socket, peer: SocketAddr, router: Router, limits: &Limits, closing: watch::Receiver<bool>) {
    // Held by whatever makes or tells an answer.
    let answering = Arc::new(());
    let answers = Arc::downgrade(&answering);
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        let (answer, held) = (router.clone().oneshot(request), answers.upgrade());
        async move { answer.await.map(|response| response.map(|body| Told { body, _held: held })) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_deadline)
        .max_buf_size(limits.header_bytes)
        // The buffer alone lets a header through that arrives in one piece.
        .max_header_size(limits.header_bytes)
        .max_headers(limits.headers)
        .half_close(false)
        .serve_connection(TokioIo::new(socket.clone()), service);
    let mut connection = std::pin::pin!(connection);
    let closed = || {
        let mut closing = closing.clone();
        // The sender outlives every connection; if it were gone, closing would be right, too.
        async move { drop(closing.wait_for(|closing| *closing).await) }
    };
    let served = async {
        tokio::select! {
            ended = connection.as_mut() => ended,
            () = closed() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    // An answer that is only to be written is left to `hyper`, and so is a connection without a request.
    let left = async {
        loop {
            socket.left().await;
            if Arc::strong_count(&answering) > 1 {
                break;
            }
        }
    };
    let ended = tokio::select! {
        biased;
        ended = served => ended,
        () = left => {
            // With the connection goes its request, and with that its sequences.
            tracing::debug!("the client left");
            return;
        }
    };
    if let Err(error) = &ended {
        tracing::debug!(%error, "connection ended");
    }
    // An answer may have gone before its request was read; whoever was too slow, or has gone, sends nothing more.
    if ended.is_ok() || ended.is_err_and(|error| error.is_parse()) {
        tokio::select! {
            biased;
            () = closed() => {}
            () = socket.linger() => {}
        }
    }
}

/// The body of an answer, which is being made until this is dropped.
struct Told {
    body: axum::body::Body,
    _held: Option<Arc<()>>,
}

impl hyper::body::Body for Told {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Exactly one `Host`, a plain authority without user, equal to the request target's if that has one. Virtual hosts,
/// proxies and caches disagree about anything else.
pub fn host_is_valid(target: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let bytes = host.as_bytes();
    let Ok(authority) = Authority::try_from(bytes) else { return false };
    if bytes.len() > 255 || bytes.contains(&b'@') || authority.host().is_empty() {
        return false;
    }
    target.authority().is_none_or(|named| named.as_str().as_bytes().eq_ignore_ascii_case(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn one_plain_host_is_wanted() {
        let long = "a".repeat(1024);
        for (target, hosts, valid) in [
            ("/", &["localhost:8000"][..], true),
            ("/", &["[::1]:8000"], true),
            ("/", &["example.com"], true),
            ("/", &[], false),
            ("/", &[""], false),
            ("/", &["a", "a"], false),
            ("/", &["a/?#@b"], false),
            ("/", &["user@host"], false),
            ("/", &["a b"], false),
            ("/", &[long.as_str()], false),
            ("http://example.com/v1/models", &["example.com"], true),
            ("http://EXAMPLE.com/v1/models", &["example.com"], true),
            ("http://evil.com/v1/models", &["example.com"], false),
            ("http://u@example.com/v1/models", &["example.com"], false),
        ] {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(HOST, HeaderValue::from_str(host).expect("a header value"));
            }
            assert_eq!(host_is_valid(&target.parse().expect("a target"), &headers), valid, "{target} {hosts:?}");
        }
    }
}
