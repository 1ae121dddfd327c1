//! Jobs one by one, under way and ended: their shape on the control socket, and their text for people.

use super::{Clean, JobStatusReport, age, table};
use crate::history::{End, MachineWas, Step};
use crate::telemetry::lasting;
use crate::vm::console::Rows;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write as _};
use std::time::Duration;

/// Characters of an image's digest that are shown.
const DIGEST_CHARACTERS: usize = 12;

/// All that is known of a job under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobDetail {
    /// What the status says of it.
    #[serde(flatten)]
    pub job: JobStatusReport,
    /// Machine class.
    pub class: String,
    /// Its machine; none: none was resolved yet.
    pub machine: Option<MachineWas>,
    /// What it has come to, oldest first.
    pub steps: Vec<Step>,
    /// GitLab's last word on it: `running`, `canceling`, `over`.
    pub gitlab: String,
}

/// A job that somebody asked for by its id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "found", rename_all = "snake_case")]
pub enum JobFound {
    /// It is under way.
    Running {
        /// The job.
        job: Box<JobDetail>,
    },
    /// It has ended here.
    Ended {
        /// How.
        end: Box<End>,
    },
    /// Neither is known of it.
    Unknown,
    /// Several runners have, or had, a job of this id; name one.
    Ambiguous {
        /// Their names.
        runners: Vec<String>,
    },
}

/// A job's console that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "found", rename_all = "snake_case")]
pub enum ConsoleFound {
    /// Its machine is there.
    Running {
        /// What it has printed.
        rows: Rows,
    },
    /// It has no machine yet, or what to mask is not known any more.
    Dark,
    /// It has ended here.
    Ended {
        /// The end of what it had printed, if that is kept.
        text: Option<String>,
        /// Rows that it had printed in all.
        rows: u64,
    },
    /// No such job is known.
    Unknown,
    /// Several runners have, or had, a job of this id; name one.
    Ambiguous {
        /// Their names.
        runners: Vec<String>,
    },
}

/// The jobs of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobList {
    /// Under way, oldest first.
    pub running: Vec<JobStatusReport>,
    /// Ended, newest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Vec<End>>,
}

/// How long before `now` that was, for people.
fn ago(now: Timestamp, then: Timestamp) -> String {
    format!("{} ago", lasting(between(then, now)))
}

fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

/// Why a job ended as it did, in a few words; empty: well.
#[must_use]
pub fn why(end: &End) -> String {
    let code = end.exit_code.filter(|code| *code != 0).map(|code| format!("exit code {code}"));
    let parts = [end.why.clone(), end.failure_reason.clone().filter(|_| end.why.is_none()), code];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

impl JobList {
    /// Its text.
    #[must_use]
    pub fn text(&self, now: Timestamp) -> String {
        Text(|f: &mut fmt::Formatter<'_>| self.write(f, now)).to_string()
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, now: Timestamp) -> fmt::Result {
        match &self.ended {
            None if self.running.is_empty() => writeln!(f, "no jobs; `dayfly jobs --ended` shows those of before"),
            None => jobs_table(f, &self.running),
            Some(ended) if ended.is_empty() => writeln!(f, "no ended jobs are kept"),
            Some(ended) => {
                let rows = ended.iter().map(|end| {
                    [
                        end.id.to_string(),
                        end.runner.clone(),
                        ago(now, end.ended),
                        lasting(between(end.received, end.ended)),
                        end.verdict.word().to_owned(),
                        format!("{}: {}", end.project, end.name),
                        why(end),
                    ]
                });
                table(f, ["JOB", "RUNNER", "ENDED", "TOOK", "VERDICT", "WHAT", "WHY"], rows)
            }
        }
    }
}

/// The jobs under way, as a table.
pub(super) fn jobs_table(f: &mut fmt::Formatter<'_>, jobs: &[JobStatusReport]) -> fmt::Result {
    let jobs = jobs.iter().map(|j| {
        [
            j.id.to_string(),
            j.runner.clone(),
            age(j.age_s),
            j.state.clone(),
            j.phase.clone(),
            j.vm.clone().unwrap_or_else(|| "-".into()),
            format!("{}: {}", j.project, j.name),
        ]
    });
    table(f, ["JOB", "RUNNER", "AGE", "STATE", "PHASE", "VM", "WHAT"], jobs)
}

/// What is written by a closure.
struct Text<W>(W);

impl<W: Fn(&mut fmt::Formatter<'_>) -> fmt::Result> fmt::Display for Text<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.0)(f)
    }
}

impl fmt::Display for JobDetail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let job = &self.job;
        writeln!(
            f,
            "job {} of runner `{}`, {}: {}",
            job.id,
            Clean(&job.runner),
            Clean(&job.project),
            Clean(&job.name)
        )?;
        writeln!(f, "{} for {}: {}", Clean(&job.state), age(job.age_s), Clean(&job.phase))?;
        writeln!(f, "  GitLab   says: {}", Clean(&self.gitlab))?;
        machine(f, &self.class, self.machine.as_ref())?;
        steps(f, &self.steps)
    }
}

