//! The stream to the host's resolver, opened again whenever it has ended.

use super::message::MESSAGE_BYTES_MAX;
use super::table::OUTSTANDING_MAX;
use crate::relay::session::open_to;
use dayfly_wire::{DNS_AUTHORITY, Opener};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

/// Before the next stream: its host has ended the last one, or refuses it.
const PAUSE: Duration = Duration::from_millis(200);

/// What happens to the stream.
pub(super) enum Event {
    /// It has begun, and takes questions here.
    Up(mpsc::Sender<Vec<u8>>),
    Answer(Vec<u8>),
    /// It has ended. What was asked over it may not have been heard.
    Down,
}

/// Keeps one open for ever.
pub(super) async fn keep(session: watch::Receiver<Option<Opener>>, events: mpsc::Sender<Event>) {
    loop {
        if let Ok(stream) = open_to(session.clone(), DNS_AUTHORITY).await {
            let (sender, mut questions) = mpsc::channel::<Vec<u8>>(OUTSTANDING_MAX);
            // Fails only where nobody asks any more.
            if events.send(Event::Up(sender)).await.is_err() {
                return;
            }
            let (mut from, mut to) = split(stream);
            let hear = async {
                while let Ok(answer) = read(&mut from, MESSAGE_BYTES_MAX).await {
                    if events.send(Event::Answer(answer)).await.is_err() {
                        break;
                    }
                }
            };
            let ask = async {
                while let Some(question) = questions.recv().await {
                    if write(&mut to, &question).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! {
                biased;
                () = hear => {}
                () = ask => {}
            }
            if events.send(Event::Down).await.is_err() {
                return;
            }
        }
        sleep(PAUSE).await;
    }
}

/// One message with its length before it.
///
/// # Errors
/// The connection's, or it is longer than that.
pub(super) async fn read(from: &mut (impl AsyncRead + Unpin), most: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(from.read_u16().await?);
    if length > most {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    from.read_exact(&mut message).await?;
    Ok(message)
}

/// The other way.
///
/// # Errors
/// The connection's.
pub(super) async fn write(to: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    to.write_all(&[&length.to_be_bytes()[..], message].concat()).await
}
