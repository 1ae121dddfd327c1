//! What is there of before? Read at the start, before anything else touches it.

use super::format::{Unreadable, parse};
use super::{Journal, JournalError, RECORD_BYTES_MAX, Record, trial};
use crate::files::child;
use std::io;
use std::path::{Path, PathBuf};

/// What the journal held at the start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Records that can be read.
    pub records: Vec<Record>,
    /// What had to be set aside.
    pub aside: Vec<SetAside>,
}

/// A record set aside by [`Journal::load_all`].
#[derive(Debug)]
pub struct SetAside {
    /// Where it is now.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

impl Journal {
    /// All records, and what had to be set aside. Directories without a record are leftovers of a
    /// job that was never accepted, or was finished: they are removed.
    ///
    /// # Errors
    /// [`JournalError`]; nothing has been touched if it is [`JournalError::Newer`] or
    /// [`JournalError::Foreign`].
    pub async fn load_all(&self) -> Result<Loaded, JournalError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Files { what, path, source }
        };
        let mut records = Vec::new();
        let mut broken = Vec::new();
        let mut empty = Vec::new();
        for entry in self.files.list(&self.state).await.map_err(failed("list", &self.state))? {
            let dir = child(&self.state, &entry.name);
            if !entry.is_dir {
                broken.push((dir, "not a directory".to_owned()));
                continue;
            }
            let path = dir.join("record.json");
            match self.read(&path, RECORD_BYTES_MAX).await {
                Err(error) if error.kind() == io::ErrorKind::NotFound => empty.push(dir),
                Err(error) => broken.push((dir, error.to_string())),
                Ok(bytes) => match parse(&bytes) {
                    Ok(Record { installation: Some(theirs), .. })
                        if self.ours.as_ref().is_some_and(|ours| theirs != *ours) =>
                    {
                        let ours = self.ours.clone().unwrap_or_else(|| theirs.clone());
                        return Err(JournalError::Foreign { path, theirs, ours });
                    }
                    Ok(record) if record.key.directory() == entry.name => records.push(record),
                    Ok(_) => broken.push((dir, "the record is of another job".to_owned())),
                    Err(Unreadable::Newer(version)) => return Err(JournalError::Newer { path, version }),
                    Err(Unreadable::Broken(reason)) => broken.push((dir, reason)),
                },
            }
        }
        for dir in empty {
            self.files.remove(&dir).await.map_err(failed("remove", &dir))?;
        }
        let mut aside = Vec::new();
        for (path, reason) in broken {
            aside.push(SetAside { path: self.set_aside(&path).await?, reason });
        }
        self.remove_strays(&records).await?;
        for path in [trial(&self.state), trial(&self.runtime)] {
            self.files.remove(&path).await.map_err(failed("remove", &path))?;
        }
        Ok(Loaded { records, aside })
    }

    /// Moves a damaged entry out of the way, under a name that is still free.
    async fn set_aside(&self, path: &Path) -> Result<PathBuf, JournalError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Files { what, path, source }
        };
        let quarantine = self.state.with_file_name("set-aside");
        self.files.create_dir(&quarantine).await.map_err(failed("make directory", &quarantine))?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("unnamed");
        let taken = self.files.list(&quarantine).await.map_err(failed("list", &quarantine))?;
        let free = (0_u32..).map(|n| format!("{name}.{n}")).find(|n| taken.iter().all(|e| e.name != *n));
        let target = child(&quarantine, &free.expect("one of four billion names is free"));
        self.files.rename(path, &target).await.map_err(failed("set aside", path))?;
        Ok(target)
    }

    /// Runtime directories without a record: the crash came between the two.
    async fn remove_strays(&self, records: &[Record]) -> Result<(), JournalError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Files { what: "remove", path, source }
        };
        for entry in self.files.list(&self.runtime).await.map_err(failed(&self.runtime))? {
            if records.iter().all(|r| r.key.directory() != entry.name) {
                let path = child(&self.runtime, &entry.name);
                self.files.remove(&path).await.map_err(failed(&path))?;
            }
        }
        Ok(())
    }
}