impl End {
    /// Its text; the console comes last.
    #[must_use]
    pub fn text(&self, now: Timestamp) -> String {
        Text(|f: &mut fmt::Formatter<'_>| self.write(f, now)).to_string()
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, now: Timestamp) -> fmt::Result {
        writeln!(
            f,
            "job {} of runner `{}`, {}: {}",
            self.id,
            Clean(&self.runner),
            Clean(&self.project),
            Clean(&self.name)
        )?;
        let (took, why) = (lasting(between(self.received, self.ended)), why(self));
        let why = if why.is_empty() { why } else { format!(" ({})", Clean(&why)) };
        writeln!(f, "ended {}: {}{why}, after {took}", ago(now, self.ended), self.verdict.word())?;
        let kib = self.log_bytes.div_ceil(1024);
        writeln!(f, "  GitLab   {} {}; the log has {kib} KiB", Clean(&self.gitlab), Clean(&self.at_gitlab.words()))?;
        writeln!(f, "  came     {}", self.received.strftime("%Y-%m-%dT%H:%M:%SZ"))?;
        machine(f, &self.class, self.machine.as_ref())?;
        steps(f, &self.steps)?;
        self.cache.iter().try_for_each(|note| writeln!(f, "  {}", note.words()))?;
        if !self.reached.is_empty() {
            let refused = self.reached.iter().filter(|to| to.refused > 0).count();
            writeln!(f, "reached {} destinations, {refused} of them refused; `--json` lists them", self.reached.len())?;
        }
        match self.console.as_deref() {
            None => writeln!(f, "no console of it is kept"),
            Some("") => writeln!(f, "its console printed nothing"),
            Some(text) => {
                writeln!(f, "the end of its console ({} rows in all):", self.console_rows)?;
                // Escaped when it was kept; a file may have been changed since.
                text.lines().try_for_each(|row| writeln!(f, "  | {}", Clean(row)))
            }
        }
    }
}

fn machine(f: &mut fmt::Formatter<'_>, class: &str, machine: Option<&MachineWas>) -> fmt::Result {
    writeln!(f, "  class    {}", Clean(class))?;
    let Some(m) = machine else { return Ok(()) };
    let digest: String = m.digest.chars().take(DIGEST_CHARACTERS).collect();
    let mut text = format!(
        "{} ({digest}), {}, {} CPUs, {} MiB memory, {} GiB disk",
        m.image, m.executor, m.cpus, m.memory_mib, m.disk_gib
    );
    if let Some(vm) = &m.vm {
        write!(text, ", {vm}")?;
    }
    writeln!(f, "  machine  {}", Clean(&text))
}

fn steps(f: &mut fmt::Formatter<'_>, steps: &[Step]) -> fmt::Result {
    steps.iter().try_for_each(|step| {
        let at = Duration::from_millis(step.at_ms).as_secs_f64();
        writeln!(f, "  {at:>9.2} s  {}", Clean(&step.what))
    })
}
