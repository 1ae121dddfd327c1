//! What happens to a job whose end is known: verdict and machine are on their way, or the machine is kept for a while.

use super::{Answer, Ask, Command, Event, Grace, State};
use crate::gitlab::Verdict;
use crate::vm::Pause;

impl State {
    pub(super) fn releasing(
        verdict: Option<Verdict>,
        (machine_gone, delivered): (bool, bool),
        kept_until: Option<u64>,
        event: Event,
    ) -> (Self, Vec<Command>) {
        let mut commands = Vec::new();
        let (mut machine_gone, mut delivered, mut kept_until) = (machine_gone, delivered, kept_until);
        let kept = kept_until.is_some();
        match event {
            Event::GuestAsked(ask) => {
                commands.push(Command::Answer(Answer::NoJob));
                // It has not begun the job that is over by now: no grace is of use to it.
                commands.extend((ask != Ask::Busy && !machine_gone && !kept).then_some(Command::ReleaseMachine));
            }
            Event::GuestVerdict(said) => {
                let known = verdict.as_ref() == Some(&said);
                commands.push(Command::Answer(if known { Answer::Taken } else { Answer::Over }));
            }
            // Its runner has had its answers, and its time for them.
            Event::GuestIdle | Event::GraceOver if kept => commands.push(Command::CloseDoor),
            // Somebody looks at it.
            Event::MachinePaused(Pause::Operator) if kept => {}
            Event::GuestIdle
            | Event::MachineStopped(_)
            | Event::MachineFailed
            | Event::MachinePaused(_)
            | Event::HostDiskFailed
            | Event::GraceOver
            | Event::Killed
                if !machine_gone =>
            {
                kept_until = None;
                commands.push(Command::ReleaseMachine);
            }
            Event::KeepOver if kept => {
                kept_until = None;
                commands.push(Command::ReleaseMachine);
            }
            Event::MachineReleased => (machine_gone, kept_until) = (true, None),
            Event::Delivered => delivered = true,
            // The verdict stands: nothing that happens to us changes it.
            Event::Started | Event::Panicked | Event::Refused(_) => {
                commands.push(Command::CloseGuest);
                match (&verdict, delivered) {
                    (Some(_), false) => commands.push(Command::Deliver),
                    (None, false) => commands.push(Command::Abandon),
                    (_, true) => {}
                }
                if kept && event == Event::Started {
                    commands.push(Command::KeepMachine);
                } else if !machine_gone {
                    kept_until = None;
                    commands.push(Command::ReleaseMachine);
                }
            }
            _ => {}
        }
        if machine_gone && delivered {
            commands.retain(|command| matches!(command, Command::Answer(_)));
            commands.push(Command::Finish);
            return (Self::Ended, commands);
        }
        (Self::Releasing { verdict, machine_gone, delivered, kept_until }, commands)
    }

    /// The same, and where the job has just failed its machine is kept instead of being taken down.
    pub(super) fn kept(self, until: u64, commands: Vec<Command>) -> (Self, Vec<Command>) {
        match self {
            Self::Releasing { verdict: Some(verdict), machine_gone: false, delivered, .. } if !verdict.success => {
                let goes =
                    |command: &Command| matches!(command, Command::ReleaseMachine | Command::Arm(Grace::PowerOff));
                let mut commands: Vec<Command> = commands.into_iter().filter(|command| !goes(command)).collect();
                commands.extend([Command::KeepMachine, Command::Arm(Grace::PowerOff)]);
                let (verdict, kept_until) = (Some(verdict), Some(until));
                (Self::Releasing { verdict, machine_gone: false, delivered, kept_until }, commands)
            }
            state => (state, commands),
        }
    }
}
