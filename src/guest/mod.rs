//! What may a guest say to us? The door: one for each VM, the pass, then HTTP.
//!
//! It is behind the VM's own wire, whose sessions begin with proofs of the pass ([`sessions`]), or, for guests of the
//! contract before, at a port, where each connection begins with a greeting ([`greeting`]).
//!
//! The guest is hostile from its first instruction. Nothing is read as HTTP before the pass was shown;
//! every size, count and duration has a limit ([`Limits`]); a guest can name only its own job.
//! PATCH and PUT end here, in spool and outbox; artifacts stream through `gitlab::JobClient`.
//! This module knows no runner token. Used by `job`, which owns the pass.

mod answer; // what does a guest get to read?
mod artifacts; // the routes that go on to GitLab
mod body; // how much, how fast?
mod cache; // the store of `cache:`
mod chunks; // where does a chunked body end?
mod door; // who comes in?
mod forward; // what else of this host does it reach?
mod greeting; // is it our guest's relay?
mod handler; // may it, and who answers?
mod head; // is this head one that we serve?
mod limits; // how often?
mod outage; // when to come again, if GitLab fails?
mod routes; // what is asked for?
mod sessions; // who is at the other end of the wire, and who after that?
mod trace; // PATCH
mod update; // PUT
mod wire; // the bytes between connection and hyper

/// What reads a guest's bytes: any bytes (`dayfly_doubles::fuzzing` tries them).
pub mod readers {
    pub use super::artifacts::{request_headers, response_headers};
    pub use super::body::object;
    pub use super::chunks::{BadChunk, Chunks};
    pub use super::greeting::{Failure, greet};
    pub use super::handler::RunnerRequest;
    pub use super::head::{FIELDS_MAX, Framing, HEAD_BYTES_MAX, Refusal, Scan, TARGET_BYTES_MAX, check, scan};
    pub use super::routes::{BadQuery, JobRoute, NoRoute, Query, Route, route};
    pub use super::trace::{content_range, parse_content_range};
    pub use super::update::{Said, Update};
    pub use super::wire::{Active, Notes, Times, Wire};
}

use crate::cache::JobCache;
use crate::clock::Clock;
use crate::gitlab::{Dependency, JobClient, JobId, JobStatus, RunnerInfo, Verdict};
use crate::metrics::Metrics;
use crate::network::{Entrance, Forward};
use crate::rng::Rng;
use crate::secret::Secret;
use crate::spool::SpoolWriter;
use crate::vm::VmId;
use bytes::Bytes;
use dayfly_guest_config::Pass;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

/// Limits towards a guest (threats.md §6.5). Configuration, so that tests can use short ones.
#[derive(Clone, Debug)]
pub struct Limits {
    /// One try to begin a session of the wire: a guest that boots does not answer, and is spoken to again.
    pub handshake: Duration,
    /// The whole greeting, from the accept.
    pub greeting: Duration,
    /// Connections that have not shown the pass; the oldest is closed first.
    pub greeting_connections: usize,
    /// Connections after the greeting.
    pub connections: usize,
    /// A request's head.
    pub head: Duration,
    /// Longest pause in a body, either way.
    pub stall: Duration,
    /// An idle kept-alive connection.
    pub idle: Duration,
    /// A local request in all (PATCH, PUT).
    pub local_total: Duration,
    /// An artifact transfer in all.
    pub transfer_total: Duration,
    /// Longest hold of a poll.
    pub poll_hold: Duration,
    /// Requests a second, and their burst.
    pub requests_per_second: u32,
    /// See `requests_per_second`.
    pub requests_burst: u32,
    /// Requests a second that go on to GitLab, and their burst: its limits per address are the daemon's own, too.
    pub forwards_per_second: u32,
    /// See `forwards_per_second`.
    pub forwards_burst: u32,
    /// Trace bytes a second, and their burst.
    pub trace_bytes_per_second: u64,
    /// See `trace_bytes_per_second`.
    pub trace_bytes_burst: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1024 * 1024;
        Self {
            handshake: Duration::from_secs(30),
            greeting: Duration::from_secs(5),
            greeting_connections: 16,
            connections: 64,
            head: Duration::from_secs(10),
            stall: Duration::from_secs(60),
            idle: Duration::from_secs(75),
            local_total: Duration::from_secs(60),
            transfer_total: Duration::from_secs(3600),
            poll_hold: Duration::from_secs(20),
            requests_per_second: 50,
            requests_burst: 100,
            // Two jobs' worth of dependencies at once; 120 a minute is less than GitLab grants one job.
            forwards_per_second: 2,
            forwards_burst: 60,
            trace_bytes_per_second: 32 * MIB,
            trace_bytes_burst: 64 * MIB,
        }
    }
}

