//! [`World`]: fakes, the daemon under test, and what must hold when all is over.

mod look;

use super::canary::{self, Spy};
use super::guest::{Guest, Memory, Told};
use super::log::Log;
use super::mortal::{End, Life, Look};
use dayfly::clock::Clock;
use dayfly::config::{Class, Config, Runner};
use dayfly::control::{ControlHandler, KillOutcome};
use dayfly::daemon::{self, Backends, DaemonError, ReloadError, Reloader, Shutdown};
use dayfly::gitlab::transport::OpenError;
use dayfly::gitlab::{Endpoint, JobId, OpenTransport, Transport};
use dayfly::guest::Limits;
use dayfly::history::End as JobEnd;
use dayfly::image::store::Images;
use dayfly::job::Jobs;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::status::{ConsoleFound, JobFound, StatusReport};
use dayfly::supply::goldens::Goldens;
use dayfly::vm::paths::Paths;
use dayfly_doubles::fake::{FakeHypervisor, GuestMachine, Timing};
use dayfly_doubles::files::MemoryFiles;
use dayfly_doubles::images::{self, OneImage};
use dayfly_doubles::workshop::FakeWorkshop;
use dayfly_exec::standin::{Job, JobSpec, JobState, ProjectId, Recorded, Route, Standin};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::Level;
use tracing::subscriber::DefaultGuard;

/// How long a test waits, in virtual time: longer than any deadline of a job.
pub const LONG: Duration = Duration::from_secs(4 * 3600);

/// Lines that every daemon of these tests logs.
const USUAL_TROUBLE: &[&str] = &["guests run under TCG"];

/// The GitLab of the first runner.
pub const GITLAB: &str = "https://gitlab.example/";

/// The other one, see [`World::second_gitlab`].
pub const SECOND_GITLAB: &str = "https://second.example/";

/// What the dead may say: nothing of theirs gets an answer, but their clock goes on here, and the time for one may go by.
const OF_THE_DEAD: [&str; 1] = ["its log goes without"];

/// A daemon and all that is around it. The fakes outlive the daemon, as the world outlives a crash.
pub struct World {
    pub standin: Standin,
    pub hypervisor: FakeHypervisor,
    pub files: MemoryFiles,
    /// Git, and disks of repositories.
    pub workshop: FakeWorkshop,
    pub rng: Rng,
    /// The host's; GitLab has another, which goes the same way.
    pub clock: Clock,
    gitlab_clock: Clock,
    pub config: Config,
    pub project: ProjectId,
    pub images: Arc<dyn Images>,
    /// What guests know.
    pub memory: Memory,
    pub log: Log,
    /// Looked at before each call of the file layer, from the next start on.
    pub look: Option<Look>,
    /// The way to GitLab in place of the stand-ins', from the next start on.
    pub transport: Option<Arc<dyn OpenTransport>>,
    /// What stands before the hypervisor's disks and sockets, from the next start on.
    pub before_paths: Option<Before>,
    gitlabs: Gitlabs,
    /// Looks at all that leaves the daemon.
    pub spy: Spy,
    expected: Vec<&'static str>,
    tokens: tempfile::TempDir,
    daemon: Option<Running>,
    _listening: DefaultGuard,
}

struct Running {
    task: JoinHandle<()>,
    shutdown: Shutdown,
    jobs: Jobs,
    handler: Arc<dyn ControlHandler>,
    reloader: Reloader,
    goldens: Goldens,
    life: Life,
}

/// Makes the disks and sockets that daemons see of the world's.
pub type Before = Arc<dyn Fn(FakeHypervisor) -> Arc<dyn Paths> + Send + Sync>;

/// The GitLabs of this world, by URL.
#[derive(Clone, Default)]
struct Gitlabs(BTreeMap<String, Standin>);

impl OpenTransport for Gitlabs {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(self.0[endpoint.url.as_str()].transport())
    }
}

/// Runs one story on a runtime of its own, with the clock paused: nothing of it outlives it.
pub fn paused(story: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(story);
}

