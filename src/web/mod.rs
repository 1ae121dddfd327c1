//! What does the status listener answer? A page, metrics and health over HTTP, read-only.
//!
//! ```text
//! /              the status page, for people; /jobs/ID?runner=NAME one job
//! /status.json   the same as JSON; /jobs.json the jobs under way and ended
//! /metrics       all metrics: OpenMetrics for who asks for that, else the Prometheus text format
//! /healthz       200: this process turns
//! /readyz        200: jobs can be taken; 503: none can, with what needs a person
//! ```
//!
//! Who sees what is in [`access`]. No guest may reach it without a token: by default it is a socket in the
//! runtime directory, mode 0600; `config` refuses a port on loopback where guests reach that, and any other address
//! without TLS and a token. Whoever connects is bounded all the same: one request a connection, and limits on connections,
//! heads and time. `daemon` opens it, and changes it with the configuration; that it cannot be opened costs no job.

mod access;
mod address;
mod answer;
mod fleet;
mod page;
mod settings;

pub use access::token as page_token;
pub use address::{Address, BadAddress, Config};
pub use settings::{Settings, SettingsError};

use crate::socket;
use crate::status::Reports;
use crate::telemetry::chain;
use answer::answer;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Connections at once; a Prometheus, a check and some who look, each by a short connection now and then. Others wait in
/// the kernel's queue.
const CONNECTIONS_MAX: usize = 16;

/// From accepting a connection to the last byte of its answer: the scrape timeout of Prometheus.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(10);

/// Until the head of the request is there.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);

/// Bytes of a request's head; hyper's least.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Lines of a request's head.
const HEADERS_MAX: usize = 64;

/// Pause after an accept that failed: out of descriptors, it would fail again at once (threats.md E7).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Why the listener is not open; for the operator.
#[derive(Debug, thiserror::Error)]
#[error("listen at {address} (`status.listen`)")]
pub struct ListenError {
    address: Address,
    #[source]
    source: io::Error,
}

/// A listener that is open, and not served yet.
#[derive(Debug)]
pub struct Listening {
    address: Address,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// Opens the listener; `None`: it is switched off.
///
/// # Errors
/// [`ListenError`].
pub async fn listen(address: &Address) -> Result<Option<Listening>, ListenError> {
    let failed = |source| ListenError { address: address.clone(), source };
    let socket = match address {
        Address::Off => return Ok(None),
        Address::Unix(path) => Socket::Unix(socket::bind(path, 0o600, None).map_err(failed)?, path.clone()),
        Address::Tcp(address) => Socket::Tcp(TcpListener::bind(address).await.map_err(failed)?),
    };
    Ok(Some(Listening { address: address.clone(), socket }))
}

impl Listening {
    /// Where.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The port that was given out, where any would do.
    #[cfg(test)]
    fn port(&self) -> u16 {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().unwrap().port(),
            Socket::Unix(..) => panic!("no port"),
        }
    }
}

/// A duplex stream.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Which settings are in force: the newest.
pub type InForce = watch::Receiver<Arc<Settings>>;

async fn accept(socket: &Socket) -> io::Result<Box<dyn Stream>> {
    Ok(match socket {
        Socket::Unix(listener, _) => Box::new(listener.accept().await?.0),
        Socket::Tcp(listener) => Box::new(listener.accept().await?.0),
    })
}

/// Serves until `stop`, then closes, and removes its socket.
///
/// # Cancel safety
/// Dropping it closes all, and leaves the file of a socket, which the next one replaces.
pub async fn serve(listening: Listening, reports: Arc<dyn Reports>, settings: InForce, stop: CancellationToken) {
    serve_within(EXCHANGE_DEADLINE, listening, reports, settings, stop).await;
}

/// [`serve`] with a deadline that tests choose.
async fn serve_within(
    deadline: Duration,
    listening: Listening,
    reports: Arc<dyn Reports>,
    settings: InForce,
    stop: CancellationToken,
) {
    let Listening { socket, address } = listening;
    let seats = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut tasks = JoinSet::new();
    tasks.spawn(keep_fleet(settings.clone()));
    let mut refused = false;
    loop {
        let seat = seats.clone();
        let accepted = tokio::select! {
            biased;
            // All are cancel safe. The stop first; the ended ones, or their number would grow.
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next() => continue,
            accepted = async {
                let seat = seat.acquire_owned().await;
                (seat, accept(&socket).await)
            } => accepted,
        };
        let stream = match accepted {
            (Ok(seat), Ok(stream)) => (seat, stream),
            (Err(_), _) => break,
            (_, Err(error)) => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%address, error = chain(&error), "the status listener does not accept; trying again");
                }
                tokio::select! {
                    biased;
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => continue,
                }
            }
        };
        refused = false;
        let (reports, settings) = (reports.clone(), settings.borrow().clone());
        tasks.spawn(async move {
            let (_seat, stream) = stream;
            if timeout(deadline, welcome(stream, &*reports, &settings)).await.is_err() {
                tracing::debug!("a connection of the status listener took too long");
            }
        });
    }
    tasks.shutdown().await;
    if let Socket::Unix(_, path) = &socket
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::debug!(error = chain(&error), "the socket of the status listener is gone already");
    }
}

/// Asks the fleet's other daemons as the newest settings say. For ever.
async fn keep_fleet(mut settings: InForce) {
    loop {
        let now = settings.borrow_and_update().clone();
        tokio::select! {
            biased;
            // Both are cancel safe.
            changed = settings.changed() => if changed.is_err() {
                // The listener is about to close.
                return std::future::pending().await;
            },
            () = now.fleet.keep_up() => {}
        }
    }
}

/// TLS first, where that is spoken.
async fn welcome(stream: Box<dyn Stream>, reports: &dyn Reports, settings: &Settings) {
    let Some(tls) = &settings.tls else { return exchange(stream, reports, settings).await };
    match tls.accept(stream).await {
        Ok(stream) => exchange(Box::new(stream), reports, settings).await,
        Err(error) => tracing::debug!(error = chain(&error), "a connection of the status listener spoke no TLS"),
    }
}

/// One request, one answer.
async fn exchange(stream: Box<dyn Stream + '_>, reports: &dyn Reports, settings: &Settings) {
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| async move {
        // Its body is not read: nothing here takes one.
        let answer = answer(request.method(), request.uri(), request.headers(), reports, settings);
        Ok::<_, Infallible>(answer.await)
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(error = chain(&error), "a connection of the status listener broke");
    }
}

#[cfg(test)]
mod tests;
