//! The jobs of one plan, one after the other, through a daemon in this process.
//!
//! GitLab is the stand-in: a job is enqueued there when those before it are over, the daemon polls it
//! as it would poll any GitLab, and we look at the stand-in to see trace and verdict. Nothing here
//! speaks to a VM; what a job leaves on the host is the daemon's to take down.
//!
//! An interrupt tells the daemon to end all jobs honestly; a second one leaves at once, and the
//! next run reaps what is left.

use super::payload::{self, Common};
use super::pipeline::{AllowFailure, Job, Plan};
use super::reports::{self, Report};
use super::repository::Repository;
use super::screen::Screen;
use super::unpack::Folder;
use crate::standin::{Artifact, ArtifactContent, JobState, ProjectId, Standin, Variable};
use dayfly::config::Config;
use dayfly::control::ControlHandler;
use dayfly::daemon::{self, Backends, DaemonError, Shutdown};
use dayfly::gitlab::JobId;
use dayfly::status::RunnerState;
use dayfly::telemetry::chain;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// `timeout(1)`'s code for a job that ran out of time.
pub const EXIT_TIMEOUT: u8 = 124;
/// The machine failed, or we did.
pub const EXIT_OURS: u8 = 125;
/// 128 + SIGINT, as shells say it.
pub const EXIT_INTERRUPTED: u8 = 130;

/// How often the host is looked at while nothing moves at the stand-in.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a job may wait for a daemon that says it cannot take it: another run's VM may go.
const BLOCKED_PATIENCE: Duration = Duration::from_secs(30);
/// How long the daemon may take to clean up after the last job. A VM that does not power off is
/// destroyed after 5 s, a hypervisor that does not answer is given up after 30 s.
const CLOSE_PATIENCE: Duration = Duration::from_secs(60);
/// How long the daemon may take to end all jobs: its own limit is 30 s.
const END_PATIENCE: Duration = Duration::from_secs(40);

/// Everything one run needs; made by `exec`, or by a test with fakes.
pub struct Session<'a> {
    /// What to run.
    pub plan: &'a Plan,
    /// What the jobs clone.
    pub repository: Option<&'a Repository>,
    /// The pipeline file, as the developer named it.
    pub file: &'a Path,
    /// Timeout of jobs that name none.
    pub timeout: Duration,
    /// Variables that win over the file's.
    pub variables: &'a [Variable],
    /// Where artifacts go; none: no job has any.
    pub folder: Option<Folder>,
    /// GitLab.
    pub standin: Standin,
    /// The jobs' project there.
    pub project: ProjectId,
    /// The daemon's configuration: one runner of that project.
    pub config: Config,
    /// The daemon's seams.
    pub backends: Backends,
}

/// How one job, or the whole run, came out.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// It succeeded, or its failure is allowed.
    Success,
    /// Its script failed.
    Failed(u8),
    /// It ran out of time.
    TimedOut,
    /// The machine failed, or we did; the reason has been said.
    Ours,
    /// Somebody interrupted it.
    Interrupted,
}

impl End {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failed(code) => *code,
            Self::TimedOut => EXIT_TIMEOUT,
            Self::Ours => EXIT_OURS,
            Self::Interrupted => EXIT_INTERRUPTED,
        }
    }
}

/// The daemon under way.
struct Running {
    shutdown: Shutdown,
    task: JoinHandle<bool>,
    handler: Arc<dyn ControlHandler>,
    /// Interrupts seen.
    interrupts: u32,
    /// The task has ended and must not be polled again.
    ended: bool,
}

