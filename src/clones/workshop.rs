//! The seam to git and to the files that it makes: what the mirrors' store has done outside of this process.
//!
//! None of it blocks the runtime, each call has a deadline of its own, and each may be taken twice.

pub use super::meta::{Disk, Pack};
use crate::BoxFuture;
use crate::secret::Secret;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;
use url::Url;

/// One fetch into a mirror.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// The repository. It holds no credential.
    pub url: Url,
    /// The job token.
    pub token: Secret,
    /// What is fetched, and where it goes.
    pub refspecs: Vec<String>,
    /// Characters of an object's id: by them a new mirror's kind is known.
    pub id_chars: usize,
    /// GitLab's CA chain, PEM; none: the host's.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and its key, PEM.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Bytes that it may bring.
    pub bytes_max: u64,
    /// How long it may take.
    pub deadline: Duration,
}

/// What a mirror holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Its packs, sorted by name, without their digests.
    pub packs: Vec<Pack>,
    /// Objects that its refs name, hex, the newest first.
    pub tips: Vec<String>,
}

/// Why a fetch brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// GitLab does not let this token read it, or knows no such repository.
    #[error("GitLab refuses it: {0}")]
    Refused(String),
    /// More bytes than it may.
    #[error("it is larger than it may be")]
    TooLarge,
    /// It took longer than it may.
    #[error("it took longer than it may")]
    Late,
    /// Anything else: no way to GitLab, objects that are none, a mirror that is damaged.
    #[error("{0}")]
    Failed(String),
    /// The host's disk.
    #[error("use the mirror's files")]
    Io(#[from] io::Error),
}

impl FetchError {
    /// In one word, for metrics.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::TooLarge => "too_large",
            Self::Late => "late",
            Self::Failed(_) | Self::Io(_) => "failed",
        }
    }
}

/// An image of packs that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Its digest, hex.
    pub sha256: String,
    /// The packs inside, each with its digest.
    pub packs: Vec<Pack>,
}

/// What an image is made of.
#[derive(Clone, Debug)]
pub struct Contents<'a> {
    /// The packs inside. One whose digest is known must still have it.
    pub packs: &'a [Pack],
    /// All packs that the mirror's refs need, those on other disks too.
    pub all: &'a [Pack],
    /// What the mirror's refs name.
    pub tips: &'a [String],
}

/// The seam.
pub trait Workshop: Send + Sync + 'static {
    /// Makes a directory in which QEMU's user finds disks that it can name, and nobody a list.
    fn make_directory<'a>(&'a self, directory: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// Fetches into a mirror, which is made if there is none, and says what it holds then.
    fn fetch<'a>(&'a self, mirror: &'a Path, fetch: &'a Fetch) -> BoxFuture<'a, Result<Held, FetchError>>;
    /// Makes fewer packs of a mirror's small ones, and says what it holds then.
    fn tidy<'a>(&'a self, mirror: &'a Path) -> BoxFuture<'a, Result<Held, FetchError>>;
    /// Makes the image of a disk, which no machine has yet, in a file that others may read. An error of
    /// [`io::ErrorKind::InvalidData`]: a pack is not what it was.
    fn build<'a>(
        &'a self,
        mirror: &'a Path,
        contents: Contents<'a>,
        image: &'a Path,
    ) -> BoxFuture<'a, io::Result<Built>>;
    /// Whether an image is what it was when it was made. Reads all of it, unless it has done so before and the file is
    /// still the same.
    fn is_whole<'a>(&'a self, image: &'a Path, disk: &'a Disk) -> BoxFuture<'a, bool>;
    /// The same, as far as that can be said at once.
    fn is_known_whole(&self, image: &Path, disk: &Disk) -> bool;
    /// Makes the file of a disk that is written later: so many bytes long, and empty.
    fn make_slot<'a>(&'a self, slot: &'a Path, bytes: u64) -> BoxFuture<'a, io::Result<()>>;
    /// Writes an image into such a file, what tells a guest that it is there last; not once `over` is true. Says whether
    /// it is there.
    fn fill<'a>(
        &'a self,
        image: &'a Path,
        slot: &'a Path,
        over: watch::Receiver<bool>,
    ) -> BoxFuture<'a, io::Result<bool>>;
}
