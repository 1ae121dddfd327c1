//! Freezing a machine, and restoring others from it: QEMU's own migration, to and from a file of ours.
//!
//! ```text
//! freeze:  stop ─► migrate ──socket──► our file, its digest        go on: look that all of it is there ─► cont
//! restore: QEMU with `-incoming defer` ─► migrate-incoming ◄──socket── our file, its digest looked at ─► stands still
//! ```
//!
//! QEMU never opens the file: it is sent, so each machine has a copy of its own in its own memory, with any version of QEMU
//! (before 8.2 one that maps a file opens it for writing, even where it never writes to it). A machine whose QEMU is told
//! anything else than what was frozen never goes on.

use super::watch::{Question, Watch};
use super::{GLANCE, LOOK_DEADLINE, Qemu};
use crate::files::plain;
use crate::vm::{Frozen, VmError, VmName};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

/// Takes 0.3 s on an idle host; the file may have gigabytes.
const FREEZE_DEADLINE: Duration = Duration::from_secs(120);

/// For one piece of the file, in either direction.
const PIECE_DEADLINE: Duration = Duration::from_secs(30);

/// What is read, digested and sent at once.
const PIECE_BYTES: usize = 1 << 20;

/// Bytes a second: QEMU's own limit is 128 MiB.
const UNLIMITED: u64 = 1 << 40;

/// What QEMU says of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Yes,
    NotYet,
    No,
}

fn moved(answer: &Value) -> Moved {
    match answer.get("status").and_then(Value::as_str) {
        Some("completed") => Moved::Yes,
        Some("failed" | "cancelled" | "cancelling") => Moved::No,
        _ => Moved::NotYet,
    }
}

