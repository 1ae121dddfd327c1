//! What was seen of a job's machine? Whose doing its end was, and what its author is told.

use super::Job;
use super::commands::Step;
use crate::files::Files;
use crate::gitlab::JobStatus;
use crate::job::lines;
use crate::job::oom::oom_kills;
use crate::job::state::{Event, Failure, State};
use crate::vm::{Ending, Pause};
use std::time::Duration;
use tokio::time::Instant;

/// What was seen of it, by this task.
pub(super) struct Seen {
    /// What the host's kernel had ended for want of memory when this task began.
    oom_kills: Option<u64>,
    /// Since when somebody at the host has kept the machine from going on.
    pub(super) paused: Option<Instant>,
    /// What the guest has said of its runner's end: a hint.
    pub(super) runner_exited: Option<i32>,
    /// What it has said last that it could not do, or of its own end: a hint.
    pub(super) guest_failed: Option<String>,
    /// Why the operator ends the job, in their words.
    pub(super) kill_reason: Option<String>,
    /// Why the job is refused, for its author.
    refused: Option<String>,
    /// GitLab's last word on the job.
    pub(super) gitlab: JobStatus,
    /// What GitLab does not take, and why; empty: nothing.
    pub(super) waits: String,
}

impl Seen {
    /// `refused`: why the job is, if it is.
    pub(super) async fn begin(files: &dyn Files, refused: Option<String>) -> Self {
        let oom_kills = oom_kills(files).await;
        Self {
            oom_kills,
            paused: None,
            runner_exited: None,
            guest_failed: None,
            kill_reason: None,
            refused,
            gitlab: JobStatus::Running,
            waits: String::new(),
        }
    }
}

impl Job {
    /// Machines that the host loses count; what a guest can bring about at will, once it has a job, does not.
    pub(super) fn count_loss(&self, before: &State, event: &Event) {
        let supply = &self.m.parts.supply;
        let pause = |why: Pause| (why != Pause::Operator).then(|| why.words());
        match (before, event) {
            (State::Booting { .. }, Event::MachineFailed) => supply.machine_was_lost("it could not be made"),
            (State::Booting { .. }, Event::MachineStopped(ending)) => supply.machine_was_lost(ending.words()),
            (State::Booting { .. }, Event::BootDeadline) if self.seen.paused.is_none() => {
                supply.machine_was_lost("its guest did not ask for its job in time");
            }
            (State::Booting { .. }, Event::MachinePaused(why)) => {
                pause(*why).into_iter().for_each(|why| supply.machine_was_lost(why));
            }
            (State::Running { .. }, Event::MachineStopped(ending)) if ending.is_the_hosts() => {
                supply.machine_was_stopped(ending.words());
            }
            (State::Running { .. }, Event::MachinePaused(why)) => {
                pause(*why).into_iter().for_each(|why| supply.machine_was_stopped(why));
            }
            _ => {}
        }
    }

