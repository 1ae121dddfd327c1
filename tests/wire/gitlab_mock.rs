//! A GitLab of somebody else's making: the crate `gitlab-runner-mock` (Collabora), which their runners are
//! tested against. It was written by other people from the same API, so it shares no mistake with our stand-in.
//!
//! The whole daemon with its real HTTP client, over loopback; guest and hypervisor are scripted.

use crate::support::world::World;
use dayfly::BoxFuture;
use dayfly::gitlab::transport::{OpenError, full};
use dayfly::gitlab::{
    Body, Call, Endpoint, OpenTransport, ProxyEnvironment, RealLimits, RealOpenTransport, Transport, TransportError,
};
use dayfly_doubles::fake::Timing;
use dayfly_doubles::images::{self, OneImage};
use gitlab_runner_mock::{GitlabRunnerMock, MockJob, MockJobState, MockJobStepName, MockJobStepWhen};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Longest wait, in real time; a job takes about a second.
const LIMIT: Duration = Duration::from_secs(60);

/// The way to the mock, and what it does not know: the check of a token at the start, which is answered here.
struct Verified(Arc<dyn OpenTransport>);

impl OpenTransport for Verified {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(Arc::new(VerifiedTransport(self.0.open(endpoint)?)))
    }
}

struct VerifiedTransport(Arc<dyn Transport>);

impl Transport for VerifiedTransport {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        if !call.request.uri().path().ends_with("/runners/verify") {
            return self.0.call(call);
        }
        let answer = http::Response::builder().header("Content-Type", "application/json");
        let body = full(r#"{"id":1,"token":"fakerunnertoken","token_expires_at":null}"#);
        Box::pin(std::future::ready(Ok(answer.body(body).unwrap())))
    }
}

/// A daemon whose GitLab is the mock.
async fn world(mock: &GitlabRunnerMock) -> World {
    let mut world = World::new(1);
    let real = RealOpenTransport::new(RealLimits::default(), ProxyEnvironment::default());
    world.transport = Some(Arc::new(Verified(Arc::new(real))));
    let at_once = Duration::ZERO;
    world.hypervisor.set_timing(Timing { boot: at_once, overlay: at_once, start: at_once, ..Timing::default() });
    // It gives jobs to runners only that say they know refspecs.
    let mut image = images::image();
    image.manifest.info = Some(r#"{"name":"gitlab-runner","version":"19.3.0","features":{"refspecs":true}}"#.into());
    world.images = Arc::new(OneImage::new(image));
    let runner = &mut world.config.runner[0];
    (runner.url, runner.allow_insecure_http) = (mock.uri(), true);
    std::fs::write(&runner.token_file, mock.runner_token()).unwrap();
    world
}

fn job(mock: &GitlabRunnerMock, script: &[&str]) -> MockJob {
    let mut builder = mock.job_builder("test".into());
    let script = script.iter().map(|line| (*line).to_owned()).collect();
    builder.add_step(MockJobStepName::Script, script, 3600, MockJobStepWhen::OnSuccess, false);
    let job = builder.build();
    mock.enqueue_job(job.clone());
    job
}

async fn until(world: &World, what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(LIMIT, wait).await.is_ok(), "{what} did not come\n{}", world.histories());
}

/// Success and failure, trace and artifact.
#[tokio::test]
async fn a_gitlab_of_somebody_else_gets_traces_artifacts_and_verdicts() {
    let mock = GitlabRunnerMock::start().await;
    let mut world = world(&mock).await;
    let good = job(&mock, &["print hello", "upload 1000", "print bye"]);
    let bad = job(&mock, &["print no", "exit 3"]);
    world.start().await.unwrap();
    until(&world, "the end of both jobs", || good.finished() && bad.finished()).await;
    assert_eq!((good.state(), bad.state()), (MockJobState::Success, MockJobState::Failed));
    let log = String::from_utf8(good.log()).unwrap();
    assert!(log.starts_with("20") && log.contains("dayfly_boot[collapsed=true]"), "{log}");
    assert!(
        log.ends_with("Running with gitlab-runner 19.3.0\nhello\nupload: Some(201)\nbye\nJob succeeded\n"),
        "{log}"
    );
    let uploaded: Vec<_> = good.uploaded_artifacts().collect();
    assert_eq!(uploaded.len(), 1);
    assert_eq!(uploaded[0].data.as_slice(), [b'x'; 1000]);
    assert!(String::from_utf8(bad.log()).unwrap().ends_with("\nno\n"));
    world.assert_clean().await;
}

/// Canceled in the middle: the guest hears of it, nothing is reported after that, and nothing is left.
#[tokio::test]
async fn a_gitlab_of_somebody_else_may_cancel() {
    let mock = GitlabRunnerMock::start().await;
    mock.set_update_interval(1);
    let mut world = world(&mock).await;
    world.config.limits.keepalive = dayfly::config::Span::from_secs(1);
    let canceled = job(&mock, &["print begun", "sleep 600"]);
    world.start().await.unwrap();
    let begun = || String::from_utf8_lossy(&canceled.log()).ends_with("begun\n");
    until(&world, "the first line", begun).await;
    canceled.cancel();
    let idle = timeout(LIMIT, world.until_idle()).await;
    assert!(idle.is_ok(), "{}", world.histories());
    assert_eq!(canceled.state(), MockJobState::Cancelled);
    assert!(begun(), "{}", String::from_utf8_lossy(&canceled.log()));
    world.assert_clean().await;
}
