//! Is a file still the one that was checked? Told by what the file system says of it, so that it costs nothing.
//!
//! Overlays name their base image by path, so a base that is exchanged, or written over in place,
//! changes every machine that starts from it (threats.md H11). The store takes a [`Stamp`] with each
//! look at an image and compares it with the one before; a machine's maker compares once more when
//! QEMU has the file open.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What tells the files of an image apart from others at the same paths: device, inode, length and
/// time of the last write. Their owner may change: libvirtd lends kernel and initrd to QEMU's user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp(Vec<(PathBuf, u64, u64, u64, i64, i64)>);

impl Stamp {
    /// The stamp of these files as they are now.
    ///
    /// # Errors
    /// One of them cannot be looked at.
    pub(crate) fn of(files: impl IntoIterator<Item = PathBuf>) -> io::Result<Self> {
        let one = |path: PathBuf| {
            let found = fs::metadata(&path)?;
            Ok((path, found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
        };
        files.into_iter().map(one).collect::<io::Result<_>>().map(Self)
    }

    /// When the last of them was written; `None`: they are on no disk.
    #[must_use]
    pub fn made(&self) -> Option<SystemTime> {
        let newest = self.0.iter().map(|(.., seconds, _)| *seconds).max()?;
        Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(newest).ok()?))
    }

    /// Whether they are still what they were. One that cannot be looked at is not.
    pub async fn holds(&self) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let before = self.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let now = Self::of(before.0.iter().map(|(path, ..)| path.clone()));
            now.is_ok_and(|now| now == before)
        });
        looked.await.unwrap_or(false)
    }
}

/// What the store has made of an image before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing: it is seen for the first time.
    New,
    /// It was good, and is the same.
    Good,
    /// It was refused, and is the same.
    Refused,
    /// It is another than before.
    Changed,
}

/// The stamps that this process has seen, by the image's directory. Clones share them; the mutex is
/// held for one line.
#[derive(Clone, Debug, Default)]
pub(super) struct Stamps(Arc<Mutex<BTreeMap<PathBuf, (Stamp, bool)>>>);

impl Stamps {
    pub(super) fn known(&self, dir: &Path, stamp: &Stamp) -> Known {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).get(dir) {
            None => Known::New,
            Some((seen, _)) if seen != stamp => Known::Changed,
            Some((_, true)) => Known::Good,
            Some((_, false)) => Known::Refused,
        }
    }

    pub(super) fn note(&self, dir: &Path, stamp: &Stamp, good: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.to_owned(), (stamp.clone(), good));
    }
}
