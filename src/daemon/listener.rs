//! The status listener beside the daemon: opened, exchanged at a reload, closed.
//!
//! A place that cannot be had costs no job: the log and the status say so, and all else goes on.

use crate::control::ControlHandler;
use crate::gitlab::OpenTransport;
use crate::telemetry::chain;
use crate::web::{self, Address, ListenError, Listening, Settings, SettingsError};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What is served now.
pub(super) struct Listener {
    handler: Arc<dyn ControlHandler>,
    /// To the fleet's other daemons.
    transport: Arc<dyn OpenTransport>,
    /// Where; `None`: it could not be opened.
    address: Option<Address>,
    /// By what it goes.
    settings: watch::Sender<Arc<Settings>>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// Why it is not served as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unserved {
    /// Its address.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A file that its section names.
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

/// What is to be served in its place.
pub(super) struct Next {
    settings: Settings,
    /// At another address, or nowhere; `None`: at the same.
    moves: Option<(Address, Option<Listening>)>,
}

impl Listener {
    /// Opens it as this configuration says.
    pub(super) async fn open(
        handler: Arc<dyn ControlHandler>,
        transport: Arc<dyn OpenTransport>,
        (config, runtime_directory): (&web::Config, &Path),
    ) -> Self {
        let mut listener = Self {
            handler,
            transport,
            address: None,
            settings: watch::Sender::new(Arc::new(Settings::closed())),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
        };
        match listener.prepare(config, runtime_directory).await {
            Ok(next) => listener.exchange(next).await,
            Err(error) => {
                let why = chain(&error);
                tracing::error!(error = why, "status and metrics are not served; jobs are run all the same");
                listener.handler.status_is_not_served(Some(why));
            }
        }
        listener
    }

    /// Opens what a new configuration wants, beside what is served; dropping it changes nothing.
    pub(super) async fn prepare(&self, config: &web::Config, runtime_directory: &Path) -> Result<Next, Unserved> {
        let address = config.address(runtime_directory);
        let settings = Settings::read(config, &address, &self.transport).await?;
        if self.address.as_ref() == Some(&address) {
            return Ok(Next { settings, moves: None });
        }
        let listening = web::listen(&address).await?;
        Ok(Next { settings, moves: Some((address, listening)) })
    }

    /// Serves that from now on.
    pub(super) async fn exchange(&mut self, next: Next) {
        let Next { settings, moves } = next;
        let Some((address, listening)) = moves else {
            // Requests that are under way are judged by those of before.
            self.settings.send_replace(Arc::new(settings));
            return;
        };
        self.close().await;
        self.settings.send_replace(Arc::new(settings));
        self.handler.status_is_not_served(None);
        self.stop = CancellationToken::new();
        if let Some(listening) = listening {
            tracing::info!(address = %listening.address(), "status and metrics are served");
            let settings = self.settings.subscribe();
            self.tasks.spawn(web::serve(listening, self.handler.clone(), settings, self.stop.clone()));
        }
        self.address = Some(address);
    }

