//! The relay: the guest runner connects here, and its bytes come out at the door.
//!
//! ```text
//! gitlab-runner ──► 192.0.2.1:80 ──greeting, then bytes both ways──► the door on the host
//! ```
//!
//! It knows no HTTP. Before it has a [`Target`] it accepts and waits: a runner may be started long
//! before its job is known, its poll held here. For each connection it opens one to the door and
//! greets; until the door has proven the pass, not one byte of the runner's and no proof of ours
//! leaves this machine, for while the daemon is away another process of the host could hold its
//! port (decision D22). A door that refuses, or that does not prove itself, is asked again until the
//! patience ends: nothing has been sent, so nothing can be sent twice. A restart of the daemon is
//! then a pause to the runner, not an error.
//!
//! Two std threads for each connection, at most [`Limits::connections`] of them; beyond that the
//! kernel's backlog waits. The pass lives in this process's memory only.
#![expect(clippy::disallowed_types, clippy::disallowed_methods, reason = "no async runtime in the guest")]

use dayfly_guest_config::{GREETING_LINE_MAX, Greeting, GreetingError, Nonce, Pass};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
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
    /// One attempt to connect to the door.
    pub connect: Duration,
    /// The whole greeting, from the connection: as long as the door waits for it.
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

/// Where the door is and what opens it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Address of the door.
    pub door: SocketAddr,
    /// The pass.
    pub pass: Pass,
    /// How long a door that refuses is waited for.
    pub patience: Duration,
}

/// Why a door was not opened.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Nobody there, or the connection broke.
    #[error("talk to the door")]
    Io(#[from] io::Error),
    /// Somebody is there, but not the door.
    #[error("greet the door")]
    Greeting(#[from] GreetingError),
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
    target: Option<Target>,
    open: usize,
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
    pub fn hand_over(&self, target: Target) {
        self.0.heard();
        self.0.state().target = Some(target);
        self.0.changed.notify_all();
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
        let _ = spawn(move || serve(&slot.0, &runner));
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

fn serve(shared: &Arc<Shared>, runner: &TcpStream) {
    let target = {
        let mut state = shared.state();
        loop {
            if let Some(target) = &state.target {
                break target.clone();
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    };
    // No door within the patience: the runner sees a closed connection and tries again by itself.
    if let Ok(door) = open(shared, &target) {
        shuttle(shared, runner, door);
    }
}

/// Connects and greets, again and again until the patience ends.
fn open(shared: &Shared, target: &Target) -> Result<TcpStream, RelayError> {
    let start = Instant::now();
    loop {
        let (error, pause): (RelayError, _) = match TcpStream::connect_timeout(&target.door, shared.limits.connect) {
            Err(error) => (error.into(), shared.limits.retry),
            Ok(door) => match greet(&door, &target.pass, shared.limits.greeting) {
                Ok(()) => {
                    shared.heard();
                    return Ok(door);
                }
                Err(error) => (error, shared.limits.retry_unproven),
            },
        };
        if start.elapsed() + pause >= target.patience {
            return Err(error);
        }
        thread::sleep(pause);
    }
}

/// The relay's side of the greeting.
fn greet(door: &TcpStream, pass: &Pass, limit: Duration) -> Result<(), RelayError> {
    let deadline = Instant::now() + limit;
    door.set_nodelay(true)?;
    door.set_write_timeout(Some(limit))?;
    let mut nonce = Nonce::default();
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    send_line(door, &Greeting::opening(&nonce))?;
    let line = read_line(door, deadline)?;
    let greeting = Greeting::relay(pass, nonce, &line)?;
    send_line(door, &greeting.relay_line())?;
    door.set_read_timeout(None)?;
    door.set_write_timeout(None)?;
    Ok(())
}

fn send_line(mut door: &TcpStream, line: &str) -> io::Result<()> {
    door.write_all(format!("{line}\r\n").as_bytes())
}

/// One line of the door, without CR LF. The door says nothing after it before it is answered, so
/// bytes beyond the line are no greeting of ours.
fn read_line(mut door: &TcpStream, deadline: Instant) -> Result<String, RelayError> {
    let mut line = [0; GREETING_LINE_MAX + 2];
    let mut length = 0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        door.set_read_timeout(Some(left))?;
        let count = door.read(&mut line[length..])?;
        if count == 0 {
            // At its end, or the line is too long.
            return Err(if length == line.len() {
                GreetingError::Malformed.into()
            } else {
                io::Error::from(io::ErrorKind::UnexpectedEof).into()
            });
        }
        length += count;
        if line[..length].contains(&b'\n') {
            let text = line[..length].strip_suffix(b"\r\n").and_then(|line| std::str::from_utf8(line).ok());
            return Ok(text.filter(|text| !text.contains('\n')).ok_or(GreetingError::Malformed)?.to_owned());
        }
    }
}

/// Copies both ways until both are at their ends.
fn shuttle(shared: &Arc<Shared>, runner: &TcpStream, door: TcpStream) {
    // Failing to set it costs 40 ms here and there, no more.
    let _ = runner.set_nodelay(true);
    let (Ok(runner_too), Ok(door_too)) = (runner.try_clone(), door.try_clone()) else { return };
    let to_door = spawn(move || copy(&runner_too, &door_too, || {}));
    let Ok(to_door) = to_door else { return };
    copy(&door, runner, || shared.heard());
    // A copying thread has no way to panic; if it had, the connection is over all the same.
    let _ = to_door.join();
}

/// Copies one way. A clean end closes that way only; an error ends the connection on both sides.
fn copy(mut from: &TcpStream, mut to: &TcpStream, progress: impl Fn()) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => {
                // Half-close: the other way may still have an answer to carry.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(count) => {
                progress();
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests;
