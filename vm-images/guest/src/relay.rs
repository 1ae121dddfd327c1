//! The relay: the guest runner connects here, and its bytes come out at the door.
//!
//! ```text
//! gitlab-runner ──► 192.0.2.1:80 ──bytes both ways──► the door on the host
//!                                 [`wire`] through a port, [`tcp`] to an address
//! ```
//!
//! It knows no HTTP. Before it has a [`Target`] it accepts and waits: a runner may be started long
//! before its job is known, its poll held here. Until the door has proven the pass, not one byte of the runner's and no
//! proof of ours leaves this machine (decision D22). A door that is not there, or that does not prove itself, is asked
//! again until the patience ends: nothing has been sent, so nothing can be sent twice. A restart of the daemon is
//! then a pause to the runner, not an error.
//!
//! A std thread for each connection until the target is known, at most [`Limits::connections`] of them; beyond that the
//! kernel's backlog waits. The pass lives in this process's memory only.
#![expect(clippy::disallowed_types, clippy::disallowed_methods, reason = "accepting begins before any async runtime")]

pub mod forward;
pub mod port;
pub(crate) mod session;
pub(crate) mod shuttle;
mod tcp;
mod wire;

use dayfly_guest_config::Pass;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes per read; artifacts of gigabytes pass through here.
const BUFFER_BYTES: usize = 64 * 1024;

/// Stack of a copying thread, which has its buffer on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// Bounds. Tests use shorter ones.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once. The runner uses 4 a job; the door takes 64, so this side ends first.
    pub connections: usize,
    /// One attempt to connect to a door at an address.
    pub connect: Duration,
    /// The whole greeting, from the connection: as long as the door waits for it. On the wire, the whole handshake, from
    /// when somebody is at its other end.
    pub greeting: Duration,
    /// Before a door that refused is asked again.
    pub retry: Duration,
    /// Before a door that did not prove itself is asked again. Longer: somebody else may be there.
    pub retry_unproven: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 48,
            connect: Duration::from_secs(5),
            greeting: Duration::from_secs(5),
            retry: Duration::from_millis(200),
            retry_unproven: Duration::from_secs(1),
        }
    }
}

/// Where the door is.
pub enum Door {
    /// At an address, for each connection anew.
    Address(SocketAddr),
    /// Behind a port of this machine, for all connections at once.
    Wire(Box<dyn port::Port>),
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Wire(_) => f.write_str("wire"),
        }
    }
}

/// Where the door is and what opens it.
#[derive(Debug)]
pub struct Target {
    /// Where.
    pub door: Door,
    /// The pass.
    pub pass: Pass,
    /// How long a door that refuses is waited for.
    pub patience: Duration,
    /// What else is behind a wire. A door at an address has nothing beside it.
    pub forwards: Vec<forward::Forward>,
}

/// A handle to the running relay; clones share it.
#[derive(Clone)]
pub struct Relay(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Target set, or a connection ended.
    changed: Condvar,
    limits: Limits,
    start: Instant,
    /// Milliseconds from `start` to the last byte that a proven door has sent.
    heard_ms: AtomicU64,
}

#[derive(Default)]
struct State {
    way: Option<Way>,
    open: usize,
}

/// How connections get to the door.
#[derive(Clone)]
enum Way {
    Tcp(tcp::Target),
    Wire(wire::Sender),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard_ms.fetch_max(now, Ordering::Relaxed);
    }
}

impl Relay {
    /// Accepts on `listener` from now on; `first` is called at the first connection.
    ///
    /// # Errors
    /// If no thread can be made.
    pub fn start(listener: TcpListener, limits: Limits, first: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            limits,
            start: Instant::now(),
            heard_ms: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        thread::Builder::new().name("relay".into()).spawn(move || accept(&accepting, &listener, first))?;
        Ok(Self(shared))
    }

    /// Gives the relay its target; all held connections go on.
    ///
    /// # Errors
    /// If what a wire needs cannot be made.
    pub fn hand_over(&self, target: Target) -> io::Result<()> {
        let Target { door, pass, patience, forwards } = target;
        let way = match door {
            Door::Address(door) => Way::Tcp(tcp::Target { door, pass, patience }),
            Door::Wire(port) => Way::Wire(wire::start(Arc::clone(&self.0), port, pass, patience, forwards)?),
        };
        self.0.heard();
        self.0.state().way = Some(way);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Time since the door has last said anything (or since the hand-over, or the start).
    #[must_use]
    pub fn silent_for(&self) -> Duration {
        self.0.start.elapsed().saturating_sub(Duration::from_millis(self.0.heard_ms.load(Ordering::Relaxed)))
    }

    /// Connections of the runner that are open now, the held ones too.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.0.state().open
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener, first: impl FnOnce()) {
    let mut first = Some(first);
    loop {
        {
            let mut state = shared.state();
            while state.open >= shared.limits.connections {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let Ok((runner, _)) = listener.accept() else {
            // Out of descriptors, or the runner was gone already.
            thread::sleep(shared.limits.retry);
            continue;
        };
        if let Some(first) = first.take() {
            first();
        }
        shared.state().open += 1;
        let slot = Slot(Arc::clone(shared));
        // Without a thread the slot is dropped, and the connection with it.
        let _ = spawn(move || serve(slot, runner));
    }
}

/// Counts one connection down when it ends.
struct Slot(Arc<Shared>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.state().open -= 1;
        self.0.changed.notify_all();
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(work)
}

fn serve(slot: Slot, runner: TcpStream) {
    let shared = &slot.0;
    let way = {
        let mut state = shared.state();
        loop {
            if let Some(way) = &state.way {
                break way.clone();
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    };
    // No door within the patience: the runner sees a closed connection and tries again by itself.
    match way {
        Way::Tcp(target) => tcp::serve(shared, &runner, &target),
        Way::Wire(wire) => wire.serve(slot, runner),
    }
}

#[cfg(test)]
mod tests;
