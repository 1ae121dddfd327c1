//! How are we doing? The report of a running daemon: its shape on the control socket, and its
//! text for people.
//!
//! `daemon` fills a [`StatusReport`] from the views that pollers and jobs publish; `control`
//! carries it; `dayfly status` prints it, as text or as JSON. Names and projects come from GitLab:
//! the text escapes control characters, so that none can drive the operator's terminal.

mod caches;
mod jobs;

pub use caches::{CachesText, EntriesText};
pub use jobs::{ConsoleFound, JobDetail, JobFound, JobList, why};

use crate::BoxFuture;
use crate::gitlab::JobId;
use crate::history::End;
use crate::metrics::Form;
use crate::telemetry::lasting;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Who can say how the daemon stands: what anybody who may look is served from. Never blocks a thread.
pub trait Reports: Send + Sync + 'static {
    /// The report of this moment.
    fn status(&self) -> StatusReport;
    /// The metrics of this moment.
    fn metrics(&self, form: Form) -> String;
    /// The jobs that have ended here, newest first, without their consoles.
    fn ended(&self, jobs_max: usize) -> Vec<End>;
    /// One job, under way or ended, of this runner entry or whichever has one. May wait for a disk.
    fn job<'a>(&'a self, id: JobId, runner: Option<&'a str>) -> BoxFuture<'a, JobFound>;
    /// Its console, of a job under way from where so many bytes were printed, or its end. Likewise.
    fn console<'a>(&'a self, id: JobId, runner: Option<&'a str>, from: Option<u64>) -> BoxFuture<'a, ConsoleFound>;
    /// All that is kept of its console on disk, of a job under way too. Likewise.
    fn console_log<'a>(&'a self, id: JobId, runner: Option<&'a str>) -> BoxFuture<'a, ConsoleFound>;
}

/// A daemon, as it stands at one moment. New members may come; none goes away within a version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The process.
    pub daemon: DaemonStatus,
    /// What is promised of the host.
    pub capacity: CapacityStatus,
    /// The runners, in the order of the configuration.
    pub runners: Vec<RunnerStatus>,
    /// The jobs, oldest first.
    pub jobs: Vec<JobStatusReport>,
    /// The images of the runners' classes.
    #[serde(default)]
    pub images: Vec<ImageStatus>,
    /// The frozen machines from which jobs' machines are restored.
    #[serde(default)]
    pub goldens: Vec<GoldenStatus>,
}

/// A frozen machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenStatus {
    /// Its image.
    pub image: String,
    /// The runner entry whose jobs it is for.
    pub runner: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Seconds since it was made.
    pub age_s: u64,
}

/// A base image that a class uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Its name.
    pub name: String,
    /// Seconds since its files are what they are.
    pub age_s: u64,
}

/// The process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Since when it runs, RFC 3339.
    pub since: String,
    /// It takes no more jobs and ends after the last one.
    pub draining: bool,
    /// What an operator should look at, a sentence each; empty: all is well.
    pub problems: Vec<String>,
}

/// What is promised of the host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CapacityStatus {
    /// Jobs that hold a reservation. What polls hold while GitLab is asked is not in these numbers.
    pub jobs: u32,
    /// Polls under way, each with room for the job that it may bring.
    #[serde(default)]
    pub asking: u32,
    /// `concurrent` of the configuration.
    pub jobs_max: u32,
    /// Virtual CPUs promised.
    pub cpus: u32,
    /// Bound; `None`: `jobs_max` alone.
    pub cpus_max: Option<u32>,
    /// Memory promised, MiB.
    pub memory_mib: u64,
    /// Bound, MiB.
    pub memory_mib_max: u64,
    /// Disk promised, GiB.
    pub disk_gib: u64,
    /// Bound, GiB: what is free, less the reserve.
    pub disk_gib_max: u64,
}

