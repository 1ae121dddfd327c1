//! How a machine is started, watched and ended: the hypervisor seam.
//!
//! The trait speaks in names and plain data; no handle outlives a call, so a VM that was adopted
//! after a restart is no special case. Behind it: [`libvirt`], [`qemu`] without it, and the fakes of `dayfly-doubles`. What all back ends share
//! stands beside it, as plain structs: [`disks`] and [`sockets`]; a [`Host`] is the three of them.
//! Used by `supply` (and `recovery`, which lists). No call blocks the async runtime, each has a
//! deadline of its own, and each may run twice: "already there" and "already gone" are successes.

mod config;
pub mod confine;
pub mod console;
pub mod disks;
pub mod domain_xml;
pub mod libvirt;
pub mod paths;
pub mod proof;
pub mod qemu;
pub mod sockets;
mod state;
mod usage;

pub use config::{AccelChoice, Backend, Config, UsersFound, UsersMissing};
pub(crate) use config::{PASSWD, PASSWD_BYTES_MAX};
pub use confine::{Confinement, Limits, VmUser, VmUsers};
pub use state::{Ending, Pause, VmState};
pub use usage::Usage;

use crate::BoxFuture;
use crate::rng::Rng;
use disks::Disks;
use paths::Paths;
use serde::{Deserialize, Serialize};
use sockets::Sockets;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// Identity of one VM: 80 random bits as 16 characters of lower-case base32 (`a-z2-7`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

impl VmId {
    /// A new one.
    #[must_use]
    pub fn random(rng: &Rng) -> Self {
        const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let bits = rng.bytes::<10>().iter().fold(0_u128, |bits, byte| (bits << 8) | u128::from(*byte));
        Self(
            (0..16).rev().map(|i| char::from(ALPHABET[usize::try_from((bits >> (i * 5)) & 31).unwrap_or(0)])).collect(),
        )
    }

    /// The 16 characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The VM's MAC: derived, so that it needs no record. Locally administered, with 40 of the id's 80 bits: QEMU's
    /// own range (`52:54:00`) leaves 24, of which 5,000 machines would find a pair with the same.
    #[must_use]
    pub fn mac(&self) -> String {
        let five = |b: u8| if b.is_ascii_lowercase() { b - b'a' } else { b - b'2' + 26 };
        let bits = self.0.bytes().take(8).fold(0_u64, |bits, b| bits << 5 | u64::from(five(b)));
        let [.., a, b, c, d, e] = bits.to_be_bytes();
        format!("52:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
    }
}

/// The text is no VM id.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no VM id (16 characters of a-z2-7)")]
pub struct BadVmId(String);

impl TryFrom<String> for VmId {
    type Error = BadVmId;
    fn try_from(text: String) -> Result<Self, BadVmId> {
        if text.len() == 16 && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7')) {
            Ok(Self(text))
        } else {
            Err(BadVmId(text))
        }
    }
}

impl FromStr for VmId {
    type Err = BadVmId;
    fn from_str(text: &str) -> Result<Self, BadVmId> {
        Self::try_from(text.to_owned())
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of a VM at the hypervisor, `df-` + id: follows from the id and parses back.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(VmId);

impl VmName {
    /// The id that the name was made from.
    #[must_use]
    pub fn id(&self) -> &VmId {
        &self.0
    }

    /// `None`: not a name of ours.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Some(Self(name.strip_prefix("df-")?.parse().ok()?))
    }
}

impl From<VmId> for VmName {
    fn from(id: VmId) -> Self {
        Self(id)
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "df-{}", self.0)
    }
}

impl fmt::Debug for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "df-{}", self.0)
    }
}

/// This installation of dayfly: 80 random bits, made once, in the metadata of each domain, so
/// that clean-up never touches a machine of somebody else's.
pub type InstallationId = VmId;

/// Virtualisation that runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator: slow, and it isolates nothing.
    Tcg,
}

/// How the guest's kernel is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// Kernel and initrd beside the disk, loaded by the hypervisor.
    Direct {
        /// Kernel image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: PathBuf,
        /// Kernel command line.
        cmdline: String,
    },
    /// The disk's own boot loader.
    Disk,
}

/// What the machine's network is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// No card: a port of the VM's own, behind which a `dayfly-egress` connects (decision D27).
    Egress,
    /// SLIRP: no host set-up, and no isolation from the host's loopback.
    User,
    /// A libvirt network, with this tap name.
    Bridge {
        /// libvirt's name of the network.
        network: String,
        /// Name of the tap device.
        tap: String,
    },
}

