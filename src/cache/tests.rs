//! The store on real files, and with files that fail.

use super::*;
use crate::cache::{CachesFound, JobCache, Key, Tenant};
use crate::files::RealFiles;
use bytes::Bytes;
use tempfile::TempDir;

struct Host {
    dir: TempDir,
    clock: Clock,
}

const KIB: u64 = 1024;

fn settings() -> Settings {
    let max_age = Duration::from_secs(30 * 24 * 3600);
    Settings { bytes_max: 20 << 30, project_bytes_max: 5 << 30, max_age, tenants: Vec::new() }
}

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), clock: Clock::system() }
    }

    async fn open(&self) -> Caches {
        self.open_with(settings()).await
    }

    async fn open_with(&self, config: Settings) -> Caches {
        let directory = self.dir.path().join("cache");
        let parts = (self.clock.clone(), Rng::system());
        Caches::open(Arc::new(RealFiles), directory, (config, 0), parts, &["r-1".to_owned()].into()).await.unwrap()
    }

    /// All files below, by their endings.
    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut left = vec![self.dir.path().join("cache")];
        while let Some(dir) = left.pop() {
            for entry in std::fs::read_dir(dir).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    left.push(entry.path());
                } else {
                    found.insert(entry.path().strip_prefix(self.dir.path()).unwrap().display().to_string());
                }
            }
        }
        found
    }
}

fn tenant(project: u64, protected: bool) -> Tenant {
    Tenant::new(&"https://gitlab.example".parse().unwrap(), project, Some(protected))
}

fn key(key: &str) -> Key {
    Key::of_path(&format!("/cache/project/42/{key}")).unwrap().1
}

