//! Mistakes at the file layer.

use super::Bug;
use crate::ledger::job_of;
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::files::{Entry, Files};
use dayfly::job::journal::format::parse;
use dayfly::job::state::State;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Files with a bug before them.
pub(super) struct Disk {
    pub(super) bug: Bug,
    pub(super) files: Arc<dyn Files>,
    /// Of each job the record that it began with.
    pub(super) first_records: Arc<Mutex<BTreeMap<PathBuf, Vec<u8>>>>,
}

/// Whether this is the record of a job that names a machine which its guest has not asked from yet.
fn names_a_new_machine(bytes: &[u8]) -> bool {
    parse(bytes)
        .is_ok_and(|record| record.machine.is_some() && matches!(record.state, State::Accepted | State::Booting { .. }))
}

impl Disk {
    fn first_records(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Vec<u8>>> {
        self.first_records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn replace(&self, path: &Path, bytes: Vec<u8>) -> io::Result<()> {
        match (self.bug, job_of(path)) {
            (Bug::DomainBeforeRecord, Some((_, "record.json"))) if names_a_new_machine(&bytes) => Ok(()),
            (Bug::RecordErrorIgnored, Some((_, "record.json"))) => {
                // The error that is ignored.
                let _ = self.files.replace(path, bytes).await;
                Ok(())
            }
            (Bug::PayloadOnDisk, Some((_, "payload"))) => {
                if let Some(below) = path.parent().and_then(|directory| directory.strip_prefix("/run").ok()) {
                    let beside_record = Path::new("/state").join(below);
                    self.files.create_dir(&beside_record).await?;
                    self.files.replace(&beside_record.join("payload"), bytes.clone()).await?;
                }
                self.files.replace(path, bytes).await
            }
            (Bug::RunTwice | Bug::SecondMachine, Some((_, "record.json"))) => {
                self.first_records().entry(path.to_owned()).or_insert_with(|| bytes.clone());
                self.files.replace(path, bytes).await
            }
            _ => self.files.replace(path, bytes).await,
        }
    }

    /// A record that is behind: of a job whose machine boots, or of one that runs, the one that it began with.
    async fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let bytes = self.files.read(path, bytes_max).await?;
        let state = parse(&bytes).ok().map(|record| record.state);
        let behind = match self.bug {
            Bug::RunTwice => matches!(state, Some(State::Running { .. })),
            Bug::SecondMachine => matches!(state, Some(State::Booting { .. })),
            _ => false,
        };
        Ok(self.first_records().get(path).filter(|_| behind).cloned().unwrap_or(bytes))
    }
}

impl Files for Disk {
    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        Box::pin(self.read(path, bytes_max))
    }

    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.files.read_at(path, offset, bytes)
    }

    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.replace(path, bytes))
    }

    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: Bytes) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let reused = self.bug == Bug::CacheBufferReused && path.starts_with("/state/cache") && bytes.len() > 100;
            // The other half is of a save that was quicker.
            let bytes = if reused {
                [&bytes[..bytes.len() / 2], &bytes[..bytes.len() - bytes.len() / 2]].concat().into()
            } else {
                bytes
            };
            let written = self.files.write_at(path, offset, bytes).await;
            if self.bug == Bug::SpoolErrorIgnored { Ok(()) } else { written }
        })
    }

    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.files.sync(path)
    }

    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>> {
        self.files.length(path)
    }

    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.files.create_dir(path)
    }

    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        match (self.bug, job_of(path)) {
            (Bug::SlotKept, _) if path.starts_with("/state/clones/slots") => Box::pin(std::future::ready(Ok(()))),
            (Bug::RecordKept, Some((_, ""))) => Box::pin(std::future::ready(Ok(()))),
            _ => self.files.remove(path),
        }
    }

    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.files.rename(from, to)
    }

    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>> {
        self.files.list(path)
    }

    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>> {
        self.files.free_bytes(path)
    }
}
