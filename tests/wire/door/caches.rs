//! `cache:` as the runner's helper asks for it, and as a hostile job would.

use super::support::{Door, Setup, request};
use dayfly::cache::{Caches, Settings, Tenant};
use dayfly::clock::Clock;
use dayfly::config::Cache;
use dayfly::rng::Rng;
use dayfly_doubles::files::MemoryFiles;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Caches of a host, in memory.
async fn caches() -> (Caches, Arc<MemoryFiles>) {
    let files = Arc::new(MemoryFiles::default());
    let config = (Cache::default().settings(), 0);
    let caches = reopened(&files, config).await;
    (caches, files)
}

/// As the next daemon finds them, whose job 42 goes on.
async fn reopened(files: &Arc<MemoryFiles>, config: (Settings, u64)) -> Caches {
    let parts = (Clock::system(), Rng::system());
    Caches::open(files.clone(), "/cache".into(), config, parts, &["job-42".to_owned()].into()).await.unwrap()
}

async fn door(caches: &Caches, project: u64, protected: bool) -> Door {
    let tenant = Tenant::new(&"https://gitlab.example".parse().unwrap(), project, Some(protected));
    Setup { cache: Some(caches.of(tenant, 42, "job-42")), ..Setup::default() }.open().await
}

/// As the helper's URL: signed by nobody that matters.
fn url(project: u64, key: &str) -> String {
    format!(
        "/cache/project/{project}/{key}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=dayfly%2F20261129&X-Amz-Date=20261129T000000Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature=00"
    )
}

async fn ask(door: &Door, method: &str, url: &str, headers: &[(&str, &str)], body: &str) -> (u16, Vec<u8>) {
    let answer = door.ask(request(method, url, headers, body)).await;
    (answer.status, answer.body)
}

#[tokio::test]
async fn what_one_job_saves_another_one_fetches() {
    let (caches, _) = caches().await;
    let body = "a zip of 20 bytes...";
    let first = door(&caches, 7, true).await;
    assert_eq!(ask(&first, "GET", &url(7, "deps-1-protected"), &[], "").await.0, 404);
    assert_eq!(
        ask(&first, "PUT", &url(7, "deps-1-protected"), &[("Content-Type", "application/octet-stream")], body).await.0,
        200
    );
    let next = door(&caches, 7, true).await;
    let whole = next.ask(request("GET", &url(7, "deps-1-protected"), &[], "")).await;
    assert_eq!((whole.status, whole.text()), (200, body));
    assert_eq!(whole.header("content-length"), Some("20"));
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    assert!(
        whole.header("last-modified").is_some_and(|date| date.ends_with(" GMT")),
        "{:?}",
        whole.header("last-modified")
    );
    assert_eq!(whole.header("etag").map(str::len), Some(66));
    // The helper's way to fetch in parallel: one byte first, which says how many there are.
    let probe = next.ask(request("GET", &url(7, "deps-1-protected"), &[("Range", "bytes=0-0")], "")).await;
    assert_eq!((probe.status, probe.text(), probe.header("content-range")), (206, "a", Some("bytes 0-0/20")));
    let part = next.ask(request("GET", &url(7, "deps-1-protected"), &[("Range", "bytes=6-9")], "")).await;
    assert_eq!((part.status, part.text()), (206, &body[6..10]));
    let beyond = next.ask(request("GET", &url(7, "deps-1-protected"), &[("Range", "bytes=20-")], "")).await;
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */20")));
    let mut guest = next.guest().await;
    guest.send(request("HEAD", &url(7, "deps-1-protected"), &[], "")).await;
    let mut head = Vec::new();
    while let Some(line) = guest.line().await.filter(|line| !line.is_empty()) {
        head.push(line.to_ascii_lowercase());
    }
    assert!(head[0].starts_with("http/1.1 200") && head.contains(&"content-length: 20".into()), "{head:?}");
    let metrics = next.metrics.guest();
    assert_eq!((metrics.cache.get("hit"), metrics.cache_down_bytes.get()), (3, 25));
    assert_eq!((first.metrics.guest().cache.get("saved"), first.metrics.guest().cache.get("miss")), (1, 1));
}

