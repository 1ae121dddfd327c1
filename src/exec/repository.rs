//! Which commit does the job get, and where does its guest clone it from?
//!
//! HEAD of the repository around the pipeline file, copied into a bare repository in the work folder
//! that the stand-in serves by git's plain HTTP protocol (job token required). Only what HEAD reaches
//! is copied: no other branch, no stash, nothing uncommitted. Without a repository the job starts
//! in an empty directory.
//!
//! git runs with the developer's own configuration, less what a repository could use to start
//! programs of its own (hooks, fsmonitor).

use crate::process::{ProcessError, Program};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Size of the copy at most (safety.md 6.5): the guest fetches all of it.
pub const REPOSITORY_BYTES_MAX: u64 = 1 << 30;
/// For a question to git: milliseconds, seconds on a cold disk. `status` of a large tree is slowest.
const QUESTION_DEADLINE: Duration = Duration::from_secs(60);
/// For the copy: 1 GiB is packed at 10 MiB/s or more.
const COPY_DEADLINE: Duration = Duration::from_secs(300);

/// Why HEAD cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// git.
    #[error("read the git repository of `{}`", directory.display())]
    Git {
        /// Where it ran.
        directory: PathBuf,
        /// Cause.
        #[source]
        source: ProcessError,
    },
    /// There is no commit yet.
    #[error("the git repository `{}` has no commit yet; commit what the job needs", .0.display())]
    NoCommit(PathBuf),
    /// Its history is cut.
    #[error("the git repository `{}` is a shallow clone, which cannot be served; run `git fetch --unshallow`", .0.display())]
    Shallow(PathBuf),
    /// Its ids are no SHA-1.
    #[error("the git repository `{}` uses {format} ids; exec serves sha1 only", directory.display())]
    Format {
        /// Its top.
        directory: PathBuf,
        /// The format.
        format: String,
    },
    /// The copy is too large.
    #[error("HEAD of `{}` takes {} MiB, more than the {} MiB that exec serves", directory.display(), bytes >> 20, bytes_max >> 20)]
    TooLarge {
        /// Its top.
        directory: PathBuf,
        /// Size of the copy.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// The copy cannot be looked at.
    #[error("measure `{}`", path.display())]
    Measure {
        /// The copy.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A repository and its HEAD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// Its top directory.
    pub top: PathBuf,
    /// HEAD, 40 hex digits.
    pub sha: String,
    /// The commit before, or zeroes.
    pub before_sha: String,
    /// The branch of HEAD; for a detached one a tag on it, else `detached`.
    pub ref_name: String,
    /// Whether that is a tag.
    pub is_tag: bool,
    /// The branch that `origin` calls its own, if known.
    pub default_branch: Option<String>,
    /// `group/name`, from the URL of `origin`; else `local/` and the directory's name.
    pub project_path: String,
    /// The commit's message.
    pub message: String,
    /// `Name <address>` of its author.
    pub author: String,
    /// Its time, RFC 3339.
    pub timestamp: String,
    /// How many files differ from HEAD or are unknown to git; `None`: too many to count.
    pub changes: Option<usize>,
}

/// What git may need to know of its user.
fn git(directory: &Path, deadline: Duration) -> Program {
    let mut program = Program::new("git", deadline);
    for name in ["HOME", "XDG_CONFIG_HOME"] {
        if let Some(value) = std::env::var_os(name) {
            program = program.env(name, value);
        }
    }
    program.env("GIT_TERMINAL_PROMPT", "0").env("GIT_OPTIONAL_LOCKS", "0").arg("-C").arg(directory).args([
        "-c",
        "core.fsmonitor=false",
        "-c",
        "core.hooksPath=/dev/null",
    ])
}

async fn ask(directory: &Path, arguments: &[&str]) -> Result<String, ProcessError> {
    Ok(git(directory, QUESTION_DEADLINE).args(arguments).run().await?.text())
}

/// An answer that may be "no": git says so by its exit code.
async fn ask_maybe(directory: &Path, arguments: &[&str]) -> Result<Option<String>, ProcessError> {
    match ask(directory, arguments).await {
        Ok(text) => Ok(Some(text).filter(|t| !t.is_empty())),
        Err(ProcessError::Failed { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Repository {
    /// The repository that `directory` is in. `None`: in none.
    ///
    /// # Errors
    /// [`RepositoryError`]: git is missing or refuses, there is no commit, the clone is shallow.
    pub async fn find(directory: &Path) -> Result<Option<Self>, RepositoryError> {
        let failed = |source| RepositoryError::Git { directory: directory.to_owned(), source };
        let top = match ask(directory, &["rev-parse", "--show-toplevel"]).await {
            Ok(top) => PathBuf::from(top),
            // Its only words for "there is none"; a repository of somebody else's is another refusal.
            Err(ProcessError::Failed { stderr, .. }) if stderr.contains("not a git repository") => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let ask = |arguments: &'static [&'static str]| {
            let top = &top;
            async move { ask_maybe(top, arguments).await.map_err(failed) }
        };
        let Some(sha) = ask(&["rev-parse", "--verify", "--quiet", "HEAD^{commit}"]).await? else {
            return Err(RepositoryError::NoCommit(top));
        };
        if ask(&["rev-parse", "--is-shallow-repository"]).await?.as_deref() == Some("true") {
            return Err(RepositoryError::Shallow(top));
        }
        let format = ask(&["rev-parse", "--show-object-format"]).await?.unwrap_or_else(|| "sha1".into());
        if format != "sha1" {
            return Err(RepositoryError::Format { directory: top, format });
        }
        let branch = ask(&["symbolic-ref", "--quiet", "--short", "HEAD"]).await?;
        let tag = match branch {
            Some(_) => None,
            None => ask(&["describe", "--tags", "--exact-match", "HEAD"]).await?,
        };
        let before = ask(&["rev-parse", "--verify", "--quiet", "HEAD~1^{commit}"]).await?;
        let origin = ask(&["config", "--get", "remote.origin.url"]).await?;
        let default_branch = ask(&["symbolic-ref", "--quiet", "--short", "refs/remotes/origin/HEAD"]).await?;
        let commit = ask(&["log", "-1", "--format=%an <%ae>%n%cI%n%B", "HEAD"]).await?.unwrap_or_default();
        let mut lines = commit.splitn(3, '\n');
        let changes =
            match git(&top, QUESTION_DEADLINE).args(["status", "--porcelain", "--ignore-submodules"]).run().await {
                Ok(output) => Some(output.text().lines().count()),
                Err(ProcessError::TooMuchOutput { .. }) => None,
                Err(error) => return Err(failed(error)),
            };
        Ok(Some(Self {
            project_path: project_path(origin.as_deref(), &top),
            before_sha: before.unwrap_or_else(|| "0".repeat(40)),
            is_tag: tag.is_some(),
            ref_name: branch.or(tag).unwrap_or_else(|| "detached".into()),
            default_branch: default_branch.and_then(|b| b.strip_prefix("origin/").map(str::to_owned)),
            author: lines.next().unwrap_or_default().to_owned(),
            timestamp: lines.next().unwrap_or_default().to_owned(),
            message: lines.next().unwrap_or_default().to_owned(),
            sha,
            changes,
            top,
        }))
    }

    /// The full name of the ref that the job is for.
    #[must_use]
    pub fn full_ref(&self) -> String {
        format!("refs/{}/{}", if self.is_tag { "tags" } else { "heads" }, self.ref_name)
    }

    /// Copies HEAD into a new bare repository at `target`, ready to be served as files.
    ///
    /// # Errors
    /// [`RepositoryError`]; `target` may exist half-made then.
    pub async fn serve_from(&self, target: &Path, bytes_max: u64) -> Result<(), RepositoryError> {
        let failed = |source| RepositoryError::Git { directory: self.top.clone(), source };
        let init = git(&self.top, QUESTION_DEADLINE).args(["init", "--quiet", "--bare", "--template="]).arg(target);
        init.run().await.map_err(failed)?;
        // A fetch copies what HEAD reaches, and tags on the way; one pack, for each file is a
        // request of the guest's. No automatic gc: it would go on behind our back.
        let fetch = git(target, COPY_DEADLINE)
            .args(["-c", "fetch.unpackLimit=1", "-c", "gc.auto=0", "-c", "maintenance.auto=false"])
            .args(["fetch", "--quiet", "--no-write-fetch-head"])
            .arg(&self.top)
            .arg(format!("+HEAD:{}", self.full_ref()));
        fetch.run().await.map_err(failed)?;
        let head = ["symbolic-ref", "HEAD", &self.full_ref()].map(str::to_owned);
        git(target, QUESTION_DEADLINE).args(head).run().await.map_err(failed)?;
        git(target, QUESTION_DEADLINE).arg("update-server-info").run().await.map_err(failed)?;
        let measured = target.to_owned();
        let bytes = tokio::task::spawn_blocking(move || directory_bytes(&measured)).await.map_err(io::Error::other);
        let bytes =
            bytes.and_then(|b| b).map_err(|source| RepositoryError::Measure { path: target.to_owned(), source })?;
        if bytes > bytes_max {
            return Err(RepositoryError::TooLarge { directory: self.top.clone(), bytes, bytes_max });
        }
        Ok(())
    }
}

fn directory_bytes(path: &Path) -> io::Result<u64> {
    let mut bytes: u64 = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let metadata = entry.path().symlink_metadata()?;
        bytes = bytes.saturating_add(if metadata.is_dir() { directory_bytes(&entry.path())? } else { metadata.len() });
    }
    Ok(bytes)
}

/// `group/name` out of `https://host/group/name.git` or `git@host:group/name.git`, with the letters
/// that GitLab allows.
pub(super) fn project_path(origin: Option<&str>, top: &Path) -> String {
    let path = origin.and_then(|url| match url.split_once("://") {
        Some((scheme, rest)) if scheme != "file" => rest.split_once('/').map(|(_, path)| path),
        Some(_) => None,
        None => url.split_once(':').filter(|(host, _)| !host.contains('/')).map(|(_, path)| path),
    });
    let path = path.map(|p| p.trim_matches('/')).map(|p| p.strip_suffix(".git").unwrap_or(p));
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let harmless = |p: &&str| {
        p.split('/').count() > 1
            && p.split('/').all(|s| s.chars().all(fits) && s.starts_with(|c: char| c != '.') && s != "..")
    };
    if let Some(path) = path.filter(harmless) {
        return path.to_owned();
    }
    let name = top.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().map(|c| if fits(c) { c } else { '-' }).collect();
    let name = name.trim_start_matches(['.', '-']);
    format!("local/{}", if name.is_empty() { "project" } else { name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    async fn run(directory: &Path, arguments: &[&str]) -> String {
        git(directory, QUESTION_DEADLINE)
            .env("HOME", "/nonexistent")
            .args([
                "-c",
                "user.name=A",
                "-c",
                "user.email=a@b",
                "-c",
                "init.defaultBranch=main",
                "-c",
                "commit.gpgSign=false",
            ])
            .args(arguments)
            .run()
            .await
            .unwrap()
            .text()
    }

    /// A repository with two commits on `main`, an unrelated branch, and changes.
    async fn repository() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        run(top, &["init", "--quiet", "."]).await;
        fs::write(top.join("a"), "1").unwrap();
        run(top, &["add", "."]).await;
        run(top, &["commit", "--quiet", "-m", "First"]).await;
        run(top, &["checkout", "--quiet", "-b", "secret"]).await;
        fs::write(top.join("secret"), "secret").unwrap();
        run(top, &["add", "."]).await;
        run(top, &["commit", "--quiet", "-m", "Secret"]).await;
        run(top, &["checkout", "--quiet", "main"]).await;
        fs::write(top.join("a"), "2").unwrap();
        run(top, &["commit", "--quiet", "-am", "Second\n\nwith more words"]).await;
        dir
    }

    #[tokio::test]
    async fn head_is_found_and_described() {
        let dir = repository().await;
        fs::write(dir.path().join("new"), "").unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let found = Repository::find(&dir.path().join("sub")).await.unwrap().unwrap();
        assert_eq!(found.top, dir.path().canonicalize().unwrap());
        assert_eq!(found.sha, run(dir.path(), &["rev-parse", "HEAD"]).await);
        assert_eq!(found.before_sha, run(dir.path(), &["rev-parse", "HEAD~1"]).await);
        assert_eq!((found.full_ref().as_str(), found.is_tag), ("refs/heads/main", false));
        assert_eq!((found.message.as_str(), found.author.as_str()), ("Second\n\nwith more words", "A <a@b>"));
        assert!(found.timestamp.contains('T') && found.project_path.starts_with("local/"), "{found:?}");
        assert_eq!(found.changes, Some(1), "the new file; an empty directory is none");

        run(dir.path(), &["checkout", "--quiet", "--detach"]).await;
        assert_eq!(Repository::find(dir.path()).await.unwrap().unwrap().full_ref(), "refs/heads/detached");
        run(dir.path(), &["tag", "v1"]).await;
        assert_eq!(Repository::find(dir.path()).await.unwrap().unwrap().full_ref(), "refs/tags/v1");
    }

    #[tokio::test]
    async fn the_copy_holds_what_head_reaches_and_can_be_served_as_files() {
        let dir = repository().await;
        let secret = run(dir.path(), &["rev-parse", "secret"]).await;
        fs::write(dir.path().join("a"), "uncommitted").unwrap();
        let found = Repository::find(dir.path()).await.unwrap().unwrap();
        let work = tempfile::tempdir().unwrap();
        let bare = work.path().join("repository.git");
        found.serve_from(&bare, REPOSITORY_BYTES_MAX).await.unwrap();
        let refs = fs::read_to_string(bare.join("info/refs")).unwrap();
        assert_eq!(refs, format!("{}\trefs/heads/main\n", found.sha));
        assert_eq!(fs::read_to_string(bare.join("HEAD")).unwrap(), "ref: refs/heads/main\n");
        assert!(fs::read_to_string(bare.join("objects/info/packs")).unwrap().starts_with("P pack-"));
        assert_eq!(run(&bare, &["show", "HEAD:a"]).await, "2");
        let has_secret = ask_maybe(&bare, &["cat-file", "-t", &secret]).await.unwrap();
        assert_eq!(has_secret, None, "other branches stay at home");

        let small = work.path().join("small.git");
        assert!(matches!(found.serve_from(&small, 100).await, Err(RepositoryError::TooLarge { bytes_max: 100, .. })));
    }

    #[tokio::test]
    async fn a_detached_head_can_be_served_too() {
        let dir = repository().await;
        run(dir.path(), &["checkout", "--quiet", "--detach", "HEAD~1"]).await;
        let found = Repository::find(dir.path()).await.unwrap().unwrap();
        let work = tempfile::tempdir().unwrap();
        let bare = work.path().join("r.git");
        found.serve_from(&bare, REPOSITORY_BYTES_MAX).await.unwrap();
        assert_eq!(
            fs::read_to_string(bare.join("info/refs")).unwrap(),
            format!("{}\trefs/heads/detached\n", found.sha)
        );
        assert_eq!(found.before_sha, "0".repeat(40));
    }

    #[tokio::test]
    async fn what_cannot_be_served_is_said_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Repository::find(dir.path()).await.unwrap(), None);
        run(dir.path(), &["init", "--quiet", "."]).await;
        assert!(matches!(Repository::find(dir.path()).await, Err(RepositoryError::NoCommit(_))));

        let full = repository().await;
        let url = format!("file://{}", full.path().display());
        run(dir.path(), &["clone", "--quiet", "--depth", "1", &url, "shallow"]).await;
        assert!(matches!(Repository::find(&dir.path().join("shallow")).await, Err(RepositoryError::Shallow(_))));
    }

    #[tokio::test]
    async fn a_repository_cannot_start_programs_of_its_own() {
        let dir = repository().await;
        let trap = dir.path().join("trap.sh");
        fs::write(&trap, format!("#!/bin/sh\ntouch {}/sprung\n", dir.path().display())).unwrap();
        fs::set_permissions(&trap, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        run(dir.path(), &["config", "core.fsmonitor", trap.to_str().unwrap()]).await;
        Repository::find(dir.path()).await.unwrap().unwrap();
        assert!(!dir.path().join("sprung").exists());
    }

    #[test]
    fn the_projects_path_comes_from_origin() {
        let check = |origin: Option<&str>, expected| {
            assert_eq!(project_path(origin, Path::new("/home/me/my project")), expected, "{origin:?}")
        };
        check(Some("https://gitlab.example/group/sub/name.git"), "group/sub/name");
        check(Some("https://user:secret@gitlab.example/group/name"), "group/name");
        check(Some("git@gitlab.example:group/name.git"), "group/name");
        check(Some("ssh://git@gitlab.example:22/group/name.git"), "group/name");
        for odd in [
            "file:///srv/git/name.git",
            "/srv/git/name.git",
            "../name",
            "https://h/../../etc/x",
            "https://h/one",
            "git@h:a b/c",
        ] {
            check(Some(odd), "local/my-project");
        }
        check(None, "local/my-project");
        assert_eq!(project_path(None, Path::new("/")), "local/project");
    }
}
