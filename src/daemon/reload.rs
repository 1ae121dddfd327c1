//! A new configuration while jobs run: all of it takes effect, or nothing (threats.md E10, T32).
//!
//! [`Reloads`] is the daemon's end of it, [`Reloader`] what SIGHUP and tests hold. What a job has been given when it
//! began stays with it to its end: limits, class, runner entry, GitLab. Everything made later follows the new one.
//! Runner entries that are gone are asked for no further job; what their last poll brings still runs.

use super::{Daemon, DaemonError, bounds, setup};
use crate::config::Config;
use crate::telemetry::chain;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Reloads that may wait: a second SIGHUP finds the newest file anyway.
const REQUESTS_MAX: usize = 1;

/// Why the configuration of before stays.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// What is made of this key cannot change under running jobs.
    #[error("change `{0}` without a restart, which costs no job; the configuration of before stays")]
    Fixed(&'static str),
    /// A part of the new configuration cannot be used.
    #[error("use the new configuration; that of before stays")]
    Unusable(#[from] DaemonError),
    /// The daemon is ending, or another reload is under way.
    #[error("reload now: the daemon is ending, or reloading already")]
    Busy,
}

/// A request and where its answer goes.
pub(super) type Request = (Box<Config>, oneshot::Sender<Result<(), ReloadError>>);

/// Hands a daemon new configurations. Clones reach the same one.
#[derive(Clone, Debug)]
pub struct Reloader(mpsc::Sender<Request>);

/// The daemon's end.
pub(super) struct Reloads(mpsc::Receiver<Request>);

/// Both ends.
pub(super) fn channel() -> (Reloader, Reloads) {
    let (sender, receiver) = mpsc::channel(REQUESTS_MAX);
    (Reloader(sender), Reloads(receiver))
}

impl Reloader {
    /// Makes this configuration the daemon's.
    ///
    /// # Errors
    /// [`ReloadError`]: nothing has changed.
    pub async fn reload(&self, config: Config) -> Result<(), ReloadError> {
        let (reply, answer) = oneshot::channel();
        self.0.try_send((Box::new(config), reply)).map_err(|_| ReloadError::Busy)?;
        answer.await.unwrap_or(Err(ReloadError::Busy))
    }
}

impl Reloads {
    /// The next request. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Request> {
        self.0.recv().await
    }
}

/// The first key that differs and must not.
fn fixed(old: &Config, new: &Config) -> Option<&'static str> {
    [
        ("state_directory", old.state_directory != new.state_directory),
        ("runtime_directory", old.runtime_directory != new.runtime_directory),
        ("image_directory", old.image_directory != new.image_directory),
        ("hypervisor", old.hypervisor != new.hypervisor),
        ("cache", old.cache != new.cache),
        ("clones", old.clones != new.clones),
        ("goldens", old.goldens != new.goldens),
        ("log", old.log != new.log),
        ("control", old.control != new.control),
    ]
    .into_iter()
    .find_map(|(key, differs)| differs.then_some(key))
}

impl Daemon {
    /// Everything that can fail comes first; then the swap, which cannot.
    pub(super) async fn reload(&mut self, config: Config) -> Result<(), ReloadError> {
        if let Some(key) = fixed(&self.wiring.config, &config) {
            return Err(ReloadError::Fixed(key));
        }
        let wiring = &self.wiring;
        let runners =
            setup::runners(&config, &wiring.backends, &wiring.installation, &self.parts.metrics, &self.runners).await?;
        let bounds = bounds(&config, wiring.memory_mib, wiring.disk_gib);

        wiring.disk_is_found.store(config.capacity.disk_gib.is_none(), Ordering::Relaxed);
        self.wiring.capacity.set_bounds(bounds);
        self.parts.supply.set_ports(config.network.guest_ports);
        self.parts.history.set_bounds(config.history.bounds());
        self.parts.consoles.set_bounds(config.history.console_bounds());
        self.parts.limits = Arc::new(config.limits.clone());
        self.wiring.config = config;
        // A poll that is under way comes to its end, and what it brings is run.
        std::mem::replace(&mut self.stop_polling, CancellationToken::new()).cancel();
        let views = self.wiring.poll(&runners, &self.parts, &self.stop_polling, &self.close_polls, &mut self.pollers);
        self.handler.set_runners(views);
        self.handler.set_image_max_age(self.wiring.config.image_max_age);
        self.handler.set_shells(&self.wiring.config);
        self.fresh.send_replace(runners.values().cloned().collect());
        // Former entries stay for the jobs that came from them.
        self.runners.extend(runners);
        Ok(())
    }

    /// Serves one request.
    pub(super) async fn serve_reload(&mut self, (config, reply): Request) {
        let result = self.reload(*config).await;
        match &result {
            Ok(()) => tracing::info!("the new configuration is in force"),
            Err(error) => tracing::error!(error = chain(error), "reload the configuration"),
        }
        // Who asked may have gone.
        let _ = reply.send(result);
    }
}
