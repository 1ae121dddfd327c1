//! Blocking threads that talk to libvirtd, so that nothing else waits for it.
//!
//! Each thread owns a connection of its own, made when it first has work: one call that hangs
//! holds one thread and nothing else (threats.md H4). There are at most 16 of them, and calls that
//! are the same (the same words about the same VM) never run side by side, so a VM that cannot be
//! destroyed holds one thread however often that is tried (V14). No handle of libvirt leaves its
//! thread, for dropping one may panic; panics are caught here.
//!
//! ```text
//! caller ── queue (256) ──► thread: connect? ── call ──► reply
//!    │                        └ connection lost: connect again, call again, once
//!    └ 10 s for a connection, then the call's own deadline
//! ```
//!
//! A call may be repeated after a lost connection, so all calls of ours are written to be.

use super::calls::{CallError, Link};
use crate::vm::VmError;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Threads at most. libvirtd runs 20 calls at once by default.
const THREADS_MAX: usize = 16;

/// Calls that wait for a thread. The daemon has a few per VM at most; more means that libvirtd
/// hangs, and then waiting longer helps nobody.
const QUEUE_MAX: usize = 256;

/// For a thread and a connection. In session mode it includes the start of a libvirtd (64 ms).
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// An idle thread ends, and its connection with it.
const IDLE: Duration = Duration::from_secs(60);

/// How far a call has come, for the words of its deadline.
const QUEUED: u8 = 0;
const CONNECTING: u8 = 1;
const CALLING: u8 = 2;

/// What is said when libvirtd cannot be reached in time.
#[derive(Debug, thiserror::Error)]
#[error("no connection within {} s", CONNECT_DEADLINE.as_secs())]
struct NoConnection;

type Work = Box<dyn FnOnce(&mut Thread, &AtomicU8) + Send>;

struct Job {
    key: (&'static str, String),
    phase: Arc<AtomicU8>,
    /// Calls on the thread, and replies.
    work: Work,
    /// Whether the caller has gone.
    abandoned: Box<dyn Fn() -> bool + Send>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    under_way: BTreeSet<(&'static str, String)>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Queue {
    /// The oldest job that somebody waits for and that is not under way already.
    fn next(&mut self) -> Option<Job> {
        self.jobs.retain(|job| !(job.abandoned)());
        let i = self.jobs.iter().position(|job| !self.under_way.contains(&job.key))?;
        let job = self.jobs.remove(i)?;
        self.under_way.insert(job.key.clone());
        Some(job)
    }
}

struct Shared {
    uri: String,
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool. Dropping it lets its threads end after the calls that they are in.
pub(super) struct Workers(Arc<Shared>);

impl Drop for Workers {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.changed.notify_all();
    }
}

impl Workers {
    pub(super) fn new(uri: &str) -> Self {
        Self(Arc::new(Shared { uri: uri.to_owned(), queue: Mutex::default(), changed: Condvar::new() }))
    }

    /// Runs `call` on a thread, again if the connection breaks under it. `what` and `name` are the
    /// words of its errors, and tell same calls.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        name: String,
        deadline: Duration,
        call: impl Fn(&mut Link) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, VmError> {
        let no_answer = |after: Duration| VmError::late(what, &name, after);
        let unreachable = |source| VmError::Unreachable { uri: self.0.uri.clone(), source };
        let (reply, answer) = oneshot::channel();
        let (connected, connection) = oneshot::channel();
        let reply = Arc::new(Mutex::new(Some(reply)));
        let listener = Arc::clone(&reply);
        let phase = Arc::new(AtomicU8::new(QUEUED));
        let job = Job {
            key: (what, name.clone()),
            phase: Arc::clone(&phase),
            work: Box::new(move |thread, phase| {
                let result = thread.run(&call, phase, connected);
                if let Some(reply) = reply.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    // The caller may have given up; what was done is found again by looking.
                    let _ = reply.send(result);
                }
            }),
            abandoned: Box::new(move || {
                let reply = listener.lock().unwrap_or_else(PoisonError::into_inner);
                reply.as_ref().is_none_or(oneshot::Sender::is_closed)
            }),
        };
        self.submit(job).map_err(unreachable)?;

        // A thread that fails to connect drops the signal and replies, so both ends are followed by the answer.
        if timeout(CONNECT_DEADLINE, connection).await.is_err() {
            let connecting = phase.load(Ordering::Relaxed) == CONNECTING;
            return Err(if connecting { unreachable(NoConnection.into()) } else { no_answer(CONNECT_DEADLINE) });
        }
        match timeout(deadline, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(CallError::Refused(source)))) => Err(VmError::Refused { what, name, source }),
            Ok(Ok(Err(CallError::Unreachable(source)))) => Err(unreachable(source)),
            Ok(Err(_gone)) => Err(unreachable("the thread that called is gone".into())),
            Err(_elapsed) => Err(no_answer(deadline)),
        }
    }

    fn submit(&self, job: Job) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut queue = self.0.queue();
        queue.jobs.retain(|job| !(job.abandoned)());
        if queue.jobs.len() >= QUEUE_MAX {
            return Err(format!("{QUEUE_MAX} calls wait already").into());
        }
        if queue.idle <= queue.jobs.len() && queue.threads < THREADS_MAX {
            let shared = Arc::clone(&self.0);
            let spawned = thread::Builder::new().name("libvirt".into()).spawn(move || serve(&shared));
            match spawned {
                Ok(_detached) => queue.threads += 1,
                // One of the others will do it.
                Err(_) if queue.threads > 0 => {}
                Err(error) => return Err(error.into()),
            }
        }
        queue.jobs.push_back(job);
        // All, for the one that is woken may find this job's like under way, and another job free.
        self.0.changed.notify_all();
        Ok(())
    }
}

