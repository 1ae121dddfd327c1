//! A machine of dayfly's make with no daemon behind it: its hypervisor starts it, and its guest gets the config that a
//! measurement wants.

use dayfly::clock::Clock;
use dayfly::guest_config::{GuestParts, guest_config, new_machine_id};
use dayfly::machine_spec::{Executor, GuestRunnerSpec, GuestSettings, ImageRef, MachineSpec, Start};
use dayfly::network::{Lease, Mode};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::telemetry::chain;
use dayfly::vm::{Host, Stream, VmId, VmName, VmSpec};
use dayfly_guest_config::GuestConfig;
use dayfly_test_tools::host::DISK_GIB;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio::time::sleep;
use url::Url;

/// Between two tries to open a wire.
const GLANCE: Duration = Duration::from_millis(20);

/// The guest's own patience, each kind of it: longer than any run.
const PATIENCE: Duration = Duration::from_secs(1800);

/// What the guest's runner is told: where it gets what it clones, by which token, and what runs its jobs.
pub(crate) struct Told {
    pub(crate) clone_url: Url,
    pub(crate) token: Secret,
    pub(crate) executor: Executor,
}

impl Told {
    /// The config of a guest whose door is where this lease says.
    pub(crate) fn config(&self, spec: &VmSpec, lease: &Lease, rng: &Rng) -> GuestConfig {
        let machine = MachineSpec {
            image: ImageRef { name: "image".into(), digest: String::new() },
            contract: dayfly_guest_config::CONTRACT,
            executor: self.executor.clone(),
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            disk_gib: DISK_GIB,
            run_as_root: false,
            nested: false,
            limits: None,
            start: Start::Cold,
            network: Mode::User,
            egress: None,
            forwards: Vec::new(),
            runner: GuestRunnerSpec {
                name: "runner".into(),
                token: self.token.clone(),
                clone_url: self.clone_url.clone(),
                ca_pem: None,
                direct_download: false,
                settings: GuestSettings::default(),
            },
            keep_failed: None,
            notes: Vec::new(),
        };
        let parts = GuestParts {
            vm: &spec.id,
            lease,
            spec: &machine,
            installation_machine_id: &new_machine_id(rng),
            wait_timeout: PATIENCE,
            door_patience: PATIENCE,
            power_off_after: PATIENCE,
            log_mib_max: 4,
            cache: false,
            clone: None,
        };
        guest_config(&parts, &Clock::system(), rng)
    }
}

/// Such a machine. Its sockets and its disk go with it.
pub(crate) struct ByHand {
    host: Host,
    spec: VmSpec,
    // Dropped with this: the guest's wires, and the folder.
    _wires: JoinSet<()>,
    _dir: TempDir,
}

impl ByHand {
    /// Starts a machine like this one, under an id and with a disk of its own.
    pub(crate) async fn start(
        host: &Host,
        like: &VmSpec,
        config: impl FnOnce(&VmSpec, &Rng) -> GuestConfig,
    ) -> Result<Self, String> {
        // A short path: unix sockets end at 107 bytes.
        let dir = tempfile::Builder::new().prefix("df-by-hand-").tempdir_in("/tmp");
        let dir = dir.map_err(|error| format!("make a directory: {error}"))?;
        let rng = Rng::system();
        let id = VmId::random(&rng);
        let spec = VmSpec {
            overlay: dir.path().join(format!("df-{id}.qcow2")),
            id,
            // Nobody's: a daemon beside it leaves it alone.
            installation: VmId::random(&rng),
            bound: None,
            socket_dir: dir.path().to_owned(),
            ..like.clone()
        };
        host.disks.create(&spec.overlay, &spec.base, DISK_GIB).await.map_err(|error| chain(&error))?;
        host.hypervisor.start(&spec).await.map_err(|error| chain(&error))?;
        let mut wires = JoinSet::new();
        wires.spawn(serve_wires(host.clone(), spec.clone(), config(&spec, &rng)));
        Ok(Self { host: host.clone(), spec, _wires: wires, _dir: dir })
    }

    /// What it was started as.
    pub(crate) fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// Ends it.
    pub(crate) async fn end(self) -> Result<(), String> {
        let name = VmName::from(self.spec.id.clone());
        self.host.hypervisor.destroy(&name).await.map_err(|error| chain(&error))
    }
}

/// Hands the guest its config and drains what it says, or it would stand still.
async fn serve_wires(host: Host, spec: VmSpec, config: GuestConfig) {
    let mut channel = opened(&host, &spec, Wire::Channel).await;
    let mut console = opened(&host, &spec, Wire::Console).await;
    // A guest without a config shows in time: its job does not start.
    let _ = channel.write_all(&config.to_line()).await;
    tokio::join!(drain(&mut *channel), drain(&mut *console));
}

#[derive(Clone, Copy)]
enum Wire {
    Channel,
    Console,
}

async fn opened(host: &Host, spec: &VmSpec, wire: Wire) -> Box<dyn Stream> {
    loop {
        let open = match wire {
            Wire::Channel => host.sockets.channel(&spec.socket_dir, &spec.id).await,
            Wire::Console => host.sockets.console(&spec.socket_dir, &spec.id).await,
        };
        match open {
            Ok(stream) => return stream,
            Err(_) => sleep(GLANCE).await,
        }
    }
}

async fn drain(stream: &mut dyn Stream) {
    let mut buffer = [0; 4096];
    while let Ok(1..) = stream.read(&mut buffer).await {}
}
