//! May we ask GitLab for a job now? One task per configured runner.
//!
//! Room first: a [`Reservation`] and free disk, then the question
//! (decision D3). A poll under way is never cut, because GitLab may assign a job before the answer
//! is read; only at a hand-over it is closed after [`HAND_OVER_POLL_PATIENCE`], when GitLab has
//! held it so long that its answer is no job (decision D11). A job goes to the journal before
//! anything else happens, then to `daemon`.

use crate::capacity::{Capacity, Reservation, Resources, Wants};
use crate::failpoint::{Point, reached};
use crate::gitlab::{GitlabError, JobId, JobPayload, Poll, RunnerInfo, Verified};
use crate::job::Jobs;
use crate::job::journal::JobKey;
use crate::job::{self, GivenAgain, Parts, Refusal, Runner};
use crate::planted::{self, Bug};
use crate::retry::Backoff;
use crate::secret::Secret;
use crate::status::RunnerState;
use crate::telemetry::chain;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a poll that is under way is awaited at a hand-over (threats.md G13), or when all jobs are
/// ended: of the 5 s that a hand-over may take (E1), all but what the end itself needs.
const HAND_OVER_POLL_PATIENCE: Duration = Duration::from_millis(4000);

/// Pause after GitLab refused the token (threats.md G4): nothing but an operator helps.
const REFUSED_PAUSE: Duration = Duration::from_secs(300);

/// Pause while something on this host is missing: an image, disk.
const BLOCKED_PAUSE: Duration = Duration::from_secs(10);

/// How often a host that loses one machine after the other is tried with a job (threats.md V1).
const RETRY_PAUSE: Duration = Duration::from_secs(60);

/// How long a job that GitLab gave out anew waits for its forerunner's machine to go (at most the
/// grace of a cancel, and its destruction); meanwhile nothing of it is written down.
const GIVEN_AGAIN_PATIENCE: Duration = Duration::from_secs(90);

/// A poll that GitLab held at least this long was a long poll: the queue moved, or its time ran
/// out. Either way the next one may go out at once.
const HELD: Duration = Duration::from_secs(1);

/// Pause after such a poll.
const HELD_PAUSE: Duration = Duration::from_millis(200);

/// What a poller is told and tells.
pub struct Poller {
    /// Handles for jobs.
    pub parts: Parts,
    /// Its runner.
    pub runner: Arc<Runner>,
    /// The host's room.
    pub capacity: Capacity,
    /// What one job of this runner takes.
    pub resources: Resources,
    /// Jobs at once of this runner.
    pub limit: u32,
    /// Disk that must be free where the spools are, and below which nothing is asked.
    pub disk: (PathBuf, u64),
    /// Where new jobs go.
    pub jobs: Jobs,
    /// What it does, for the status.
    pub state: watch::Sender<PollerView>,
    /// No further polls.
    pub stop: CancellationToken,
    /// A poll under way is closed soon.
    pub close: CancellationToken,
}

/// What others may know of a poller.
#[derive(Clone, Debug)]
pub struct PollerView {
    /// What it does.
    pub state: RunnerState,
    /// When GitLab last answered.
    pub answered: Option<Instant>,
}

