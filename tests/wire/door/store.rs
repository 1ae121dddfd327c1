//! `cache:` in an operator's own S3 store: a stand-in that checks each signature by itself, over a socket.

use super::support::{Door, Setup, request};
use dayfly::cache::{Caches, Tenant, Upstream, UpstreamParts};
use dayfly::clock::Clock;
use dayfly::config::Cache;
use dayfly::gitlab::{Endpoint, OpenTransport as _, RealOpenTransport};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly_doubles::files::MemoryFiles;
use hmac::{Hmac, Mac as _};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

const ACCESS_KEY: &str = "AKIATEST";
const SECRET_KEY: &str = "the/store+knows=this";
const REGION: &str = "eu-test-1";

/// The store: objects by their whole paths, and what was asked.
#[derive(Default)]
struct Store {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    asked: Mutex<Vec<String>>,
    /// It answers so, whatever is asked.
    fails: Mutex<Option<u16>>,
    forged: Mutex<usize>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// The etag of these bytes.
fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", &hex(&Sha256::digest(bytes))[..32])
}

/// What signature a request of these parts must have, from what came over the socket.
fn signature(parts: &http::request::Parts, signed: &str, scope: &str) -> String {
    let header = |name: &str| parts.headers.get(name).map(|value| value.to_str().unwrap().trim().to_owned());
    let mut canonical = format!("{}\n{}\n{}\n", parts.method, parts.uri.path(), parts.uri.query().unwrap_or_default());
    for name in signed.split(';') {
        writeln!(canonical, "{name}:{}", header(name).unwrap_or_default()).unwrap();
    }
    write!(canonical, "\n{signed}\n{}", header("x-amz-content-sha256").unwrap_or_default()).unwrap();
    let date = header("x-amz-date").unwrap_or_default();
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(canonical.as_bytes())));
    let mut key = format!("AWS4{SECRET_KEY}").into_bytes();
    for part in scope.split('/') {
        key = mac(&key, part);
    }
    hex(&mac(&key, &text))
}

impl Store {
    /// Whether it is signed by the key, now, for this region, with all that matters in it.
    fn is_signed(parts: &http::request::Parts) -> bool {
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let Some(authorization) = header("authorization").and_then(|a| a.strip_prefix("AWS4-HMAC-SHA256 ")) else {
            return false;
        };
        let fields: BTreeMap<&str, &str> = authorization.split(',').filter_map(|field| field.split_once('=')).collect();
        let Some((key, scope)) = fields["Credential"].split_once('/') else { return false };
        let date = header("x-amz-date").unwrap_or_default();
        let signed: Vec<&str> = fields["SignedHeaders"].split(';').collect();
        key == ACCESS_KEY
            && scope == format!("{}/{REGION}/s3/aws4_request", &date[..8])
            && ["host", "x-amz-date", "x-amz-content-sha256"].iter().all(|name| signed.contains(name))
            && signature(parts, fields["SignedHeaders"], scope) == fields["Signature"]
    }

    async fn answer(&self, request: http::Request<Incoming>) -> http::Response<Full<bytes::Bytes>> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        self.asked.lock().unwrap().push(format!("{} {path}", parts.method));
        let fails = *self.fails.lock().unwrap();
        let said = |status: u16, bytes: &[u8]| {
            let body = Full::new(bytes::Bytes::copy_from_slice(bytes));
            http::Response::builder().status(status).header("etag", etag(bytes)).body(body).unwrap()
        };
        if let Some(status) = fails {
            return said(status, b"");
        }
        if !Self::is_signed(&parts) {
            *self.forged.lock().unwrap() += 1;
            return said(403, b"SignatureDoesNotMatch");
        }
        if parts.method == "PUT" {
            // Cut: nothing of it is kept.
            let Ok(body) = body.collect().await else { return said(400, b"") };
            self.objects.lock().unwrap().insert(path, body.to_bytes().to_vec());
            return said(200, b"");
        }
        let Some(object) = self.objects.lock().unwrap().get(&path).cloned() else { return said(404, b"NoSuchKey") };
        let wanted = parts.headers.get("if-match").map(|tag| tag.to_str().unwrap().to_owned());
        if wanted.is_some_and(|wanted| wanted != etag(&object)) {
            return said(412, b"");
        }
        let range = parts.headers.get("range").and_then(|range| range.to_str().ok()?.strip_prefix("bytes="));
        let Some((first, last)) = range.and_then(|range| range.split_once('-')) else { return said(200, &object) };
        let first: usize = first.parse().unwrap();
        let last = last.parse::<usize>().map_or(object.len(), |last| last + 1).min(object.len());
        if first >= last {
            return said(416, b"");
        }
        let mut answer = said(206, &object[first..last]);
        let text = format!("bytes {first}-{}/{}", last - 1, object.len());
        answer.headers_mut().insert("content-range", text.parse().unwrap());
        answer.headers_mut().insert("etag", etag(&object).parse().unwrap());
        answer
    }

    fn paths(&self) -> Vec<String> {
        self.objects.lock().unwrap().keys().cloned().collect()
    }
}

