//! The mirrors on disk: brought up to date, made into disks, and thrown away by age, by threshold and by quota.
//!
//! ```text
//! <state>/clones/<project>/mirror.json    what there is: names mirror and disks; written before the first of them is made,
//!                                         and before any is used
//!                          <random>.git   the mirror: nobody's but ours
//!                          <random>.img   a disk: written once, then only read
//!                slots/df-<id>.img        the disk of one machine that is written until its job is handed out
//! ```
//!
//! A file that no `mirror.json` names has come to no end: it is removed at the next start. Most packs are small and share
//! the first disk, which is made anew with each fetch; a large one has a disk of its own, so that no update writes it
//! again. Whoever changes a mirror has its turn; whoever reads its disks holds on to them, and their files go with the last.

use super::Attached;
use super::job::{JobClone, Progress, Watched};
use super::meta::{self, Disk, Meta, Pack};
use super::repository::Repository;
use super::slots::Slots;
use super::workshop::{Contents, Fetch, FetchError, Held, Workshop};
use crate::clock::Clock;
use crate::config::Clones as Config;
use crate::failpoint::{Point, reached};
use crate::files::{Files, child};
use crate::hex::hex;
use crate::metrics::Metrics;
use crate::rng::Rng;
use crate::secret::Secret;
use crate::telemetry::chain;
use crate::vm::VmId;
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A pack from here on has a disk of its own.
pub(super) const LARGE_BYTES: u64 = 32 << 20;

/// Disks of one mirror at most: each is a device of a machine's. A mirror that would have more is made anew.
const DISKS_MAX: usize = 12;

/// Packs of the first disk before they are made fewer.
const SMALL_PACKS_MAX: usize = 8;

/// Fetches at once; others wait, and are late if that takes too long.
const FETCHES_MAX: usize = 4;

/// A fetch that may bring less is not begun.
const FETCH_BYTES_MIN: u64 = 1 << 20;

/// Failures of a mirror before it is made anew.
const FAILURES_MAX: u32 = 2;

/// How long a repository that is too large, or could not be fetched at all, is left alone.
const REST: Duration = Duration::from_secs(6 * 3600);
const SHORT_REST: Duration = Duration::from_secs(10 * 60);

/// A mirror's time of use is written down no more often than this.
const USE_NOTED: Duration = Duration::from_secs(3600);

/// By what the job's GitLab is spoken to.
#[derive(Clone, Debug)]
pub struct Access {
    /// The job token.
    pub token: Secret,
    /// GitLab's CA chain, PEM; none: the host's.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and its key, PEM.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// All mirrors of a host. Clones share them.
#[derive(Clone)]
pub struct Clones(Arc<Shared>);

struct Shared {
    workshop: Arc<dyn Workshop>,
    files: Arc<dyn Files>,
    directory: PathBuf,
    config: Config,
    /// Free bytes that are left to others.
    reserve: u64,
    clock: Clock,
    rng: Rng,
    metrics: Metrics,
    /// By the names of their directories. Held for a few lines.
    mirrors: Mutex<BTreeMap<String, Arc<Mirror>>>,
    slots: Slots,
    fetches: Semaphore,
    updates: TaskTracker,
    stop: CancellationToken,
}

/// A disk's file, for as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Shelf {
    path: PathBuf,
    disk: Disk,
}

/// What there is for a machine.
#[derive(Default)]
struct Found {
    shelves: Vec<Arc<Shelf>>,
    /// Bytes of the packs on them.
    bytes: u64,
    /// Whether the job's commit is among what the mirror's refs name.
    has_it: bool,
}

/// One project's.
struct Mirror {
    directory: PathBuf,
    /// Whoever changes what is on disk.
    turn: tokio::sync::Mutex<()>,
    /// Held for a few lines.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    meta: Option<Meta>,
    shelves: Vec<Arc<Shelf>>,
    /// Of no mirror any more.
    doomed: Vec<Arc<Shelf>>,
    /// Until then it is left alone.
    rests: Option<Timestamp>,
}

