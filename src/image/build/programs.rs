//! The programs that go into an image: the runner, from wherever it can be had, and our own two.

use super::BuildError;
use crate::files::plain;
use crate::image::manifest::{ImageRunner, RunnerOrigin};
use crate::image::store::digest;
use crate::process::Program;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Environment variable that names a runner.
pub const RUNNER_VARIABLE: &str = "DAYFLY_GITLAB_RUNNER";

/// File name of the stand-in runner beside the dayfly executable. Its own, so that nobody takes it
/// for the official one.
pub const STANDIN_RUNNER: &str = "dayfly-standin-runner";

/// Where an installed dayfly has its guest programs.
const LIBRARY: &str = "/usr/lib/dayfly";

/// Where a host's gitlab-runner is, by the official packages and by GitLab's manual for binaries.
const HOST_RUNNERS: [&str; 2] = ["/usr/bin/gitlab-runner", "/usr/local/bin/gitlab-runner"];

/// `gitlab-runner --version` takes 0.1 s, 2 s on a cold disk.
const VERSION_DEADLINE: Duration = Duration::from_secs(30);

/// A runner that can be put into an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerSource {
    /// The program.
    pub path: PathBuf,
    /// Whose it is.
    pub origin: RunnerOrigin,
}

impl RunnerSource {
    /// The order of `vm-images/README.md`: the path given (by argument, else by [`RUNNER_VARIABLE`]), the host's, the
    /// stand-in beside the dayfly executable. Nothing is fetched unasked ([`super::Release`]).
    ///
    /// # Errors
    /// [`BuildError::NoRunner`]. A path that was given and is not there is an error, not passed over.
    pub fn find(given: Option<PathBuf>) -> Result<Self, BuildError> {
        let variable = std::env::var_os(RUNNER_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self::choose(given.or(variable), &HOST_RUNNERS.map(PathBuf::from), &beside_us(STANDIN_RUNNER))
    }

    fn choose(given: Option<PathBuf>, host: &[PathBuf], standin: &[PathBuf]) -> Result<Self, BuildError> {
        if let Some(path) = given {
            return Ok(Self { path, origin: RunnerOrigin::Path });
        }
        let existing = |paths: &[PathBuf]| paths.iter().find(|path| path.is_file()).cloned();
        if let Some(path) = existing(host) {
            return Ok(Self { path, origin: RunnerOrigin::Host });
        }
        let standin = existing(standin).ok_or(BuildError::NoRunner)?;
        Ok(Self { path: standin, origin: RunnerOrigin::Standin })
    }

    /// Runs it once for its version, and reads it for its digest.
    pub(super) async fn inspect(&self) -> Result<ImageRunner, BuildError> {
        let unfit = |why: &str| BuildError::Runner { path: self.path.clone(), why: why.to_owned() };
        if !self.path.is_file() {
            return Err(unfit("is no file"));
        }
        let output = Program::new(&self.path, VERSION_DEADLINE).arg("--version").env("HOME", "/").run().await?;
        let (version, revision) =
            version(&output.text()).ok_or_else(|| unfit("does not tell its version as gitlab-runner does"))?;
        let path = self.path.clone();
        let sha256 = tokio::task::spawn_blocking(move || digest(&path))
            .await
            .map_err(io::Error::other)
            .and_then(|digest| digest);
        let sha256 = sha256.map_err(|source| BuildError::File { what: "read", path: self.path.clone(), source })?;
        Ok(ImageRunner { version, revision, origin: self.origin, sha256 })
    }
}

/// Reads `Version:      19.3.0` and `Git revision: 9cbf0074`.
fn version(text: &str) -> Option<(String, Option<String>)> {
    let value = |key: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(key))?.trim();
        (!value.is_empty()).then(|| value.to_owned())
    };
    Some((value("Version:")?, value("Git revision:")))
}

/// Finds one of our own guest programs (`dayfly-guest`, `dayfly-init`): beside the dayfly executable,
/// or installed. Programs that are not linked statically are passed over: a build of the whole
/// workspace leaves such, and a guest that gets one says nothing at all.
///
/// # Errors
/// [`BuildError::GuestProgram`].
pub fn find_guest_program(name: &'static str) -> Result<PathBuf, BuildError> {
    let mut places = beside_us(name);
    places.push(Path::new(LIBRARY).join(name));
    places
        .iter()
        .find(|path| is_static(path).unwrap_or(false))
        .cloned()
        .ok_or(BuildError::GuestProgram { name, places })
}

