//! `dayfly exec`: jobs of a pipeline file through the whole daemon, and what the developer gets.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "helpers of tests")]

use crate::support::world::World;
use dayfly_exec::pipeline::{self, Plan};
use dayfly_exec::standin::ArtifactKeep;
use dayfly_exec::unpack::{Folder, Limits};
use dayfly_exec::{Screen, Session};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// What was written to a stream.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Written {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// A world, and a developer in front of it.
struct Desk {
    world: World,
    out: Written,
    err: Written,
    dir: tempfile::TempDir,
    interrupts: (mpsc::Sender<()>, mpsc::Receiver<()>),
}

impl Desk {
    fn new() -> Self {
        let mut world = World::new(1);
        world.config.runner[0].limit = Some(1);
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("uploads")).unwrap();
        world.standin.configure(|settings| {
            settings.artifact_keep = ArtifactKeep::Directory(dir.path().join("uploads"));
            settings.trace_update_interval = Some(Duration::from_secs(1));
        });
        Self { world, out: Written::default(), err: Written::default(), dir, interrupts: mpsc::channel(2) }
    }

    /// Runs these jobs and returns the exit code; nothing is left on the host.
    async fn exec(&mut self, file: &str, jobs: &[&str]) -> u8 {
        let code = self.exec_dirty(file, jobs).await;
        assert!(self.world.hypervisor.counts().is_clean(), "{:?}", self.world.hypervisor.counts());
        code
    }

    async fn exec_dirty(&mut self, file: &str, jobs: &[&str]) -> u8 {
        let names: Vec<String> = jobs.iter().map(|j| (*j).to_owned()).collect();
        let plan: Plan = pipeline::plan(Path::new("ci.yml"), file, &names).unwrap();
        let mut screen = Screen::new(Box::new(self.out.clone()), Box::new(self.err.clone()), false);
        let session = Session {
            plan: &plan,
            repository: None,
            file: Path::new("ci.yml"),
            timeout: Duration::from_secs(600),
            variables: &[],
            folder: Some(Folder::open(&self.dir.path().join("artifacts"), Limits::default()).unwrap()),
            standin: self.world.standin.clone(),
            project: self.world.project,
            config: self.world.config.clone(),
            backends: self.world.backends(),
        };
        session.run(&mut screen, &mut self.interrupts.1).await.unwrap()
    }

    /// Interrupts once the trace holds this text, `times` times.
    fn interrupt_at(&self, text: &'static str, times: usize) {
        let (out, sender) = (self.out.clone(), self.interrupts.0.clone());
        tokio::spawn(async move {
            while !out.text().contains(text) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            for _ in 0..times {
                sender.send(()).await.unwrap();
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn the_log_ends_with_the_jobs_own_last_line() {
    let mut desk = Desk::new();
    assert_eq!(desk.exec("job: {script: [print hello, sleep 5]}", &["job"]).await, 0);
    let out = desk.out.text();
    assert!(out.ends_with("hello\nJob succeeded\n"), "{out}");
    assert!(!out.contains("section_start"), "{out}");
    assert_eq!(desk.err.text(), "");
}

#[tokio::test(start_paused = true)]
async fn the_exit_code_is_the_scripts() {
    let mut desk = Desk::new();
    assert_eq!(desk.exec("job: {script: [exit 42]}", &["job"]).await, 42);
    assert_eq!(desk.err.text(), "dayfly: job `job` failed with exit code 42\n");
}

#[tokio::test(start_paused = true)]
async fn an_allowed_failure_is_a_line_and_no_failure() {
    let mut desk = Desk::new();
    let file = "
one: {script: [exit 3], stage: build, allow_failure: true}
two: {script: [print second]}
";
    assert_eq!(desk.exec(file, &["two", "one"]).await, 0);
    let words = "dayfly: job `one`\ndayfly: job `one` failed with exit code 3, which its `allow_failure` allows\ndayfly: job `two`\n";
    assert_eq!(desk.err.text(), words);
    assert!(desk.out.text().contains("second\n"));
}

#[tokio::test(start_paused = true)]
async fn the_first_failure_ends_the_run() {
    let mut desk = Desk::new();
    let file = "
one: {script: [exit 3], stage: build}
two: {script: [print second]}
";
    assert_eq!(desk.exec(file, &["one", "two"]).await, 3);
    assert!(!desk.out.text().contains("second"));
}

#[tokio::test(start_paused = true)]
async fn a_job_that_runs_out_of_time_is_told_apart() {
    let mut desk = Desk::new();
    assert_eq!(desk.exec("job: {script: [hang], timeout: 2 minutes}", &["job"]).await, 124, "{}", desk.out.text());
    assert_eq!(desk.err.text(), "dayfly: job `job` ran out of time\n");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_fails_is_not_the_jobs_fault_whatever_is_allowed() {
    let mut desk = Desk::new();
    assert_eq!(desk.exec("job: {script: [print hello, crash], allow_failure: true}", &["job"]).await, 125);
    let words = "dayfly: job `job` could not be run to its end (runner_system_failure); its log says more\n";
    assert_eq!(desk.err.text(), words);
}

/// E2: `exec`: the first interrupt ends its job.
#[tokio::test(start_paused = true)]
async fn an_interrupt_ends_the_job_and_cleans_up() {
    let mut desk = Desk::new();
    desk.interrupt_at("hello", 1);
    assert_eq!(desk.exec("job: {script: [print hello, sleep 500]}", &["job"]).await, 130);
    let err = desk.err.text();
    assert!(
        err.starts_with("dayfly: interrupted: the job is being ended; interrupt again to leave at once\n"),
        "{err}"
    );
}

/// E2: `exec`: the second does not wait.
#[tokio::test(start_paused = true)]
async fn a_second_interrupt_leaves_at_once() {
    let mut desk = Desk::new();
    desk.interrupt_at("hello", 2);
    let before = tokio::time::Instant::now();
    assert_eq!(desk.exec_dirty("job: {script: [print hello, sleep 500]}", &["job"]).await, 130);
    assert!(before.elapsed() < Duration::from_secs(30), "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_interrupt_before_the_job_has_a_machine_ends_it_too() {
    let mut desk = Desk::new();
    desk.interrupts.0.send(()).await.unwrap();
    assert_eq!(desk.exec("job: {script: [print hello]}", &["job"]).await, 130);
    assert!(!desk.out.text().contains("hello"));
}

#[tokio::test(start_paused = true)]
async fn what_the_daemon_cannot_start_is_said_and_ends_the_run() {
    let mut desk = Desk::new();
    desk.world.config.class[0].image = "missing".into();
    assert_eq!(desk.exec("job: {script: [print hello]}", &["job"]).await, 125);
    let err = desk.err.text();
    assert!(err.starts_with("dayfly: the job cannot start: no image `missing`"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn artifacts_that_cannot_be_unpacked_are_our_failure() {
    let mut desk = Desk::new();
    assert_eq!(desk.exec("job: {script: [upload 100], artifacts: {paths: [x]}}", &["job"]).await, 125);
    let words = "dayfly: artifacts of job `job`: the archive is no sound zip: it has no directory at its end\n";
    assert_eq!(desk.err.text(), words);
    assert!(!desk.dir.path().join("artifacts/job").exists());
}
