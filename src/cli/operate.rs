//! `dayfly status`, `drain`, `kill`: what the operator asks of a running daemon.

use crate::config::Config;
use crate::control::{self, Answer, KillOutcome, Request};
use crate::gitlab::JobId;
use anyhow::bail;
use std::io::{self, Write as _};
use std::path::Path;

/// Prints the report of the running daemon.
pub(super) async fn status(config: &Path, json: bool) -> anyhow::Result<()> {
    match ask(config, &Request::Status).await? {
        Answer::Status { status } if json => writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&status)?)?,
        Answer::Status { status } => write!(io::stdout(), "{status}")?,
        other => return unexpected(&other),
    }
    Ok(())
}

/// Begins a drain; does not wait for its end.
pub(super) async fn drain(config: &Path) -> anyhow::Result<()> {
    match ask(config, &Request::Drain).await? {
        Answer::Draining => {
            writeln!(io::stdout(), "draining: no more jobs are taken; the daemon ends after its last one")?
        }
        other => return unexpected(&other),
    }
    Ok(())
}

/// Tells one job to end; does not wait for its end.
pub(super) async fn kill(config: &Path, job: u64, runner: Option<String>) -> anyhow::Result<()> {
    match ask(config, &Request::Kill { job: JobId(job), runner }).await? {
        Answer::Kill { outcome: KillOutcome::Told { runner } } => {
            writeln!(io::stdout(), "job {job} of runner `{runner}` is being ended")?
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

async fn ask(config: &Path, request: &Request) -> anyhow::Result<Answer> {
    // The daemon may have been started with an environment of its own; its socket's place is all we need.
    let loaded = Config::load_or_default(config)?;
    Ok(control::call(&control::socket(&loaded.config.runtime_directory), request).await?)
}

fn unexpected(answer: &Answer) -> anyhow::Result<()> {
    match answer {
        Answer::Error { message } => bail!("make the daemon understand: {message}; is it of the same version?"),
        other => bail!("make sense of the daemon's answer {other:?}; is it of the same version?"),
    }
}
