//! The entries on disk: found, read, saved whole or not at all, and thrown away by age and by quota.
//!
//! ```text
//! <state>/cache/<tenant>/<space>/<hash of key>.json          what it is: names its file; written last, removed first
//!                                <hash of key>-<random>.zip  its bytes
//!               pins/<job>.json                              which versions a job reads, see `pins`
//! ```
//!
//! A save writes a file of its own beside the entry of before; the entry changes at once, by the replacing of its JSON.
//! A file that nothing names is a save that came to no end: it is removed at the next start. Readers hold the version that
//! they began with, so that ranges of one entry fit together whoever saves meanwhile; its file goes with the last of them.

use super::access::{CacheTenant, Space};
use super::pins::{DIRECTORY as PINS, Found};
use super::upstream::Upstream;
use crate::clock::Clock;
use crate::files::{Files, child};
use crate::hex::hex;
use crate::rng::Rng;
use crate::telemetry::chain;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of one entry's JSON at most.
const META_BYTES_MAX: u64 = 16 * 1024;

/// How much is kept, for how long, and for whom together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of all projects together.
    pub bytes_max: u64,
    /// Bytes of one project, or of those that share.
    pub project_bytes_max: u64,
    /// After so long without a save an entry is gone.
    pub max_age: Duration,
    /// Projects that share; the first that fits counts.
    pub tenants: Vec<CacheTenant>,
}

/// Why something is not saved.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It is larger than what a project may have.
    #[error("a cache of {0} bytes is larger than a project may have")]
    TooLarge(u64),
    /// The disk has no room for it.
    #[error("there is no room for another cache")]
    NoRoom,
    /// Other bytes came than were announced.
    #[error("the cache has another length than was announced")]
    Length,
    /// A file.
    #[error("use a cache's file")]
    Io(#[from] io::Error),
}

/// What an entry's JSON holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Meta {
    /// The key, for people.
    pub(super) key: String,
    /// The file's name.
    pub(super) file: String,
    pub(super) bytes: u64,
    /// Hex.
    pub(super) sha256: String,
    pub(super) saved: Timestamp,
    pub(super) used: Timestamp,
    /// The job that saved it.
    pub(super) job: u64,
    /// Whose it is, for people; an older dayfly did not say.
    #[serde(default)]
    pub(super) of: String,
}

/// One version of an entry. Its bytes can be read for as long as somebody holds it.
#[derive(Debug)]
pub struct Version {
    pub(super) path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Its digest, hex.
    pub sha256: String,
    /// When it was saved.
    pub saved: Timestamp,
}

impl Version {
    /// Whether these are its bytes.
    #[must_use]
    pub fn is_of(&self, digest: Sha256) -> bool {
        hex(&digest.finalize()) == self.sha256
    }
}

/// Where an entry is: its tenant's directory, the space in it, and the name of its files.
pub(super) type Place = (String, Space, String);

pub(super) struct Entry {
    pub(super) version: Arc<Version>,
    pub(super) meta: Meta,
    /// Since then in memory, later than `meta.used` by an hour at most.
    pub(super) used: Timestamp,
}

#[derive(Default)]
pub(super) struct Index {
    pub(super) entries: BTreeMap<Place, Entry>,
    /// Bytes of saves under way, by tenant.
    pub(super) pending: BTreeMap<String, u64>,
    /// Files that belong to no entry any more.
    pub(super) doomed: Vec<Arc<Version>>,
    /// What jobs of a former daemon read, until they end.
    pub(super) restored: Found,
    /// Jobs that have a file of what they read.
    pub(super) pinned: BTreeSet<String>,
    /// Jobs that have ended, and whose file of that the disk has kept.
    pub(super) left: BTreeSet<String>,
}

impl Index {
    pub(super) fn bytes(&self, tenant: Option<&str>) -> u64 {
        let is_of = |name: &str| tenant.is_none_or(|tenant| tenant == name);
        let entries = self.entries.iter().filter(|((name, ..), _)| is_of(name)).map(|(_, entry)| entry.version.bytes);
        let pending = self.pending.iter().filter(|(name, _)| is_of(name)).map(|(_, bytes)| *bytes);
        entries.chain(pending).fold(0, u64::saturating_add)
    }

    /// The entry that was longest not used, of this tenant or of all.
    fn oldest(&self, tenant: Option<&str>) -> Option<Place> {
        let of = self.entries.iter().filter(|((name, ..), _)| tenant.is_none_or(|tenant| tenant == name));
        of.min_by_key(|(_, entry)| entry.used).map(|(place, _)| place.clone())
    }
}

