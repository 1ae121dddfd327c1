//! Everything that is seen of a run, as it happens: what passes the seams, what guests and VMs do, what is done to
//! the daemon. The checkers judge these, and with `--seed` they are written down.

use crate::kinds::Kind;
use dayfly::gitlab::JobId;
use dayfly::vm::VmSpec;
use dayfly_doubles::fake::Op;
use dayfly_exec::standin::{Job, Route};
use http::{HeaderMap, Uri};
use std::fmt;
use std::path::Path;

/// One event.
#[derive(Clone, Copy)]
pub(crate) enum Event<'a> {
    /// The daemon sends a request to GitLab.
    Request(Request<'a>),
    /// GitLab's answer reaches the daemon.
    Answer(Answer<'a>),
    /// The whole body of a 201 to a poll has reached the daemon.
    Assigned { job: JobId, payload: &'a [u8] },
    /// A 201 to a poll did not reach it whole.
    AssignedInVain { job: JobId },
    /// A call of the file layer has ended.
    File { op: FileOp, path: &'a Path, bytes: &'a [u8], ok: bool },
    /// A call to the hypervisor begins.
    Calls { op: Op, subject: &'a str, spec: Option<&'a VmSpec> },
    /// It has ended.
    Called { op: Op, subject: &'a str, ok: bool },
    /// What a VM did, or what was done to it: `started`, `destroyed`, `crashed`…; or to its overlay, by path.
    Vm { name: &'a str, word: &'a str },
    /// What a guest knows.
    Guest { vm: &'a str, job: JobId, does: GuestDoes<'a> },
    /// What is done to the daemon, and what it does.
    Daemon(DaemonDoes),
    /// A fault.
    Fault(Kind),
    /// GitLab's copy of a job; `last`: when all is over.
    Held { job: &'a Job, last: bool },
}

/// A request to GitLab.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) route: Route,
    pub(crate) job: Option<JobId>,
    pub(crate) uri: &'a Uri,
    pub(crate) headers: &'a HeaderMap,
    /// Empty for uploads, which stream.
    pub(crate) body: &'a [u8],
    /// Of a PUT.
    pub(crate) update: Option<&'a Update>,
    /// Of a PATCH.
    pub(crate) offset: Option<u64>,
}

/// What a PUT says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Update {
    pub(crate) state: String,
    pub(crate) reason: Option<String>,
    pub(crate) exit_code: Option<i64>,
    /// Checksum and size.
    pub(crate) trace: Option<(String, u64)>,
}

/// An answer of GitLab's.
#[derive(Clone, Copy)]
pub(crate) struct Answer<'a> {
    pub(crate) route: Route,
    pub(crate) job: Option<JobId>,
    /// `None`: none came.
    pub(crate) status: Option<u16>,
    pub(crate) headers: Option<&'a HeaderMap>,
    pub(crate) update: Option<&'a Update>,
    /// The runner token or job token that the request showed.
    pub(crate) shown: &'a str,
    /// A fault was put on it.
    pub(crate) faulted: bool,
}

/// Calls of the file layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileOp {
    Read,
    ReadAt,
    Replace,
    WriteAt,
    Sync,
    Length,
    CreateDir,
    Remove,
    Rename,
    List,
    FreeBytes,
}

