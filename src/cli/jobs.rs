//! `dayfly jobs`, `job show`, `console`: what runs here, what has run, and what its machines print.

use super::operate::{ask, unexpected};
use super::print;
use crate::clock::Clock;
use crate::control::{Answer, Request};
use crate::gitlab::JobId;
use crate::status::{ConsoleFound, JobFound};
use anyhow::bail;
use std::path::Path;
use std::time::Duration;

/// How often a console that is followed is asked for more.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(super) struct Jobs {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Those that have ended, newest first, as long as they are kept (`[history]`)
    #[arg(long)]
    ended: bool,
    /// So many ended ones at most
    #[arg(long, value_name = "N", default_value_t = 100, requires = "ended")]
    last: u32,
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Job {
    /// Show all that is known of one job: steps, machine, what GitLab has of it, the end of its console
    Show {
        #[command(flatten)]
        which: Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// A job.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// GitLab's id of the job
    pub(super) job: u64,
    /// Name of its runner entry, if several have, or had, a job of this id
    #[arg(long)]
    pub(super) runner: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Console {
    #[command(flatten)]
    which: Which,
    /// Go on until the job has ended
    #[arg(short, long)]
    follow: bool,
    /// All that is kept on disk of it (`[history] console_keep`), not only its end
    #[arg(short, long, conflicts_with = "follow")]
    all: bool,
}

/// Prints the jobs.
pub(super) async fn jobs(config: &Path, args: &Jobs) -> anyhow::Result<()> {
    match ask(config, &Request::Jobs { ended_max: args.ended.then_some(args.last) }).await? {
        Answer::Jobs { jobs } if args.json => print(&format!("{}\n", serde_json::to_string_pretty(&jobs)?))?,
        Answer::Jobs { jobs } => print(&jobs.text(Clock::system().now()))?,
        other => return unexpected(&other),
    }
    Ok(())
}

/// Prints one job.
pub(super) async fn job(config: &Path, args: Job) -> anyhow::Result<()> {
    let Job::Show { which: Which { job, runner }, json } = args;
    let found = match ask(config, &Request::Job { job: JobId(job), runner }).await? {
        Answer::Job { found } => found,
        other => return unexpected(&other),
    };
    match &found {
        JobFound::Unknown => return unknown(job),
        JobFound::Ambiguous { runners } => return ambiguous(job, runners),
        JobFound::Running { .. } | JobFound::Ended { .. } if json => {
            print(&format!("{}\n", serde_json::to_string_pretty(&found)?))?
        }
        JobFound::Running { job } => print(&job.to_string())?,
        JobFound::Ended { end } => print(&end.text(Clock::system().now()))?,
    }
    Ok(())
}

/// Prints a console, and what comes after that if it is followed.
pub(super) async fn console(config: &Path, args: Console) -> anyhow::Result<()> {
    let Console { which: Which { job, runner }, follow, all } = args;
    if all {
        return whole_console(config, job, runner).await;
    }
    let (mut from, mut seen) = (None, 0);
    loop {
        let request = Request::Console { job: JobId(job), runner: runner.clone(), from };
        let found = match ask(config, &request).await? {
            Answer::Console { found } => found,
            other => return unexpected(&other),
        };
        match found {
            ConsoleFound::Running { rows } => {
                if rows.lost > 0 {
                    print(&format!("[{} bytes were printed too fast, and are left out]\n", rows.lost))?;
                }
                print(&rows.text)?;
                (from, seen) = (Some(rows.next), rows.rows);
            }
            ConsoleFound::Ended { text, rows } if from.is_some() => {
                print(&rest(text.as_deref().unwrap_or_default(), rows, seen))?;
                return Ok(());
            }
            ConsoleFound::Ended { text: Some(text), .. } => return Ok(print(&with_an_end(&text))?),
            ConsoleFound::Ended { text: None, .. } => bail!("show the console of job {job}: none of it is kept"),
            ConsoleFound::Dark if !follow => bail!(
                "show the console of job {job}: it has no machine yet, or the host was restarted under it; `dayfly jobs` tells"
            ),
            ConsoleFound::Dark => {}
            ConsoleFound::Unknown => return unknown(job),
            ConsoleFound::Ambiguous { runners } => return ambiguous(job, &runners),
        }
        if !follow {
            return Ok(());
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
}

/// Prints all that is kept of a console.
async fn whole_console(config: &Path, job: u64, runner: Option<String>) -> anyhow::Result<()> {
    let found = match ask(config, &Request::ConsoleLog { job: JobId(job), runner }).await? {
        Answer::Console { found } => found,
        other => return unexpected(&other),
    };
    match found {
        // Escaped when it was kept; a file may have been changed since.
        ConsoleFound::Ended { text: Some(text), .. } => {
            text.lines().try_for_each(|row| print(&format!("{}\n", printable_row(row))))?;
            Ok(())
        }
        ConsoleFound::Ambiguous { runners } => ambiguous(job, &runners),
        ConsoleFound::Unknown => unknown(job),
        _ => bail!("show the whole console of job {job}: none of it is kept on disk (`[history] console_mib`)"),
    }
}

/// A row without control characters, if somebody has put some into its file.
fn printable_row(row: &str) -> String {
    row.chars().map(|c| if c.is_control() && c != '\t' { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// What of a kept console follows the rows that were seen. `rows`: what it had ended in all.
fn rest(kept: &str, rows: u64, seen: u64) -> String {
    let ended = kept.matches('\n').count() as u64;
    let known = seen.saturating_sub(rows.saturating_sub(ended));
    // One of another machine, or of before a restart of the daemon: all of it is news.
    let known = if seen > rows { 0 } else { known };
    let rest: String = kept.split_inclusive('\n').skip(usize::try_from(known).unwrap_or(usize::MAX)).collect();
    with_an_end(&rest)
}

fn with_an_end(text: &str) -> String {
    if text.is_empty() || text.ends_with('\n') { text.to_owned() } else { format!("{text}\n") }
}

fn unknown(job: u64) -> anyhow::Result<()> {
    bail!("find job {job}: no such job is here, and none is kept of before; `dayfly jobs --ended` lists them")
}

fn ambiguous(job: u64, runners: &[String]) -> anyhow::Result<()> {
    bail!("find job {job}: runners {} each have one; say which by --runner", runners.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_follows_a_console_to_its_end_reads_each_row_once() {
        let kept = "three\nfour\nPanic";
        assert_eq!(rest(kept, 4, 3), "four\nPanic\n");
        assert_eq!(rest(kept, 4, 4), "Panic\n");
        assert_eq!(rest(kept, 4, 1), "three\nfour\nPanic\n", "a row in between is not kept any more");
        assert_eq!(rest(kept, 4, 90), "three\nfour\nPanic\n", "another machine's");
        assert_eq!(rest("", 0, 0), "");
    }
}
