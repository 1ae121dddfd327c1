//! A whole daemon on real clock and real files.

use dayfly::clock::Clock;
use dayfly::clones::RealWorkshop;
use dayfly::config::{Class, Config, Runner, Span};
use dayfly::daemon::{self, Backends, DaemonError, Shutdown};
use dayfly::files::Files;
use dayfly::gitlab::OpenTransport;
use dayfly::guest::Limits;
use dayfly::image::store::Images;
use dayfly::job::Jobs;
use dayfly::network::{self, Listen, PortRange};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::vm;
use dayfly::vm::AccelChoice;
use dayfly_doubles::fake::Timing;
use dayfly_doubles::images::{self, OneImage};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a daemon may take to end when told to: it ends its jobs first.
const END_LIMIT: Duration = Duration::from_secs(40);

/// Disk of each VM.
pub const DISK_GIB: u64 = 10;

/// VMs that take no time of their own.
pub const AT_ONCE: Timing = Timing {
    overlay: Duration::ZERO,
    start: Duration::ZERO,
    boot: Duration::ZERO,
    lifetime: None,
    destroy: Duration::ZERO,
};

/// A daemon and what is below it.
pub struct Host {
    jobs: Jobs,
    shutdown: Shutdown,
    task: JoinHandle<bool>,
    // Last: files go when the daemon has gone.
    _dir: tempfile::TempDir,
}

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A temporary file.
    #[error("prepare the daemon's files")]
    Files(#[from] io::Error),
    /// The daemon's own reason.
    #[error("start the daemon")]
    Daemon(#[from] DaemonError),
}

/// What a tool chooses of its daemon.
pub struct Choice {
    /// Machines, and what lies beside them.
    pub host: vm::Host,
    /// How they run.
    pub accel: AccelChoice,
    /// The images; the machine class uses the one of this name.
    pub images: (Arc<dyn Images>, String),
    /// GitLab.
    pub transport: Arc<dyn OpenTransport>,
    /// GitLab's URL; `http` is allowed here.
    pub url: url::Url,
    /// The runner token there.
    pub token: Secret,
    /// Jobs at once.
    pub concurrent: u32,
    /// Ports of the doors.
    pub ports: PortRange,
    /// Where doors are opened.
    pub listen: Arc<dyn Listen>,
    /// The way to the disk.
    pub files: Arc<dyn Files>,
    /// Below which the state directory is made; `None`: beside all else.
    pub state_below: Option<PathBuf>,
}

impl Host {
    /// Starts a daemon with one runner.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn start(choice: Choice) -> Result<Self, HostError> {
        // A short path: unix sockets end at 107 bytes. Passable: QEMU may run as another user.
        let dir = tempfile::Builder::new().prefix("df-").tempdir_in("/tmp")?;
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
        let config = config(dir.path(), &choice)?;
        let backends = Backends {
            host: choice.host,
            listen: choice.listen,
            egress: Arc::new(network::EgressProcesses::new(None)),
            transport: choice.transport,
            files: choice.files,
            clock: Clock::system(),
            rng: Rng::system(),
            workshop: Arc::new(RealWorkshop::default()),
            images: choice.images.0,
            door_limits: Limits::default(),
        };
        let shutdown = Shutdown::new();
        let daemon = daemon::start(config, backends, shutdown.clone()).await?;
        let jobs = daemon.jobs();
        #[expect(clippy::disallowed_methods, reason = "the daemon's task, joined by `end`")]
        let task = tokio::spawn(daemon.run());
        Ok(Self { jobs, shutdown, task, _dir: dir })
    }

    /// The jobs under way.
    #[must_use]
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Ends jobs and daemon. `false`: it did not end in time, or panicked.
    pub async fn end(self) -> bool {
        self.shutdown.end();
        matches!(tokio::time::timeout(END_LIMIT, self.task).await, Ok(Ok(true)))
    }
}

fn config(dir: &Path, choice: &Choice) -> io::Result<Config> {
    let token_file = dir.join("token");
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&token_file)?;
    file.write_all(choice.token.expose().as_bytes())?;
    let mut config = Config {
        state_directory: choice.state_below.as_deref().unwrap_or(dir).join("state"),
        runtime_directory: dir.join("run"),
        image_directory: dir.join("images"),
        concurrent: choice.concurrent,
        class: vec![Class {
            cpus: 1,
            memory_mib: 512,
            disk_gib: DISK_GIB,
            allow_standin_runner: true,
            // GitLab is on this host's loopback.
            network: Some(network::Choice::User),
            ..Class::new("small", choice.images.1.clone())
        }],
        runner: vec![Runner {
            allow_insecure_http: true,
            poll_interval: Span::from_secs(1),
            ..Runner::new("runner", choice.url.clone(), token_file, "small")
        }],
        ..Config::default()
    };
    for below in [&config.state_directory, &config.runtime_directory] {
        std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700).create(below)?;
    }
    config.network.guest_ports = choice.ports;
    config.hypervisor.accel = choice.accel;
    // The tool says how many VMs there are, so the host's size is no bound.
    config.capacity.cpus = Some(u32::MAX);
    config.capacity.memory_mib = Some(1 << 30);
    config.capacity.disk_gib = Some(1 << 30);
    config.capacity.disk_reserve_gib = 0;
    Ok(config)
}

/// A store of one image, `test`, that exists on no disk: the fake hypervisor reads none.
#[must_use]
pub fn no_image() -> (Arc<dyn Images>, String) {
    (Arc::new(OneImage::new(images::image())), "test".into())
}