/// One `[[runner]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunnerStatus {
    /// Its name.
    pub name: String,
    /// Its GitLab.
    pub url: String,
    /// Its machine class.
    pub class: String,
    /// What its poller does.
    pub state: RunnerState,
    /// Seconds since GitLab last answered, whatever was asked; `None`: not yet.
    pub answered_s: Option<u64>,
    /// Why its GitLab does not answer now, and for how long; `None`: it does.
    #[serde(default)]
    pub outage: Option<String>,
    /// Its jobs here.
    pub jobs: u32,
}

/// What a poller does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum RunnerState {
    /// It asks GitLab for jobs.
    Polling,
    /// It does not ask, for there is no room; what is missing.
    WaitingForRoom {
        /// `2 CPUs`, `the runner's limit of 3 jobs`…
        missing: String,
    },
    /// GitLab does not answer, or says later.
    Retrying {
        /// The error, with its causes.
        error: String,
        /// Seconds to the next try.
        in_s: u64,
    },
    /// GitLab refuses the token; a human must look.
    Refused {
        /// The error, with its causes.
        error: String,
    },
    /// It cannot take jobs: no image, no virtualisation…
    Blocked {
        /// Why.
        reason: String,
    },
    /// It takes no more jobs.
    Stopped,
}

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobStatusReport {
    /// Runner entry that took it.
    pub runner: String,
    /// Its id at that runner's GitLab.
    pub id: JobId,
    /// Path of its project.
    pub project: String,
    /// Its name in `.gitlab-ci.yml`.
    pub name: String,
    /// State of the job, as in the logs: `accepted`, `booting`, `running`, `releasing`.
    pub state: String,
    /// What it is about right now: the boot's phase, what the uploader still owes.
    pub phase: String,
    /// Its VM, if one may exist, by the hypervisor's name for it.
    pub vm: Option<String>,
    /// Seconds since GitLab's 201, before a restart of the daemon too.
    pub age_s: u64,
}

impl fmt::Display for StatusReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let daemon = &self.daemon;
        let draining = if daemon.draining { ", draining" } else { "" };
        writeln!(
            f,
            "dayfly {}, process {}, since {}{draining}",
            Clean(&daemon.version),
            daemon.pid,
            Clean(&daemon.since)
        )?;
        for problem in &daemon.problems {
            writeln!(f, "problem: {}", Clean(problem))?;
        }
        let c = &self.capacity;
        let cpus_max = c.cpus_max.map_or(String::new(), |max| format!(" of {max}"));
        writeln!(
            f,
            "promised: {} of {} jobs, {}{cpus_max} CPUs, {} of {} MiB memory, {} of {} GiB disk",
            c.jobs, c.jobs_max, c.cpus, c.memory_mib, c.memory_mib_max, c.disk_gib, c.disk_gib_max
        )?;
        writeln!(f)?;
        let runners = self.runners.iter().map(|r| {
            let answered = r.answered_s.map_or("never".into(), |s| format!("{} ago", age(s)));
            [r.name.clone(), r.url.clone(), r.class.clone(), r.jobs.to_string(), answered, r.state.to_string()]
        });
        table(f, ["RUNNER", "GITLAB", "CLASS", "JOBS", "ANSWERED", "STATE"], runners)?;
        writeln!(f)?;
        if !self.goldens.is_empty() {
            let goldens = self.goldens.iter().map(|g| {
                [g.image.clone(), g.runner.clone(), format!("{} MiB", g.bytes >> 20), format!("{} ago", age(g.age_s))]
            });
            table(f, ["FROZEN", "FOR RUNNER", "SIZE", "MADE"], goldens)?;
            writeln!(f)?;
        }
        if self.jobs.is_empty() {
            return writeln!(f, "no jobs");
        }
        jobs::jobs_table(f, &self.jobs)
    }
}

impl fmt::Display for RunnerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Polling => f.write_str("polling"),
            Self::WaitingForRoom { missing } => write!(f, "waiting for room: {missing}"),
            Self::Retrying { error, in_s: 0 } => write!(f, "trying again: {error}"),
            Self::Retrying { error, in_s } => write!(f, "trying again in {in_s} s: {error}"),
            Self::Refused { error } => write!(f, "refused: {error}"),
            Self::Blocked { reason } => write!(f, "blocked: {reason}"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// A text of somebody else's, for a terminal.
struct Clean<'a>(&'a str);