/// A VM that was frozen, from which others are restored. Its files are ours, and nobody writes to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// All that it was, memory and devices, as the hypervisor wrote it ([`Hypervisor::freeze`]). Nobody but us opens it: each
    /// restored VM is sent its own copy.
    pub state: PathBuf,
    /// The digest of that: one bit more or less, and no VM goes on from it.
    pub sha256: [u8; 32],
    /// Its disk as it was then (qcow2), between the overlay and the base image; opened for reading only.
    pub disk: PathBuf,
}

/// Everything that a VM is started from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// Its id; name, MAC and UUID follow from it.
    pub id: VmId,
    /// Whose it is.
    pub installation: InstallationId,
    /// Runner entry and job, for people who read the domain's metadata; `None` while unbound.
    pub bound: Option<(String, u64)>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// How it runs.
    pub accel: Accel,
    /// How it boots.
    pub boot: Boot,
    /// Its overlay (qcow2).
    pub overlay: PathBuf,
    /// The overlay's base image (qcow2): named, so that no header has to be believed.
    pub base: PathBuf,
    /// What it is restored from; `None`: it boots.
    pub frozen: Option<Frozen>,
    /// Its network.
    pub attachment: Attachment,
    /// Disks that it reads and never writes, in this order behind its own.
    pub read_only: Vec<ReadOnlyDisk>,
    /// Whether its guest may run VMs of its own, where the host's KVM lets it.
    pub nested: bool,
    /// As whom its QEMU runs, and what it may use at most.
    pub confine: Confinement,
    /// Directory for the unix sockets of channel, door, console, shell and egress.
    pub socket_dir: PathBuf,
}

/// A raw disk that several VMs may read at once, readable to QEMU's user as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOnlyDisk {
    /// What the guest finds it by: letters, digits and `-`, at most 20 bytes.
    pub serial: String,
    /// Its file.
    pub path: PathBuf,
}

impl VmSpec {
    /// Socket of the guest channel. Short: unix socket paths end at 107 bytes.
    #[must_use]
    pub fn channel_socket(socket_dir: &Path, id: &VmId) -> PathBuf {
        socket_dir.join(format!("df-{id}.guest"))
    }

    /// Socket of the port that carries what its guest says to its door.
    #[must_use]
    pub fn door_socket(socket_dir: &Path, id: &VmId) -> PathBuf {
        socket_dir.join(format!("df-{id}.door"))
    }

    /// Socket of the port that carries what its guest sends out, where it has no network card.
    #[must_use]
    pub fn egress_socket(socket_dir: &Path, id: &VmId) -> PathBuf {
        socket_dir.join(format!("df-{id}.egress"))
    }

    /// Socket of the port by which its guest is asked for a shell.
    #[must_use]
    pub fn shell_socket(socket_dir: &Path, id: &VmId) -> PathBuf {
        socket_dir.join(format!("df-{id}.shell"))
    }

    /// Socket of the serial console.
    #[must_use]
    pub fn console_socket(socket_dir: &Path, id: &VmId) -> PathBuf {
        socket_dir.join(format!("df-{id}.con"))
    }

    /// All of them. What its hypervisor binds, and what goes with it.
    #[must_use]
    pub fn sockets(&self) -> Vec<PathBuf> {
        let mut all = [Self::channel_socket, Self::door_socket, Self::console_socket, Self::shell_socket]
            .map(|of| of(&self.socket_dir, &self.id))
            .to_vec();
        if self.attachment == Attachment::Egress {
            all.push(Self::egress_socket(&self.socket_dir, &self.id));
        }
        all
    }
}

/// One VM of ours that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSummary {
    /// Its name.
    pub name: VmName,
    /// Its state.
    pub state: VmState,
}

/// What a host can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInfo {
    /// Hypervisor's own name and version, for people.
    pub version: String,
    /// CPUs of the host.
    pub cpus: u32,
    /// Memory of the host, MiB.
    pub memory_mib: u64,
    /// Whether the hypervisor says that it offers KVM (a boot has yet to prove it).
    pub kvm_offered: bool,
}

/// Memory of the machine that we run on, MiB.
pub(crate) fn own_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) >> 20
}

