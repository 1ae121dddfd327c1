//! What a hypervisor tells of a VM: whether it runs, why it stands still, how it ended.
//!
//! Each reason has a name of its own, because each is somebody else's move: an operator's, the
//! host's, the job's. Nothing that a guest can bring about at will is ever named the host's doing
//! (field.md U8, U47, U50).

/// State of a VM as the hypervisor tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// It runs.
    Running,
    /// Its CPUs were stopped, and it may go on where it is.
    Paused(Pause),
    /// It has ended, and this is how. Something of it may be left at the hypervisor (a guest whose kernel panicked is
    /// kept so that it can be told), which [`Hypervisor::destroy`](super::Hypervisor::destroy) removes.
    Ended(Ending),
    /// It is no more, or never was.
    Gone,
}

impl VmState {
    /// How it ended, if it has.
    #[must_use]
    pub fn ending(self) -> Option<Ending> {
        match self {
            Self::Ended(ending) => Some(ending),
            Self::Gone => Some(Ending::Unseen),
            Self::Running | Self::Paused(_) => None,
        }
    }
}

/// Why a VM's CPUs stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pause {
    /// The host's disk could not be read or written (`error_policy='stop'`).
    Disk,
    /// Somebody at the host asked for it: `virsh suspend`, `save`, `dump` or a snapshot.
    Operator,
    /// QEMU stopped it of its own accord: an internal error of KVM is told like this.
    Itself,
}

impl Pause {
    /// Why, in words for operators.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Disk => "QEMU stopped the machine: the host's disk failed or is full",
            Self::Operator => "somebody at the host paused the machine",
            Self::Itself => "QEMU stopped the machine's CPUs by itself, as at an internal error of KVM",
        }
    }
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// Nobody saw it: the hypervisor was away, or does not tell.
    Unseen,
    /// Its guest powered it off.
    PoweredOff,
    /// Its guest reset it, which ends it.
    Restarted,
    /// Its guest's kernel panicked.
    Panicked,
    /// Its guest put it to sleep, and nobody will wake it.
    Slept,
    /// Its watchdog found that the guest hangs.
    Hung,
    /// Somebody at the host ended it: `virsh destroy`, or a signal to its process.
    Destroyed,
    /// Its process ended without a word: it crashed, or was killed.
    Died,
}

impl Ending {
    /// How, in words for operators.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Unseen => "the machine ended, and nobody saw how",
            Self::PoweredOff => "its guest powered the machine off",
            Self::Restarted => "its guest restarted the machine",
            Self::Panicked => "the kernel of the machine's guest panicked",
            Self::Slept => "its guest put the machine to sleep",
            Self::Hung => "the machine's watchdog found its guest hanging",
            Self::Destroyed => "somebody at the host ended the machine",
            Self::Died => "the machine's QEMU process ended without a word: it crashed, or was killed",
        }
    }

    /// Whether no guest can bring this about at will: such ends tell something of the host.
    #[must_use]
    pub fn is_the_hosts(self) -> bool {
        self == Self::Died
    }
}
