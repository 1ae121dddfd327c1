//! The real workshop: git, confined, and the images of disks.
//!
//! What a fetch brings is GitLab's, but a project's author has made it. So git runs without hooks, without any
//! configuration but the one given here, without a home and without a terminal; it checks every object; it speaks HTTPS
//! (HTTP where GitLab's own URL says so) to the host of that URL and follows no redirect; the token is in its environment,
//! never among its arguments, and only for that host. It has a process group of its own, a deadline, and limits on what it
//! may write, open and compute (threats.md T40).

use super::image;
use super::meta::{Disk, Pack};
use super::repository::is_object;
use super::workshop::{Built, Contents, Fetch, FetchError, Held, Workshop};
use crate::BoxFuture;
use crate::image::stamp::Stamp;
use crate::process::{ProcessError, Program};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// What is done without a network: minutes only where packs are large.
const LOCAL_DEADLINE: Duration = Duration::from_secs(600);

/// Making an empty repository, and reading its refs.
const SHORT_DEADLINE: Duration = Duration::from_secs(30);

/// Refs that are read of a mirror, and told to guests.
const TIPS_MAX: u32 = 256;

/// Bytes of memory of one git: a pack is mapped by parts, and one delta is undone at a time.
const MEMORY_BYTES: u64 = 4 << 30;

/// Bytes that what only rearranges may write into one file.
const REARRANGED_BYTES_MAX: u64 = 1 << 40;

/// Variables of ours that say how the world is reached.
const PROXY: [&str; 8] =
    ["http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"];

/// Old repositories have objects with these faults, which harm nobody; GitLab's own server takes them, too.
const HARMLESS: [&str; 3] = ["badTimezone", "missingSpaceBeforeDate", "zeroPaddedFilemode"];

/// The host's own git and disk.
#[derive(Clone, Debug, Default)]
pub struct RealWorkshop {
    /// Images that were read, or made, and what they were then.
    known: Arc<Mutex<BTreeMap<PathBuf, (Stamp, String)>>>,
}

/// One git, its configuration in its environment.
struct Git {
    program: Program,
    settings: Vec<(String, String)>,
}

impl Git {
    fn new(mirror: &Path, deadline: Duration, bytes_max: u64) -> Self {
        let limits = [
            "--core=0".to_owned(),
            "--nofile=1024".to_owned(),
            format!("--fsize={bytes_max}"),
            format!("--as={MEMORY_BYTES}"),
            format!("--cpu={}", deadline.as_secs().saturating_mul(2).max(10)),
        ];
        let program = Program::new("prlimit", deadline)
            .args(limits)
            .args(["--", "git"])
            .directory(Path::new("/"))
            .env("GIT_DIR", mirror)
            .env("HOME", "/nonexistent")
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_ATTR_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "/bin/false")
            .env("GIT_NO_REPLACE_OBJECTS", "1")
            // Nothing is fetched unless it is asked for, and then over this.
            .env("GIT_ALLOW_PROTOCOL", "");
        let settings = [
            ("core.hooksPath", "/dev/null"),
            ("core.fsmonitor", "false"),
            ("core.bigFileThreshold", "64m"),
            ("core.packedGitLimit", "512m"),
            ("pack.threads", "2"),
            ("pack.windowMemory", "256m"),
            ("pack.writeReverseIndex", "false"),
            ("repack.writeBitmaps", "false"),
            ("gc.auto", "0"),
            ("maintenance.auto", "false"),
            ("fetch.unpackLimit", "1"),
            ("fetch.writeCommitGraph", "false"),
            ("fetch.fsckObjects", "true"),
            ("transfer.fsckObjects", "true"),
            ("credential.helper", ""),
            ("http.followRedirects", "false"),
            ("http.cookieFile", ""),
            ("http.sslVerify", "true"),
            ("http.lowSpeedLimit", "1000"),
            ("http.lowSpeedTime", "30"),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
        Self { program, settings }
    }

