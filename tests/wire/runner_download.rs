//! Fetching the official runner from a place that may answer anything.

use crate::gitlab_server::{Reply, Request, Server, answer, every_text, open, soon};
use dayfly::gitlab::transport::OpenError;
use dayfly::gitlab::{Endpoint, OpenTransport, RealLimits, Transport};
use dayfly::image::build::{Downloaded, RUNNER_DOWNLOADS, Release};
use sha2::{Digest as _, Sha256};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

const RUNNER: &[u8] = b"#!/bin/sh\necho 'Version:      19.3.0'\n";

/// GitLab's place, at a server of the test's.
struct Place(Url);

impl OpenTransport for Place {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        assert_eq!(endpoint.url.as_str(), format!("{RUNNER_DOWNLOADS}/"));
        let endpoint = Endpoint { url: self.0.clone(), allow_insecure_http: true, ..endpoint.clone() };
        Ok(open(RealLimits { read_idle: Duration::from_millis(300), ..RealLimits::default() }, &endpoint))
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn list(digest: &str) -> Vec<u8> {
    format!(
        "{}  deb/x.deb\n{digest} *binaries/gitlab-runner-linux-amd64\n{digest} *binaries/gitlab-runner-linux-arm64\n",
        "0".repeat(64)
    )
    .into()
}

/// What comes of a place that answers so; a failure as an operator reads it. Nothing else may be left in the directory.
async fn fetch(
    sha256: Option<&str>,
    reply: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> (Result<Downloaded, String>, tempfile::TempDir) {
    let server = Server::answering(reply).await;
    let dir = tempfile::tempdir().unwrap();
    let mut release = Release::new("19.3.0", RUNNER_DOWNLOADS.parse().unwrap(), sha256, None).unwrap();
    release.bytes_max = 1 << 20;
    let fetched = soon(release.fetch(&Place(server.url()), dir.path(), false, &mut |_| {})).await;
    let fetched = fetched.map_err(|error| every_text(&error));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), usize::from(fetched.is_ok()), "{fetched:?}");
    (fetched, dir)
}

fn is_list(request: &Request) -> bool {
    request.line == "GET /v19.3.0/release.sha256 HTTP/1.1"
}

/// A place as it should be, but for the runner's file.
async fn refused(reply: Reply) -> String {
    let reply =
        move |request: &Request| if is_list(request) { answer(200, "", list(&hex(RUNNER))) } else { reply.clone() };
    fetch(None, reply).await.0.unwrap_err()
}

#[tokio::test]
async fn a_release_is_fetched_and_is_gone_when_it_is_no_longer_needed() {
    let (fetched, dir) = fetch(None, |request| {
        if is_list(request) {
            return answer(200, "", list(&hex(RUNNER).to_uppercase()));
        }
        assert!(request.line.starts_with("GET /v19.3.0/binaries/gitlab-runner-linux-"), "{}", request.line);
        answer(200, "Content-Type: binary/octet-stream\r\n", RUNNER)
    })
    .await;
    let fetched = fetched.unwrap();
    let path = fetched.runner.path.clone();
    assert_eq!(path.parent(), Some(dir.path()));
    assert_eq!(std::fs::read(&path).unwrap(), RUNNER);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
    drop(fetched);
    assert!(!path.exists());
}

/// Whatever comes instead of the file, the words say what it was and no file is left.
#[tokio::test]
async fn what_is_not_the_file_is_refused_by_what_it_is() {
    let changed = refused(answer(200, "", b"something else")).await;
    assert!(changed.contains("its SHA-256 is") && changed.contains(&hex(RUNNER)), "{changed}");
    let missing = refused(answer(404, "", "")).await;
    assert!(missing.contains("there is no such release there"), "{missing}");
    let redirect = refused(answer(302, "Location: https://elsewhere.example/x/y?sig=secret\r\n", "")).await;
    assert!(redirect.contains("https://elsewhere.example/x/y`; redirects are never followed"), "{redirect}");
    assert!(!redirect.contains("secret"), "{redirect}");
    let page = refused(answer(200, "Content-Type: text/html\r\n", "<html>")).await;
    assert!(page.contains("a page for people"), "{page}");
    let down = refused(answer(503, "", "")).await;
    assert!(down.contains("status 503: it is down"), "{down}");
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nshort";
    let short = refused(Reply::Close(head.into())).await;
    assert!(short.contains("it broke off after 5 bytes"), "{short}");
    let stands = refused(Reply::Hang(head.into())).await;
    assert!(stands.contains("it broke off after 5 bytes"), "{stands}");
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(2 << 20));
    let endless = refused(Reply::Hang(endless.into())).await;
    assert!(endless.contains("more than 1 MiB, which is no gitlab-runner"), "{endless}");
}

#[tokio::test]
async fn a_digest_that_was_given_is_the_one_that_counts() {
    let place = |request: &Request| {
        assert!(!is_list(request), "the list is not needed");
        answer(200, "", RUNNER)
    };
    fetch(Some(&hex(RUNNER)), place).await.0.unwrap();
    let wrong = fetch(Some(&"ab".repeat(32)), place).await.0.unwrap_err();
    assert!(wrong.contains("and not abababab"), "{wrong}");
}