fn beside_us(name: &str) -> Vec<PathBuf> {
    let ours = std::env::current_exe().ok().and_then(|path| fs::canonicalize(path).ok());
    ours.iter().filter_map(|path| path.parent()).map(|directory| directory.join(name)).collect()
}

/// Whether a file is a 64-bit ELF program that asks for no dynamic linker (no `PT_INTERP`, elf(5)).
pub(super) fn is_static(path: &Path) -> io::Result<bool> {
    // Program headers stand right behind the file header, in the first page.
    let mut head = Vec::new();
    plain::open_chosen(path)?.take(4096).read_to_end(&mut head)?;
    Ok(asks_for_no_linker(&head).unwrap_or(false))
}

fn asks_for_no_linker(head: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    if head.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let u16_at = |at: usize| Some(usize::from(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?)));
    let start = usize::try_from(u64::from_le_bytes(head.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (u16_at(54)?, u16_at(56)?);
    for index in 0..count {
        let at = start.checked_add(index.checked_mul(size)?)?;
        if u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?) == PT_INTERP {
            return Some(false);
        }
    }
    Some(count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: PathBuf) -> PathBuf {
        fs::write(&path, "").unwrap();
        path
    }

    #[test]
    fn the_runner_is_taken_from_the_first_place_that_has_one() {
        let dir = tempfile::tempdir().unwrap();
        let (host, standin) = (touch(dir.path().join("host")), touch(dir.path().join("standin")));
        let missing = dir.path().join("missing");
        let choose = |given: Option<&Path>, host: &Path, standin: &Path| {
            RunnerSource::choose(given.map(Path::to_owned), &[missing.clone(), host.to_owned()], &[standin.to_owned()])
                .map(|source| source.origin)
        };
        assert_eq!(choose(Some(&missing), &host, &standin).unwrap(), RunnerOrigin::Path);
        assert_eq!(choose(None, &host, &standin).unwrap(), RunnerOrigin::Host);
        assert_eq!(choose(None, &missing, &standin).unwrap(), RunnerOrigin::Standin);
        let error = choose(None, &missing, &missing).unwrap_err().to_string();
        assert!(error.contains("--runner") && error.contains(RUNNER_VARIABLE), "{error}");
    }

    #[tokio::test]
    async fn a_runner_tells_its_version_and_anything_else_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let inspect = |script: &str| {
            let path = dir.path().join("runner");
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            RunnerSource { path, origin: RunnerOrigin::Path }
        };
        let runner = inspect("printf 'Version:      17.5.0\\nGit revision: 12030cf4\\nGit branch:   x\\n'")
            .inspect()
            .await
            .unwrap();
        assert_eq!(
            (runner.version.as_str(), runner.revision.as_deref(), runner.sha256.len()),
            ("17.5.0", Some("12030cf4"), 64)
        );
        let error = inspect("echo 1.2.3").inspect().await.unwrap_err().to_string();
        assert!(error.ends_with("does not tell its version as gitlab-runner does"), "{error}");
        let gone = RunnerSource { path: "/no/such/runner".into(), origin: RunnerOrigin::Path };
        assert_eq!(gone.inspect().await.unwrap_err().to_string(), "use runner /no/such/runner: it is no file");
    }

    #[test]
    fn a_program_that_needs_a_linker_is_told_from_one_that_does_not() {
        let elf = |kinds: &[u32]| {
            let mut head = vec![0; 64];
            head[..6].copy_from_slice(b"\x7fELF\x02\x01");
            head[32] = 64;
            head[54] = 56;
            head[56] = u8::try_from(kinds.len()).unwrap();
            for kind in kinds {
                head.extend_from_slice(&kind.to_le_bytes());
                head.extend_from_slice(&[0; 52]);
            }
            head
        };
        assert_eq!(asks_for_no_linker(&elf(&[6, 1, 2])), Some(true));
        assert_eq!(asks_for_no_linker(&elf(&[6, 3, 1])), Some(false));
        assert_eq!(asks_for_no_linker(&elf(&[6, 3])[..122]), None, "cut");
        assert_eq!(asks_for_no_linker(b"#!/bin/sh\n"), None);
        // This test itself is linked dynamically.
        assert!(!is_static(&std::env::current_exe().unwrap()).unwrap());
    }
}
