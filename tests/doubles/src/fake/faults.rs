//! What goes wrong in the fake, and when: asked once per call, before it has any effect.

use dayfly::vm::VmName;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// A call of [`Hypervisor`](dayfly::vm::Hypervisor), or of the [`Paths`](dayfly::vm::paths::Paths) beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the traits document their calls")]
pub enum Op {
    Probe,
    CreateOverlay,
    RemoveOverlay,
    ListOverlays,
    Start,
    Freeze,
    GoOn,
    State,
    Destroy,
    List,
    OpenChannel,
    OpenDoor,
    OpenShell,
    OpenConsole,
    RemoveSockets,
    Listen,
    BeginEgress,
    ReadAudit,
    EndEgress,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Probe,
        Self::CreateOverlay,
        Self::RemoveOverlay,
        Self::ListOverlays,
        Self::Start,
        Self::Freeze,
        Self::GoOn,
        Self::State,
        Self::Destroy,
        Self::List,
        Self::OpenChannel,
        Self::OpenDoor,
        Self::OpenShell,
        Self::OpenConsole,
        Self::RemoveSockets,
        Self::Listen,
        Self::BeginEgress,
        Self::ReadAudit,
        Self::EndEgress,
    ];

    /// What a connection to this socket is, and of which VM.
    #[must_use]
    pub fn of_socket(socket: &Path) -> Option<(Self, VmName)> {
        let op = match socket.extension()?.to_str()? {
            "guest" => Self::OpenChannel,
            "door" => Self::OpenDoor,
            "shell" => Self::OpenShell,
            "con" => Self::OpenConsole,
            _ => return None,
        };
        Some((op, VmName::parse(socket.file_stem()?.to_str()?)?))
    }

    /// The trait's deadline for it.
    #[must_use]
    pub fn deadline(self) -> Duration {
        Duration::from_secs(match self {
            Self::Freeze => 120,
            Self::CreateOverlay | Self::Start => 60,
            Self::Probe | Self::Destroy => 30,
            _ => 10,
        })
    }

    /// Whether libvirtd has a hand in it; the others are files and sockets.
    #[must_use]
    pub fn needs_libvirtd(self) -> bool {
        matches!(self, Self::Probe | Self::Start | Self::Freeze | Self::GoOn | Self::State | Self::Destroy | Self::List)
    }

    /// The call in words, as errors say it.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::CreateOverlay => "create overlay",
            Self::RemoveOverlay => "remove overlay",
            Self::ListOverlays => "list overlays in",
            Self::Start => "start VM",
            Self::Freeze => "freeze VM",
            Self::GoOn => "go on with VM",
            Self::State => "read state of VM",
            Self::Destroy => "destroy VM",
            Self::List => "list VMs of",
            Self::OpenChannel => "open channel of VM",
            Self::OpenDoor => "open door's port of VM",
            Self::OpenShell => "open shell's port of VM",
            Self::OpenConsole => "open console of VM",
            Self::RemoveSockets => "remove sockets of VM",
            Self::Listen => "listen at",
            Self::BeginEgress => "begin the egress of VM",
            Self::ReadAudit => "read the audit of VM",
            Self::EndEgress => "end the egress of VM",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// How a call fails. Calls that return an `io::Error` fail with that, at once, whatever the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Refused with these words, after the time that the call takes.
    Refused(&'static str),
    /// Nobody answers: at once, without effect.
    Unreachable,
    /// No answer within the call's deadline, and no effect.
    Hangs,
    /// It takes effect, and no answer comes within the deadline.
    HangsAfterEffect,
    /// It takes effect, and the connection breaks before the answer.
    AnswerLost,
}

/// Picks the fault of a call from its kind and its subject (VM name, path, address).
type Judge = Box<dyn FnMut(Op, &str) -> Option<Fault> + Send>;

/// The fake's plan.
#[derive(Default)]
pub(super) struct Faults {
    calls: u64,
    calls_of: BTreeMap<Op, u64>,
    at_call: BTreeMap<u64, Fault>,
    at_call_of: BTreeMap<(Op, u64), Fault>,
    always: BTreeMap<(Op, Option<String>), Fault>,
    judge: Option<Judge>,
}

impl Faults {
    pub(super) fn calls(&self) -> u64 {
        self.calls
    }

    pub(super) fn at_call(&mut self, n: u64, fault: Fault) {
        self.at_call.insert(self.calls + n, fault);
    }

    pub(super) fn at_call_of(&mut self, op: Op, n: u64, fault: Fault) {
        let past = self.calls_of.get(&op).copied().unwrap_or(0);
        self.at_call_of.insert((op, past + n), fault);
    }

    pub(super) fn always(&mut self, op: Op, subject: Option<String>, fault: Fault) {
        self.always.insert((op, subject), fault);
    }

    pub(super) fn judge(&mut self, judge: Judge) {
        self.judge = Some(judge);
    }

    pub(super) fn heal(&mut self) {
        *self = Self { calls: self.calls, calls_of: std::mem::take(&mut self.calls_of), ..Self::default() };
    }

    /// Counts one call and says how it is to fail.
    pub(super) fn next(&mut self, op: Op, subject: &str) -> Option<Fault> {
        self.calls += 1;
        let nth = self.calls_of.entry(op).or_default();
        *nth += 1;
        let nth = *nth;
        let at_call = self.at_call.remove(&self.calls);
        let at_call_of = self.at_call_of.remove(&(op, nth));
        let always = self.always.get(&(op, Some(subject.to_owned()))).or_else(|| self.always.get(&(op, None))).copied();
        let judged = self.judge.as_mut().and_then(|judge| judge(op, subject));
        at_call.or(at_call_of).or(always).or(judged)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("calls", &self.calls).finish_non_exhaustive()
    }
}
