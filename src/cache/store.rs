//! The entries on disk: found, read, saved whole or not at all, and thrown away by age and by quota.
//!
//! ```text
//! <state>/cache/<tenant>/<space>/<hash of key>.json          what it is: names its file; written last, removed first
//!                                <hash of key>-<random>.zip  its bytes
//! ```
//!
//! A save writes a file of its own beside the entry of before; the entry changes at once, by the replacing of its JSON.
//! A file that no JSON names is a save that came to no end: it is removed at the next start. Readers hold the version that
//! they began with, so that ranges of one entry fit together whoever saves meanwhile; its file goes with the last of them.

use super::access::{Key, Space, Tenant, hex};
use crate::clock::Clock;
use crate::config::Cache as Config;
use crate::files::{Files, child};
use crate::rng::Rng;
use crate::telemetry::chain;
use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of one entry's JSON at most.
const META_BYTES_MAX: u64 = 16 * 1024;

/// Written bytes that may not be on the disk yet: so that the end of a large save takes no longer than its answer may.
const UNSYNCED_BYTES_MAX: u64 = 64 << 20;

/// Entries that one job holds on to.
const PINS_MAX: usize = 64;

/// An entry's time of use is written down no more often than this.
const USE_NOTED: Duration = Duration::from_secs(3600);

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
struct Meta {
    /// The key, for people.
    key: String,
    /// The file's name.
    file: String,
    bytes: u64,
    /// Hex.
    sha256: String,
    saved: Timestamp,
    used: Timestamp,
    /// The job that saved it.
    job: u64,
}

