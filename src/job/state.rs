//! Given this state and event, what next? No I/O, no clock: a deadline is an event.
//!
//! ```text
//! Accepted ──► Booting ──► Running ──► Releasing ──► Ended
//!                 │ ▲        │             ▲
//!                 │ └ once: a machine that cannot be created, or dies before its first request
//!                 └──────────┴─ cancel, deadline, loss, kill ─┘
//! ```
//!
//! A machine whose job failed may be kept for an operator: its job is released in all but that, until a deadline, a kill
//! or the machine's own end.
//!
//! Each new state is written down by a command, [`Command::Write`] or [`Command::Commit`], and what follows it comes
//! after that: a guest gets no answer that the next daemon would not know of. Every command may run twice. Whatever
//! happens, each question of the guest has one answer, and a job ends with one verdict and everything released: the
//! property tests below send any sequence of events to any disk.

use crate::gitlab::{JobStatus, Verdict};
use crate::vm::{Ending, Pause};
use serde::{Deserialize, Serialize};

/// The life of a job. Plain data: it stands in the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum State {
    /// GitLab counts on us; nothing is on the host yet.
    Accepted,
    /// A VM may exist; the guest has not been given its job.
    Booting {
        /// Whether this is the second machine, the replacement.
        replaced: bool,
    },
    /// The guest holds the payload and speaks for the job.
    Running {
        /// GitLab asked for a graceful cancel.
        canceling: bool,
    },
    /// How the job ends is known; machine and verdict are on their way.
    Releasing {
        /// What GitLab is told; `None`: the job is over there, nothing more goes to it.
        verdict: Option<Verdict>,
        /// Whether machine, disk and door are gone.
        machine_gone: bool,
        /// Whether GitLab has all, or wants no more.
        delivered: bool,
        /// The job failed, and its machine is kept for an operator until this uptime of the host, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kept_until: Option<u64>,
    },
    /// Nothing is left but the record, which goes last.
    Ended,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The job task began, for the first time or after a restart.
    Started,
    /// The guest asks for its job. Answered by [`Command::Answer`].
    GuestAsked(Ask),
    /// The guest's final PUT. Answered likewise.
    GuestVerdict(Verdict),
    /// The guest of a job that is over has shown no work of it: it has nothing to end.
    GuestIdle,
    /// The machine could not be made.
    MachineFailed,
    /// The machine has no door yet: none is free, or this daemon leaves before it is open.
    NoDoor,
    /// The machine ended by itself, like this.
    MachineStopped(Ending),
    /// The machine's CPUs were stopped. An operator may let it go on: the job's deadlines run meanwhile.
    MachinePaused(Pause),
    /// Machine, disk and door are gone.
    MachineReleased,
    /// GitLab's word on the job has changed.
    Gitlab(JobStatus),
    /// The uploader is done.
    Delivered,
    /// Nothing came from the guest before the boot deadline.
    BootDeadline,
    /// The guest said nothing for the silence deadline.
    SilenceDeadline,
    /// The job's timeout and its grace are over.
    TimeoutDeadline,
    /// A grace that [`Command::Arm`] asked for is over.
    GraceOver,
    /// The operator ends the job.
    Killed,
    /// What the job needs to go on did not survive: a reboot of the host.
    CannotGoOn,
    /// The host's disk does not take, or give back, what the job needs.
    HostDiskFailed,
    /// The base image of its machine cannot be used.
    ImageUnusable,
    /// The job's task began anew after a bug of ours has ended it.
    Panicked,
    /// It is not run here, or not any more, for this reason.
    Refused(Failure),
    /// This; and if the job fails by it, its machine is to be kept until this uptime of the host, in milliseconds.
    KeepIfFailed {
        /// Until when.
        until: u64,
        /// What happened.
        event: Box<Event>,
    },
    /// The time of a machine that is kept is over, or nothing is kept any more.
    KeepOver,
}

/// What it means that the guest asks for its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// It has shown no work of the job: not given to it yet, or not for a while (V5).
    Idle,
    /// It works at it, or was given it a moment ago, or its machine is on the way out: it gets nothing.
    Busy,
    /// It has been given its job several times and shown no work of it: its runner cannot read it.
    Untaken,
    /// Nothing is left of the job's time.
    TooLate,
}

