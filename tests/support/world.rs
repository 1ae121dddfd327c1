//! [`World`]: fakes, the daemon under test, and what must hold when all is over.

use super::canary::{self, Spy};
use super::guest::{Guest, Memory, Told};
use super::log::Log;
use super::mortal::{End, Life, Look};
use dayfly::clock::Clock;
use dayfly::config::{Class, Config, Runner};
use dayfly::control::{ControlHandler, KillOutcome};
use dayfly::daemon::{self, Backends, DaemonError, Jobs, ReloadError, Reloader, Shutdown};
use dayfly::files::fake::MemoryFiles;
use dayfly::gitlab::transport::OpenError;
use dayfly::gitlab::{Endpoint, JobId, OpenTransport, Transport};
use dayfly::guest::Limits;
use dayfly::image::store::{Image, ImageStore};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::standin::{Job, JobSpec, JobState, ProjectId, Recorded, Route, Standin};
use dayfly::status::StatusReport;
use dayfly::vm::Hypervisor;
use dayfly::vm::fake::{FakeHypervisor, GuestMachine, Timing};
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

/// A daemon and all that is around it. The fakes outlive the daemon, as the world outlives a crash.
pub struct World {
    pub standin: Standin,
    pub hypervisor: FakeHypervisor,
    pub files: MemoryFiles,
    pub rng: Rng,
    /// The host's; GitLab has another, which goes the same way.
    pub clock: Clock,
    gitlab_clock: Clock,
    pub config: Config,
    pub project: ProjectId,
    pub images: ImageStore,
    /// What guests know.
    pub memory: Memory,
    pub log: Log,
    /// Looked at before each call of the file layer, from the next start on.
    pub look: Option<Look>,
    /// The way to GitLab in place of the stand-ins', from the next start on.
    pub transport: Option<Arc<dyn OpenTransport>>,
    /// What stands before the hypervisor, from the next start on.
    pub before_hypervisor: Option<Before>,
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
    life: Life,
}