impl Session<'_> {
    /// Runs the jobs in order, until one fails. Returns the exit code.
    ///
    /// # Errors
    /// [`DaemonError`]: the daemon does not start, and no job has run.
    ///
    /// # Cancel safety
    /// Dropping it leaves VMs to be reaped.
    pub async fn run(self, screen: &mut Screen, interrupts: &mut mpsc::Receiver<()>) -> Result<u8, DaemonError> {
        let shutdown = Shutdown::new();
        let start = daemon::start(self.config.clone(), self.backends.clone(), shutdown.clone());
        let daemon = tokio::select! {
            biased;
            // The interrupt first: a start may take long (a boot that proves KVM). A start that is
            // dropped leaves at most that boot, which the next run reaps.
            Some(()) = interrupts.recv() => return Ok(EXIT_INTERRUPTED),
            started = start => started?,
        };
        let handler = daemon.handler();
        #[expect(clippy::disallowed_methods, reason = "joined by `Running::close`")]
        let task = tokio::spawn(daemon.run());
        let mut running = Running { shutdown, task, handler, interrupts: 0, ended: false };
        let end = self.run_jobs(&mut running, screen, interrupts).await;
        running.close(interrupts).await;
        Ok(end.exit_code())
    }

    async fn run_jobs(&self, running: &mut Running, screen: &mut Screen, interrupts: &mut mpsc::Receiver<()>) -> End {
        let common = Common {
            pipeline: self.standin.edit(|model| model.new_id()),
            repository: self.repository,
            file: self.file.display().to_string(),
            timeout: self.timeout,
            variables: self.variables,
        };
        let mut ids: BTreeMap<String, JobId> = BTreeMap::new();
        for job in &self.plan.jobs {
            if self.plan.jobs.len() > 1 {
                screen.say(&format!("job `{}`", job.name));
            }
            let (spec, remark) = payload::spec(job, &common, &ids);
            if let Some(remark) = remark {
                screen.say(&format!("job `{}`: {remark}", job.name));
            }
            let id = self.standin.enqueue(self.project, spec);
            ids.insert(job.name.clone(), id);
            screen.begin_trace();
            let over = self.follow(id, running, screen, interrupts).await;
            screen.end_line();
            let end = match over {
                Err(end) => end,
                Ok(()) => {
                    let end = self.judge(job, id, running.interrupts > 0, screen);
                    match self.keep_artifacts(job, id, screen).await {
                        false if end == End::Success => End::Ours,
                        _ => end,
                    }
                }
            };
            if end != End::Success {
                return end;
            }
        }
        End::Success
    }

    /// Shows the job's trace until GitLab has its verdict. An error: there will be none.
    async fn follow(
        &self,
        id: JobId,
        running: &mut Running,
        screen: &mut Screen,
        interrupts: &mut mpsc::Receiver<()>,
    ) -> Result<(), End> {
        let mut shown = 0;
        let mut blocked_since: Option<Instant> = None;
        let mut deadline: Option<Instant> = None;
        loop {
            // Read before the trace: what came before the verdict is shown before it counts.
            let (bytes, state) = self.standin.read(|model| {
                let job = model.jobs.get(&id);
                let bytes = job.and_then(|j| j.trace.bytes.get(shown..)).map(<[u8]>::to_vec).unwrap_or_default();
                (bytes, job.map_or(JobState::Canceled, |j| j.state))
            });
            shown += bytes.len();
            screen.trace(&bytes);
            if state.is_over() {
                return Ok(());
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                return Err(End::Interrupted);
            }
            if running.ended {
                screen.say("the daemon ended before the job; this is a fault of dayfly's");
                return Err(if running.interrupts > 0 { End::Interrupted } else { End::Ours });
            }
            if let Some(reason) = running.blocked().filter(|_| state == JobState::Pending) {
                let since = *blocked_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= BLOCKED_PATIENCE {
                    screen.say(&format!("the job cannot start: {reason}"));
                    return Err(End::Ours);
                }
            } else {
                blocked_since = None;
            }
            let news = self.standin.wait_for(
                |model| model.jobs.get(&id).is_none_or(|j| j.trace.bytes.len() > shown || j.state != state),
                LOOK_INTERVAL,
            );
            tokio::select! {
                biased;
                // All are cancel safe. The developer first.
                Some(()) = interrupts.recv() => {
                    running.interrupts += 1;
                    if running.interrupts > 1 {
                        return Err(End::Interrupted);
                    }
                    screen.say("interrupted: the job is being ended; interrupt again to leave at once");
                    running.shutdown.end();
                    deadline = Some(Instant::now() + END_PATIENCE);
                }
                _ = &mut running.task => running.ended = true,
                // Late is no error here: it is time to look at the host.
                _ = news => {}
            }
        }
    }

    /// What the verdict at GitLab means for the exit code.
    fn judge(&self, job: &Job, id: JobId, interrupted: bool, screen: &mut Screen) -> End {
        let Some(found) = self.standin.job(id) else { return End::Ours };
        let name = &job.name;
        let code = found.exit_code.and_then(|code| i32::try_from(code).ok());
        let reason = found.failure_reason.as_deref().unwrap_or("script_failure");
        let end = match found.state {
            JobState::Success => return End::Success,
            _ if interrupted => return End::Interrupted,
            JobState::Failed => match reason {
                "script_failure" => End::Failed(exit_code(code)),
                "job_execution_timeout" | "server_timeout_running" | "stuck_or_timeout_failure" => End::TimedOut,
                _ => End::Ours,
            },
            _ => End::Ours,
        };
        let covered = match &end {
            End::Failed(_) => job.allow_failure.covers(code),
            End::TimedOut => job.allow_failure == AllowFailure::Yes,
            _ => false,
        };
        let what = match &end {
            End::Failed(_) => code.map_or("failed".to_owned(), |code| format!("failed with exit code {code}")),
            End::TimedOut => "ran out of time".to_owned(),
            _ => format!("could not be run to its end ({reason}); its log says more"),
        };
        if covered {
            screen.say(&format!("job `{name}` {what}, which its `allow_failure` allows"));
            return End::Success;
        }
        screen.say(&format!("job `{name}` {what}"));
        end
    }

    /// Puts down what the job uploaded. `false`: something could not be, and has been said.
    async fn keep_artifacts(&self, job: &Job, id: JobId, screen: &mut Screen) -> bool {
        let Some(folder) = &self.folder else { return true };
        let artifacts = self.standin.read(|model| model.jobs.get(&id).map(|j| j.artifacts.clone()).unwrap_or_default());
        let (folder, name) = (folder.clone(), job.name.clone());
        let kept = tokio::task::spawn_blocking(move || keep(&folder, &name, artifacts.into_values().collect())).await;
        let Ok((lines, well)) = kept else {
            screen.say("putting the artifacts down panicked; this is a fault of dayfly's");
            return false;
        };
        lines.iter().for_each(|line| screen.say(line));
        well
    }
}

