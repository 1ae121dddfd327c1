//! One golden, from a boot to the first machine that is restored from it.
//!
//! ```text
//! boot, nobody's config ─► held ─► quiet ─► frozen, its disk put aside ─► gone
//!                                             └─► restored as somebody ─► asks for a job ─► gone ─► into its place
//! ```

use super::{DISK, Keeper, MAKE_DEADLINE, RECORD, Record, STATE, VERSION, bytes_on_disk, digest_of, remove};
use crate::boot_test::NobodysDoor;
use crate::files::{Files as _, RealFiles};
use crate::guest::GuestEvent;
use crate::guest_config::held;
use crate::hex::hex;
use crate::image::store::{Image, ImageError};
use crate::machine_spec::{MachineSpec, Start};
use crate::network::LeaseError;
use crate::supply::goldens::{Golden, Wanted};
use crate::supply::unassigned::{Owner, Workspace};
use crate::supply::{Binding, Claim, Machine, MachineEvent, Supply, overlay_path};
use crate::telemetry::chain;
use crate::vm::{Frozen, Pause, VmError, VmName};
use dayfly_guest_config::{GuestConfig, GuestNetwork, Report};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// From the order to a guest that is held: 13 s under TCG on an idle host.
const HOLD_DEADLINE: Duration = Duration::from_secs(240);

/// A guest that is restored asks after 0.6 s.
const ASK_DEADLINE: Duration = Duration::from_secs(60);

/// How long it is waited for a guest to have nothing to do; a busy one is frozen all the same.
const QUIET_DEADLINE: Duration = Duration::from_secs(30);

/// A guest that needs no more than this of a processor in a second is quiet.
const QUIET_SHARE: Duration = Duration::from_millis(100);