impl fmt::Display for Clean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::telemetry::printable(self.0).fmt(f)
    }
}

fn age(seconds: u64) -> String {
    lasting(Duration::from_secs(seconds))
}

/// Columns as wide as their widest cell; the last one is not padded.
fn table<const N: usize>(
    f: &mut fmt::Formatter<'_>,
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> fmt::Result {
    let rows: Vec<[String; N]> = rows.map(|row| row.map(|cell| crate::telemetry::printable(&cell))).collect();
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).chain([head[i].len()]).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for row in std::iter::once(&head.map(str::to_owned)).chain(&rows) {
        for (i, cell) in row.iter().enumerate() {
            if i + 1 == N {
                writeln!(f, "{cell}")?;
            } else {
                write!(f, "{cell:<width$}  ", width = widths[i])?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> StatusReport {
        StatusReport {
            daemon: DaemonStatus {
                version: "0.1.0".into(),
                pid: 7,
                since: "2026-01-02T03:04:05Z".into(),
                draining: true,
                problems: vec!["libvirt does not answer".into()],
            },
            capacity: CapacityStatus {
                jobs: 1,
                asking: 0,
                jobs_max: 4,
                cpus: 2,
                cpus_max: Some(8),
                memory_mib: 2048,
                memory_mib_max: 15_000,
                disk_gib: 20,
                disk_gib_max: 400,
            },
            runners: vec![
                RunnerStatus {
                    name: "ci".into(),
                    url: "https://gitlab.example.com/".into(),
                    class: "small".into(),
                    state: RunnerState::Polling,
                    answered_s: Some(3),
                    outage: None,
                    jobs: 1,
                },
                RunnerStatus {
                    name: "other".into(),
                    url: "https://git.example.org/".into(),
                    class: "large".into(),
                    state: RunnerState::WaitingForRoom { missing: "4 CPUs".into() },
                    answered_s: None,
                    outage: None,
                    jobs: 0,
                },
            ],
            jobs: vec![JobStatusReport {
                runner: "ci".into(),
                id: JobId(42),
                project: "group/app".into(),
                name: "test\u{1b}[2J\nforged".into(),
                state: "running".into(),
                phase: "trace 4 KiB".into(),
                vm: Some("df-abcdefghijklmnop".into()),
                age_s: 7_500,
            }],
            images: vec![ImageStatus { name: "debian".into(), age_s: 90_000 }],
            goldens: vec![GoldenStatus { image: "debian".into(), runner: "ci".into(), bytes: 300 << 20, age_s: 60 }],
        }
    }

    #[test]
    fn the_text_has_one_line_for_each_thing() {
        let text = report().to_string();
        let expected = "\
dayfly 0.1.0, process 7, since 2026-01-02T03:04:05Z, draining
problem: libvirt does not answer
promised: 1 of 4 jobs, 2 of 8 CPUs, 2048 of 15000 MiB memory, 20 of 400 GiB disk

RUNNER  GITLAB                       CLASS  JOBS  ANSWERED  STATE
ci      https://gitlab.example.com/  small  1     3 s ago   polling
other   https://git.example.org/     large  0     never     waiting for room: 4 CPUs

FROZEN  FOR RUNNER  SIZE     MADE
debian  ci          300 MiB  1 min ago

JOB  RUNNER  AGE        STATE    PHASE        VM                   WHAT
42   ci      2 h 5 min  running  trace 4 KiB  df-abcdefghijklmnop  group/app: test\\u{1b}[2J\\nforged
";
        assert_eq!(text, expected);
    }

    #[test]
    fn an_idle_daemon_says_that_there_are_no_jobs() {
        assert!(StatusReport::default().to_string().ends_with("no jobs\n"));
    }

    #[test]
    fn json_reads_back() {
        let json = serde_json::to_string(&report()).unwrap();
        assert!(json.contains(r#""state":{"is":"waiting_for_room","missing":"4 CPUs"}"#), "{json}");
        assert_eq!(serde_json::from_str::<StatusReport>(&json).unwrap(), report());
    }
}
