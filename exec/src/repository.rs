//! Which commit does the job get, and where does its guest clone it from?
//!
//! HEAD of the repository around the pipeline file, copied into a bare repository in the work folder
//! that the stand-in serves by git's plain HTTP protocol (job token required). Only what HEAD reaches
//! is copied: no other branch, no stash, nothing uncommitted. Without a repository the job starts
//! in an empty directory.
//!
//! git runs with the developer's own configuration, and nothing of the repository's is started: it may be a stranger's,
//! unpacked from an archive with its `.git/config`. Hooks, fsmonitor and signature checks are switched off by name;
//! the filters that its configuration defines (`status` runs them on changed files) are found first and overridden;
//! no object is fetched that is not there (a partial clone names a program for that), and no transport but that of a
//! local path is allowed. Pagers, editors, external diffs and credential helpers have no part in what is asked here.

use dayfly::process::{ProcessError, Program};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Size of the copy at most (threats.md §6.5): the guest fetches all of it.
pub const REPOSITORY_BYTES_MAX: u64 = 1 << 30;
/// For a question to git: milliseconds, seconds on a cold disk. `status` of a large tree is slowest.
const QUESTION_DEADLINE: Duration = Duration::from_secs(60);
/// For the copy: 1 GiB is packed at 10 MiB/s or more.
const COPY_DEADLINE: Duration = Duration::from_secs(300);

/// Submodules that are named: enough to see what is meant.
const SUBMODULES_SHOWN_MAX: usize = 10;

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
    /// Submodules of HEAD whose URL is relative: `path (url)`. Their repositories are not served.
    pub relative_submodules: Vec<String>,
    /// How many files differ from HEAD or are unknown to git; `None`: too many to count.
    pub changes: Option<usize>,
}

/// What a repository's own configuration may name programs with; where a key takes a program, `false` is one that
/// does nothing.
const HARMLESS: &[&str] = &[
    "core.fsmonitor=false",
    "core.hooksPath=/dev/null",
    "core.sshCommand=false",
    "core.askPass=false",
    "core.editor=false",
    "core.pager=cat",
    "credential.helper=",
    "log.showSignature=false",
    "gpg.program=false",
    "gpg.openpgp.program=false",
    "gpg.x509.program=false",
    "gpg.ssh.program=false",
    "status.submoduleSummary=false",
    "submodule.recurse=false",
    "fetch.recurseSubmodules=false",
];

/// git as it may run in `directory`; what it needs to know of its user is there.
fn git(directory: &Path, deadline: Duration) -> Program {
    let mut program = Program::new("git", deadline);
    for name in ["HOME", "XDG_CONFIG_HOME"] {
        if let Some(value) = std::env::var_os(name) {
            program = program.env(name, value);
        }
    }
    program = program
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_OPTIONAL_LOCKS", "0")
        // An object that is not there is missing: fetching it starts a program of the remote's configuration.
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_ALLOW_PROTOCOL", "")
        .arg("-C")
        .arg(directory);
    for setting in HARMLESS {
        program = program.args(["-c", setting]);
    }
    program
}

