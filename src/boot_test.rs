//! Does an image boot, and what does its runner say of itself?
//!
//! Starts one VM by the steps of a job, lets its guest show the pass and ask for a job, keeps the `info`
//! of that request (decision D10), and takes the VM down. GitLab takes no part: the guest gets 204. What a boot test
//! that was killed leaves is taken down by the next one, or by the daemon (`supply::unassigned`).

use crate::clock::Clock;
use crate::files::{Files as _, RealFiles};
use crate::gitlab::transport::{BodyError, Call};
use crate::gitlab::{Body, JobClient, JobId, JobStatus, RunnerInfo, Transport, TransportError};
use crate::guest::{self, Admission, GuestEvent, GuestView, Limits};
use crate::guest_config::{GuestParts, guest_config, guest_token, new_machine_id};
use crate::image::manifest::Learnt;
use crate::image::store::Image;
use crate::machine_spec::{DockerSettings, GuestRunnerSpec, GuestSettings, ImageRef, MachineSpec, Start};
use crate::metrics::Metrics;
use crate::network::{self, EgressProcesses, Listen, Network};
use crate::rng::Rng;
use crate::secret::Secret;
use crate::spool::Spool;
use crate::supply::unassigned::{Abandoned, Owner, Workspace, abandoned};
use crate::supply::{Binding, Claim, Machine, MachineEvent, Setup, Supply, Users};
use crate::telemetry::chain;
use crate::vm::proof::{self, ProofError};
use crate::vm::{self, Accel, AccelChoice, Host, PASSWD, PASSWD_BYTES_MAX, Pause, VmError, VmId};
use dayfly_guest_config::{Can, GuestConfig, Pass, Report};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use url::Url;

/// How long the first request may take: 8 s under TCG on an idle machine, a minute on a busy one.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// How long the VM may take to go; beyond it the caller is told what is left.
const RELEASE_DEADLINE: Duration = Duration::from_secs(60);

/// MiB of its log, which nobody keeps.
const LOG_MIB_MAX: u64 = 4;

/// A class as small as a job's usually is.
const CPUS: u32 = 1;
const MEMORY_MIB: u64 = 1024;
const DISK_GIB: u64 = 10;

/// What a boot test needs.
pub struct BootTest<'a> {
    /// Machines, and what lies beside them.
    pub host: Host,
    /// What it is called: what is left at another hypervisor is not looked for here.
    pub hypervisor: &'a vm::Config,
    /// Where doors are opened.
    pub listen: Arc<dyn Listen>,
    /// How it runs guests.
    pub accel: AccelChoice,
    /// Below which its workspace is: see [`Workspace`].
    pub image_directory: &'a Path,
    /// Where the sockets go: a short path, of this test alone.
    pub socket_dir: &'a Path,
    /// Ports for the door.
    pub network: network::Config,
    /// See [`DEADLINE`].
    pub deadline: Duration,
}

/// An image that boots.
#[derive(Clone, Debug)]
pub struct Booted {
    /// What its runner says of itself.
    pub info: RunnerInfo,
    /// The guest contract that its guest program speaks.
    pub contract: u32,
    /// And what it can besides.
    pub can: Can,
    /// From the order to the guest's first request.
    pub took: Duration,
}

impl Booted {
    /// What goes into the image's manifest.
    #[must_use]
    pub fn learnt(&self) -> Learnt {
        Learnt { info: self.info.0.get().to_owned(), contract: self.contract, can: self.can }
    }
}

