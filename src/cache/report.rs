//! What is kept, for operators: counted, shown and thrown away while the daemon goes on.

use super::access::Space;
use super::store::{Caches, Entry, Place};
use crate::telemetry::chain;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Tenants, or entries of one, that are shown at most: an answer has a bound.
const SHOWN_MAX: usize = 5_000;

/// All caches of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheList {
    /// Bytes of entries, and of saves under way.
    pub bytes: u64,
    /// What they may be at most.
    pub bytes_max: u64,
    /// What one project's may be.
    pub project_bytes_max: u64,
    /// Whose, the largest first.
    pub tenants: Vec<TenantCaches>,
    /// Those that are left out, the smallest.
    #[serde(default)]
    pub more: usize,
}

/// The caches of one project, or of those that the operator has named together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantCaches {
    /// Its directory's name, which is unique on a host.
    pub id: String,
    /// The project's path when it last saved, or the name of those that share.
    pub name: String,
    /// Bytes of entries.
    pub bytes: u64,
    /// How many there are.
    pub entries: usize,
    /// When one was last used.
    pub used: Timestamp,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheEntry {
    /// The key.
    pub key: String,
    /// Who has written it: `protected`, or `open` to the others.
    pub space: Space,
    /// Its length.
    pub bytes: u64,
    /// Its digest, hex.
    pub sha256: String,
    /// When it was saved.
    pub saved: Timestamp,
    /// When it was last used.
    pub used: Timestamp,
    /// The job that saved it.
    pub job: u64,
}

/// Whose caches somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "found", rename_all = "snake_case")]
pub enum CachesFound {
    /// Here they are.
    Shown {
        /// Whose.
        tenant: Box<TenantCaches>,
        /// Its entries, newest use first.
        entries: Vec<CacheEntry>,
        /// Those that are left out.
        #[serde(default)]
        more: usize,
    },
    /// So much was thrown away.
    Cleared {
        /// Entries.
        entries: usize,
        /// Their bytes.
        bytes: u64,
        /// Why not all; none: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<String>,
    },
    /// Nobody of this name has any.
    Unknown,
    /// Projects of several GitLabs are meant; their ids.
    Ambiguous {
        /// The ids.
        ids: Vec<String>,
    },
    /// This daemon keeps none.
    Disabled,
}

impl Caches {
    /// Bytes that are kept or being saved, and what they may be at most.
    #[must_use]
    pub fn usage(&self) -> (u64, u64) {
        (self.index().bytes(None), self.bounds().0)
    }

    /// What is kept.
    #[must_use]
    pub fn list(&self) -> CacheList {
        let (size, project) = self.bounds();
        let index = self.index();
        let mut tenants: Vec<TenantCaches> = Vec::new();
        for (place, entry) in &index.entries {
            match tenants.last_mut().filter(|tenant| tenant.id == place.0) {
                Some(tenant) => tenant.add(entry),
                None => tenants.push(TenantCaches::of(place, entry)),
            }
        }
        let bytes = index.bytes(None);
        drop(index);
        tenants.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.id.cmp(&b.id)));
        let more = tenants.len().saturating_sub(SHOWN_MAX);
        tenants.truncate(SHOWN_MAX);
        CacheList { bytes, bytes_max: size, project_bytes_max: project, tenants, more }
    }

    /// The entries of one tenant: by its id, its path or name, or its project's number.
    #[must_use]
    pub fn show(&self, whose: &str) -> CachesFound {
        let id = match self.tenant_of(whose) {
            Ok(id) => id,
            Err(found) => return found,
        };
        let (mut tenant, mut entries): (Option<TenantCaches>, Vec<CacheEntry>) = (None, Vec::new());
        for (place, entry) in self.index().entries.iter().filter(|(place, _)| place.0 == id) {
            match &mut tenant {
                Some(tenant) => tenant.add(entry),
                None => tenant = Some(TenantCaches::of(place, entry)),
            }
            entries.push(CacheEntry {
                key: entry.meta.key.clone(),
                space: place.1,
                bytes: entry.version.bytes,
                sha256: entry.version.sha256.clone(),
                saved: entry.version.saved,
                used: entry.used,
                job: entry.meta.job,
            });
        }
        let Some(tenant) = tenant else { return CachesFound::Unknown };
        entries.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.key.cmp(&b.key)));
        let more = entries.len().saturating_sub(SHOWN_MAX);
        entries.truncate(SHOWN_MAX);
        CachesFound::Shown { tenant: Box::new(tenant), entries, more }
    }

    /// Throws entries away: a tenant's, or all; only those of this key, if one is named. Jobs that read them read them to
    /// their end, and what is being saved will be there.
    pub async fn clear(&self, whose: Option<&str>, key: Option<&str>) -> CachesFound {
        let id = match whose.map(|whose| self.tenant_of(whose)).transpose() {
            Ok(id) => id,
            Err(found) => return found,
        };
        let _turn = self.0.turn.lock().await;
        let wanted: Vec<(Place, u64)> = {
            let index = self.index();
            let of = index.entries.iter().filter(|(place, entry)| {
                id.as_ref().is_none_or(|id| *id == place.0) && key.is_none_or(|key| key == entry.meta.key)
            });
            of.map(|(place, entry)| (place.clone(), entry.version.bytes)).collect()
        };
        let (mut entries, mut bytes, mut failed) = (0, 0, None);
        for (place, length) in wanted {
            if let Err(error) = self.remove(&place).await {
                failed = Some(chain(&error));
                break;
            }
            (entries, bytes) = (entries + 1, bytes + length);
        }
        self.bury().await;
        CachesFound::Cleared { entries, bytes, failed }
    }

    /// The directory's name of whoever is called so.
    fn tenant_of(&self, whose: &str) -> Result<String, CachesFound> {
        let index = self.index();
        let mut named: BTreeMap<&str, bool> = BTreeMap::new();
        for (place, entry) in &index.entries {
            let id = place.0.as_str();
            let is = id == whose
                || id.split_once('-').is_some_and(|(_, project)| project == whose)
                || entry.meta.of.eq_ignore_ascii_case(whose);
            *named.entry(id).or_default() |= is;
        }
        let ids: Vec<String> = named.into_iter().filter(|(_, is)| *is).map(|(id, _)| id.to_owned()).collect();
        match &*ids {
            [] => Err(CachesFound::Unknown),
            [id] => Ok(id.clone()),
            _ => Err(CachesFound::Ambiguous { ids }),
        }
    }
}

impl TenantCaches {
    fn of(place: &Place, entry: &Entry) -> Self {
        let number = place.0.split_once('-').map_or(&*place.0, |(_, rest)| rest);
        let name = if entry.meta.of.is_empty() { number.to_owned() } else { entry.meta.of.clone() };
        Self { id: place.0.clone(), name, bytes: entry.version.bytes, entries: 1, used: entry.used }
    }

    fn add(&mut self, entry: &Entry) {
        self.bytes = self.bytes.saturating_add(entry.version.bytes);
        self.entries += 1;
        if entry.used > self.used {
            self.used = entry.used;
            if !entry.meta.of.is_empty() {
                self.name.clone_from(&entry.meta.of);
            }
        }
    }
}
