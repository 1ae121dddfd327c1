//! What happened and what went wrong, in words for an operator's log.

use super::{Ask, Event, Failure};
use crate::gitlab::Verdict;

impl Event {
    /// It, for people.
    #[must_use]
    pub fn words(&self) -> String {
        let words = match self {
            Self::Started => "the job's task began",
            Self::GuestAsked(ask) => match ask {
                Ask::Idle => "the guest asked for its job",
                Ask::Busy => "the guest asked for its job once more",
                Ask::Untaken => "the guest asks again and again for the job that it was given",
                Ask::TooLate => "the guest asked for its job when nothing was left of its time",
            },
            Self::GuestVerdict(verdict) => return format!("the guest's verdict: {}", verdict_words(verdict)),
            Self::GuestIdle => "its guest has shown no work of it",
            Self::MachineFailed => "the machine could not be made",
            Self::NoDoor => "the machine has no door yet",
            Self::MachineStopped(ending) => ending.words(),
            Self::MachinePaused(pause) => pause.words(),
            Self::MachineReleased => "the machine is gone",
            Self::Gitlab(status) => return format!("GitLab's word on the job: {}", status.word()),
            Self::Delivered => "GitLab has all of the job",
            Self::BootDeadline => "the boot deadline is over",
            Self::SilenceDeadline => "the silence deadline is over",
            Self::TimeoutDeadline => "the job's timeout is over",
            Self::GraceOver => "the grace is over",
            Self::Killed => "the operator ends the job",
            Self::CannotGoOn => "what the job needs is not there any more",
            Self::HostDiskFailed => "the host's disk failed",
            Self::ImageUnusable => "the image cannot be used",
            Self::Panicked => "the job's task begins anew after a bug of dayfly",
            Self::KeepIfFailed { event, .. } => return event.words(),
            Self::KeepOver => "the machine is not kept any longer",
            Self::Refused(why) => return format!("the job is not run here: {}", why.words()),
        };
        words.to_owned()
    }
}

impl Failure {
    /// It, for people.
    #[must_use]
    pub fn words(self) -> String {
        let words = match self {
            Self::NoMachine => "no machine could be made",
            Self::DiedBooting(ending) => return format!("before the guest asked for the job: {}", ending.words()),
            Self::BootDeadline => "the guest did not ask for the job in time",
            Self::NotTaken => "its runner was given the job and did not begin it",
            Self::Died(ending) => return format!("in the middle of the job: {}", ending.words()),
            Self::HostMemory => "the machine ended while the host ran out of memory",
            Self::HostDisk => "the host's disk failed or is full",
            Self::HostStopped => "QEMU stopped the machine by itself",
            Self::HostPaused => "somebody at the host paused the machine for too long",
            Self::Silent => "the guest went silent",
            Self::Timeout => "the job went on beyond its timeout",
            Self::CanceledBooting => "canceled while its machine booted",
            Self::CancelGrace => "canceled, and after_script took too long",
            Self::Killed => "the operator ended the job",
            Self::HostLost => "the host was restarted",
            Self::Lost => "what the job needs is lost",
            Self::NoImage => "the image cannot be used",
            Self::Bug => "a bug of dayfly",
            Self::Unreadable => "its payload cannot be read",
            Self::NotKept => "the disk does not take it",
            Self::GivenTwice => "it was given out again, and the one before is still being ended",
            Self::BugTwice => "a bug of dayfly, twice",
            Self::Unmet => "it asks for a machine that it may not have",
            Self::Denied => "a rule denies it",
        };
        words.to_owned()
    }
}

fn verdict_words(verdict: &Verdict) -> String {
    let mut words = if verdict.success { "success" } else { "failed" }.to_owned();
    if let Some(reason) = &verdict.failure_reason {
        words.push_str(", ");
        words.push_str(reason);
    }
    if let Some(code) = verdict.exit_code {
        words.push_str(&format!(", exit code {code}"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Ending;

    /// U26: what an operator reads of a verdict and of a machine's end is a sentence.
    #[test]
    fn a_verdict_and_an_end_are_told_in_words() {
        let verdict = |success, reason: Option<&str>, exit_code| {
            Event::GuestVerdict(Verdict {
                success,
                failure_reason: reason.map(str::to_owned),
                exit_code,
                runtime_environment_key: None,
            })
            .words()
        };
        assert_eq!(verdict(true, None, None), "the guest's verdict: success");
        let failed = "the guest's verdict: failed, script_failure, exit code 3";
        assert_eq!(verdict(false, Some("script_failure"), Some(3)), failed);
        let off = "in the middle of the job: its guest powered the machine off";
        assert_eq!(Failure::Died(Ending::PoweredOff).words(), off);
    }
}
