//! What was shown in a shell, on disk: one file each, private, in asciinema's format (version 2), so that `asciinema play`
//! shows it again. What was typed is in it as far as the terminal showed it; a password is not.

use crate::clock::Clock;
use crate::files::{Files, child, dated_name, is_too_old};
use crate::telemetry::chain;
use dayfly_guest_config::TerminalSize;
use serde_json::json;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes of one recording at most; a shell that prints more is ended.
const BYTES_MAX: u64 = 16 << 20;

/// Recordings at most: the oldest go for another one.
const RECORDINGS_MAX: usize = 200;

/// Where recordings are. Clones share it.
#[derive(Clone)]
pub struct Recordings {
    files: Arc<dyn Files>,
    clock: Clock,
    directory: PathBuf,
    /// For how long they are kept; held for a line.
    keep: Arc<Mutex<Duration>>,
}

/// One that is being written.
pub struct Recording {
    files: Arc<dyn Files>,
    path: PathBuf,
    since: Instant,
    length: u64,
}

/// Whose shell is recorded.
#[derive(Clone, Debug)]
pub struct Whose {
    /// Runner entry and job.
    pub job: String,
    /// The job's name among files.
    pub file: String,
    /// The hypervisor's name of its machine.
    pub vm: String,
    /// The user id that asked.
    pub user: u32,
}

impl Recordings {
    /// Those below this state directory. Nothing is made before one is begun.
    #[must_use]
    pub fn new(files: Arc<dyn Files>, clock: Clock, state_directory: &Path, keep: Duration) -> Self {
        Self { files, clock, directory: state_directory.join("shells"), keep: Arc::new(Mutex::new(keep)) }
    }

    /// For how long they are kept from now on.
    pub fn set_keep(&self, keep: Duration) {
        *self.keep.lock().unwrap_or_else(PoisonError::into_inner) = keep;
    }

    /// Begins one, durably.
    ///
    /// # Errors
    /// The disk's: there must be no shell then.
    pub async fn begin(&self, whose: &Whose, size: TerminalSize) -> io::Result<Recording> {
        self.prune(RECORDINGS_MAX - 1).await;
        let now = self.clock.now();
        let head = json!({
            "version": 2,
            "width": size.columns,
            "height": size.rows,
            "timestamp": now.as_second(),
            "title": format!("dayfly: shell in {} of job {}, for user id {}", whose.vm, whose.job, whose.user),
        });
        let name = dated_name(now, &format!("{}.cast", whose.file));
        let bytes = format!("{head}\n").into_bytes();
        let length = bytes.len() as u64;
        self.files.replace_in_new_dir(&self.directory, &name, bytes).await?;
        Ok(Recording { files: self.files.clone(), path: child(&self.directory, &name), since: Instant::now(), length })
    }

    /// Removes what is too old, and the oldest of more than `most`.
    pub async fn prune(&self, most: usize) {
        let keep = *self.keep.lock().unwrap_or_else(PoisonError::into_inner);
        let names = match self.files.list(&self.directory).await {
            Ok(entries) => entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>(),
            Err(error) => return tracing::debug!(error = chain(&error), "look for recordings of shells"),
        };
        let now = self.clock.now();
        let too_many = names.len().saturating_sub(most);
        for (n, name) in names.iter().enumerate() {
            let goes = n < too_many || is_too_old(name, now, keep);
            if goes && let Err(error) = self.files.remove(&child(&self.directory, name)).await {
                // Found again with the next one.
                tracing::debug!(name, error = chain(&error), "remove a recording of a shell");
            }
        }
    }
}

impl Recording {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// This was shown.
    ///
    /// # Errors
    /// The disk's, or `FileTooLarge`: the shell must end.
    pub async fn shown(&mut self, text: &str) -> io::Result<()> {
        self.event("o", text).await
    }

    /// The terminal has another size.
    ///
    /// # Errors
    /// As [`Recording::shown`].
    pub async fn resized(&mut self, size: TerminalSize) -> io::Result<()> {
        self.event("r", &format!("{}x{}", size.columns, size.rows)).await
    }

    async fn event(&mut self, kind: &str, text: &str) -> io::Result<()> {
        let at = (self.since.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let line = format!("{}\n", json!([at, kind, text])).into_bytes();
        let length = line.len() as u64;
        if self.length + length > BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.files.write_at(&self.path, self.length, line.into()).await?;
        self.length += length;
        Ok(())
    }

    /// All of it is on disk.
    ///
    /// # Errors
    /// The disk's.
    pub async fn end(self) -> io::Result<()> {
        self.files.sync(&self.path).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::RealFiles;
    use std::os::unix::fs::PermissionsExt as _;

    const SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

    fn whose(job: &str) -> Whose {
        Whose { job: format!("ci/{job}"), file: format!("abcdef-{job}"), vm: "df-a".into(), user: 1000 }
    }

    #[tokio::test]
    async fn a_recording_is_private_and_reads_as_asciinema_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
        let recordings = Recordings::new(Arc::new(RealFiles), clock, dir.path(), Duration::from_secs(60));
        assert!(!dir.path().join("shells").exists());
        let mut one = recordings.begin(&whose("42"), SIZE).await.unwrap();
        one.shown("\x1b[1mls\r\n\"").await.unwrap();
        one.resized(TerminalSize { rows: 30, columns: 100 }).await.unwrap();
        let path = one.path().to_owned();
        one.end().await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (&lines[0]["version"], &lines[0]["width"], &lines[0]["height"]),
            (&json!(2), &json!(80), &json!(24))
        );
        assert!(lines[0]["title"].as_str().unwrap().contains("job ci/42, for user id 1000"), "{text}");
        assert_eq!((&lines[1][1], &lines[1][2]), (&json!("o"), &json!("\u{1b}[1mls\r\n\"")));
        assert_eq!((&lines[2][1], &lines[2][2]), (&json!("r"), &json!("100x30")));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    }

    #[tokio::test]
    async fn old_recordings_go_and_none_grows_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
        let recordings = Recordings::new(Arc::new(RealFiles), clock.clone(), dir.path(), Duration::from_secs(60));
        let mut first = recordings.begin(&whose("1"), SIZE).await.unwrap();
        let mib = "x".repeat(1 << 20);
        let mut written = Ok(());
        for _ in 0..16 {
            written = first.shown(&mib).await;
        }
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        clock.jump(true, Duration::from_secs(61));
        let second = recordings.begin(&whose("2"), SIZE).await.unwrap();
        assert!(!first.path().exists() && second.path().exists());
        clock.jump(true, Duration::from_secs(1));
        recordings.prune(0).await;
        assert!(!second.path().exists(), "no more than may be");
    }
}
