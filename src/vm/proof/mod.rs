//! Does a guest of ours run here? Proven by a guest that does what ours need, and by nothing less (decision D16).
//!
//! Hosts exist on which `/dev/kvm` opens, creates a VM, and the guest never says a word; on others a boot sector speaks,
//! and the first kernel stops in QEMU (U1). So the proof boots the image's own kernel and initrd, whose init says a line
//! and powers off, where there is an image that knows how ([`PROOF_WORD`]); else a boot sector ([`sector`]) that goes to
//! long mode, exchanges 16 bytes under a lock, adds in SSE, and turns a loop faster than any emulator does. It comes up
//! by the same calls as any VM: overlay, domain, console. Used by `doctor`, `image build`, `exec`, and by the daemon at
//! start where `accel = "auto"`; [`memory`] keeps it from being asked again while nothing has changed.

mod evidence;
pub mod memory;
pub mod sector;

use super::confine::measure::{Measured, Place};
use super::{
    Accel, Attachment, Boot, Confinement, Ending, Host, InstallationId, Limits, Pause, VmError, VmId, VmSpec, VmState,
    VmUser,
};
use crate::rng::Rng;
use dayfly_guest_config::PROOF_CONTRACT;
pub use dayfly_guest_config::{PROOF_LINE, PROOF_WORD};
pub use evidence::Evidence;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::time::{Instant, timeout};

/// From the VM's start to the first line under KVM, which needs 0.2 s for the sector and 0.7 s for a kernel; the rest is
/// for a busy host. A host whose KVM is silent costs this once, at start.
const DEADLINE: Duration = Duration::from_secs(15);

/// The same under TCG, which needs 1 s and 4 s, and several times as much while other guests are translated.
const DEADLINE_TCG: Duration = Duration::from_secs(60);

/// How long the sector's ten million turns may take, in the best of the rounds before [`DEADLINE`]: 10 ms on a
/// processor; where each instruction is trapped and emulated, four million of them take a second (U1).
const TURNS_MAX: Duration = Duration::from_millis(300);

/// What was said longer ago than this when a read begins, as far as can be told, was there before the read.
const PROMPT: Duration = Duration::from_millis(1);

/// Between two looks at whether the hypervisor has stopped the VM.
const LOOK: Duration = Duration::from_millis(500);

/// More than SeaBIOS and the sector need.
const SECTOR_MEMORY_MIB: u64 = 64;

/// What a kernel and an initrd of 20 MiB need.
const KERNEL_MEMORY_MIB: u64 = 256;

/// What is booted.
#[derive(Clone, Debug)]
pub enum Subject {
    /// The boot sector.
    Sector,
    /// Kernel and initrd of an image whose init knows [`PROOF_WORD`].
    Image {
        /// How it boots.
        boot: Boot,
        /// What tells it from other images.
        digest: String,
    },
}

impl Subject {
    /// An image's own kernel, if it has one that knows how to be a proof.
    #[must_use]
    pub fn of(boot: &Boot, contract: u32, digest: impl Into<String>) -> Self {
        match boot {
            Boot::Direct { .. } if contract >= PROOF_CONTRACT => {
                Self::Image { boot: boot.clone(), digest: digest.into() }
            }
            Boot::Direct { .. } | Boot::Disk => Self::Sector,
        }
    }

    fn words(&self) -> &'static str {
        match self {
            Self::Sector => "a VM of one boot sector",
            Self::Image { .. } => "a VM of the image's kernel",
        }
    }
}

/// A guest that ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// What was booted.
    pub what: &'static str,
    /// From the request to start it to its first line.
    pub took: Duration,
}

/// Why nothing was proven. What QEMU and the host say stands with it.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The boot sector's disk could not be written.
    #[error("write boot disk `{}`", .path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The VM could not be made.
    #[error("start a VM{0}")]
    Start(Evidence, #[source] VmError),
    /// Its console could not be read.
    #[error("read the console of a VM")]
    Console(#[source] io::Error),
    /// It ended before it said its line.
    #[error("{what} ended without a word{evidence}")]
    Ended {
        /// What was booted.
        what: &'static str,
        /// What else is known.
        evidence: Evidence,
    },
    /// The hypervisor stopped it.
    #[error("{what} was stopped by QEMU{evidence}")]
    Stopped {
        /// What was booted.
        what: &'static str,
        /// What else is known.
        evidence: Evidence,
    },
    /// It said that it computes wrongly.
    #[error("{what} got a wrong result{evidence}")]
    Wrong {
        /// What was booted.
        what: &'static str,
        /// What else is known.
        evidence: Evidence,
    },
    /// It runs, as an emulator would.
    #[error("{what} needed {} ms for ten million turns, a processor needs 10{evidence}", took.as_millis())]
    Slow {
        /// What was booted.
        what: &'static str,
        /// The best of its rounds.
        took: Duration,
        /// What else is known.
        evidence: Evidence,
    },
    /// It runs, to no effect: the acceleration is broken.
    #[error("{what} said nothing within {} s{evidence}", within.as_secs())]
    Silent {
        /// What was booted.
        what: &'static str,
        /// How long it was listened to.
        within: Duration,
        /// What else is known.
        evidence: Evidence,
    },
}

/// Where a proof may put its files. Both directories exist.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// For the disks: QEMU's user must be able to pass it.
    pub disks: &'a Path,
    /// For the sockets: a short path.
    pub sockets: &'a Path,
}

