//! Who carries what a machine without a network card sends out? One process for each, `dayfly-egress`, which outlives us
//! as the machine's QEMU does (decision D27): a seam, so that a whole daemon runs without processes.
//!
//! Its life is a lock: it holds its audit file `df-<id>.audit`, beside the VM's sockets, from before it begins to its last
//! moment, whoever started it and whatever became of that one; no number of a process is ever taken for it. It ends
//! with its VM, whose port then hangs up. Used by `supply`, which has it started, again if it dies, and looks at its end.

mod holders;
mod host;
mod process;

pub use process::{EgressProcesses, PROGRAM, SERVICE_SOCKET};

use crate::BoxFuture;
use crate::vm::{VmId, VmSpec};
use dayfly_egress::HandOverError;
use dayfly_egress::audit::Destination;
use dayfly_egress::policy::Policy;
use dayfly_guest_config::Pass;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// Whose egress is meant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EgressOf {
    /// Where the VM's sockets are.
    pub socket_dir: PathBuf,
    /// The VM.
    pub vm: VmId,
}

impl EgressOf {
    /// The socket of the VM's port.
    #[must_use]
    pub fn port(&self) -> PathBuf {
        VmSpec::egress_socket(&self.socket_dir, &self.vm)
    }

    /// Where it is written down what was reached. Named as the VM's sockets are, so it goes with them.
    #[must_use]
    pub fn audit(&self) -> PathBuf {
        self.socket_dir.join(format!("df-{}.audit", self.vm))
    }
}

/// What a process is told of its VM.
#[derive(Clone)]
pub struct Terms {
    /// The VM's pass; the egress' own follows from it.
    pub pass: Pass,
    /// What its job may reach, by the record. What the host is and how it resolves names is looked up at each start.
    pub policy: Policy,
}

impl fmt::Debug for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terms").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Why nobody carries a VM's egress.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// The VM has no such port, or is gone.
    #[error("connect to the VM's port")]
    Port(#[source] io::Error),
    /// The audit file.
    #[error("open its audit file")]
    Audit(#[source] io::Error),
    /// There is no program.
    #[error(
        "find `{PROGRAM}`: it is neither beside dayfly nor in the system's directories; install it from the package or build that has this dayfly"
    )]
    NoProgram,
    /// It could not be started.
    #[error("start it")]
    Start(#[source] io::Error),
    /// It did not take over.
    #[error("hand the VM over")]
    HandOver(#[from] HandOverError),
}

impl EgressError {
    /// Whether it is the VM that is missing.
    #[must_use]
    pub fn is_of_vm(&self) -> bool {
        matches!(self, Self::Port(_))
    }
}

/// The processes that carry egress. No call blocks the runtime, each has a deadline of its own but [`Egress::gone`], and
/// each may run twice.
pub trait Egress: Send + Sync + 'static {
    /// Has a process carry this VM's egress, unless one does. Deadline 15 s.
    fn ensure<'a>(&'a self, of: &'a EgressOf, terms: &'a Terms) -> BoxFuture<'a, Result<(), EgressError>>;
    /// Waits until none does any more, half a second late at most. Cancel safe.
    fn gone<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, ()>;
    /// What was reached so far; nothing if there has been none.
    fn audit<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<Vec<Destination>>>;
    /// Sees to it that none does any more, now that its VM is gone: one that does not end by itself is killed. Deadline
    /// 10 s.
    fn end<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<()>>;
}
