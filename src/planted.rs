//! Would our tests notice? Bugs planted on purpose, one at a time, for the simulation to find.
//!
//! Each stands next to the right code, as `if planted::on(Bug::…)`, and behaves like a mistake that somebody could
//! make. Without the feature `test-util`, [`on`] is the constant `false`, and nothing of a bug is compiled in. The
//! switch is the process's: a run with a planted bug is a process of its own, or has its turn alone.
//!
//! The number before each is the invariant that it breaks (threats.md §4).

macro_rules! bugs {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// A mistake that somebody could make.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Bug { $($(#[$doc])+ $name,)+ }

        impl Bug {
            /// All of them, in the order in which they are tried.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];
        }
    };
}

bugs! {
    /// 1: a verdict that does not get through is never sent again.
    VerdictDropped,
    /// 2: the verdict is sent a second time, as the other state.
    DoubleReport,
    /// 3: when a success may or may not have arrived, `failed` is sent.
    SuccessTurnedFailed,
    /// 4: a failure of ours has no line that explains it.
    FailureUnexplained,
    /// 4: a failure of ours is called the author's.
    AuthorBlamed,
    /// 5: the verdict does not wait for the rest of the trace.
    LostLastLine,
    /// 5: after GitLab has said where it stands, the trace goes on one byte too early.
    UploadOffByOne,
    /// 5: the verdict's checksum has its bytes the wrong way round.
    WrongChecksum,
    /// 5: the verdict's size is one byte short.
    WrongSize,
    /// 5: a piece of trace that the disk did not take counts as written.
    SpoolErrorIgnored,
    /// 5: after a restart our own first lines count as the guest's.
    GuestOffsetForgotten,
    /// 5: a piece of trace is appended whatever its offset says.
    GuestOffsetIgnored,
    /// 6: the payload is parsed and written anew instead of passed on.
    PayloadRewritten,
    /// 6: a guest that has begun to work is given its payload again if it asks.
    HandedOutTwice,
    /// 6: a job whose machine dies is begun again on another.
    RunTwice,
    /// 7: the request for a job is logged, with the runner token in it.
    RunnerTokenInLog,
    /// 7: the guest's token is the runner token, all of it.
    RunnerTokenToGuest,
    /// 8: a job's token is logged.
    JobTokenInLog,
    /// 8: the payload is kept in the state directory, which outlives a reboot.
    PayloadOnDisk,
    /// 9: a piece of trace carries the job token in its URL too.
    CredentialInUrl,
    /// 11: GitLab's word on a job is not heard: a canceled one boots, and runs, nevertheless.
    CancelUnheard,
    /// 12: the machine in place of a lost one gets its names, disk path and pass.
    MachineReused,
    /// 12: all machines have the same pass.
    PassReused,
    /// 13: of a machine that could not be made nothing is taken down, and no sweep looks for overlays.
    LeakedOverlay,
    /// 13: the room of a job that was canceled is never given back.
    RoomNeverBack,
    /// 13: the machine of a running job that is over at GitLab counts as gone.
    MachineForgotten,
    /// 13: the door of a machine that is gone stays open.
    DoorLeftOpen,
    /// 13: a machine that could not be destroyed at once counts as gone.
    DestroyGivenUp,
    /// 14: the room of a job is given back before its machine is gone.
    RoomBackTooEarly,
    /// 14: one job more than configured.
    OneJobTooMany,
    /// 15: machines of other installations are taken for ours.
    ForeignReaped,
    /// 16: a machine is made before a record names it.
    DomainBeforeRecord,
    /// 16: a record that the disk did not take counts as written.
    RecordErrorIgnored,
    /// 16: the record of a job that is over stays.
    RecordKept,
    /// 17: adoption makes a second machine beside the one that is there.
    SecondMachine,
    /// 17: the first sweep after a start takes the machines of adopted jobs for nobody's.
    AdoptedReaped,
    /// 18: the boot deadline comes ten times too early.
    BootDeadlineEarly,
    /// 18: a guest that never asks for its job is waited for until the job's own end.
    BootDeadlineNever,
    /// 18: a running guest may be silent for ever.
    SilenceNever,
    /// 18: a guest counts as silent since ever when the daemon comes back.
    SilenceWhileAway,
    /// 18: a job's timeout ends nothing.
    CapIgnored,
    /// 18: a guest that was told to end, or has said its last word, may live as long as it likes.
    GraceNeverOver,
    /// 18: nobody looks at the hypervisor's list when it is newer: a paused machine goes unnoticed.
    ListIgnored,
    /// 19: after an outage of GitLab it is minutes until the next poll.
    LateAfterOutage,
    /// 20: GitLab's word on when to come back is not heard.
    RetryAfterIgnored,
    /// 20: what has failed, or had no answer for us, is tried again at once, and again.
    RetryStorm,
    /// 22: the jitter of a pause is the operating system's.
    OwnDice,
}

#[cfg(any(test, feature = "test-util"))]
static ON: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(NONE);

/// No bug has this number.
#[cfg(any(test, feature = "test-util"))]
const NONE: u8 = u8::MAX;

/// Whether this bug is switched on.
#[cfg(not(any(test, feature = "test-util")))]
#[inline]
pub(crate) const fn on(_: Bug) -> bool {
    false
}

/// Whether this bug is switched on.
#[cfg(any(test, feature = "test-util"))]
pub(crate) fn on(bug: Bug) -> bool {
    ON.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// Switches one bug on, and the one before it off; `None`: all off.
#[cfg(any(test, feature = "test-util"))]
pub fn plant(bug: Option<Bug>) {
    ON.store(bug.map_or(NONE, |bug| bug as u8), std::sync::atomic::Ordering::Relaxed);
}

/// For [`Bug::PayloadRewritten`]: the same JSON, but not the same bytes.
pub(crate) fn rewritten(raw: &bytes::Bytes) -> bytes::Bytes {
    let parsed = serde_json::from_slice::<serde_json::Value>(raw);
    parsed.map_or_else(|_| raw.clone(), |value| format!("{value:#}").into())
}
