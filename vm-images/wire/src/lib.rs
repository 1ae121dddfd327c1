//! The wire: how a guest's relay and its door speak over one pipe of bytes that belongs to the VM (decision D26).
//!
//! ```text
//! message ── what the ends say before a session, found in any bytes
//! handshake ── hello, proofs, start: the same session on both sides, whatever was left in the pipe
//! host, guest ── the session: HTTP/2, each connection of the runner a CONNECT stream
//! stream ── one of them, as bytes both ways
//! pipe ── between the session and the pipe: what a guest may make the host read
//! ```
//!
//! The pipe is a virtio-serial port, and has a port's ways: bytes of an earlier session come out of it, its end is seen
//! or not, and what one side threw away the other never learns. So each session begins with a handshake that is scanned
//! for, and an old session ends by the [`filler`](FILLER_BYTES) with which that handshake begins.
//!
//! No I/O and no tasks of its own: any `AsyncRead + AsyncWrite` is a pipe, futures are polled by whoever made them, time
//! is Tokio's, nonces are handed in. Used by the daemon (`host`), the guest program (`guest`), and the guests of tests.

mod guest;
mod handshake;
mod host;
mod limits;
mod message;
mod pipe;
mod stream;

pub use dayfly_guest_config::{DOOR_PORT_NAME, EGRESS_PORT_NAME};
pub use guest::{GuestSession, Opener};
pub use handshake::{HandshakeError, Proven, guest_handshake, host_handshake};
pub use host::{Asked, HostSession};
pub use limits::{
    AUTHORITY, DNS_AUTHORITY, FILLER_BYTES, FORWARD_STREAMS, Few, Held, Limits, SCANNED_BYTES_MAX, forward_authority,
    forward_port,
};
pub use stream::{Reading, Stream, Writing};

/// Why there is a session no more, or not yet.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The other side has ended it, or its pipe.
    #[error("session has ended")]
    Ended,
    /// Nothing came from the other side for too long.
    #[error("nothing has come from the other side of the wire")]
    Silent,
    /// The pipe broke, or what came out of it is no session: as after a restart of the other side.
    #[error("speak over the wire")]
    Protocol(#[source] h2::Error),
    /// What a stream was to be opened to has no form that could be sent.
    #[error("a stream's target is no `host:port`")]
    Authority,
}

impl SessionError {
    /// One word of it, for a metric's label.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Silent => "silent",
            Self::Protocol(error) if error.is_io() => "broken",
            Self::Protocol(_) => "protocol",
            Self::Authority => "authority",
        }
    }
}

#[cfg(test)]
mod tests;
