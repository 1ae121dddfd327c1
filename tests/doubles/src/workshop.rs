//! Git and disks of a world on paused time: servers that have what a test pushes, mirrors and images as small files.
//!
//! What an image holds can be read back ([`FakeWorkshop::image`]), so a test sees whose objects a machine was given.

use dayfly::BoxFuture;
use dayfly::clones::workshop::{Built, Contents, Disk, Fetch, FetchError, Held, Pack, Workshop};
use dayfly::files::Files;
use dayfly::hex::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// What a fetch comes to, besides what the server has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    /// It brings what there is.
    #[default]
    Well,
    /// GitLab refuses the token.
    Refused,
    /// What it brings is no repository.
    Broken,
    /// The disk is full.
    Full,
    /// It brings what there is, and no disk is made of it.
    NoDisk,
    /// The same, for what was there before is not what it was.
    Damaged,
}

/// What an image or a mirror holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Whose objects: the repository's URL.
    pub url: String,
    /// Names and bytes of packs.
    pub packs: Vec<(String, u64)>,
    /// What its refs name.
    pub tips: Vec<String>,
}

#[derive(Default)]
struct World {
    /// By URL: commits, the newest last, each with the bytes that it brings.
    servers: BTreeMap<String, Vec<(String, u64)>>,
    takes: Duration,
    mood: Mood,
    /// What fetches come to one after the other, again and again.
    moods: Vec<(Mood, Duration)>,
    begun: usize,
    /// What comes of the next disk that is made.
    build_fails: Option<io::ErrorKind>,
    /// Images are said to be of the repository that was fetched first.
    mixed_up: bool,
    fetches: Vec<String>,
    tokens: Vec<String>,
    /// Images that are known to be whole since the start.
    known: BTreeMap<PathBuf, String>,
}

/// The double. Clones share its world.
#[derive(Clone)]
pub struct FakeWorkshop {
    files: Arc<dyn Files>,
    world: Arc<Mutex<World>>,
}

/// How much of a pack's bytes an index takes.
const INDEX_BYTES: u64 = 1000;

impl FakeWorkshop {
    /// One that keeps its files there.
    #[must_use]
    pub fn new(files: Arc<dyn Files>) -> Self {
        Self { files, world: Arc::default() }
    }

    /// The same world, seen through other files: those of one daemon's life.
    #[must_use]
    pub fn through(&self, files: Arc<dyn Files>) -> Self {
        Self { files, world: self.world.clone() }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A server has this commit from now on, which is so many bytes.
    pub fn push(&self, url: &str, sha: &str, bytes: u64) {
        self.world().servers.entry(url.to_owned()).or_default().push((sha.to_owned(), bytes));
    }

    /// How long a fetch takes.
    pub fn set_takes(&self, takes: Duration) {
        self.world().takes = takes;
    }

    /// What fetches come to from now on.
    pub fn set_mood(&self, mood: Mood) {
        self.world().mood = mood;
    }

    /// What fetches come to, and how long they take, one after the other and again from the first.
    pub fn set_moods(&self, moods: Vec<(Mood, Duration)>) {
        self.world().moods = moods;
    }

    /// A mistake: images hold what belongs to another repository.
    pub fn mix_up(&self) {
        self.world().mixed_up = true;
    }

    /// URLs of all fetches that came to their end.
    #[must_use]
    pub fn fetches(&self) -> Vec<String> {
        self.world().fetches.clone()
    }

    /// The tokens that they were made with.
    #[must_use]
    pub fn tokens(&self) -> Vec<String> {
        self.world().tokens.clone()
    }

    /// As after a start: nobody has looked at any image.
    pub fn forget(&self) {
        self.world().known.clear();
    }

    /// What an image holds; `None`: it is none.
    pub async fn image(&self, path: &Path) -> Option<Kept> {
        self.kept(path).await.ok()
    }

    async fn kept(&self, path: &Path) -> io::Result<Kept> {
        let text = self.files.read(path, 1 << 20).await?;
        Ok(serde_json::from_slice(&text)?)
    }

    async fn held(&self, mirror: &Path) -> Result<Held, FetchError> {
        let kept = self.kept(&mirror.join("held")).await?;
        let pack = |(name, bytes): (String, u64)| Pack { name, bytes, index_bytes: INDEX_BYTES, sha256: None };
        Ok(Held { packs: kept.packs.into_iter().map(pack).collect(), tips: kept.tips })
    }
}

impl Workshop for FakeWorkshop {
    fn make_directory<'a>(&'a self, directory: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.files.create_dir(directory)
    }

