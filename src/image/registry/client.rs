//! One repository of a registry: manifests and blobs, as the OCI distribution specification has them.
//!
//! A registry that fails is asked again, a while later and a few times ([`super::Patience`]). One that wants to know who
//! asks is told, or a token is fetched where it says.

use super::credentials::{self, Login};
use super::format::{MANIFEST_BYTES_MAX, MANIFEST_MEDIA, MANIFESTS_ACCEPTED};
use super::http::{Ask, Http, header, location, shown, whole};
use super::reference::Reference;
use super::{Access, Patience, RegistryError};
use crate::gitlab::{Body, OpenTransport};
use crate::secret::Secret;
use bytes::Bytes;
use dayfly_pieces::digest_of;
use http::header::{CONTENT_RANGE, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{Method, Response, StatusCode};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Bytes of a token's answer at most.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// Bytes that are read of an answer that says what is wrong.
const COMPLAINT_BYTES_MAX: usize = 16 * 1024;

/// Characters of it that are shown.
const COMPLAINT_SHOWN: usize = 200;

/// A repository, and who asks.
pub struct Registry {
    reference: Reference,
    http: Http,
    login: Option<Login>,
    /// What the registry, or whom it names, has given us.
    authorization: Option<Secret>,
    patience: Patience,
}

/// A manifest, as it came.
pub struct Found {
    /// `sha256:…`, of the bytes.
    pub digest: String,
    /// What the registry says it is.
    pub media_type: String,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// A blob on its way.
pub struct Blob {
    /// The first byte that comes: of what was asked for, or 0 where a registry gives whole ones only.
    pub from: u64,
    url: String,
    body: Body,
}

impl Blob {
    /// The next bytes; `None`: the end.
    ///
    /// # Errors
    /// [`RegistryError::BrokeOff`], with `so_far` as what had come.
    pub async fn next(&mut self, so_far: u64) -> Result<Option<Bytes>, RegistryError> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(_)) => return Err(RegistryError::BrokeOff { url: self.url.clone(), bytes: so_far }),
            }
        }
    }
}

impl Registry {
    /// Reads credentials; opens no connection.
    ///
    /// # Errors
    /// [`RegistryError::Credentials`], [`RegistryError::Reference`].
    pub fn new(reference: Reference, access: &Access, open: Arc<dyn OpenTransport>) -> Result<Self, RegistryError> {
        let login = credentials::find(access.auth_file.as_deref(), reference.registry())?;
        let base = reference.base(access.plain_http, access.ca_file.is_some())?;
        let http = Http::new(open, access, base);
        Ok(Self { reference, http, login, authorization: None, patience: access.patience })
    }

    /// Where it is.
    #[must_use]
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// How often a failing registry is asked.
    #[must_use]
    pub fn patience(&self) -> Patience {
        self.patience
    }

    fn url(&self, rest: &str) -> Result<Url, RegistryError> {
        let bad = |_| RegistryError::Reference { text: self.reference.to_string(), why: "it names no place" };
        self.http.base().join(&format!("/v2/{}/{rest}", self.reference.repository())).map_err(bad)
    }

    /// The manifest of this tag or digest.
    ///
    /// # Errors
    /// [`RegistryError`]; [`RegistryError::Lie`] if it is not the one of the digest.
    pub async fn manifest(&mut self, version: &str) -> Result<Found, RegistryError> {
        let url = self.url(&format!("manifests/{version}"))?;
        let mut tries = 0;
        let (media_type, bytes) = loop {
            let ask = Ask { accept: MANIFESTS_ACCEPTED, ..Ask::new(Method::GET, url.clone()) };
            let got = match self.ask(ask, false).await {
                Ok(answer) => {
                    let media_type = header(&answer, &CONTENT_TYPE).unwrap_or_default().to_owned();
                    whole(&url, answer.into_body(), MANIFEST_BYTES_MAX).await.map(|bytes| (media_type, bytes))
                }
                Err(error) => Err(error),
            };
            match got {
                Ok(got) => break got,
                Err(error) => self.again(error, &mut tries).await?,
            }
        };
        let digest = digest_of(&bytes);
        if version.contains(':') && version != digest {
            let why = format!("its digest is {digest}");
            return Err(RegistryError::Lie { what: shown(&url), why });
        }
        Ok(Found { digest, media_type, bytes })
    }

