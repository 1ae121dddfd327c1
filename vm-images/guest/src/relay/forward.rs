//! What the operator of the host forwards to this machine (`[[forward]]`): whoever connects to one of these ports of the
//! relay's address gets a stream of the door's wire, and the host connects it to what it has been told is there.
//!
//! Nothing in here decides: a stream names a port, and what is behind it, if anything, only the host knows. In the wire's
//! thread; the runner's own connections have places of their own.

use super::BUFFER_BYTES;
use super::session::open_to;
use super::shuttle::shuttle;
use dayfly_wire::{FORWARD_STREAMS, Opener, forward_authority};
use std::future::pending;
use std::io;
use std::net;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections of one forward at once, with those that wait for a stream. Beyond that the kernel's backlog waits.
const CONNECTIONS_MAX: usize = 2 * FORWARD_STREAMS as usize;

/// Before accepting is tried again, out of descriptors.
const RETRY: Duration = Duration::from_millis(200);

/// Where one of them is inside.
#[derive(Debug)]
pub struct Forward {
    /// The port by which the host knows it.
    pub port: u16,
    /// Who listens there.
    pub listener: net::TcpListener,
}

/// Listens at these ports of the relay's address.
///
/// # Errors
/// The port that cannot be had, and why: something of the image listens there.
pub fn listen(ports: &[u16]) -> Result<Vec<Forward>, (u16, io::Error)> {
    let relay: net::SocketAddr = dayfly_guest_config::RELAY_ADDRESS.parse().expect("a constant");
    let one = |port: &u16| match net::TcpListener::bind((relay.ip(), *port)) {
        Ok(listener) => Ok(Forward { port: *port, listener }),
        Err(error) => Err((*port, error)),
    };
    ports.iter().map(one).collect()
}

/// Serves them for ever. `patience`: how long a connection waits for a session of the wire.
pub(super) async fn run(forwards: Vec<Forward>, session: watch::Receiver<Option<Opener>>, patience: Duration) {
    let places = Arc::new(Semaphore::new(FORWARD_STREAMS as usize));
    let mut accepting = JoinSet::new();
    for Forward { port, listener } in forwards {
        let Ok(listener) = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)) else {
            continue;
        };
        let (places, session) = (Arc::clone(&places), session.clone());
        accepting.spawn(accept(listener, forward_authority(port), places, session, patience));
    }
    // None of them ends.
    while accepting.join_next().await.is_some() {}
    pending().await
}

async fn accept(
    listener: TcpListener,
    authority: String,
    places: Arc<Semaphore>,
    session: watch::Receiver<Option<Opener>>,
    patience: Duration,
) {
    let authority: Arc<str> = authority.into();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // Both are cancel safe.
            biased;
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => {
                let Ok((near, _)) = accepted else {
                    sleep(RETRY).await;
                    continue;
                };
                let (authority, places, session) = (Arc::clone(&authority), Arc::clone(&places), session.clone());
                connections.spawn(async move {
                    // Whoever gets no stream, or whose stream breaks, learns it by a reset.
                    let _ = near.set_zero_linger();
                    // The semaphore is never closed.
                    let Ok(_place) = places.acquire_owned().await else { return };
                    serve(near, &authority, session, patience).await;
                });
            }
        }
    }
}

async fn serve(near: TcpStream, authority: &str, session: watch::Receiver<Option<Opener>>, patience: Duration) {
    if let Ok(Ok(stream)) = timeout(patience, open_to(session, authority)).await {
        shuttle(near, stream, BUFFER_BYTES).await;
    }
}