/// All caches of a host. Clones share them.
#[derive(Clone)]
pub struct Caches(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) files: Arc<dyn Files>,
    pub(super) directory: PathBuf,
    config: Settings,
    /// An operator's own store in place of the directory.
    pub(super) upstream: Option<Upstream>,
    /// Free bytes that are left to others.
    reserve: u64,
    pub(super) clock: Clock,
    pub(super) rng: Rng,
    /// Held for a few lines, never across an await.
    index: Mutex<Index>,
    /// Whoever changes what is on disk.
    pub(super) turn: tokio::sync::Mutex<()>,
}

impl Caches {
    /// Finds what is there. `reserve`: free bytes that are left to others. `jobs`: those that may still read, by the names
    /// that [`Caches::of`] is given. What cannot be read is no entry, and removed.
    ///
    /// # Errors
    /// The directory cannot be listed. It is made with the first save.
    pub async fn open(
        files: Arc<dyn Files>,
        directory: PathBuf,
        (config, reserve): (Settings, u64),
        (clock, rng): (Clock, Rng),
        jobs: &BTreeSet<String>,
    ) -> io::Result<Self> {
        let caches = Self(Arc::new(Shared {
            files,
            directory,
            config,
            upstream: None,
            reserve,
            clock,
            rng,
            index: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }));
        let read = caches.find_pins(jobs).await?;
        for tenant in caches.0.files.list(&caches.0.directory).await?.into_iter().filter(|entry| entry.name != PINS) {
            for space in Space::ALL {
                caches.scan(&tenant.name, space, &read).await?;
            }
        }
        {
            let mut index = caches.index();
            index.pinned = read.keys().cloned().collect();
            index.restored = read;
        }
        Ok(caches)
    }

    /// The caches of an operator's own store, with this section's quota for one save.
    #[must_use]
    pub fn at(upstream: Upstream, files: Arc<dyn Files>, config: Settings, clock: Clock, rng: Rng) -> Self {
        Self(Arc::new(Shared {
            files,
            // Nothing is ever there.
            directory: PathBuf::new(),
            config,
            upstream: Some(upstream),
            reserve: 0,
            clock,
            rng,
            index: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }))
    }

    /// The projects that share a cache.
    #[must_use]
    pub fn tenants(&self) -> &[CacheTenant] {
        &self.0.config.tenants
    }

    /// `read`: what jobs of a former daemon read still.
    async fn scan(&self, tenant: &str, space: Space, read: &Found) -> io::Result<()> {
        let Shared { files, directory, .. } = &*self.0;
        let directory = child(&child(directory, tenant), space.word());
        let mut found: BTreeMap<String, bool> =
            files.list(&directory).await?.into_iter().map(|entry| (entry.name, false)).collect();
        let names: Vec<String> = found.keys().filter(|name| name.ends_with(".json")).cloned().collect();
        for name in names {
            let Ok(json) = files.read(&child(&directory, &name), META_BYTES_MAX).await else { continue };
            let Ok(meta) = serde_json::from_slice::<Meta>(&json) else { continue };
            let is_its = meta.file.starts_with(name.trim_end_matches(".json")) && found.contains_key(&meta.file);
            if !is_its {
                continue;
            }
            let path = child(&directory, &meta.file);
            if files.length(&path).await? != Some(meta.bytes) {
                continue;
            }
            found.insert(meta.file.clone(), true);
            found.insert(name.clone(), true);
            let Meta { bytes, saved, used, .. } = meta;
            let version = Arc::new(Version { path, bytes, sha256: meta.sha256.clone(), saved });
            let place = (tenant.to_owned(), space, name.trim_end_matches(".json").to_owned());
            self.index().entries.insert(place, Entry { version, meta, used });
        }
        // A version that was replaced meanwhile goes with its last reader.
        let of = read.values().filter(|(of, _)| of == tenant).flat_map(|(_, pins)| pins.values());
        for version in of.filter(|pinned| pinned.space == space).map(|pinned| &pinned.version) {
            let file = version.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(is_known) = found.get_mut(&file).filter(|is_known| !**is_known) {
                *is_known = true;
                self.index().doomed.push(Arc::clone(version));
            }
        }
        for (name, _) in found.into_iter().filter(|(_, is_known)| !is_known) {
            files.remove(&child(&directory, &name)).await?;
        }
        Ok(())
    }

