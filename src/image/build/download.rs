//! The official runner, fetched: GitLab's release file over HTTPS, believed by its SHA-256 only.
//!
//! ```text
//! BASE/vVERSION/release.sha256[.asc] ─► signature is right (if a key was given) ─► digest (unless one was given)
//! BASE/vVERSION/binaries/gitlab-runner-linux-ARCH ─► a temporary file, 0600 ─► digest is right ─► 0755
//! BASE/vVERSION/helper-images/prebuilt-ARCH.tar.xz ─► likewise, for an image with Docker
//! ```
//!
//! What is not right leaves no file. No redirect is followed: what answers is what was named. The list of digests comes
//! from the same place as the file: it shows that the file is whole, and HTTPS shows whose both are; GitLab's signature
//! of the list, or a digest that the operator knows from elsewhere, is worth more, and then an `http://` mirror will do.

use super::signature::{self, SignatureError};
use super::{HelperSource, RunnerSource, file_error};
use crate::gitlab::transport::{Body, OpenError, full};
use crate::gitlab::{
    Call, Connection, Endpoint, GitlabError, OpenTransport, ProxyEnvironment, RealLimits, RealOpenTransport, Transport,
    TransportError, readers,
};
use crate::hex::hex;
use crate::image::manifest::RunnerOrigin;
use crate::secret::Secret;
use crate::telemetry::chain;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::{NamedTempFile, TempPath};
use url::Url;

/// Where GitLab publishes its runner.
pub const RUNNER_DOWNLOADS: &str = "https://gitlab-runner-downloads.s3.amazonaws.com";

/// The release of today has 90 MiB.
const RUNNER_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// A list of some hundred files.
const LIST_BYTES_MAX: usize = 256 * 1024;
/// Until a server begins to answer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Until there is a connection; nobody's job waits for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// The whole of it, for a line of 1 Mbit/s.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// A release to fetch.
#[derive(Clone, Debug)]
pub struct Release {
    /// `19.3.0`.
    pub version: String,
    /// GitLab's own place ([`RUNNER_DOWNLOADS`]), or a mirror of the same layout.
    pub base: Url,
    /// The digest that the runner must have, hex; `None`: as the place's list says.
    pub sha256: Option<String>,
    /// File with the key of which the list must have a signature; `None`: the list is believed as it comes.
    pub key: Option<PathBuf>,
    /// Bytes of the file at most.
    pub bytes_max: u64,
}

/// A file that is gone when this is dropped.
#[derive(Debug)]
pub struct Downloaded {
    /// The runner.
    pub runner: RunnerSource,
    /// Its helper image, if it was asked for and the release has one.
    pub helper: Option<HelperSource>,
    /// Keep them.
    _files: Vec<TempPath>,
}

/// Why there is no such runner.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// `--runner-download` names none.
    #[error("use `{0}` as a version of gitlab-runner: write it like 19.3.0")]
    Version(String),
    /// Nobody can have checked what comes.
    #[error(
        "download over http:// without a digest: use https://, or give the file's SHA-256 by --runner-sha256, or the key of its \
         list's signature by --runner-key"
    )]
    Clear,
    /// No digest.
    #[error("use `{0}` as a SHA-256: it has 64 hexadecimal digits")]
    Digest(String),
    /// The place cannot be asked.
    #[error("ask {base}")]
    Open {
        /// The place.
        base: String,
        /// Cause.
        #[source]
        source: Box<OpenError>,
    },
    /// It did not answer.
    #[error("fetch {url}{}", source.explain().map(|remedy| format!(" ({remedy})")).unwrap_or_default())]
    Transport {
        /// The file.
        url: String,
        /// Cause.
        #[source]
        source: TransportError,
    },
    /// It answered something else.
    #[error("fetch {url}: {why}")]
    Answer {
        /// The file.
        url: String,
        /// What came.
        why: String,
    },
    /// The list has no such file.
    #[error("find {file} in {url}: the list does not name it; give the file's digest by --runner-sha256")]
    Unlisted {
        /// The list.
        url: String,
        /// The file.
        file: String,
    },
    /// Whoever made the list does not have the key.
    #[error("believe {url}: its signature")]
    Unsigned {
        /// The list.
        url: String,
        /// Cause.
        #[source]
        source: SignatureError,
    },
    /// It is another file, or not whole.
    #[error(
        "believe {url}: its SHA-256 is {found}, and not {expected}; it was changed on its way or at its place, and is not used"
    )]
    Mismatch {
        /// The file.
        url: String,
        /// What was to come.
        expected: String,
        /// What came.
        found: String,
    },
    /// The file here.
    #[error(transparent)]
    File(#[from] Box<super::BuildError>),
}