    /// The failure in the light of what was measured: whose doing it was that a deadline passed, or a machine ended.
    async fn measured(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Silent | Failure::Timeout | Failure::BootDeadline if self.seen.paused.is_some() => {
                Failure::HostPaused
            }
            // Both are true, and this is the one that its author knows: the timeout was over, and its end was not heard of.
            Failure::Silent if self.m.elapsed() >= self.m.timeout() => Failure::Timeout,
            Failure::Lost if self.m.host_was_restarted() => Failure::HostLost,
            Failure::Died(Ending::Unseen | Ending::Died) | Failure::DiedBooting(Ending::Unseen | Ending::Died)
                if self.host_ran_out_of_memory().await =>
            {
                Failure::HostMemory
            }
            failure => failure,
        }
    }

    /// Whether the kernel has ended processes for want of memory in this task's time.
    async fn host_ran_out_of_memory(&self) -> bool {
        let now = oom_kills(self.m.parts.files.as_ref()).await;
        self.seen.oom_kills.zip(now).is_some_and(|(before, now)| now > before)
    }

    /// Puts into the record how the job ends that failed: GitLab's reason, and the author's lines after the last byte of
    /// the guest.
    pub(super) async fn explain(&mut self, failure: Failure, step: &Step) {
        let failure = self.measured(failure).await;
        self.m.past.why = Some(failure.words());
        let unseen = matches!(step.event, Event::MachineStopped(Ending::Unseen));
        if failure == Failure::HostMemory && unseen && matches!(step.before, State::Running { .. }) {
            self.m.parts.supply.machine_was_stopped("the host's kernel ended processes for want of memory");
        }
        self.word_reason(failure);
        self.plan_lines(failure).await;
    }

    /// GitLab's name for the failure; what not all know only where GitLab lists it.
    fn word_reason(&mut self, failure: Failure) {
        let known = match failure {
            Failure::Killed => self.m.record.knows_interrupted,
            // Its payload has come just now, or is still there.
            Failure::Unmet | Failure::Denied => self.m.gitlab_knows(failure.reason()),
            _ => true,
        };
        if let State::Releasing { verdict: Some(verdict), .. } = &mut self.m.record.state {
            let reason = if known { failure.reason() } else { "runner_system_failure" };
            verdict.failure_reason = Some(reason.to_owned());
        }
    }

    async fn plan_lines(&mut self, failure: Failure) {
        let limits = &self.m.parts.limits;
        let limit = match failure {
            Failure::BootDeadline => limits.boot_deadline.get().min(self.m.elapsed()),
            Failure::Silent => limits.silence_deadline.get(),
            Failure::Timeout => self.m.timeout(),
            Failure::HostPaused => self.seen.paused.map_or(Duration::ZERO, |since| since.elapsed()),
            _ => self.grace.map_or(Duration::ZERO, |grace| grace.length),
        };
        let job = self.m.record.key.id.0;
        let about = match self.seen.refused.as_deref() {
            Some(why) => self.m.masked(why).unwrap_or_default(),
            None => self.m.image().to_owned(),
        };
        if failure.is_refusal() {
            // Its cause was logged where it was met.
            tracing::info!(failure = failure.words(), "the job is not run here");
        } else {
            tracing::warn!(failure = failure.words(), "the job ends without a verdict of its guest");
        }
        let booting = self.m.record.guest_base.is_none();
        let lost =
            matches!(failure, Failure::Died(_) | Failure::DiedBooting(_) | Failure::HostMemory | Failure::BootDeadline);
        let console = self.m.console_tail();
        let words = |of: fn(&str) -> Option<String>| console.as_deref().and_then(of);
        let hints = lines::Hints {
            runner_exited: self.seen.runner_exited,
            guest: self.seen.guest_failed.as_deref().and_then(|text| self.m.masked(text)),
            console: words(lines::kernel_words),
            runner: words(lines::runner_words).filter(|_| failure == Failure::NotTaken),
        };
        let reason = self.seen.kill_reason.take();
        self.m.look_at_reached().await;
        let mut reached = self.m.cache_section(self.m.parts.clock.now());
        reached.push_str(&self.m.reached_section(self.m.parts.clock.now()));
        let keep = self.m.record.machine_spec.as_ref().and_then(|spec| spec.keep_failed);
        let kept = keep.filter(|_| self.m.record.state.is_kept()).map(|keep| (job, Duration::from_secs(keep.for_s)));
        let tail = console.filter(|_| lost && (booting || !self.m.guest_has_written()));
        if let Some(tail) = &tail {
            let what = if booting { "the machine that never asked for its job" } else { "a machine that wrote no log" };
            tracing::warn!(console = tail, "the console of {what}");
        }
        self.m
            .plan_last_lines(|now| {
                let mut text = reached;
                text.push_str(&lines::failure(now, failure, job, limit, &about));
                if matches!(failure, Failure::Died(_) | Failure::Silent | Failure::NotTaken) {
                    text.push_str(&hints.lines(now));
                }
                if failure == Failure::Killed {
                    text.extend(reason.map(|reason| lines::note(now, &format!("dayfly: the operator says: {reason}"))));
                }
                text.extend(tail.map(|tail| lines::console(now, &tail)));
                text.extend(kept.map(|(job, length)| lines::kept(now, job, length)));
                text
            })
            .await;
    }
}