/// Blocking. Lines for the developer, and whether all went well.
fn keep(folder: &Folder, job: &str, artifacts: Vec<Artifact>) -> (Vec<String>, bool) {
    let mut lines = Vec::new();
    let mut well = true;
    let mut fail = |error: &dyn std::error::Error| {
        well = false;
        format!("artifacts of job `{job}`: {}", chain(error))
    };
    if let Err(error) = folder.clear(job) {
        lines.push(fail(&error));
        return (lines, well);
    }
    for artifact in artifacts {
        let ArtifactContent::File(path) = &artifact.content else { continue };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) => {
                lines.push(fail(&error));
                continue;
            }
        };
        if artifact.kind == "archive" {
            match folder.unpack(job, file) {
                Ok(unpacked) => {
                    lines.extend(
                        unpacked
                            .links
                            .iter()
                            .map(|link| format!("artifacts of job `{job}`: link `{link}` was left out")),
                    );
                    let files =
                        if unpacked.files == 1 { "1 file".to_owned() } else { format!("{} files", unpacked.files) };
                    let place = folder.job_directory(job);
                    lines.push(format!("artifacts of job `{job}`: {files} in {}", place.display()));
                }
                Err(error) => lines.push(fail(&error)),
            }
        } else if artifact.kind != "metadata" {
            let gzip = artifact.format == "gzip";
            let report = Report { kind: &artifact.kind, filename: &artifact.filename, gzip, content: file };
            match folder.store_report(job, report) {
                Ok(paths) => lines.push(format!("report of job `{job}`: {}", reports::shown(&paths))),
                Err(error) => lines.push(fail(&error)),
            }
        }
    }
    (lines, well)
}

/// The script's code, as far as a process can end with it; never 0.
fn exit_code(code: Option<i32>) -> u8 {
    let low = code.unwrap_or(1).rem_euclid(256);
    u8::try_from(low).ok().filter(|code| *code != 0).unwrap_or(1)
}

impl Running {
    /// Why the daemon does not take the job, if it says so.
    fn blocked(&self) -> Option<String> {
        self.handler.status().runners.into_iter().find_map(|runner| match runner.state {
            RunnerState::Blocked { reason } => Some(reason),
            RunnerState::Refused { error } | RunnerState::Retrying { error, .. } => Some(error),
            RunnerState::WaitingForRoom { missing } => Some(format!("it waits for {missing}")),
            RunnerState::Polling | RunnerState::Stopped => None,
        })
    }

    /// Waits until the daemon has taken everything down; a second interrupt does not wait.
    async fn close(mut self, interrupts: &mut mpsc::Receiver<()>) {
        let mut patience = CLOSE_PATIENCE;
        self.shutdown.drain();
        while !self.ended && self.interrupts < 2 {
            tokio::select! {
                biased;
                // All are cancel safe. The developer first.
                Some(()) = interrupts.recv() => {
                    self.interrupts += 1;
                    self.shutdown.end();
                    patience = END_PATIENCE;
                }
                _ = &mut self.task => self.ended = true,
                () = tokio::time::sleep(patience) => {
                    if self.interrupts > 0 {
                        break;
                    }
                    self.interrupts = 1;
                    self.shutdown.end();
                    patience = END_PATIENCE;
                }
            }
        }
        if !self.ended {
            tracing::warn!("leaving before everything is taken down; the next run removes what is left");
            self.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::exit_code;

    #[test]
    fn exit_codes_are_those_of_the_script_as_far_as_they_fit() {
        for (code, expected) in
            [(Some(42), 42), (None, 1), (Some(0), 1), (Some(256), 1), (Some(300), 44), (Some(-1), 255)]
        {
            assert_eq!(exit_code(code), expected, "{code:?}");
        }
    }
}
