//! The status listener beside the daemon: opened, exchanged at a reload, closed.
//!
//! A place that cannot be had costs no job: the log and the status say so, and all else goes on.

use crate::control::ControlHandler;
use crate::telemetry::chain;
use crate::web::{self, Address, ListenError, Listening};
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What is served now.
pub(super) struct Listener {
    handler: Arc<dyn ControlHandler>,
    /// Where; `None`: it could not be opened.
    address: Option<Address>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// What is to be served in its place.
pub(super) enum Next {
    /// The same.
    Stays,
    /// This, or nothing.
    Is(Address, Option<Listening>),
}

impl Listener {
    /// Opens it at `address`.
    pub(super) async fn open(handler: Arc<dyn ControlHandler>, address: &Address) -> Self {
        let mut listener = Self { handler, address: None, stop: CancellationToken::new(), tasks: JoinSet::new() };
        match listener.prepare(address).await {
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
    pub(super) async fn prepare(&self, address: &Address) -> Result<Next, ListenError> {
        if self.address.as_ref() == Some(address) {
            return Ok(Next::Stays);
        }
        Ok(Next::Is(address.clone(), web::listen(address).await?))
    }

    /// Serves that from now on.
    pub(super) async fn exchange(&mut self, next: Next) {
        let Next::Is(address, listening) = next else { return };
        self.close().await;
        self.handler.status_is_not_served(None);
        self.stop = CancellationToken::new();
        if let Some(listening) = listening {
            tracing::info!(address = %listening.address(), "status and metrics are served");
            self.tasks.spawn(web::serve(listening, self.handler.clone(), self.stop.clone()));
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
    use crate::control::KillOutcome;
    use crate::gitlab::JobId;
    use crate::history::End;
    use crate::metrics::Form;
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
        fn console<'a>(&'a self, _: JobId, _: Option<&'a str>, _: Option<u64>) -> BoxFuture<'a, ConsoleFound> {
            Box::pin(async { ConsoleFound::Unknown })
        }
    }

    impl ControlHandler for Fake {
        fn drain(&self) {}
        fn kill(&self, _job: JobId, _runner: Option<&str>, _reason: Option<String>) -> KillOutcome {
            KillOutcome::Unknown
        }
        fn status_is_not_served(&self, why: Option<String>) {
            *self.0.lock().unwrap() = why;
        }
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
        let mut listener = Listener::open(fake, &Address::Unix(first.clone())).await;
        assert!(is_served(&first));
        assert!(matches!(listener.prepare(&Address::Unix(first.clone())).await, Ok(Next::Stays)));
        assert!(listener.prepare(&Address::Unix("/nonexistent/s".into())).await.is_err());
        assert!(is_served(&first));
        let next = listener.prepare(&Address::Unix(second.clone())).await.unwrap();
        assert!(is_served(&first), "until the rest of the configuration is in force");
        listener.exchange(next).await;
        assert!(is_served(&second) && !first.exists());
        let next = listener.prepare(&Address::Off).await.unwrap();
        listener.exchange(next).await;
        assert!(!second.exists());
        listener.close().await;
    }

    /// U19: a place that cannot be had is a problem, and not the end; a reload may mend it.
    #[tokio::test]
    async fn a_place_that_cannot_be_had_is_a_problem_until_a_reload_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let mut listener = Listener::open(fake.clone(), &Address::Unix("/nonexistent/s".into())).await;
        assert!(fake.0.lock().unwrap().as_deref().is_some_and(|why| why.contains("`/nonexistent/s`")));
        let next = listener.prepare(&Address::Unix(dir.path().join("s"))).await.unwrap();
        listener.exchange(next).await;
        assert_eq!(*fake.0.lock().unwrap(), None);
        listener.close().await;
    }
}
