//! How often may a guest fill the log? What it can repeat is logged ten times, then counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// As often as this a line of one kind tells something new.
const LOGGED_MAX: u64 = 10;

/// One kind of line about one job. When it is dropped, with its job or its door, the log is told how often there was
/// reason for it, if that was more often than it was logged.
#[derive(Debug)]
pub(crate) struct Repeats {
    line: &'static str,
    times: AtomicU64,
}

impl Repeats {
    /// For lines that say this.
    pub(crate) const fn new(line: &'static str) -> Self {
        Self { line, times: AtomicU64::new(0) }
    }

    /// Counts one more, and has it logged if it is one of the first.
    pub(crate) fn log(&self, log: impl FnOnce(&'static str)) {
        if self.is_news() {
            log(self.line);
        }
    }

    /// Counts one more; whether it is one of the first.
    pub(crate) fn is_news(&self) -> bool {
        self.times.fetch_add(1, Ordering::Relaxed) < LOGGED_MAX
    }
}

impl Drop for Repeats {
    fn drop(&mut self) {
        let times = *self.times.get_mut();
        if times > LOGGED_MAX {
            tracing::warn!(line = self.line, times, "of these lines the log has the first ten only");
        }
    }
}