/// A store that is served, and caches that are in it.
struct World {
    store: Arc<Store>,
    caches: Caches,
    _served: JoinSet<()>,
}

impl World {
    async fn new() -> Self {
        let (store, listener) = (Arc::new(Store::default()), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let port = listener.local_addr().unwrap().port();
        let (mut served, serving) = (JoinSet::new(), store.clone());
        served.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let store = serving.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        let store = store.clone();
                        async move { Ok::<_, Infallible>(store.answer(request).await) }
                    });
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        let url: url::Url = format!("http://127.0.0.1:{port}/below").parse().unwrap();
        let endpoint = Endpoint { url: url.clone(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
        let parts = UpstreamParts {
            transport: RealOpenTransport::default().open(&endpoint).unwrap(),
            url,
            bucket: "ci-caches".into(),
            prefix: "dayfly/".into(),
            region: REGION.into(),
            access_key: ACCESS_KEY.into(),
            secret_key: Secret::new(SECRET_KEY),
        };
        let (upstream, files) = (Upstream::new(parts, Clock::system()), Arc::new(MemoryFiles::default()));
        let config = Cache { project_gib: 1, ..Cache::default() }.settings();
        let caches = Caches::at(upstream, files, config, Clock::system(), Rng::seeded(3));
        Self { store, caches, _served: served }
    }

    async fn door(&self, project: u64, protected: bool) -> Door {
        let tenant = Tenant::new(&"https://gitlab.example".parse().unwrap(), project, Some(protected));
        Setup { cache: Some(self.caches.of(tenant, 42, "job-42")), ..Setup::default() }.open().await
    }
}

async fn ask(door: &Door, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, Vec<u8>) {
    let answer = door.ask(request(method, path, headers, body)).await;
    (answer.status, answer.body)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_jobs_save_is_in_the_operators_store_signed_by_the_host() {
    let world = World::new().await;
    let (first, path) = (world.door(7, true).await, "/cache/project/7/deps-1?X-Amz-Signature=forged");
    assert_eq!(ask(&first, "GET", path, &[], "").await.0, 404);
    assert_eq!(
        ask(&first, "PUT", path, &[("Content-Type", "application/octet-stream")], "twenty bytes of a zip").await.0,
        200
    );
    let paths = world.store.paths();
    assert_eq!(paths.len(), 1);
    assert!(paths[0].starts_with("/below/ci-caches/dayfly/") && paths[0].contains("-7/protected/"), "{paths:?}");
    let next = world.door(7, true).await;
    let whole = next.ask(request("GET", path, &[], "")).await;
    assert_eq!(
        (whole.status, whole.text(), whole.header("content-length")),
        (200, "twenty bytes of a zip", Some("21"))
    );
    let part = next.ask(request("GET", path, &[("Range", "bytes=7-11")], "")).await;
    assert_eq!((part.status, part.text(), part.header("content-range")), (206, "bytes", Some("bytes 7-11/21")));
    assert_eq!(ask(&next, "GET", path, &[("Range", "bytes=21-")], "").await.0, 416);
    assert_eq!(*world.store.forged.lock().unwrap(), 0, "{:?}", world.store.asked.lock().unwrap());
    // Ranges of one job are of one version: what was replaced meanwhile is a miss, never a mixture.
    world.store.objects.lock().unwrap().insert(paths[0].clone(), b"ANOTHER VERSION OF IT".to_vec());
    assert_eq!(ask(&next, "GET", path, &[("Range", "bytes=0-3")], "").await.0, 404);
    assert_eq!(ask(&world.door(7, true).await, "GET", path, &[], "").await.1, b"ANOTHER VERSION OF IT");
}

/// T18: the same trust as on the host's disk; a guest's URL is no part of the store's.
#[tokio::test(flavor = "multi_thread")]
async fn the_store_keeps_projects_and_refs_apart() {
    let world = World::new().await;
    let (victim, open) = (world.door(7, true).await, world.door(7, false).await);
    assert_eq!(ask(&victim, "PUT", "/cache/project/7/k", &[], "secret").await.0, 200);
    assert_eq!(ask(&victim, "PUT", "/cache/project/7/k-protected", &[], "secret").await.0, 200);
    assert_eq!(ask(&open, "PUT", "/cache/project/7/p", &[], "poison").await.0, 200);
    let before = world.store.paths();
    assert_eq!(ask(&victim, "GET", "/cache/project/7/p", &[], "").await.0, 404);
    assert_eq!(ask(&open, "GET", "/cache/project/7/k-protected", &[], "").await.0, 404);
    assert_eq!(ask(&open, "GET", "/cache/project/7/k", &[], "").await, (200, b"secret".to_vec()), "a plain key");
    let other = world.door(8, true).await;
    for path in
        ["/cache/project/7/k", "/cache/project/8/../7/k", "/cache/project/8/..%2f..%2fci-caches", "/ci-caches/dayfly/x"]
    {
        for method in ["GET", "PUT"] {
            let (status, body) = ask(&other, method, path, &[], "").await;
            assert!(
                (400..500).contains(&status) && !String::from_utf8_lossy(&body).contains("secret"),
                "{method} {path}"
            );
        }
    }
    assert_eq!(world.store.paths(), before);
    assert_eq!(*world.store.forged.lock().unwrap(), 0);
}

/// A store that fails is an empty one; the job's log says so, and the helper has no reason to send it all again.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_costs_a_job_its_cache_and_no_more() {
    let world = World::new().await;
    let tenant = Tenant::new(&"https://gitlab.example".parse().unwrap(), 7, Some(true));
    let cache = world.caches.of(tenant, 42, "job-42");
    let door = Setup { cache: Some(cache.clone()), ..Setup::default() }.open().await;
    assert_eq!(ask(&door, "PUT", "/cache/project/7/k", &[], "whole").await.0, 200);
    for status in [500, 403, 302] {
        *world.store.fails.lock().unwrap() = Some(status);
        assert_eq!(ask(&door, "GET", "/cache/project/7/k", &[], "").await.0, 404, "{status}");
        assert_eq!(ask(&door, "PUT", "/cache/project/7/k", &[], "more").await.0, 403, "{status}");
    }
    *world.store.fails.lock().unwrap() = None;
    let huge = "PUT /cache/project/7/k HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\nhalf";
    assert_eq!(door.ask(huge.as_bytes().to_vec()).await.status, 413);
    let mut guest = door.guest().await;
    guest.send("PUT /cache/project/7/k HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf").await;
    drop(guest);
    let cut = async {
        while !cache.noted().0.iter().any(|note| note.words().contains("did not arrive whole")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), cut).await.expect("a save that breaks off is noted");
    assert_eq!(ask(&door, "GET", "/cache/project/7/k", &[], "").await, (200, b"whole".to_vec()));
    let words: Vec<String> = cache.noted().0.iter().map(dayfly::cache::Note::words).collect();
    assert!(words.iter().any(|line| line.contains("the store of caches failed")), "{words:?}");
}
