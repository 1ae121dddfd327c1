//! What a run's daemon lives in: the stand-in, the fake hypervisor, files in memory; and the lives themselves.

use crate::clones;
use crate::event::{DaemonDoes, Event};
use crate::guest;
use crate::ledger::JobNote;
use crate::mortal::{End, Life};
use crate::plan::{Plan, Script};
use crate::planted::Planted;
use crate::seams::disk::Disk;
use crate::seams::gitlab::{self, Opener};
use crate::seams::host::{self, Host};
use crate::story::Story;
use crate::tokens;
use dayfly::clock::Clock;
use dayfly::config::{Class, Config, Runner, Span};
use dayfly::control::ControlHandler;
use dayfly::daemon::{self, Backends, Shutdown};
use dayfly::gitlab::JobId;
use dayfly::guest::Limits;
use dayfly::job::Jobs;
use dayfly::rng::Rng;
use dayfly_doubles::fake::{FakeHypervisor, GuestMachine, Timing};
use dayfly_doubles::files::MemoryFiles;
use dayfly_doubles::images::{self, OneImage};
use dayfly_doubles::workshop::FakeWorkshop;
use dayfly_exec::standin::{JobSpec, Persist, ProjectId, Standin, Variable};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longest wait for a daemon to start: it looks for orphans first, and one that is stuck costs it a minute.
const START: Duration = Duration::from_secs(900);

/// The fakes outlive each daemon.
pub(crate) struct World {
    pub(crate) story: Story,
    pub(crate) standin: Standin,
    pub(crate) fake: FakeHypervisor,
    pub(crate) files: MemoryFiles,
    pub(crate) clock: Clock,
    pub(crate) images: OneImage,
    pub(crate) workshop: FakeWorkshop,
    pub(crate) rng: Rng,
    pub(crate) config: Config,
    pub(crate) project: ProjectId,
    pub(crate) doomed: ProjectId,
    pub(crate) planted: Planted,
    pub(crate) daemon: Option<Daemon>,
}

/// A daemon that runs.
pub(crate) struct Daemon {
    pub(crate) task: JoinHandle<bool>,
    pub(crate) shutdown: Shutdown,
    pub(crate) jobs: Jobs,
    pub(crate) handler: Arc<dyn ControlHandler>,
    pub(crate) life: Life,
}

impl World {
    pub(crate) fn new(plan: &Plan, story: Story) -> Self {
        let rng = Rng::seeded(plan.seed);
        let start = "2026-01-01T00:00:00Z".parse().expect("a date");
        let clock = Clock::simulated(start);
        let theirs =
            start.saturating_add(jiff::SignedDuration::from_secs(plan.gitlab.skew_s)).expect("within the calendar");
        let standin = Standin::new(Clock::simulated(theirs), Rng::seeded(plan.seed ^ 0xabcd));
        standin.configure(|settings| {
            settings.long_poll = Duration::from_secs(plan.gitlab.long_poll_s);
            settings.two_phase = plan.gitlab.two_phase;
            settings.trace_update_interval = plan.gitlab.trace_interval_s.map(Duration::from_secs);
            settings.live_trace_persist_after = match plan.gitlab.final_waits {
                Some(0) => Persist::AtOnce,
                Some(reports) => Persist::AfterReports(reports),
                None => Persist::Never,
            };
        });
        let (project, doomed) = (standin.add_project("group/project"), standin.add_project("group/doomed"));
        standin.edit(|model| {
            if let Some(project) = model.projects.get_mut(&doomed) {
                project.trace_size_limit_mib = Some(1);
            }
        });
        standin.hook(gitlab::hook(&story));
        let fake = FakeHypervisor::new();
        fake.set_timing(Timing { boot: Duration::from_millis(300), ..Timing::default() });
        fake.judge_calls(host::judge(&story));
        let witness = story.clone();
        fake.set_witness(move |name, word| witness.tell(&Event::Vm { name, word }));
        let told = story.clone();
        fake.set_guest(move |machine: GuestMachine| guest::run(machine, told.clone()));
        let files = MemoryFiles::quiet();
        let mut world = Self {
            workshop: FakeWorkshop::new(Arc::new(files.clone())),
            story,
            standin,
            fake,
            files,
            clock,
            images: OneImage::new(if plan.by_port { images::image_of_before() } else { images::image() }),
            rng,
            config: config(plan),
            project,
            doomed,
            planted: Planted::new(plan.bug),
            daemon: None,
        };
        for number in 0..plan.runners {
            world.add_runner(number, plan);
        }
        if let Some(fetches) = &plan.clones {
            let sha = JobSpec::script(["true"]).sha;
            for project in ["project", "doomed"] {
                world.workshop.push(&clones::url(project), &sha, 200 << 20);
            }
            world.workshop.set_moods(fetches.clone());
            world.config.clones =
                dayfly::config::Clones { enabled: true, size_gib: 1, project_gib: 1, ..world.config.clones };
        }
        world
    }

    fn add_runner(&mut self, number: usize, plan: &Plan) {
        let (token, file) = tokens::of_runner(number);
        let id = self.standin.add_runner(self.project);
        self.standin.edit(|model| {
            if let Some(runner) = model.runners.get_mut(&id) {
                runner.token = dayfly::secret::Secret::new(token.as_str());
                runner.projects.insert(self.doomed);
            }
        });
        self.story.inner().ledger.runner_tokens.push(token);
        self.config.runner.push(Runner {
            poll_interval: Span::from_secs(plan.limits.poll_s),
            ..Runner::new(format!("runner-{number}"), "https://gitlab.example/".parse().expect("a URL"), file, "small")
        });
    }

