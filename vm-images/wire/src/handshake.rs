//! The handshake: from a pipe that may hold anything to the same session on both sides, under the pass.
//!
//! Neither side knows when the other begins to listen, or what of an earlier session is still to come. So the host says
//! hello again and again, both look for each other's words in whatever comes, and nonces tell this session's from
//! others'. A guest that begins to listen is heard by its filler, and is said hello to at once; to a silent one, which
//! boots for seconds or has nobody in it, the host says it ever more seldom. A guest may open its port anew at any time before `start`, which throws away what lay in it: the host's
//! next hello begins again with the guest's next nonce.
//!
//! Bounded in bytes and memory here; in time by whoever calls, for only the caller knows what a guest does meanwhile.

use crate::limits::{
    FILLER_BYTE, FILLER_BYTES, FILLER_PERIOD, HELLO_PERIOD, HELLO_PERIOD_MAX, PROOFS_MAX, SCANNED_BYTES_MAX,
};
use crate::message::{Message, Scanner};
use bytes::{Bytes, BytesMut};
use dayfly_guest_config::{Nonce, Pass, SessionProofs};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf, split};
use tokio::time::{Instant, sleep_until};

/// Bytes a read. A port gives 4 KiB at a time, its socket what has come together.
const READ_BYTES: usize = 16 * 1024;

/// What waits to be written to a pipe that is full; answers beyond that are not made, and will be asked for again.
const UNWRITTEN_BYTES_MAX: usize = FILLER_BYTES + 4096;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The pipe broke.
    #[error("use the wire")]
    Io(#[from] io::Error),
    /// The pipe ended.
    #[error("wire has ended")]
    Closed,
    /// Somebody is there, and does not hold the pass.
    #[error("proof on the wire is wrong")]
    WrongProof,
    /// Too much came that was none of it.
    #[error("wire carries no handshake")]
    Flooded,
}

impl HandshakeError {
    /// One word of it, for a metric's label.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Io(_) => "broken",
            Self::Closed => "closed",
            Self::WrongProof => "wrong_proof",
            Self::Flooded => "flooded",
        }
    }
}

/// A pipe whose other side has proven that it holds the pass, at the first byte of a session.
pub struct Proven<S> {
    pub(crate) pipe: S,
    /// Bytes of the session that were read already.
    pub(crate) read: BytesMut,
}

impl<S> Proven<S> {
    /// The pipe, and what was read of the session's bytes: for a session that is not ours.
    #[must_use]
    pub fn into_parts(self) -> (S, Bytes) {
        (self.pipe, self.read.freeze())
    }
}

impl<S> std::fmt::Debug for Proven<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proven").finish_non_exhaustive()
    }
}

/// The host's side. `nonce` is random and used once.
///
/// # Errors
/// [`HandshakeError`]; the pipe is of no use then.
///
/// # Cancel safety
/// None: the pipe is gone with the future.
pub async fn host_handshake<S: AsyncRead + AsyncWrite + Unpin>(
    pipe: S,
    pass: &Pass,
    nonce: Nonce,
) -> Result<Proven<S>, HandshakeError> {
    let door = nonce;
    let mut line = Line::new(pipe);
    let mut hellos = Hellos::new();
    let mut current: Option<(Nonce, SessionProofs)> = None;
    let mut proven = 0;
    let proofs = loop {
        // Words of the guest before the next hello; nothing is lost by dropping either.
        let more = tokio::select! {
            biased;
            more = line.turn() => more?,
            () = sleep_until(hellos.next) => {
                let filler = hellos.said();
                // A full pipe has enough of them in it.
                if line.unwritten.is_empty() {
                    if filler {
                        line.filler();
                    }
                    line.say(&Message::Hello { door });
                }
                continue;
            }
        };
        let Some(count) = more else { continue };
        hellos.heard();
        let Line { scanner, read, unwritten, .. } = &mut line;
        let found = scanner.find(&read[..count], |message| match message {
            Message::Answer { door: of, relay } if of == door => {
                if current.as_ref().is_none_or(|(known, _)| *known != relay) {
                    let proofs = SessionProofs::new(pass, door, relay);
                    proven += 1;
                    if proven <= PROOFS_MAX {
                        Message::Proof { door, relay, proof: proofs.of_door() }.write(unwritten);
                    }
                    current = Some((relay, proofs));
                }
                (proven > PROOFS_MAX).then_some(Err(HandshakeError::Flooded))
            }
            Message::Begin { door: of, relay, proof } if of == door => match &current {
                Some((known, proofs)) if *known == relay => {
                    Some(if proofs.is_of_relay(&proof) { Ok(relay) } else { Err(HandshakeError::WrongProof) })
                }
                _ => None,
            },
            _ => None,
        });
        if let Some(found) = found {
            break found?;
        }
    };
    line.say(&Message::Start { door, relay: proofs });
    line.finish().await
}

