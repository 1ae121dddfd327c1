//! The relay of a guest whose door is behind a wire: session after session on one port, streams in them.

use dayfly_guest_config::{Nonce, Pass};
use dayfly_wire::{HandshakeError, Limits, Opener, Stream, guest_handshake};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::sleep;

/// Before a port is looked at again on which somebody was who does not hold the pass.
const PAUSE: Duration = Duration::from_millis(200);

/// Opens streams to the door of one guest. Clones share it.
#[derive(Clone)]
pub struct Relay {
    pass: Arc<watch::Sender<Option<Pass>>>,
    opener: watch::Receiver<Option<Opener>>,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("in_session", &self.opener.borrow().is_some()).finish_non_exhaustive()
    }
}

/// What moves the sessions of a [`Relay`]: [`Sessions::run`].
pub struct Sessions {
    pass: watch::Receiver<Option<Pass>>,
    opener: watch::Sender<Option<Opener>>,
}

/// A relay that knows no pass yet, and what moves it.
#[must_use]
pub fn relay() -> (Relay, Sessions) {
    let (pass, known) = watch::channel(None);
    let (opened, opener) = watch::channel(None);
    (Relay { pass: Arc::new(pass), opener }, Sessions { pass: known, opener: opened })
}

impl Relay {
    /// The guest is bound: from now on it answers who is at the other end.
    pub fn hand_over(&self, pass: Pass) {
        self.pass.send_replace(Some(pass));
    }

    /// Whether there is no session now.
    #[must_use]
    pub fn is_without_session(&self) -> bool {
        self.opener.borrow().is_none()
    }

    /// A stream that the door has taken: nothing was said on it.
    ///
    /// # Errors
    /// `ConnectionRefused` while there is no session; what ended the session.
    pub async fn open(&self) -> io::Result<Stream> {
        let opener = self.opener.borrow().clone().ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut stream = opener.open().await.map_err(io::Error::other)?;
        stream.accepted().await?;
        Ok(stream)
    }

    /// The same, again and again while that fails and `waits` says so, as the relay does for its runner.
    pub async fn enter(&self, pause: Duration, waits: impl Fn() -> bool) -> Option<Stream> {
        loop {
            if let Ok(stream) = self.open().await {
                return Some(stream);
            }
            if !waits() {
                return None;
            }
            sleep(pause).await;
        }
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

impl Sessions {
    /// Begins a session on this port, and another when it has ended, until the port is no more. `nonce` is asked for
    /// each of them.
    pub async fn run(&mut self, mut port: impl AsyncRead + AsyncWrite + Unpin, mut nonce: impl FnMut() -> Nonce) {
        let Ok(Some(pass)) = self.pass.wait_for(Option::is_some).await.map(|pass| pass.clone()) else { return };
        loop {
            let proven = match guest_handshake(&mut port, &pass, nonce()).await {
                Ok(proven) => proven,
                Err(HandshakeError::Io(_) | HandshakeError::Closed) => return,
                Err(HandshakeError::WrongProof | HandshakeError::Flooded) => {
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok((opener, session)) = proven.connect(&Limits::default(), || {}).await else { continue };
            self.opener.send_replace(Some(opener));
            session.run().await;
            self.opener.send_replace(None);
        }
    }
}