/// How long a machine may take to go; what is left is taken down later, by its record.
const RELEASE_DEADLINE: Duration = Duration::from_secs(60);

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    #[error("{0}")]
    Files(&'static str, #[source] io::Error),
    #[error("use the image")]
    Image(#[from] ImageError),
    #[error("choose a door")]
    Lease(#[from] LeaseError),
    #[error("make the machine")]
    Machine(#[from] VmError),
    #[error("the guest says: {0}")]
    Guest(String),
    #[error("its machine ended, or stopped; the last of its console:\n{0}")]
    Ended(String),
    #[error("what was frozen could not be restored")]
    NotRestored,
    #[error("{what} within {} s; the last of its console:\n{console}", within.as_secs())]
    Silent { what: &'static str, within: Duration, console: String },
    #[error("it was not done within {} s", .0.as_secs())]
    Late(Duration),
    #[error("the daemon ends")]
    Stopped,
}

/// One that was made.
pub(super) struct Made {
    pub(super) golden: Golden,
    pub(super) took: Duration,
    /// From the order to restore to the guest's request.
    pub(super) restored: Duration,
}

impl Keeper {
    pub(super) async fn make(&self, wanted: &Wanted, stop: &CancellationToken) -> Result<Made, MakeError> {
        let since = Instant::now();
        let files = |error| MakeError::Files("make a workspace", error);
        let mut own = Workspace::new(Owner::Golden, &self.directory, &self.hypervisor, &self.socket_dir, &self.rng)
            .await
            .map_err(files)?;
        // Dropped in the middle it leaves what the workspace's record names.
        let made = match stop.run_until_cancelled(timeout(MAKE_DEADLINE, self.make_in(&mut own, wanted))).await {
            Some(made) => made.unwrap_or(Err(MakeError::Late(MAKE_DEADLINE))),
            None => Err(MakeError::Stopped),
        };
        let moved = match made {
            Ok((frozen, restored)) => self
                .put_in_place(&own, wanted, frozen)
                .await
                .map(|golden| (golden, restored))
                .map_err(|error| MakeError::Files("put what was frozen into its place", error)),
            Err(error) => Err(error),
        };
        let gone = timeout(RELEASE_DEADLINE, own.abandon().take_down(&self.supply, &self.hypervisor)).await;
        match gone {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = chain(&error), "take down what a golden was made of; it is left to the sweep")
            }
            Err(_) => tracing::warn!("what a golden was made of could not be taken down yet; it is left to the sweep"),
        }
        let (golden, restored) = moved?;
        Ok(Made { golden, took: since.elapsed(), restored })
    }

    async fn make_in(&self, own: &mut Workspace, wanted: &Wanted) -> Result<(Frozen, Duration), MakeError> {
        let host = self.hypervisor.host_of(self.supply.host(), &self.socket_dir);
        let prepared = host.prepare(own.directory(), &self.socket_dir).await;
        prepared.map_err(|error| MakeError::Files("make the directories for its machine", error))?;
        let supply = self.supply.at(host, own.setup(self.host.accel));
        let image = self.images.load_version(&wanted.spec.image).await?;
        // It is nobody's: what it would be restored from is what is made here.
        let spec = MachineSpec { start: Start::Cold, ..wanted.spec.clone() };
        let frozen = self.freeze(&supply, own, &spec, &image, wanted).await?;
        let restored = self.prove(&supply, own, &spec, &image, wanted, &frozen).await?;
        Ok((frozen, restored))
    }

    async fn freeze(
        &self,
        supply: &Supply,
        own: &mut Workspace,
        spec: &MachineSpec,
        image: &Image,
        wanted: &Wanted,
    ) -> Result<Frozen, MakeError> {
        let claim = plan(supply, own, spec).await?;
        let config = held(&wanted.config, &claim.id, &self.rng);
        let mut machine = supply.start(claim.clone(), spec, image.clone(), owner(), &config);
        machine.bind(Binding { config: config.to_line(), egress: None });
        let is_held = timeout(HOLD_DEADLINE, until_held(&mut machine)).await;
        let console = machine.console_tail();
        let is_held = is_held.unwrap_or_else(|_| {
            Err(MakeError::Silent { what: "no runner waited at the relay", within: HOLD_DEADLINE, console })
        });
        if is_held.is_ok() {
            quiet(supply, &machine).await;
        }
        // Its channel closes, and it goes on waiting.
        machine.leave().await;
        let name = VmName::from(claim.id.clone());
        let frozen = match is_held {
            Ok(()) => self.take(supply, own, &name).await,
            Err(error) => Err(error),
        };
        release(supply, claim).await;
        frozen
    }

    /// Memory, devices and disk of a machine that waits.
    async fn take(&self, supply: &Supply, own: &Workspace, name: &VmName) -> Result<Frozen, MakeError> {
        let (state, disk) = (own.directory().join(STATE), own.directory().join(DISK));
        let sha256 = supply.hypervisor().freeze(name, &state).await?;
        supply.hypervisor().destroy(name).await?;
        let overlay = overlay_path(own.directory(), name.id());
        let (from, to) = (overlay, disk.clone());
        let kept = tokio::task::spawn_blocking(move || {
            fs::rename(&from, &to)?;
            // QEMU's user reads it, and nobody writes to it any more.
            fs::set_permissions(&to, fs::Permissions::from_mode(0o444))?;
            fs::File::open(&to)?.sync_all()
        });
        kept.await
            .map_err(io::Error::other)
            .and_then(|kept| kept)
            .map_err(|error| MakeError::Files("keep its disk", error))?;
        Ok(Frozen { state, sha256, disk })
    }

    /// Restores one from it, as somebody, whose runner must ask for a job.
    async fn prove(
        &self,
        supply: &Supply,
        own: &mut Workspace,
        spec: &MachineSpec,
        image: &Image,
        wanted: &Wanted,
        frozen: &Frozen,
    ) -> Result<Duration, MakeError> {
        let since = Instant::now();
        let claim = plan(supply, own, spec).await?;
        let nobody = held(&wanted.config, &claim.id, &self.rng);
        let network = claim.lease.guest_network();
        let mac = (!network.relay).then(|| claim.id.mac());
        let config = GuestConfig { hold: false, network: GuestNetwork { mac, ..network }, ..nobody };
        let door = NobodysDoor::open(supply, &claim, &config, own.directory(), &self.rng).await;
        let mut door = door.map_err(|error| MakeError::Files("open a door", error))?;
        let from = (wanted.key.clone(), frozen.clone());
        let mut machine = supply.start_of(claim.clone(), spec, image.clone(), owner(), from);
        machine.bind(Binding { config: config.to_line(), egress: None });
        let asked = timeout(ASK_DEADLINE, until_asked(&mut machine, &mut door)).await;
        let console = machine.console_tail();
        let took = since.elapsed();
        machine.leave().await;
        release(supply, claim).await;
        door.close().await;
        asked.unwrap_or_else(|_| {
            Err(MakeError::Silent { what: "no restored machine asked for a job", within: ASK_DEADLINE, console })
        })?;
        Ok(took)
    }

    /// From the workspace into its own directory, its record last.
    async fn put_in_place(&self, own: &Workspace, wanted: &Wanted, frozen: Frozen) -> io::Result<Golden> {
        let directory = self.directory.join(wanted.key.as_str());
        if !remove(&directory).await {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let (from, to) = (own.directory().to_owned(), directory.clone());
        let moved = tokio::task::spawn_blocking(move || {
            // QEMU may run as a user of its own, who opens the disk.
            fs::DirBuilder::new().mode(0o711).create(&to)?;
            for name in [STATE, DISK] {
                fs::rename(from.join(name), to.join(name))?;
            }
            let bytes = bytes_on_disk(&to.join(STATE))?.saturating_add(bytes_on_disk(&to.join(DISK))?);
            Ok::<_, io::Error>((bytes, digest_of(&to.join(DISK))?))
        });
        let (bytes, disk) = moved.await.map_err(io::Error::other)??;
        let record = Record {
            version: VERSION,
            key: wanted.key.clone(),
            host: self.host_word(),
            image: wanted.spec.image.clone(),
            runner: wanted.spec.runner.name.clone(),
            made_s: self.clock.now().as_second(),
            bytes,
            state_sha256: hex(&frozen.sha256),
            disk_sha256: hex(&disk),
        };
        RealFiles.replace(&directory.join(RECORD), serde_json::to_vec(&record)?).await?;
        let at = |name: &str| -> PathBuf { Path::new(&directory).join(name) };
        let frozen = Frozen { state: at(STATE), disk: at(DISK), ..frozen };
        let Record { image, runner, bytes, made_s, .. } = record;
        Ok(Golden { frozen, image, runner, bytes, made_s })
    }
}

/// What people read in a machine's description.
fn owner() -> (String, u64) {
    ("freezing a machine".into(), 0)
}

async fn plan(supply: &Supply, own: &mut Workspace, spec: &MachineSpec) -> Result<Claim, MakeError> {
    let claim = supply.claim(spec.network, spec.door()).await?;
    own.plan(&claim).await.map_err(|error| MakeError::Files("write the machine's names down", error))?;
    Ok(claim)
}

/// Takes down what there is of it, in a bounded time.
async fn release(supply: &Supply, claim: Claim) {
    let mut machine = supply.reap(claim);
    if timeout(RELEASE_DEADLINE, machine.release()).await.is_err() {
        machine.leave().await;
    }
}

async fn until_held(machine: &mut Machine) -> Result<(), MakeError> {
    loop {
        match machine.event().await {
            Some(MachineEvent::Report(Report::Held)) => return Ok(()),
            event => over(machine, event)?,
        }
    }
}

async fn until_asked(machine: &mut Machine, door: &mut NobodysDoor) -> Result<(), MakeError> {
    loop {
        tokio::select! {
            biased;
            // Both are cancel safe. The request first: it is what we wait for.
            event = door.asked.recv() => match event {
                Some(GuestEvent::AsksForJob { reply, .. }) => {
                    // The answer is 204; nobody minds if the guest is gone by then.
                    let _ = reply.send(None);
                    return Ok(());
                }
                Some(GuestEvent::Greeted) => machine.greeted(),
                Some(_) => {}
                None => return Err(MakeError::NotRestored),
            },
            event = machine.event() => match event {
                Some(MachineEvent::NotRestored) => return Err(MakeError::NotRestored),
                event => over(machine, event)?,
            },
        }
    }
}

/// An error where a machine will not come any further.
fn over(machine: &Machine, event: Option<MachineEvent>) -> Result<(), MakeError> {
    match event {
        Some(MachineEvent::Report(Report::Failed(text))) => Err(MakeError::Guest(text)),
        Some(MachineEvent::Failed(error)) => Err(error.into()),
        Some(MachineEvent::Stopped(_) | MachineEvent::Paused(Pause::Disk | Pause::Itself) | MachineEvent::Gone)
        | None => Err(MakeError::Ended(machine.console_tail())),
        Some(_) => Ok(()),
    }
}

/// Waits until the guest has nothing to do: what it would still do is done again in each that is restored.
async fn quiet(supply: &Supply, machine: &Machine) {
    let since = Instant::now();
    let used = async || supply.usage(machine.id(), Duration::from_secs(1)).await.cpu;
    let mut before = used().await;
    while since.elapsed() < QUIET_DEADLINE {
        sleep(Duration::from_secs(1)).await;
        let now = used().await;
        let is_quiet = before.zip(now).is_some_and(|(before, now)| now.saturating_sub(before) <= QUIET_SHARE);
        if is_quiet {
            return;
        }
        before = now;
    }
}
