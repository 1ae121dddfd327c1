//! How does a machine without a network card reach the world? What its processes and containers send comes here by the
//! rules of [`crate::netfilter`], and leaves as streams over a virtio-serial port; `dayfly-egress` on the host resolves,
//! decides and connects (decision D27).
//!
//! ```text
//! a process, a container ── first packet ──► queue ──► hold: a stream, and what the far end has answered
//!                        ── connection ────► 0.0.0.0:9999 ──► carry: the stream that was opened for it
//!                        ── DNS ───────────► 192.0.2.1:53 ──► dns: one stream for all questions
//! ```
//!
//! The wall is on the host: who is root here may change all of this, and reaches no more by it.
//!
//! One thread with a runtime of its own. A session of the port lives as long as its host's program; what it carried ends
//! with it as connections do whose far end is gone, and what waits for an answer waits for the next session.

mod carry;
mod dns;
mod hold;

use crate::modules::{self, ModuleError, Modules};
use crate::netfilter::NetfilterError;
use crate::netfilter::queue::Queue;
use crate::netfilter::rules::{LISTENER_PORT, QUEUE, RESOLVER, Rules};
use crate::relay::{self, port::Port, session};
use dayfly_guest_config::Pass;
use dayfly_wire::Limits;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::runtime::Builder;
use tokio::sync::watch;

/// Connections that the kernel knows. It takes 8,192 of a machine with 1 GiB, keeps each for two minutes after its end,
/// and drops what is beyond: no more than some `npm install`. Memory is taken as it is used.
const CONNECTIONS_KNOWN: &str = "65536";
const CONNECTIONS_KNOWN_FILE: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// Connections that the kernel has accepted and we have not, yet. A thousand may be let go at once.
const BACKLOG: u32 = 4096;

/// Sockets and queue are made at once.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// Why there is no way out.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// A kernel module.
    #[error("prepare the kernel for a machine without a network card")]
    Module(#[from] ModuleError),
    /// Rules or queue.
    #[error("set up the packet filter")]
    Netfilter(#[from] NetfilterError),
    /// A socket, a file, a thread.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    /// The thread has panicked, or stands still.
    #[error("start the thread for what the machine sends out")]
    Thread,
}

/// Where it listens.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// For redirected connections.
    pub listener: SocketAddr,
    /// For questions, by UDP and TCP.
    pub resolver: SocketAddr,
    /// First packets.
    pub queue: u16,
}

impl Default for Places {
    fn default() -> Self {
        Self { listener: (Ipv4Addr::UNSPECIFIED, LISTENER_PORT).into(), resolver: (RESOLVER, 53).into(), queue: QUEUE }
    }
}

/// Whether this machine's kernel can be prepared for it.
#[must_use]
pub fn is_possible() -> bool {
    Modules::read(Path::new("/")).is_ok_and(|modules| modules.have(&modules::RELAY))
}

/// Prepares the kernel: modules, limits, rules.
///
/// # Errors
/// [`EgressError`].
pub fn prepare() -> Result<Rules, EgressError> {
    Modules::read(Path::new("/"))?.load(&modules::RELAY)?;
    std::fs::write(CONNECTIONS_KNOWN_FILE, CONNECTIONS_KNOWN)
        .map_err(|error| EgressError::Io("raise the limit of connections that the kernel knows", error))?;
    // A descriptor for each connection. Whoever starts other programs sets it back for them.
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })
        .map_err(|error| EgressError::Io("raise the limit of open files", error.into()))?;
    Ok(Rules::install()?)
}

/// Begins to carry, and returns when it does. `rules` are in force as long as it goes on.
///
/// # Errors
/// [`EgressError`].
pub fn start(rules: Rules, places: Places, port: Box<dyn Port>, pass: Pass) -> Result<(), EgressError> {
    let runtime = Builder::new_current_thread().enable_io().enable_time().build();
    let runtime = runtime.map_err(|error| EgressError::Io("make a runtime", error))?;
    let (ready, started) = sync_channel(1);
    let thread = thread::Builder::new().name("egress".into()).spawn(move || {
        let _rules = rules;
        runtime.block_on(run(places, port, pass, &ready));
    });
    thread.map_err(|error| EgressError::Io("start a thread", error))?;
    match started.recv_timeout(START_DEADLINE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(EgressError::Thread),
    }
}

async fn run(places: Places, port: Box<dyn Port>, pass: Pass, ready: &SyncSender<Result<(), EgressError>>) {
    let parts = match Parts::bind(places).await {
        Ok(parts) => parts,
        Err(error) => {
            // It is waited for.
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let (current, session) = watch::channel(None);
    let hold = Arc::new(hold::Hold::new(session.clone()));
    let (limits, wire) = (relay::Limits::default(), Limits::egress());
    // None of them ends.
    tokio::join!(
        session::keep(port, &pass, &limits, &wire, || {}, &current),
        hold::run(Arc::clone(&hold), parts.queue, places.queue),
        carry::run(parts.listener, hold),
        dns::run(parts.udp, parts.tcp, session),
    );
}

/// What must be there before anybody can be told that there is a network.
struct Parts {
    queue: Queue,
    listener: TcpListener,
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Parts {
    async fn bind(places: Places) -> Result<Self, EgressError> {
        let listen = |at: SocketAddr| {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(at)?;
            socket.listen(BACKLOG)
        };
        let error = |what| move |error| EgressError::Io(what, error);
        Ok(Self {
            listener: listen(places.listener).map_err(error("listen for redirected connections"))?,
            udp: UdpSocket::bind(places.resolver).await.map_err(error("listen on 192.0.2.1:53 (UDP)"))?,
            tcp: listen(places.resolver).map_err(error("listen on 192.0.2.1:53 (TCP)"))?,
            queue: Queue::bind(places.queue)?,
        })
    }
}

#[cfg(test)]
mod tests;
