//! The caches as one job may use them.

use super::access::{Key, Tenant};
use super::notes::{Note, Notes, What};
use super::pins::{PINS_MAX, Pinned, Pins, place};
use super::save::Save;
use super::store::{CacheError, Caches, Version};
use super::upstream::{Object, Upstream, UpstreamError};
use crate::files::child;
use crate::gitlab::transport::Body;
use crate::hex::hex;
use bytes::Bytes;
use http::{Response, header};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// An entry's time of use is written down no more often than this.
const USE_NOTED: Duration = Duration::from_secs(3600);

/// The caches as one job may use them. Clones are the same.
#[derive(Clone)]
pub struct JobCache(Arc<OfJob>);

struct OfJob {
    caches: Caches,
    tenant: Tenant,
    job: u64,
    /// What its files are called by.
    name: String,
    /// What it has found: the same version for all its requests. Held for a few lines.
    pins: Mutex<Pins>,
    /// The same of an operator's store: which object, and its `etag`.
    met: Mutex<BTreeMap<String, (Object, String)>>,
    /// Whoever writes them down.
    turn: tokio::sync::Mutex<()>,
    /// Likewise held for a few lines.
    notes: Mutex<Notes>,
}

impl Caches {
    /// One job's view of them. `name`: what its files are called by, the same over restarts.
    #[must_use]
    pub fn of(&self, tenant: Tenant, job: u64, name: &str) -> JobCache {
        // What it read under another daemon, unless it was another's then: the operator's tenants may have changed.
        let restored = self.index().restored.get(name).filter(|(of, _)| of == tenant.directory()).cloned();
        JobCache(Arc::new(OfJob {
            caches: self.clone(),
            tenant,
            job,
            name: name.to_owned(),
            pins: Mutex::new(restored.map(|(_, pins)| pins).unwrap_or_default()),
            met: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            notes: Mutex::default(),
        }))
    }
}

impl JobCache {
    pub(super) fn caches(&self) -> &Caches {
        &self.0.caches
    }

    pub(super) fn tenant(&self) -> &Tenant {
        &self.0.tenant
    }

    pub(super) fn job(&self) -> u64 {
        self.0.job
    }

    /// GitLab's id of its project.
    #[must_use]
    pub fn project(&self) -> u64 {
        self.0.tenant.project
    }

    /// The version that this job reads by this key, if there is one.
    pub async fn find(&self, key: &Key) -> Option<Arc<Version>> {
        let (file, spaces) = (key.file(), self.0.tenant.reads(key));
        if let Some(pinned) = self.pins().get(&file).filter(|pinned| spaces.contains(&pinned.space)) {
            return Some(Arc::clone(&pinned.version));
        }
        let caches = &self.0.caches;
        let now = caches.0.clock.now();
        let (place, version, noted) = {
            let mut index = caches.index();
            let mut places = spaces.iter().map(|space| place(self.0.tenant.directory(), *space, &file));
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
                pins.insert(file, Pinned { space: place.1, version: Arc::clone(&version), kept: false });
            }
        }
        if let Some(meta) = noted {
            caches.note(&place, &version, &meta).await;
        }
        Some(version)
    }

    /// Has the next daemon know that this job reads this version by this key: before a part of it is given out.
    pub async fn hold(&self, key: &Key) {
        let is_kept = |pins: &Pins| pins.get(&key.file()).is_none_or(|pinned| pinned.kept);
        if is_kept(&self.pins()) {
            return;
        }
        let (_turn, file) = (self.0.turn.lock().await, key.file());
        let mut pins = self.pins().clone();
        let Some(pinned) = pins.get_mut(&file).filter(|pinned| !pinned.kept) else { return };
        pinned.kept = true;
        self.0.caches.write_pins(&self.0.name, self.0.tenant.directory(), &pins).await;
        // Only now: whoever asks beside this one waits for the disk, too.
        if let Some(pinned) = self.pins().get_mut(&file) {
            pinned.kept = true;
        }
    }

    /// It has saved that itself: what it read before is not what it reads now.
    pub(super) async fn forget(&self, file: &str) {
        let _turn = self.0.turn.lock().await;
        let (removed, pins) = {
            let mut pins = self.pins();
            (pins.remove(file), pins.clone())
        };
        if removed.is_some_and(|pinned| pinned.kept) {
            self.0.caches.write_pins(&self.0.name, self.0.tenant.directory(), &pins).await;
        }
    }

    fn pins(&self) -> MutexGuard<'_, Pins> {
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

    /// The operator's own store, if that is in place of this host's disk.
    #[must_use]
    pub fn upstream(&self) -> Option<&Upstream> {
        self.0.caches.0.upstream.as_ref()
    }

    /// Bytes that one save may have.
    #[must_use]
    pub fn bytes_max(&self) -> u64 {
        let (size, project) = self.0.caches.bounds();
        size.min(project)
    }

    /// As [`JobCache::find`] in the operator's store: the answer to a request for the object, or for a part of it, of the
    /// version that this job has met first.
    ///
    /// # Errors
    /// [`UpstreamError`].
    pub async fn find_upstream(
        &self,
        upstream: &Upstream,
        key: &Key,
        range: Option<&str>,
        total: Duration,
    ) -> Result<Option<Response<Body>>, UpstreamError> {
        let file = key.file();
        let met = self.met().get(&file).cloned();
        if let Some((object, version)) = met {
            return upstream.get(&object, (range, Some(&version)), total).await;
        }
        for space in self.0.tenant.reads(key) {
            let object = upstream.object(&self.0.tenant, *space, key);
            let Some(answer) = upstream.get(&object, (range, None), total).await? else { continue };
            let version = answer.headers().get(header::ETAG).and_then(|tag| tag.to_str().ok().map(str::to_owned));
            let mut met = self.met();
            if let Some(version) = version.filter(|_| met.len() < PINS_MAX) {
                met.insert(file, (object, version));
            }
            return Ok(Some(answer));
        }
        Ok(None)
    }

    /// Saves to the operator's store, all or nothing.
    ///
    /// # Errors
    /// [`UpstreamError`].
    pub async fn save_upstream(
        &self,
        upstream: &Upstream,
        key: &Key,
        (length, body): (u64, Body),
        total: Duration,
    ) -> Result<(), UpstreamError> {
        let object = upstream.object(&self.0.tenant, self.0.tenant.writes(), key);
        upstream.put(&object, length, body, total).await?;
        self.met().remove(&key.file());
        Ok(())
    }

    fn met(&self) -> MutexGuard<'_, BTreeMap<String, (Object, String)>> {
        self.0.met.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what has become of a request for this key, which began `since` then, for the job's log.
    pub fn note(&self, key: &Key, what: What, bytes: u64, since: Instant) {
        self.notes().note(&key.words(), what, bytes, since);
    }

    /// Goes on with what a former daemon has noted.
    pub fn go_on(&self, before: Vec<Note>) {
        *self.notes() = Notes::of(before);
    }

    /// What the job has had, and how often more than is noted.
    #[must_use]
    pub fn noted(&self) -> (Vec<Note>, u64) {
        self.notes().all()
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