/// Why a job ends without a verdict of its guest; chooses the author's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No machine could be made, twice.
    NoMachine,
    /// The machine died before its first request, twice; the second time like this.
    DiedBooting(Ending),
    /// The boot deadline passed.
    BootDeadline,
    /// See [`Ask::Untaken`].
    NotTaken,
    /// The machine ended in mid-job, like this.
    Died(Ending),
    /// The machine ended by itself, and the host's kernel ended processes for want of memory meanwhile: what the job
    /// task makes of [`Failure::Died`] and [`Failure::DiedBooting`] then, unless its guest was seen to end it.
    HostMemory,
    /// The machine was paused by a disk error of the host, or the journal fails.
    HostDisk,
    /// QEMU stopped the machine's CPUs of its own accord, as at an internal error of KVM.
    HostStopped,
    /// Somebody at the host paused the machine, and a deadline passed before it was let go on: what the job task makes
    /// of that deadline's failure.
    HostPaused,
    /// The guest went silent.
    Silent,
    /// Timeout and grace are over.
    Timeout,
    /// Canceled while booting.
    CanceledBooting,
    /// `after_script` took longer than the grace for it.
    CancelGrace,
    /// Ended by the operator.
    Killed,
    /// See [`Event::CannotGoOn`]; the host was seen to have been restarted.
    HostLost,
    /// See [`Event::CannotGoOn`].
    Lost,
    /// See [`Event::ImageUnusable`].
    NoImage,
    /// See [`Event::Panicked`].
    Bug,
    /// Its payload makes no sense, or broke off.
    Unreadable,
    /// The disk does not take it.
    NotKept,
    /// A job of this id is being ended here, and that takes too long.
    GivenTwice,
    /// Its task died of a bug of ours, and the one after it as well.
    BugTwice,
    /// It asks for a machine that it may not have.
    Unmet,
    /// A rule has it so.
    Denied,
}

impl Failure {
    /// GitLab's name for it. Every GitLab takes `job_execution_timeout` and `runner_system_failure`; the others are used
    /// by the job task only where GitLab lists them.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Timeout => "job_execution_timeout",
            Self::Killed => "runner_interrupted",
            Self::Unmet | Self::Denied => "runner_configuration_error",
            _ => "runner_system_failure",
        }
    }

    /// Whether it is one of [`Event::Refused`].
    #[must_use]
    pub fn is_refusal(self) -> bool {
        matches!(
            self,
            Self::Unreadable | Self::NotKept | Self::GivenTwice | Self::BugTwice | Self::Unmet | Self::Denied
        )
    }
}

/// What the job task must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Make the machine.
    TakeMachine,
    /// Go on with the machine that the record names; never make one.
    ResumeMachine,
    /// Take down what there is of the machine, then make another, on a fresh overlay.
    ReplaceMachine,
    /// Write the record. Where the disk does not take it the job goes on, and it is tried again.
    Write,
    /// Write the record, and the trace before it that the guest's verdict ends. Where the disk does not take that,
    /// nothing has happened: the state is that of before, the guest is asked to come again, and what follows is left out.
    Commit,
    /// Begin the guest's part of the trace.
    BeginGuest,
    /// Answer the guest.
    Answer(Answer),
    /// The guest writes no more; its calls meet 403.
    CloseGuest,
    /// Put the author's lines for this failure into the record.
    Explain(Failure),
    /// Give the verdict to the uploader, once the record holds it.
    Deliver,
    /// The job is over at GitLab: the uploader stops.
    Abandon,
    /// Send [`Event::GraceOver`] after this grace.
    Arm(Grace),
    /// Take the machine down.
    ReleaseMachine,
    /// Leave the machine as it is, for an operator: its runner is to end, and it reaches nothing any more.
    KeepMachine,
    /// Close the guest's door: whatever it says is not heard.
    CloseDoor,
    /// Remove record, spool and runtime files, and give the reservation back.
    Finish,
}

/// What the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Its job.
    Job,
    /// There is no job for it: 204.
    NoJob,
    /// Its verdict is taken.
    Taken,
    /// The job has ended without its verdict.
    Over,
}

/// The graces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grace {
    /// For `after_script` of a job that is being canceled.
    Canceling,
    /// For a guest whose job is over at GitLab.
    Over,
    /// For the power-off after the verdict.
    PowerOff,
    /// For a door to become free.
    Door,
}

impl State {
    /// The next state, and what to do, in this order. An event that means nothing here changes nothing.
    #[must_use]
    pub fn on(self, event: Event) -> (Self, Vec<Command>) {
        let before = self.clone();
        let (state, mut commands) = self.step(event);
        if state != before && !commands.contains(&Command::Commit) {
            // The record holds the author's lines too.
            let explained = commands.iter().position(|command| matches!(command, Command::Explain(_)));
            commands.insert(explained.map_or(0, |at| at + 1), Command::Write);
        }
        (state, commands)
    }