/// Whether KVM runs guests here. Leaves nothing behind; what a daemon that dies in it leaves
/// carries `installation` and is reaped like any VM and overlay (and a file of 3 KiB,
/// `proof-<id>.qcow2`, stays).
///
/// # Errors
/// [`ProofError`]; within 15 s of a start that worked, under TCG within 60 s.
pub async fn prove_kvm(
    host: &Host,
    subject: &Subject,
    places: Places<'_>,
    installation: &InstallationId,
    rng: &Rng,
) -> Result<Proof, ProofError> {
    prove(host, Accel::Kvm, subject, places, installation, rng).await
}

/// [`prove_kvm`], of any acceleration. TCG may take its time.
///
/// # Errors
/// As [`prove_kvm`].
pub async fn prove(
    host: &Host,
    accel: Accel,
    subject: &Subject,
    places: Places<'_>,
    installation: &InstallationId,
    rng: &Rng,
) -> Result<Proof, ProofError> {
    let proven = prove_as(host, accel, subject, places, installation, Confinement::default(), rng).await;
    proven.map(|(proof, _)| proof)
}

/// [`prove`], by a VM that is confined as those of jobs are; with what the kernel says of its process while it runs, if
/// that is on this host.
///
/// # Errors
/// As [`prove_kvm`].
pub async fn prove_confined(
    host: &Host,
    accel: Accel,
    subject: &Subject,
    places: Places<'_>,
    installation: &InstallationId,
    user: Option<VmUser>,
    rng: &Rng,
) -> Result<(Proof, Option<Measured>), ProofError> {
    let confine = Confinement { user, limits: Some(Limits::default()) };
    prove_as(host, accel, subject, places, installation, confine, rng).await
}

async fn prove_as(
    host: &Host,
    accel: Accel,
    subject: &Subject,
    places: Places<'_>,
    installation: &InstallationId,
    confine: Confinement,
    rng: &Rng,
) -> Result<(Proof, Option<Measured>), ProofError> {
    let id = VmId::random(rng);
    let (boot, memory_mib) = match subject {
        Subject::Sector => (Boot::Disk, SECTOR_MEMORY_MIB),
        Subject::Image { boot, .. } => (with_word(boot), KERNEL_MEMORY_MIB),
    };
    let spec = VmSpec {
        installation: installation.clone(),
        bound: None,
        cpus: 1,
        memory_mib,
        accel,
        boot,
        overlay: places.disks.join(format!("df-{id}.qcow2")),
        base: places.disks.join(format!("proof-{id}.qcow2")),
        frozen: None,
        attachment: Attachment::User,
        read_only: Vec::new(),
        nested: false,
        confine,
        socket_dir: places.sockets.to_owned(),
        id,
    };
    let proof = boot_once(host, &spec, subject).await;
    // What cannot be removed now is an orphan, and the sweep's.
    let _ = host.hypervisor.destroy(&spec.id.clone().into()).await;
    let _ = host.disks.remove(&spec.overlay).await;
    let _ = host.sockets.remove(&spec.socket_dir, &spec.id).await;
    let _ = tokio::fs::remove_file(&spec.base).await;
    proof
}

fn with_word(boot: &Boot) -> Boot {
    match boot {
        Boot::Direct { kernel, initrd, cmdline } => {
            Boot::Direct { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: format!("{cmdline} {PROOF_WORD}") }
        }
        Boot::Disk => Boot::Disk,
    }
}

/// `None` of a VM that is held to nothing: nobody has asked.
async fn measured(spec: &VmSpec) -> Option<Measured> {
    spec.confine.limits.as_ref()?;
    let name = spec.id.clone().into();
    tokio::task::spawn_blocking(move || Place::default().measure(&name)).await.ok()?
}