/// One version of an entry. Its bytes can be read for as long as somebody holds it.
#[derive(Debug)]
pub struct Version {
    path: PathBuf,
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

/// Where an entry is.
type Place = (String, Space, String);

struct Entry {
    version: Arc<Version>,
    meta: Meta,
    /// Since then in memory, later than `meta.used` by at most [`USE_NOTED`].
    used: Timestamp,
}

#[derive(Default)]
struct Index {
    entries: BTreeMap<Place, Entry>,
    /// Bytes of saves under way, by tenant.
    pending: BTreeMap<String, u64>,
    /// Files that belong to no entry any more.
    doomed: Vec<Arc<Version>>,
}

impl Index {
    fn bytes(&self, tenant: Option<&str>) -> u64 {
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
pub struct Caches(Arc<Shared>);

struct Shared {
    files: Arc<dyn Files>,
    directory: PathBuf,
    config: Config,
    /// Free bytes that are left to others.
    reserve: u64,
    clock: Clock,
    rng: Rng,
    /// Held for a few lines, never across an await.
    index: Mutex<Index>,
    /// Whoever changes what is on disk.
    turn: tokio::sync::Mutex<()>,
}

impl Caches {
    /// Finds what is there. `reserve`: free bytes that are left to others. What cannot be read is no entry, and removed.
    ///
    /// # Errors
    /// The directory cannot be listed. It is made with the first save.
    pub async fn open(
        files: Arc<dyn Files>,
        directory: PathBuf,
        (config, reserve): (Config, u64),
        clock: Clock,
        rng: Rng,
    ) -> io::Result<Self> {
        let caches = Self(Arc::new(Shared {
            files,
            directory,
            config,
            reserve,
            clock,
            rng,
            index: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }));
        for tenant in caches.0.files.list(&caches.0.directory).await? {
            for space in Space::ALL {
                caches.scan(&tenant.name, space).await?;
            }
        }
        Ok(caches)
    }

    async fn scan(&self, tenant: &str, space: Space) -> io::Result<()> {
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
        for (name, _) in found.into_iter().filter(|(_, is_known)| !is_known) {
            files.remove(&child(&directory, &name)).await?;
        }
        Ok(())
    }

    /// One job's view of them.
    #[must_use]
    pub fn of(&self, tenant: Tenant, job: u64) -> JobCache {
        JobCache(Arc::new(OfJob { caches: self.clone(), tenant, job, pins: Mutex::default() }))
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
    }

    fn is_old(&self, saved: Timestamp, now: Timestamp) -> bool {
        let age = Duration::try_from(now.duration_since(saved)).unwrap_or(Duration::ZERO);
        age > self.0.config.max_age.get()
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory_of(&self, place: &Place) -> PathBuf {
        child(&child(&self.0.directory, &place.0), place.1.word())
    }

    /// Takes an entry out. The turn is held.
    async fn remove(&self, place: &Place) -> io::Result<()> {
        let json = child(&self.directory_of(place), &format!("{}.json", place.2));
        self.0.files.remove(&json).await?;
        let mut index = self.index();
        if let Some(entry) = index.entries.remove(place) {
            index.doomed.push(entry.version);
        }
        Ok(())
    }

    /// Removes files that nobody holds any more. The turn is held.
    async fn bury(&self) {
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

    /// Makes room for so many bytes more of a tenant, by what was longest not used: its own first. They count as its own
    /// from then on, until they are saved or given up.
    async fn make_room(&self, tenant: &str, bytes: u64) -> Result<(), CacheError> {
        let Config { size_gib, project_gib, .. } = self.0.config;
        let (size, project) = (size_gib.saturating_mul(1 << 30), project_gib.saturating_mul(1 << 30));
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
    fn settle(&self, tenant: &str, bytes: u64) {
        let mut index = self.index();
        if let Some(pending) = index.pending.get_mut(tenant) {
            *pending = pending.saturating_sub(bytes);
            if *pending == 0 {
                index.pending.remove(tenant);
            }
        }
    }
}

/// The caches as one job may use them. Clones are the same.
#[derive(Clone)]
pub struct JobCache(Arc<OfJob>);

struct OfJob {
    caches: Caches,
    tenant: Tenant,
    job: u64,
    /// What it has found: the same version for all its requests. Held for a few lines.
    pins: Mutex<BTreeMap<String, Arc<Version>>>,
}

impl JobCache {
    /// GitLab's id of its project.
    #[must_use]
    pub fn project(&self) -> u64 {
        self.0.tenant.project
    }

    /// The version that this job reads by this key, if there is one.
    pub async fn find(&self, key: &Key) -> Option<Arc<Version>> {
        let file = key.file();
        if let Some(version) = self.pins().get(&file) {
            return Some(Arc::clone(version));
        }
        let caches = &self.0.caches;
        let now = caches.0.clock.now();
        let (place, version, noted) = {
            let mut index = caches.index();
            let places = self.0.tenant.reads(key).iter();
            let mut places = places.map(|space| (self.0.tenant.directory().to_owned(), *space, file.clone()));
            let place = places
                .find(|place| index.entries.get(place).is_some_and(|entry| !caches.is_old(entry.version.saved, now)))?;
            let entry = index.entries.get_mut(&place)?;
            entry.used = now;
            let since = Duration::try_from(now.duration_since(entry.meta.used)).unwrap_or(Duration::ZERO);
            let noted = (since > USE_NOTED).then(|| {
                entry.meta.used = now;
                entry.meta.clone()
            });
            (place, Arc::clone(&entry.version), noted)
        };
        {
            let mut pins = self.pins();
            if pins.len() < PINS_MAX {
                pins.insert(file, Arc::clone(&version));
            }
        }
        if let Some(meta) = noted {
            caches.note(&place, &version, &meta).await;
        }
        Some(version)
    }

    fn pins(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Version>>> {
        self.0.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Up to so many bytes from `offset`.
    ///
    /// # Errors
    /// Its file.
    pub async fn read(&self, version: &Version, offset: u64, bytes: usize) -> io::Result<Bytes> {
        Ok(self.0.caches.0.files.read_at(&version.path, offset, bytes).await?.into())
    }

    /// Begins to save `bytes` bytes. What is there by this key stays until [`Save::commit`].
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn save(&self, key: &Key, bytes: u64) -> Result<Save, CacheError> {
        let caches = &self.0.caches;
        let tenant = &self.0.tenant;
        caches.make_room(tenant.directory(), bytes).await?;
        let place = (tenant.directory().to_owned(), tenant.writes(), key.file());
        let nonce: [u8; 8] = caches.0.rng.bytes();
        let file = format!("{}-{}.zip", place.2, hex(&nonce));
        let directory = caches.directory_of(&place);
        // From here on it is given up by being dropped.
        let mut save = Save {
            of: self.clone(),
            version: Arc::new(Version {
                path: child(&directory, &file),
                bytes,
                sha256: String::new(),
                saved: caches.0.clock.now(),
            }),
            place,
            key: key.clone(),
            file,
            at: 0,
            unsynced: 0,
            digest: Sha256::new(),
            is_over: false,
        };
        caches.0.files.create_dir(&directory).await?;
        save.put(Bytes::new()).await?;
        Ok(save)
    }
}

impl Caches {
    /// Writes an entry's time of use down, if it is still that entry.
    async fn note(&self, place: &Place, version: &Arc<Version>, meta: &Meta) {
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

    async fn write(&self, place: &Place, meta: &Meta) -> io::Result<()> {
        let json = serde_json::to_vec(meta).map_err(io::Error::other)?;
        self.0.files.replace(&child(&self.directory_of(place), &format!("{}.json", place.2)), json).await
    }
}

/// A save under way. Dropped before its end it leaves nothing.
pub struct Save {
    of: JobCache,
    version: Arc<Version>,
    place: Place,
    key: Key,
    file: String,
    at: u64,
    unsynced: u64,
    digest: Sha256,
    is_over: bool,
}

impl Save {
    /// The next bytes.
    ///
    /// # Errors
    /// [`CacheError::Length`] for more than was announced; the disk.
    pub async fn put(&mut self, bytes: Bytes) -> Result<(), CacheError> {
        let files = &self.of.0.caches.0.files;
        let next = self.at + bytes.len() as u64;
        if next > self.version.bytes {
            return Err(CacheError::Length);
        }
        self.digest.update(&bytes);
        self.unsynced += bytes.len() as u64;
        files.write_at(&self.version.path, self.at, bytes).await?;
        self.at = next;
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.unsynced = 0;
            files.sync(&self.version.path).await?;
        }
        Ok(())
    }

    /// All has come: from now on it is the entry. Its digest, hex.
    ///
    /// # Errors
    /// [`CacheError::Length`] for less than was announced; the disk: then the entry is the one of before.
    pub async fn commit(mut self) -> Result<String, CacheError> {
        if self.at != self.version.bytes {
            return Err(CacheError::Length);
        }
        let caches = self.of.0.caches.clone();
        caches.0.files.sync(&self.version.path).await?;
        let sha256 = hex(&std::mem::take(&mut self.digest).finalize());
        let now = caches.0.clock.now();
        let meta = Meta {
            key: self.key.words(),
            file: self.file.clone(),
            bytes: self.at,
            sha256: sha256.clone(),
            saved: now,
            used: now,
            job: self.of.0.job,
        };
        let version =
            Arc::new(Version { path: self.version.path.clone(), bytes: self.at, sha256: sha256.clone(), saved: now });
        let _turn = caches.0.turn.lock().await;
        caches.write(&self.place, &meta).await?;
        self.is_over = true;
        {
            let mut index = caches.index();
            let before = index.entries.insert(self.place.clone(), Entry { version, meta, used: now });
            index.doomed.extend(before.map(|entry| entry.version));
        }
        caches.settle(&self.place.0, self.version.bytes);
        self.of.pins().remove(&self.place.2);
        caches.bury().await;
        Ok(sha256)
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        if !self.is_over {
            let caches = &self.of.0.caches;
            caches.settle(&self.place.0, self.version.bytes);
            caches.index().doomed.push(Arc::clone(&self.version));
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