    fn step(self, event: Event) -> (Self, Vec<Command>) {
        if let Event::KeepIfFailed { until, event } = event {
            let runs = matches!(self, Self::Running { canceling: false });
            let (state, commands) = self.step(*event);
            return if runs { state.kept(until, commands) } else { (state, commands) };
        }
        match self {
            Self::Accepted => Self::accepted(event),
            Self::Booting { replaced } => Self::booting(replaced, event),
            Self::Running { canceling } => Self::running(canceling, event),
            Self::Releasing { verdict, machine_gone, delivered, kept_until } => {
                Self::releasing(verdict, (machine_gone, delivered), kept_until, event)
            }
            Self::Ended => (
                Self::Ended,
                match event {
                    Event::GuestAsked(_) => vec![Command::Answer(Answer::NoJob)],
                    Event::GuestVerdict(_) => vec![Command::Answer(Answer::Over)],
                    Event::Started | Event::Panicked | Event::Refused(_) => vec![Command::Finish],
                    _ => vec![],
                },
            ),
        }
    }

    /// Whether a VM may exist.
    #[must_use]
    pub fn may_have_machine(&self) -> bool {
        match self {
            Self::Booting { .. } | Self::Running { .. } => true,
            Self::Releasing { machine_gone, .. } => !machine_gone,
            Self::Accepted | Self::Ended => false,
        }
    }

