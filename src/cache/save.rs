//! A save under way: a file of its own, which is the entry once all of it has come, and nothing otherwise.

use super::access::Key;
use super::job::JobCache;
use super::store::{CacheError, Entry, Meta, Place, Version};
use crate::failpoint::{Point, reached};
use crate::hex::hex;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;

/// Written bytes that may not be on the disk yet: so that the end of a large save takes no longer than its answer may.
const UNSYNCED_BYTES_MAX: u64 = 64 << 20;

/// A save under way. Dropped before its end it leaves nothing.
pub struct Save {
    pub(super) of: JobCache,
    pub(super) version: Arc<Version>,
    pub(super) place: Place,
    pub(super) key: Key,
    pub(super) file: String,
    pub(super) at: u64,
    pub(super) unsynced: u64,
    pub(super) digest: Sha256,
    pub(super) is_over: bool,
}

impl Save {
    /// The next bytes.
    ///
    /// # Errors
    /// [`CacheError::Length`] for more than was announced; the disk.
    pub async fn put(&mut self, bytes: Bytes) -> Result<(), CacheError> {
        let files = &self.of.caches().0.files;
        let next = self.at + bytes.len() as u64;
        if next > self.version.bytes {
            return Err(CacheError::Length);
        }
        self.digest.update(&bytes);
        self.unsynced += bytes.len() as u64;
        files.write_at(&self.version.path, self.at, bytes).await?;
        self.at = next;
        reached(Point::K19);
        Ok(())
    }

    /// So much is written that the disk should have it, before the end has to wait for all of it: what waits for that.
    /// More may be put meanwhile.
    pub fn sync_due(&mut self) -> Option<impl Future<Output = Result<(), CacheError>> + Send + use<>> {
        (self.unsynced >= UNSYNCED_BYTES_MAX).then(|| {
            self.unsynced = 0;
            let (files, path) = (Arc::clone(&self.of.caches().0.files), self.version.path.clone());
            async move { Ok(files.sync(&path).await?) }
        })
    }

    /// All has come: from now on it is the entry. Its digest, hex.
    ///
    /// # Errors
    /// [`CacheError::Length`] for less than was announced; the disk: then the entry is the one of before.
    pub async fn commit(mut self) -> Result<String, CacheError> {
        if self.at != self.version.bytes {
            return Err(CacheError::Length);
        }
        let caches = self.of.caches().clone();
        caches.0.files.sync(&self.version.path).await?;
        // All of it is on disk, and nothing names it.
        reached(Point::K19);
        let sha256 = hex(&std::mem::take(&mut self.digest).finalize());
        let now = caches.0.clock.now();
        let meta = Meta {
            key: self.key.words(),
            file: self.file.clone(),
            bytes: self.at,
            sha256: sha256.clone(),
            saved: now,
            used: now,
            job: self.of.job(),
            of: self.of.tenant().name.clone(),
        };
        let version =
            Arc::new(Version { path: self.version.path.clone(), bytes: self.at, sha256: sha256.clone(), saved: now });
        let _turn = caches.0.turn.lock().await;
        caches.write(&self.place, &meta).await?;
        reached(Point::K19);
        self.is_over = true;
        {
            let mut index = caches.index();
            let before = index.entries.insert(self.place.clone(), Entry { version, meta, used: now });
            index.doomed.extend(before.map(|entry| entry.version));
        }
        caches.settle(&self.place.0, self.version.bytes);
        self.of.forget(&self.place.2).await;
        caches.bury().await;
        Ok(sha256)
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        if !self.is_over {
            let caches = self.of.caches();
            caches.settle(&self.place.0, self.version.bytes);
            caches.index().doomed.push(Arc::clone(&self.version));
        }
    }
}
