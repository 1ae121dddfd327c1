//! What happens to this one job?
//!
//! One task per job ([`task`]) owns everything of it: record, spool, machine, door, uploader,
//! deadlines. It feeds events to the pure [`state`] machine, journals each new state, and carries
//! out the commands. Others reach it through its [`JobHandle`]: a bounded inbox and a view.
//!
//! ```text
//! poller, recovery ──► task ──► state      what next?
//!                       │  ├──► journal    what must survive?
//!                       │  ├──► supply     its machine
//!                       │  ├──► guest      its door
//!                       │  └──► uploader   spool and outbox to GitLab
//! ```

mod forget;
pub mod journal;
mod jobs;
pub mod keeper;
mod keeps;
mod lines;
mod machinery;
mod networks;
mod oom;
mod past;
mod resolve;
pub mod state;
mod task;
pub mod wishes;

pub use forget::forget;
pub use jobs::Jobs;
pub(crate) use jobs::Started;
pub use keeps::Keeps;
pub use networks::{network_of, weaker_network};
pub use past::Looks;
pub use resolve::Refusal;
pub use task::{accept, adopt, begin_anew, give_up, refuse_second, refuse_unread};

use crate::awake::Awake;
use crate::cache::Caches;
use crate::capacity::Held;
use crate::clock::Clock;
use crate::clones::Clones;
use crate::config;
use crate::files::Files;
use crate::gitlab::{JobPayload, JobStatus, Reach, RunnerApi, Transport};
use crate::guest;
use crate::history::{Consoles, History, MachineWas, Step};
use crate::image::store::Images;
use crate::metrics::Metrics;
use crate::network::ForwardConfig;
use crate::rng::Rng;
use crate::rules::Rule;
use crate::supply::Supply;
use jiff::Timestamp;
use journal::{JobKey, Journal};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Messages that may wait for one job.
const INBOX_MAX: usize = 64;

/// Pause before a record that the disk did not take is written again.
const REWRITE_PAUSE: Duration = Duration::from_secs(2);

/// How long the disk may refuse the record of a job's end before GitLab is told without it.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// Handles that every job needs; made once in `daemon`.
#[derive(Clone)]
pub struct Parts {
    /// The file layer.
    pub files: Arc<dyn Files>,
    /// Wall time.
    pub clock: Clock,
    /// Randomness.
    pub rng: Rng,
    /// Machines.
    pub supply: Supply,
    /// Records.
    pub journal: Journal,
    /// What is kept of jobs that have ended.
    pub history: History,
    /// Their consoles, on disk.
    pub consoles: Consoles,
    /// Base images.
    pub images: Arc<dyn Images>,
    /// What jobs leave for later ones; `None`: nothing.
    pub caches: Option<Caches>,
    /// What is here of repositories; `None`: nothing is kept.
    pub clones: Option<Clones>,
    /// Deadlines.
    pub limits: Arc<config::Limits>,
    /// Limits of doors.
    pub door_limits: guest::Limits,
    /// Counters.
    pub metrics: Metrics,
    /// The installation's machine-id, behind the system id that GitLab knows.
    pub machine_id: String,
    /// How long this process did not run.
    pub awake: Awake,
    /// How many machines of failed jobs are kept.
    pub keeps: Keeps,
    /// A drain: no machine is kept any longer.
    pub drain: CancellationToken,
    /// Hand-over: every job task lets go and ends.
    pub leave: CancellationToken,
}

/// One configured runner, ready to be used.
#[derive(Clone)]
pub struct Runner {
    /// Its configuration.
    pub config: config::Runner,
    /// Its machine class.
    pub class: config::Class,
    /// The rules that may fit its jobs, in order.
    pub rules: Arc<[Rule]>,
    /// What machines may reach beside their doors.
    pub forwards: Arc<[ForwardConfig]>,
    /// The classes that they may give.
    pub classes: Vec<config::Class>,
    /// Its GitLab.
    pub transport: Arc<dyn Transport>,
    /// Whether that answers.
    pub reach: Reach,
    /// Its token's calls.
    pub api: RunnerApi,
    /// GitLab's chain, for guests.
    pub ca_pem: Option<String>,
}

impl Runner {
    /// All images that its jobs may get, each with a class that has it: those of its own class first, and of that the
    /// image of jobs that choose none.
    pub fn images(&self) -> impl Iterator<Item = (&config::Class, &str)> {
        std::iter::once(&self.class)
            .chain(&self.classes)
            .flat_map(|class| class.all_images().map(move |name| (class, name)))
    }
}

/// What others may say to a job.
#[derive(Debug)]
pub enum JobCommand {
    /// End it, with an honest verdict: the operator's word, with what its author is told of the reason.
    Kill {
        /// The operator's own words.
        reason: Option<String>,
    },
    /// GitLab has given it out once more.
    Reassign {
        /// The newer payload.
        payload: Box<JobPayload>,
        /// What became of that.
        reply: oneshot::Sender<Reassigned>,
    },
}

/// What became of a job's second 201 (threats.md G17).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reassigned {
    /// It is the job that is under way, which speaks for it.
    UnderWay,
    /// The job of before is over at GitLab: this is another, to be begun once that one has gone.
    Another,
}

/// What others may know of a job.
#[derive(Clone, Debug)]
pub struct JobView {
    /// Whose job.
    pub key: JobKey,
    /// Name of the job, for people.
    pub name: String,
    /// Its project, likewise.
    pub project: String,
    /// Its state in one word.
    pub state: &'static str,
    /// The boot phase reached last, for people.
    pub phase: String,
    /// Its VM.
    pub vm: Option<String>,
    /// When GitLab gave it out.
    pub received: Timestamp,
    /// When the task began.
    pub since: Instant,
    /// How long after GitLab's 201 that was: more than nothing after a restart.
    pub age_before: Duration,
    /// Its machine class.
    pub class: String,
    /// Its machine, if one was resolved.
    pub machine: Option<MachineWas>,
    /// What it has come to, oldest first.
    pub steps: Vec<Step>,
    /// GitLab's last word on it.
    pub gitlab: JobStatus,
}

/// A job that is under way.
pub struct JobHandle {
    /// Whose job.
    pub key: JobKey,
    /// Its inbox.
    pub inbox: mpsc::Sender<JobCommand>,
    /// Its view.
    pub view: watch::Receiver<JobView>,
    /// The console of its machine.
    pub console: Looks,
    /// Its task, to be joined by `daemon`.
    pub task: JoinHandle<()>,
    /// Its reservation, which its task gives back.
    pub reservation: Held,
}