    /// A blob from this byte on. Not asked again: what has come of it the caller has.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn blob(&mut self, digest: &str, from: u64) -> Result<Blob, RegistryError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let ask = Ask { from, ..Ask::new(Method::GET, url.clone()) };
        let answer = self.ask(ask, true).await?;
        let from = match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(&answer, &CONTENT_RANGE).unwrap_or_default();
                let first = range.strip_prefix("bytes ").and_then(|range| range.split('-').next());
                if first.and_then(|first| first.parse().ok()) != Some(from) {
                    let why = format!("it gives another part of it than was asked for (`{}`)", range.escape_debug());
                    return Err(RegistryError::Answer { url: shown(&url), why });
                }
                from
            }
            _ => 0,
        };
        Ok(Blob { from, url: shown(&url), body: answer.into_body() })
    }

    /// A small blob, whole and right.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn small_blob(&mut self, digest: &str, bytes: u64, most: usize) -> Result<Vec<u8>, RegistryError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let mut tries = 0;
        let found = loop {
            let got = match self.blob(digest, 0).await {
                Ok(blob) => whole(&url, blob.body, most).await,
                Err(error) => Err(error),
            };
            match got {
                Ok(found) => break found,
                Err(error) => self.again(error, &mut tries).await?,
            }
        };
        if found.len() as u64 != bytes || digest_of(&found) != digest {
            let why = format!("it has {} bytes of digest {}, not {bytes} bytes", found.len(), digest_of(&found));
            return Err(RegistryError::Lie { what: shown(&url), why });
        }
        Ok(found)
    }

    /// Whether the repository has this blob.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn has_blob(&mut self, digest: &str) -> Result<bool, RegistryError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let mut tries = 0;
        loop {
            match self.ask(Ask::new(Method::HEAD, url.clone()), true).await {
                Ok(_) => return Ok(true),
                Err(RegistryError::Missing(_)) => return Ok(false),
                Err(error) => self.again(error, &mut tries).await?,
            }
        }
    }

    /// Puts a blob there.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn put_blob(&mut self, digest: &str, content: Bytes) -> Result<(), RegistryError> {
        let mut tries = 0;
        loop {
            match self.put_blob_once(digest, content.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => self.again(error, &mut tries).await?,
            }
        }
    }

    async fn put_blob_once(&mut self, digest: &str, content: Bytes) -> Result<(), RegistryError> {
        let begin = self.url("blobs/uploads/")?;
        let begun = self.ask(Ask::new(Method::POST, begin.clone()), false).await?;
        let mut to = location(&begin, &begun)?;
        if !self.http.is_registry(&to) {
            let why = "which is another server; the image and our credentials go to the registry alone";
            return Err(RegistryError::Redirect { url: shown(&begin), to: shown(&to), why });
        }
        drop(begun);
        to.query_pairs_mut().append_pair("digest", digest);
        let ask = Ask { content: Some(("application/octet-stream", content)), ..Ask::new(Method::PUT, to) };
        self.ask(ask, false).await.map(drop)
    }

    /// Puts a manifest there, under this tag.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn put_manifest(&mut self, tag: &str, manifest: Vec<u8>) -> Result<(), RegistryError> {
        let url = self.url(&format!("manifests/{tag}"))?;
        let content = Bytes::from(manifest);
        let mut tries = 0;
        loop {
            let ask = Ask { content: Some((MANIFEST_MEDIA, content.clone())), ..Ask::new(Method::PUT, url.clone()) };
            match self.ask(ask, false).await {
                Ok(_) => return Ok(()),
                Err(error) => self.again(error, &mut tries).await?,
            }
        }
    }

    /// Waits until it may be tried again.
    ///
    /// # Errors
    /// `error`, if that is of no use, or was done often enough.
    pub async fn again(&self, error: RegistryError, tries: &mut u32) -> Result<(), RegistryError> {
        *tries += 1;
        if !error.is_transient() || *tries >= self.patience.tries {
            return Err(error);
        }
        let pause = self.patience.pause.saturating_mul(1 << (*tries - 1).min(16));
        tracing::debug!(error = crate::telemetry::chain(&error), "a registry is asked again");
        tokio::time::sleep(pause.min(Duration::from_secs(60))).await;
        Ok(())
    }

    /// Asks as whom the registry wants, and says what is wrong.
    async fn ask(&mut self, ask: Ask, blob: bool) -> Result<Response<Body>, RegistryError> {
        let mut answer = self.ask_once(ask.clone(), blob).await?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            let challenge = header(&answer, &WWW_AUTHENTICATE).unwrap_or_default().to_owned();
            let before = self.authorization.as_ref().map(|secret| secret.expose().to_owned());
            self.authorization = self.authorize(&challenge, &ask.url).await?;
            let now = self.authorization.as_ref().map(Secret::expose);
            if now.is_some() && now != before.as_deref() {
                answer = self.ask_once(ask.clone(), blob).await?;
            }
        }
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let url = shown(&ask.url);
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RegistryError::Refused {
                url,
                status: status.as_u16(),
                why: match &self.login {
                    Some(_) => format!(
                        "it does not let us, with the credentials that the file has for `{}`",
                        self.reference.registry()
                    ),
                    None => format!(
                        "it wants to know who asks; give credentials for `{}` in a file of Docker's form, by --auth-file or `docker login`",
                        self.reference.registry()
                    ),
                },
            },
            StatusCode::NOT_FOUND => RegistryError::Missing(url),
            StatusCode::TOO_MANY_REQUESTS => RegistryError::Down { url, status: status.as_u16() },
            status if status.is_server_error() => RegistryError::Down { url, status: status.as_u16() },
            status if status.is_redirection() => RegistryError::Redirect {
                to: location(&ask.url, &answer).map_or_else(|_| "nowhere".into(), |to| shown(&to)),
                url,
                why: "where it answers itself",
            },
            status => {
                let complaint = whole(&ask.url, answer.into_body(), COMPLAINT_BYTES_MAX).await.unwrap_or_default();
                let complaint: String = String::from_utf8_lossy(&complaint)
                    .chars()
                    .map(|c| if c.is_control() { ' ' } else { c })
                    .take(COMPLAINT_SHOWN)
                    .collect();
                RegistryError::Answer { url, why: format!("status {}: {complaint}", status.as_u16()) }
            }
        })
    }

    async fn ask_once(&mut self, mut ask: Ask, blob: bool) -> Result<Response<Body>, RegistryError> {
        ask.authorization.clone_from(&self.authorization);
        if blob { self.http.send_for_blob(ask).await } else { self.http.send(ask).await }
    }

    /// What a registry is to be shown that asks for it so (RFC 7235; the distribution specification's token flow).
    async fn authorize(&mut self, challenge: &str, asked: &Url) -> Result<Option<Secret>, RegistryError> {
        let (scheme, rest) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Ok(self.login.as_ref().map(Login::header));
        }
        if let Some(Login::Bearer(_)) = &self.login {
            return Ok(self.login.as_ref().map(Login::header));
        }
        let said = parameters(rest);
        let value = |name: &str| said.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let odd = |why: &str| RegistryError::Answer { url: shown(asked), why: why.to_owned() };
        let realm = value("realm").and_then(|realm| asked.join(realm).ok());
        let mut realm = realm.ok_or_else(|| odd("it wants a token, and does not say where there are some"))?;
        if !self.http.is_trusted(&realm) {
            let why = "for a token, in the clear";
            return Err(RegistryError::Redirect { url: shown(asked), to: shown(&realm), why });
        }
        for name in ["service", "scope"] {
            if let Some(value) = value(name) {
                realm.query_pairs_mut().append_pair(name, value);
            }
        }
        let authorization = self.login.as_ref().map(Login::header);
        let answer = self.http.send(Ask { authorization, ..Ask::new(Method::GET, realm.clone()) }).await?;
        match answer.status() {
            status if status.is_success() => {}
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(RegistryError::Down { url: shown(&realm), status: status.as_u16() });
            }
            // The registry's own refusal says more.
            _ => return Ok(None),
        }
        let text = whole(&realm, answer.into_body(), TOKEN_BYTES_MAX).await?;
        let token = serde_json::from_slice::<Token>(&text).ok().and_then(|token| token.token.or(token.access_token));
        let token = token.ok_or_else(|| odd("what it gives in place of a token is none"))?;
        Ok(Some(Login::Bearer(Secret::new(token)).header()))
    }
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

/// `realm="https://a",service="b"`: keys in lower case.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.push((key, value.trim().to_owned()));
        rest = after;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_read_as_registries_write_it() {
        let read = |text: &str| parameters(text);
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            read(r#"realm="https://auth.example/token",service="registry",scope="repository:a/b:pull,push""#),
            [
                pair("realm", "https://auth.example/token"),
                pair("service", "registry"),
                pair("scope", "repository:a/b:pull,push")
            ]
        );
        assert_eq!(read("Realm=x, SERVICE=y"), [pair("realm", "x"), pair("service", "y")]);
        assert_eq!(read(""), []);
        assert_eq!(read("=\"="), [pair("", "=")]);
    }
}
