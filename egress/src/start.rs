//! How is a process told what it is for? One line of JSON with two descriptors over its standard input, one line back.
//!
//! ```text
//! {"version":1,"pass":"…","policy":{…},"dns":["192.0.2.53:53"]}      and [the VM's port, the audit file]
//! {"version":1,"ready":true}  or  {"error":"…"}
//! ```
//!
//! Nothing of it is in an argument, in the environment or on a disk, and the process needs no path: it can forbid itself
//! the whole file system. It is a protocol between versions: a process outlives the daemon that started it, and its
//! program may be newer than the daemon.

use crate::policy::Policy;
use dayfly_guest_config::Pass;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::time::timeout;

/// Of this protocol, and of what the audit file holds.
pub const VERSION: u32 = 1;

/// Bytes of the first line at most, its line break included.
pub const START_BYTES_MAX: usize = 64 * 1024;

/// Bytes of the answer at most.
const ANSWER_BYTES_MAX: usize = 4096;

/// For the whole exchange, on either side: a socket unit may have to start the process first.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a process is told.
#[derive(Clone, Serialize, Deserialize)]
pub struct Start {
    version: u32,
    pass: String,
    policy: Policy,
    dns: Vec<SocketAddr>,
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Start").field("policy", &self.policy).field("dns", &self.dns).finish_non_exhaustive()
    }
}

impl Start {
    /// `pass`: the egress' own ([`Pass::for_egress`]). `dns`: the resolvers that the host uses, in their order.
    #[must_use]
    pub fn new(pass: &Pass, policy: Policy, dns: Vec<SocketAddr>) -> Self {
        Self { version: VERSION, pass: pass.to_text(), policy, dns }
    }

    /// Its parts.
    ///
    /// # Errors
    /// [`StartError`] if it makes no sense.
    pub(crate) fn into_parts(self) -> Result<(Pass, Policy, Vec<SocketAddr>), StartError> {
        if self.version != VERSION {
            return Err(StartError::Version(self.version));
        }
        let pass = Pass::from_text(&self.pass).ok_or(StartError::Pass)?;
        Ok((pass, self.policy, self.dns))
    }
}

