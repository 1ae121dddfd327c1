//! A door behind a port: one session after another, and each connection of the runner a stream of one of them.
//!
//! One thread with a runtime of its own. A session lives as long as its host: a daemon that restarts ends it at any
//! byte, and the next one begins by a handshake ([`dayfly_wire`]). A connection whose stream was accepted is bound to
//! its session and ends with it, as a connection to a daemon does; one whose stream was not is nobody's yet, and waits
//! for the next session as long as its patience lasts.

use super::forward::{self, Forward};
use super::port::Port;
use super::shuttle::{Broken, copy};
use super::{BUFFER_BYTES, Shared, Slot, session};
use dayfly_guest_config::Pass;
use dayfly_wire::{Limits, Opener, Stream};
use std::io;
use std::net;
use std::pin::pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Takes connections to the wire. As many wait in it as there are slots.
#[derive(Clone)]
pub(super) struct Sender(mpsc::UnboundedSender<(Slot, net::TcpStream)>);

impl Sender {
    /// Leaves this connection to the wire.
    pub(super) fn serve(&self, slot: Slot, runner: net::TcpStream) {
        // It fails if the wire's thread has panicked; the connection is closed then.
        let _ = self.0.send((slot, runner));
    }
}

/// Begins to look for hosts at `port`.
///
/// # Errors
/// If runtime or thread cannot be made.
pub(super) fn start(
    shared: Arc<Shared>,
    port: Box<dyn Port>,
    pass: Pass,
    patience: Duration,
    forwards: Vec<Forward>,
) -> io::Result<Sender> {
    let (sender, connections) = mpsc::unbounded_channel();
    let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
    thread::Builder::new().name("wire".into()).spawn(move || {
        runtime.block_on(run(shared, port, pass, patience, forwards, connections));
    })?;
    Ok(Sender(sender))
}

async fn run(
    shared: Arc<Shared>,
    port: Box<dyn Port>,
    pass: Pass,
    patience: Duration,
    forwards: Vec<Forward>,
    mut connections: mpsc::UnboundedReceiver<(Slot, net::TcpStream)>,
) {
    let (current, session) = watch::channel(None);
    let (wire, hearing) = (limits(&shared, !forwards.is_empty()), Arc::clone(&shared));
    let mut forwarding = pin!(forward::run(forwards, session.clone(), patience));
    let mut sessions = pin!(session::keep(port, &pass, &shared.limits, &wire, move || hearing.heard(), &current));
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            // What was begun before what comes. All of them are cancel safe, or pinned.
            biased;
            () = &mut sessions => return,
            () = &mut forwarding => return,
            Some(_) = tasks.join_next() => {}
            connection = connections.recv() => {
                // The relay has ended: tests only.
                let Some((slot, runner)) = connection else { return };
                let session = session.clone();
                tasks.spawn(async move {
                    serve(runner, session, patience).await;
                    drop(slot);
                });
            }
        }
    }
}

fn limits(shared: &Shared, forwards: bool) -> Limits {
    let opened = u32::try_from(shared.limits.connections).unwrap_or(u32::MAX);
    let limits = Limits::default();
    let limits = Limits { opened: opened.min(limits.opened), ..limits };
    if forwards { limits.with_forwards() } else { limits }
}

/// One connection of the runner.
async fn serve(runner: net::TcpStream, session: watch::Receiver<Option<Opener>>, patience: Duration) {
    let Ok(runner) = runner.set_nonblocking(true).and_then(|()| TcpStream::from_std(runner)) else { return };
    let Ok(Some(stream)) = timeout(patience, open(session)).await else { return };
    // Failing to set it costs 40 ms here and there, no more.
    let _ = runner.set_nodelay(true);
    shuttle(runner, stream).await;
}

/// A stream that the door has accepted, in this session or a later one.
async fn open(mut session: watch::Receiver<Option<Opener>>) -> Option<Stream> {
    loop {
        let opener = session.wait_for(Option::is_some).await.ok()?.clone()?;
        if let Ok(mut stream) = opener.open().await
            && stream.accepted().await.is_ok()
        {
            return Some(stream);
        }
        // That session is over, and says so in a moment; if it is not, it refused, and is asked again.
        let _ = timeout(Duration::from_secs(1), session.changed()).await;
    }
}

/// Copies both ways until both are at their ends.
async fn shuttle(mut runner: TcpStream, stream: Stream) {
    let (mut from_runner, mut to_runner) = runner.split();
    let (mut from_door, mut to_door) = tokio::io::split(stream);
    let up = async {
        match copy(&mut from_runner, &mut to_door, BUFFER_BYTES).await {
            // A door that wants no more may still answer.
            Ok(()) | Err(Broken::Writing) => Ok(()),
            // The runner is gone. What is left of the stream ends by itself.
            Err(Broken::Reading) => Err(()),
        }
    };
    let down = async { copy(&mut from_door, &mut to_runner, BUFFER_BYTES).await.map_err(drop) };
    // Whoever is gone takes the other way with it; a clean end does not.
    let _ = tokio::try_join!(up, down);
}