/// Why a call to the hypervisor failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Nobody answers at this address; transient.
    #[error("connect to hypervisor `{uri}`")]
    Unreachable {
        /// libvirt URI, or path of a socket or program.
        uri: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answered, and refused.
    #[error("{what} `{name}`")]
    Refused {
        /// The call, in words: `start VM`.
        what: &'static str,
        /// VM or path.
        name: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What it is to be restored from is not what was frozen.
    #[error("restore VM `{name}`: what was frozen is not what it was")]
    Damaged {
        /// VM.
        name: String,
    },
    /// No answer within the deadline; the call may still take effect.
    #[error("{what} `{name}`: no answer within {seconds} s")]
    Deadline {
        /// The call, in words.
        what: &'static str,
        /// VM or path.
        name: String,
        /// The deadline.
        seconds: u64,
    },
}

impl VmError {
    /// `what` of this VM or path was refused, because of `source`.
    pub fn refused(
        what: &'static str,
        name: &(impl fmt::Display + ?Sized),
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Refused { what, name: name.to_string(), source: source.into() }
    }

    /// `what` of this VM or path had no answer within `deadline`.
    pub fn late(what: &'static str, name: &(impl fmt::Display + ?Sized), deadline: Duration) -> Self {
        Self::Deadline { what, name: name.to_string(), seconds: deadline.as_secs() }
    }

    /// Whether trying again may help without anybody's doing.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Deadline { .. })
    }
}

/// A stream of bytes to or from a guest.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The hypervisor seam: machines, and nothing beside them. See the module's rules.
pub trait Hypervisor: Send + Sync + 'static {
    /// Connects and says what this host can do. Deadline 30 s: a libvirtd that has just been started
    /// asks each QEMU first.
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>>;

    /// Starts a transient VM. Deadline 60 s. One of this name and installation that runs already
    /// counts as started. One that is [restored](VmSpec::frozen) stands still until [`Hypervisor::go_on`].
    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>>;
    /// State of one VM; of one that has ended also how, where that was seen. Deadline 10 s.
    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>>;
    /// The first lines that the hypervisor itself has written of a VM, if it keeps such a log and lets us read it: for
    /// an operator's eyes. At most 300 bytes. Deadline 10 s.
    fn last_words<'a>(&'a self, _name: &'a VmName) -> BoxFuture<'a, Option<String>> {
        Box::pin(std::future::ready(None))
    }
    /// What a VM that runs has used so far, as far as is known. Deadline 10 s; whoever asks may drop it before.
    fn usage<'a>(&'a self, _name: &'a VmName) -> BoxFuture<'a, Usage> {
        Box::pin(std::future::ready(Usage::default()))
    }
    /// Whether VMs can be frozen here, and others restored from them.
    fn can_freeze(&self) -> bool {
        false
    }
    /// Stops a VM for good and writes all that it is, memory and devices, into a new file; its digest. It is there until it is
    /// destroyed. Nobody may be connected to its channel. Deadline 120 s.
    fn freeze<'a>(&'a self, name: &'a VmName, _state: &'a Path) -> BoxFuture<'a, Result<[u8; 32], VmError>> {
        Box::pin(std::future::ready(Err(VmError::refused("freeze VM", name, "this back end cannot"))))
    }
    /// Lets a VM go on that was restored and stands still. One that runs counts; one that was not restored to its end is
    /// refused. Deadline 10 s.
    fn go_on<'a>(&'a self, _name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(std::future::ready(Ok(())))
    }
    /// Ends a VM at once, and removes what is left of one that has ended; one that is gone counts as ended. Deadline 30 s.
    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>>;
    /// All VMs whose metadata carries this installation id, those included of which something is left, sorted by name.
    /// Deadline 10 s.
    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>>;
}

/// Machines, and what lies beside each. Clones are the same host.
#[derive(Clone)]
pub struct Host {
    /// Machines.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Their overlays.
    pub disks: Disks,
    /// Their wires.
    pub sockets: Sockets,
}

impl Host {
    /// The machines of `hypervisor`, what is beside them by `paths`.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, paths: Arc<dyn Paths>) -> Self {
        Self { hypervisor, disks: Disks::new(paths.clone()), sockets: Sockets::new(paths, None) }
    }

    /// Makes the directories of overlays and sockets, with the modes that they need: QEMU's user must be able to pass
    /// the first, nobody but us the second.
    ///
    /// # Errors
    /// The system's.
    pub async fn prepare(&self, overlay_dir: &Path, socket_dir: &Path) -> io::Result<()> {
        self.disks.prepare(overlay_dir).await?;
        self.sockets.prepare(socket_dir).await
    }
}
