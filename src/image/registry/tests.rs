//! A registry in memory, which does as the distribution specification says, and lies where a test has it lie; and how we
//! log in, and follow, and where not.

use super::http::shown;
use super::{Access, Patience, Reference, Registry, RegistryError};
use crate::BoxFuture;
use crate::gitlab::transport::{OpenError, full};
use crate::gitlab::{Body, Call, Endpoint, OpenTransport, Transport, TransportError};
use bytes::Bytes;
use dayfly_pieces::digest_of;
use http::{Method, Response, StatusCode};
use http_body_util::BodyExt as _;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use url::Url;

/// What a registry was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    /// Server and path.
    pub(crate) url: String,
    /// `Range`.
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

/// What it answers in place of the truth, if anything.
pub(crate) type Lie = Box<dyn FnMut(&Asked) -> Option<Response<Body>> + Send>;

/// A registry in memory, and whoever else is asked.
#[derive(Clone, Default)]
pub(crate) struct FakeRegistry(Arc<Mutex<Model>>);

#[derive(Default)]
struct Model {
    blobs: BTreeMap<String, Bytes>,
    manifests: BTreeMap<String, Bytes>,
    asked: Vec<Asked>,
    lie: Option<Lie>,
    /// What it must be shown.
    wanted: Option<String>,
}

pub(crate) fn answer(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    let mut answer = Response::new(full(body));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}

pub(crate) fn leading_to(status: u16, to: &str) -> Response<Body> {
    let mut answer = answer(status, "");
    answer.headers_mut().insert("location", to.parse().unwrap());
    answer
}

/// So many bytes, then a break.
pub(crate) fn breaking(status: u16, bytes: Bytes) -> Response<Body> {
    let frames = [Ok(http_body::Frame::data(bytes)), Err("the line is cut".into())];
    let mut answer = Response::new(Frames(frames.into_iter().collect()).boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}

/// A body of these frames.
pub(crate) struct Frames(
    pub(crate) std::collections::VecDeque<Result<http_body::Frame<Bytes>, crate::gitlab::transport::BodyError>>,
);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = crate::gitlab::transport::BodyError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        std::task::Poll::Ready(self.0.pop_front())
    }
}

impl FakeRegistry {
    /// A client of it: asks again, without long pauses.
    pub(crate) fn client(&self, reference: &str) -> Registry {
        self.client_with(reference, &Access { patience: quick(), auth_file: Some(no_logins()), ..Access::default() })
            .unwrap()
    }

    pub(crate) fn client_with(&self, reference: &str, access: &Access) -> Result<Registry, RegistryError> {
        Registry::new(Reference::parse(reference)?, access, Arc::new(self.clone()))
    }

    pub(crate) fn lie(&self, lie: impl FnMut(&Asked) -> Option<Response<Body>> + Send + 'static) {
        self.0.lock().unwrap().lie = Some(Box::new(lie));
    }

    pub(crate) fn tell_the_truth(&self) {
        self.0.lock().unwrap().lie = None;
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.0.lock().unwrap().asked.clone()
    }

    pub(crate) fn forget_asked(&self) {
        self.0.lock().unwrap().asked.clear();
    }

    pub(crate) fn blobs(&self) -> BTreeMap<String, Bytes> {
        self.0.lock().unwrap().blobs.clone()
    }

    pub(crate) fn manifest(&self, tag: &str) -> Option<Bytes> {
        self.0.lock().unwrap().manifests.get(tag).cloned()
    }

    pub(crate) fn put_manifest(&self, tag: &str, manifest: impl Into<Bytes>) {
        let manifest = manifest.into();
        let mut model = self.0.lock().unwrap();
        model.manifests.insert(digest_of(&manifest), manifest.clone());
        model.manifests.insert(tag.to_owned(), manifest);
    }

    pub(crate) fn put_blob(&self, blob: impl Into<Bytes>) -> String {
        let blob = blob.into();
        let digest = digest_of(&blob);
        self.0.lock().unwrap().blobs.insert(digest.clone(), blob);
        digest
    }
}

pub(crate) fn quick() -> Patience {
    Patience { tries: 3, pause: Duration::ZERO }
}

/// A file of logins that has none: nothing of the machine that tests run on.
pub(crate) fn no_logins() -> PathBuf {
    static FILE: std::sync::OnceLock<tempfile::NamedTempFile> = std::sync::OnceLock::new();
    let file = FILE.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "{}").unwrap();
        file
    });
    file.path().to_owned()
}

impl OpenTransport for FakeRegistry {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        if endpoint.url.scheme() == "http" && !endpoint.allow_insecure_http {
            return Err(OpenError::InsecureHttp(endpoint.url.clone()));
        }
        Ok(Arc::new(Server { registry: self.clone(), base: endpoint.url.clone() }))
    }
}

struct Server {
    registry: FakeRegistry,
    base: Url,
}