/// T18: the poisoning matrix, by the doors of real jobs: who has written, by which key, and who reads it then.
#[tokio::test]
async fn the_poisoning_matrix_holds_at_the_door() {
    let hashed = "ab/ab12345678901234567890123456789012345678901234567890123456789012";
    let keys = ["deps-1", "deps-1-protected", "deps-1-non_protected", "a/b%20c", hashed];
    let (mut cells, mut wrong) = (0, Vec::new());
    for key in keys {
        for writer in [Some(true), Some(false), None] {
            for reader in [Some(true), Some(false), None] {
                let (caches, _) = caches().await;
                let at = |protected: Option<bool>| {
                    let tenant = Tenant::new(&"https://gitlab.example".parse().unwrap(), 7, protected);
                    Setup { cache: Some(caches.of(tenant, 42, "job-42")), ..Setup::default() }.open()
                };
                let (writer_door, reader_door) = (at(writer).await, at(reader).await);
                assert_eq!(ask(&writer_door, "PUT", &url(7, key), &[], "bytes").await.0, 200);
                let reads = ask(&reader_door, "GET", &url(7, key), &[], "").await.0 == 200;
                let plain = matches!(key, "deps-1" | "a/b%20c");
                let expected = match (writer == Some(true), reader == Some(true)) {
                    (true, true) | (false, false) => true,
                    // Never what somebody unprotected has written.
                    (false, true) => false,
                    (true, false) => plain,
                };
                cells += 1;
                if reads != expected {
                    wrong.push((key, writer, reader, reads));
                }
            }
        }
    }
    println!("figure cache.poison_cells {cells}\nfigure cache.poison_wrong {}", wrong.len());
    assert!(cells >= 40 && wrong.is_empty(), "{wrong:?}");
}

/// T18: keys, paths, buckets and projects that are not the job's: nothing is read, and nothing is written.
#[tokio::test]
async fn a_job_that_forges_reaches_nothing_of_others() {
    let (caches, files) = caches().await;
    let victim = door(&caches, 7, true).await;
    assert_eq!(ask(&victim, "PUT", &url(7, "k"), &[], "secret").await.0, 200);
    assert_eq!(ask(&victim, "PUT", &url(7, "k-protected"), &[], "secret").await.0, 200);
    let before = files.paths_below(Path::new("/cache"));
    let other = door(&caches, 8, true).await;
    let unprotected = door(&caches, 7, false).await;
    let mut tried = 0;
    let steps = ["../7/k", "..%2f7%2fk", "%2e%2e/7/k", "a/../../7/k", "./k", "k%00", "%6b/%2e%2e", "..\\7\\k"];
    let targets: Vec<String> = steps
        .iter()
        .map(|step| url(8, step))
        .chain([
            url(7, "k"),
            url(7, "k-protected"),
            "/cache/runner/abc/project/7/k".into(),
            "/other/project/7/k".into(),
        ])
        .chain(["/cache//project/7/k", "/cache/project/7", "/cache/", "/cache/project/07/k"].map(str::to_owned))
        .collect();
    for target in targets {
        for method in ["GET", "PUT"] {
            let (status, body) = ask(&other, method, &target, &[], if method == "PUT" { "poison" } else { "" }).await;
            assert!((400..500).contains(&status), "{method} {target}: {status}");
            assert!(!String::from_utf8_lossy(&body).contains("secret"), "{target}");
            tried += 1;
        }
    }
    assert!(tried >= 30, "{tried}");
    assert_eq!(files.paths_below(Path::new("/cache")), before);
    // Its own project's, and what protected jobs have written there.
    for key in ["k-protected", "k%2dprotected", "%6b-protected"] {
        assert_eq!(ask(&unprotected, "GET", &url(7, key), &[], "").await.0, 404, "{key}");
    }
    assert_eq!(ask(&unprotected, "GET", &url(7, "k"), &[], "").await, (200, b"secret".to_vec()), "a plain key");
    assert_eq!(ask(&unprotected, "PUT", &url(7, "k-protected"), &[], "poison").await.0, 200);
    let protected = door(&caches, 7, true).await;
    assert_eq!(ask(&protected, "GET", &url(7, "k-protected"), &[], "").await, (200, b"secret".to_vec()));
}