    /// Puts a job into GitLab's queue.
    pub(crate) fn enqueue(&self, script: &Script) -> JobId {
        let project = if script.doomed_project { self.doomed } else { self.project };
        let id = self.standin.edit(|model| JobId(model.new_id()));
        let secret = format!("{}{}.", crate::check::JOB_CANARY, id.0);
        let mut spec = JobSpec::script(["true"]).with_variable(Variable::secret("SECRET", &secret));
        spec.id = Some(id);
        spec.protected = script.protected;
        spec.timeout = Some(Duration::from_secs(script.timeout_s));
        let token = format!("glcbt-64_{:020}", id.0);
        spec.token = Some(dayfly::secret::Secret::new(token.as_str()));
        let mut inner = self.story.inner();
        inner.ledger.tokens.insert(token.clone(), id);
        inner.ledger.jobs.insert(id, JobNote::new(Arc::new(script.clone()), token));
        drop(inner);
        let _ = self.standin.enqueue(project, spec);
        id
    }

    fn backends(&self, life: &Life) -> Backends {
        let story = || self.story.clone();
        let host = Arc::new(Host { fake: self.fake.clone(), story: story() });
        let (token, _) = tokens::of_runner(0);
        let listen = self.planted.listen(host.clone(), life);
        let (hypervisor, paths) = self.planted.host(host.clone(), &self.fake, &token);
        let files = life.files(self.planted.files(Arc::new(Disk { files: self.files.clone(), story: story() })));
        Backends {
            host: life.host(hypervisor, paths),
            listen: life.listen(listen),
            egress: life.egress(self.planted.egress(host.clone())),
            transport: life
                .transport(self.planted.transport(Arc::new(Opener { standin: self.standin.clone(), story: story() }))),
            workshop: Arc::new(self.planted.workshop(self.workshop.through(files.clone()))),
            files,
            clock: self.clock.clone(),
            rng: self.planted.rng(&self.rng),
            images: Arc::new(self.images.clone()),
            door_limits: Limits::default(),
        }
    }

    /// Begins a life. `false`: the daemon refused to start, or died in its start.
    pub(crate) async fn start(&mut self, end: Option<End>) -> bool {
        let life = Life::new(end, None);
        let backends = self.backends(&life);
        self.story.set_life(Some(life.clone()));
        self.story.tell(&Event::Daemon(DaemonDoes::Starts));
        let shutdown = Shutdown::new();
        let lives = self.story.inner().ledger.lives;
        let (config, switch) = (self.planted.config(&self.config, lives), shutdown.clone());
        let (tell, told) = oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "joined when it ends by itself; else it ends with the runtime")]
        let task = tokio::spawn(async move {
            match daemon::start(config, backends, switch).await {
                Ok(daemon) => {
                    let _ = tell.send(Ok((daemon.jobs(), daemon.handler())));
                    daemon.run().await
                }
                Err(error) => {
                    drop(tell.send(Err(error)));
                    false
                }
            }
        });
        let started = tokio::select! {
            biased;
            () = life.over() => {
                self.story.tell(&Event::Daemon(DaemonDoes::Dies));
                return false;
            }
            started = tokio::time::timeout(START, told) => started,
        };
        match started {
            Ok(Ok(Ok((jobs, handler)))) => {
                self.daemon = Some(Daemon { task, shutdown, jobs, handler, life });
                self.story.tell(&Event::Daemon(DaemonDoes::Runs));
                true
            }
            Ok(Ok(Err(error))) => {
                self.story.inner().write(&format!("the daemon does not start: {}", dayfly::telemetry::chain(&error)));
                self.story.tell(&Event::Daemon(DaemonDoes::Refuses));
                false
            }
            Ok(Err(_)) | Err(_) => {
                self.story.violate(18, "a daemon neither started nor said why not".to_owned());
                life.kill();
                self.story.tell(&Event::Daemon(DaemonDoes::Dies));
                false
            }
        }
    }

    /// Whether a daemon runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| !daemon.life.is_over() && !daemon.task.is_finished())
    }
}

fn config(plan: &Plan) -> Config {
    let mut config = Config {
        state_directory: "/state".into(),
        runtime_directory: "/run".into(),
        image_directory: "/images".into(),
        concurrent: plan.concurrent,
        class: vec![Class {
            cpus: 1,
            memory_mib: 512,
            disk_gib: 10,
            allow_standin_runner: true,
            keep_failed: plan.keep_s.map(Span::from_secs),
            keep_failed_projects: vec!["**".into()],
            keep_failed_max: 2,
            ..Class::new("small", "test")
        }],
        ..Config::default()
    };
    config.hypervisor.accel = dayfly::vm::AccelChoice::Tcg;
    config.capacity.memory_mib = Some(100_000);
    config.capacity.disk_gib = Some(10_000);
    config.limits.boot_deadline = Span::from_secs(plan.limits.boot_s);
    config.limits.silence_deadline = Span::from_secs(plan.limits.silence_s);
    config.limits.guest_update_interval = Span::from_secs(plan.limits.guest_interval_s);
    config.limits.spool_mib = plan.limits.spool_mib;
    let last = 20_000 + plan.limits.ports - 1;
    config.network.guest_ports = format!("20000-{last}").parse().expect("a range");
    config
}