impl Poller {
    /// Polls until `stop`.
    pub async fn run(self) {
        let mut last_update = None;
        let mut backoff = Backoff::poll();
        let mut conflicts = 0_u32;
        let mut verified = false;
        let mut tried = None;
        let mut never_fits = false;
        // Jobs that cannot be begun; what is left at the end is given up with this set.
        let mut refusals = JoinSet::new();
        loop {
            while refusals.try_join_next().is_some() {}
            let Some(info) = self.info().await else { break };
            if !verified {
                match self.verify(&info).await {
                    None => break,
                    Some(Ok(_)) => verified = true,
                    // Waits like a poll: it was a call to GitLab as well.
                    Some(Err(error)) => {
                        let pause = self.trouble(&error, &mut backoff, 0);
                        if self.pause(pause).await { continue } else { break }
                    }
                }
            }
            self.say(RunnerState::WaitingForRoom { missing: "room for one more job".into() });
            self.wants(Wants::Room);
            let reservation = tokio::select! {
                biased;
                // Both are cancel safe.
                () = self.stop.cancelled() => break,
                reserved = self.capacity.reserve(&self.runner.config.name, self.limit, self.resources) => match reserved {
                    Ok(reservation) => reservation,
                    Err(error) => {
                        if !std::mem::replace(&mut never_fits, true) {
                            tracing::error!(runner = self.runner.config.name, error = chain(&error), "this runner can never take a job here");
                        }
                        self.say(RunnerState::Blocked { reason: error.to_string() });
                        self.wants(Wants::Nothing);
                        // Disk may be freed.
                        if self.pause(BLOCKED_PAUSE).await { continue } else { break }
                    }
                },
            };
            if let Some(reason) = self.host_is_unfit(&mut tried).await {
                drop(reservation);
                self.say(RunnerState::Blocked { reason });
                self.wants(Wants::Nothing);
                if self.pause(BLOCKED_PAUSE).await { continue } else { break }
            }
            self.say(RunnerState::Polling);
            self.wants(Wants::Answer);
            never_fits = false;
            // GitLab holds a question that says what it knew last. With another runner in want of this
            // room that would keep it from asking.
            let known = if self.capacity.leaves_room(&self.runner.config.name) { last_update.clone() } else { None };
            reached(Point::K0);
            let asked = Instant::now();
            let Some(answer) = self.ask(&info, known.as_deref()).await else { break };
            self.wants(Wants::Room);
            if !matches!(answer, Err(GitlabError::Unavailable { .. })) {
                self.state.send_modify(|view| view.answered = Some(Instant::now()));
            }
            if let Err(GitlabError::UnreadableJob { job: Some(job), .. }) = &answer {
                let (id, token) = job.as_ref().clone();
                let key = JobKey { runner: self.runner.config.name.clone(), id };
                if self.jobs.contains(&key) {
                    // Given out a second time (threats.md G17): what of it runs here is not to be failed.
                    tracing::warn!(%key, "GitLab assigned a job again that is under way here, unreadably");
                } else {
                    self.refuse(&mut refusals, id, token, Refusal::Unreadable);
                }
            }
            let pause = match answer {
                Ok(Poll::Job(payload)) => {
                    (backoff, conflicts) = (Backoff::poll(), 0);
                    // Only a job tries the host; a poll without one says nothing of it.
                    tried = tried.map(|_| Instant::now());
                    self.take(*payload, reservation, &mut refusals).await;
                    Duration::ZERO
                }
                Ok(Poll::Nothing { last_update: newer }) => {
                    drop(reservation);
                    (backoff, conflicts) = (Backoff::poll(), 0);
                    last_update = newer.or(last_update);
                    let interval = self.runner.config.poll_interval.get();
                    let interval = if planted::on(Bug::RetryStorm) { interval / 100 } else { interval };
                    if asked.elapsed() >= HELD { HELD_PAUSE } else { interval }
                }
                Err(error) => {
                    drop(reservation);
                    conflicts = if matches!(error, GitlabError::Conflict) { conflicts + 1 } else { 0 };
                    self.trouble(&error, &mut backoff, conflicts)
                }
            };
            if !self.pause(pause).await {
                break;
            }
        }
        self.wants(Wants::Nothing);
        self.say(RunnerState::Stopped);
    }

    fn wants(&self, wants: Wants) {
        self.capacity.want(&self.runner.config.name, self.limit, self.resources, wants);
    }

    fn say(&self, state: RunnerState) {
        let unwell = |state: &RunnerState| matches!(state, RunnerState::Blocked { .. } | RunnerState::Refused { .. });
        let gauge = &self.parts.metrics.job().runners_unwell;
        self.state.send_modify(|view| {
            gauge.inc_by(i64::from(unwell(&state)) - i64::from(unwell(&view.state)));
            view.state = state;
        });
    }