/// The guest's side, on a port that was opened anew. `nonce` is random and used once.
///
/// # Errors
/// [`HandshakeError`]; the pipe is of no use then.
///
/// # Cancel safety
/// None: the pipe is gone with the future.
pub async fn guest_handshake<S: AsyncRead + AsyncWrite + Unpin>(
    pipe: S,
    pass: &Pass,
    nonce: Nonce,
) -> Result<Proven<S>, HandshakeError> {
    let relay = nonce;
    let mut line = Line::new(pipe);
    // A host that takes an earlier session to be alive learns in this way that it is not.
    line.filler();
    let mut current: Option<Nonce> = None;
    let mut begun = false;
    loop {
        let Some(count) = line.turn().await? else { continue };
        let Line { scanner, read, unwritten, .. } = &mut line;
        let found = scanner.find(&read[..count], |message| match message {
            Message::Hello { door } => {
                if current != Some(door) {
                    current = Some(door);
                    begun = false;
                }
                if !begun && unwritten.len() < UNWRITTEN_BYTES_MAX {
                    Message::Answer { door, relay }.write(unwritten);
                }
                None
            }
            Message::Proof { door, relay: of, proof } if current == Some(door) && of == relay && !begun => {
                let proofs = SessionProofs::new(pass, door, relay);
                if !proofs.is_of_door(&proof) {
                    return Some(Err(HandshakeError::WrongProof));
                }
                begun = true;
                Message::Begin { door, relay, proof: proofs.of_relay() }.write(unwritten);
                None
            }
            Message::Start { door, relay: of } if current == Some(door) && of == relay && begun => Some(Ok(())),
            _ => None,
        });
        if let Some(found) = found {
            found?;
            return line.finish().await;
        }
    }
}

/// When the host says hello.
struct Hellos {
    next: Instant,
    last: Option<Instant>,
    period: Duration,
    filler: Instant,
}

impl Hellos {
    /// Now first.
    fn new() -> Self {
        let now = Instant::now();
        Self { next: now, last: None, period: HELLO_PERIOD, filler: now }
    }

    /// One is said now. Whether the filler goes before it.
    fn said(&mut self) -> bool {
        let now = Instant::now();
        self.last = Some(now);
        self.next = now + self.period;
        self.period = (self.period * 2).min(HELLO_PERIOD_MAX);
        let filler = now >= self.filler;
        if filler {
            self.filler = now + FILLER_PERIOD;
        }
        filler
    }

    /// Something has come: whoever wrote it may listen now.
    fn heard(&mut self) {
        self.period = HELLO_PERIOD;
        if let Some(last) = self.last {
            self.next = self.next.min(last + HELLO_PERIOD);
        }
    }
}

/// A pipe in a handshake: reads while it writes, for both sides may find it full of the last session.
struct Line<S> {
    reading: ReadHalf<S>,
    writing: WriteHalf<S>,
    scanner: Scanner,
    read: Box<[u8]>,
    scanned: usize,
    unwritten: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    fn new(pipe: S) -> Self {
        let (reading, writing) = split(pipe);
        Self {
            reading,
            writing,
            scanner: Scanner::default(),
            read: vec![0; READ_BYTES].into(),
            scanned: 0,
            unwritten: BytesMut::new(),
        }
    }

    fn filler(&mut self) {
        self.unwritten.resize(self.unwritten.len() + FILLER_BYTES, FILLER_BYTE);
    }

    fn say(&mut self, message: &Message) {
        message.write(&mut self.unwritten);
    }

    /// Writes what it can and reads: how many bytes stand in `read`, or `None` if something was written. Cancel safe.
    async fn turn(&mut self) -> Result<Option<usize>, HandshakeError> {
        let Self { reading, writing, read, scanned, unwritten, .. } = self;
        tokio::select! {
            // Writing first: it ends. Both keep what they have not done.
            biased;
            written = writing.write_buf(unwritten), if !unwritten.is_empty() => match written? {
                0 => Err(HandshakeError::Closed),
                _ => Ok(None),
            },
            count = reading.read(read) => {
                let count = count?;
                if count == 0 {
                    return Err(HandshakeError::Closed);
                }
                *scanned += count;
                if *scanned > SCANNED_BYTES_MAX { Err(HandshakeError::Flooded) } else { Ok(Some(count)) }
            }
        }
    }

    /// Writes the rest; what follows is the session's.
    async fn finish(mut self) -> Result<Proven<S>, HandshakeError> {
        while !self.unwritten.is_empty() {
            if self.writing.write_buf(&mut self.unwritten).await? == 0 {
                return Err(HandshakeError::Closed);
            }
        }
        self.writing.flush().await?;
        Ok(Proven { pipe: self.reading.unsplit(self.writing), read: self.scanner.rest() })
    }
}
