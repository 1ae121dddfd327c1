//! The whole of each job's console, on disk while the job runs and for a while after that: one file a job, of rows that
//! are escaped and without what the job's log masks. Age and bytes are bounded, each file by itself too: of a console
//! that says more the beginning is kept here, and its end with the job's own.

use crate::clock::Clock;
use crate::files::{Files, child, dated_name, is_too_old};
use crate::telemetry::chain;
use crate::vm::console::Rows;
use jiff::Timestamp;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of one console at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What stands for the rest.
const CUT: &str = "[more was printed, and is not kept]\n";

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleBounds {
    /// For how long.
    pub keep: Duration,
    /// Bytes of all files together at most; 0: nothing is kept.
    pub bytes: u64,
}

/// Where consoles are kept. Clones share it.
#[derive(Clone)]
pub struct Consoles {
    files: Arc<dyn Files>,
    clock: Clock,
    directory: PathBuf,
    /// Held for a line.
    bounds: Arc<Mutex<ConsoleBounds>>,
}

/// The file of one job.
#[derive(Debug)]
pub struct ConsoleLog {
    name: String,
    /// Its length; not known before the first row.
    length: Option<u64>,
    cut: bool,
}

impl ConsoleLog {
    /// That of the job that came then; `job` is its name among files. One of before a restart goes on.
    #[must_use]
    pub fn of(received: Timestamp, job: &str) -> Self {
        Self { name: file_name(received, job), length: None, cut: false }
    }
}

fn file_name(received: Timestamp, job: &str) -> String {
    dated_name(received, &format!("{job}.log"))
}

impl Consoles {
    /// Those below this state directory. Nothing is made before there is something to keep.
    #[must_use]
    pub fn new(files: Arc<dyn Files>, clock: Clock, state_directory: &Path, bounds: ConsoleBounds) -> Self {
        Self { files, clock, directory: state_directory.join("consoles"), bounds: Arc::new(Mutex::new(bounds)) }
    }

    fn bounds(&self) -> ConsoleBounds {
        *self.bounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other bounds, from now on.
    pub fn set_bounds(&self, bounds: ConsoleBounds) {
        *self.bounds.lock().unwrap_or_else(PoisonError::into_inner) = bounds;
    }

    /// Keeps these rows, too.
    ///
    /// # Errors
    /// The disk's: they may be tried again.
    pub async fn append(&self, log: &mut ConsoleLog, rows: &Rows) -> io::Result<()> {
        if self.bounds().bytes == 0 || log.cut || (rows.text.is_empty() && rows.lost == 0) {
            return Ok(());
        }
        let path = child(&self.directory, &log.name);
        let length = match log.length {
            Some(length) => length,
            None => {
                self.files.create_dir(&self.directory).await?;
                self.files.length(&path).await?.unwrap_or(0)
            }
        };
        let mut text = String::new();
        if rows.lost > 0 {
            text = format!("[{} bytes were printed too fast, and are left out]\n", rows.lost);
        }
        text.push_str(&rows.text);
        let room = FILE_BYTES_MAX.saturating_sub(CUT.len() as u64);
        let cut = length.saturating_add(text.len() as u64) > room;
        if cut {
            let mut end = usize::try_from(room.saturating_sub(length)).unwrap_or(usize::MAX).min(text.len());
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
            text.push_str(CUT);
        }
        let bytes = text.len() as u64;
        self.files.write_at(&path, length, text.into_bytes().into()).await?;
        (log.length, log.cut) = (Some(length + bytes), cut);
        Ok(())
    }

    /// All that is kept of a job's console; `job` is its name among files. None: nothing is.
    pub async fn find(&self, job: &str) -> Option<String> {
        let ending = format!("-{job}.log");
        let entries = self.files.list(&self.directory).await.ok()?;
        let name = entries.into_iter().rev().map(|entry| entry.name).find(|name| name.ends_with(&ending))?;
        match self.files.read(&child(&self.directory, &name), 2 * FILE_BYTES_MAX).await {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) => {
                tracing::debug!(name, error = chain(&error), "read a kept console");
                None
            }
        }
    }

    /// Removes what is beyond the bounds by now, oldest jobs first.
    pub async fn prune(&self) {
        let ConsoleBounds { keep, bytes } = self.bounds();
        let mut files = Vec::new();
        for entry in self.files.list(&self.directory).await.unwrap_or_default() {
            let length = self.files.length(&child(&self.directory, &entry.name)).await.ok().flatten().unwrap_or(0);
            files.push((entry.name, length));
        }
        let mut all: u64 = files.iter().map(|(_, length)| length).sum();
        let now = self.clock.now();
        for (name, length) in files {
            if all <= bytes && !is_too_old(&name, now, keep) {
                continue;
            }
            match self.files.remove(&child(&self.directory, &name)).await {
                Ok(()) => all = all.saturating_sub(length),
                // Found again with the next look.
                Err(error) => tracing::debug!(name, error = chain(&error), "remove a kept console"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::RealFiles;

    fn rows(text: &str) -> Rows {
        Rows { text: text.into(), ..Rows::default() }
    }

    fn consoles(dir: &Path, bytes: u64) -> (Consoles, Clock) {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
        let bounds = ConsoleBounds { keep: Duration::from_secs(60), bytes };
        (Consoles::new(Arc::new(RealFiles), clock.clone(), dir, bounds), clock)
    }

    #[tokio::test]
    async fn a_console_is_kept_row_by_row_over_restarts_up_to_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let (consoles, clock) = consoles(dir.path(), 1 << 30);
        let came = clock.now();
        let mut log = ConsoleLog::of(came, "abc-7");
        consoles.append(&mut log, &rows("")).await.unwrap();
        assert!(!dir.path().join("consoles").exists(), "nothing before there is something");
        consoles.append(&mut log, &rows("one\n")).await.unwrap();
        let mut next = ConsoleLog::of(came, "abc-7");
        consoles.append(&mut next, &Rows { text: "two\n".into(), lost: 9, ..Rows::default() }).await.unwrap();
        let text = "one\n[9 bytes were printed too fast, and are left out]\ntwo\n";
        assert_eq!(consoles.find("abc-7").await.as_deref(), Some(text));
        assert_eq!(consoles.find("c-7").await, None);
        for _ in 0..3 {
            consoles.append(&mut next, &rows(&"€".repeat(200_000))).await.unwrap();
        }
        let kept = consoles.find("abc-7").await.unwrap();
        assert!(kept.len() as u64 <= FILE_BYTES_MAX && kept.ends_with(CUT) && kept.matches(CUT).count() == 1);
        assert!(!kept.contains('\u{fffd}'), "cut between characters");
    }

    #[tokio::test]
    async fn old_consoles_go_and_the_oldest_of_too_many_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (consoles, clock) = consoles(dir.path(), 10);
        for job in ["a-1", "a-2"] {
            clock.jump(true, Duration::from_secs(1));
            consoles.append(&mut ConsoleLog::of(clock.now(), job), &rows("1234567\n")).await.unwrap();
        }
        consoles.prune().await;
        assert_eq!((consoles.find("a-1").await, consoles.find("a-2").await.is_some()), (None, true));
        clock.jump(true, Duration::from_secs(61));
        consoles.prune().await;
        assert_eq!(consoles.find("a-2").await, None);
        consoles.set_bounds(ConsoleBounds { keep: Duration::from_secs(60), bytes: 0 });
        consoles.append(&mut ConsoleLog::of(clock.now(), "a-3"), &rows("none\n")).await.unwrap();
        assert_eq!(consoles.find("a-3").await, None);
    }
}