    /// Sleeps, unless stopped. `false`: stopped.
    async fn pause(&self, pause: Duration) -> bool {
        tokio::select! {
            biased;
            // Both are cancel safe.
            () = self.stop.cancelled() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }

    /// What the image's runner says of itself: without it GitLab would fail jobs (decision D10).
    /// Waits for an image that is missing. `None`: stopped.
    async fn info(&self) -> Option<RunnerInfo> {
        let class = &self.runner.class;
        let mut said = false;
        loop {
            let reason = match self.parts.images.load(&class.image).await {
                Ok(image) if image.manifest.is_standin() && !class.allow_standin_runner => format!(
                    "image `{}` holds dayfly's stand-in runner; build it with the official gitlab-runner, or set `allow_standin_runner = true` in class `{}` for a trial",
                    class.image, class.name
                ),
                Ok(image) => match (image.manifest.unspoken(), image.manifest.runner_info()) {
                    (Some(reason), _) => reason,
                    (None, Some(info)) => return Some(info),
                    (None, None) => {
                        format!("image `{0}` was never boot-tested; run `dayfly image test {0}`", class.image)
                    }
                },
                Err(error) => chain(&error),
            };
            self.wants(Wants::Nothing);
            if !std::mem::replace(&mut said, true) {
                tracing::error!(runner = self.runner.config.name, reason, "no job is asked for");
            }
            self.say(RunnerState::Blocked { reason });
            if !self.pause(BLOCKED_PAUSE).await {
                return None;
            }
        }
    }

    /// Tells GitLab this runner manager's features before the first poll: it stores them from the
    /// first call and would else kill jobs without their `after_script` for the next 40 minutes.
    /// `None`: stopped.
    async fn verify(&self, info: &RunnerInfo) -> Option<Result<Verified, GitlabError>> {
        tokio::select! {
            biased;
            // Nothing is assigned by this call, so it may be cut.
            () = self.stop.cancelled() => None,
            verified = self.runner.api.verify(Some(info)) => Some(verified),
        }
    }

    /// Tells GitLab in the background that a job of it cannot be begun.
    fn refuse(&self, refusals: &mut JoinSet<()>, id: JobId, token: Secret, why: Refusal) {
        let (parts, runner) = (self.parts.clone(), self.runner.clone());
        refusals.spawn(async move {
            job::refuse(&parts, &runner, id, token, why).await;
            if why == Refusal::NotKept {
                // What the disk did take of it.
                job::forget(&parts, &JobKey { runner: runner.config.name.clone(), id }).await;
            }
        });
    }

    /// Whether a job would have a chance here: disk, a hypervisor that answers, and machines that come
    /// up and live. A host that loses every machine must not empty the project's queue; one job every
    /// [`RETRY_PAUSE`] since one was `tried` last finds out whether it is well again.
    async fn host_is_unfit(&self, tried: &mut Option<Instant>) -> Option<String> {
        if let Some(reason) = self.disk_is_short().await {
            return Some(reason);
        }
        if let Err(error) = self.parts.journal.look_well().await {
            return Some(format!(
                "the journal cannot be written, so no job can be taken: {}; look at that disk and at the kernel's log",
                chain(&error)
            ));
        }
        let supply = &self.parts.supply;
        if let Err(error) = supply.hypervisor().list(&supply.place().installation).await {
            return Some(chain(&error));
        }
        let Some(reason) = supply.unfit() else {
            *tried = None;
            return None;
        };
        (tried.get_or_insert_with(Instant::now).elapsed() < RETRY_PAUSE).then_some(reason)
    }

    /// One poll. `None`: stopped, and the poll was closed.
    async fn ask(&self, info: &RunnerInfo, last_update: Option<&str>) -> Option<Result<Poll, GitlabError>> {
        let mut poll = std::pin::pin!(self.runner.api.request_job(info, last_update));
        tokio::select! {
            biased;
            // The poll first: an answer that is there is taken. It is not dropped here, but polled on.
            answer = &mut poll => return Some(answer),
            () = self.close.cancelled() => {}
        }
        tokio::time::timeout(HAND_OVER_POLL_PATIENCE, poll).await.ok()
    }

    async fn disk_is_short(&self) -> Option<String> {
        let (path, reserve) = &self.disk;
        match self.parts.files.free_bytes(path).await {
            Ok(free) if free >= *reserve => None,
            Ok(free) => {
                Some(format!("{} MiB are free at `{}`, {} MiB must be", free >> 20, path.display(), reserve >> 20))
            }
            Err(error) => Some(format!("free disk of `{}` is not known: {error}", path.display())),
        }
    }

    /// Journals the job and starts it.
    async fn take(&self, payload: JobPayload, reservation: Reservation, refusals: &mut JoinSet<()>) {
        let key = JobKey { runner: self.runner.config.name.clone(), id: payload.id };
        tracing::info!(%key, project = payload.project, name = payload.name, "GitLab assigned a job");
        self.parts.metrics.job().assigned.inc();
        if planted::on(Bug::JobTokenInLog) {
            tracing::info!(%key, token = payload.token.expose(), "the job's token");
        }
        let taking = Taking { parts: self.parts.clone(), runner: self.runner.clone(), jobs: self.jobs.clone(), key };
        match self.jobs.give_again(&taking.key, &payload) {
            None => {
                if let Some((id, token)) = taking.begin(payload, reservation).await {
                    self.refuse(refusals, id, token, Refusal::NotKept);
                }
            }
            Some(answer) => {
                self.parts.metrics.job().assigned_again.inc();
                refusals.spawn(async move { taking.again(payload, reservation, answer).await });
            }
        }
    }

    fn trouble(&self, error: &GitlabError, backoff: &mut Backoff, conflicts: u32) -> Duration {
        let runner = &self.runner.config.name;
        match error {
            GitlabError::Forbidden { .. } => {
                tracing::error!(runner, error = chain(error), "GitLab refuses this runner");
                self.wants(Wants::Nothing);
                self.say(RunnerState::Refused { error: chain(error) });
                REFUSED_PAUSE
            }
            // The queue changed under the question: ask again at once, but only once.
            GitlabError::Conflict if conflicts == 1 => Duration::ZERO,
            GitlabError::Conflict => self.runner.config.poll_interval.get(),
            GitlabError::UnreadableJob { .. } => {
                tracing::error!(runner, error = chain(error), "GitLab assigned a job that cannot be read");
                self.parts.metrics.job().unreadable.inc();
                self.runner.config.poll_interval.get()
            }
            error => {
                let pause = backoff.next_told(&self.parts.rng, error.retry_after());
                let remedy = error.explain();
                tracing::warn!(
                    runner,
                    error = chain(error),
                    remedy,
                    pause_s = pause.as_secs_f64(),
                    "GitLab gave no answer to a poll"
                );
                let error = remedy.map_or_else(|| chain(error), |remedy| format!("{}; {remedy}", chain(error)));
                self.say(RunnerState::Retrying { error, in_s: pause.as_secs() });
                pause
            }
        }
    }
}

/// A job on its way from GitLab's 201 to its task.
struct Taking {
    parts: Parts,
    runner: Arc<Runner>,
    jobs: Jobs,
    key: JobKey,
}

impl Taking {
    /// Journals the job and starts it. What comes back must be refused.
    async fn begin(&self, payload: JobPayload, reservation: Reservation) -> Option<(JobId, Secret)> {
        let (parts, key) = (&self.parts, &self.key);
        let (id, token, read_at) = (payload.id, payload.token.clone(), payload.read_at);
        match job::accept(parts, self.runner.clone(), payload, reservation).await {
            Ok(handle) => {
                let window = read_at.elapsed();
                parts.metrics.job().journal.observe(window.as_secs_f64());
                tracing::info!(%key, journal_ms = window.as_secs_f64() * 1000.0, "the job is in the journal");
                self.jobs.add(handle);
                None
            }
            Err(error) => {
                tracing::error!(%key, error = chain(&error), "write an assigned job down; it is not started");
                parts.metrics.job().lost.inc();
                if let Err(error) = parts.journal.remove(key).await {
                    tracing::error!(%key, error = chain(&error), "remove what was written of it");
                }
                Some((id, token))
            }
        }
    }

    /// GitLab gave out a job that is under way here: that job says what becomes of it.
    async fn again(self, payload: JobPayload, reservation: Reservation, answer: oneshot::Receiver<GivenAgain>) {
        let key = &self.key;
        match answer.await {
            Ok(GivenAgain::UnderWay) => return,
            Err(_) if self.parts.leave.is_cancelled() => {
                tracing::warn!(%key, "GitLab assigned a job again during a hand-over; it goes on as it is");
                return;
            }
            // No answer: it has ended just now.
            Ok(GivenAgain::Another) | Err(_) => {}
        }
        let (id, token) = (payload.id, payload.token.clone());
        let gone = tokio::time::timeout(GIVEN_AGAIN_PATIENCE, self.jobs.gone(key)).await;
        let refused = match gone {
            Ok(()) => self.begin(payload, reservation).await.map(|_| Refusal::NotKept),
            Err(_) => Some(Refusal::GivenTwice),
        };
        if let Some(why) = refused {
            job::refuse(&self.parts, &self.runner, id, token, why).await;
        }
    }
}