async fn boot_once(host: &Host, spec: &VmSpec, subject: &Subject) -> Result<(Proof, Option<Measured>), ProofError> {
    write_disk(&spec.base).await.map_err(|source| ProofError::Disk { path: spec.base.clone(), source })?;
    let start = |evidence| move |error| ProofError::Start(evidence, error);
    host.disks.create(&spec.overlay, &spec.base, 1).await.map_err(start(Evidence::default()))?;
    let mut spec = spec.clone();
    if spec.confine.user.is_some() {
        spec.boot = host.disks.lend(&spec.boot, &spec.overlay).await.map_err(start(Evidence::default()))?;
    }
    let spec = &spec;
    let since = Instant::now();
    if let Err(error) = host.hypervisor.start(spec).await {
        return Err(ProofError::Start(Evidence::of(&*host.hypervisor, spec, None).await, error));
    }
    // At once: a kernel that has said its line powers off.
    let measured = measured(spec).await;
    let mut heard = Heard { began: None, best: None };
    let within = if spec.accel == Accel::Kvm { DEADLINE } else { DEADLINE_TCG };
    let outcome = timeout(within, watch(host, spec, subject, &mut heard)).await;
    let what = subject.words();
    let end = match outcome {
        Ok(Ok(End::Proven)) => {
            return Ok((Proof { what, took: since.elapsed() }, measured));
        }
        Ok(Ok(end)) => end,
        Ok(Err(error)) => return Err(ProofError::Console(error)),
        Err(_) => End::Silent,
    };
    let stopped = if let End::Stopped(words) = &end { Some(words.as_str()) } else { None };
    let evidence = Evidence::of(&*host.hypervisor, spec, stopped).await;
    Err(match (end, heard.best) {
        (End::Stopped(_), _) => ProofError::Stopped { what, evidence },
        (End::Wrong, _) => ProofError::Wrong { what, evidence },
        (End::Silent, Some(took)) => ProofError::Slow { what, took, evidence },
        (End::Silent, None) => ProofError::Silent { what, within, evidence },
        (End::Ended | End::Proven, _) => ProofError::Ended { what, evidence },
    })
}

/// How a look at a guest ends.
enum End {
    Proven,
    /// The hypervisor has stopped it, in its words.
    Stopped(String),
    Wrong,
    Ended,
    Silent,
}

/// What the sector has said so far.
struct Heard {
    began: Option<Instant>,
    /// Its quickest round.
    best: Option<Duration>,
}

/// Reads the console until it is clear, and looks at the VM meanwhile: one that QEMU has stopped says nothing more.
async fn watch(host: &Host, spec: &VmSpec, subject: &Subject, heard: &mut Heard) -> io::Result<End> {
    let mut console = host.sockets.console(&spec.socket_dir, &spec.id).await?;
    let name = spec.id.clone().into();
    let (mut seen, mut chunk) = (Vec::new(), [0; 256]);
    loop {
        let polled = Instant::now();
        let read = tokio::select! {
            biased;
            // Both are cancel safe. What was said goes first.
            read = console.read(&mut chunk) => read?,
            () = tokio::time::sleep(LOOK) => match host.hypervisor.state(&name).await {
                Ok(VmState::Paused(why)) => return Ok(End::Stopped(match why {
                    Pause::Itself => "paused".to_owned(),
                    Pause::Disk | Pause::Operator => format!("paused: {}", why.words()),
                })),
                Ok(VmState::Ended(how @ (Ending::Panicked | Ending::Slept | Ending::Hung))) => {
                    return Ok(End::Stopped(format!("no more: {}", how.words())));
                }
                // What it has said before its end is still to be read.
                Ok(VmState::Running | VmState::Ended(_) | VmState::Gone) | Err(_) => continue,
            },
        };
        if read == 0 {
            return Ok(End::Ended);
        }
        seen.extend_from_slice(&chunk[..read]);
        // While libvirt was asked, nobody read: what waits here since then says nothing of when it was said.
        let waited_here = polled.elapsed() < PROMPT;
        let began_before = heard.began.is_some();
        while let Some((at, word)) = first_of(&seen) {
            seen.drain(..at);
            match (word, subject) {
                (Word::Begins, _) => heard.began = Some(Instant::now()),
                (Word::Wrong, _) => return Ok(End::Wrong),
                (Word::Line, Subject::Sector) if waited_here && !began_before && spec.accel == Accel::Kvm => {
                    heard.began = None
                }
                (Word::Line, Subject::Sector) => {
                    let round = heard.began.take().map_or(Duration::MAX, |began| began.elapsed());
                    heard.best = Some(heard.best.map_or(round, |best| best.min(round)));
                    // Nobody says how fast an emulator is.
                    if round <= TURNS_MAX || spec.accel == Accel::Tcg {
                        return Ok(End::Proven);
                    }
                }
                (Word::Proof, Subject::Image { .. }) => return Ok(End::Proven),
                (Word::Line | Word::Proof, _) => {}
            }
        }
        // The firmware and the kernel say something, too; the beginning of a line must stay whole.
        let longest = sector::WRONG.len().max(PROOF_LINE.len());
        seen.drain(..seen.len().saturating_sub(longest));
    }
}

/// What a guest of a proof says.
#[derive(Clone, Copy)]
enum Word {
    Begins,
    Line,
    Wrong,
    Proof,
}

/// The first of them in these bytes, and where it ends.
fn first_of(seen: &[u8]) -> Option<(usize, Word)> {
    let words = [
        (sector::BEGINS, Word::Begins),
        (sector::LINE, Word::Line),
        (sector::WRONG, Word::Wrong),
        (PROOF_LINE, Word::Proof),
    ];
    let ends = words.into_iter().filter_map(|(text, word)| {
        let at = seen.windows(text.len()).position(|window| window == text.as_bytes())?;
        Some((at + text.len(), word))
    });
    ends.min_by_key(|(end, _)| *end)
}

async fn write_disk(path: &Path) -> io::Result<()> {
    tokio::fs::write(path, sector::disk_image()).await?;
    // QEMU's user reads it, whatever our umask.
    tokio::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).await
}
