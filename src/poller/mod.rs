//! May we ask GitLab for a job now? One task per configured runner.
//!
//! What comes next, and after which rest, is [`policy`]'s to say. Room first: a [`Reservation`] and free
//! disk, then the question (decision D3). A poll under way is never cut, because GitLab may assign a job before the answer
//! is read; only at a hand-over it is closed after [`HAND_OVER_POLL_PATIENCE`], when GitLab has
//! held it so long that its answer is no job (decision D11). A job goes to the journal before
//! anything else happens, then to `daemon`.

mod policy;
mod trouble;

use self::policy::{Host, Policy, Seen, Step, Why};
use self::trouble::{Cause, Trouble};
use crate::capacity::{Capacity, NeverFits, Reservation, Resources, Wants};
use crate::failpoint::{Point, reached};
use crate::gitlab::{GitlabError, JobId, JobPayload, Poll, RunnerInfo, RunnerToken};
use crate::image::alike;
use crate::image::store::Image;
use crate::job::Jobs;
use crate::job::journal::JobKey;
use crate::job::{self, Parts, Reassigned, Runner};
use crate::metrics::Phase;
use crate::secret::Secret;
use crate::status::RunnerState;
use crate::telemetry::{chain, lasting};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::PathBuf;
use std::sync::Arc;
use std::task;
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a poll that is under way is awaited at a hand-over (threats.md G13), or when all jobs are
/// ended: of the 5 s that a hand-over may take (E1), all but what the end itself needs.
const HAND_OVER_POLL_PATIENCE: Duration = Duration::from_millis(4000);

/// How long a job that GitLab gave out anew waits for its forerunner's machine to go (at most the
/// grace of a cancel, and its destruction); meanwhile nothing of it is written down.
const GIVEN_AGAIN_PATIENCE: Duration = Duration::from_secs(90);

/// Why a poller does not ask while the host is full, in a word of [`crate::metrics::BLOCKED_BY`].
const ROOM: &str = "room";

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
    /// Why it does not ask, in a word of [`crate::metrics::BLOCKED_BY`].
    pub blocked: Option<&'static str>,
    /// Since when that is so.
    pub since: Instant,
    /// When the images of its jobs were made, by name, as far as that is known.
    pub images_made: BTreeMap<String, SystemTime>,
    /// Why its jobs' network is weaker than it could be, for operators.
    pub weaker_network: Option<String>,
}

impl PollerView {
    /// One that begins.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            state: RunnerState::Polling,
            blocked: None,
            since: Instant::now(),
            images_made: BTreeMap::new(),
            weaker_network: None,
        }
    }
}

impl Poller {
    /// Polls until `stop`.
    pub async fn run(self) {
        let mut policy = Policy::new(self.runner.config.poll_interval.get());
        // Jobs that were given out again, and wait for those of before; what is left at the end is given up with this set.
        let mut again = JoinSet::new();
        let mut info = None;
        let mut trouble = Trouble::default();
        let mut seen = Seen::Rested;
        loop {
            while again.try_join_next().is_some() {}
            let next = match policy.on(seen, Instant::now(), &self.parts.rng) {
                Step::LookAtImage => Some(match self.images().await {
                    Ok(found) => {
                        info = Some(found);
                        Seen::Image
                    }
                    Err(reason) => Seen::NoImage(reason),
                }),
                Step::Verify => self.verify(info.as_ref()).await,
                Step::Reserve => self.reserve().await,
                Step::LookAtHost(room) => {
                    let host = self.host().await;
                    Some(Seen::Host { room, host, shared: !self.capacity.leaves_room(&self.runner.config.name) })
                }
                Step::Ask(room, known) => match &info {
                    Some(info) => self.ask(info, room, known.as_deref(), &mut again).await,
                    // Not without an image, and that comes first.
                    None => Some(Seen::Rested),
                },
                Step::Rest(rest, why) => {
                    self.tell(rest, &why, &mut trouble);
                    let rested = self.rest(rest).await;
                    if matches!(why, Why::Refused(_)) && self.read_token().await {
                        policy.verify_again();
                    }
                    rested.then_some(Seen::Rested)
                }
            };
            match next {
                Some(next) => seen = next,
                None => break,
            }
        }
        self.wants(Wants::Nothing);
        self.say(RunnerState::Stopped, None);
    }

    fn wants(&self, wants: Wants) {
        self.capacity.want(&self.runner.config.name, self.limit, self.resources, wants);
    }

