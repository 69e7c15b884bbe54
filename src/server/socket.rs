//! A client's socket, shared by HTTP, which reads and writes it, and by the watch for a client that left.
//!
//! `hyper` notices that a client left by reading on while the answer is made. Once it has bytes that it may not look at yet, a
//! request behind this one or a stray line end, it reads no further, and would have the answer made for nobody.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;

/// How often a socket with bytes that nobody reads is asked whether its other end is closed; and how long an answer may still take then.
const LOOK: Duration = Duration::from_millis(500);

/// How long what a client sends behind its last answer is read and thrown away, and how long it may be silent meanwhile.
const LINGER: Duration = Duration::from_secs(10);
const LINGER_SILENCE: Duration = Duration::from_secs(1);

/// A handle on a socket. At most one reads and one writes; any may watch.
#[derive(Clone)]
pub struct Socket(Arc<TcpStream>);

impl Socket {
    /// A handle on `stream`; more are its clones.
    pub fn new(stream: TcpStream) -> Self {
        Socket(Arc::new(stream))
    }

    /// Resolves when the client has closed the connection, or its half of it, half a second ago.
    pub async fn left(&self) {
        loop {
            match self.0.ready(Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() => tokio::time::sleep(LOOK).await,
                // Closed, or no socket that could be asked.
                _ => return tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Says that nothing more comes, and reads on until the client closes, falls silent or has had its time. A socket that is closed with
    /// bytes unread resets the connection, which fails a client that is still sending its body before it looks at the answer.
    pub async fn linger(mut self) {
        let _ = self.shutdown().await;
        let mut sink = vec![0; 16 << 10];
        let silent = async { while let Ok(Ok(1..)) = tokio::time::timeout(LINGER_SILENCE, self.read(&mut sink)).await {} };
        let _ = tokio::time::timeout(LINGER, silent).await;
    }

    fn poll_try_write(&self, cx: &mut Context<'_>, mut write: impl FnMut(&TcpStream) -> io::Result<usize>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match write(&self.0) {
                // It was ready when it was last heard of, and no longer is.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read_buf(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done.map(|_| ())),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_try_write(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, pieces: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.poll_try_write(cx, |stream| stream.try_write_vectored(pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// A socket holds nothing back.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match socket2::SockRef::from(&*self.0).shutdown(Shutdown::Write) {
            // The other end was faster.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            done => Poll::Ready(done),
        }
    }
}
