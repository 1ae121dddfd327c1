//! The files of ended jobs, and the list of them.

use super::{CONSOLE_BYTES_MAX, End, Reached, Suggestion, VERSION};
use crate::clock::Clock;
use crate::files::{Files, child, dated_name};
use crate::gitlab::JobId;
use crate::telemetry::chain;
use jiff::Timestamp;
use serde::Deserialize;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes of one file at most: a console of backslashes, each written twice, names of GitLab's, and what was reached, by the
/// longest names.
const FILE_BYTES_MAX: u64 = 8 * CONSOLE_BYTES_MAX as u64;

/// Jobs that are looked at for what a class has reached, the newest: each is a file to be read.
const REACHED_JOBS_MAX: usize = 2000;

/// And for how long.
const REACHED_PATIENCE: Duration = Duration::from_secs(3);

/// How long the end of a job may wait for its being kept: what is past must not hold up what goes on.
const PATIENCE: Duration = Duration::from_secs(5);

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// For how long.
    pub keep: Duration,
    /// Jobs at most; 0: nothing is kept.
    pub jobs: usize,
    /// Bytes of all files together at most.
    pub bytes: u64,
}

/// The jobs that have ended here. Clones share it.
#[derive(Clone)]
pub struct History(Arc<Shared>);

struct Shared {
    files: Arc<dyn Files>,
    clock: Clock,
    directory: PathBuf,
    /// Held for a few lines.
    list: Mutex<List>,
    /// The disk did not take the last one.
    unkept: AtomicBool,
}

/// What is kept, oldest end first.
struct List {
    bounds: Bounds,
    kept: VecDeque<Kept>,
    bytes: u64,
}

struct Kept {
    file: String,
    bytes: u64,
    /// Without its console and what it has reached.
    end: End,
}

/// What of an end is in memory.
fn short(end: End) -> End {
    End { console: None, reached: Vec::new(), ..end }
}

/// Where the ended jobs of this state directory are.
fn directory(state_directory: &Path) -> PathBuf {
    state_directory.join("ended")
}

/// Name of a job's file: the same whenever it is written, and in the order in which jobs came.
fn file_name(end: &End, job: &str) -> String {
    dated_name(end.received, &format!("{job}.json"))
}

impl List {
    /// Takes off what is beyond the bounds; the files to be removed.
    fn trim(&mut self, now: Timestamp) -> Vec<String> {
        let mut gone = Vec::new();
        while let Some(oldest) = self.kept.front() {
            let age = Duration::try_from(now.duration_since(oldest.end.ended)).unwrap_or_default();
            let within =
                age <= self.bounds.keep && self.kept.len() <= self.bounds.jobs && self.bytes <= self.bounds.bytes;
            if within {
                break;
            }
            self.bytes = self.bytes.saturating_sub(oldest.bytes);
            gone.extend(self.kept.pop_front().map(|kept| kept.file));
        }
        gone
    }

    fn add(&mut self, kept: Kept) {
        self.bytes = self.bytes.saturating_add(kept.bytes);
        self.kept.push_back(kept);
    }
}