#[tokio::test]
async fn a_list_that_is_none_is_told() {
    for (reply, part) in [
        (answer(404, "", ""), "there is no such release there"),
        (answer(200, "", "nothing of use\n"), "the list does not name it; give the file's digest by --runner-sha256"),
        (answer(200, "", "x".repeat(300 * 1024)), "which is no list of digests"),
        (Reply::Reset(Vec::new()), "fetch https://gitlab-runner-downloads"),
    ] {
        let text = fetch(None, move |_| reply.clone()).await.0.unwrap_err();
        assert!(text.contains(part) && text.contains("/v19.3.0/release.sha256"), "{text}");
    }
}

#[tokio::test]
async fn a_place_that_is_not_there_is_told_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}").parse().unwrap();
    let release = Release::new("19.3.0", RUNNER_DOWNLOADS.parse().unwrap(), None, None).unwrap();
    let error =
        every_text(&soon(release.fetch(&Place(url), Path::new(dir.path()), false, &mut |_| {})).await.unwrap_err());
    assert!(error.contains("nothing listens there"), "{error}");
}

const HELPER: &[u8] = b"the file system of a helper image\n";
const SIGNED: &str = include_str!("../data/runner-release/release.sha256");
const SIGNATURE: &str = include_str!("../data/runner-release/release.sha256.asc");
const EXPIRED: &str = include_str!("../data/runner-release/release.sha256.expired.asc");

fn key(name: &str) -> Option<PathBuf> {
    Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/runner-release").join(name))
}

/// A release with its helper image, at a place that has this list and this signature of it.
async fn signed(
    key: Option<PathBuf>,
    sha256: Option<&str>,
    (list, signature): (&'static str, &'static str),
) -> (Result<(Vec<u8>, Option<Vec<u8>>), String>, Vec<String>) {
    let server = Server::answering(move |request| match &request.line {
        line if line.contains(".sha256.asc ") && signature.is_empty() => answer(404, "", ""),
        line if line.contains(".sha256.asc ") => answer(200, "", signature),
        line if line.contains(".sha256 ") => answer(200, "", list),
        line if line.contains("/helper-images/prebuilt-") => answer(200, "", HELPER),
        line => {
            assert!(line.contains("/binaries/gitlab-runner-linux-"), "{line}");
            answer(200, "", RUNNER)
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let release = Release::new("19.3.0", RUNNER_DOWNLOADS.parse().unwrap(), sha256, key).unwrap();
    let mut said = Vec::new();
    let fetched =
        soon(release.fetch(&Place(server.url()), dir.path(), true, &mut |line| said.push(line.to_owned()))).await;
    let read = |path: &Path| std::fs::read(path).unwrap();
    let files = fetched.as_ref().map_or(0, |files| 1 + usize::from(files.helper.is_some()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), files);
    let fetched = fetched.map_err(|error| every_text(&error));
    (fetched.map(|files| (read(&files.runner.path), files.helper.as_ref().map(|helper| read(&helper.path)))), said)
}

#[tokio::test]
async fn a_helper_image_comes_with_the_runner_by_the_same_list() {
    let (fetched, _) = signed(None, None, (SIGNED, "")).await;
    assert_eq!(fetched.unwrap(), (RUNNER.to_vec(), Some(HELPER.to_vec())));
    // A digest of the runner says nothing of it, the list does.
    let (fetched, _) = signed(None, Some(&hex(RUNNER)), (SIGNED, "")).await;
    assert_eq!(fetched.unwrap().1, Some(HELPER.to_vec()));
    let without: &str = SIGNED.split_inclusive('\n').filter(|l| !l.contains("helper")).collect::<String>().leak();
    let (fetched, said) = signed(None, None, (without, "")).await;
    assert_eq!(fetched.unwrap(), (RUNNER.to_vec(), None));
    assert!(said.iter().any(|line| line.contains("each job's runner fetches its own")), "{said:?}");
}

/// The list's signature, by a key of the operator's: nothing is used that it does not vouch for.
#[tokio::test]
async fn a_list_without_a_good_signature_by_the_given_key_is_not_believed() {
    let (fetched, said) = signed(key("key.asc"), None, (SIGNED, SIGNATURE)).await;
    assert_eq!(fetched.unwrap(), (RUNNER.to_vec(), Some(HELPER.to_vec())));
    assert!(said.iter().any(|line| line.contains("release.sha256: signed with the key")), "{said:?}");
    let changed: &str = SIGNED.replace("deb/x.deb", "deb/y.deb").leak();
    for (name, files, part) in [
        ("key.asc", (changed, SIGNATURE), "BAD signature"),
        ("another-key.asc", (SIGNED, SIGNATURE), "it was made with another key than the one that is trusted"),
        ("expired-key.asc", (SIGNED, EXPIRED), "it was made with a key that has expired; get the new one"),
        ("key.asc", (SIGNED, SIGNED), "could not be verified"),
        ("key.asc", (SIGNED, ""), "status 404"),
        ("release.sha256", (SIGNED, SIGNATURE), "it is text, and no `PGP PUBLIC KEY BLOCK`"),
        ("none.asc", (SIGNED, SIGNATURE), "read the key"),
    ] {
        let text = signed(key(name), None, files).await.0.unwrap_err();
        assert!(text.contains(part) && text.contains("/v19.3.0/release.sha256"), "{name}: {text}");
    }
}
