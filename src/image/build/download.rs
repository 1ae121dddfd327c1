//! The official runner, fetched: GitLab's release file over HTTPS, believed by its SHA-256 only.
//!
//! ```text
//! BASE/vVERSION/release.sha256 ─► digest (unless one was given)
//! BASE/vVERSION/binaries/gitlab-runner-linux-ARCH ─► a temporary file, 0600 ─► digest is right ─► 0755
//! ```
//!
//! What is not right leaves no file. No redirect is followed: what answers is what was named. The list of digests comes
//! from the same place as the file: it shows that the file is whole, and HTTPS shows whose both are; a digest that the
//! operator knows from elsewhere is worth more, and then an `http://` mirror will do.

use super::{RunnerSource, file_error};
use crate::gitlab::transport::{Body, OpenError, full};
use crate::gitlab::{
    Call, Connection, Endpoint, GitlabError, OpenTransport, ProxyEnvironment, RealLimits, RealOpenTransport, Transport,
    TransportError, readers,
};
use crate::image::manifest::RunnerOrigin;
use crate::secret::Secret;
use crate::telemetry::chain;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
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
    /// The digest that the file must have, hex; `None`: as the place's list says.
    pub sha256: Option<String>,
    /// Bytes of the file at most.
    pub bytes_max: u64,
}

/// A file that is gone when this is dropped.
#[derive(Debug)]
pub struct Downloaded {
    /// The runner.
    pub runner: RunnerSource,
    /// Keeps it.
    _file: TempPath,
}

/// Why there is no such runner.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// `--runner-download` names none.
    #[error("use `{0}` as a version of gitlab-runner: write it like 19.3.0")]
    Version(String),
    /// Nobody can have checked what comes.
    #[error("download over http:// without a digest: use https://, or give the file's SHA-256 by --runner-sha256")]
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
    pub fn new(version: &str, base: Url, sha256: Option<&str>) -> Result<Self, DownloadError> {
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
        if base.scheme() != "https" && sha256.is_none() {
            return Err(DownloadError::Clear);
        }
        Ok(Self { version: version.to_owned(), base, sha256, bytes_max: RUNNER_BYTES_MAX })
    }

    /// Fetches it into a file below `directory`, which exists.
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
        let file = file_of_host();
        let expected = match &self.sha256 {
            Some(digest) => digest.clone(),
            None => self.listed(&*transport, &file).await?,
        };
        let path = format!("/v{}/binaries/{file}", self.version);
        let url = self.url(&path);
        progress(&format!("runner: {url}"));
        let body = get(&*transport, &url, &path).await?;
        let (kept, found) = keep(body, directory, &url, self.bytes_max).await?;
        if found != expected {
            return Err(DownloadError::Mismatch { url, expected, found });
        }
        let path = kept.to_path_buf();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .map_err(|error| Box::new(file_error("open up", &path)(error)))?;
        progress(&format!(
            "runner: SHA-256 {found} is as {}",
            if self.sha256.is_some() { "given" } else { "published" }
        ));
        Ok(Downloaded { runner: RunnerSource { path, origin: RunnerOrigin::Download }, _file: kept })
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base.as_str().trim_end_matches('/'))
    }

    /// The file's digest, as the release's list has it.
    async fn listed(&self, transport: &dyn Transport, file: &str) -> Result<String, DownloadError> {
        let path = format!("/v{}/release.sha256", self.version);
        let url = self.url(&path);
        let mut body = get(transport, &url, &path).await?;
        let mut list = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| broke_off(&url, list.len() as u64, &*error))?;
            list.extend_from_slice(frame.data_ref().map(AsRef::as_ref).unwrap_or_default());
            if list.len() > LIST_BYTES_MAX {
                let why = format!("more than {LIST_BYTES_MAX} bytes, which is no list of digests");
                return Err(DownloadError::Answer { url, why });
            }
        }
        let list = String::from_utf8_lossy(&list);
        find(&list, file).ok_or_else(|| DownloadError::Unlisted { url, file: file.to_owned() })
    }
}

/// The release's file for this kind of host.
fn file_of_host() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("gitlab-runner-linux-{arch}")
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// As `sha256sum` writes it: digest, blank, `*` or blank, name.
fn find(list: &str, file: &str) -> Option<String> {
    list.lines().find_map(|line| {
        let (digest, name) = line.trim().split_once(char::is_whitespace)?;
        let name = name.trim_start().trim_start_matches('*').trim_start_matches("./");
        let is_it = name == file || name.strip_suffix(file).is_some_and(|before| before == "binaries/");
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
    let hex = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((file, hex))
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
        let new = |version: &str| Release::new(version, base(RUNNER_DOWNLOADS), None).map(|release| release.version);
        assert_eq!(new("19.3.0").unwrap(), "19.3.0");
        assert_eq!(new("v17.5.0").unwrap(), "17.5.0");
        for bad in ["latest", "19.3", "19.3.0/../x", "19.3.0-rc1", "", "1..2", "19.3.0.1"] {
            assert!(matches!(new(bad), Err(DownloadError::Version(_))), "{bad}");
        }
    }

    #[test]
    fn clear_text_needs_a_digest_from_elsewhere() {
        let digest = "AB".repeat(32);
        assert!(matches!(Release::new("19.3.0", base("http://mirror.example"), None), Err(DownloadError::Clear)));
        let release = Release::new("19.3.0", base("http://mirror.example"), Some(&digest)).unwrap();
        assert_eq!(release.sha256, Some("ab".repeat(32)));
        let short = Release::new("19.3.0", base(RUNNER_DOWNLOADS), Some("ab"));
        assert!(matches!(short, Err(DownloadError::Digest(_))));
    }

    #[test]
    fn a_digest_is_found_by_the_whole_name() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let list = format!(
            "{b} *binaries/gitlab-runner-linux-amd64-fips\n{b}  deb/gitlab-runner-linux-amd64\nnonsense\n{a} *binaries/gitlab-runner-linux-amd64\n"
        );
        assert_eq!(find(&list, "gitlab-runner-linux-amd64"), Some(a.clone()));
        assert_eq!(find(&format!("{a}  ./binaries/x\n"), "x"), Some(a.clone()));
        assert_eq!(find(&format!("{a}  x\n"), "x"), Some(a));
        assert_eq!(find("abc  x\n", "x"), None);
    }
}