/// Everything that a door needs to serve one VM.
pub struct Admission {
    /// The VM.
    pub vm: VmId,
    /// Where its connections come from; a port is bound already.
    pub entrance: Entrance,
    /// What each session, or each connection to a port, must prove.
    pub pass: Pass,
    /// What `jobs/request` and `verify` must carry.
    pub guest_token: Secret,
    /// Its job.
    pub job: JobId,
    /// What all job routes must carry.
    pub job_token: Secret,
    /// Other jobs whose artifacts it may fetch.
    pub dependencies: Vec<Dependency>,
    /// Where the trace goes.
    pub spool: SpoolWriter,
    /// Where artifacts go.
    pub client: JobClient,
    /// What its job may have of the caches; `None`: there are none.
    pub cache: Option<JobCache>,
    /// What else its machine reaches by its wire.
    pub forwards: Vec<Forward>,
    /// Whether `direct_download=true` may reach GitLab (and its 302 the guest).
    pub direct_download: bool,
    /// What the guest does; the job listens. Bounded; the door waits for room.
    pub events: mpsc::Sender<GuestEvent>,
    /// What the job knows; the door passes it on with the guest's next call.
    pub view: watch::Receiver<GuestView>,
    /// Limits.
    pub limits: Limits,
    /// Source of the greeting's nonces.
    pub rng: Rng,
    /// Wall time, for the dates in GitLab's answers.
    pub clock: Clock,
    /// What the door counts.
    pub metrics: Metrics,
}

/// What a door must know of the job, at any time.
#[derive(Clone, Debug)]
pub struct GuestView {
    /// GitLab's newest word on the job.
    pub status: JobStatus,
    /// The job has a verdict: PATCH and a different final PUT get 403, polls 204.
    pub verdict: Option<Verdict>,
    /// `X-GitLab-Trace-Update-Interval` for the guest, whole seconds, 1–3.
    pub update_interval: Duration,
}

/// What a guest did.
#[derive(Debug)]
pub enum GuestEvent {
    /// The pass was proven for the first time: by a session of the wire, or by a connection to a port.
    Greeted,
    /// It asks for its job; the job answers with the payload, or `None` for 204. The door sends
    /// 204 by itself if the answer takes longer than [`Limits::poll_hold`].
    AsksForJob {
        /// `info` of its request, raw: what an image's boot test learns.
        info: Option<RunnerInfo>,
        /// Where the answer goes.
        reply: oneshot::Sender<Option<HandOut>>,
    },
    /// The answer that carried the job was not wholly written, or its connection broke right after,
    /// before the guest sent anything more on it: it may never have been read. A hint for the
    /// second ask (threats.md V5); comes after the [`GuestEvent::AsksForJob`] that it is about.
    HandOutLost,
    /// Any authenticated PUT, PATCH or artifact call of its job: sign of life, sent at most once a second.
    Spoke,
    /// The guest said `debug_trace=true`; sent once.
    DebugTrace,
    /// Its final PUT. The job answers once spool and record are on disk.
    Verdict {
        /// What it says.
        verdict: Verdict,
        /// Where the answer goes.
        reply: oneshot::Sender<VerdictAnswer>,
    },
}

/// The payload to hand out.
#[derive(Clone)]
pub struct HandOut {
    /// The body, whole.
    pub payload: Bytes,
    /// `X-Request-Id` for the answer.
    pub request_id: Option<String>,
}

impl std::fmt::Debug for HandOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The payload is full of secrets.
        write!(f, "HandOut({} bytes)", self.payload.len())
    }
}

/// The job's answer to a final PUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictAnswer {
    /// Taken and on disk (again, if it is the same one): 200.
    Taken,
    /// The job has another end already: 403.
    Over,
    /// It could not be written; ask again: 503 with `Retry-After: 1`.
    Later,
}

/// The owner's handle to the door of one guest. Dropping it closes the wire or the port, and all connections.
pub struct DoorHandle {
    stop: tokio_util::sync::DropGuard,
    served: tokio::task::JoinHandle<()>,
}

impl DoorHandle {
    /// Waits for the serving task to end before its time, which only a bug can do. Cancel safe; not
    /// to be called again once it has returned.
    pub async fn ended_early(&mut self) -> tokio::task::JoinError {
        match (&mut self.served).await {
            Err(error) => error,
            // It ends by the stop alone, which is ours.
            Ok(()) => std::future::pending().await,
        }
    }

    /// Closes the door and waits until no task of it is left.
    pub async fn revoke(self) {
        drop(self.stop);
        // The serving task has no other way to end than the stop; a panic in it is logged by Tokio.
        let _ = self.served.await;
    }
}

/// Opens the door: serves `admission` until the pass is dropped.
#[must_use]
pub fn admit(admission: Admission) -> DoorHandle {
    let stop = CancellationToken::new();
    #[expect(clippy::disallowed_methods, reason = "the one task of this door; it joins all that it starts")]
    let served = tokio::spawn(door::serve(admission, stop.clone()).in_current_span());
    DoorHandle { stop: stop.drop_guard(), served }
}