impl Release {
    /// A release by what the operator has written.
    ///
    /// # Errors
    /// [`DownloadError::Version`], [`DownloadError::Digest`], [`DownloadError::Clear`].
    pub fn new(version: &str, base: Url, sha256: Option<&str>, key: Option<PathBuf>) -> Result<Self, DownloadError> {
        let version = version.trim_start_matches('v');
        let parts: Vec<&str> = version.split('.').collect();
        let is_number = |part: &&str| !part.is_empty() && part.len() < 6 && part.bytes().all(|b| b.is_ascii_digit());
        if parts.len() != 3 || !parts.iter().all(is_number) {
            return Err(DownloadError::Version(version.escape_debug().to_string()));
        }
        let sha256 = match sha256.map(str::trim) {
            Some(digest) if is_digest(digest) => Some(digest.to_ascii_lowercase()),
            Some(other) => return Err(DownloadError::Digest(other.escape_debug().to_string())),
            None => None,
        };
        if base.scheme() != "https" && sha256.is_none() && key.is_none() {
            return Err(DownloadError::Clear);
        }
        Ok(Self { version: version.to_owned(), base, sha256, key, bytes_max: RUNNER_BYTES_MAX })
    }

    /// Fetches the runner into a file below `directory`, which exists, and its helper image if that is wanted. A release
    /// without a helper image that can be believed is one line of `progress`, no failure: jobs then fetch their own.
    ///
    /// # Errors
    /// [`DownloadError`]; then nothing is left.
    ///
    /// # Cancel safety
    /// Dropping the future removes what has come.
    pub async fn fetch(
        &self,
        open: &dyn OpenTransport,
        directory: &Path,
        with_helper: bool,
        progress: &mut super::Progress<'_>,
    ) -> Result<Downloaded, DownloadError> {
        let endpoint = Endpoint {
            url: self.base.clone(),
            tls_ca_file: None,
            tls_client: None,
            allow_insecure_http: self.base.scheme() == "http",
        };
        let transport = open
            .open(&endpoint)
            .map_err(|source| DownloadError::Open { base: self.base.to_string(), source: source.into() })?;
        let transport = &*transport;
        let is_listed = self.base.scheme() == "https" || self.key.is_some();
        let list = match &self.sha256 {
            // A digest for the runner says nothing of the helper image.
            Some(_) if !(with_helper && is_listed) => None,
            _ => Some(self.list(transport, progress).await?),
        };
        let (runner, helper) = (runner_of_host(), helper_of_host());
        let listed = |file: &str| list.as_deref().and_then(|list| find(list, file));
        let expected = self.sha256.clone().or_else(|| listed(&runner));
        let expected = expected.ok_or_else(|| DownloadError::Unlisted {
            url: self.url(&self.path("release.sha256")),
            file: runner.clone(),
        })?;
        let mut files = Vec::new();
        let path = self.believed(transport, directory, ("runner", &runner, &expected), &mut files, progress).await?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .map_err(|error| Box::new(file_error("open up", &path)(error)))?;
        let runner = RunnerSource { path, origin: RunnerOrigin::Download };
        let helper = match (with_helper, listed(&helper)) {
            (false, _) => None,
            (true, Some(digest)) => {
                let what = ("helper image", helper.as_str(), digest.as_str());
                Some(HelperSource { path: self.believed(transport, directory, what, &mut files, progress).await? })
            }
            (true, None) => {
                progress(&format!(
                    "helper image: no list that can be believed names {helper}; without --helper-image each job's runner \
                     fetches its own"
                ));
                None
            }
        };
        Ok(Downloaded { runner, helper, _files: files })
    }

    /// One file of the release, kept in `files` and believed by its digest.
    async fn believed(
        &self,
        transport: &dyn Transport,
        directory: &Path,
        (what, file, expected): (&str, &str, &str),
        files: &mut Vec<TempPath>,
        progress: &mut super::Progress<'_>,
    ) -> Result<PathBuf, DownloadError> {
        let path = self.path(file);
        let url = self.url(&path);
        progress(&format!("{what}: {url}"));
        let body = get(transport, &url, &path).await?;
        let (kept, found) = keep(body, directory, &url, self.bytes_max).await?;
        if found != expected {
            return Err(DownloadError::Mismatch { url, expected: expected.to_owned(), found });
        }
        let is_given = self.sha256.as_deref() == Some(expected);
        progress(&format!("{what}: SHA-256 {found} is as {}", if is_given { "given" } else { "published" }));
        let path = kept.to_path_buf();
        files.push(kept);
        Ok(path)
    }