    fn say(&self, state: RunnerState, blocked: Option<&'static str>) {
        let unwell = |state: &RunnerState| matches!(state, RunnerState::Blocked { .. } | RunnerState::Refused { .. });
        let gauge = &self.parts.metrics.job().runners_unwell;
        self.state.send_modify(|view| {
            gauge.inc_by(i64::from(unwell(&state)) - i64::from(unwell(&view.state)));
            if view.blocked != blocked {
                view.since = Instant::now();
            }
            (view.state, view.blocked) = (state, blocked);
        });
    }

    /// Sleeps, unless stopped. `false`: stopped.
    async fn rest(&self, rest: Duration) -> bool {
        tokio::select! {
            biased;
            // Both are cancel safe.
            () = self.stop.cancelled() => false,
            () = tokio::time::sleep(rest) => true,
        }
    }

    /// Tells log and status why nothing is asked for a while. The log hears of it when it comes and when it has gone.
    fn tell(&self, rest: Duration, why: &Why, trouble: &mut Trouble) {
        let (runner, now) = (&self.runner.config.name, Instant::now());
        match why {
            Why::Answered => {
                if let Some(lasted) = trouble.is_over(now) {
                    tracing::info!(runner, "this runner asks for jobs again, after {}", lasting(lasted));
                }
            }
            Why::Blocked(cause, reason) => {
                if trouble.is(*cause, now) {
                    let what = match cause {
                        Cause::TooLarge => "this runner can never take a job here",
                        _ => "no job is asked for",
                    };
                    tracing::error!(runner, reason, "{what}");
                }
                self.wants(Wants::Nothing);
                self.say(RunnerState::Blocked { reason: reason.clone() }, Some(cause.word()));
            }
            Why::Refused(error) => {
                if trouble.is(Cause::Refused, now) {
                    tracing::error!(runner, error = chain(error), "GitLab refuses this runner");
                }
                self.wants(Wants::Nothing);
                self.say(RunnerState::Refused { error: chain(error) }, Some(Cause::Refused.word()));
            }
            // Each is a job that GitLab counts as ours.
            Why::Unreadable(error) => {
                tracing::error!(runner, error = chain(error), "GitLab assigned a job that cannot be read");
            }
            Why::NoAnswer(error) => {
                let (error, remedy) = (chain(error), error.explain());
                tracing::debug!(runner, error, pause_s = rest.as_secs_f64(), "GitLab gave no answer to a poll");
                let error = remedy.map_or_else(|| error.clone(), |remedy| format!("{error}; {remedy}"));
                // An outage is told by whoever watches the connection, which others use, too.
                if self.runner.reach.outage().is_none() && trouble.is(Cause::Gitlab, now) {
                    tracing::warn!(runner, error, "GitLab gives no answer that makes sense to a poll");
                }
                self.say(RunnerState::Retrying { error, in_s: rest.as_secs() }, Some(Cause::Gitlab.word()));
            }
        }
    }

    /// What the runners in its jobs' images say of themselves: without it GitLab would fail jobs (decision D10). Or why
    /// one of these images cannot be used.
    async fn images(&self) -> Result<RunnerInfo, String> {
        let mut images: Vec<Image> = Vec::new();
        let mut weaker = None;
        for (class, name) in self.runner.images() {
            let image = self.parts.images.load(name).await.map_err(|error| chain(&error))?;
            if image.manifest.is_standin() && !class.allow_standin_runner {
                return Err(format!(
                    "image `{name}` holds dayfly's stand-in runner; build it with the official gitlab-runner, or set `allow_standin_runner = true` in class `{}` for a trial",
                    class.name
                ));
            }
            if let Some(reason) = image.manifest.unspoken() {
                return Err(reason);
            }
            job::network_of(class, &image).map_err(|error| chain(&error))?;
            weaker = weaker.or_else(|| job::weaker_network(class, &image));
            images.push(image);
        }
        let made = |image: &Image| Some((image.name.clone(), image.stamp.made()?));
        let made: BTreeMap<String, SystemTime> = images.iter().filter_map(made).collect();
        self.state.send_if_modified(|view| {
            if view.weaker_network == weaker && view.images_made == made {
                return false;
            }
            if let Some(why) = weaker.as_ref().filter(|_| view.weaker_network != weaker) {
                tracing::warn!(runner = self.runner.config.name, "{why}");
            }
            (view.weaker_network, view.images_made) = (weaker, made);
            true
        });
        alike::told(&images)
    }

