//! The repository behind a state directory's GitLab, which grows while jobs of it run.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Bytes of each commit's one file, which do not compress.
const COMMIT_BYTES: usize = 20_000;

/// What a job fetches of it.
pub(crate) const REFSPEC: &str = "+refs/heads/main:refs/remotes/origin/main";

/// A bare repository with one branch.
pub(crate) struct Repository {
    path: PathBuf,
    /// Its last commit.
    sha: String,
    commits: u32,
}

impl Repository {
    /// Makes one with a commit.
    pub(crate) fn make(path: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&path)?;
        git(&path, &["init", "--quiet", "--bare", "--initial-branch=main"], "".as_bytes())?;
        let mut repository = Self { path, sha: String::new(), commits: 0 };
        repository.push()?;
        Ok(repository)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn sha(&self) -> &str {
        &self.sha
    }

    /// One commit more.
    pub(crate) fn push(&mut self) -> io::Result<()> {
        self.commits += 1;
        let bytes = dayfly_test_tools::killing::artifact(self.commits.into(), COMMIT_BYTES);
        let mut commands = format!(
            "commit refs/heads/main\nmark :1\ncommitter t <t@t.invalid> {} +0000\ndata 2\nm\n",
            1_700_000_000 + self.commits
        );
        if !self.sha.is_empty() {
            commands.push_str(&format!("from {}\n", self.sha));
        }
        commands.push_str(&format!("M 100644 inline f{}\ndata {COMMIT_BYTES}\n", self.commits % 20));
        let mut commands = commands.into_bytes();
        commands.extend_from_slice(&bytes);
        commands.extend_from_slice(b"\nget-mark :1\n");
        self.sha = git(&self.path, &["fast-import", "--quiet"], &commands)?;
        Ok(())
    }
}

/// What git says to this input, without white space at its ends.
#[expect(clippy::disallowed_methods, reason = "a tool's own git, which ends within milliseconds")]
fn git(directory: &Path, arguments: &[&str], input: &[u8]) -> io::Result<String> {
    let mut command = Command::new("git");
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").current_dir(directory);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let written = child.stdin.take().map(|mut stdin| stdin.write_all(input));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("git {arguments:?} ended with {}", output.status)));
    }
    written.transpose()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