impl World {
    /// A world with one runner and guests that behave; the daemon is not started yet.
    pub fn new(seed: u64) -> Self {
        let rng = Rng::seeded(seed);
        // Two clocks, so that one may be set.
        let clock = || Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
        let (clock, gitlab_clock) = (clock(), clock());
        let standin = Standin::new(gitlab_clock.clone(), rng.clone());
        let project = standin.add_project("group/project");
        let hypervisor = FakeHypervisor::new();
        hypervisor.set_timing(Timing { boot: Duration::from_secs(5), ..Timing::default() });
        let memory = Memory::default();
        let remembers = memory.clone();
        hypervisor.set_guest(move |machine: GuestMachine| Guest::run(machine, remembers.clone()));
        let log = Log::default();
        let tokens = tempfile::tempdir().unwrap();
        let mut config = Config {
            state_directory: "/state".into(),
            runtime_directory: "/run".into(),
            image_directory: "/images".into(),
            concurrent: 4,
            class: vec![Class {
                cpus: 1,
                memory_mib: 512,
                disk_gib: 10,
                allow_standin_runner: true,
                ..Class::new("small", "test")
            }],
            ..Config::default()
        };
        config.hypervisor.accel = dayfly::vm::AccelChoice::Tcg;
        config.capacity.memory_mib = Some(100_000);
        let files = MemoryFiles::default();
        let mut world = Self {
            workshop: FakeWorkshop::new(Arc::new(files.clone())),
            gitlabs: Gitlabs([(GITLAB.to_owned(), standin.clone())].into()),
            standin,
            hypervisor,
            files,
            rng,
            clock,
            gitlab_clock,
            config,
            project,
            images: Arc::new(OneImage::new(images::image())),
            memory,
            look: None,
            transport: None,
            before_paths: None,
            expected: USUAL_TROUBLE.to_vec(),
            tokens,
            daemon: None,
            _listening: log.listen_to(Level::TRACE),
            spy: Spy::default(),
            log,
        };
        world.add_runner("runner");
        world
    }

    /// The image is one of the contract before: its guests have their doors at ports.
    pub fn by_port(&mut self) {
        self.images = Arc::new(OneImage::new(images::image_of_before()));
        self.expect_trouble(&["was built before jobs could do without a network card"]);
    }