    /// Removes what is too old, and files that nobody holds any more. To be called now and then.
    pub async fn sweep(&self) {
        let _turn = self.0.turn.lock().await;
        let now = self.0.clock.now();
        loop {
            let old = self
                .index()
                .entries
                .iter()
                .find(|(_, entry)| self.is_old(entry.version.saved, now))
                .map(|e| e.0.clone());
            let Some(place) = old else { break };
            if let Err(error) = self.remove(&place).await {
                tracing::warn!(error = chain(&error), "remove an old cache");
                break;
            }
        }
        self.bury().await;
        self.remove_left().await;
    }

    pub(super) fn is_old(&self, saved: Timestamp, now: Timestamp) -> bool {
        let age = Duration::try_from(now.duration_since(saved)).unwrap_or(Duration::ZERO);
        age > self.0.config.max_age
    }

    pub(super) fn index(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn directory_of(&self, place: &Place) -> PathBuf {
        child(&child(&self.0.directory, &place.0), place.1.word())
    }

    /// Takes an entry out. The turn is held.
    pub(super) async fn remove(&self, place: &Place) -> io::Result<()> {
        let json = child(&self.directory_of(place), &format!("{}.json", place.2));
        self.0.files.remove(&json).await?;
        let mut index = self.index();
        if let Some(entry) = index.entries.remove(place) {
            index.doomed.push(entry.version);
        }
        Ok(())
    }

    /// Removes files that nobody holds any more. The turn is held.
    pub(super) async fn bury(&self) {
        let free: Vec<Arc<Version>> = {
            let mut index = self.index();
            let (free, held) = index.doomed.drain(..).partition(|version| Arc::strong_count(version) == 1);
            index.doomed = held;
            free
        };
        for version in free {
            if let Err(error) = self.0.files.remove(&version.path).await {
                tracing::warn!(error = chain(&error), "remove a cache's file");
                self.index().doomed.push(version);
            }
        }
    }

    /// Bytes of all at most, and of one tenant.
    pub(super) fn bounds(&self) -> (u64, u64) {
        (self.0.config.bytes_max, self.0.config.project_bytes_max)
    }

    /// Makes room for so many bytes more of a tenant, by what was longest not used: its own first. They count as its own
    /// from then on, until they are saved or given up.
    pub(super) async fn make_room(&self, tenant: &str, bytes: u64) -> Result<(), CacheError> {
        let (size, project) = self.bounds();
        if bytes > project.min(size) {
            return Err(CacheError::TooLarge(bytes));
        }
        let _turn = self.0.turn.lock().await;
        for (of, most) in [(Some(tenant), project), (None, size)] {
            loop {
                let oldest = {
                    let index = self.index();
                    if index.bytes(of).saturating_add(bytes) <= most {
                        break;
                    }
                    index.oldest(of)
                };
                // All else is being saved just now.
                let Some(place) = oldest else { return Err(CacheError::NoRoom) };
                self.remove(&place).await?;
            }
        }
        self.bury().await;
        self.0.files.create_dir(&self.0.directory).await?;
        let free = self.0.files.free_bytes(&self.0.directory).await?;
        if free < bytes.saturating_add(self.0.reserve) {
            return Err(CacheError::NoRoom);
        }
        *self.index().pending.entry(tenant.to_owned()).or_default() += bytes;
        Ok(())
    }

    /// What was made room for is saved, or given up.
    pub(super) fn settle(&self, tenant: &str, bytes: u64) {
        let mut index = self.index();
        if let Some(pending) = index.pending.get_mut(tenant) {
            *pending = pending.saturating_sub(bytes);
            if *pending == 0 {
                index.pending.remove(tenant);
            }
        }
    }

    /// Writes an entry's time of use down, if it is still that entry.
    pub(super) async fn note(&self, place: &Place, version: &Arc<Version>, meta: &Meta) {
        let _turn = self.0.turn.lock().await;
        let is_there = self.index().entries.get(place).is_some_and(|entry| Arc::ptr_eq(&entry.version, version));
        if !is_there {
            return;
        }
        // It is used all the same; the next use tries again in an hour.
        if let Err(error) = self.write(place, meta).await {
            tracing::debug!(error = chain(&error), "note the use of a cache");
        }
    }

    pub(super) async fn write(&self, place: &Place, meta: &Meta) -> io::Result<()> {
        let json = serde_json::to_vec(meta).map_err(io::Error::other)?;
        self.0.files.replace(&child(&self.directory_of(place), &format!("{}.json", place.2)), json).await
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