    /// Whether its machine is kept for an operator.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        matches!(self, Self::Releasing { kept_until: Some(_), .. })
    }

    /// One word for people.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Booting { .. } => "booting",
            Self::Running { canceling: false } => "running",
            Self::Running { canceling: true } => "canceling",
            Self::Releasing { kept_until: Some(_), .. } => "kept",
            Self::Releasing { .. } => "releasing",
            Self::Ended => "ended",
        }
    }

    fn accepted(event: Event) -> (Self, Vec<Command>) {
        match event {
            Event::Started => (Self::Booting { replaced: false }, vec![Command::TakeMachine]),
            Event::GuestAsked(_) => (Self::Accepted, vec![Command::Answer(Answer::NoJob)]),
            // Nothing is on the host, but the machine's end is what ends a release: take the same way.
            event => Self::booting(true, event),
        }
    }

    fn booting(replaced: bool, event: Event) -> (Self, Vec<Command>) {
        match event {
            Event::Started => (Self::Booting { replaced }, vec![Command::TakeMachine]),
            // Asked again, it gets it, should the disk not take that it has it.
            Event::GuestAsked(Ask::Idle) => (
                Self::Running { canceling: false },
                vec![Command::BeginGuest, Command::Commit, Command::Answer(Answer::Job)],
            ),
            Event::GuestAsked(Ask::TooLate) => Self::turn_away(Failure::BootDeadline),
            Event::GuestAsked(Ask::Busy | Ask::Untaken) => {
                (Self::Booting { replaced }, vec![Command::Answer(Answer::NoJob)])
            }
            Event::GuestVerdict(_) => (Self::Booting { replaced }, vec![Command::Answer(Answer::Over)]),
            Event::MachineFailed | Event::MachineStopped(_) | Event::MachinePaused(Pause::Itself) if !replaced => {
                (Self::Booting { replaced: true }, vec![Command::ReplaceMachine])
            }
            Event::MachineFailed => Self::fail(Failure::NoMachine),
            // Another job may end meanwhile: it is tried again until the boot deadline.
            Event::NoDoor => (Self::Booting { replaced }, vec![Command::Arm(Grace::Door)]),
            Event::GraceOver => (Self::Booting { replaced }, vec![Command::TakeMachine]),
            Event::MachineStopped(ending) => Self::fail(Failure::DiedBooting(ending)),
            Event::MachinePaused(Pause::Itself) => Self::fail(Failure::HostStopped),
            Event::MachinePaused(Pause::Disk) | Event::HostDiskFailed => Self::fail(Failure::HostDisk),
            Event::BootDeadline => Self::fail(Failure::BootDeadline),
            // All of the job's time went into its boot: no doing of its author's.
            Event::TimeoutDeadline => Self::fail(Failure::BootDeadline),
            Event::Gitlab(JobStatus::Canceling) => Self::fail(Failure::CanceledBooting),
            Event::Gitlab(JobStatus::Over) => {
                let (state, mut commands) = Self::over();
                commands.push(Command::ReleaseMachine);
                (state, commands)
            }
            Event::Killed => Self::fail(Failure::Killed),
            Event::CannotGoOn => Self::fail(Failure::Lost),
            Event::ImageUnusable => Self::fail(Failure::NoImage),
            Event::Panicked => Self::fail(Failure::Bug),
            Event::Refused(why) => Self::fail(why),
            Event::GuestIdle
            | Event::MachineReleased
            | Event::MachinePaused(Pause::Operator)
            | Event::Gitlab(JobStatus::Running)
            | Event::Delivered
            | Event::KeepIfFailed { .. }
            | Event::KeepOver
            | Event::SilenceDeadline => (Self::Booting { replaced }, vec![]),
        }
    }

    fn running(canceling: bool, event: Event) -> (Self, Vec<Command>) {
        match event {
            // The answer to its first ask was lost, and it must not begin any more: nothing of the job runs.
            Event::GuestAsked(Ask::Idle | Ask::Untaken | Ask::TooLate) if canceling => {
                Self::turn_away(Failure::CanceledBooting)
            }
            Event::GuestAsked(Ask::Idle) => (Self::Running { canceling }, vec![Command::Answer(Answer::Job)]),
            Event::GuestAsked(Ask::Untaken) => Self::turn_away(Failure::NotTaken),
            Event::GuestAsked(Ask::Busy | Ask::TooLate) => {
                (Self::Running { canceling }, vec![Command::Answer(Answer::NoJob)])
            }
            Event::GuestVerdict(verdict) => (
                Self::Releasing { verdict: Some(verdict), machine_gone: false, delivered: false, kept_until: None },
                vec![
                    Command::Commit,
                    Command::CloseGuest,
                    Command::Answer(Answer::Taken),
                    Command::Deliver,
                    Command::Arm(Grace::PowerOff),
                ],
            ),
            Event::MachineStopped(ending) => Self::fail(Failure::Died(ending)),
            Event::MachineFailed => Self::fail(Failure::Died(Ending::Unseen)),
            Event::MachinePaused(Pause::Itself) => Self::fail(Failure::HostStopped),
            Event::MachinePaused(Pause::Disk) | Event::HostDiskFailed => Self::fail(Failure::HostDisk),
            Event::SilenceDeadline => Self::fail(Failure::Silent),
            Event::TimeoutDeadline => Self::fail(Failure::Timeout),
            Event::Gitlab(JobStatus::Canceling) if !canceling => {
                (Self::Running { canceling: true }, vec![Command::Arm(Grace::Canceling)])
            }
            Event::GraceOver if canceling => Self::fail(Failure::CancelGrace),
            Event::Gitlab(JobStatus::Over) => {
                let (state, mut commands) = Self::over();
                commands.push(Command::Arm(Grace::Over));
                (state, commands)
            }
            Event::Killed => Self::fail(Failure::Killed),
            Event::CannotGoOn => Self::fail(Failure::Lost),
            Event::ImageUnusable => Self::fail(Failure::NoImage),
            Event::Panicked => Self::fail(Failure::Bug),
            Event::Refused(why) => Self::fail(why),
            // After a restart: the grace counts anew, for nobody knows how much of it was used.
            Event::Started => {
                let mut commands = vec![Command::ResumeMachine];
                commands.extend(canceling.then_some(Command::Arm(Grace::Canceling)));
                (Self::Running { canceling }, commands)
            }
            Event::GuestIdle
            | Event::MachineReleased
            | Event::MachinePaused(Pause::Operator)
            | Event::Gitlab(_)
            | Event::Delivered
            | Event::BootDeadline
            | Event::GraceOver
            | Event::KeepIfFailed { .. }
            | Event::KeepOver
            | Event::NoDoor => (Self::Running { canceling }, vec![]),
        }
    }

    fn fail(failure: Failure) -> (Self, Vec<Command>) {
        let verdict = Verdict {
            success: false,
            failure_reason: Some(failure.reason().to_owned()),
            exit_code: None,
            runtime_environment_key: None,
        };
        (
            Self::Releasing { verdict: Some(verdict), machine_gone: false, delivered: false, kept_until: None },
            vec![Command::Explain(failure), Command::CloseGuest, Command::Deliver, Command::ReleaseMachine],
        )
    }

    /// Fails, and the guest that asks for its job gets none.
    fn turn_away(failure: Failure) -> (Self, Vec<Command>) {
        let (state, mut commands) = Self::fail(failure);
        commands.insert(0, Command::Answer(Answer::NoJob));
        (state, commands)
    }

    fn over() -> (Self, Vec<Command>) {
        (
            Self::Releasing { verdict: None, machine_gone: false, delivered: false, kept_until: None },
            vec![Command::CloseGuest, Command::Abandon],
        )
    }
}

mod releasing;
mod words;

#[cfg(test)]
mod tests;