async fn saved(job: &JobCache, name: &str, bytes: &[u8]) {
    let mut save = job.save(&key(name), bytes.len() as u64).await.unwrap();
    for piece in bytes.chunks(1000) {
        save.put(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    save.commit().await.unwrap();
}

async fn found(job: &JobCache, name: &str) -> Option<Vec<u8>> {
    let version = job.find(&key(name)).await?;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < version.bytes {
        bytes.extend_from_slice(&job.read(&version, bytes.len() as u64, 700).await.unwrap());
    }
    assert_eq!(hex(&Sha256::digest(&bytes)), version.sha256);
    Some(bytes)
}

#[tokio::test]
async fn what_one_job_saves_the_next_one_finds_over_a_restart() {
    let place = Host::new();
    let caches = place.open().await;
    let bytes: Vec<u8> = (0..5000u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(found(&caches.of(tenant(42, true), 1, "r-1"), "k").await, None);
    saved(&caches.of(tenant(42, true), 1, "r-1"), "k", &bytes).await;
    for caches in [caches, place.open().await] {
        assert_eq!(found(&caches.of(tenant(42, true), 2, "r-2"), "k").await.as_deref(), Some(&bytes[..]));
        assert_eq!(found(&caches.of(tenant(42, false), 2, "r-2"), "k").await.as_deref(), Some(&bytes[..]), "plain");
        assert_eq!(found(&caches.of(tenant(43, true), 2, "r-2"), "k").await, None, "another project's");
        assert_eq!(found(&caches.of(tenant(42, true), 2, "r-2"), "k2").await, None);
    }
    saved(&place.open().await.of(tenant(42, false), 3, "r-3"), "k", b"poison").await;
    let caches = place.open().await;
    assert_eq!(found(&caches.of(tenant(42, true), 4, "r-4"), "k").await.as_deref(), Some(&bytes[..]));
    assert_eq!(found(&caches.of(tenant(42, false), 4, "r-4"), "k").await.as_deref(), Some(&b"poison"[..]));
}

/// A daemon killed in mid-save, a guest that hangs up, too much and too little: the entry of before, and nothing besides.
#[tokio::test]
async fn a_save_without_an_end_leaves_the_entry_of_before_and_no_file() {
    let place = Host::new();
    let caches = place.open().await;
    let job = caches.of(tenant(42, true), 1, "r-1");
    saved(&job, "k", b"before").await;
    let kept = place.files();
    assert_eq!(kept.len(), 2);
    // Killed: nothing of it is dropped, and the next daemon looks.
    let mut save = job.save(&key("k"), 10).await.unwrap();
    save.put(Bytes::from_static(b"half")).await.unwrap();
    std::mem::forget(save);
    assert_eq!(place.files().len(), 3);
    let caches = place.open().await;
    assert_eq!(place.files(), kept);
    // Given up.
    let job = caches.of(tenant(42, true), 1, "r-1");
    let mut save = job.save(&key("k"), 10).await.unwrap();
    save.put(Bytes::from_static(b"half")).await.unwrap();
    drop(save);
    caches.sweep().await;
    assert_eq!(place.files(), kept);
    // Another length than was said.
    let mut save = job.save(&key("k"), 4).await.unwrap();
    assert!(matches!(save.put(Bytes::from_static(b"12345")).await, Err(CacheError::Length)));
    drop(save);
    let save = job.save(&key("k"), 4).await.unwrap();
    assert!(matches!(save.commit().await, Err(CacheError::Length)));
    assert_eq!(found(&job, "k").await.as_deref(), Some(&b"before"[..]));
    assert_eq!(caches.index().pending, BTreeMap::new());
}

#[tokio::test]
async fn a_reader_keeps_the_version_that_it_began_with() {
    let place = Host::new();
    let caches = place.open().await;
    let (writer, reader) = (caches.of(tenant(42, true), 1, "r-1"), caches.of(tenant(42, true), 2, "r-2"));
    saved(&writer, "k", b"first").await;
    assert_eq!(found(&reader, "k").await.as_deref(), Some(&b"first"[..]));
    saved(&writer, "k", b"the second").await;
    assert_eq!(found(&reader, "k").await.as_deref(), Some(&b"first"[..]), "the same for all of a job's requests");
    assert_eq!(found(&writer, "k").await.as_deref(), Some(&b"the second"[..]), "its own");
    assert_eq!(place.files().len(), 3);
    drop(reader);
    caches.sweep().await;
    assert_eq!(place.files().len(), 2);
}

/// Quotas hold at any moment, saves under way included; what was longest not used goes first, a tenant's own before
/// others'.
#[tokio::test(start_paused = true)]
async fn quotas_hold_and_the_least_used_goes_first() {
    let place =
        Host { dir: tempfile::tempdir().unwrap(), clock: Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap()) };
    // Of 1 GiB for two projects of 1 GiB: kibibytes would be nearer, and sparse files cost nothing.
    let caches = place.open_with(Settings { bytes_max: 1 << 30, project_bytes_max: 1 << 30, ..settings() }).await;
    let a = caches.of(tenant(1, true), 1, "r-1");
    let part = 300 * KIB * KIB;
    for name in ["one", "two", "three"] {
        tokio::time::advance(Duration::from_secs(60)).await;
        let save = a.save(&key(name), part).await.unwrap();
        // A hole, as long as it was announced.
        std::fs::File::options().write(true).open(&save.version.path).unwrap().set_len(part).unwrap();
        let mut save = save;
        save.at = part;
        save.commit().await.unwrap();
        assert!(caches.index().bytes(None) <= 1 << 30);
    }
    tokio::time::advance(Duration::from_secs(60)).await;
    assert!(a.find(&key("one")).await.is_some(), "used: `two` is the oldest now");
    drop(a);
    let b = caches.of(tenant(2, true), 1, "r-1");
    let save = b.save(&key("mine"), part).await.unwrap();
    let a = caches.of(tenant(1, true), 2, "r-2");
    assert!(a.find(&key("two")).await.is_none());
    assert!(a.find(&key("one")).await.is_some() && a.find(&key("three")).await.is_some());
    assert!(matches!(b.save(&key("x"), (1 << 30) + 1).await, Err(CacheError::TooLarge(_))));
    // All that is left are saves under way, and they stay.
    let more = b.save(&key("more"), 700 * KIB * KIB).await.unwrap();
    assert!(matches!(b.save(&key("most"), 100 * KIB * KIB).await, Err(CacheError::NoRoom)));
    drop((save, more));
    assert_eq!(caches.index().bytes(None), 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_too_old_is_no_entry_and_goes() {
    let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
    let place = Host { dir: tempfile::tempdir().unwrap(), clock };
    let caches = place.open_with(Settings { max_age: Duration::from_secs(3600), ..settings() }).await;
    saved(&caches.of(tenant(42, true), 1, "r-1"), "k", b"bytes").await;
    tokio::time::advance(Duration::from_secs(3599)).await;
    caches.sweep().await;
    assert!(caches.of(tenant(42, true), 2, "r-2").find(&key("k")).await.is_some());
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(caches.of(tenant(42, true), 2, "r-2").find(&key("k")).await.is_none());
    caches.sweep().await;
    assert_eq!(place.files(), BTreeSet::new());
}

/// A job reads the version that it began with by the next daemon, too; it goes with the job, and so does the job's file.
#[tokio::test]
async fn a_version_is_held_over_a_restart_for_as_long_as_its_reader_lives() {
    let place = Host::new();
    let caches = place.open().await;
    saved(&caches.of(tenant(42, true), 9, "r-9"), "k", b"first").await;
    let reader = caches.of(tenant(42, false), 1, "r-1");
    assert_eq!(found(&reader, "k").await.as_deref(), Some(&b"first"[..]));
    assert_eq!(place.files().len(), 2, "nothing is written down before a part is given out");
    reader.hold(&key("k")).await;
    // It reads once, and no more.
    let other = caches.of(tenant(42, false), 2, "r-2");
    found(&other, "k").await;
    other.hold(&key("k")).await;
    assert_eq!(place.files().len(), 4);
    saved(&caches.of(tenant(42, true), 9, "r-9"), "k", b"the second").await;
    for _ in 0..2 {
        let caches = place.open().await;
        assert_eq!(place.files().len(), 4, "both versions, the new JSON, the file of the job that lives");
        let reader = caches.of(tenant(42, false), 1, "r-1");
        assert_eq!(found(&reader, "k").await.as_deref(), Some(&b"first"[..]));
        assert_eq!(found(&caches.of(tenant(42, false), 3, "r-3"), "k").await.as_deref(), Some(&b"the second"[..]));
        // Whose it was is not whose it is: the operator's tenants have changed, or somebody has changed the file.
        assert_eq!(found(&caches.of(tenant(43, false), 1, "r-1"), "k").await, None);
        caches.sweep().await;
        assert_eq!(place.files().len(), 4);
    }
    let caches = place.open().await;
    let reader = caches.of(tenant(42, false), 1, "r-1");
    saved(&reader, "k", b"its own").await;
    assert_eq!(found(&reader, "k").await.as_deref(), Some(&b"its own"[..]));
    let caches = place.open().await;
    assert_eq!(found(&caches.of(tenant(42, false), 1, "r-1"), "k").await.as_deref(), Some(&b"its own"[..]));
    caches.let_go("r-1").await;
    caches.sweep().await;
    assert_eq!(place.files().len(), 4, "{:?}", place.files());
    assert!(place.files().iter().all(|file| !file.contains("pins")), "{:?}", place.files());
}

/// A disk that does not let a job's file go when the job ends gives it up to a later sweep.
#[tokio::test]
async fn a_file_that_stays_when_its_job_ends_goes_with_a_sweep() {
    let place = Host::new();
    let caches = place.open().await;
    saved(&caches.of(tenant(42, true), 9, "r-9"), "k", b"first").await;
    let reader = caches.of(tenant(42, false), 1, "r-1");
    found(&reader, "k").await;
    reader.hold(&key("k")).await;
    let directory = place.dir.path().join("cache/pins");
    let (file, aside) = (directory.join("r-1.json"), place.dir.path().join("aside"));
    // What is no directory has no file to remove.
    std::fs::rename(&directory, &aside).unwrap();
    std::fs::write(&directory, "").unwrap();
    caches.let_go("r-1").await;
    caches.sweep().await;
    std::fs::remove_file(&directory).unwrap();
    std::fs::rename(&aside, &directory).unwrap();
    assert!(file.exists());
    caches.sweep().await;
    assert!(!file.exists());
}

/// `dayfly cache`: by path, number or id; what is thrown away is read to its end by whoever reads it.
#[tokio::test]
async fn an_operator_sees_what_is_kept_and_throws_it_away() {
    let place = Host::new();
    let caches = place.open().await;
    let gitlab = "https://gitlab.example".parse().unwrap();
    let named = |project: u64, path: &str| {
        caches.of(Tenant::new(&gitlab, project, Some(true)).among(&[], &gitlab, Some(path)), 9, "r-9")
    };
    saved(&named(42, "group/one"), "a", b"12345").await;
    saved(&named(42, "group/one"), "b", b"123").await;
    saved(&named(7, "group/two"), "a", b"1234567890").await;
    let other = "https://other.example".parse().unwrap();
    saved(&caches.of(Tenant::new(&other, 7, None), 9, "r-9"), "a", b"1").await;
    let list = caches.list();
    let names: Vec<_> = list.tenants.iter().map(|of| (of.name.as_str(), of.entries, of.bytes)).collect();
    assert_eq!(names, [("group/two", 1, 10), ("group/one", 2, 8), ("7", 1, 1)]);
    assert_eq!((list.bytes, caches.usage()), (19, (19, 20 << 30)));
    let shown = |whose: &str| match caches.show(whose) {
        CachesFound::Shown { entries, .. } => Ok(entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>()),
        other => Err(other),
    };
    for whose in ["group/one", "42", "GROUP/ONE", &list.tenants[1].id] {
        let mut keys = shown(whose).unwrap();
        keys.sort();
        assert_eq!(keys, ["a", "b"], "{whose}");
    }
    assert!(matches!(shown("7"), Err(CachesFound::Ambiguous { ids }) if ids.len() == 2));
    assert_eq!(shown("43"), Err(CachesFound::Unknown));
    assert_eq!(shown(""), Err(CachesFound::Unknown));
    let reader = named(42, "group/one");
    let version = reader.find(&key("a")).await.unwrap();
    let cleared = caches.clear(Some("42"), Some("a")).await;
    assert_eq!(cleared, CachesFound::Cleared { entries: 1, bytes: 5, failed: None });
    assert_eq!(&reader.read(&version, 0, 10).await.unwrap()[..], b"12345");
    assert_eq!(shown("42").unwrap(), ["b"]);
    assert_eq!(caches.clear(Some("43"), None).await, CachesFound::Unknown);
    assert_eq!(caches.clear(None, None).await, CachesFound::Cleared { entries: 3, bytes: 14, failed: None });
    drop((reader, version));
    caches.sweep().await;
    assert_eq!(place.files(), BTreeSet::new());
}

/// Whatever somebody has put there: no entry, and the daemon starts.
#[tokio::test]
async fn a_damaged_entry_is_none() {
    let place = Host::new();
    let caches = place.open().await;
    saved(&caches.of(tenant(42, true), 1, "r-1"), "k", b"bytes").await;
    let whole = place.files();
    let json = whole.iter().find(|name| name.ends_with(".json")).unwrap();
    let data = whole.iter().find(|name| name.ends_with(".zip")).unwrap();
    let text = std::fs::read_to_string(place.dir.path().join(json)).unwrap();
    let bytes = std::fs::read(place.dir.path().join(data)).unwrap();
    for (meta, content) in [
        (text.clone(), &b"byte"[..]),
        (text.replace("\"bytes\":5", "\"bytes\":6"), &bytes),
        (text.replace(".zip", ".zap"), &bytes),
        (text.replace("{", "["), &bytes),
        (text.replace("\"file\":\"", "\"file\":\"../"), &bytes),
        (String::new(), &bytes),
    ] {
        std::fs::write(place.dir.path().join(json), meta).unwrap();
        std::fs::write(place.dir.path().join(data), content).unwrap();
        let caches = place.open().await;
        assert_eq!(found(&caches.of(tenant(42, true), 1, "r-1"), "k").await, None);
        assert_eq!(place.files(), BTreeSet::new());
    }
}