impl Qemu {
    /// QEMU's answer to a command.
    async fn command(
        &self,
        what: &'static str,
        name: &VmName,
        command: Value,
        until: Instant,
    ) -> Result<Value, VmError> {
        let refused = |error: String| VmError::refused(what, name, error);
        let asked = async {
            let questions = self.listening(name, Watch::questions).await?;
            let (reply, answer) = oneshot::channel();
            let gone = || refused("its QEMU has gone".into());
            questions.send(Question::Command(command, reply)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?.map_err(refused)
        };
        timeout_at(until, asked).await.map_err(|_| VmError::late(what, name, LOOK_DEADLINE))?
    }

    /// Waits until QEMU says that all has moved.
    async fn all_moved(&self, what: &'static str, name: &VmName, until: Instant) -> Result<(), VmError> {
        loop {
            let answer = self.command(what, name, json!({ "execute": "query-migrate" }), until).await?;
            match moved(&answer) {
                Moved::Yes => return Ok(()),
                Moved::NotYet => sleep(GLANCE).await,
                Moved::No => return Err(VmError::refused(what, name, format!("QEMU says: {answer}"))),
            }
        }
    }

    pub(super) async fn freeze_one(&self, name: &VmName, state: &Path) -> Result<[u8; 32], VmError> {
        const WHAT: &str = "freeze VM";
        let until = Instant::now() + FREEZE_DEADLINE;
        let socket = self.0.records.path(name, "mig");
        let frozen = self.take(name, state, &socket, until).await;
        self.records(WHAT, name, move |_| unlink(&socket)).await?;
        frozen
    }

    async fn take(&self, name: &VmName, state: &Path, socket: &Path, until: Instant) -> Result<[u8; 32], VmError> {
        const WHAT: &str = "freeze VM";
        let refused = |error: io::Error| VmError::refused(WHAT, name, error);
        let late = || VmError::late(WHAT, name, FREEZE_DEADLINE);
        let path = socket.to_owned();
        self.records(WHAT, name, move |_| unlink(&path)).await?;
        let listener = UnixListener::bind(socket).map_err(refused)?;
        self.command(WHAT, name, json!({ "execute": "stop" }), until).await?;
        let limit = json!({ "execute": "migrate-set-parameters", "arguments": { "max-bandwidth": UNLIMITED } });
        self.command(WHAT, name, limit, until).await?;
        let migrate = json!({ "execute": "migrate", "arguments": { "uri": uri(WHAT, name, socket)? } });
        self.command(WHAT, name, migrate, until).await?;
        let (stream, _) = timeout_at(until, listener.accept()).await.map_err(|_| late())?.map_err(refused)?;
        let stream = blocking(stream).map_err(refused)?;
        let file = state.to_owned();
        let written = tokio::task::spawn_blocking(move || {
            let file = File::options().write(true).create_new(true).mode(0o400).open(file)?;
            let digest = carry(stream, &file)?;
            file.sync_all()?;
            Ok(digest)
        });
        let digest = written.await.map_err(io::Error::other).and_then(|written| written).map_err(refused)?;
        self.all_moved(WHAT, name, until).await?;
        Ok(digest)
    }

    /// Sends a machine that was just started, and stands still, what it is to be.
    pub(super) async fn restore(
        &self,
        name: &VmName,
        frozen: &Frozen,
        socket: &Path,
        until: Instant,
    ) -> Result<(), VmError> {
        const WHAT: &str = "restore VM";
        let refused = |error: io::Error| VmError::refused(WHAT, name, error);
        let incoming = json!({ "execute": "migrate-incoming", "arguments": { "uri": uri(WHAT, name, socket)? } });
        self.command(WHAT, name, incoming, until).await?;
        let late = || VmError::late(WHAT, name, LOOK_DEADLINE);
        let stream = timeout_at(until, UnixStream::connect(socket)).await.map_err(|_| late())?.map_err(refused)?;
        let stream = blocking(stream).map_err(refused)?;
        let state = frozen.state.clone();
        let sent = tokio::task::spawn_blocking(move || {
            let file = plain::open(&state)?;
            carry(file, stream)
        });
        let sent = sent.await.map_err(io::Error::other).and_then(|sent| sent);
        let socket = socket.to_owned();
        self.records(WHAT, name, move |_| unlink(&socket)).await?;
        match sent {
            Ok(digest) if digest == frozen.sha256 => self.all_moved(WHAT, name, until).await,
            Ok(_) => Err(VmError::Damaged { name: name.to_string() }),
            // QEMU did not like what it read; it may not have read what we have.
            Err(error) => match digest_of(frozen.state.clone()).await {
                Ok(digest) if digest == frozen.sha256 => Err(refused(error)),
                _ => Err(VmError::Damaged { name: name.to_string() }),
            },
        }
    }

    pub(super) async fn go_on_one(&self, name: &VmName) -> Result<(), VmError> {
        const WHAT: &str = "go on with VM";
        let until = Instant::now() + LOOK_DEADLINE;
        let answer = self.command(WHAT, name, json!({ "execute": "query-status" }), until).await?;
        match answer.get("status").and_then(Value::as_str) {
            Some("running") => Ok(()),
            Some("paused") => self.command(WHAT, name, json!({ "execute": "cont" }), until).await.map(drop),
            Some(word) => Err(VmError::refused(WHAT, name, format!("it is `{word}`"))),
            None => Err(VmError::refused(WHAT, name, "QEMU does not say how it is")),
        }
    }
}

/// A socket as QEMU's migration names it.
fn uri(what: &'static str, name: &VmName, socket: &Path) -> Result<String, VmError> {
    let path = socket.to_str().ok_or_else(|| VmError::refused(what, name, "its directory is no UTF-8"))?;
    Ok(format!("unix:{path}"))
}

fn blocking(stream: UnixStream) -> io::Result<std::os::unix::net::UnixStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PIECE_DEADLINE))?;
    stream.set_write_timeout(Some(PIECE_DEADLINE))?;
    Ok(stream)
}

/// Copies all of it; the digest of what was copied. Blocks.
fn carry(mut from: impl Read, mut to: impl Write) -> io::Result<[u8; 32]> {
    let (mut digest, mut piece) = (Sha256::new(), vec![0; PIECE_BYTES]);
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(digest.finalize().into()),
            Ok(count) => {
                digest.update(&piece[..count]);
                to.write_all(&piece[..count])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

async fn digest_of(file: PathBuf) -> io::Result<[u8; 32]> {
    let read = tokio::task::spawn_blocking(move || carry(plain::open(&file)?, io::sink()));
    read.await.map_err(io::Error::other)?
}

fn unlink(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_of_all_that_was_copied() {
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES + 7).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let mut copy = Vec::new();
        let digest = carry(&bytes[..], &mut copy).unwrap();
        assert!(copy == bytes && digest == <[u8; 32]>::from(Sha256::digest(&bytes)));
        let mut other = bytes.clone();
        other[PIECE_BYTES] ^= 1;
        assert_ne!(carry(&other[..], io::sink()).unwrap(), digest);
    }

    #[test]
    fn what_qemu_says_of_a_migration() {
        for (status, expected) in
            [("completed", Moved::Yes), ("failed", Moved::No), ("active", Moved::NotYet), ("setup", Moved::NotYet)]
        {
            assert_eq!(moved(&json!({ "status": status })), expected, "{status}");
        }
        assert_eq!(moved(&json!({})), Moved::NotYet, "it has not begun");
    }
}