    /// Ends it.
    pub(super) async fn close(&mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BoxFuture;
    use crate::cache::Caches;
    use crate::control::{KillOutcome, Opened, ShellWish};
    use crate::gitlab::JobId;
    use crate::history::{End, Suggestion};
    use crate::metrics::Form;
    use crate::shell::ShellOutcome;
    use crate::status::{ConsoleFound, JobFound, Reports, StatusReport};
    use std::path::PathBuf;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Fake(Mutex<Option<String>>);

    impl Reports for Fake {
        fn status(&self) -> StatusReport {
            StatusReport::default()
        }
        fn metrics(&self, _form: Form) -> String {
            String::new()
        }
        fn ended(&self, _jobs_max: usize) -> Vec<End> {
            Vec::new()
        }
        fn job<'a>(&'a self, _id: JobId, _runner: Option<&'a str>) -> BoxFuture<'a, JobFound> {
            Box::pin(async { JobFound::Unknown })
        }
        fn console_log<'a>(&'a self, _id: JobId, _runner: Option<&'a str>) -> BoxFuture<'a, ConsoleFound> {
            Box::pin(async { ConsoleFound::Unknown })
        }
        fn console<'a>(&'a self, _: JobId, _: Option<&'a str>, _: Option<u64>) -> BoxFuture<'a, ConsoleFound> {
            Box::pin(async { ConsoleFound::Unknown })
        }
    }

    impl ControlHandler for Fake {
        fn drain(&self) -> Vec<JobId> {
            Vec::new()
        }
        fn shell<'a>(&'a self, _wish: ShellWish<'a>) -> BoxFuture<'a, Opened> {
            Box::pin(async { Opened::No(ShellOutcome::Unknown) })
        }
        fn kill(&self, _job: JobId, _runner: Option<&str>, _reason: Option<String>) -> KillOutcome {
            KillOutcome::Unknown
        }
        fn caches(&self) -> Option<Caches> {
            None
        }
        fn suggest<'a>(&'a self, _: &'a str, _: u32) -> BoxFuture<'a, Suggestion> {
            Box::pin(async { Suggestion::default() })
        }
        fn status_is_not_served(&self, why: Option<String>) {
            *self.0.lock().unwrap() = why;
        }
    }

    fn at(address: Address) -> web::Config {
        web::Config { listen: Some(address), ..web::Config::default() }
    }

    fn transport() -> Arc<dyn OpenTransport> {
        Arc::new(crate::gitlab::RealOpenTransport::default())
    }

    fn is_served(path: &PathBuf) -> bool {
        std::os::unix::net::UnixStream::connect(path).is_ok()
    }

    /// A reload moves it; what cannot be opened leaves it where it was.
    #[tokio::test]
    async fn a_reload_moves_the_listener_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        let fake = Arc::new(Fake::default());
        let mut listener = Listener::open(fake, transport(), (&at(Address::Unix(first.clone())), dir.path())).await;
        assert!(is_served(&first));
        let next = listener.prepare(&at(Address::Unix(first.clone())), dir.path()).await.unwrap();
        assert!(next.moves.is_none());
        listener.exchange(next).await;
        assert!(listener.prepare(&at(Address::Unix("/nonexistent/s".into())), dir.path()).await.is_err());
        let no_token = web::Config { token_file: Some(dir.path().join("none")), ..at(Address::Unix(first.clone())) };
        let error = listener.prepare(&no_token, dir.path()).await.err().unwrap();
        assert!(chain(&error).contains("`status.token_file`"), "{}", chain(&error));
        assert!(is_served(&first));
        let next = listener.prepare(&at(Address::Unix(second.clone())), dir.path()).await.unwrap();
        assert!(is_served(&first), "until the rest of the configuration is in force");
        listener.exchange(next).await;
        assert!(is_served(&second) && !first.exists());
        let next = listener.prepare(&at(Address::Off), dir.path()).await.unwrap();
        listener.exchange(next).await;
        assert!(!second.exists());
        listener.close().await;
    }

    /// U19: a place that cannot be had is a problem, and not the end; a reload may mend it.
    #[tokio::test]
    async fn a_place_that_cannot_be_had_is_a_problem_until_a_reload_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let nowhere = at(Address::Unix("/nonexistent/s".into()));
        let mut listener = Listener::open(fake.clone(), transport(), (&nowhere, dir.path())).await;
        assert!(fake.0.lock().unwrap().as_deref().is_some_and(|why| why.contains("`/nonexistent/s`")));
        let next = listener.prepare(&at(Address::Unix(dir.path().join("s"))), dir.path()).await.unwrap();
        listener.exchange(next).await;
        assert_eq!(*fake.0.lock().unwrap(), None);
        listener.close().await;
    }
}