    fn set(mut self, key: &str, value: impl Into<String>) -> Self {
        self.settings.push((key.to_owned(), value.into()));
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.program = self.program.env(name, value);
        self
    }

    fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.program = self.program.args(arguments);
        self
    }

    async fn run(self) -> Result<String, ProcessError> {
        let mut program = self.program.env("GIT_CONFIG_COUNT", self.settings.len().to_string());
        for (n, (key, value)) in self.settings.iter().enumerate() {
            program = program.env(format!("GIT_CONFIG_KEY_{n}"), key).env(format!("GIT_CONFIG_VALUE_{n}"), value);
        }
        Ok(program.run().await?.text())
    }
}

/// The git of one fetch. Nothing of it is a secret but its environment.
fn fetching(mirror: &Path, fetch: &Fetch) -> Git {
    // Whatever GitLab's URL is, nothing else: by others git would start programs.
    let protocol = match fetch.url.scheme() {
        "https" => "https",
        "http" => "http",
        _ => "",
    };
    let mut git = Git::new(mirror, fetch.deadline, fetch.bytes_max)
        .env("GIT_ALLOW_PROTOCOL", protocol)
        .set("http.userAgent", concat!("dayfly/", env!("CARGO_PKG_VERSION"), " (git)"));
    // For this repository only: no other URL would get it.
    let credentials = STANDARD.encode(format!("gitlab-ci-token:{}", fetch.token.expose()));
    git = git.set(&format!("http.{}.extraHeader", fetch.url), format!("Authorization: Basic {credentials}"));
    for fault in HARMLESS {
        git = git.set(&format!("fetch.fsck.{fault}"), "ignore");
    }
    if let Some(file) = &fetch.ca_file {
        git = git.set("http.sslCAInfo", file.to_string_lossy());
    }
    if let Some((cert, key)) = &fetch.client {
        git = git.set("http.sslCert", cert.to_string_lossy()).set("http.sslKey", key.to_string_lossy());
    }
    for name in PROXY {
        if let Ok(value) = std::env::var(name) {
            git = git.env(name, &value);
        }
    }
    let options = [
        "fetch",
        "--quiet",
        "--force",
        "--no-tags",
        "--no-write-fetch-head",
        "--no-auto-maintenance",
        "--no-recurse-submodules",
        "--no-show-forced-updates",
        "--",
        fetch.url.as_str(),
    ];
    git.args(options.into_iter().chain(fetch.refspecs.iter().map(String::as_str)))
}

/// What its end means. What git has said is for the operator's eyes; the token is in none of it, and struck out all the same.
fn why(error: ProcessError, fetch: &Fetch) -> FetchError {
    let text = crate::telemetry::chain(&error).to_string();
    let text: String = text.replace(fetch.token.expose(), "[redacted]").chars().take(600).collect();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match error {
        ProcessError::Deadline { .. } => FetchError::Late,
        // What is said of SIGXFSZ by who waits for the one that it has killed; or the error of one that ignores it.
        _ if says(&["signal 25", "File too large", "SIGXFSZ"]) => FetchError::TooLarge,
        _ if says(&["No space left on device"]) => FetchError::Io(io::Error::from(io::ErrorKind::StorageFull)),
        _ if says(&[
            "Authentication failed",
            "error: 401",
            "error: 403",
            "error: 404",
            "not found",
            "could not read Username",
            "couldn't find remote ref",
            "remote error",
        ]) =>
        {
            FetchError::Refused(text)
        }
        _ => FetchError::Failed(text),
    }
}

/// An error of what only concerns the mirror.
fn local(error: ProcessError) -> FetchError {
    FetchError::Failed(crate::telemetry::chain(&error).to_string())
}

impl RealWorkshop {
    async fn make(mirror: &Path, id_chars: usize) -> Result<(), FetchError> {
        if tokio::fs::try_exists(mirror.join("HEAD")).await? {
            return Ok(());
        }
        let directory = mirror.to_owned();
        let make = move || std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        tokio::task::spawn_blocking(make).await.map_err(io::Error::other)??;
        let format = if id_chars == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        let init = Git::new(mirror, SHORT_DEADLINE, MEMORY_BYTES);
        init.args(["init", "--quiet", "--bare", "--template=", "--initial-branch=none", format])
            .run()
            .await
            .map_err(local)?;
        Ok(())
    }

