//! Which version does a job read, over a restart of the daemon too? The one that it began with, by a file of the job.
//!
//! ```text
//! <state>/cache/pins/<job>.json    versions that this job has read ranges of; gone with the job
//! ```
//!
//! A runner fetches a large entry in ranges, each a request of its own. Before the first is answered the job's file names
//! the version, so that the next daemon keeps it, and answers the rest from it, whoever saves meanwhile. A disk that does
//! not take the file costs that: nothing can be saved on a full one either.

use super::access::Space;
use super::store::{Caches, Place, Version};
use crate::files::child;
use crate::telemetry::chain;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Where the files are, beside the tenants, none of which has such a name.
pub(super) const DIRECTORY: &str = "pins";

/// Versions that one job holds on to.
pub(super) const PINS_MAX: usize = 64;

/// Bytes of a job's file at most.
const BYTES_MAX: u64 = 64 * 1024;

/// A version that a job reads.
#[derive(Clone, Debug)]
pub(super) struct Pinned {
    pub(super) space: Space,
    pub(super) version: Arc<Version>,
    /// The job's file names it, or would if the disk took that.
    pub(super) kept: bool,
}

/// By the names of their keys' files.
pub(super) type Pins = BTreeMap<String, Pinned>;

/// A job's file.
#[derive(Serialize, Deserialize)]
struct Written {
    tenant: String,
    pins: BTreeMap<String, WrittenPin>,
}

#[derive(Serialize, Deserialize)]
struct WrittenPin {
    space: Space,
    file: String,
    bytes: u64,
    sha256: String,
    saved: Timestamp,
}

/// What the files of all jobs say.
pub(super) type Found = BTreeMap<String, (String, Pins)>;

impl Caches {
    fn pins_path(&self, job: &str) -> PathBuf {
        child(&child(&self.0.directory, DIRECTORY), &format!("{job}.json"))
    }

    /// The versions that these jobs read, as far as their files are there. Files of other jobs are removed.
    pub(super) async fn find_pins(&self, jobs: &BTreeSet<String>) -> io::Result<Found> {
        let mut found = Found::new();
        for entry in self.0.files.list(&child(&self.0.directory, DIRECTORY)).await? {
            let job = entry.name.strip_suffix(".json").unwrap_or_default();
            let pins = if jobs.contains(job) { self.read_pins(job).await } else { None };
            match pins {
                Some(pins) => drop(found.insert(job.to_owned(), pins)),
                None => self.0.files.remove(&child(&child(&self.0.directory, DIRECTORY), &entry.name)).await?,
            }
        }
        Ok(found)
    }

    async fn read_pins(&self, job: &str) -> Option<(String, Pins)> {
        let json = self.0.files.read(&self.pins_path(job), BYTES_MAX).await.ok()?;
        let Written { tenant, pins } = serde_json::from_slice(&json).ok()?;
        let mut found = Pins::new();
        for (key, WrittenPin { space, file, bytes, sha256, saved }) in pins.into_iter().take(PINS_MAX) {
            let is_its = file.starts_with(&key) && !file.contains('/');
            let path = child(&self.directory_of(&(tenant.clone(), space, key.clone())), &file);
            if is_its && self.0.files.length(&path).await.ok()? == Some(bytes) {
                let version = Arc::new(Version { path, bytes, sha256, saved });
                found.insert(key, Pinned { space, version, kept: true });
            }
        }
        Some((tenant, found))
    }

    /// Writes a job's file.
    pub(super) async fn write_pins(&self, job: &str, tenant: &str, pins: &Pins) {
        let file = |version: &Version| version.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let pins = pins.iter().filter(|(_, pinned)| pinned.kept).filter_map(|(key, Pinned { space, version, .. })| {
            let Version { bytes, sha256, saved, .. } = &**version;
            let pin = WrittenPin {
                space: *space,
                file: file(version)?,
                bytes: *bytes,
                sha256: sha256.clone(),
                saved: *saved,
            };
            Some((key.clone(), pin))
        });
        let written = Written { tenant: tenant.to_owned(), pins: pins.collect() };
        self.index().pinned.insert(job.to_owned());
        let written = match serde_json::to_vec(&written) {
            Ok(json) => {
                let (directory, name) = (child(&self.0.directory, DIRECTORY), format!("{job}.json"));
                self.0.files.replace_in_new_dir(&directory, &name, json).await
            }
            Err(error) => Err(error.into()),
        };
        if let Err(error) = written {
            tracing::debug!(error = chain(&error), "note which caches a job reads");
        }
    }

    /// The job has ended: it holds on to nothing any more.
    pub async fn let_go(&self, job: &str) {
        let is_there = {
            let mut index = self.index();
            index.restored.remove(job);
            index.pinned.remove(job)
        };
        if !is_there {
            return;
        }
        // What stays goes with a sweep, or at the next start.
        if let Err(error) = self.0.files.remove(&self.pins_path(job)).await {
            tracing::debug!(error = chain(&error), "remove the note which caches a job has read");
            self.index().left.insert(job.to_owned());
        }
    }

    /// Removes what the disk did not let go when its job ended.
    pub(super) async fn remove_left(&self) {
        let left = self.index().left.clone();
        for job in left {
            if self.0.files.remove(&self.pins_path(&job)).await.is_ok() {
                self.index().left.remove(&job);
            }
        }
    }
}

/// The place of an entry, from its parts.
pub(super) fn place(tenant: &str, space: Space, key: &str) -> Place {
    (tenant.to_owned(), space, key.to_owned())
}