impl Transport for Server {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response<Body>, TransportError>> {
        let (registry, base) = (self.registry.clone(), self.base.clone());
        Box::pin(async move {
            let (parts, body) = call.request.into_parts();
            let body = body.collect().await.map_err(TransportError::Broken)?.to_bytes();
            let text = |name: &str| parts.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            let url = base.join(parts.uri.path_and_query().unwrap().as_str()).unwrap();
            let asked = Asked {
                method: parts.method.clone(),
                url: url.to_string(),
                range: text("range"),
                authorization: text("authorization"),
            };
            let mut model = registry.0.lock().unwrap();
            model.asked.push(asked.clone());
            let mut lie = model.lie.take();
            let lied = lie.as_mut().and_then(|lie| lie(&asked));
            model.lie = lie;
            Ok(lied.unwrap_or_else(|| model.answer(&asked, &url, body)))
        })
    }
}

impl Model {
    fn answer(&mut self, asked: &Asked, url: &Url, body: Bytes) -> Response<Body> {
        if self.wanted.is_some() && self.wanted != asked.authorization {
            let mut answer = answer(401, "");
            answer.headers_mut().insert("www-authenticate", "Basic realm=\"r\"".parse().unwrap());
            return answer;
        }
        let path = url.path();
        let last = path.rsplit('/').next().unwrap_or_default().to_owned();
        match (&asked.method, path) {
            (&Method::POST, path) if path.ends_with("/blobs/uploads/") => leading_to(202, &format!("{path}id?state=1")),
            (&Method::PUT, path) if path.contains("/blobs/uploads/") => {
                let digest = url.query_pairs().find(|(key, _)| key == "digest").map(|(_, digest)| digest.into_owned());
                match digest.filter(|digest| *digest == digest_of(&body)) {
                    Some(digest) => {
                        self.blobs.insert(digest, body);
                        answer(201, "")
                    }
                    None => answer(400, "DIGEST_INVALID"),
                }
            }
            (&Method::PUT, path) if path.contains("/manifests/") => {
                self.manifests.insert(digest_of(&body), body.clone());
                self.manifests.insert(last, body);
                answer(201, "")
            }
            (_, path) if path.contains("/manifests/") => match self.manifests.get(&last) {
                Some(manifest) => {
                    let said: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
                    let mut answer = answer(200, manifest.clone());
                    let kind = said["mediaType"].as_str().unwrap_or("application/json");
                    answer.headers_mut().insert("content-type", kind.parse().unwrap());
                    answer
                }
                None => answer(404, ""),
            },
            (_, path) if path.contains("/blobs/") => match self.blobs.get(&last) {
                Some(blob) => part_of(blob, asked),
                None => answer(404, ""),
            },
            _ => answer(404, ""),
        }
    }
}

/// A blob, from the byte on that is asked for.
pub(crate) fn part_of(blob: &Bytes, asked: &Asked) -> Response<Body> {
    let from = asked
        .range
        .as_deref()
        .map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap());
    let Some(from) = from else { return answer(200, blob.clone()) };
    let mut answer = answer(206, blob.slice(from..));
    let range = format!("bytes {from}-{}/{}", blob.len() - 1, blob.len());
    answer.headers_mut().insert("content-range", range.parse().unwrap());
    answer
}

fn logins(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
    file
}

/// "user:pass" for these registries.
fn login(registries: &[&str]) -> tempfile::NamedTempFile {
    let auths: Vec<String> =
        registries.iter().map(|name| format!("\"{name}\": {{\"auth\": \"dXNlcjpwYXNz\"}}")).collect();
    logins(&format!("{{\"auths\": {{{}}}}}", auths.join(",")))
}

#[tokio::test]
async fn a_registry_that_asks_who_we_are_is_told_what_the_file_says() {
    let fake = FakeRegistry::default();
    let blob = fake.put_blob("content");
    fake.0.lock().unwrap().wanted = Some("Basic dXNlcjpwYXNz".into());
    let file = login(&["r.example"]);
    let access = Access { auth_file: Some(file.path().to_owned()), patience: quick(), ..Access::default() };
    let mut client = fake.client_with("oci://r.example/a:1", &access).unwrap();
    assert!(client.has_blob(&blob).await.unwrap());
    // Not before it was asked for, and from then on at once.
    assert!(client.has_blob(&blob).await.unwrap());
    let shown: Vec<bool> = fake.asked().iter().map(|asked| asked.authorization.is_some()).collect();
    assert_eq!(shown, [false, true, true]);
    let error = fake.client("oci://r.example/a:1").has_blob(&blob).await.unwrap_err().to_string();
    assert!(error.contains("--auth-file"), "{error}");
    fake.0.lock().unwrap().wanted = Some("Basic other".into());
    let error = client.has_blob(&blob).await.unwrap_err().to_string();
    assert!(error.contains("does not let us") && !error.contains("pass") && !error.contains("dXNl"), "{error}");
}

