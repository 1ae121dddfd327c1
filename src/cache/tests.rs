//! The store on real files, and with files that fail.

use super::*;
use crate::config::Span;
use crate::files::RealFiles;
use std::collections::BTreeSet;
use tempfile::TempDir;

struct Host {
    dir: TempDir,
    clock: Clock,
}

const KIB: u64 = 1024;

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), clock: Clock::system() }
    }

    async fn open(&self) -> Caches {
        self.open_with(Config { size_gib: 20, project_gib: 5, ..Config::default() }).await
    }

    async fn open_with(&self, config: Config) -> Caches {
        let directory = self.dir.path().join("cache");
        Caches::open(Arc::new(RealFiles), directory, (config, 0), self.clock.clone(), Rng::system()).await.unwrap()
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
    assert_eq!(found(&caches.of(tenant(42, true), 1), "k").await, None);
    saved(&caches.of(tenant(42, true), 1), "k", &bytes).await;
    for caches in [caches, place.open().await] {
        assert_eq!(found(&caches.of(tenant(42, true), 2), "k").await.as_deref(), Some(&bytes[..]));
        assert_eq!(found(&caches.of(tenant(42, false), 2), "k").await.as_deref(), Some(&bytes[..]), "plain");
        assert_eq!(found(&caches.of(tenant(43, true), 2), "k").await, None, "another project's");
        assert_eq!(found(&caches.of(tenant(42, true), 2), "k2").await, None);
    }
    saved(&place.open().await.of(tenant(42, false), 3), "k", b"poison").await;
    let caches = place.open().await;
    assert_eq!(found(&caches.of(tenant(42, true), 4), "k").await.as_deref(), Some(&bytes[..]));
    assert_eq!(found(&caches.of(tenant(42, false), 4), "k").await.as_deref(), Some(&b"poison"[..]));
}

/// A daemon killed in mid-save, a guest that hangs up, too much and too little: the entry of before, and nothing besides.
#[tokio::test]
async fn a_save_without_an_end_leaves_the_entry_of_before_and_no_file() {
    let place = Host::new();
    let caches = place.open().await;
    let job = caches.of(tenant(42, true), 1);
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
    let job = caches.of(tenant(42, true), 1);
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
    let (writer, reader) = (caches.of(tenant(42, true), 1), caches.of(tenant(42, true), 2));
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
    let caches = place.open_with(Config { size_gib: 1, project_gib: 1, ..Config::default() }).await;
    let a = caches.of(tenant(1, true), 1);
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
    let b = caches.of(tenant(2, true), 1);
    let save = b.save(&key("mine"), part).await.unwrap();
    let a = caches.of(tenant(1, true), 2);
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
    let caches = place.open_with(Config { max_age: Span::from_secs(3600), ..Config::default() }).await;
    saved(&caches.of(tenant(42, true), 1), "k", b"bytes").await;
    tokio::time::advance(Duration::from_secs(3599)).await;
    caches.sweep().await;
    assert!(caches.of(tenant(42, true), 2).find(&key("k")).await.is_some());
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(caches.of(tenant(42, true), 2).find(&key("k")).await.is_none());
    caches.sweep().await;
    assert_eq!(place.files(), BTreeSet::new());
}

/// Whatever somebody has put there: no entry, and the daemon starts.
#[tokio::test]
async fn a_damaged_entry_is_none() {
    let place = Host::new();
    let caches = place.open().await;
    saved(&caches.of(tenant(42, true), 1), "k", b"bytes").await;
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
        assert_eq!(found(&caches.of(tenant(42, true), 1), "k").await, None);
        assert_eq!(place.files(), BTreeSet::new());
    }
}