/// What a guest does or learns.
#[derive(Clone, Copy)]
pub(crate) enum GuestDoes<'a> {
    /// Bytes that came to it, whatever they are.
    Reads(&'a [u8]),
    /// Its config: line and pass.
    Configured { pass: &'a str },
    /// The door has taken its greeting.
    Greeted,
    /// It holds a payload; `spoke`: it had already spoken for its job.
    Payload { bytes: &'a [u8], spoke: bool },
    /// It has printed this.
    Prints(&'a [u8]),
    /// The door has taken its trace up to here.
    Taken(usize),
    /// The door has answered a call for its job.
    Spoke,
    /// It asks for something that is no news of its job, which its daemon counts as a sign of life all the same.
    Calls,
    /// It runs its script.
    Works,
    /// It sends a verdict.
    Verdict { state: &'a str, reason: Option<&'a str> },
    /// The door has taken it: 200.
    VerdictTaken { state: &'a str },
    /// It begins an upload of so many bytes, or a download: GitLab may hear of it.
    Transfers { uploads: Option<usize> },
    /// An upload ended; whether GitLab has it.
    Uploaded { bytes: usize, status: Option<u16> },
    /// It is told that its job is over or being canceled.
    Told { over: bool },
    /// Something came back that must not: the checker's number and the sentence.
    Wrong { invariant: u8, what: &'a str },
}

/// What is done to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DaemonDoes {
    /// A life begins.
    Starts,
    /// Its start is done: pollers run.
    Runs,
    /// It would not start.
    Refuses,
    /// It is dead, killed.
    Dies,
    /// SIGTERM.
    HandsOver,
    /// SIGQUIT.
    Drains,
    /// The second signal of a drain.
    Ends,
    /// It has ended by itself, as it was asked to.
    Gone,
    /// `dayfly kill`.
    Kills(JobId),
    /// The host has rebooted.
    Rebooted,
    /// This record was damaged by hand.
    Damaged(JobId),
    /// Somebody cancels, erases or deletes.
    Users(JobId, &'static str),
    /// GitLab, or libvirt, or the disk is down from now on, or up again.
    Trouble(Trouble, bool),
}

/// What may be down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    /// GitLab answers nothing of use.
    Gitlab,
    /// libvirt does not answer.
    Libvirt,
    /// Files cannot be written, or disk is short.
    Disk,
    /// No daemon runs.
    Daemon,
    /// The image is gone.
    Image,
}

impl fmt::Debug for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request(r) => {
                let job = r.job.map_or(0, |job| job.0);
                write!(f, "request {:?} job {job} {} bytes offset {:?} {:?}", r.route, r.body.len(), r.offset, r.update)
            }
            Self::Answer(a) => {
                let (job, fault) = (a.job.map_or(0, |job| job.0), if a.faulted { " (fault)" } else { "" });
                let header = |name| a.headers.and_then(|h| h.get(name)).and_then(|v| v.to_str().ok()).unwrap_or("-");
                write!(
                    f,
                    "answer {:?} job {job}: {:?}{fault} {} {}",
                    a.route,
                    a.status,
                    header("job-status"),
                    header("range")
                )
            }
            Self::Assigned { job, payload } => write!(f, "assigned job {job}, {} bytes", payload.len()),
            Self::AssignedInVain { job } => write!(f, "assigned job {job}, but its payload did not arrive"),
            Self::File { op, path, bytes, ok } => {
                write!(f, "file {op:?} {} {} bytes{}", path.display(), bytes.len(), if *ok { "" } else { " FAILED" })
            }
            Self::Calls { op, subject, .. } => write!(f, "call {op:?} {subject}"),
            Self::Called { op, subject, ok } => write!(f, "done {op:?} {subject}{}", if *ok { "" } else { " FAILED" }),
            Self::Vm { name, word } => write!(f, "VM {name} {word}"),
            Self::Guest { vm, job, does } => write!(f, "guest {vm} of job {job} {does:?}"),
            Self::Daemon(does) => write!(f, "daemon {does:?}"),
            Self::Fault(kind) => write!(f, "FAULT {kind:?}: {} ({})", kind.words(), kind.ids()),
            Self::Held { job, .. } => {
                let (state, reason, bytes) = (job.state, &job.failure_reason, job.trace.bytes.len());
                write!(f, "GitLab holds job {} {state:?} {reason:?} {bytes} bytes", job.id)
            }
        }
    }
}

impl fmt::Debug for GuestDoes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reads(bytes) => write!(f, "reads {} bytes", bytes.len()),
            Self::Configured { .. } => f.write_str("has its config"),
            Self::Greeted => f.write_str("has shown its pass"),
            Self::Payload { bytes, spoke } => write!(f, "holds a payload of {} bytes, spoke: {spoke}", bytes.len()),
            Self::Prints(bytes) => write!(f, "prints {} bytes", bytes.len()),
            Self::Taken(end) => write!(f, "knows its trace taken up to {end}"),
            Self::Spoke => f.write_str("was answered"),
            Self::Calls => f.write_str("calls"),
            Self::Works => f.write_str("runs its script"),
            Self::Verdict { state, reason } => write!(f, "says {state} {reason:?}"),
            Self::VerdictTaken { state } => write!(f, "knows its verdict {state} taken"),
            Self::Transfers { uploads: None } => f.write_str("begins a transfer"),
            Self::Transfers { uploads: Some(bytes) } => write!(f, "begins an upload of {bytes} bytes"),
            Self::Uploaded { bytes, status } => write!(f, "has uploaded {bytes} bytes: {status:?}"),
            Self::Told { over } => write!(f, "is told that its job is {}", if *over { "over" } else { "canceling" }),
            Self::Wrong { what, .. } => write!(f, "meets what must not be: {what}"),
        }
    }
}
