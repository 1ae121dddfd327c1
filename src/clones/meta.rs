//! What is known of a mirror over restarts: `mirror.json`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Its version; one of another is wiped.
pub(super) const VERSION: u32 = 1;

/// Its name.
pub(super) const FILE: &str = "mirror.json";

/// Bytes of it at most.
pub(super) const BYTES_MAX: u64 = 1024 * 1024;

/// A pack beside its index.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pack {
    /// `pack-` and hex.
    pub name: String,
    /// Bytes of the pack.
    pub bytes: u64,
    /// Bytes of its index.
    pub index_bytes: u64,
    /// Digest of the pack and then its index, hex, as they were when they first went onto a disk; `None`: not yet.
    pub sha256: Option<String>,
}

impl Pack {
    /// Whether a name is one of git's for a pack.
    #[must_use]
    pub fn is_name(name: &str) -> bool {
        name.strip_prefix("pack-").is_some_and(super::repository::is_object)
    }
}

/// A disk that machines read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its image's name.
    pub file: String,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Its digest, hex.
    pub sha256: String,
    /// Names of the packs on it.
    pub packs: Vec<String>,
}

/// One mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) version: u32,
    /// For people: whose it is.
    pub(super) gitlab: String,
    pub(super) project: u64,
    /// The mirror's directory.
    pub(super) mirror: String,
    pub(super) made: Timestamp,
    /// When a job had something of it last.
    pub(super) used: Timestamp,
    /// What its packs take.
    pub(super) packs: Vec<Pack>,
    pub(super) tips: Vec<String>,
    /// The disks, the one that lists them all first.
    pub(super) disks: Vec<Disk>,
    /// Fetches that have failed one after the other by no fault of GitLab's.
    #[serde(default)]
    pub(super) failed: u32,
}

impl Meta {
    /// Whether it is of this version, and each name in it one of ours: it lies on a disk.
    pub(super) fn is_sound(&self) -> bool {
        let is_name = |name: &str, suffix: &str| {
            name.strip_suffix(suffix)
                .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        self.version == VERSION
            && is_name(&self.mirror, ".git")
            && self.disks.iter().all(|disk| is_name(&disk.file, ".img"))
            && self.packs.iter().all(|pack| Pack::is_name(&pack.name))
            && self.tips.iter().all(|tip| super::repository::is_object(tip))
    }

    /// What it takes on the host's disk.
    pub(super) fn bytes(&self) -> u64 {
        let packs = self.packs.iter().map(|pack| pack.bytes.saturating_add(pack.index_bytes));
        packs.chain(self.disks.iter().map(|disk| disk.bytes)).fold(0, u64::saturating_add)
    }

    /// Bytes of packs that are on disks.
    pub(super) fn bytes_on_disks(&self) -> u64 {
        let on_disk = |pack: &&Pack| self.disks.iter().any(|disk| disk.packs.contains(&pack.name));
        self.packs.iter().filter(on_disk).fold(0, |sum, pack| sum.saturating_add(pack.bytes))
    }
}
