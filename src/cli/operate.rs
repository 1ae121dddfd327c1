//! `dayfly status`, `metrics`, `drain`, `kill`: what the operator asks of a running daemon.

use super::print;
use crate::config::Config;
use crate::control::{self, Answer, ControlError, KillOutcome, Request};
use crate::gitlab::JobId;
use crate::status::StatusReport;
use crate::telemetry::printable;
use anyhow::bail;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Monitoring's codes.
const EXIT_PROBLEM: u8 = 2;
const EXIT_UNKNOWN: u8 = 3;

/// Prints the report of the running daemon.
pub(super) async fn status(config: &Path, json: bool) -> anyhow::Result<()> {
    match ask(config, &Request::Status).await? {
        Answer::Status { status } if json => print(&format!("{}\n", serde_json::to_string_pretty(&status)?))?,
        Answer::Status { status } => print(&status.to_string())?,
        other => return unexpected(&other),
    }
    Ok(())
}

/// Prints what needs a person, a line each, for a monitoring that goes by exit codes. Whatever keeps the status from being
/// known is its third.
pub(super) async fn check(config: &Path) -> anyhow::Result<ExitCode> {
    let answer = match ask(config, &Request::Status).await {
        Ok(answer) => answer,
        Err(error) => {
            print(&format!("unknown: {}\n", printable(&format!("{error:#}"))))?;
            return Ok(ExitCode::from(EXIT_UNKNOWN));
        }
    };
    let Answer::Status { status } = answer else {
        unexpected(&answer)?;
        return Ok(ExitCode::from(EXIT_UNKNOWN));
    };
    let (code, text) = judge(&status);
    print(&text)?;
    Ok(ExitCode::from(code))
}

/// Code and text of a check.
fn judge(status: &StatusReport) -> (u8, String) {
    let problems = &status.daemon.problems;
    if problems.is_empty() {
        let (jobs, runners) = (status.jobs.len(), status.runners.len());
        return (0, format!("well: {jobs} jobs, {runners} runners\n"));
    }
    (EXIT_PROBLEM, problems.iter().map(|problem| format!("problem: {}\n", printable(problem))).collect())
}

/// Prints the metrics of the running daemon.
pub(super) async fn metrics(config: &Path) -> anyhow::Result<()> {
    match ask(config, &Request::Metrics).await? {
        Answer::Metrics { text } => print(&text)?,
        other => return unexpected(&other),
    }
    Ok(())
}

/// Between two looks whether a drain has ended.
const DRAIN_GLANCE: Duration = Duration::from_secs(1);

/// Begins a drain; `wait`: until the daemon has ended, which takes as long as its longest job, or `limits.drain_timeout`.
pub(super) async fn drain(config: &Path, wait: bool) -> anyhow::Result<()> {
    match ask(config, &Request::Drain).await? {
        Answer::Draining { kept } => {
            print("draining: no more jobs are taken; the daemon ends after its last one\n")?;
            for job in kept {
                print(&format!("the machine of job {job}, which failed and was kept, is ended now\n"))?;
            }
        }
        other => return unexpected(&other),
    }
    if !wait {
        return Ok(());
    }
    loop {
        tokio::time::sleep(DRAIN_GLANCE).await;
        match ask(config, &Request::Status).await {
            Ok(Answer::Status { status }) if !status.daemon.draining => {
                bail!("wait for the drain: another daemon has come, and takes jobs")
            }
            Ok(_) => {}
            Err(error) => match error.downcast_ref::<ControlError>() {
                Some(ControlError::NotRunning { .. }) => return Ok(print("drained: the daemon has ended\n")?),
                // It ends while it is asked, or is busy: the next look tells.
                Some(ControlError::Broken { .. } | ControlError::Silent { .. }) => {}
                Some(ControlError::Denied { .. }) | None => return Err(error),
            },
        }
    }
}

/// Tells one job to end; does not wait for its end.
pub(super) async fn kill(
    config: &Path,
    job: u64,
    runner: Option<String>,
    reason: Option<String>,
) -> anyhow::Result<()> {
    match ask(config, &Request::Kill { job: JobId(job), runner, reason }).await? {
        Answer::Kill { outcome: KillOutcome::Told { runner } } => {
            print(&format!("job {job} of runner `{runner}` is being ended\n"))?
        }
        Answer::Kill { outcome: KillOutcome::Unknown } => {
            bail!("kill job {job}: no such job is here; `dayfly status` lists them")
        }
        Answer::Kill { outcome: KillOutcome::Ambiguous { runners } } => {
            bail!("kill job {job}: runners {} each have one; say which by --runner", runners.join(", "))
        }
        other => return unexpected(&other),
    }
    Ok(())
}

pub(super) async fn ask(config: &Path, request: &Request) -> anyhow::Result<Answer> {
    // The daemon may have been started with an environment of its own; its socket's place is all we need.
    let loaded = Config::load_or_default(config)?;
    Ok(control::call(&control::socket(&loaded.config.runtime_directory), request).await?)
}

pub(super) fn unexpected(answer: &Answer) -> anyhow::Result<()> {
    match answer {
        Answer::Error { message } => bail!("make the daemon understand: {message}; is it of the same version?"),
        other => bail!("make sense of the daemon's answer {other:?}; is it of the same version?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::DaemonStatus;

    /// U19: a problem is code 2 and a line of its own that drives no terminal.
    #[test]
    fn a_check_names_each_problem_and_has_its_code() {
        let mut status = StatusReport::default();
        assert_eq!(judge(&status), (0, "well: 0 jobs, 0 runners\n".to_owned()));
        let problems = vec!["GitLab has not answered for 6 min".to_owned(), "x\n\u{1b}[2J".to_owned()];
        status.daemon = DaemonStatus { problems, ..DaemonStatus::default() };
        let text = "problem: GitLab has not answered for 6 min\nproblem: x\\n\\u{1b}[2J\n";
        assert_eq!(judge(&status), (2, text.to_owned()));
    }
}
