//! `run-single`: asks for jobs, one after the other, until enough were run, none came, or a signal says so.

use crate::api::{Api, JobKey, Outcome, Polled};
use crate::cli::CliError;
use crate::config::{self, Runner};
use crate::control::{self, Control};
use crate::job;
use crate::payload::Job;
use crate::reporter::{Running, Verdict};
use crate::trace::Trace;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After an answer without a job.
const POLL_PAUSE: Duration = Duration::from_secs(3);
/// After a 403.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(300);

/// What the command line says.
#[derive(Default, Debug)]
pub(crate) struct SingleArguments {
    /// `-c`.
    pub(crate) config_file: PathBuf,
    /// `-r`.
    pub(crate) runner_name: String,
    /// `--max-builds`; 0: no limit.
    pub(crate) builds_max: u64,
    /// `--wait-timeout`, seconds; 0: none. Looked at between polls only.
    pub(crate) wait_timeout_s: u64,
}

/// What the runner knows while it runs.
pub(crate) struct Parts {
    pub(crate) runner: Runner,
    pub(crate) system_id: String,
    pub(crate) api: Arc<Api>,
    pub(crate) control: Arc<Control>,
}

/// Runs jobs; the exit code is 0 whatever became of them.
///
/// # Errors
/// The configuration, and signals that cannot be caught.
pub(crate) fn run(arguments: SingleArguments) -> Result<ExitCode, CliError> {
    let runner = Runner::load(&arguments.config_file, &arguments.runner_name)?;
    let system_id = config::system_id();
    let control = Arc::new(Control::default());
    control::listen_for_signals(&control).map_err(CliError::Signals)?;
    crate::log(&format!("dayfly's stand-in runner for {} with token {}", runner.url, runner.short_token()));
    let api = Arc::new(Api::new(&runner.url, &runner.token, &system_id, &runner.executor));
    let parts = Parts { runner, system_id, api, control };

    let mut builds = 0;
    let mut last_build = Instant::now();
    while !parts.control.is_finishing() {
        if poll(&parts) == Polling::JobRun {
            builds += 1;
            last_build = Instant::now();
        }
        if arguments.builds_max > 0 && builds >= arguments.builds_max {
            crate::log("all jobs run that were asked for");
            break;
        }
        if arguments.wait_timeout_s > 0 && last_build.elapsed().as_secs() > arguments.wait_timeout_s {
            crate::log(&format!("no job in {} seconds", arguments.wait_timeout_s));
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(PartialEq, Eq)]
enum Polling {
    JobRun,
    /// Also a job that GitLab took back at once: it does not count.
    NoJob,
}

fn poll(parts: &Parts) -> Polling {
    match parts.api.request_job() {
        Polled::Job { body, correlation_id } => match Job::parse(&body) {
            Ok(job) => return process(parts, Job { correlation_id, ..job }),
            Err(error) => {
                crate::log(&format!("ERROR: read the job: {error}"));
                parts.control.pause(POLL_PAUSE);
            }
        },
        Polled::Nothing => parts.control.pause(POLL_PAUSE),
        Polled::Forbidden => {
            crate::log("ERROR: the runner token is not accepted");
            parts.control.pause(FORBIDDEN_PAUSE);
        }
    }
    Polling::NoJob
}

/// Tells GitLab that the job runs, and runs it unless the answer takes it back.
fn process(parts: &Parts, job: Job) -> Polling {
    parts.control.begin_job();
    let key = JobKey { id: job.id, token: job.token.clone() };
    let trace = Arc::new(Trace::new(parts.runner.output_limit));
    let prepared = job::Prepared::new(parts, job);
    let reporter = Running::start(&parts.api, &key, &trace, &parts.control, prepared.debug_trace());
    let early = parts.api.put(&key, &parts.api.update(&key, "running"));
    if matches!(early.outcome, Outcome::Abort | Outcome::NotFound) {
        reporter.stop();
        return Polling::NoJob;
    }
    let tries = parts.runner.job_status_final_update_retry_limit;
    if early.cancel {
        // The one place where this word goes out as it is: recorded.
        reporter.finish(Verdict { failure_reason: Some("job_canceled"), exit_code: 0 }, tries);
        return Polling::NoJob;
    }
    // Any other answer, also none, is no reason not to run.
    let verdict = prepared.run(&trace, &parts.control);
    reporter.finish(verdict, tries);
    Polling::JobRun
}