    fn fetch<'a>(&'a self, mirror: &'a Path, fetch: &'a Fetch) -> BoxFuture<'a, Result<Held, FetchError>> {
        Box::pin(async move {
            let (mood, takes) = {
                let mut world = self.world();
                world.begun += 1;
                match world.moods.len() {
                    0 => (world.mood, world.takes),
                    count => world.moods[world.begun % count],
                }
            };
            self.files.create_dir(mirror).await?;
            if takes > fetch.deadline {
                tokio::time::sleep(fetch.deadline).await;
                return Err(FetchError::Late);
            }
            tokio::time::sleep(takes).await;
            match mood {
                Mood::Well => {}
                Mood::Refused => return Err(FetchError::Refused("error: 403".into())),
                Mood::Broken => return Err(FetchError::Failed("fsck says no".into())),
                Mood::Full => return Err(io::Error::from(io::ErrorKind::StorageFull).into()),
                Mood::NoDisk => self.world().build_fails = Some(io::ErrorKind::Other),
                Mood::Damaged => self.world().build_fails = Some(io::ErrorKind::InvalidData),
            }
            let url = fetch.url.to_string();
            let has = self.world().servers.get(&url).cloned();
            let Some(commits) = has else { return Err(FetchError::Refused("not found".into())) };
            let mut kept = self.kept(&mirror.join("held")).await.unwrap_or_default();
            let new: Vec<_> = commits.iter().filter(|(sha, _)| !kept.tips.contains(sha)).cloned().collect();
            let bytes = new.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
            if bytes > fetch.bytes_max {
                return Err(FetchError::TooLarge);
            }
            if bytes > 0 {
                let name = hex(&Sha256::digest(format!("{url} {new:?}")))[..40].to_owned();
                kept.packs.push((format!("pack-{name}"), bytes));
            }
            kept.packs.sort();
            kept.url.clone_from(&url);
            kept.tips.extend(new.into_iter().map(|(sha, _)| sha));
            self.files.replace(&mirror.join("held"), serde_json::to_vec(&kept).map_err(io::Error::from)?).await?;
            {
                let mut world = self.world();
                world.fetches.push(url);
                world.tokens.push(fetch.token.expose().to_owned());
            }
            self.held(mirror).await
        })
    }

    fn tidy<'a>(&'a self, mirror: &'a Path) -> BoxFuture<'a, Result<Held, FetchError>> {
        Box::pin(async move {
            let mut kept = self.kept(&mirror.join("held")).await?;
            let bytes = kept.packs.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
            let name = hex(&Sha256::digest(format!("{:?}", kept.packs)))[..40].to_owned();
            kept.packs = vec![(format!("pack-{name}"), bytes)];
            self.files.replace(&mirror.join("held"), serde_json::to_vec(&kept).map_err(io::Error::from)?).await?;
            self.held(mirror).await
        })
    }

    fn build<'a>(
        &'a self,
        mirror: &'a Path,
        contents: Contents<'a>,
        image: &'a Path,
    ) -> BoxFuture<'a, io::Result<Built>> {
        Box::pin(async move {
            if let Some(kind) = self.world().build_fails.take() {
                return Err(kind.into());
            }
            let own = self.kept(&mirror.join("held")).await?.url;
            let other = {
                let world = self.world();
                world.servers.keys().find(|url| world.mixed_up && **url != own).cloned()
            };
            let url = other.unwrap_or(own);
            let packs = contents.packs.iter().map(|pack| (pack.name.clone(), pack.bytes)).collect();
            let text = serde_json::to_vec(&Kept { url, packs, tips: contents.tips.to_vec() })?;
            let sha256 = hex(&Sha256::digest(&text));
            let bytes = text.len() as u64;
            self.files.replace(image, text).await?;
            self.world().known.insert(image.to_owned(), sha256.clone());
            let digest = |pack: &Pack| Pack { sha256: Some(pack.name.clone()), ..pack.clone() };
            Ok(Built { bytes, sha256, packs: contents.packs.iter().map(digest).collect() })
        })
    }

    fn is_whole<'a>(&'a self, image: &'a Path, disk: &'a Disk) -> BoxFuture<'a, bool> {
        Box::pin(async move {
            let whole =
                self.files.read(image, 1 << 20).await.is_ok_and(|text| hex(&Sha256::digest(text)) == disk.sha256);
            if whole {
                self.world().known.insert(image.to_owned(), disk.sha256.clone());
            }
            whole
        })
    }

    fn is_known_whole(&self, image: &Path, disk: &Disk) -> bool {
        self.world().known.get(image) == Some(&disk.sha256)
    }

    fn make_slot<'a>(&'a self, slot: &'a Path, _bytes: u64) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            match self.files.length(slot).await? {
                Some(_) => Ok(()),
                None => self.files.replace(slot, Vec::new()).await,
            }
        })
    }

    fn fill<'a>(
        &'a self,
        image: &'a Path,
        slot: &'a Path,
        over: watch::Receiver<bool>,
    ) -> BoxFuture<'a, io::Result<bool>> {
        Box::pin(async move {
            let text = self.files.read(image, 1 << 20).await?;
            if *over.borrow() {
                return Ok(false);
            }
            self.files.replace(slot, text).await?;
            Ok(true)
        })
    }
}
