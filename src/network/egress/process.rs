//! The real ones: started as QEMU is without libvirt, or by systemd, which gives each a user of its own.

use super::holders::kill_holders;
use super::{Egress, EgressError, EgressOf, Terms, host};
use crate::BoxFuture;
use crate::files::plain;
use crate::process::{find_program, start_outliving};
use dayfly_egress::audit::{self, Destination};
use dayfly_egress::policy::Policy;
use dayfly_egress::{Start, hand_over};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// The program, beside ours or in one of the system's directories.
pub const PROGRAM: &str = "dayfly-egress";

/// Where systemd listens for those who want one, by the package's `dayfly-egress.socket`.
pub const SERVICE_SOCKET: &str = "/run/dayfly-egress.sock";

/// QEMU accepts from its event loop; a guest under TCG can delay that.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How often it is looked whether one is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// How long one may take to end with its VM: it takes milliseconds.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// How long a killed one may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(3);

/// Between two looks at one that is about to go.
const GLANCE: Duration = Duration::from_millis(10);

/// Bytes of an audit that are read: such a file has half of it at most.
const AUDIT_BYTES_MAX: u64 = 2 * audit::FILE_BYTES_MAX;

/// Processes of this host.
#[derive(Clone, Debug)]
pub struct EgressProcesses {
    /// Where somebody else may start them for us.
    service: Option<PathBuf>,
}

impl EgressProcesses {
    /// Those that are started by whoever listens at `service`, if somebody does, and else by us.
    #[must_use]
    pub fn new(service: Option<&Path>) -> Self {
        Self { service: service.map(Path::to_owned) }
    }

    /// A socket to a process that has just begun, and waits to be told what it is for.
    async fn begin(&self) -> Result<UnixStream, EgressError> {
        if let Some(path) = &self.service {
            match timeout(CONNECT_DEADLINE, tokio::net::UnixStream::connect(path)).await {
                Ok(Ok(socket)) => return socket.into_std().map_err(EgressError::Start),
                // Nobody listens there: the unit is not installed.
                Ok(Err(error))
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
                Ok(Err(error)) => return Err(EgressError::Start(error)),
                Err(_) => return Err(EgressError::Start(io::ErrorKind::TimedOut.into())),
            }
        }
        let program = find_program(PROGRAM).ok_or(EgressError::NoProgram)?;
        let (ours, theirs) = UnixStream::pair().map_err(EgressError::Start)?;
        // What goes wrong it says on the socket, and afterwards by its end.
        let input = File::from(OwnedFd::from(theirs));
        start_outliving(program.as_os_str(), &[] as &[&str], &[], input, Stdio::null()).map_err(EgressError::Start)?;
        Ok(ours)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// The audit file, locked; `None`: a process holds it. Locked before anybody is started: who gets the opened file gets its
/// lock, so that there is no moment in which another daemon could take it for free.
fn open_locked(path: &Path) -> io::Result<Option<File>> {
    let file = plain::open_with(File::options().read(true).append(true).create(true).mode(0o600), path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether a process holds this file.
fn is_held(path: &Path) -> io::Result<bool> {
    let file = match plain::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

async fn held(path: &Path) -> io::Result<bool> {
    let path = path.to_owned();
    blocking(move || is_held(&path)).await
}

/// Waits until nobody holds this file. `false`: not by then.
async fn await_free(path: &Path, patience: Duration) -> io::Result<bool> {
    let until = Instant::now() + patience;
    while held(path).await? {
        if Instant::now() >= until {
            return Ok(false);
        }
        sleep(GLANCE).await;
    }
    Ok(true)
}

impl Egress for EgressProcesses {
    fn ensure<'a>(&'a self, of: &'a EgressOf, terms: &'a Terms) -> BoxFuture<'a, Result<(), EgressError>> {
        Box::pin(async move {
            let path = of.audit();
            let looked = blocking(move || Ok((open_locked(&path)?, host::own_addresses(), host::resolvers())));
            let (audit, own, dns) = looked.await.map_err(EgressError::Audit)?;
            let Some(audit) = audit else { return Ok(()) };
            let port = timeout(CONNECT_DEADLINE, tokio::net::UnixStream::connect(of.port())).await;
            let port = port.map_err(|_| EgressError::Port(io::ErrorKind::TimedOut.into()))?;
            let port = port.and_then(tokio::net::UnixStream::into_std).map_err(EgressError::Port)?;
            let start = Start::new(&terms.pass.for_egress(), Policy { own, ..terms.policy.clone() }, dns);
            Ok(hand_over(self.begin().await?, port.into(), audit.into(), &start).await?)
        })
    }

    fn gone<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let path = of.audit();
            // What cannot be looked at is taken for there.
            while held(&path).await.unwrap_or(true) {
                sleep(LOOK_INTERVAL).await;
            }
        })
    }

    fn audit<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<Vec<Destination>>> {
        let path = of.audit();
        Box::pin(blocking(move || {
            let mut bytes = Vec::new();
            match plain::open(&path) {
                Ok(file) => file.take(AUDIT_BYTES_MAX).read_to_end(&mut bytes)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(error),
            };
            Ok(audit::read(&bytes))
        }))
    }

    fn end<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let path = of.audit();
            if await_free(&path, END_PATIENCE).await? {
                return Ok(());
            }
            tracing::warn!(vm = %of.vm, "the egress of a machine that is gone does not end; killing it");
            let held = path.clone();
            blocking(move || kill_holders(PROGRAM, &held)).await?;
            if await_free(&path, KILL_PATIENCE).await? {
                return Ok(());
            }
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("`{PROGRAM}` holds `{}` although its VM is gone, and cannot be killed", path.display()),
            ))
        })
    }
}

#[cfg(test)]
mod tests;
