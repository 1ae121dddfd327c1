//! What the state machine's commands do.

use super::Job;
use crate::failpoint::{Point, reached};
use crate::guest::{HandOut, VerdictAnswer};
use crate::job::lines;
use crate::job::state::{Answer, Command, Event, State};
use crate::job::{END_PATIENCE, REWRITE_PAUSE};
use crate::metrics::Phase;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What a job is about while its guest works, in the status: the same before and after a restart of the daemon.
pub(super) const HAS_ITS_JOB: &str = "its guest works at it";

/// Where the guest waits for an answer.
pub(super) enum Asking {
    /// It asks for its job.
    Job(oneshot::Sender<Option<HandOut>>),
    /// It has said its verdict.
    Verdict(oneshot::Sender<VerdictAnswer>),
}

impl Asking {
    /// The door may have given up waiting: then the guest asks again, and gets the same.
    fn answer(self, job: Option<HandOut>, verdict: VerdictAnswer) {
        match self {
            Self::Job(reply) => drop(reply.send(job)),
            Self::Verdict(reply) => drop(reply.send(verdict)),
        }
    }
}

/// A record that the disk has not taken.
pub(super) struct Behind {
    /// When it is tried again.
    pub(super) again: Instant,
    /// A verdict waits for it, until then at the latest: one that only memory knows is another one after a restart, and
    /// our last lines the guest's.
    verdict_until: Option<Instant>,
}

/// The step of the state machine that a command is of.
pub(super) struct Step {
    pub(super) before: State,
    pub(super) event: Event,
    /// Where its answer goes.
    pub(super) asking: Option<Asking>,
}

/// What comes of a command.
pub(super) enum Done {
    /// The next one.
    Goes,
    /// The same, and this.
    Brings(Event),
    /// None of the step has happened.
    Undone,
}

impl From<Result<(), Event>> for Done {
    fn from(result: Result<(), Event>) -> Self {
        result.err().map_or(Self::Goes, Self::Brings)
    }
}

impl Job {
    pub(super) async fn carry_out(&mut self, command: Command, step: &mut Step) -> Done {
        match command {
            Command::Explain(failure) => self.explain(failure, step).await,
            Command::Write => {
                self.say(step);
                if let (State::Releasing { verdict, .. }, State::Ended) = (&step.before, &self.m.record.state) {
                    self.m.keep_end(verdict.as_ref(), self.seen.gitlab, &self.seen.waits).await;
                }
                self.write_down().await;
                if self.behind.is_some() {
                    tracing::warn!("the job's new state is not on disk; it goes on");
                }
            }
            Command::Commit => {
                if !self.commit().await {
                    self.undo(step).await;
                    return Done::Undone;
                }
                self.say(step);
            }
            Command::Answer(answer) => self.answer(answer, step.asking.take()),
            Command::TakeMachine => return self.m.take_machine(false).await.into(),
            Command::ResumeMachine => return self.m.take_machine(true).await.into(),
            Command::ReplaceMachine => {
                let note = "dayfly: the machine was lost before it was ready; taking another.";
                self.m.own_line(|now| lines::note(now, note)).await;
                self.m.note("the machine was lost before it was ready");
                self.m.metrics().job().machines_replaced.inc();
                if !self.m.release_for_another() {
                    return self.m.take_machine(false).await.into();
                }
            }
            Command::ReleaseMachine => {
                if self.m.release_machine().await {
                    return Done::Brings(Event::MachineReleased);
                }
            }
            Command::KeepMachine => {
                let State::Releasing { kept_until: Some(until), .. } = self.m.record.state else { return Done::Goes };
                let until = self.m.at_uptime(until);
                self.say_kept(until);
                return self.m.keep_machine(until).into();
            }
            Command::CloseDoor => self.m.close_door().await,
            Command::BeginGuest => {
                if self.m.record.guest_base.is_none() {
                    self.m.note("its guest has the job");
                }
                self.m.begin_guest().await;
                self.say_phase(HAS_ITS_JOB);
            }
            Command::CloseGuest => self.m.close_guest().await,
            Command::Deliver => match &mut self.behind {
                Some(behind) => behind.verdict_until = Some(Instant::now() + END_PATIENCE),
                None => self.deliver().await,
            },
            Command::Abandon => {
                if self.m.abandon() {
                    self.m.metrics().job().ended(&self.m.record.key.runner, "over");
                }
            }
            Command::Arm(grace) => self.arm(grace),
            Command::Finish => self.m.finish().await,
        }
        Done::Goes
    }

    fn say(&self, step: &Step) {
        tracing::info!(state = self.m.record.state.word(), event = step.event.words(), "job goes on");
    }

    /// Writes the record, and ends the wait of a verdict for it. Room is given back only by a record that says so:
    /// one that is behind would have the next process make the machine anew, beside that of whoever has the room by
    /// then.
    pub(super) async fn write_down(&mut self) {
        let waits = self.behind.take().and_then(|behind| behind.verdict_until);
        let again = Instant::now() + REWRITE_PAUSE;
        let written = self.m.put().await;
        let gone = matches!(self.m.record.state, State::Releasing { machine_gone: true, .. } | State::Ended);
        if written && gone {
            self.reservation.release();
        }
        let over = written || waits.is_some_and(|until| until < again);
        if !written {
            self.behind = Some(Behind { again, verdict_until: waits.filter(|_| !over) });
        }
        if over && waits.is_some() {
            self.deliver().await;
        }
    }

    /// Writes down what a guest is told next, or a restart would find one that works on a job which it was never given,
    /// or knows of a verdict that nobody else does. `false`: the disk does not take it.
    async fn commit(&mut self) -> bool {
        let verdict = matches!(self.m.record.state, State::Releasing { .. });
        let passed = || if verdict { reached(Point::K14) } else { reached(Point::K10) };
        passed();
        if !self.m.commit(verdict).await {
            return false;
        }
        passed();
        self.behind = None;
        if verdict {
            self.given.verdict_unkept = false;
            self.m.parts.supply.machine_did_well();
        } else {
            self.m.last_spoke = self.m.parts.awake.now();
        }
        true
    }

    /// Nothing has happened, and the guest is asked to come again.
    async fn undo(&mut self, step: &mut Step) {
        if matches!(self.m.record.state, State::Releasing { .. }) {
            self.given.verdict_unkept = true;
            self.m.reopen_guest().await;
        }
        self.m.record.state = step.before.clone();
        if let Some(asking) = step.asking.take() {
            asking.answer(None, VerdictAnswer::Later);
        }
    }

    fn answer(&mut self, answer: Answer, asking: Option<Asking>) {
        let job = if answer == Answer::Job { self.m.payload_for_guest() } else { None };
        if job.is_some() {
            self.given.now();
        }
        let verdict = if answer == Answer::Taken { VerdictAnswer::Taken } else { VerdictAnswer::Over };
        if let Some(asking) = asking {
            asking.answer(job, verdict);
        }
    }

    /// The last lines, if any, to the spool and that to disk, as the record is already, then the verdict to
    /// the uploader.
    async fn deliver(&mut self) {
        self.m.write_last_lines().await;
        if let State::Releasing { verdict: Some(verdict), .. } = &self.m.record.state {
            let word = if verdict.success { "success" } else { "failed" };
            if self.m.outbox(verdict.clone()) {
                self.m.metrics().job().ended(&self.m.record.key.runner, word);
                self.m.begin_phase(Phase::Flush);
                self.m.count_reached();
            }
        }
    }
}
