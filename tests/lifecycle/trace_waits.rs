//! A GitLab that takes a job's state and not its log.

use crate::support::world::{World, paused};
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::gitlab::transport::{Body, Call, OpenError, TransportError};
use dayfly::gitlab::{Endpoint, JobId, OpenTransport, Transport};
use dayfly_exec::standin::{Fault, JobState, Recorded, Route};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const TROUBLE: &[&str] =
    &["it will be sent again", "does not take this job's log", "too large for GitLab", "read the trace's spool"];

/// What GitLab does with the requests of a job, from its first PATCH with the guest's bytes on.
type Mood = fn(&Recorded, u64) -> Option<Fault>;

fn refuse_patches(request: &Recorded, _: u64) -> Option<Fault> {
    (request.route == Route::AppendTrace).then(|| Fault::status(500))
}

/// A world with one job, whose log meets `mood` from `begun` on.
async fn world_with(script: &[&str], mood: Mood) -> (World, JobId) {
    let mut world = World::new(1);
    world.expect_trouble(TROUBLE);
    let job = world.job(script);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    let count = AtomicU64::new(0);
    world.standin.hook(Arc::new(move |request| {
        if request.job != Some(job) {
            return Vec::new();
        }
        mood(request, count.fetch_add(1, Ordering::Relaxed)).into_iter().collect()
    }));
    (world, job)
}

const SCRIPT: &[&str] = &["print begun", "sleep 200", "print more", "sleep 10"];

/// U12: a log that is never taken holds the verdict for the configured time, and status and metric name it meanwhile.
#[tokio::test(start_paused = true)]
async fn a_log_that_gitlab_does_not_take_holds_the_verdict_for_fifteen_minutes_and_is_named() {
    let (world, job) = world_with(SCRIPT, refuse_patches).await;
    world.until_word("releasing").await;
    let since = Instant::now();
    sleep(Duration::from_secs(60)).await;
    let status = world.status();
    assert_eq!(status.jobs[0].phase, "its log waits: GitLab answered 500");
    assert_eq!(status.daemon.problems, ["1 jobs have a log or a verdict that GitLab does not take"]);
    world.until(job, JobState::Success).await;
    let took = since.elapsed().as_secs();
    assert!((890..1000).contains(&took), "{took} s");
    world.until_idle().await;
    assert!(world.status().daemon.problems.is_empty(), "{:?}", world.status().daemon.problems);
    assert!(world.hypervisor.vms().is_empty() && world.status().jobs.is_empty());
}

/// U12: every other way in which a log is not taken, or is asked for again for ever.
#[test]
fn no_way_in_which_a_log_is_not_taken_holds_the_verdict_longer() {
    let moods: [(&str, Mood); 5] = [
        ("413 whatever is sent", |request, _| (request.route == Route::AppendTrace).then(|| Fault::status(413))),
        ("404 and 500 in turn", |request, count| {
            (request.route == Route::AppendTrace).then(|| Fault::status(if count % 2 == 0 { 404 } else { 500 }))
        }),
        ("416 for ever", |request, _| {
            (request.route == Route::AppendTrace).then(|| Fault::status_with(416, &[("Range", "0-0")]))
        }),
        ("no answer", |request, _| (request.route == Route::AppendTrace).then_some(Fault::Silence)),
        ("cut", |request, _| (request.route == Route::AppendTrace).then_some(Fault::DropInBody(10))),
    ];
    for (name, mood) in moods {
        paused(async move {
            let (world, job) = world_with(SCRIPT, mood).await;
            world.until_word("releasing").await;
            let since = Instant::now();
            world.until(job, JobState::Success).await;
            let took = since.elapsed().as_secs();
            assert!((890..20 * 60).contains(&took), "{name}: {took} s");
            world.until_idle().await;
            assert!(world.hypervisor.vms().is_empty() && world.status().jobs.is_empty(), "{name}");
        });
    }
}

/// U12: while GitLab is away nothing is given up: the log is whole when it comes back.
#[tokio::test(start_paused = true)]
async fn an_outage_longer_than_that_costs_no_byte_of_the_log() {
    let (mut world, job) = world_with(SCRIPT, |_, _| Some(Fault::status(502))).await;
    world.until_word("releasing").await;
    sleep(Duration::from_secs(40 * 60)).await;
    assert_eq!(world.found(job).state, JobState::Running);
    world.standin.hook(Arc::new(|_| Vec::new()));
    world.until(job, JobState::Success).await;
    assert!(world.trace(job).contains("more\nJob succeeded\n"), "{}", world.trace(job));
    world.assert_clean().await;
}

/// Bytes of a PATCH, by its `Content-Range: FIRST-LAST`.
fn length(request: &Recorded) -> u64 {
    let range = request.headers.get("content-range").and_then(|range| range.to_str().ok()?.split_once('-'));
    let (first, last): (u64, u64) =
        range.map_or((0, 0), |(first, last)| (first.parse().unwrap(), last.parse().unwrap()));
    last - first + 1
}

/// U12: a proxy before GitLab that takes small bodies only.
#[tokio::test(start_paused = true)]
async fn pieces_that_are_too_large_are_sent_smaller() {
    let long = format!("print {}", "x".repeat(300_000));
    let (mut world, job) = world_with(&["print begun", "sleep 1", &long, "print last"], |request, _| {
        (request.route == Route::AppendTrace && length(request) > 10_000).then(|| Fault::status(413))
    })
    .await;
    let since = Instant::now();
    world.until(job, JobState::Success).await;
    assert!(since.elapsed() < Duration::from_secs(120), "{:?}", since.elapsed());
    let trace = world.trace(job);
    assert!(trace.matches('x').count() >= 300_000 && trace.contains("last\nJob succeeded\n"));
    world.assert_clean().await;
}

/// A GitLab that is never content with a log's checksum: it answers so to each report that has one.
struct NeverContent(Arc<dyn Transport>, StatusCode);

impl Transport for NeverContent {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response<Body>, TransportError>> {
        let (inner, status) = (self.0.clone(), self.1);
        Box::pin(async move {
            let (head, body) = call.request.into_parts();
            if head.method != Method::PUT {
                return inner.call(Call { request: Request::from_parts(head, body), ..call }).await;
            }
            let body = body.collect().await.unwrap().to_bytes();
            if String::from_utf8_lossy(&body).contains("crc32:") {
                let empty = Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync();
                return Ok(Response::builder().status(status).body(empty).unwrap());
            }
            let body = Full::new(body).map_err(|never| match never {}).boxed_unsync();
            inner.call(Call { request: Request::from_parts(head, body), ..call }).await
        })
    }
}

struct OpenNeverContent(Arc<dyn OpenTransport>, StatusCode);

impl OpenTransport for OpenNeverContent {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(Arc::new(NeverContent(self.0.open(endpoint)?, self.1)))
    }
}

/// U12: a checksum that never matches, a log that is stored for ever.
#[test]
fn a_gitlab_that_is_never_content_with_a_log_gets_the_verdict_without_its_checksum() {
    for status in [StatusCode::PRECONDITION_FAILED, StatusCode::ACCEPTED] {
        paused(async move {
            let mut world = World::new(1);
            world.expect_trouble(TROUBLE);
            world.transport = Some(Arc::new(OpenNeverContent(world.standin.opener(), status)));
            let job = world.job(SCRIPT);
            world.start().await.unwrap();
            world.until_word("releasing").await;
            let since = Instant::now();
            world.until(job, JobState::Success).await;
            assert!((890..1200).contains(&since.elapsed().as_secs()), "{status}: {:?}", since.elapsed());
            world.assert_clean().await;
        });
    }
}
