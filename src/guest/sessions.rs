//! How does a session of the wire begin, and the next one? The one pipe of a VM, as its door sees it.
//!
//! ```text
//! connect ─► handshake ─► streams, each a connection of the runner ─► the session ends ─► connect
//! ```
//!
//! The port is there before its guest listens, stays when its guest lets go of it, and may still hold bytes of the
//! daemon before: a session's end is the end of nothing but its streams, and the next one is begun for as long as the
//! door is open. The handshake proves the pass both ways, so a stream of a session shows nothing of its own. What a guest
//! may open, keep and send within a session is bounded in `dayfly_wire`.

use crate::BoxFuture;
use crate::metrics::GuestMetrics;
use crate::repeats::Repeats;
use crate::retry::Backoff;
use crate::rng::Rng;
use crate::vm::sockets::DoorSocket;
use crate::vm::{Stream, VmId};
use dayfly_guest_config::Pass;
use dayfly_wire::{Asked, HostSession, Limits, forward_port, host_handshake};
use std::io;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// A session that stood for so long was none that its guest throws away at once, so the next one is begun at once.
const STEADY: Duration = Duration::from_secs(10);

type Session = HostSession<Box<dyn Stream>>;

/// What a wire brings.
pub(super) enum Came {
    /// A session has begun: the other side has shown the pass.
    Session,
    /// A connection in it.
    Stream(Box<dyn Stream>),
    /// A wish in it for what the machine has at this port.
    Forward(Asked, u16),
}

/// The sessions of one wire, one after the other.
pub(super) struct Sessions {
    wire: Wire,
    phase: Phase,
    /// Before the next session is begun.
    backoff: Backoff,
    up: Repeats,
    down: Repeats,
}

/// What each beginning needs. Clones are the same.
#[derive(Clone)]
struct Wire {
    vm: VmId,
    socket: DoorSocket,
    pass: Pass,
    limits: Limits,
    /// For connect and handshake together.
    patience: Duration,
    rng: Rng,
    metrics: GuestMetrics,
}

enum Phase {
    Beginning(BoxFuture<'static, (Session, Backoff)>),
    Open { session: Box<Session>, since: Instant },
}

impl Sessions {
    pub(super) fn new(
        (vm, socket, pass): (VmId, DoorSocket, Pass),
        has_forwards: bool,
        limits: &super::Limits,
        rng: Rng,
        metrics: GuestMetrics,
    ) -> Self {
        let streams = u32::try_from(limits.connections).unwrap_or(u32::MAX);
        let limits_of_wire = Limits { streams, ..Limits::default() };
        let limits_of_wire = if has_forwards { limits_of_wire.with_forwards() } else { limits_of_wire };
        let wire = Wire { vm, socket, pass, limits: limits_of_wire, patience: limits.handshake, rng, metrics };
        let phase = Phase::Beginning(Box::pin(wire.clone().begin(Backoff::wire(), false)));
        Self {
            wire,
            phase,
            backoff: Backoff::wire(),
            up: Repeats::new("the guest's wire is up"),
            down: Repeats::new("the guest's wire is down"),
        }
    }

    /// What comes next; for ever. All bytes of all streams move in here, so it must always be polled.
    ///
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Came {
        loop {
            match &mut self.phase {
                Phase::Beginning(begun) => {
                    let (session, backoff) = begun.await;
                    self.backoff = backoff;
                    self.phase = Phase::Open { session: Box::new(session), since: Instant::now() };
                    self.wire.metrics.sessions.inc();
                    self.up.log(|line| tracing::info!(vm = %self.wire.vm, "{line}"));
                    return Came::Session;
                }
                Phase::Open { session, since } => {
                    let why = match session.request().await {
                        Some(Ok(asked)) => match came(asked) {
                            Some(came) => return came,
                            None => continue,
                        },
                        Some(Err(error)) => error.word(),
                        None => "ended",
                    };
                    let stood = since.elapsed();
                    self.wire.metrics.sessions_ended.inc(why);
                    self.down.log(
                        |line| tracing::info!(vm = %self.wire.vm, reason = why, elapsed = stood.as_secs(), "{line}"),
                    );
                    let backoff = if stood >= STEADY {
                        Backoff::wire()
                    } else {
                        std::mem::replace(&mut self.backoff, Backoff::wire())
                    };
                    // What is left of the old session goes before the new one is begun.
                    self.phase = Phase::Beginning(Box::pin(self.wire.clone().begin(backoff, true)));
                }
            }
        }
    }
}

/// What a guest asks for; `None`: nothing any more, or nothing that there is.
fn came(asked: Asked) -> Option<Came> {
    if asked.is_for_door() {
        return asked.accept().map(|stream| Came::Stream(Box::new(stream)));
    }
    match forward_port(asked.authority()) {
        Some(port) => Some(Came::Forward(asked, port)),
        None => {
            asked.reset();
            None
        }
    }
}

impl Wire {
    /// Begins a session, however often it takes. `again`: not at once.
    async fn begin(self, mut backoff: Backoff, again: bool) -> (Session, Backoff) {
        if again {
            tokio::time::sleep(backoff.next(&self.rng)).await;
        }
        loop {
            match timeout(self.patience, self.attempt()).await {
                Ok(Ok(session)) => return (session, backoff),
                // Its VM is not there yet, or not any more.
                Ok(Err(None)) => {}
                Ok(Err(Some(reason))) => self.failed(reason),
                Err(_) => self.failed("late"),
            }
            tokio::time::sleep(backoff.next(&self.rng)).await;
        }
    }

    fn failed(&self, reason: &'static str) {
        self.metrics.sessions_failed.inc(reason);
        tracing::debug!(vm = %self.vm, reason, "no session on the guest's wire");
    }

    async fn attempt(&self) -> Result<Session, Option<&'static str>> {
        let pipe = self.socket.connect().await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => None,
            _ => Some("unreachable"),
        })?;
        let proven = host_handshake(pipe, &self.pass, self.rng.bytes()).await.map_err(|error| Some(error.word()))?;
        proven.serve(&self.limits).await.map_err(|error| Some(error.word()))
    }
}