/// Why a process did not begin. Its text goes to the daemon.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket broke, nothing came in time, or the system has no room.
    #[error("begin")]
    Io(#[from] io::Error),
    /// No line of this form.
    #[error("what the daemon says makes no sense")]
    Line(#[from] serde_json::Error),
    /// Too long, or it ended before.
    #[error("what the daemon says has no end within {START_BYTES_MAX} bytes")]
    Length,
    /// It is of another version.
    #[error("the daemon speaks version {0}, this program {VERSION}: restart the daemon after its upgrade")]
    Version(u32),
    /// No pass.
    #[error("what the daemon says holds no pass")]
    Pass,
    /// One is missing.
    #[error("the daemon hands over {0} descriptors instead of 2")]
    Descriptors(usize),
    /// Another process writes it.
    #[error("the audit file is in use by another process")]
    Locked,
    /// The kernel's, or a sandbox's around this process.
    #[error("confine the process")]
    Confine(#[from] crate::confine::ConfineError),
}

/// What came over the socket.
pub(crate) struct Received {
    pub(crate) start: Start,
    pub(crate) port: UnixStream,
    pub(crate) audit: File,
}

/// Reads the first line and the descriptors. Blocks, for [`PATIENCE`] a read.
///
/// # Errors
/// [`StartError`].
pub(crate) fn receive(socket: &UnixStream) -> Result<Received, StartError> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut line = vec![0; START_BYTES_MAX];
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    let mut have = {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(socket, &mut [IoSliceMut::new(&mut line)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(io::Error::from)?;
        for rights in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = rights {
                descriptors.extend(rights);
            }
        }
        message.bytes
    };
    let end = loop {
        if let Some(end) = line[..have].iter().position(|byte| *byte == b'\n') {
            break end;
        }
        let mut socket = socket;
        match socket.read(&mut line[have..])? {
            // Also: there is no more room.
            0 => return Err(StartError::Length),
            count => have += count,
        }
    };
    let start = serde_json::from_slice(&line[..end])?;
    let count = descriptors.len();
    let Ok([port, audit]) = <[OwnedFd; 2]>::try_from(descriptors) else { return Err(StartError::Descriptors(count)) };
    Ok(Received { start, port: UnixStream::from(port), audit: File::from(audit) })
}

#[derive(Serialize, Deserialize)]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ready: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Answers the daemon; one that has gone meanwhile is not waited for.
pub(crate) fn answer(mut socket: &UnixStream, outcome: Result<(), &StartError>) {
    let answer = match outcome {
        Ok(()) => Answer { version: Some(VERSION), ready: Some(true), error: None },
        Err(error) => Answer { version: None, ready: None, error: Some(crate::chain(error)) },
    };
    if let Ok(mut line) = serde_json::to_vec(&answer) {
        line.push(b'\n');
        let _ = socket.write_all(&line);
    }
}

/// Why nothing carries a VM's egress.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The socket broke.
    #[error("speak with dayfly-egress")]
    Io(#[from] io::Error),
    /// Nothing came.
    #[error("dayfly-egress did not answer within {} s", PATIENCE.as_secs())]
    Late,
    /// It does not fit into the first line.
    #[error("egress policy is too long to be handed over: at most {START_BYTES_MAX} bytes")]
    TooLong,
    /// What the process says of it.
    #[error("dayfly-egress: {0}")]
    Refused(String),
    /// It ended, or said something else.
    #[error("dayfly-egress ended before it was ready")]
    Ended,
}

/// Tells the process at the other end of `socket` what it is for, and waits until it is ready: then it serves the VM behind
/// `port` until that hangs up, whatever becomes of the socket and of us. It holds a lock on `audit` (`flock`, exclusive)
/// for as long as it lives; ours is closed here, for a lock belongs to all who hold the same opening of a file.
///
/// # Errors
/// [`HandOverError`]; the process ends then.
///
/// # Cancel safety
/// None: the process may be serving.
pub async fn hand_over(socket: UnixStream, port: OwnedFd, audit: OwnedFd, start: &Start) -> Result<(), HandOverError> {
    let mut line = serde_json::to_vec(start).map_err(io::Error::from)?;
    line.push(b'\n');
    if line.len() > START_BYTES_MAX {
        return Err(HandOverError::TooLong);
    }
    socket.set_nonblocking(true)?;
    let socket = tokio::net::UnixStream::from_std(socket)?;
    timeout(PATIENCE, exchange(socket, port, audit, &line)).await.map_err(|_| HandOverError::Late)?
}

async fn exchange(
    mut socket: tokio::net::UnixStream,
    port: OwnedFd,
    audit: OwnedFd,
    line: &[u8],
) -> Result<(), HandOverError> {
    let sent = socket
        .async_io(Interest::WRITABLE, || {
            let descriptors = [port.as_fd(), audit.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            Ok(sendmsg(&socket, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?)
        })
        .await?;
    drop((port, audit));
    socket.write_all(&line[sent..]).await?;
    let mut came = Vec::new();
    let mut answer = (&mut socket).take(ANSWER_BYTES_MAX as u64);
    while !came.contains(&b'\n') {
        if answer.read_buf(&mut came).await? == 0 {
            return Err(HandOverError::Ended);
        }
    }
    let line = came.split(|byte| *byte == b'\n').next().unwrap_or_default();
    match serde_json::from_slice(line) {
        Ok(Answer { ready: Some(true), .. }) => Ok(()),
        Ok(Answer { error: Some(error), .. }) => {
            Err(HandOverError::Refused(error.chars().filter(|c| !c.is_control()).take(500).collect()))
        }
        _ => Err(HandOverError::Ended),
    }
}
