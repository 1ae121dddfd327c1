//! How does GitLab answer? A strict stand-in for GitLab's runner API.
//!
//! A function from request to response ([`Standin::call`]), called directly with the clock paused
//! or served on a socket ([`serve()`]). It refuses what GitLab refuses. `exec` uses it as its
//! GitLab; tests hold dayfly against it. Nothing on the daemon's path names it.
//!
//! ```text
//! serve ──┐
//! call ───┼─► exchange ─► fault ─► routes: queue (+ payload), update, trace, artifacts, runners, git
//! transport                                   └──────── functions over model ────────┘
//! ```
//!
//! One lock around the [`Model`], never held across an await: every route reads its request whole (an
//! upload: streams it away), then changes the model in one step. Each step moves a counter that
//! [`Standin::wait_for`] watches. Time is the given [`Clock`]'s; what GitLab's periodic workers do
//! (stuck jobs) happens when somebody asks or waits.

mod answer;
mod artifacts;
mod auth;
mod exchange;
mod fault;
mod git;
mod git_smart;
mod history;
mod job;
mod misbehave;
mod model;
mod params;
mod payload;
mod project;
mod queue;
mod routes;
mod runner;
mod runner_routes;
mod serve;
mod settings;
mod spec;
mod throttle;
mod trace;
mod transport;
mod update;

#[cfg(test)]
mod tests;

pub use artifacts::ArtifactContent;
pub use exchange::Cut;
pub use fault::{Fault, Hook, Matcher};
pub use history::{History, Recorded};
pub use job::{Acknowledgement, Artifact, Chunks, Job, JobState, PendingState, TOKEN_LEEWAY, Trace, User};
pub use model::{InnerFault, Metrics, Model};
pub use payload::FAILURE_REASONS;
pub use project::{Project, ProjectId};
pub use routes::Route;
pub use runner::{LEGACY_SYSTEM_ID, Manager, Runner, RunnerId, RunnerType, manager};
pub use serve::{Served, serve};
pub use settings::{ArtifactKeep, Persist, Settings};
pub use spec::{JobSpec, Variable};

use dayfly::BoxFuture;
use dayfly::clock::Clock;
use dayfly::gitlab::{Body, JobId, OpenTransport, Transport};
use dayfly::latest::Latest;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use jiff::Timestamp;
use std::fmt;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// A strict GitLab. Clones are the same one.
#[derive(Clone)]
pub struct Standin {
    model: Arc<Mutex<Model>>,
    changes: Latest<()>,
    clock: Clock,
    /// Bytes of bodies that are being read whole, of all connections together.
    reading: Arc<AtomicUsize>,
}

/// What was waited for did not happen in time.
#[derive(Debug, thiserror::Error)]
#[error("the stand-in GitLab did not come to the expected state within {0:?}")]
pub struct TooLate(pub Duration);

impl fmt::Debug for Standin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Standin")
    }
}

impl Standin {
    /// An empty GitLab: no project, no runner.
    #[must_use]
    pub fn new(clock: Clock, rng: Rng) -> Self {
        Self { model: Arc::new(Mutex::new(Model::new(rng))), changes: Latest::new(()), clock, reading: Arc::default() }
    }

    /// One request, one response. A planned cut of the connection reads as a 502 here; use
    /// [`Standin::exchange`] or the transport to see it as one.
    #[must_use]
    pub fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> {
        let standin = self.clone();
        Box::pin(async move {
            let answer = standin.exchange(request, 0).await;
            answer.unwrap_or_else(|Cut| answer::Answer::refusal(http::StatusCode::BAD_GATEWAY, None).into_response())
        })
    }