    fn path(&self, file: &str) -> String {
        format!("/v{}/{file}", self.version)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base.as_str().trim_end_matches('/'))
    }

    /// The release's list of digests; signed, if a key was given.
    async fn list(
        &self,
        transport: &dyn Transport,
        progress: &mut super::Progress<'_>,
    ) -> Result<String, DownloadError> {
        let list = self.small(transport, "release.sha256").await?;
        if let Some(key) = &self.key {
            let signature = self.small(transport, "release.sha256.asc").await?;
            let verified = signature::verify(key, &list, &signature).await;
            let url = self.url(&self.path("release.sha256"));
            verified.map_err(|source| DownloadError::Unsigned { url: url.clone(), source })?;
            progress(&format!("{url}: signed with the key {}", key.display()));
        }
        Ok(String::from_utf8_lossy(&list).into_owned())
    }

    /// A file of the release that is read whole.
    async fn small(&self, transport: &dyn Transport, file: &str) -> Result<Vec<u8>, DownloadError> {
        let path = self.path(file);
        let url = self.url(&path);
        let mut body = get(transport, &url, &path).await?;
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| broke_off(&url, bytes.len() as u64, &*error))?;
            bytes.extend_from_slice(frame.data_ref().map(AsRef::as_ref).unwrap_or_default());
            if bytes.len() > LIST_BYTES_MAX {
                let why = format!("more than {LIST_BYTES_MAX} bytes, which is no list of digests");
                return Err(DownloadError::Answer { url, why });
            }
        }
        Ok(bytes)
    }
}

/// The release's file for this kind of host.
fn runner_of_host() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("binaries/gitlab-runner-linux-{arch}")
}

/// The file system of the helper image, likewise.
fn helper_of_host() -> String {
    let arch = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        other => other,
    };
    format!("helper-images/prebuilt-{arch}.tar.xz")
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The digest of `folder/file`, as `sha256sum` writes it: digest, blank, `*` or blank, name, with its folder or without.
fn find(list: &str, file: &str) -> Option<String> {
    list.lines().find_map(|line| {
        let (digest, name) = line.trim().split_once(char::is_whitespace)?;
        let name = name.trim_start().trim_start_matches('*').trim_start_matches("./");
        let is_it = name == file || file.rsplit_once('/').is_some_and(|(_, last)| last == name);
        (is_it && is_digest(digest)).then(|| digest.to_ascii_lowercase())
    })
}

/// The body of a file that is there.
async fn get(transport: &dyn Transport, url: &str, path: &str) -> Result<Body, DownloadError> {
    let answer = |why: String| DownloadError::Answer { url: url.to_owned(), why };
    let request = Request::get(path).header("user-agent", concat!("dayfly/", env!("CARGO_PKG_VERSION")));
    let request = request.body(full("")).map_err(|error| answer(chain(&error)))?;
    let call = Call { request, connection: Connection::Own, head_timeout: HEAD_TIMEOUT, total_timeout: TOTAL_TIMEOUT };
    let response: Response<Body> =
        transport.call(call).await.map_err(|source| DownloadError::Transport { url: url.to_owned(), source })?;
    match response.status() {
        StatusCode::OK if readers::is_page(response.headers()) => Err(answer(
            "a page for people, perhaps a proxy's login page; give the address of a mirror by --runner-download-url"
                .into(),
        )),
        StatusCode::OK => Ok(response.into_body()),
        StatusCode::NOT_FOUND | StatusCode::FORBIDDEN => Err(answer(format!(
            "status {}: there is no such release there; see https://gitlab.com/gitlab-org/gitlab-runner/-/releases",
            response.status().as_u16()
        ))),
        _ => Err(match readers::error("a download", response, &Secret::new("")).await {
            GitlabError::Unexpected { status, message, .. } => answer(format!("status {status}: {message}")),
            GitlabError::RateLimited { retry_after } => {
                answer(format!("status 429: it limits requests; try again in {} s", retry_after.as_secs()))
            }
            GitlabError::Unavailable { status: Some(status), .. } => {
                answer(format!("status {status}: it is down or overloaded; try again"))
            }
            other => answer(chain(&other)),
        }),
    }
}