    async fn held(mirror: &Path) -> Result<Held, FetchError> {
        let (packs, _) = packs(mirror.join("objects/pack")).await?;
        let count = format!("--count={TIPS_MAX}");
        let listed = Git::new(mirror, SHORT_DEADLINE, MEMORY_BYTES)
            .args(["for-each-ref", "--sort=-creatordate", "--format=%(objectname)", &count, "refs/dayfly"])
            .run()
            .await
            .map_err(local)?;
        let mut tips: Vec<String> = Vec::new();
        for tip in listed.lines().filter(|tip| is_object(tip)) {
            if !tips.iter().any(|known| known == tip) {
                tips.push(tip.to_owned());
            }
        }
        Ok(Held { packs, tips })
    }

    fn remember(&self, image: &Path, sha256: &str) {
        let Ok(stamp) = Stamp::of([image.to_owned()]) else { return };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|path, _| path.exists());
        known.insert(image.to_owned(), (stamp, sha256.to_owned()));
    }
}

/// The packs of a repository that have an index. What a fetch that was cut has left is removed; bytes of the largest file of
/// that.
async fn packs(directory: PathBuf) -> io::Result<(Vec<Pack>, u64)> {
    let list = move || {
        let (mut packs, mut cut) = (Vec::new(), 0);
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("tmp_") {
                cut = entry.metadata()?.len().max(cut);
                std::fs::remove_file(entry.path())?;
                continue;
            }
            let Some(name) = name.strip_suffix(".pack").filter(|name| Pack::is_name(name)) else { continue };
            let index = std::fs::metadata(directory.join(format!("{name}.idx")));
            if let Ok(index) = index {
                let bytes = entry.metadata()?.len();
                packs.push(Pack { name: name.to_owned(), bytes, index_bytes: index.len(), sha256: None });
            }
        }
        packs.sort();
        Ok((packs, cut))
    };
    tokio::task::spawn_blocking(list).await.map_err(io::Error::other)?
}