    /// The stand-in as the daemon's way to GitLab, in the process.
    #[must_use]
    pub fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(self.clone())
    }

    /// The same one step earlier: every endpoint is this stand-in.
    #[must_use]
    pub fn opener(&self) -> Arc<dyn OpenTransport> {
        Arc::new(self.clone())
    }

    /// Its wall time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Looks at the model.
    pub fn read<T>(&self, look: impl FnOnce(&Model) -> T) -> T {
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.reap(self.clock.now());
        look(&model)
    }

    /// Changes the model in one step and wakes who waits.
    pub fn edit<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        let result = self.edit_quietly(change);
        self.changes.send(());
        result
    }

    /// The same without waking anybody.
    fn edit_quietly<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        change(&mut self.model.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the model fulfils `condition`, at most for `limit`.
    ///
    /// # Errors
    /// [`TooLate`].
    ///
    /// # Cancel safety
    /// Nothing happens but waiting.
    pub async fn wait_for(&self, condition: impl Fn(&Model) -> bool, limit: Duration) -> Result<(), TooLate> {
        let mut changes = self.changes.clone();
        let end = Instant::now() + limit;
        loop {
            changes.look(|()| {});
            let (holds, next) = {
                let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
                let next = model.reap(self.clock.now());
                (condition(&model), next)
            };
            if holds {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(TooLate(limit));
            }
            // GitLab's own workers have their times, too. A millisecond more: clocks round.
            let worker = next.map(|at| Instant::now() + model::age(self.clock.now(), at) + Duration::from_millis(1));
            let until = worker.map_or(end, |worker| worker.min(end));
            // A change is looked at before the limit counts. Both branches only wait.
            tokio::select! {
                biased;
                () = changes.changed() => {}
                () = sleep_until(until) => {}
            }
        }
    }

    /// Changes settings.
    pub fn configure(&self, change: impl FnOnce(&mut Settings)) {
        self.edit(|model| change(&mut model.settings));
    }

    /// Adds a project (`group/name`) with GitLab's defaults.
    #[must_use]
    pub fn add_project(&self, path: &str) -> ProjectId {
        self.edit(|model| model.add_project(path))
    }

    /// Adds a `glrt-` project runner of this project; see [`Model::add_runner`] for others.
    #[must_use]
    pub fn add_runner(&self, project: ProjectId) -> RunnerId {
        let now = self.now();
        self.edit(|model| model.add_runner("glrt-", &[project], now))
    }

    /// A runner's token now.
    #[must_use]
    pub fn runner_token(&self, id: RunnerId) -> Option<Secret> {
        self.read(|model| model.runners.get(&id).map(|runner| runner.token.clone()))
    }

    /// Queues a job.
    #[must_use]
    pub fn enqueue(&self, project: ProjectId, spec: JobSpec) -> JobId {
        let now = self.now();
        self.edit(|model| model.enqueue(project, spec, now))
    }

    /// Somebody cancels a job; not gracefully: at once, whatever its manager can do.
    pub fn cancel(&self, id: JobId, graceful: bool) {
        let now = self.now();
        self.edit(|model| model.cancel(id, !graceful, now));
    }

    /// Somebody erases a job: log and artifacts are gone, its token opens nothing.
    pub fn erase(&self, id: JobId) {
        self.edit(|model| {
            if let Some(job) = model.jobs.get_mut(&id) {
                job.erased = true;
                job.trace = Trace::default();
                job.artifacts.clear();
            }
        });
    }

    /// Somebody deletes a project.
    pub fn delete_project(&self, id: ProjectId) {
        self.edit(|model| {
            if let Some(project) = model.projects.get_mut(&id) {
                project.deleting = true;
            }
        });
    }

    /// A copy of a job as it is now, its log included; for large logs look with [`Standin::read`].
    #[must_use]
    pub fn job(&self, id: JobId) -> Option<Job> {
        self.read(|model| model.jobs.get(&id).cloned())
    }

    /// Plans a fault. Faults of one request come in the order in which they were planned.
    pub fn script(&self, matcher: Matcher, fault: Fault) {
        self.edit(|model| model.script.push(matcher, fault));
    }

    /// Asks `hook` about every request, before the planned faults.
    pub fn hook(&self, hook: Hook) {
        self.edit(|model| model.script.set_hook(hook));
    }

    /// Forgets all planned faults and the hook.
    pub fn behave(&self) {
        self.edit(|model| model.script.clear());
    }

    /// All requests so far that are still known.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.read(|model| model.history.iter().cloned().collect())
    }
}