/// Writes a body down, and says what it was.
async fn keep(
    mut body: Body,
    directory: &Path,
    url: &str,
    bytes_max: u64,
) -> Result<(TempPath, String), DownloadError> {
    let failed = |error: io::Error| DownloadError::File(Box::new(file_error("write", directory)(error)));
    let mut file = tempfile::Builder::new().prefix(".runner-").tempfile_in(directory).map_err(failed)?;
    let (mut digest, mut bytes) = (Sha256::new(), 0_u64);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broke_off(url, bytes, &*error))?;
        let Ok(data) = frame.into_data() else { continue };
        bytes += data.len() as u64;
        if bytes > bytes_max {
            let why = format!("more than {} MiB, which is no gitlab-runner", bytes_max >> 20);
            return Err(DownloadError::Answer { url: url.to_owned(), why });
        }
        digest.update(&data);
        // Off the runtime's threads: a disk may take its time.
        file = write(file, data).await.map_err(failed)?;
    }
    let file = tokio::task::spawn_blocking(move || {
        file.as_file().sync_all()?;
        Ok::<_, io::Error>(file.into_temp_path())
    });
    let file = file.await.map_err(io::Error::other).and_then(|synced| synced).map_err(failed)?;
    Ok((file, hex(&digest.finalize())))
}

async fn write(mut file: NamedTempFile, data: bytes::Bytes) -> io::Result<NamedTempFile> {
    let written = tokio::task::spawn_blocking(move || file.write_all(&data).map(|()| file));
    written.await.map_err(io::Error::other)?
}

fn broke_off(url: &str, bytes: u64, error: &(dyn std::error::Error + 'static)) -> DownloadError {
    DownloadError::Answer { url: url.to_owned(), why: format!("it broke off after {bytes} bytes: {}", chain(error)) }
}

/// Speaks to places as to GitLab: the host's roots, its proxies. A body that stands still is given up.
#[must_use]
pub fn opener() -> Arc<dyn OpenTransport> {
    let limits = RealLimits { connect: CONNECT_TIMEOUT, read_idle: HEAD_TIMEOUT, ..RealLimits::default() };
    Arc::new(RealOpenTransport::new(limits, ProxyEnvironment::of_process()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(url: &str) -> Url {
        url.parse().unwrap()
    }

    #[test]
    fn a_release_is_named_by_its_version_and_nothing_else() {
        let new =
            |version: &str| Release::new(version, base(RUNNER_DOWNLOADS), None, None).map(|release| release.version);
        assert_eq!(new("19.3.0").unwrap(), "19.3.0");
        assert_eq!(new("v17.5.0").unwrap(), "17.5.0");
        for bad in ["latest", "19.3", "19.3.0/../x", "19.3.0-rc1", "", "1..2", "19.3.0.1"] {
            assert!(matches!(new(bad), Err(DownloadError::Version(_))), "{bad}");
        }
    }

    #[test]
    fn clear_text_needs_a_digest_from_elsewhere() {
        let digest = "AB".repeat(32);
        assert!(matches!(Release::new("19.3.0", base("http://mirror.example"), None, None), Err(DownloadError::Clear)));
        let release = Release::new("19.3.0", base("http://mirror.example"), Some(&digest), None).unwrap();
        assert_eq!(release.sha256, Some("ab".repeat(32)));
        Release::new("19.3.0", base("http://mirror.example"), None, Some("/k".into())).unwrap();
        let short = Release::new("19.3.0", base(RUNNER_DOWNLOADS), Some("ab"), None);
        assert!(matches!(short, Err(DownloadError::Digest(_))));
    }

    #[test]
    fn a_digest_is_found_by_the_whole_name() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let list = format!(
            "{b} *binaries/gitlab-runner-linux-amd64-fips\n{b}  deb/gitlab-runner-linux-amd64\nnonsense\n{a} *binaries/gitlab-runner-linux-amd64\n"
        );
        assert_eq!(find(&list, "binaries/gitlab-runner-linux-amd64"), Some(a.clone()));
        assert_eq!(find(&format!("{a}  ./binaries/x\n"), "binaries/x"), Some(a.clone()));
        assert_eq!(find(&format!("{a}  x\n"), "binaries/x"), Some(a.clone()));
        assert_eq!(find(&format!("{a}  binaries/x\n"), "helper-images/x"), None);
        assert_eq!(find("abc  x\n", "binaries/x"), None);
    }
}