    /// What guests do that are started from now on, instead of running their job's script.
    pub fn set_guest<F: Future<Output = ()> + Send + 'static>(
        &self,
        guest: impl Fn(Guest) -> F + Send + Sync + Clone + 'static,
    ) {
        let memory = self.memory.clone();
        self.hypervisor.set_guest(move |machine: GuestMachine| {
            let (memory, guest) = (memory.clone(), guest.clone());
            async move {
                let Some(mut booted) = Guest::boot(machine).await else { return };
                booted.memory = memory;
                guest(booted).await;
            }
        });
    }

    /// A line of level WARN or ERROR with this text is no failure of the test.
    pub fn expect_trouble(&mut self, text: &[&'static str]) {
        self.expected.extend(text);
    }

    /// Another GitLab with a runner of this daemon; the project is its own.
    pub fn second_gitlab(&mut self, runner: &str) -> (Standin, ProjectId) {
        let second = Standin::new(self.gitlab_clock.clone(), Rng::seeded(77));
        let project = second.add_project("other/project");
        self.gitlabs.0.insert(SECOND_GITLAB.to_owned(), second.clone());
        self.register(runner, SECOND_GITLAB, &second, project);
        (second, project)
    }

    /// Registers one more runner at the stand-in.
    pub fn add_runner(&mut self, name: &str) {
        let standin = self.standin.clone();
        self.register(name, GITLAB, &standin, self.project);
    }

    fn register(&mut self, name: &str, url: &str, standin: &Standin, project: ProjectId) {
        let id = standin.add_runner(project);
        let token = canary::runner_token(id.0);
        standin.edit(|model| model.runners.get_mut(&id).unwrap().token = Secret::new(token.clone()));
        let file = self.tokens.path().join(name);
        std::fs::write(&file, token).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&file, mode).unwrap();
        self.config.runner.push(Runner::new(name, url.parse().unwrap(), file, "small"));
    }

    /// The seams of a daemon that is not this world's own (`exec` brings one).
    pub fn backends(&self) -> Backends {
        self.living(&Life::new(None, None))
    }

    fn living(&self, life: &Life) -> Backends {
        let hypervisor = self.hypervisor.clone();
        let paths: Arc<dyn Paths> = match &self.before_paths {
            Some(before) => before(hypervisor.clone()),
            None => Arc::new(hypervisor.clone()),
        };
        let transport = self.transport.clone().unwrap_or_else(|| Arc::new(self.gitlabs.clone()));
        Backends {
            host: life.host(Arc::new(hypervisor), paths),
            listen: life.listen(Arc::new(self.hypervisor.clone())),
            egress: life.egress(Arc::new(self.hypervisor.clone())),
            transport: life.transport(transport),
            files: life.files(Arc::new(self.files.clone())),
            clock: self.clock.clone(),
            rng: self.rng.clone(),
            images: self.images.clone(),
            workshop: Arc::new(self.workshop.through(life.files(Arc::new(self.files.clone())))),
            door_limits: Limits::default(),
        }
    }

    /// Starts a daemon: the first, or the next one after an end.
    pub async fn start(&mut self) -> Result<(), DaemonError> {
        self.live(None).await
    }

    /// Starts a daemon that dies at this call; perhaps before it has wholly started.
    pub async fn live(&mut self, end: Option<End>) -> Result<(), DaemonError> {
        if end.is_some() {
            self.expect_trouble(&OF_THE_DEAD);
        }
        let spy = self.spy.clone();
        let life = Life::new(end, self.look.clone())
            .spied_on(Arc::new(move |place: &str, bytes: &[u8]| spy.look(place, bytes)));
        let backends = self.living(&life);
        let shutdown = Shutdown::new();
        let (config, switch) = (self.config.clone(), shutdown.clone());
        let (tell, told) = oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "joined by `ended`, unless it is killed")]
        let task = tokio::spawn(async move {
            match daemon::start(config, backends, switch).await {
                Ok(daemon) => {
                    let _ = tell.send(Ok((daemon.jobs(), daemon.handler(), daemon.reloader(), daemon.goldens())));
                    daemon.run().await;
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        });
        let started = tokio::select! {
            biased;
            () = life.over() => return Ok(()),
            started = told => started,
        };
        let (jobs, handler, reloader, goldens) = started.expect("a daemon starts or says why not")?;
        self.daemon = Some(Running { task, shutdown, jobs, handler, reloader, goldens, life });
        Ok(())
    }

    /// Kills the daemon where it stands.
    pub fn kill(&mut self) {
        self.expect_trouble(&OF_THE_DEAD);
        self.daemon.take().expect("a daemon runs").life.kill();
    }

    /// Whether the daemon has died; then the next may be started.
    pub fn is_dead(&self) -> bool {
        self.daemon.as_ref().is_none_or(|running| running.life.is_over())
    }

    /// What the daemon restores machines from.
    pub fn goldens(&self) -> Goldens {
        self.daemon.as_ref().expect("a daemon runs").goldens.clone()
    }

    /// The life of the daemon.
    pub fn life(&self) -> Life {
        self.daemon.as_ref().expect("a daemon runs").life.clone()
    }

    /// Waits until the daemon has died, or the job's state is this at GitLab.
    pub async fn until_dead_or(&mut self, job: JobId, states: &[JobState]) {
        let Some(life) = self.daemon.as_ref().map(|running| running.life.clone()) else { return };
        let over = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| states.contains(&j.state)), LONG);
        tokio::select! {
            biased;
            () = life.over() => {}
            _ = over => {}
        }
    }

    /// Puts a job with this script into GitLab's queue.
    pub fn job(&self, script: &[&str]) -> JobId {
        self.standin.enqueue(self.project, JobSpec::script(script.iter().copied()))
    }

    /// Puts a job of this spec into GitLab's queue.
    pub fn job_of(&self, spec: JobSpec) -> JobId {
        self.standin.enqueue(self.project, spec)
    }
}
