//! A port's sessions, one after another: whoever is at its other end proves itself, and streams can be opened until it
//! is gone. The relay has one port for the door, and another one carries what a machine without a network card sends out.

use super::Limits;
use super::port::{Pipe, Port};
use dayfly_guest_config::{Nonce, Pass};
use dayfly_wire::{HandshakeError, Opener, Proven, Stream, guest_handshake};
use std::fs::File;
use std::io::{self, Read as _};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Before a session that does not do what it should is asked again: it is over, and says so in a moment.
const SESSION_PAUSE: Duration = Duration::from_secs(1);

/// One session after another, for ever. `current` has what opens streams in the one that is; `heard` is called whenever
/// its host has said something.
pub(crate) async fn keep(
    mut port: Box<dyn Port>,
    pass: &Pass,
    limits: &Limits,
    wire: &dayfly_wire::Limits,
    heard: impl Fn() + Clone + Send + 'static,
    current: &watch::Sender<Option<Opener>>,
) {
    loop {
        // Not there yet, or still held by the last session: a pause, as for a door that refuses.
        let pause = match port.open().await {
            Ok(pipe) => match timeout(limits.greeting, handshake(pipe, pass)).await {
                Ok(Ok(proven)) => {
                    if let Ok((opener, session)) = proven.connect(wire, heard.clone()).await {
                        heard();
                        current.send_replace(Some(opener));
                        session.run().await;
                        current.send_replace(None);
                    }
                    continue;
                }
                Ok(Err(HandshakeError::WrongProof)) => limits.retry_unproven,
                // Somebody is there who does not speak, or has gone.
                Ok(Err(_)) | Err(_) => continue,
            },
            Err(_) => limits.retry,
        };
        sleep(pause).await;
    }
}

async fn handshake(pipe: Box<dyn Pipe>, pass: &Pass) -> Result<Proven<Box<dyn Pipe>>, HandshakeError> {
    let mut nonce = Nonce::default();
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    guest_handshake(pipe, pass, nonce).await
}

/// A stream that the host has accepted, in this session or a later one.
///
/// # Errors
/// The host's answer: it refuses, or the far end does, or does not answer.
///
/// # Cancel safety
/// Safe: a stream that was begun ends by itself.
pub(crate) async fn open_to(mut session: watch::Receiver<Option<Opener>>, authority: &str) -> io::Result<Stream> {
    loop {
        let opener = session.wait_for(Option::is_some).await.map(|opener| opener.clone());
        let Ok(Some(opener)) = opener else { return Err(io::ErrorKind::BrokenPipe.into()) };
        if let Ok(mut stream) = opener.open_to(authority).await {
            match stream.accepted().await {
                Ok(()) => return Ok(stream),
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut) => {
                    return Err(error);
                }
                Err(_) => {}
            }
        }
        // That session is over, or about to be.
        let _ = timeout(SESSION_PAUSE, session.changed()).await;
    }
}
