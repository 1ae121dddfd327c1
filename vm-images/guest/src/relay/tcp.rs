//! A door at an address: for each connection of the runner one of our own, greeted, and two std threads.
//!
//! For guests whose host gives them no port: those of the contract before, and hypervisors without one.

use super::{BUFFER_BYTES, Shared, spawn};
use dayfly_guest_config::{GREETING_LINE_MAX, Greeting, GreetingError, Nonce, Pass};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Where the door is and what opens it.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) door: SocketAddr,
    pub(super) pass: Pass,
    pub(super) patience: Duration,
}

/// Why a door was not opened.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    /// Nobody there, or the connection broke.
    #[error("talk to the door")]
    Io(#[from] io::Error),
    /// Somebody is there, but not the door.
    #[error("greet the door")]
    Greeting(#[from] GreetingError),
}

/// One connection of the runner, from the greeting of its own to its end.
pub(super) fn serve(shared: &Arc<Shared>, runner: &TcpStream, target: &Target) {
    if let Ok(door) = open(shared, target) {
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