/// A large entry is fetched in ranges: all of one version, whoever saves meanwhile, and whichever daemon answers.
#[tokio::test]
async fn ranges_of_one_job_are_of_one_version_over_a_restart() {
    let (caches, files) = caches().await;
    let writer = door(&caches, 7, true).await;
    assert_eq!(ask(&writer, "PUT", &url(7, "k"), &[], "the first one").await.0, 200);
    let reader = door(&caches, 7, true).await;
    let part = |range: &'static str| [("Range", range)];
    assert_eq!(ask(&reader, "GET", &url(7, "k"), &part("bytes=0-3"), "").await, (206, b"the ".to_vec()));
    let other = JobName { job: 43, name: "job-43" };
    let other = other.door(&caches).await;
    assert_eq!(ask(&other, "PUT", &url(7, "k"), &[], "SOMETHING ELSE").await.0, 200);
    assert_eq!(ask(&reader, "GET", &url(7, "k"), &part("bytes=4-8"), "").await, (206, b"first".to_vec()));
    drop((reader, writer, other, caches));
    let caches = reopened(&files, (Cache::default().settings(), 0)).await;
    let reader = door(&caches, 7, true).await;
    assert_eq!(ask(&reader, "GET", &url(7, "k"), &part("bytes=9-"), "").await, (206, b" one".to_vec()));
    let other = JobName { job: 44, name: "job-44" }.door(&caches).await;
    assert_eq!(ask(&other, "GET", &url(7, "k"), &[], "").await, (200, b"SOMETHING ELSE".to_vec()), "another job");
    // It ends, and nothing of the first version is left.
    drop((reader, other));
    caches.let_go("job-42").await;
    let gone = async {
        while caches_files(&files) > 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            caches.sweep().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("what nobody reads goes");
    assert_eq!(caches_files(&files), 2);
}

/// A job of another name.
struct JobName {
    job: u64,
    name: &'static str,
}

impl JobName {
    async fn door(&self, caches: &Caches) -> Door {
        let tenant = Tenant::new(&"https://gitlab.example".parse().unwrap(), 7, Some(true));
        Setup { cache: Some(caches.of(tenant, self.job, self.name)), ..Setup::default() }.open().await
    }
}

/// R15: a body that breaks off, or has no length, is no entry; the one of before stays.
#[tokio::test]
async fn half_a_save_is_none() {
    let (caches, files) = caches().await;
    let door = door(&caches, 7, true).await;
    assert_eq!(ask(&door, "PUT", &url(7, "k"), &[], "whole").await.0, 200);
    let mut guest = door.guest().await;
    guest.send(format!("PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf", url(7, "k"))).await;
    drop(guest);
    let chunked =
        format!("PUT {} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", url(7, "k"));
    assert_eq!(door.ask(chunked.into_bytes()).await.status, 411);
    let huge = format!("PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\nhalf", url(7, "k"));
    assert_eq!(door.ask(huge.into_bytes()).await.status, 413, "no 5xx, or the helper sends it all again");
    let gone = async {
        while caches_files(&files) > 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            caches.sweep().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("what was left goes");
    assert_eq!(ask(&door, "GET", &url(7, "k"), &[], "").await, (200, b"whole".to_vec()));
}

fn caches_files(files: &MemoryFiles) -> usize {
    files.paths_below(Path::new("/cache")).iter().filter(|path| path.extension().is_some()).count()
}

/// A file that was changed under us is cut, never ended: the runner must not unpack it.
#[tokio::test]
async fn bytes_that_are_not_what_was_saved_end_in_an_error() {
    let (caches, files) = caches().await;
    let door = door(&caches, 7, true).await;
    assert_eq!(ask(&door, "PUT", &url(7, "k"), &[], "whole").await.0, 200);
    let path = files
        .paths_below(Path::new("/cache"))
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "zip"))
        .unwrap();
    files.meddle(&path, Some(b"wrong".to_vec()));
    let mut guest = door.guest().await;
    guest.send(request("GET", &url(7, "k"), &[], "")).await;
    let came = String::from_utf8_lossy(&guest.rest().await).into_owned();
    assert!(came.starts_with("HTTP/1.1 200") && !came.ends_with("wrong"), "{came}");
}

/// Without a cache a job runs as with an empty one.
#[tokio::test]
async fn no_cache_is_an_empty_one() {
    let door = Door::new().await;
    for method in ["GET", "PUT"] {
        assert_eq!(ask(&door, method, &url(7, "k"), &[], "").await.0, 404);
    }
}