    /// Tells GitLab this runner manager's features before the first poll: it stores them from the
    /// first call and would else kill jobs without their `after_script` for the next 40 minutes.
    /// `None`: stopped.
    async fn verify(&self, info: Option<&RunnerInfo>) -> Option<Seen<Reservation>> {
        tokio::select! {
            biased;
            // Nothing is assigned by this call, so it may be cut.
            () = self.stop.cancelled() => None,
            verified = self.runner.api.verify(info) => Some(match verified {
                Ok(_) => Seen::Verified,
                Err(error) => Seen::Failed(error),
            }),
        }
    }

    /// Goes by the token that its file has now, when GitLab refuses the one in use: somebody may have registered anew,
    /// or reset it. Whether there was another.
    async fn read_token(&self) -> bool {
        let path = self.runner.config.token_file.clone();
        let read = tokio::task::spawn_blocking(move || RunnerToken::from_file(&path)).await;
        // One that cannot be read is no reason to give up the one that is in use.
        match read {
            Ok(Ok(token)) if !token.same_as(&self.runner.api.token()) => {
                tracing::info!(runner = self.runner.config.name, "the runner token has changed and was read again");
                self.runner.api.adopt(token, None);
                true
            }
            _ => false,
        }
    }

    /// Waits for room. `None`: stopped.
    async fn reserve(&self) -> Option<Seen<Reservation>> {
        if self.stop.is_cancelled() {
            return None;
        }
        let since = Instant::now();
        self.wants(Wants::Room);
        let mut room = std::pin::pin!(self.capacity.reserve(&self.runner.config.name, self.limit, self.resources));
        // Where there is room at once, whoever looks goes on to see what is the matter otherwise.
        let at_once = poll_fn(|context| match room.as_mut().poll(context) {
            task::Poll::Ready(reserved) => task::Poll::Ready(Some(reserved)),
            task::Poll::Pending => task::Poll::Ready(None),
        });
        if let Some(reserved) = at_once.await {
            return Some(self.reserved(reserved, since).await);
        }
        self.say(RunnerState::WaitingForRoom { missing: "room for one more job".into() }, Some(ROOM));
        tokio::select! {
            biased;
            // Both are cancel safe.
            () = self.stop.cancelled() => None,
            reserved = room => Some(self.reserved(reserved, since).await),
        }
    }

    async fn reserved(&self, reserved: Result<Reservation, NeverFits>, since: Instant) -> Seen<Reservation> {
        match reserved {
            Ok(reservation) => {
                self.parts.metrics.job().phase(Phase::Reserve, since.elapsed());
                Seen::Room(reservation)
            }
            Err(error) if error.lacks_disk() => {
                let path = &self.disk.0;
                let free = match self.parts.files.free_bytes(path).await {
                    Ok(free) => format!("{} GiB are free", free >> 30),
                    Err(error) => format!("what is free is not known ({error})"),
                };
                Seen::NeverFits(Cause::Disk, format!("{}; at `{}` {free}", chain(&error), path.display()))
            }
            Err(error) => Seen::NeverFits(Cause::TooLarge, chain(&error)),
        }
    }

    /// Whether a job would have a chance here: disk, a hypervisor that answers, and machines that come up and live.
    async fn host(&self) -> Host {
        if let Some(reason) = self.disk_is_short().await {
            return Host::Unfit(Cause::Disk, reason);
        }
        if let Err(error) = self.parts.journal.look_well().await {
            return Host::Unfit(
                Cause::Journal,
                format!(
                    "the journal cannot be written, so no job can be taken: {}; look at that disk and at the kernel's log",
                    chain(&error)
                ),
            );
        }
        let supply = &self.parts.supply;
        if let Err(error) = supply.list().await {
            return Host::Unfit(Cause::Hypervisor, chain(&error));
        }
        supply.unfit().map_or(Host::Well, Host::LosesMachines)
    }

