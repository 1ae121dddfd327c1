//! The stand-in on a socket: HTTP/1.1, with or without TLS, for real clients.

use super::Standin;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

/// More clients wait in the listener's backlog.
const CONNECTIONS_MAX: usize = 4096;

/// A client that says nothing is let go after this; TLS handshake likewise.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// A listener that answers. Dropping it ends everything at once.
pub struct Served {
    address: SocketAddr,
    cut: watch::Sender<u64>,
    task: JoinHandle<()>,
}

impl Served {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts every connection there is; new ones are taken.
    pub fn cut_connections(&self) {
        self.cut.send_modify(|round| *round += 1);
    }

    /// Ends it and waits until its tasks are gone.
    pub async fn stop(mut self) {
        self.task.abort();
        // The abort is the expected end.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection's read buffer, heads included: the official runner's heads have less than 4 KiB, and a body comes in
/// pieces of this size at most.
const BUFFER_BYTES: usize = 64 << 10;

/// Answers on `listener` until the result is dropped.
///
/// # Errors
/// A listener without an address.
pub fn serve(standin: Standin, listener: TcpListener, tls: Option<Arc<ServerConfig>>) -> io::Result<Served> {
    let address = listener.local_addr()?;
    let (cut, cuts) = watch::channel(0);
    #[expect(clippy::disallowed_methods, reason = "aborted when `Served` is dropped")]
    let task = tokio::spawn(accept(standin, listener, tls.map(TlsAcceptor::from), cuts));
    Ok(Served { address, cut, task })
}

async fn accept(standin: Standin, listener: TcpListener, tls: Option<TlsAcceptor>, cuts: watch::Receiver<u64>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropped with this task, and all connections with it.
    let mut connections = JoinSet::new();
    let mut number = 0;
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // No descriptors left, or a client that went away: the next one may fare better.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        number += 1;
        let (standin, tls, mut cuts) = (standin.clone(), tls.clone(), cuts.clone());
        cuts.mark_unchanged();
        connections.spawn(async move {
            let _place = place;
            // A planned cut is seen first. The connection is of no more use once it is dropped.
            tokio::select! {
                biased;
                _ = cuts.changed() => {}
                () = connection(standin, stream, tls, number) => {}
            }
        });
    }
}

async fn connection(standin: Standin, stream: TcpStream, tls: Option<TlsAcceptor>, number: u64) {
    // Small answers must not wait for the client's acknowledgements.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    match tls {
        None => http(standin, stream, number).await,
        Some(tls) => match tokio::time::timeout(HEADER_TIMEOUT, tls.accept(stream)).await {
            Ok(Ok(stream)) => http(standin, stream, number).await,
            Ok(Err(error)) => tracing::debug!(%error, "stand-in: TLS handshake failed"),
            Err(_) => tracing::debug!("stand-in: TLS handshake took too long"),
        },
    }
}

async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(standin: Standin, stream: S, number: u64) {
    let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let standin = standin.clone();
        async move {
            let request = request.map(|body| {
                use http_body_util::BodyExt as _;
                body.map_err(Into::into).boxed_unsync()
            });
            standin.exchange(request, number).await
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).keep_alive(true).max_buf_size(BUFFER_BYTES);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "stand-in: connection ended");
    }
}