/// Settings that make the filters of this repository's own configuration do nothing. The developer's own filters
/// (git-lfs) stay: they are not the repository's to choose.
async fn without_filters(top: &Path) -> Result<Vec<String>, ProcessError> {
    let listed =
        git(top, QUESTION_DEADLINE).args(["config", "--show-scope", "--name-only", "-z", "--list"]).run().await?;
    let mut parts = listed.stdout.split(|byte| *byte == 0);
    let mut settings = Vec::new();
    while let (Some(scope), Some(key)) = (parts.next(), parts.next()) {
        let key = String::from_utf8_lossy(key);
        let own = !matches!(scope, b"system" | b"global" | b"command");
        // The name may hold dots, and stands between the first and the last.
        let name = key.strip_prefix("filter.").and_then(|rest| rest.rsplit_once('.')).map(|(name, _)| name);
        if let Some(name) = name.filter(|_| own) {
            for (key, value) in [("clean", ""), ("smudge", ""), ("process", ""), ("required", "false")] {
                settings.push(format!("filter.{name}.{key}={value}"));
            }
        }
    }
    settings.sort();
    settings.dedup();
    Ok(settings)
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
        let submodules = ["config", "--blob", "HEAD:.gitmodules", "--get-regexp", r"^submodule\..*\.url$"];
        let submodules = ask_maybe(&top, &submodules).await.map_err(failed)?.unwrap_or_default();
        let mut status = git(&top, QUESTION_DEADLINE);
        for setting in without_filters(&top).await.map_err(failed)? {
            status = status.args(["-c", &setting]);
        }
        let changes = match status.args(["status", "--porcelain", "--ignore-submodules"]).run().await {
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
            relative_submodules: relative_submodules(&submodules),
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
        let place = target.parent().unwrap_or(Path::new("/"));
        let init = git(place, QUESTION_DEADLINE).args(["init", "--quiet", "--bare", "--template="]).arg(target);
        init.run().await.map_err(failed)?;
        // A fetch copies what HEAD reaches, and tags on the way; one pack, for each file is a
        // request of the guest's. No automatic gc: it would go on behind our back.
        let fetch = git(target, COPY_DEADLINE)
            .env("GIT_ALLOW_PROTOCOL", "file")
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

/// `path (url)` out of lines `submodule.PATH.url URL`, those whose URL leads from this repository's.
fn relative_submodules(lines: &str) -> Vec<String> {
    let parsed = lines.lines().filter_map(|line| line.strip_prefix("submodule.")?.split_once(".url "));
    let relative = parsed.filter(|(_, url)| url.starts_with("./") || url.starts_with("../"));
    relative.map(|(name, url)| format!("{name} ({url})")).take(SUBMODULES_SHOWN_MAX).collect()
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
            .env("GIT_ALLOW_PROTOCOL", "file")
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

    /// U35: a repository brings its configuration, attributes and hooks along, and none of its programs runs
    #[tokio::test]
    async fn a_repository_cannot_start_programs_of_its_own() {
        let dir = repository().await;
        let trap = dir.path().join("trap.sh");
        let sprung = dir.path().join("sprung");
        fs::write(&trap, format!("#!/bin/sh\necho \"$0 $*\" >> {}\ncat\n", sprung.display())).unwrap();
        fs::set_permissions(&trap, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let trap = trap.to_str().unwrap();
        let config = |key: &'static str, value: String| {
            let top = dir.path().to_owned();
            async move { run(&top, &["config", key, &value]).await }
        };
        // A commit that says that it is signed, so that its signature would be looked at.
        let commit = run(dir.path(), &["cat-file", "commit", "HEAD"]).await;
        let (head, message) = commit.split_once("\n\n").unwrap();
        let signature = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----";
        fs::write(dir.path().join("commit"), format!("{head}\n{signature}\n\n{message}\n")).unwrap();
        let signed = run(dir.path(), &["hash-object", "-t", "commit", "-w", "commit"]).await;
        run(dir.path(), &["reset", "--quiet", "--hard", &signed]).await;
        fs::write(dir.path().join(".git/info/attributes"), "* filter=trap.with.dots diff=trap\nb filter=two\n")
            .unwrap();
        for key in ["filter.trap.with.dots.clean", "filter.trap.with.dots.smudge", "filter.two.process"] {
            config(key, trap.into()).await;
        }
        config("filter.trap.with.dots.required", "true".into()).await;
        for key in [
            "core.fsmonitor",
            "core.pager",
            "core.editor",
            "core.sshCommand",
            "core.askPass",
            "core.gitProxy",
            "core.alternateRefsCommand",
            "diff.external",
            "diff.trap.textconv",
            "diff.trap.command",
            "gpg.program",
            "gpg.ssh.program",
            "credential.helper",
            "uploadpack.packObjectsHook",
            "remote.origin.uploadpack",
            "tar.tar.command",
        ] {
            config(key, trap.into()).await;
        }
        config("log.showSignature", "true".into()).await;
        for command in ["status", "log", "rev-parse", "fetch", "config", "describe"] {
            run(dir.path(), &["config", &format!("alias.{command}"), &format!("!{trap}")]).await;
        }
        for (key, value) in [
            ("remote.origin.url", "/nowhere"),
            ("remote.origin.promisor", "true"),
            ("extensions.partialClone", "origin"),
            ("core.repositoryFormatVersion", "1"),
            ("core.hooksPath", ".git/hooks"),
        ] {
            config(key, value.into()).await;
        }
        fs::create_dir_all(dir.path().join(".git/hooks")).unwrap();
        for hook in ["post-index-change", "reference-transaction", "pre-auto-gc", "post-checkout", "fsmonitor-watchman"]
        {
            fs::copy(dir.path().join("trap.sh"), dir.path().join(".git/hooks").join(hook)).unwrap();
        }
        let _ = fs::remove_file(&sprung);
        // Same content, other time: `status` must look into the file, through its filter.
        fs::write(dir.path().join("a"), "2").unwrap();

        let found = Repository::find(dir.path()).await.unwrap().unwrap();
        let work = tempfile::tempdir().unwrap();
        found.serve_from(&work.path().join("r.git"), REPOSITORY_BYTES_MAX).await.unwrap();
        assert_eq!(fs::read_to_string(&sprung).ok(), None);
        assert_eq!(found.sha, signed);

        // Neither does an object that is missing start anything: it is missing.
        for pack in ["rev-parse", "log"] {
            let answer = ask_maybe(dir.path(), &[pack, "0123456789012345678901234567890123456789^{commit}"]).await;
            assert_eq!(answer.unwrap(), None);
        }
        assert_eq!(fs::read_to_string(&sprung).ok(), None);
        // The trap works: without our care it is sprung.
        let careless = Program::new("git", QUESTION_DEADLINE).arg("-C").arg(dir.path()).args(["status", "--porcelain"]);
        let _ = careless.run().await;
        assert!(sprung.exists());
    }

    /// U35: submodules beside the repository are not served, and that is said before a job fails
    #[tokio::test]
    async fn submodules_with_relative_urls_are_named() {
        let dir = repository().await;
        assert_eq!(Repository::find(dir.path()).await.unwrap().unwrap().relative_submodules, Vec::<String>::new());
        let text = "[submodule \"lib/a.b\"]\n\tpath = lib\n\turl = ../lib.git\n[submodule \"other\"]\n\tpath = other\n\turl = https://x/y.git\n[submodule \"own\"]\n\tpath = own\n\turl = ./sub\n";
        fs::write(dir.path().join(".gitmodules"), text).unwrap();
        run(dir.path(), &["add", ".gitmodules"]).await;
        run(dir.path(), &["commit", "--quiet", "-m", "Modules"]).await;
        let found = Repository::find(dir.path()).await.unwrap().unwrap();
        assert_eq!(found.relative_submodules, ["lib/a.b (../lib.git)", "own (./sub)"]);
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
