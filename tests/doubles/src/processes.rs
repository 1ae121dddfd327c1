//! A hypervisor whose machines are processes: for the kill harness, which ends daemons by SIGKILL and judges what
//! outlives them. It needs neither libvirt nor QEMU, and starts a machine in milliseconds.
//!
//! `hypervisor.uri = "processes:///DIRECTORY"` chooses it, in the program `dayfly-under-test` only; dayfly hands the
//! address to libvirt, which refuses it. In the directory are
//!
//! ```text
//! guest            the program that each machine runs, made by the harness
//! guest.log        what the machines print
//! df-<id>.vm       a machine's description: whose it is, then `up <pid>` once its sockets listen
//! ```
//!
//! The program is given its description as standard input, and the paths of channel and console, which it binds, as
//! QEMU does; that of the door's port stands in its environment. The description carries a lock that the process inherits before it begins, so the lock is the machine:
//! it is there from the fork to the last moment of the process, whoever started it and whatever became of that one.
//! A description without a lock is what a start or a machine left behind; who finds it removes it. Overlays and sockets
//! are the real ones.

use dayfly::BoxFuture;
use dayfly::failpoint::{self, Point};
use dayfly::files::plain;
use dayfly::process::start_outliving;
use dayfly::vm::paths::RealPaths;
use dayfly::vm::{Config, Host, HostInfo, Hypervisor, InstallationId, VmError, VmName, VmSpec, VmState, VmSummary};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// As for the real one.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Likewise.
const DESTROY_DEADLINE: Duration = Duration::from_secs(30);

/// Between two looks at a machine that is coming or going.
const LOOK_PAUSE: Duration = Duration::from_millis(3);

/// Machines as processes. See the module.
pub struct Processes {
    directory: PathBuf,
    /// Held while a description is looked at or made: a look takes its lock for a moment. Never across an await.
    looking: Arc<Mutex<()>>,
}

/// First line of a description.
#[derive(Serialize, Deserialize)]
struct Owner {
    installation: InstallationId,
    bound: Option<(String, u64)>,
}

/// A machine that exists.
struct Alive {
    owner: Option<Owner>,
    /// `None`: its program has not come so far yet.
    pid: Option<Pid>,
}

impl Processes {
    /// `None`: the address is not of this kind.
    #[must_use]
    pub fn of(config: &Config) -> Option<Self> {
        let directory = config.uri.strip_prefix("processes://")?;
        Some(Self { directory: directory.into(), looking: Arc::default() })
    }

    /// The host whose machines these are.
    #[must_use]
    pub fn host(self) -> Host {
        Host::new(Arc::new(self), Arc::new(RealPaths::default()))
    }

    fn description(&self, name: &VmName) -> PathBuf {
        self.directory.join(format!("{name}.vm"))
    }

    /// Runs blocking calls where they may block, one at a time.
    async fn blocking<T: Send + 'static>(
        &self,
        what: &'static str,
        name: String,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, VmError> {
        let looking = self.looking.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _one_at_a_time = looking.lock().unwrap_or_else(PoisonError::into_inner);
            work()
        });
        let done = done.await.map_err(io::Error::other).and_then(|done| done);
        done.map_err(|source| VmError::Refused { what, name, source: source.into() })
    }

    async fn look(&self, what: &'static str, name: &VmName) -> Result<Option<Alive>, VmError> {
        let path = self.description(name);
        self.blocking(what, name.to_string(), move || look(&path)).await
    }
}

/// The machine of this description, if it exists; what is left of one that does not is removed.
fn look(path: &Path) -> io::Result<Option<Alive>> {
    let mut file = match plain::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            fs::remove_file(path)?;
            Ok(None)
        }
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            let mut lines = text.lines();
            let owner = lines.next().and_then(|line| serde_json::from_str(line).ok());
            let pid = lines.find_map(|line| Pid::from_raw(line.strip_prefix("up ")?.parse().ok()?));
            Ok(Some(Alive { owner, pid }))
        }
        Err(error) => Err(error.into()),
    }
}

/// Starts the process of a machine that does not exist yet.
fn spawn(directory: &Path, path: &Path, spec: &VmSpec) -> io::Result<()> {
    let mut file = File::options().read(true).append(true).create_new(true).mode(0o600).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    let owner = Owner { installation: spec.installation.clone(), bound: spec.bound.clone() };
    file.write_all(&serde_json::to_vec(&owner)?)?;
    file.write_all(b"\n")?;
    let log = File::options().append(true).create(true).mode(0o600).open(directory.join("guest.log"))?;
    let [channel, door, console] =
        [VmSpec::channel_socket, VmSpec::door_socket, VmSpec::console_socket].map(|of| of(&spec.socket_dir, &spec.id));
    // The lock tells its end, so nobody need wait for it.
    // A program of before the door was a wire knows two sockets, and passes over what is beside them.
    let beside = [("DAYFLY_DOOR", door.into_os_string())];
    start_outliving(directory.join("guest").as_os_str(), &[&channel, &console], &beside, file, log)
}

impl Hypervisor for Processes {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(async {
            Ok(HostInfo { version: "processes".into(), cpus: 64, memory_mib: 1 << 20, kvm_offered: false })
        })
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        const WHAT: &str = "start VM";
        Box::pin(async move {
            let name = VmName::from(spec.id.clone());
            let (directory, path, spec) = (self.directory.clone(), self.description(&name), spec.clone());
            let made = move || if look(&path)?.is_some() { Ok(()) } else { spawn(&directory, &path, &spec) };
            self.blocking(WHAT, name.to_string(), made).await?;
            // In flight: the process exists, and nobody has been told.
            failpoint::reached(Point::K8);
            let since = Instant::now();
            while since.elapsed() < START_DEADLINE {
                match self.look(WHAT, &name).await? {
                    Some(Alive { pid: Some(_), .. }) => return Ok(()),
                    Some(_) => sleep(LOOK_PAUSE).await,
                    None => {
                        let source = "its process ended at once; see guest.log".into();
                        return Err(VmError::Refused { what: WHAT, name: name.to_string(), source });
                    }
                }
            }
            Err(VmError::Deadline { what: WHAT, name: name.to_string(), seconds: START_DEADLINE.as_secs() })
        })
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        Box::pin(async move {
            let alive = self.look("read state of VM", name).await?;
            Ok(if alive.is_some() { VmState::Running } else { VmState::Gone })
        })
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        const WHAT: &str = "destroy VM";
        Box::pin(async move {
            let since = Instant::now();
            while since.elapsed() < DESTROY_DEADLINE {
                let Some(alive) = self.look(WHAT, name).await? else { return Ok(()) };
                if let Some(pid) = alive.pid {
                    // It may end by itself in this very moment.
                    let _ = kill_process_group(pid, Signal::KILL);
                }
                sleep(LOOK_PAUSE).await;
            }
            Err(VmError::Deadline { what: WHAT, name: name.to_string(), seconds: DESTROY_DEADLINE.as_secs() })
        })
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        let (directory, installation) = (self.directory.clone(), installation.clone());
        Box::pin(self.blocking("list VMs of", installation.to_string(), move || {
            let mut vms = Vec::new();
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                let name = entry.file_name();
                let name = name.to_str().and_then(|name| VmName::parse(name.strip_suffix(".vm")?));
                let Some(name) = name else { continue };
                let Some(alive) = look(&entry.path())? else { continue };
                if alive.owner.is_some_and(|owner| owner.installation == installation) {
                    vms.push(VmSummary { name, state: VmState::Running });
                }
            }
            vms.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(vms)
        }))
    }
}

#[cfg(test)]
mod tests;