impl Workshop for RealWorkshop {
    fn make_directory<'a>(&'a self, directory: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(image::make_directory(directory))
    }

    fn fetch<'a>(&'a self, mirror: &'a Path, fetch: &'a Fetch) -> BoxFuture<'a, Result<Held, FetchError>> {
        Box::pin(async move {
            Self::make(mirror, fetch.id_chars).await?;
            if let Err(error) = fetching(mirror, fetch).run().await {
                // So that what was cut takes no room. Git does not say that it was cut at its limit.
                let (_, cut) = packs(mirror.join("objects/pack")).await?;
                return Err(if cut >= fetch.bytes_max { FetchError::TooLarge } else { why(error, fetch) });
            }
            Self::held(mirror).await
        })
    }

    fn tidy<'a>(&'a self, mirror: &'a Path) -> BoxFuture<'a, Result<Held, FetchError>> {
        Box::pin(async move {
            let git = Git::new(mirror, LOCAL_DEADLINE, REARRANGED_BYTES_MAX);
            git.args(["repack", "--quiet", "--geometric=2", "-d"]).run().await.map_err(local)?;
            Self::held(mirror).await
        })
    }

    fn build<'a>(
        &'a self,
        mirror: &'a Path,
        contents: Contents<'a>,
        image: &'a Path,
    ) -> BoxFuture<'a, io::Result<Built>> {
        Box::pin(async move {
            let built = image::build(mirror, contents, image).await?;
            self.remember(image, &built.sha256);
            Ok(built)
        })
    }

    fn is_whole<'a>(&'a self, image: &'a Path, disk: &'a Disk) -> BoxFuture<'a, bool> {
        Box::pin(async move {
            if self.is_known_whole(image, disk) {
                return true;
            }
            let is_it =
                image::digest(image).await.is_ok_and(|(bytes, sha256)| bytes == disk.bytes && sha256 == disk.sha256);
            if is_it {
                self.remember(image, &disk.sha256);
            }
            is_it
        })
    }

    fn is_known_whole(&self, image: &Path, disk: &Disk) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((stamp, sha256)) = known.get(image) else { return false };
        *sha256 == disk.sha256 && Stamp::of([image.to_owned()]).is_ok_and(|now| now == *stamp)
    }

    fn make_slot<'a>(&'a self, slot: &'a Path, bytes: u64) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(image::make_slot(slot, bytes))
    }

    fn fill<'a>(
        &'a self,
        image: &'a Path,
        slot: &'a Path,
        over: watch::Receiver<bool>,
    ) -> BoxFuture<'a, io::Result<bool>> {
        Box::pin(image::fill(image, slot, over))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn fetch() -> Fetch {
        Fetch {
            url: "https://gitlab.example/group/project.git".parse().unwrap(),
            token: Secret::new("glcbt-64_secret"),
            refspecs: vec!["+refs/heads/main:refs/dayfly/0".into()],
            id_chars: 40,
            ca_file: Some("/etc/dayfly/ca.pem".into()),
            client: None,
            bytes_max: 1 << 30,
            deadline: Duration::from_secs(120),
        }
    }

    /// T40: the token is no argument, and no URL has it.
    #[test]
    fn the_token_is_in_the_environment_and_nowhere_else() {
        let git = fetching(Path::new("/mirror.git"), &fetch());
        let arguments = format!("{:?}", git.program);
        assert!(
            !arguments.contains("secret") && !arguments.contains(&STANDARD.encode("gitlab-ci-token:glcbt-64_secret"))
        );
        let headers: Vec<_> = git.settings.iter().filter(|(_, value)| value.starts_with("Authorization")).collect();
        assert_eq!(headers.len(), 1);
        assert_eq!(headers[0].0, "http.https://gitlab.example/group/project.git.extraHeader");
        assert!(arguments.contains("\"GIT_ALLOW_PROTOCOL\": \"https\""), "{arguments}");
        assert!(arguments.contains("--fsize=1073741824"), "{arguments}");
        let is_set = |key: &str, value: &str| git.settings.contains(&(key.to_owned(), value.to_owned()));
        assert!(is_set("http.followRedirects", "false") && is_set("fetch.fsckObjects", "true"));
        assert!(is_set("core.hooksPath", "/dev/null") && is_set("http.sslCAInfo", "/etc/dayfly/ca.pem"));
    }

    #[test]
    fn what_git_says_at_its_end_has_a_meaning() {
        use std::os::unix::process::ExitStatusExt as _;
        let of = |stderr: &str| {
            let status = std::process::ExitStatus::from_raw(128 << 8);
            why(ProcessError::Failed { program: "prlimit".into(), status, stderr: stderr.into() }, &fetch()).word()
        };
        for refused in [
            "fatal: Authentication failed for 'https://gitlab.example/group/project.git/'",
            "fatal: unable to access 'https://x/': The requested URL returned error: 403",
            "fatal: repository 'https://x/' not found",
            "fatal: couldn't find remote ref refs/pipelines/7",
        ] {
            assert_eq!(of(refused), "refused", "{refused}");
        }
        assert_eq!(of("error: index-pack died of signal 25"), "too_large");
        assert_eq!(of("fatal: write error: No space left on device"), "failed");
        assert_eq!(of("error: object 1234: missingEmail: invalid author/committer line"), "failed");
        let late = ProcessError::Deadline {
            program: "prlimit".into(),
            deadline: Duration::from_secs(1),
            stderr: String::new(),
        };
        assert_eq!(why(late, &fetch()).word(), "late");
        let status = std::process::ExitStatus::from_raw(1 << 8);
        let leaky = ProcessError::Failed { program: "git".into(), status, stderr: "glcbt-64_secret".into() };
        assert!(!why(leaky, &fetch()).to_string().contains("secret"));
    }
}