#[tokio::test]
async fn a_token_is_fetched_where_the_registry_says_and_never_in_the_clear() {
    let fake = FakeRegistry::default();
    let blob = fake.put_blob("content");
    let challenge = |realm: &str| {
        let mut refusal = answer(401, "");
        let text = format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"repository:a:pull,push\"");
        refusal.headers_mut().insert("www-authenticate", text.parse().unwrap());
        refusal
    };
    let with = |realm: &'static str| {
        move |asked: &Asked| match &asked.authorization {
            _ if asked.url.starts_with("https://auth.example/token?") => Some(answer(200, r#"{"token": "t0ken"}"#)),
            Some(shown) if shown == "Bearer t0ken" => None,
            _ => Some(challenge(realm)),
        }
    };
    let file = login(&["r.example"]);
    let access = Access { auth_file: Some(file.path().to_owned()), patience: quick(), ..Access::default() };
    let mut client = fake.client_with("oci://r.example/a:1", &access).unwrap();
    fake.lie(with("https://auth.example/token"));
    assert!(client.has_blob(&blob).await.unwrap());
    let asked = fake.asked();
    assert_eq!(asked[1].url, "https://auth.example/token?service=s&scope=repository%3Aa%3Apull%2Cpush");
    assert_eq!(asked[1].authorization.as_deref(), Some("Basic dXNlcjpwYXNz"));
    fake.forget_asked();
    fake.lie(with("http://auth.example/token"));
    let mut client = fake.client_with("oci://r.example/a:1", &access).unwrap();
    let error = client.has_blob(&blob).await.unwrap_err().to_string();
    assert!(error.contains("http://auth.example/token, for a token, in the clear"), "{error}");
    assert!(fake.asked().iter().all(|asked| asked.authorization.is_none()), "{:?}", fake.asked());
}

/// A blob may lie elsewhere; whoever has it there never sees our credentials, and nothing goes there in the clear.
#[tokio::test]
async fn a_blob_is_followed_by_https_and_without_credentials() {
    let fake = FakeRegistry::default();
    let blob = fake.put_blob("content");
    let file = login(&["r.example"]);
    let access = Access { auth_file: Some(file.path().to_owned()), patience: quick(), ..Access::default() };
    for (to, followed) in [
        ("https://storage.example/bucket/x?Signature=s", true),
        ("/elsewhere/x", true),
        ("http://storage.example/x", false),
        ("http://169.254.169.254/latest/meta-data", false),
        ("file:///etc/shadow", false),
        ("https://r.example/loop", false),
    ] {
        fake.forget_asked();
        fake.lie(move |asked| {
            if asked.authorization.is_none() && asked.url.contains("r.example") {
                let mut refusal = answer(401, "");
                refusal.headers_mut().insert("www-authenticate", "Basic realm=r".parse().unwrap());
                return Some(refusal);
            }
            match asked.url.as_str() {
                url if url.contains("/blobs/") || url.contains("/loop") => Some(leading_to(307, to)),
                _ => Some(answer(200, "content")),
            }
        });
        let mut client = fake.client_with("oci://r.example/a:1", &access).unwrap();
        let found = client.small_blob(&blob, 7, 100).await;
        assert_eq!(found.is_ok(), followed, "{to}: {:?}", found.map_err(|error| error.to_string()));
        let elsewhere: Vec<Asked> = fake.asked().into_iter().filter(|asked| !asked.url.contains("r.example")).collect();
        assert!(
            elsewhere.iter().all(|asked| asked.authorization.is_none() && asked.url.starts_with("https:")),
            "{elsewhere:?}"
        );
    }
    // Only blobs are followed at all: a manifest, an upload and a login are the registry's own.
    fake.lie(|_| Some(leading_to(302, "https://other.example/x")));
    let mut client = fake.client("oci://r.example/a:1");
    assert!(matches!(client.manifest("1").await, Err(RegistryError::Redirect { .. })));
    fake.lie(|asked| (asked.method == Method::POST).then(|| leading_to(202, "https://other.example/x")));
    let error = client.put_blob(&blob, Bytes::from("content")).await.unwrap_err().to_string();
    assert!(error.contains("goes") || error.contains("go to the registry alone"), "{error}");
    assert!(fake.asked().iter().all(|asked| asked.url.contains("//r.example/")), "{:?}", fake.asked());
}

#[tokio::test]
async fn a_registry_that_is_down_is_asked_again_and_one_that_refuses_is_not() {
    let fake = FakeRegistry::default();
    let blob = fake.put_blob("content");
    let mut left = 2;
    fake.lie(move |_| {
        left -= 1;
        (left >= 0).then(|| answer(503, ""))
    });
    let mut client = fake.client("oci://r.example/a:1");
    assert!(client.has_blob(&blob).await.unwrap());
    fake.lie(|_| Some(answer(500, "")));
    fake.forget_asked();
    let error = client.has_blob(&blob).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("status 500"), "{error}");
    assert_eq!(fake.asked().len(), 3);
    for (status, part) in [(400, "status 400: what is wrong with it"), (403, "wants to know who asks")] {
        fake.forget_asked();
        fake.lie(move |asked| (asked.method == Method::PUT).then(|| answer(status, "what is wrong\nwith it")));
        let error = client.put_manifest("1", b"{}".to_vec()).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(fake.asked().len(), 1, "{status}");
    }
}

#[test]
fn what_is_shown_of_an_address_holds_no_secret() {
    let url = Url::parse("https://u:p@s.example/x?Signature=secret#f").unwrap();
    assert_eq!(shown(&url), "https://s.example/x");
}