/// One thread: jobs until there are none for [`IDLE`].
fn serve(shared: &Shared) {
    let mut thread = Thread { uri: shared.uri.clone(), link: None };
    let mut queue = shared.queue();
    loop {
        if let Some(job) = queue.next() {
            drop(queue);
            (job.work)(&mut thread, &job.phase);
            queue = shared.queue();
            queue.under_way.remove(&job.key);
            shared.changed.notify_all();
            continue;
        }
        if queue.closed {
            break;
        }
        queue.idle += 1;
        let (woken, waited) = shared.changed.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
        queue = woken;
        queue.idle -= 1;
        if waited.timed_out() && queue.jobs.is_empty() {
            break;
        }
    }
    queue.threads -= 1;
    drop(queue);
    thread.disconnect();
}

/// A thread's own: its connection.
struct Thread {
    uri: String,
    link: Option<Link>,
}

impl Thread {
    fn run<T>(
        &mut self,
        call: &impl Fn(&mut Link) -> Result<T, CallError>,
        phase: &AtomicU8,
        connected: oneshot::Sender<()>,
    ) -> Result<T, CallError> {
        phase.store(CONNECTING, Ordering::Relaxed);
        let kept = self.link.is_some();
        self.connect()?;
        phase.store(CALLING, Ordering::Relaxed);
        let _ = connected.send(());
        match self.attempt(call) {
            // A kept connection may have died of old age, or of libvirtd's restart; a new one that
            // dies at once tells of deeper trouble.
            Err(_) if self.link.is_none() && kept => {
                self.connect()?;
                self.attempt(call)
            }
            result => result,
        }
    }

    fn connect(&mut self) -> Result<(), CallError> {
        if self.link.is_none() {
            self.link = Some(guarded(|| Link::open(&self.uri))?);
        }
        Ok(())
    }

    /// One call. Afterwards there is a connection exactly if it can be used again.
    fn attempt<T>(&mut self, call: &impl Fn(&mut Link) -> Result<T, CallError>) -> Result<T, CallError> {
        let Some(link) = &mut self.link else { return Err(CallError::Unreachable("not connected".into())) };
        let result = guarded(|| call(link));
        if let Err(error) = result {
            if guarded(|| Ok(link.is_alive())).unwrap_or(false) {
                return Err(error);
            }
            self.disconnect();
            return Err(match error {
                CallError::Refused(source) | CallError::Unreachable(source) => CallError::Unreachable(source),
            });
        }
        result
    }

    fn disconnect(&mut self) {
        let link = self.link.take();
        // Closing a connection that is broken may panic in the binding; it is gone either way.
        let _ = guarded(|| {
            drop(link);
            Ok(())
        });
    }
}

/// Turns a panic of the binding into an error.
fn guarded<T>(work: impl FnOnce() -> Result<T, CallError>) -> Result<T, CallError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(CallError::Refused(io::Error::other("the libvirt binding panicked").into())))
}

#[cfg(test)]
mod tests;