/// Makes the hypervisor that daemons see of the world's.
pub type Before = Arc<dyn Fn(FakeHypervisor) -> Arc<dyn Hypervisor> + Send + Sync>;

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
                name: "small".into(),
                image: "test".into(),
                cpus: 1,
                memory_mib: 512,
                disk_gib: 10,
                run_as_root: false,
                allow_standin_runner: true,
            }],
            ..Config::default()
        };
        config.hypervisor.accel = dayfly::vm::libvirt::AccelChoice::Tcg;
        config.capacity.memory_mib = Some(100_000);
        let mut world = Self {
            gitlabs: Gitlabs([(GITLAB.to_owned(), standin.clone())].into()),
            standin,
            hypervisor,
            files: MemoryFiles::default(),
            rng,
            clock,
            gitlab_clock,
            config,
            project,
            images: ImageStore::fixed(Image::of_no_disk()),
            memory,
            look: None,
            transport: None,
            before_hypervisor: None,
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
        self.config.runner.push(Runner {
            name: name.into(),
            url: url.parse().unwrap(),
            token_file: file,
            class: "small".into(),
            limit: None,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            clone_url: None,
            allow_insecure_http: false,
            direct_download: false,
            poll_interval: dayfly::config::Span::from_secs(3),
        });
    }

    /// The seams of a daemon that is not this world's own (`exec` brings one).
    pub fn backends(&self) -> Backends {
        self.living(&Life::new(None, None))
    }

    fn living(&self, life: &Life) -> Backends {
        let hypervisor = self.hypervisor.clone();
        let hypervisor: Arc<dyn Hypervisor> = match &self.before_hypervisor {
            Some(before) => before(hypervisor),
            None => Arc::new(hypervisor),
        };
        let transport = self.transport.clone().unwrap_or_else(|| Arc::new(self.gitlabs.clone()));
        Backends {
            hypervisor: life.hypervisor(hypervisor),
            transport: life.transport(transport),
            files: life.files(Arc::new(self.files.clone())),
            clock: self.clock.clone(),
            rng: self.rng.clone(),
            images: self.images.clone(),
            door_limits: Limits::default(),
        }
    }

    /// Starts a daemon: the first, or the next one after an end.
    pub async fn start(&mut self) -> Result<(), DaemonError> {
        self.live(None).await
    }

    /// Starts a daemon that dies at this call; perhaps before it has wholly started.
    pub async fn live(&mut self, end: Option<End>) -> Result<(), DaemonError> {
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
                    let _ = tell.send(Ok((daemon.jobs(), daemon.handler(), daemon.reloader())));
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
        let (jobs, handler, reloader) = started.expect("a daemon starts or says why not")?;
        self.daemon = Some(Running { task, shutdown, jobs, handler, reloader, life });
        Ok(())
    }

    /// Kills the daemon where it stands.
    pub fn kill(&mut self) {
        self.daemon.take().expect("a daemon runs").life.kill();
    }

    /// Whether the daemon has died; then the next may be started.
    pub fn is_dead(&self) -> bool {
        self.daemon.as_ref().is_none_or(|running| running.life.is_over())
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

    /// Waits until the job has this state at GitLab.
    pub async fn until(&self, job: JobId, state: JobState) {
        let reached = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| j.state == state), LONG).await;
        if reached.is_err() {
            let found = self.standin.job(job).map(|j| (j.state, String::from_utf8_lossy(&j.trace.bytes).into_owned()));
            panic!("job {job} did not become {state:?}: {found:?}\n{}", self.histories());
        }
    }

    /// Waits until the job's trace at GitLab holds this text.
    pub async fn until_trace(&self, job: JobId, text: &str) {
        let reached =
            self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| contains(&j.trace.bytes, text)), LONG).await;
        assert!(reached.is_ok(), "no {text:?} in the trace:\n{}\n{}", self.trace(job), self.histories());
    }

    /// The job at GitLab.
    pub fn found(&self, job: JobId) -> Job {
        self.standin.job(job).expect("the job exists")
    }

    /// Waits until the job has failed at GitLab, with this reason, and the author reads this.
    pub async fn until_failed(&self, job: JobId, reason: &str, author_reads: &str) {
        self.until(job, JobState::Failed).await;
        let (found, trace) = (self.found(job), self.trace(job));
        assert_eq!(found.failure_reason.as_deref(), Some(reason), "{trace}\n{}", self.histories());
        assert!(trace.contains(author_reads), "no {author_reads:?} in the trace:\n{trace}");
    }

    /// Requests of this route so far.
    pub fn requests(&self, route: Route) -> Vec<Recorded> {
        self.standin.requests().into_iter().filter(|request| request.route == route).collect()
    }

    /// VMs that were started so far.
    pub fn machines_started(&self) -> usize {
        self.hypervisor.history().iter().filter(|entry| entry.op.is_none() && entry.outcome == "started").count()
    }

    /// The most VMs that ran at one time.
    pub fn machines_at_once(&self) -> usize {
        let (mut now, mut most) = (0_usize, 0);
        for entry in self.hypervisor.history().iter().filter(|entry| entry.op.is_none()) {
            match entry.outcome.as_str() {
                "started" => now += 1,
                "destroyed" | "powered off" | "crashed" | "gone with the host" => now -= 1,
                _ => {}
            }
            most = most.max(now);
        }
        most
    }

    /// What `dayfly status` would show.
    pub fn status(&self) -> StatusReport {
        self.daemon.as_ref().expect("a daemon runs").handler.status()
    }

    /// Waits until what `dayfly status` shows fulfils the condition.
    pub async fn until_status(&self, condition: impl Fn(&StatusReport) -> bool) {
        let wait = async {
            while !condition(&self.status()) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let reached = tokio::time::timeout(LONG, wait).await;
        assert!(reached.is_ok(), "the status is {:?}\n{}", self.status(), self.histories());
    }

    /// Waits until the only job is in this state, in the word of `dayfly status`.
    pub async fn until_word(&self, word: &str) {
        self.until_status(|status| status.jobs.iter().any(|job| job.state == word)).await;
    }

    /// SIGHUP, with this world's configuration as the file.
    pub async fn reload(&self) -> Result<(), ReloadError> {
        let reloader = self.daemon.as_ref().expect("a daemon runs").reloader.clone();
        reloader.reload(self.config.clone()).await
    }

    /// `dayfly kill`.
    pub fn kill_job(&self, job: JobId) -> KillOutcome {
        self.daemon.as_ref().expect("a daemon runs").handler.kill(job, None)
    }

    /// Waits until the job is over at GitLab, however. `false`: no daemon ever wrote it down.
    pub async fn until_over(&self, job: JobId) -> bool {
        let reached = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| j.state.is_over()), LONG).await;
        assert!(reached.is_ok(), "job {job} is still {:?}\n{}", self.found(job).state, self.histories());
        self.files.history().iter().any(|line| line.starts_with("replace ") && line.ends_with("record.json ok"))
    }

    /// Waits until the daemon has nothing of a job left, or is dead.
    pub async fn settle(&self) {
        let Some(running) = &self.daemon else { return };
        tokio::select! {
            biased;
            () = running.life.over() => {}
            () = self.until_idle() => {}
        }
    }

    /// The job's trace at GitLab.
    pub fn trace(&self, job: JobId) -> String {
        self.standin.job(job).map(|j| String::from_utf8_lossy(&j.trace.bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until nothing of a job is left on the host.
    pub async fn until_idle(&self) {
        let jobs = self.daemon.as_ref().expect("a daemon runs").jobs.clone();
        let idle = async {
            while !jobs.views().is_empty() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let views = jobs.views();
        assert!(tokio::time::timeout(LONG, idle).await.is_ok(), "jobs are left: {views:?}\n{}", self.histories());
    }

    /// What the daemon's jobs are about.
    pub fn jobs(&self) -> Jobs {
        self.daemon.as_ref().expect("a daemon runs").jobs.clone()
    }

    /// The daemon's switch.
    pub fn shutdown(&self) -> Shutdown {
        self.daemon.as_ref().expect("a daemon runs").shutdown.clone()
    }

    /// Waits for the daemon's end after a shutdown.
    pub async fn ended(&mut self) {
        let running = self.daemon.take().expect("a daemon runs");
        tokio::time::timeout(LONG, running.task).await.expect("the daemon ends").expect("it does not panic");
    }

    /// SIGTERM, and the daemon's end.
    pub async fn hand_over(&mut self) {
        self.shutdown().hand_over();
        self.ended().await;
    }

    /// The host and GitLab as they must be when every job is over: one verdict each, nothing left.
    /// Drains the daemon, so that pollers hold no room either.
    pub async fn assert_clean(&mut self) {
        self.until_idle().await;
        let handler = self.daemon.as_ref().expect("a daemon runs").handler.clone();
        self.shutdown().drain();
        self.ended().await;
        let capacity = handler.status().capacity;
        let promised = (capacity.jobs, capacity.cpus, capacity.memory_mib, capacity.disk_gib);
        assert_eq!(promised, (0, 0, 0, 0), "capacity is not all back");
        let counts = self.hypervisor.counts();
        assert!(counts.is_clean(), "left behind: {counts:?}\n{}", self.histories());
        let left: Vec<_> =
            self.files.paths_below(Path::new("/")).into_iter().filter(|p| !p.ends_with("installation.json")).collect();
        assert!(left.is_empty(), "files are left: {left:?}\n{}", self.histories());
        for standin in self.gitlabs.0.values() {
            // Copied out: a failing check reads the stand-in's history.
            let (jobs, invalid) =
                standin.read(|m| (m.jobs.values().cloned().collect::<Vec<_>>(), m.metrics.trace_invalid));
            for job in &jobs {
                assert!(!job.state.is_executing(), "job {} is still {:?}\n{}", job.id, job.state, self.histories());
                assert!(job.verdicts <= 1, "job {} got {} verdicts", job.id, job.verdicts);
                self.assert_exact(job);
            }
            assert_eq!(invalid, 0, "a verdict's checksum did not match\n{}", self.histories());
        }
        assert!(self.leaks().is_empty(), "secrets of the runner got out: {:?}", self.leaks());
        let unexpected = |line: &String| !self.expected.iter().any(|expected| line.contains(expected));
        let trouble: Vec<_> = self.log.trouble().into_iter().filter(unexpected).collect();
        assert!(trouble.is_empty(), "unexpected in the log:\n{}", trouble.join("\n"));
    }

    /// Where a part of a runner token was seen that is no public one, in whatever encoding (safety.md T1,
    /// invariant 7): so far in a file, on its way to a machine or in what one is made from; now in the
    /// log, in what the host shows of machines, in files, in GitLab's copies of the traces.
    pub fn leaks(&self) -> Vec<String> {
        let spy = self.spy.afresh();
        spy.look("the log", self.log.text().as_bytes());
        spy.look("the hypervisor's history", format!("{:?}", self.hypervisor.history()).as_bytes());
        for (path, bytes) in self.files.contents() {
            spy.look(&format!("a file, {}", path.display()), &bytes);
        }
        if let Some(running) = &self.daemon {
            spy.look("the status", format!("{:?}", running.handler.status()).as_bytes());
        }
        for standin in self.gitlabs.0.values() {
            for job in standin.read(|model| model.jobs.values().cloned().collect::<Vec<_>>()) {
                spy.look("GitLab's copy of a trace", &job.trace.bytes);
            }
        }
        self.spy.found().into_iter().chain(spy.found()).collect()
    }

    /// GitLab's trace is our first lines, the guest's bytes, our last lines; and nothing that the
    /// guest was promised has changed (safety.md §3.1 Exact, invariants 2, 3, 5, 6).
    fn assert_exact(&self, job: &Job) {
        let told = self.memory.of(job.token.expose());
        assert!(told.runs <= 1, "job {} was run by {} guests\n{}", job.id, told.runs, self.histories());
        let by_us = job.verdicts == 1;
        // A canceled job ends as `canceled`, whatever is reported.
        if by_us
            && job.state != JobState::Canceled
            && let Some(verdict) = &told.verdict
        {
            assert_eq!(job.state.as_str(), verdict, "the guest was promised another verdict for job {}", job.id);
        }
        if job.erased {
            return;
        }
        if let Err(why) = exact(&job.trace.bytes, &told, by_us) {
            let (held, printed) = (String::from_utf8_lossy(&job.trace.bytes), String::from_utf8_lossy(&told.printed));
            panic!(
                "job {}: {why}\n--- GitLab holds\n{held}\n--- its guest printed\n{printed}\n{}",
                job.id,
                self.histories()
            );
        }
    }

    /// What the fakes saw, for a failing test.
    pub fn histories(&self) -> String {
        let mut text = String::from("--- GitLab saw\n");
        for request in self.standin.requests().iter().rev().take(40).rev() {
            text.push_str(&format!("{request:?}\n"));
        }
        text.push_str("--- the hypervisor saw\n");
        for entry in self.hypervisor.history().iter().rev().take(60).rev() {
            text.push_str(&format!("{entry:?}\n"));
        }
        text.push_str("--- the daemon said\n");
        text.push_str(&self.log.text());
        text
    }
}

/// Compares a trace with what its guest knows. `whole`: the job ended with a verdict of ours, so all that the guest
/// was told is taken must be there.
fn exact(held: &[u8], told: &Told, whole: bool) -> Result<(), String> {
    let ours = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let alien = text.lines().find(|line| !line.is_empty() && !is_ours(line)).map(str::to_owned);
        alien.map_or(Ok(()), |line| Err(format!("a line that is neither the guest's nor ours: {line:?}")))
    };
    let first = told.printed.split_inclusive(|b| *b == b'\n').next().unwrap_or_default();
    let begin = if first.is_empty() { None } else { held.windows(first.len()).position(|window| window == first) };
    let Some(begin) = begin else {
        if whole && told.taken > 0 {
            return Err(format!("{} bytes of the guest are lost", told.taken));
        }
        return ours(held);
    };
    ours(&held[..begin])?;
    let common = held[begin..].iter().zip(&told.printed).take_while(|(a, b)| a == b).count();
    if whole && common < told.taken {
        return Err(format!("only {common} of {} bytes of the guest are there", told.taken));
    }
    ours(&held[begin + common..])
}

/// Whether a line of a trace is one of the daemon's.
fn is_ours(line: &str) -> bool {
    line.as_bytes().get(26) == Some(&b'Z') && line.get(27..31) == Some(" 00O")
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
