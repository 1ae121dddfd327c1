//! The real GitLab behind `register`: the token is verified under the installation's own system
//! id, so that GitLab shows one runner manager for it, the daemon's.

use super::explain;
use crate::config::{Config, Runner};
use crate::daemon::{Installation, endpoint};
use crate::files::{RealFiles, plain};
use crate::gitlab::{
    GitlabError, OpenTransport as _, ProxyEnvironment, RealLimits, RealOpenTransport, RunnerApi, RunnerToken, Verified,
};
use crate::rng::Rng;
use anyhow::Context as _;
use std::path::Path;

/// Asks the runner's GitLab whether it knows the token.
pub(super) async fn verify(config: &Config, runner: &Runner, token: RunnerToken) -> anyhow::Result<Verified> {
    let answer = ask(config, runner, token, async |api: &RunnerApi| api.verify(None).await).await?;
    answer.map_err(|error| explain(error, runner))
}

/// Asks the runner's GitLab under the installation's own system id; also before a daemon has ever run.
pub(in crate::cli) async fn ask<T>(
    config: &Config,
    runner: &Runner,
    token: RunnerToken,
    call: impl AsyncFnOnce(&RunnerApi) -> Result<T, GitlabError>,
) -> anyhow::Result<Result<T, GitlabError>> {
    let transport =
        RealOpenTransport::new(RealLimits::default(), ProxyEnvironment::of_process()).open(&endpoint(runner))?;
    let rng = Rng::system();
    let made = Made::before(&config.state_directory);
    let installation = Installation::open(&RealFiles, &config.state_directory, &rng)
        .await
        .context("find out who this installation is")?;
    let answer = call(&RunnerApi::new(transport, token, installation.system_id(), rng)).await;
    made.settle(answer.is_ok())?;
    Ok(answer)
}

/// What `register` makes before the daemon's first start: the installation's file, and maybe its
/// directory. They stay if the runner does, and belong to the daemon's user.
struct Made<'a> {
    state_directory: &'a Path,
    directory: bool,
    file: bool,
}

impl<'a> Made<'a> {
    fn before(state_directory: &'a Path) -> Self {
        Self {
            state_directory,
            directory: !state_directory.exists(),
            file: !state_directory.join("installation.json").exists(),
        }
    }

    fn settle(self, keep: bool) -> anyhow::Result<()> {
        let file = self.state_directory.join("installation.json");
        if !self.file {
            return Ok(());
        }
        if keep {
            let owner = std::fs::metadata(self.state_directory)?;
            let given = plain::open(&file).and_then(|file| super::entry::give(&file, &owner));
            return given.with_context(|| format!("give `{}` to the daemon's user", file.display()));
        }
        std::fs::remove_file(&file).with_context(|| format!("remove `{}`", file.display()))?;
        if self.directory {
            std::fs::remove_dir(self.state_directory)
                .with_context(|| format!("remove `{}`", self.state_directory.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Made;
    use std::fs;

    #[test]
    fn a_failure_takes_back_what_was_made_and_only_that() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let made = Made::before(&state);
        fs::create_dir(&state).unwrap();
        fs::write(state.join("installation.json"), "{}").unwrap();
        made.settle(false).unwrap();
        assert!(!state.exists());

        fs::create_dir(&state).unwrap();
        fs::write(state.join("installation.json"), "{}").unwrap();
        Made::before(&state).settle(false).unwrap();
        assert!(state.join("installation.json").exists());
    }

    #[test]
    fn a_success_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let made = Made::before(dir.path());
        fs::write(dir.path().join("installation.json"), "{}").unwrap();
        made.settle(true).unwrap();
        assert!(dir.path().join("installation.json").exists());
    }

    /// U29: in the daemon's own directory root gives away what it made, and not what the daemon's user put in its place.
    #[test]
    fn nothing_behind_a_link_is_given_away() {
        use std::os::unix::fs::{MetadataExt as _, chown, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (state, precious) = (dir.path().join("state"), dir.path().join("precious"));
        fs::create_dir(&state).unwrap();
        fs::write(&precious, "").unwrap();
        let made = Made::before(&state);
        // Only root can give anything away.
        if chown(&state, Some(65534), None).is_ok() {
            symlink(&precious, state.join("installation.json")).unwrap();
            assert!(made.settle(true).is_err());
            assert_eq!(fs::metadata(&precious).unwrap().uid(), 0);
        }
    }
}