impl History {
    /// What is kept below this state directory. Whatever is wrong there is logged, and nothing of it stops a daemon.
    pub async fn open(files: Arc<dyn Files>, clock: Clock, state_directory: &Path, bounds: Bounds) -> Self {
        let list = List { bounds, kept: VecDeque::new(), bytes: 0 };
        let history = Self(Arc::new(Shared {
            files,
            clock,
            directory: directory(state_directory),
            list: Mutex::new(list),
            unkept: AtomicBool::new(false),
        }));
        if let Err(error) = history.load().await {
            tracing::warn!(error = chain(&error), "read which jobs have ended here; `dayfly jobs` begins anew");
        }
        history.prune().await;
        history
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.0.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn load(&self) -> io::Result<()> {
        let jobs = self.list().bounds.jobs;
        let entries = self.0.files.list(&self.0.directory).await?;
        let mut names: Vec<String> = entries.into_iter().map(|entry| entry.name).collect();
        // By when they came: no more are read than may be kept.
        let older = names.len().saturating_sub(jobs);
        let mut gone: Vec<String> = names.drain(..older).collect();
        let (mut read, mut newer) = (Vec::new(), 0_u32);
        for file in names {
            match self.read(&file).await {
                Ok((bytes, end)) => read.push(Kept { file, bytes, end: short(end) }),
                // A downgrade: the newer one reads it again.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => newer += 1,
                Err(error) => {
                    tracing::debug!(file, error = chain(&error), "what is kept of an ended job cannot be read");
                    gone.push(file);
                }
            }
        }
        if newer > 0 {
            tracing::info!(newer, "some ended jobs were kept by a newer dayfly, and are not shown");
        }
        read.sort_by_key(|kept| kept.end.ended);
        {
            let mut list = self.list();
            read.into_iter().for_each(|kept| list.add(kept));
        }
        self.remove(gone).await;
        Ok(())
    }

    /// A file's length and content.
    async fn read(&self, file: &str) -> io::Result<(u64, End)> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bytes = self.0.files.read(&child(&self.0.directory, file), FILE_BYTES_MAX).await?;
        let Versioned { version } = serde_json::from_slice(&bytes)?;
        if version > VERSION {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("is of version {version}")));
        }
        Ok((bytes.len() as u64, serde_json::from_slice(&bytes)?))
    }

    async fn remove(&self, files: Vec<String>) {
        for file in files {
            if let Err(error) = self.0.files.remove(&child(&self.0.directory, &file)).await {
                // Found again at the next start.
                tracing::debug!(file, error = chain(&error), "remove what was kept of an ended job");
            }
        }
    }

    /// Keeps how a job ended; `job` is its name among files. What was kept of the same job before stays: it tells more.
    /// Takes [`PATIENCE`] at most, and an error is logged here.
    pub async fn keep(&self, end: End, job: &str) {
        let file = file_name(&end, job);
        {
            let list = self.list();
            if list.bounds.jobs == 0 || list.kept.iter().any(|kept| kept.file == file) {
                return;
            }
        }
        let written = tokio::time::timeout(PATIENCE, self.write(&file, &end)).await;
        let bytes = match written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(bytes) => bytes,
            Err(error) => {
                // A disk that takes nothing is told of by who needs it.
                if !self.0.unkept.swap(true, Ordering::Relaxed) {
                    tracing::info!(error = chain(&error), "keep how a job ended; `dayfly jobs` does not show it");
                }
                return;
            }
        };
        self.0.unkept.store(false, Ordering::Relaxed);
        self.list().add(Kept { file, bytes, end: short(end) });
        self.prune().await;
    }

    async fn write(&self, file: &str, end: &End) -> io::Result<u64> {
        let bytes = serde_json::to_vec(end)?;
        let length = bytes.len() as u64;
        self.0.files.replace_in_new_dir(&self.0.directory, file, bytes).await?;
        Ok(length)
    }

    /// Removes what is beyond the bounds by now.
    pub async fn prune(&self) {
        let gone = self.list().trim(self.0.clock.now());
        self.remove(gone).await;
    }

    /// Other bounds, from now on.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.list().bounds = bounds;
    }

    /// The newest ends, newest first, without their consoles.
    #[must_use]
    pub fn newest(&self, jobs_max: usize) -> Vec<End> {
        self.list().kept.iter().rev().take(jobs_max).map(|kept| kept.end.clone()).collect()
    }

    /// What jobs of this class have reached in the last so many days, as far as it is kept, and the newest first: as many as
    /// can be read in [`REACHED_PATIENCE`], or [`REACHED_JOBS_MAX`].
    pub async fn suggest(&self, class: &str, days: u32) -> Suggestion {
        let since = Duration::from_secs(u64::from(days) * 24 * 3600);
        let now = self.0.clock.now();
        let is_meant = |kept: &&Kept| {
            let age = Duration::try_from(now.duration_since(kept.end.ended)).unwrap_or_default();
            kept.end.class == class && age <= since
        };
        let files: Vec<String> = {
            let list = self.list();
            list.kept.iter().rev().filter(is_meant).take(REACHED_JOBS_MAX).map(|kept| kept.file.clone()).collect()
        };
        let (mut reached, until) = (Reached::default(), Instant::now() + REACHED_PATIENCE);
        for file in files {
            match tokio::time::timeout_at(until, self.read(&file)).await {
                Ok(Ok((_, end))) => reached.add(&end),
                // It is gone meanwhile, or was damaged.
                Ok(Err(error)) => {
                    tracing::debug!(file, error = chain(&error), "what is kept of an ended job cannot be read")
                }
                Err(_) => break,
            }
        }
        reached.suggest(class, days)
    }

    /// Runner entries of which a job of this id has ended here.
    #[must_use]
    pub fn runners(&self, id: JobId) -> BTreeSet<String> {
        let list = self.list();
        list.kept.iter().filter(|kept| kept.end.id == id).map(|kept| kept.end.runner.clone()).collect()
    }

    /// The newest end of this runner entry's job, with its console as far as that can be read.
    pub async fn find(&self, id: JobId, runner: &str) -> Option<End> {
        let (file, end) = {
            let list = self.list();
            let kept = list.kept.iter().rev().find(|kept| kept.end.id == id && kept.end.runner == runner)?;
            (kept.file.clone(), kept.end.clone())
        };
        match self.read(&file).await {
            Ok((_, whole)) => Some(whole),
            Err(error) => {
                tracing::debug!(file, error = chain(&error), "what is kept of an ended job cannot be read");
                Some(end)
            }
        }
    }
}