    /// Asks GitLab for a job, and begins what it gives out. `None`: stopped, and the poll was closed.
    async fn ask(
        &self,
        info: &RunnerInfo,
        room: Reservation,
        last_update: Option<&str>,
        again: &mut JoinSet<()>,
    ) -> Option<Seen<Reservation>> {
        self.ask_aloud();
        self.wants(Wants::Answer);
        reached(Point::K0);
        let asked = Instant::now();
        let answer = self.poll(info, last_update).await?;
        self.wants(Wants::Room);
        if answer.is_ok() {
            self.say(RunnerState::Polling, None);
        }
        Some(match answer {
            Ok(Poll::Job(payload)) => {
                self.take(*payload, room, again).await;
                Seen::Job
            }
            Ok(Poll::Nothing { last_update }) => Seen::NoJob { held: asked.elapsed(), last_update },
            Err(error) => {
                if let GitlabError::UnreadableJob { job, .. } = &error {
                    self.parts.metrics.job().unreadable.inc();
                    if let Some(job) = job {
                        let (id, token) = job.as_ref().clone();
                        self.refuse_unreadable(id, token);
                    }
                }
                Seen::Failed(error)
            }
        })
    }

    /// Shows that it asks. After a question that was not answered that is no news until there is an answer.
    fn ask_aloud(&self) {
        let before = self.state.borrow().state.clone();
        match before {
            RunnerState::Retrying { error, .. } => {
                self.say(RunnerState::Retrying { error, in_s: 0 }, Some(Cause::Gitlab.word()));
            }
            RunnerState::Refused { .. } => {}
            _ => self.say(RunnerState::Polling, None),
        }
    }

    /// One poll. `None`: stopped, and the poll was closed.
    async fn poll(&self, info: &RunnerInfo, last_update: Option<&str>) -> Option<Result<Poll, GitlabError>> {
        let mut poll = std::pin::pin!(self.runner.api.request_job(info, last_update));
        tokio::select! {
            biased;
            // The poll first: an answer that is there is taken. It is not dropped here, but polled on.
            answer = &mut poll => return Some(answer),
            () = self.close.cancelled() => {}
        }
        tokio::time::timeout(HAND_OVER_POLL_PATIENCE, poll).await.ok()
    }

    fn refuse_unreadable(&self, id: JobId, token: Secret) {
        let key = JobKey { runner: self.runner.config.name.clone(), id };
        if self.jobs.contains(&key) {
            // Given out a second time (threats.md G17): what of it runs here is not to be failed.
            tracing::warn!(%key, "GitLab assigned a job again that is under way here, unreadably");
        } else {
            self.jobs.add(job::refuse_unread(&self.parts, self.runner.clone(), id, token));
        }
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
    async fn take(&self, payload: JobPayload, mut reservation: Reservation, again: &mut JoinSet<()>) {
        let key = JobKey { runner: self.runner.config.name.clone(), id: payload.id };
        tracing::info!(%key, project = payload.project, name = payload.name, "GitLab assigned a job");
        self.parts.metrics.job().assigned.inc();
        reservation.is_for_a_job();
        let taking = Taking { parts: self.parts.clone(), runner: self.runner.clone(), jobs: self.jobs.clone(), key };
        match self.jobs.reassign(&taking.key, &payload) {
            None => taking.begin(payload, reservation).await,
            Some(answer) => {
                self.parts.metrics.job().assigned_again.inc();
                again.spawn(async move { taking.again(payload, reservation, answer).await });
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
    /// Journals the job and starts it.
    async fn begin(&self, payload: JobPayload, reservation: Reservation) {
        self.jobs.add(job::accept(&self.parts, self.runner.clone(), payload, reservation).await);
    }

    /// GitLab gave out a job that is under way here: that job says what becomes of it.
    async fn again(self, payload: JobPayload, reservation: Reservation, answer: oneshot::Receiver<Reassigned>) {
        let key = &self.key;
        match answer.await {
            Ok(Reassigned::UnderWay) => return,
            Err(_) if self.parts.leave.is_cancelled() => {
                tracing::warn!(%key, "GitLab assigned a job again during a hand-over; it goes on as it is");
                return;
            }
            // No answer: it has ended just now.
            Ok(Reassigned::Another) | Err(_) => {}
        }
        match tokio::time::timeout(GIVEN_AGAIN_PATIENCE, self.jobs.gone(key)).await {
            Ok(()) => self.begin(payload, reservation).await,
            Err(_) => {
                drop(reservation);
                tracing::error!(%key, "a job that was given out again is not run: the one of before does not end");
                let refused = job::refuse_second(&self.parts, self.runner.clone(), &payload);
                if let Err(error) = refused.task.await {
                    tracing::error!(%key, error = chain(&error), "refusing a job panicked");
                }
            }
        }
    }
}