impl Mirror {
    fn new(directory: PathBuf) -> Arc<Self> {
        Arc::new(Self { directory, turn: tokio::sync::Mutex::default(), state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes(&self) -> u64 {
        self.state().meta.as_ref().map_or(0, Meta::bytes)
    }

    /// Takes a new state of the disk over: whoever begins now has these.
    fn set(&self, meta: Option<Meta>) {
        let mut state = self.state();
        let old = std::mem::take(&mut state.shelves);
        let disks = meta.as_ref().map(|meta| meta.disks.clone()).unwrap_or_default();
        state.shelves = disks
            .into_iter()
            .map(|disk| {
                let known = old.iter().find(|shelf| shelf.disk == disk);
                known.cloned().unwrap_or_else(|| Arc::new(Shelf { path: child(&self.directory, &disk.file), disk }))
            })
            .collect();
        let gone = old.into_iter().filter(|shelf| !state.shelves.iter().any(|kept| Arc::ptr_eq(kept, shelf)));
        let gone: Vec<_> = gone.collect();
        state.doomed.extend(gone);
        state.meta = meta;
    }
}

/// Why a mirror could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpdateError {
    #[error("fetch it")]
    Fetch(#[from] FetchError),
    #[error("the host has no room for it")]
    NoRoom,
    #[error("it is left alone for a while, after it could not be fetched")]
    Rests,
    #[error("write it down")]
    Io(#[from] io::Error),
}

impl UpdateError {
    fn word(&self) -> &'static str {
        match self {
            Self::Fetch(error) => error.word(),
            Self::NoRoom => "no_room",
            Self::Rests => "rests",
            Self::Io(_) => "failed",
        }
    }
}

impl Clones {
    /// Finds what is there. `reserve`: free bytes that are left to others. What cannot be read is no mirror, and removed.
    ///
    /// # Errors
    /// The directory cannot be listed. It is made with the first fetch.
    pub async fn open(
        (workshop, files): (Arc<dyn Workshop>, Arc<dyn Files>),
        directory: PathBuf,
        (config, reserve): (Config, u64),
        (clock, rng): (Clock, Rng),
        metrics: Metrics,
    ) -> io::Result<Self> {
        let clones = Self(Arc::new(Shared {
            slots: Slots::new(child(&directory, "slots")),
            workshop,
            files,
            directory,
            config,
            reserve,
            clock,
            rng,
            metrics,
            mirrors: Mutex::default(),
            fetches: Semaphore::new(FETCHES_MAX),
            updates: TaskTracker::new(),
            stop: CancellationToken::new(),
        }));
        for entry in clones.0.files.list(&clones.0.directory).await? {
            if entry.name != "slots" {
                clones.scan(&entry.name).await?;
            }
        }
        clones.count();
        Ok(clones)
    }

    async fn scan(&self, name: &str) -> io::Result<()> {
        let files = &self.0.files;
        let directory = child(&self.0.directory, name);
        // Without a disk its first fetch has come to no end.
        let Some(meta) = self.read(&directory).await.filter(|meta| !meta.disks.is_empty()) else {
            return files.remove(&directory).await;
        };
        for disk in &meta.disks {
            if files.length(&child(&directory, &disk.file)).await? != Some(disk.bytes) {
                tracing::warn!(
                    project = meta.project,
                    "a disk of a mirror is not there any more; the mirror is made anew"
                );
                return files.remove(&directory).await;
            }
        }
        let mirror = Mirror::new(directory);
        mirror.set(Some(meta));
        self.remove_unnamed(&mirror).await?;
        self.mirrors().insert(name.to_owned(), mirror);
        Ok(())
    }

    /// Removes what its `mirror.json` does not name, but for disks that somebody holds. The turn is held, or there is none
    /// yet.
    async fn remove_unnamed(&self, mirror: &Mirror) -> io::Result<()> {
        for entry in self.0.files.list(&mirror.directory).await? {
            let path = child(&mirror.directory, &entry.name);
            let is_its = {
                let state = mirror.state();
                let is_named = |meta: &Meta| entry.name == meta::FILE || entry.name == meta.mirror;
                state.meta.as_ref().is_some_and(is_named)
                    || state.shelves.iter().chain(&state.doomed).any(|shelf| shelf.path == path)
            };
            if !is_its {
                self.0.files.remove(&path).await?;
            }
        }
        Ok(())
    }

    async fn read(&self, directory: &Path) -> Option<Meta> {
        let json = self.0.files.read(&child(directory, meta::FILE), meta::BYTES_MAX).await.ok()?;
        let meta = serde_json::from_slice::<Meta>(&json).ok()?;
        meta.is_sound().then_some(meta)
    }

    fn mirrors(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Mirror>>> {
        self.0.mirrors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mirrors, and bytes that they and their disks take.
    #[must_use]
    pub fn usage(&self) -> (usize, u64) {
        let mirrors: Vec<_> = self.mirrors().values().cloned().collect();
        let kept = mirrors.iter().filter(|mirror| mirror.state().meta.is_some()).count();
        (kept, mirrors.iter().fold(0, |sum, mirror| sum.saturating_add(mirror.bytes())))
    }

    /// Begins for a job whose machine has this id: says which disks that may have, and brings the mirror up to date
    /// meanwhile if it has not got the job's commit. Makes nothing yet: the owner writes the disks down first.
    #[must_use]
    pub fn begin(&self, repository: Repository, access: Access, vm: &VmId) -> JobClone {
        let mirror = {
            let mut mirrors = self.mirrors();
            let name = repository.directory();
            let made = || Mirror::new(child(&self.0.directory, &name));
            mirrors.entry(name.clone()).or_insert_with(made).clone()
        };
        let Found { shelves, bytes, has_it } = self.look(&mirror, &repository.sha).unwrap_or_default();
        self.0.metrics.clones().jobs.inc(if shelves.is_empty() { "miss" } else { "hit" });
        let disks = shelves.iter().map(|shelf| shelf.path.clone()).collect();
        let (progress, watched) = Progress::new();
        let slot = (!has_it).then(|| self.0.slots.take(vm));
        let attached = Attached { disks, slot: slot.as_ref().map(|slot| slot.path().to_owned()) };
        if slot.is_some() {
            let (clones, attached) = (self.clone(), attached.clone());
            let stop = self.0.stop.clone();
            let update = async move { clones.update(&mirror, &repository, access, &attached, &watched).await };
            let span = tracing::Span::current();
            self.0.updates.spawn(tracing::Instrument::instrument(
                async move {
                    // A hand-over drops it: what is half made is removed at the next start.
                    stop.run_until_cancelled(update).await;
                },
                span,
            ));
        }
        JobClone::new(self.clone(), attached, bytes, shelves, slot, progress)
    }

    /// Takes the disks of a machine up again, after a restart: those that are still there. A disk that is to be written is
    /// nobody's to write any more, and there all the same, for the machine may not have been started.
    pub async fn adopt(&self, vm: &VmId, attached: &Attached) -> JobClone {
        let mut held = Vec::new();
        let mut disks = Vec::new();
        let mirrors: Vec<_> = self.mirrors().values().cloned().collect();
        for path in &attached.disks {
            let shelves = mirrors
                .iter()
                .find_map(|mirror| mirror.state().shelves.iter().find(|shelf| shelf.path == *path).cloned());
            if let Some(shelf) = shelves
                && self.0.files.length(path).await.is_ok_and(|length| length == Some(shelf.disk.bytes))
            {
                disks.push(path.clone());
                held.push(shelf);
            }
        }
        // All or none: the first lists what is on the others.
        if disks.len() != attached.disks.len() {
            disks.clear();
            held.clear();
        }
        let slot = attached.slot.is_some().then(|| self.0.slots.take(vm));
        let attached = Attached { disks, slot: slot.as_ref().map(|slot| slot.path().to_owned()) };
        let (progress, _) = Progress::new();
        JobClone::new(self.clone(), attached, 0, held, slot, progress)
    }

    /// What a machine may have; `None`: nothing. Disks that nobody has looked at since the start are looked at with the next
    /// fetch, for the next job.
    fn look(&self, mirror: &Arc<Mirror>, sha: &str) -> Option<Found> {
        let state = mirror.state();
        let meta = state.meta.as_ref().filter(|meta| !self.is_old(meta))?;
        let known = |shelf: &Arc<Shelf>| self.0.workshop.is_known_whole(&shelf.path, &shelf.disk);
        if state.shelves.is_empty() || !state.shelves.iter().all(known) {
            return None;
        }
        let has_it = meta.tips.iter().any(|tip| tip == sha);
        Some(Found { shelves: state.shelves.clone(), bytes: meta.bytes_on_disks(), has_it })
    }

    fn is_old(&self, meta: &Meta) -> bool {
        let age = Duration::try_from(self.0.clock.now().duration_since(meta.made)).unwrap_or(Duration::ZERO);
        age > self.0.config.max_age.get()
    }

    /// Brings a mirror up to date for a job, and gives its machine what that brought if it is still in time.
    async fn update(
        &self,
        mirror: &Arc<Mirror>,
        repository: &Repository,
        access: Access,
        attached: &Attached,
        watched: &Watched,
    ) {
        let since = Instant::now();
        let (shelf, bytes) = match self.bring(mirror, repository, access).await {
            Ok(brought) => brought,
            Err(error) => {
                self.0.metrics.clones().fetches.inc(error.word());
                let project = repository.project;
                tracing::info!(project, error = chain(&error), "the mirror is not brought up to date");
                return watched.ended(&error);
            }
        };
        self.0.metrics.clones().fetches.inc("fetched");
        self.0.metrics.clones().fetched_bytes.inc_by(bytes);
        let took = since.elapsed();
        tracing::info!(project = repository.project, bytes, took_ms = took.as_millis(), "the mirror is up to date");
        if attached.disks.contains(&shelf.path) {
            // There was nothing new.
            watched.filled(bytes, took);
        } else if let Some(slot) = &attached.slot
            && watched.machine_is_up().await
        {
            match self.fill(&shelf, slot, watched).await {
                Ok(true) => {
                    reached(Point::K20);
                    watched.filled(bytes, took);
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(error = chain(&error), "give a machine what a fetch has brought");
                    watched.ended(&error);
                }
            }
        }
        drop(shelf);
        self.tidy(mirror).await;
        self.enforce(mirror).await;
        self.count();
    }

    /// Copies a disk into a machine's own, if the host has room for it. Whether it is there.
    async fn fill(&self, shelf: &Shelf, slot: &Path, watched: &Watched) -> Result<bool, UpdateError> {
        let free = self.0.files.free_bytes(&self.0.directory).await?.saturating_sub(self.0.reserve);
        if shelf.disk.bytes > free {
            return Err(UpdateError::NoRoom);
        }
        Ok(self.0.workshop.fill(&shelf.path, slot, watched.over()).await?)
    }

    /// Fetches, unless the commit is there by now; the disk that holds what is not on others, and bytes that came.
    async fn bring(
        &self,
        mirror: &Arc<Mirror>,
        repository: &Repository,
        access: Access,
    ) -> Result<(Arc<Shelf>, u64), UpdateError> {
        // Another job's fetch may be under way: what that brings may be all that this one wants.
        let patience = self.0.config.fetch_deadline.get();
        let late = |_| UpdateError::Fetch(FetchError::Late);
        let _turn = timeout(patience, mirror.turn.lock()).await.map_err(late)?;
        self.verify(mirror).await;
        if let Some(found) = self.look(mirror, &repository.sha)
            && found.has_it
            && let Some(first) = found.shelves.first()
        {
            return Ok((first.clone(), 0));
        }
        let now = self.0.clock.now();
        if mirror.state().rests.is_some_and(|until| until > now) {
            return Err(UpdateError::Rests);
        }
        let permit = timeout(patience, self.0.fetches.acquire()).await.map_err(late)?;
        let before = self.prepare(mirror, repository).await?;
        let bytes_max = self.room(mirror, &before).await?;
        let fetch = Fetch {
            url: repository.url.clone(),
            token: access.token,
            refspecs: repository.refspecs.clone(),
            id_chars: repository.sha.len(),
            ca_file: access.ca_file,
            client: access.client,
            bytes_max,
            deadline: self.0.config.fetch_deadline.get(),
        };
        let fetched = self.0.workshop.fetch(&child(&mirror.directory, &before.mirror), &fetch).await;
        drop(permit);
        reached(Point::K20);
        let held = match fetched {
            Ok(held) => held,
            Err(error) => {
                self.failed(mirror, before, &error).await?;
                return Err(error.into());
            }
        };
        let sum = |packs: &[Pack]| packs.iter().fold(0_u64, |sum, pack| sum.saturating_add(pack.bytes));
        let bytes = sum(&held.packs).saturating_sub(sum(&before.packs));
        if before.failed == 0
            && (&held.packs, &held.tips) == (&without_digests(&before.packs), &before.tips)
            && let Some(first) = mirror.state().shelves.first()
        {
            return Ok((first.clone(), 0));
        }
        if let Err(error) = self.publish(mirror, Meta { failed: 0, ..before.clone() }, held).await {
            let error = FetchError::Io(error);
            self.failed(mirror, before, &error).await?;
            self.remove_unnamed(mirror).await?;
            return Err(error.into());
        }
        let first = mirror.state().shelves.first().cloned();
        first.map(|first| (first, bytes)).ok_or_else(|| UpdateError::Io(io::Error::other("a mirror without a disk")))
    }

    /// What is there of a mirror; it is written down before anything of it is made. The turn is held.
    async fn prepare(&self, mirror: &Arc<Mirror>, repository: &Repository) -> Result<Meta, UpdateError> {
        let known = mirror.state().meta.clone();
        if let Some(meta) = known {
            if !self.is_old(&meta) {
                return Ok(meta);
            }
            self.wipe(mirror).await?;
        }
        let now = self.0.clock.now();
        let meta = Meta {
            version: meta::VERSION,
            gitlab: repository.gitlab.to_string(),
            project: repository.project,
            mirror: format!("{}.git", self.random()),
            made: now,
            used: now,
            packs: Vec::new(),
            tips: Vec::new(),
            disks: Vec::new(),
            failed: 0,
        };
        self.0.workshop.make_directory(&self.0.directory).await?;
        self.0.workshop.make_directory(&mirror.directory).await?;
        self.write(mirror, &meta).await?;
        mirror.set(Some(meta.clone()));
        reached(Point::K20);
        Ok(meta)
    }

    fn random(&self) -> String {
        hex(&self.0.rng.bytes::<10>())
    }

    async fn write(&self, mirror: &Mirror, meta: &Meta) -> io::Result<()> {
        let json = serde_json::to_vec(meta)?;
        self.0.files.replace(&child(&mirror.directory, meta::FILE), json).await
    }

    /// Bytes that a fetch may bring: what it brings is there twice, in the mirror and on a disk.
    async fn room(&self, mirror: &Arc<Mirror>, meta: &Meta) -> Result<u64, UpdateError> {
        let config = &self.0.config;
        let (size, project) = (gib(config.size_gib), gib(config.project_gib));
        let free = self.0.files.free_bytes(&self.0.directory).await?.saturating_sub(self.0.reserve);
        let own = meta.bytes();
        let room = project.min(size).saturating_sub(own).min(free) / 2;
        let bytes = room.min(config.fetch_mib.saturating_mul(1 << 20));
        if bytes >= FETCH_BYTES_MIN {
            return Ok(bytes);
        }
        if !meta.packs.is_empty() && free / 2 >= FETCH_BYTES_MIN {
            // It has grown to its threshold: the next job makes it anew.
            tracing::info!(
                project = meta.project,
                bytes = own,
                "a mirror has grown as large as it may; it is made anew"
            );
            self.0.metrics.clones().wiped.inc("threshold");
            self.wipe(mirror).await?;
        }
        Err(UpdateError::NoRoom)
    }

    /// What becomes of a mirror after a fetch that has failed. The turn is held.
    async fn failed(&self, mirror: &Arc<Mirror>, before: Meta, error: &FetchError) -> io::Result<()> {
        let anew = |rest: Duration| {
            let now = self.0.clock.now();
            mirror.state().rests = Some(now.checked_add(rest).unwrap_or(now));
        };
        match error {
            // Of the token, or of the way: the mirror is as good as before.
            FetchError::Refused(_) | FetchError::Late => {
                if before.packs.is_empty() {
                    // A whole history that takes too long would be tried with each job.
                    if matches!(error, FetchError::Late) {
                        anew(SHORT_REST);
                    }
                    self.wipe(mirror).await?;
                }
                Ok(())
            }
            FetchError::TooLarge => {
                if before.packs.is_empty() {
                    anew(REST);
                }
                self.0.metrics.clones().wiped.inc("threshold");
                self.wipe(mirror).await
            }
            FetchError::Failed(_) | FetchError::Io(_) => {
                let is_damaged = matches!(error, FetchError::Io(error) if error.kind() == io::ErrorKind::InvalidData);
                let failed = if is_damaged { FAILURES_MAX } else { before.failed.saturating_add(1) };
                if before.packs.is_empty() {
                    anew(SHORT_REST);
                }
                if before.packs.is_empty() || failed >= FAILURES_MAX {
                    self.0.metrics.clones().wiped.inc("damaged");
                    return self.wipe(mirror).await;
                }
                let meta = Meta { failed, ..before };
                self.write(mirror, &meta).await?;
                mirror.set(Some(meta));
                Ok(())
            }
        }
    }

    /// Makes the disks of what a mirror holds by now, and names them. The turn is held.
    async fn publish(&self, mirror: &Arc<Mirror>, before: Meta, mut held: Held) -> io::Result<()> {
        keep_digests(&before.packs, &mut held.packs);
        let source = child(&mirror.directory, &before.mirror);
        let own_disk = |disk: &&Disk| {
            let pack = held.packs.iter().find(|pack| disk.packs == [pack.name.as_str()]);
            pack.is_some_and(|pack| pack.bytes >= LARGE_BYTES)
        };
        let mut large: Vec<Disk> = before.disks.iter().filter(own_disk).cloned().collect();
        let covered: BTreeSet<String> = large.iter().flat_map(|disk| disk.packs.clone()).collect();
        let rest: Vec<Pack> = held.packs.iter().filter(|pack| !covered.contains(&pack.name)).cloned().collect();
        let first = self.build(mirror, &source, (&rest, &mut held)).await?;
        reached(Point::K20);
        let mut disks = vec![first];
        disks.append(&mut large);
        let meta = Meta { disks, packs: held.packs, tips: held.tips, used: self.0.clock.now(), ..before };
        self.write(mirror, &meta).await?;
        reached(Point::K20);
        mirror.set(Some(meta));
        self.bury(mirror).await;
        Ok(())
    }

    async fn build(&self, mirror: &Mirror, source: &Path, (packs, held): (&[Pack], &mut Held)) -> io::Result<Disk> {
        let file = format!("{}.img", self.random());
        let contents = Contents { packs, all: &held.packs, tips: &held.tips };
        let built = self.0.workshop.build(source, contents, &child(&mirror.directory, &file)).await?;
        keep_digests(&built.packs, &mut held.packs);
        let packs = packs.iter().map(|pack| pack.name.clone()).collect();
        Ok(Disk { file, bytes: built.bytes, sha256: built.sha256, packs })
    }

    /// Gives large packs disks of their own, and makes fewer of many small ones: when no job waits for it.
    async fn tidy(&self, mirror: &Arc<Mirror>) {
        let _turn = mirror.turn.lock().await;
        let Some(meta) = mirror.state().meta.clone() else { return };
        let Some(first) = meta.disks.first() else { return };
        let on_first = |pack: &&Pack| first.packs.contains(&pack.name);
        let large_on_first =
            first.packs.len() > 1 && meta.packs.iter().filter(on_first).any(|pack| pack.bytes >= LARGE_BYTES);
        if first.packs.len() <= SMALL_PACKS_MAX && !large_on_first {
            return;
        }
        if let Err(error) = self.rearrange(mirror, meta).await {
            tracing::warn!(error = chain(&error), "tidy a mirror up; it stays as it is");
            if let Err(error) = self.remove_unnamed(mirror).await {
                tracing::warn!(error = chain(&error), "remove what that has left");
            }
        }
    }

    async fn rearrange(&self, mirror: &Arc<Mirror>, before: Meta) -> Result<(), UpdateError> {
        let source = child(&mirror.directory, &before.mirror);
        let first_packs = before.disks.first().map_or(0, |first| first.packs.len());
        let mut held = if first_packs > SMALL_PACKS_MAX {
            self.0.workshop.tidy(&source).await?
        } else {
            Held { packs: before.packs.clone(), tips: before.tips.clone() }
        };
        keep_digests(&before.packs, &mut held.packs);
        let mut disks: Vec<Disk> = Vec::new();
        let (large, small): (Vec<Pack>, Vec<Pack>) =
            held.packs.iter().cloned().partition(|pack| pack.bytes >= LARGE_BYTES);
        disks.push(self.build(mirror, &source, (&small, &mut held)).await?);
        for pack in large {
            let known = before.disks.iter().find(|disk| disk.packs == [pack.name.as_str()]);
            disks.push(match known {
                Some(disk) => disk.clone(),
                None => self.build(mirror, &source, (std::slice::from_ref(&pack), &mut held)).await?,
            });
        }
        if disks.len() > DISKS_MAX {
            self.0.metrics.clones().wiped.inc("threshold");
            return Ok(self.wipe(mirror).await?);
        }
        let meta = Meta { disks, packs: held.packs, tips: held.tips, ..before };
        self.write(mirror, &meta).await?;
        mirror.set(Some(meta));
        self.bury(mirror).await;
        Ok(())
    }

    /// Looks at disks that nobody has looked at since the start; a mirror with one that is not what it was goes. The turn is
    /// held.
    async fn verify(&self, mirror: &Arc<Mirror>) {
        let shelves = mirror.state().shelves.clone();
        for shelf in shelves {
            if !self.0.workshop.is_whole(&shelf.path, &shelf.disk).await {
                tracing::warn!(disk = %shelf.path.display(), "a disk of a mirror is damaged; the mirror is made anew");
                self.0.metrics.clones().wiped.inc("damaged");
                if let Err(error) = self.wipe(mirror).await {
                    tracing::warn!(error = chain(&error), "remove a mirror that is damaged");
                }
                return;
            }
        }
    }

    /// Removes a mirror; its disks go when nobody holds them. The turn is held.
    async fn wipe(&self, mirror: &Arc<Mirror>) -> io::Result<()> {
        let Some(meta) = mirror.state().meta.clone() else { return Ok(()) };
        self.0.files.remove(&child(&mirror.directory, meta::FILE)).await?;
        mirror.set(None);
        self.0.files.remove(&child(&mirror.directory, &meta.mirror)).await?;
        self.bury(mirror).await;
        Ok(())
    }

    /// Removes disks that nobody holds any more.
    async fn bury(&self, mirror: &Arc<Mirror>) {
        let free: Vec<Arc<Shelf>> = {
            let mut state = mirror.state();
            let (free, held) = state.doomed.drain(..).partition(|shelf| Arc::strong_count(shelf) == 1);
            state.doomed = held;
            free
        };
        for shelf in free {
            if let Err(error) = self.0.files.remove(&shelf.path).await {
                tracing::warn!(error = chain(&error), "remove a mirror's disk");
                mirror.state().doomed.push(shelf);
            }
        }
    }

    /// Removes mirrors until all together take no more than they may: those first that were longest not used.
    async fn enforce(&self, own: &Arc<Mirror>) {
        let size = gib(self.0.config.size_gib);
        while self.usage().1 > size {
            let mirrors: Vec<_> = self.mirrors().values().cloned().collect();
            let used = |mirror: &Arc<Mirror>| mirror.state().meta.as_ref().map(|meta| meta.used);
            let others = mirrors.iter().filter(|mirror| !Arc::ptr_eq(mirror, own));
            let oldest = others.filter_map(|mirror| Some((used(mirror)?, mirror))).min_by_key(|(used, _)| *used);
            let victim = oldest.map_or(own, |(_, mirror)| mirror);
            let _turn = victim.turn.lock().await;
            self.0.metrics.clones().wiped.inc("quota");
            if let Err(error) = self.wipe(victim).await {
                tracing::warn!(error = chain(&error), "remove a mirror for want of room");
                return;
            }
        }
    }

    fn count(&self) {
        let (mirrors, bytes) = self.usage();
        let metrics = self.0.metrics.clones();
        metrics.mirrors.set(i64::try_from(mirrors).unwrap_or(i64::MAX));
        metrics.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Removes what is too old, and files that nobody holds any more. `living`: the machines that there are. To be called
    /// now and then.
    pub async fn sweep(&self, living: &BTreeSet<VmId>) {
        let mirrors: Vec<_> = self.mirrors().values().cloned().collect();
        for mirror in mirrors {
            // Whoever has its turn comes to an end.
            let Ok(_turn) = mirror.turn.try_lock() else { continue };
            let old = mirror.state().meta.as_ref().is_some_and(|meta| self.is_old(meta));
            if old {
                self.0.metrics.clones().wiped.inc("age");
                if let Err(error) = self.wipe(&mirror).await {
                    tracing::warn!(error = chain(&error), "remove an old mirror");
                }
            }
            self.bury(&mirror).await;
            if let Err(error) = self.remove_unnamed(&mirror).await {
                tracing::warn!(error = chain(&error), "remove what no mirror has any more");
            }
        }
        self.count();
        self.0.slots.sweep(&*self.0.files, living).await;
    }

    /// Makes the disk that is written later. `Err`: the machine does without.
    pub(super) async fn make_slot(&self, slot: &Path) -> io::Result<()> {
        self.0.workshop.make_directory(&self.0.directory).await?;
        self.0.workshop.make_directory(self.0.slots.directory()).await?;
        // As large as what may come, and it takes only what does.
        self.0.workshop.make_slot(slot, gib(self.0.config.project_gib)).await
    }

    pub(super) async fn remove_slot(&self, slot: &Path) -> io::Result<()> {
        self.0.files.remove(slot).await
    }

    /// A machine is gone that had these: those of no mirror any more go with the last that has them.
    pub(super) async fn let_go(&self, shelves: Vec<Arc<Shelf>>) {
        let Some(directory) = shelves.first().and_then(|shelf| shelf.path.parent()).map(Path::to_owned) else { return };
        drop(shelves);
        let mirror = self.mirrors().values().find(|mirror| mirror.directory == directory).cloned();
        if let Some(mirror) = mirror {
            self.bury(&mirror).await;
        }
    }

    /// A machine is gone whose disks no [`JobClone`] has taken up: so goes what was its own.
    pub async fn release(&self, vm: &VmId) {
        if let Err(error) = self.remove_slot(&self.0.slots.path(vm)).await {
            // The sweep tries it again.
            tracing::warn!(error = chain(&error), "remove a machine's disk for what was fetched");
        }
    }

    /// A job has had something of it: noted now and then.
    pub(super) async fn note_use(&self, shelves: &[Arc<Shelf>]) {
        let Some(first) = shelves.first() else { return };
        let mirrors: Vec<_> = self.mirrors().values().cloned().collect();
        let Some(mirror) = mirrors.iter().find(|mirror| first.path.starts_with(&mirror.directory)) else { return };
        let Ok(_turn) = mirror.turn.try_lock() else { return };
        let now = self.0.clock.now();
        let meta = {
            let mut state = mirror.state();
            let Some(meta) = state.meta.as_mut() else { return };
            let since = Duration::try_from(now.duration_since(meta.used)).unwrap_or(Duration::ZERO);
            if since < USE_NOTED {
                return;
            }
            meta.used = now;
            meta.clone()
        };
        if let Err(error) = self.write(mirror, &meta).await {
            tracing::debug!(error = chain(&error), "note that a mirror is used");
        }
    }

    /// Ends what is under way: a fetch that is cut is as good as none.
    pub async fn stop(&self) {
        self.0.stop.cancel();
        self.0.updates.close();
        self.0.updates.wait().await;
    }
}

fn without_digests(packs: &[Pack]) -> Vec<Pack> {
    packs.iter().map(|pack| Pack { sha256: None, ..pack.clone() }).collect()
}

/// Takes over what is known of packs that were there before.
fn keep_digests(known: &[Pack], packs: &mut [Pack]) {
    for pack in packs {
        if let Some(known) = known.iter().find(|known| known.name == pack.name) {
            pack.sha256.clone_from(&known.sha256);
        }
    }
}

fn gib(count: u64) -> u64 {
    count.saturating_mul(1 << 30)
}
