//! How long a job is in memory only: from the last byte of GitLab's 201 to the journal, as the daemons log it.

use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Between two looks at the disk itself.
const DISK_PAUSE: Duration = Duration::from_millis(400);

/// The member of the daemon's log line.
const MEMBER: &str = "\"journal_ms\":";

/// The message of that line.
pub(crate) const SAID: &str = "the job is in the journal";

/// Milliseconds of all jobs that this log tells of.
pub(crate) fn of_log(log: &str) -> Vec<f64> {
    let number = |rest: &str| rest.split([',', '}']).next()?.trim().parse().ok();
    log.lines().filter_map(|line| number(line.split_once(MEMBER)?.1)).collect()
}

/// The figures, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) count: usize,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Figures {
    pub(crate) fn of(all: &[f64]) -> Self {
        let mut sorted = all.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)));
        let at = |percent| at(percent).copied().unwrap_or_default();
        Self { count: sorted.len(), p50: at(50), p99: at(99), max: at(100) }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, p50, p99, max } = self;
        write!(f, "median {p50:.2} ms, p99 {p99:.2} ms, longest {max:.2} ms ({count} times)")
    }
}

/// What one fsync of this disk takes meanwhile, milliseconds, into `taken` for ever: a record needs at least two.
pub(crate) async fn watch_disk(directory: &Path, taken: impl Fn(f64)) -> io::Result<()> {
    let path = directory.join("fsync");
    loop {
        let path = path.clone();
        let written = tokio::task::spawn_blocking(move || {
            let since = Instant::now();
            let mut file = File::create(path)?;
            file.write_all(b"as much as nothing")?;
            file.sync_all()?;
            Ok::<_, io::Error>(since.elapsed())
        });
        taken(written.await.map_err(io::Error::other)??.as_secs_f64() * 1000.0);
        sleep(DISK_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_each_jobs_window_and_the_figures_are_of_all() {
        let log = "{\"level\":\"INFO\",\"journal_ms\":1.5,\"message\":\"x\"}\nno JSON\n{\"journal_ms\":3}\n{\"journal_ms\":2.5}\n";
        assert_eq!(of_log(log), [1.5, 3.0, 2.5]);
        assert_eq!(Figures::of(&of_log(log)), Figures { count: 3, p50: 2.5, p99: 3.0, max: 3.0 });
        assert_eq!(Figures::of(&[]), Figures::default());
    }
}