/// Why an image does not.
#[derive(Debug, thiserror::Error)]
pub enum BootTestError {
    /// A file or a port of the test's own.
    #[error("{0}")]
    Set(&'static str, #[source] std::io::Error),
    /// KVM does not run guests here.
    #[error("prove KVM by a boot (`--accel tcg` does without, for a trial)")]
    NoKvm(#[source] ProofError),
    /// The VM could not be made.
    #[error("start the image's VM")]
    Start(#[source] VmError),
    /// The VM ended before its guest asked for a job.
    #[error("the image's VM ended before its runner asked for a job; the last of its console:\n{0}")]
    Ended(String),
    /// Nobody asked in time.
    #[error("no runner of the image asked for a job within {} s; the last of its console:\n{console}", within.as_secs())]
    Silent {
        /// The deadline.
        within: Duration,
        /// Its console.
        console: String,
    },
    /// The request had no `info`.
    #[error("the image's runner asks for jobs without `info`")]
    NoInfo,
}

impl BootTest<'_> {
    /// Boots `image` once. `progress` gets a line for each phase.
    ///
    /// # Errors
    /// [`BootTestError`]; the VM and its files are gone in each case, or named in the log.
    pub async fn run(&self, image: &Image, progress: &mut (dyn FnMut(&str) + Send)) -> Result<Booted, BootTestError> {
        let rng = Rng::system();
        let set = |error| BootTestError::Set("make a workspace for the VM", error);
        let mut own = Workspace::new(Owner::BootTest, self.image_directory, self.hypervisor, self.socket_dir, &rng)
            .await
            .map_err(set)?;
        self.host.prepare(own.directory(), self.socket_dir).await.map_err(set)?;
        let accel = self.accel(image, &own, &rng).await;
        let stop = CancellationToken::new();
        let (supply, lister) = Supply::new(
            self.host.clone(),
            Clock::system(),
            rng.clone(),
            Network::new(&self.network, self.listen.clone(), Arc::new(EgressProcesses::new(None))),
            Setup { users: self.users().await, ..own.setup(*accel.as_ref().unwrap_or(&Accel::Kvm)) },
            Metrics::new(),
            stop.clone(),
        );
        for left in abandoned(&RealFiles, self.image_directory, self.hypervisor).await {
            progress("taking down what a killed boot test has left");
            take_down(left, &supply, self.hypervisor).await;
        }
        let booted = match accel {
            Ok(_) => self.boot(&supply, image, &mut own, &rng, progress).await,
            Err(error) => Err(error),
        };
        take_down(own.abandon(), &supply, self.hypervisor).await;
        stop.cancel();
        // Ends at once, but for a list call, which has a deadline.
        let _ = lister.await;
        booted
    }

    /// As whom the VM runs: no job is in it, so other VMs without a job may share its user. Where the users are amiss the
    /// daemon says so.
    async fn users(&self) -> Users {
        if !self.hypervisor.is_system() {
            return Users::default();
        }
        let passwd = RealFiles.read(Path::new(PASSWD), PASSWD_BYTES_MAX).await.unwrap_or_default();
        let found = self.hypervisor.users(&String::from_utf8_lossy(&passwd), 0);
        Users::common(found.ok().and_then(|found| found.of_others))
    }

    /// How guests run here, proven if nobody has said it.
    async fn accel(&self, image: &Image, own: &Workspace, rng: &Rng) -> Result<Accel, BootTestError> {
        match self.accel {
            AccelChoice::Tcg => Ok(Accel::Tcg),
            AccelChoice::Kvm => Ok(Accel::Kvm),
            AccelChoice::Auto => {
                let setup = own.setup(Accel::Kvm);
                let places = proof::Places { disks: &setup.overlay_dir, sockets: &setup.socket_dir };
                let proven = proof::prove_kvm(&self.host, &image.proof(), places, &setup.installation, rng).await;
                proven.map(|_| Accel::Kvm).map_err(BootTestError::NoKvm)
            }
        }
    }

    async fn boot(
        &self,
        supply: &Supply,
        image: &Image,
        own: &mut Workspace,
        rng: &Rng,
        progress: &mut (dyn FnMut(&str) + Send),
    ) -> Result<Booted, BootTestError> {
        let since = Instant::now();
        let no_door = |error| BootTestError::Set("open a door for the guest", std::io::Error::other(error));
        let runner_token = Secret::new(format!("glrt-boottest1{}", VmId::random(rng)));
        let spec = MachineSpec {
            image: ImageRef { name: image.name.clone(), digest: image.digest() },
            contract: image.manifest.contract,
            executor: image.manifest.executor_of(&DockerSettings::default()),
            cpus: CPUS,
            memory_mib: MEMORY_MIB,
            disk_gib: DISK_GIB,
            run_as_root: false,
            nested: false,
            limits: Some(vm::Limits::default()),
            start: Start::Cold,
            network: network::Mode::User,
            egress: None,
            forwards: Vec::new(),
            runner: GuestRunnerSpec {
                name: "boot test".into(),
                token: runner_token,
                clone_url: Url::parse("http://gitlab.invalid/").expect("a constant URL parses"),
                ca_pem: None,
                direct_download: false,
                settings: GuestSettings::default(),
            },
            keep_failed: None,
            notes: Vec::new(),
        };
        let claim = supply.claim(spec.network, spec.door()).await.map_err(no_door)?;
        own.plan(&claim).await.map_err(|e| BootTestError::Set("write the VM's names down", e))?;
        let parts = GuestParts {
            vm: &claim.id,
            lease: &claim.lease,
            spec: &spec,
            installation_machine_id: &new_machine_id(rng),
            wait_timeout: self.deadline,
            door_patience: Duration::from_secs(5),
            power_off_after: self.deadline,
            log_mib_max: LOG_MIB_MAX,
            cache: false,
            clone: None,
        };
        let config = guest_config(&parts, &Clock::system(), rng);
        let mut door = NobodysDoor::open(supply, &claim, &config, own.directory(), rng)
            .await
            .map_err(|e| BootTestError::Set("open a door for the guest", e))?;
        let mut machine = supply.start(claim, &spec, image.clone(), ("boot test".into(), 0), &config);
        machine.bind(Binding { config: config.to_line(), egress: None });
        let booted = tokio::time::timeout(self.deadline, wait(&mut machine, &mut door.asked, since, progress)).await;
        let console = machine.console_tail();
        let released = tokio::time::timeout(RELEASE_DEADLINE, machine.release()).await;
        door.close().await;
        if released.is_err() {
            tracing::warn!(vm = %machine.id(), "the boot test's VM could not be taken down yet");
            machine.leave().await;
        }
        match booted {
            Ok(Ok((info, Spoken { contract, can }))) => Ok(Booted { info, contract, can, took: since.elapsed() }),
            Ok(Err(Early::Failed(error))) => Err(BootTestError::Start(error)),
            Ok(Err(Early::Ended)) => Err(BootTestError::Ended(console)),
            Ok(Err(Early::NoInfo)) => Err(BootTestError::NoInfo),
            Err(_) => Err(BootTestError::Silent { within: self.deadline, console }),
        }
    }
}

/// What a guest has said that it can.
struct Spoken {
    contract: u32,
    can: Can,
}

enum Early {
    Failed(VmError),
    Ended,
    NoInfo,
}

async fn wait(
    machine: &mut Machine,
    asked: &mut mpsc::Receiver<GuestEvent>,
    since: Instant,
    progress: &mut (dyn FnMut(&str) + Send),
) -> Result<(RunnerInfo, Spoken), Early> {
    // What a guest speaks that does not say.
    let mut spoken = Spoken { contract: 1, can: Can::default() };
    loop {
        let phase = tokio::select! {
            biased;
            // Both are cancel safe. The request first: it is what we wait for.
            event = asked.recv() => match event {
                Some(GuestEvent::AsksForJob { info, reply }) => {
                    // The answer is 204; nobody minds if the guest is gone by then.
                    let _ = reply.send(None);
                    return info.map(|info| (info, spoken)).ok_or(Early::NoInfo);
                }
                Some(GuestEvent::Greeted) => "guest has shown its pass",
                _ => continue,
            },
            event = machine.event() => match event {
                Some(MachineEvent::DiskReady) => "disk ready",
                Some(MachineEvent::Started | MachineEvent::Restored(_)) => "machine started",
                Some(MachineEvent::Report(Report::Ready)) => "guest is up",
                Some(MachineEvent::Report(Report::Applied)) => "guest has its identity",
                Some(MachineEvent::Report(Report::RunnerStarted)) => "gitlab-runner started",
                Some(MachineEvent::Report(Report::Contract { contract, can })) => {
                    spoken = Spoken { contract, can };
                    continue;
                }
                Some(MachineEvent::Report(Report::Failed(text))) => {
                    progress(&format!("guest: {text}"));
                    continue;
                }
                Some(MachineEvent::Report(_) | MachineEvent::NotRestored | MachineEvent::Resumed | MachineEvent::Paused(Pause::Operator)) => continue,
                Some(MachineEvent::Failed(error)) => return Err(Early::Failed(error)),
                Some(MachineEvent::Stopped(_) | MachineEvent::Paused(_) | MachineEvent::Gone) | None => {
                    return Err(Early::Ended);
                }
            },
        };
        progress(&format!("{:>6.2} s  {phase}", since.elapsed().as_secs_f64()));
    }
}

/// Takes down what there is of a workspace, in a bounded time: whoever looks next finds what is left.
async fn take_down(left: Abandoned, supply: &Supply, hypervisor: &vm::Config) {
    match tokio::time::timeout(RELEASE_DEADLINE, left.take_down(supply, hypervisor)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = chain(&error), "take a boot test's VM down; left for the next one"),
        Err(_) => tracing::warn!("a boot test's VM could not be taken down yet; left for the next one"),
    }
}

/// The door of a guest that belongs to no job: whoever proves the pass may ask, and there is no GitLab behind it.
pub(crate) struct NobodysDoor {
    handle: guest::DoorHandle,
    /// What its guest asks.
    pub(crate) asked: mpsc::Receiver<GuestEvent>,
    _view: watch::Sender<GuestView>,
}

impl NobodysDoor {
    /// Opens it, with its files in this directory.
    ///
    /// # Errors
    /// A file, or a port.
    pub(crate) async fn open(
        supply: &Supply,
        claim: &Claim,
        config: &GuestConfig,
        directory: &Path,
        rng: &Rng,
    ) -> std::io::Result<Self> {
        let entrance = supply.listen(claim).await?;
        let spool = Spool::open(Arc::new(RealFiles), &directory.join("trace"), 0, None).await;
        let spool = spool.map_err(std::io::Error::other)?;
        let (events, asked) = mpsc::channel(16);
        let view = GuestView { status: JobStatus::Running, verdict: None, update_interval: Duration::from_secs(1) };
        let (view_out, view) = watch::channel(view);
        let handle = guest::admit(Admission {
            vm: claim.id.clone(),
            entrance,
            pass: Pass::from_text(&config.pass).ok_or(std::io::ErrorKind::InvalidData)?,
            guest_token: guest_token(config),
            job: JobId(u64::MAX),
            job_token: Secret::new(VmId::random(rng).to_string()),
            dependencies: Vec::new(),
            spool: spool.writer(),
            client: JobClient::new(Arc::new(NoGitlab), JobId(u64::MAX), Secret::new(""), rng.clone()),
            cache: None,
            forwards: Vec::new(),
            direct_download: false,
            events,
            view,
            limits: Limits::default(),
            rng: rng.clone(),
            clock: Clock::system(),
            metrics: Metrics::new(),
        });
        Ok(Self { handle, asked, _view: view_out })
    }

    /// Closes it.
    pub(crate) async fn close(self) {
        self.handle.revoke().await;
    }
}

/// A boot test's guest has no GitLab behind its door.
struct NoGitlab;

impl Transport for NoGitlab {
    fn call(&self, _: Call) -> crate::BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let refused: BodyError = Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        Box::pin(std::future::ready(Err(TransportError::Connect(refused))))
    }
}
