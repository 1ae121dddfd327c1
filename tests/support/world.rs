//! [`World`]: fakes, the daemon under test, and what must hold when all is over.

use super::guest::Guest;
use bytes::Bytes;
use dayfly::clock::Clock;
use dayfly::config::{Class, Config, Runner};
use dayfly::daemon::{self, Backends, Jobs, Shutdown};
use dayfly::files::Files;
use dayfly::files::fake::MemoryFiles;
use dayfly::gitlab::JobId;
use dayfly::guest::Limits;
use dayfly::image::manifest::{BootKind, BuildInputs, ImageFile, ImageRunner, Manifest, RunnerOrigin};
use dayfly::image::store::{Image, ImageStore};
use dayfly::rng::Rng;
use dayfly::standin::{JobSpec, JobState, ProjectId, Standin};
use dayfly::vm::fake::{FakeHypervisor, Timing};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a test waits, in virtual time: longer than any deadline of a job.
pub const LONG: Duration = Duration::from_secs(4 * 3600);

/// A daemon and all that is around it. The fakes outlive the daemon, as the world outlives a crash.
pub struct World {
    pub standin: Standin,
    pub hypervisor: FakeHypervisor,
    pub files: MemoryFiles,
    pub rng: Rng,
    pub clock: Clock,
    pub config: Config,
    pub project: ProjectId,
    _tokens: tempfile::TempDir,
    daemon: Option<Running>,
}

struct Running {
    task: JoinHandle<()>,
    shutdown: Shutdown,
    jobs: Jobs,
}

impl World {
    /// A world with one runner and guests that behave; the daemon is not started yet.
    pub fn new(seed: u64) -> Self {
        let rng = Rng::seeded(seed);
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
        let standin = Standin::new(clock.clone(), rng.clone());
        let project = standin.add_project("group/project");
        let hypervisor = FakeHypervisor::new();
        hypervisor.set_timing(Timing { boot: Duration::from_secs(5), ..Timing::default() });
        hypervisor.set_guest(Guest::run);
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
            standin,
            hypervisor,
            files: MemoryFiles::default(),
            rng,
            clock,
            config,
            project,
            _tokens: tokens,
            daemon: None,
        };
        world.add_runner("runner");
        world
    }

    /// Registers one more runner at the stand-in.
    pub fn add_runner(&mut self, name: &str) {
        let id = self.standin.add_runner(self.project);
        let token = self.standin.runner_token(id).unwrap();
        let file = self._tokens.path().join(name);
        std::fs::write(&file, token.expose()).unwrap();
        std::os::unix::fs::PermissionsExt::set_mode(&mut std::fs::metadata(&file).unwrap().permissions(), 0o600);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&file, mode).unwrap();
        self.config.runner.push(Runner {
            name: name.into(),
            url: "https://gitlab.example".parse().unwrap(),
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

    /// The seams of a daemon in this world.
    pub fn backends(&self) -> Backends {
        Backends {
            hypervisor: Arc::new(self.hypervisor.clone()),
            transport: self.standin.opener(),
            files: Arc::new(self.files.clone()),
            clock: self.clock.clone(),
            rng: self.rng.clone(),
            images: ImageStore::fixed(image()),
            door_limits: Limits::default(),
        }
    }

    /// Starts a daemon: the first, or the next one after an end.
    pub async fn start(&mut self) -> Result<(), daemon::DaemonError> {
        let shutdown = Shutdown::new();
        let daemon = daemon::start(self.config.clone(), self.backends(), shutdown.clone()).await?;
        let jobs = daemon.jobs();
        let task = tokio::spawn(daemon.run());
        self.daemon = Some(Running { task, shutdown, jobs });
        Ok(())
    }

    /// Puts a job with this script into GitLab's queue.
    pub fn job(&self, script: &[&str]) -> JobId {
        self.standin.enqueue(self.project, JobSpec::script(script.iter().copied()))
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

    /// Kills the daemon where it stands: every task of it is dropped, the world lives on.
    ///
    /// Tasks that the daemon spawned are aborted by running it in a runtime of its own; see
    /// [`crash_run`].
    pub async fn hand_over(&mut self) {
        self.shutdown().hand_over();
        self.ended().await;
    }

    /// The host and GitLab as they must be when every job is over: one verdict each, nothing left.
    pub async fn assert_clean(&mut self) {
        self.until_idle().await;
        let counts = self.hypervisor.counts();
        assert!(counts.is_clean(), "left behind: {counts:?}\n{}", self.histories());
        let left: Vec<_> =
            self.files.paths_below(Path::new("/")).into_iter().filter(|p| !p.ends_with("installation.json")).collect();
        assert!(left.is_empty(), "files are left: {left:?}");
        let running = self.daemon.as_ref().expect("a daemon runs");
        assert!(running.jobs.views().is_empty());
        self.standin.read(|model| {
            for (id, job) in &model.jobs {
                assert!(!job.state.is_executing(), "job {id} is still {:?}", job.state);
            }
            assert_eq!(model.metrics.trace_invalid, 0, "a verdict's checksum did not match");
        });
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
        text
    }
}

/// An image that exists on no disk: the fake hypervisor reads none.
fn image() -> Image {
    let file = |name: &str| ImageFile { file: name.into(), bytes: 1, sha256: String::new() };
    Image {
        name: "test".into(),
        dir: "/images/test".into(),
        disk: "/images/test/disk.qcow2".into(),
        disk_bytes: 1 << 30,
        boot: dayfly::vm::Boot::Disk,
        manifest: Manifest {
            format_version: 1,
            name: "test".into(),
            architecture: "x86_64".into(),
            boot: BootKind::Disk,
            cmdline: None,
            executor: "shell".into(),
            info: Some(r#"{"name":"gitlab-runner","version":"19.3.0","features":{"cancel_gracefully":true}}"#.into()),
            runner: ImageRunner {
                version: "19.3.0".into(),
                revision: None,
                origin: RunnerOrigin::Path,
                sha256: String::new(),
            },
            disk: file("disk.qcow2"),
            kernel: None,
            initrd: None,
            build: BuildInputs::default(),
        },
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// Keeps `Files` and `Bytes` in use for tests that write files by hand.
pub async fn write(files: &MemoryFiles, path: &str, text: &str) {
    files.write_at(Path::new(path), 0, Bytes::copy_from_slice(text.as_bytes())).await.unwrap();
}
