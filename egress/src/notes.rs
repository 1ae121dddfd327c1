//! What a process writes into its audit, and when: soon after a change, once for many.

use crate::audit::{Destination, Log};
use crate::policy::Reason;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::sleep;

/// What has changed is written at most so often: a job that has just ended is asked for soon after its last connection.
const FLUSH: Duration = Duration::from_millis(100);

/// And what goes on and on, so often.
const FLUSH_RUNNING: Duration = Duration::from_secs(60);

/// The audit of one VM, shared by all that happens in it.
pub(crate) struct Notes {
    log: RefCell<Log>,
    changed: Notify,
}

impl Notes {
    pub(crate) fn new(log: Log) -> Self {
        Self { log: RefCell::new(log), changed: Notify::new() }
    }

    /// Notes something of what is reached there; where it stands.
    pub(crate) fn note(&self, name: Option<&str>, to: SocketAddr, change: impl FnOnce(&mut Destination)) -> usize {
        let mut log = self.log.borrow_mut();
        let at = log.place(name, to.port(), Some(to.ip()));
        log.note(at, change);
        self.changed.notify_one();
        at
    }

    /// Notes that a name was asked for, and something of the answer withheld.
    pub(crate) fn withheld(&self, name: &str, reason: Reason) {
        let mut log = self.log.borrow_mut();
        let at = log.place(Some(name), 0, None);
        log.note(at, |destination| destination.refuse(reason));
        self.changed.notify_one();
    }

    /// Counts there, to be written now and then.
    pub(crate) fn count(&self, at: usize, change: impl FnOnce(&mut Destination)) {
        self.log.borrow_mut().count(at, change);
    }

    /// To be written soon.
    pub(crate) fn mark(&self, at: usize) {
        self.log.borrow_mut().mark(at);
        self.changed.notify_one();
    }

    /// Writes, for ever. `running`: whether anything is being counted.
    pub(crate) async fn write(&self, running: impl Fn() -> bool) {
        loop {
            tokio::select! {
                () = self.changed.notified() => sleep(FLUSH).await,
                // A stream that begins is a change.
                () = sleep(FLUSH_RUNNING), if running() => self.log.borrow_mut().mark_counted(),
            }
            // What could not be written, as on a full disk, is tried again with the next change, and at the end.
            let _ = self.log.borrow_mut().flush();
        }
    }

    /// Writes what is left.
    pub(crate) fn finish(&self) {
        let mut log = self.log.borrow_mut();
        log.mark_counted();
        let _ = log.flush();
    }
}
