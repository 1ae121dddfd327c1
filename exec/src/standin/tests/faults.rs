//! Planned faults, as the daemon's transport sees them.

use super::*;
use dayfly::gitlab::{Call, Connection, TransportError};
use std::time::Duration;
use tokio::time::Instant;

fn call(
    lab: &Lab,
    method: &str,
    path: &str,
    body: Value,
) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
    let request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    let request = request.body(full(body.to_string())).unwrap();
    let (head_timeout, total_timeout) = (Duration::from_secs(30), Duration::from_secs(60));
    lab.gitlab.transport().call(Call { request, connection: Connection::Shared, head_timeout, total_timeout })
}

#[tokio::test(start_paused = true)]
async fn a_dropped_answer_was_applied_and_a_dropped_request_was_not() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let (path, body) = (format!("/api/v4/jobs/{id}"), json!({ "token": token, "state": "success" }));
    lab.gitlab.script(Matcher::on(Route::UpdateJob), Fault::DropBeforeApply);
    assert!(matches!(call(&lab, "PUT", &path, body.clone()).await, Err(TransportError::Broken(_))));
    assert_eq!(lab.state(id).0, JobState::Running);
    lab.gitlab.script(Matcher::on(Route::UpdateJob), Fault::ApplyThenDrop);
    assert!(matches!(call(&lab, "PUT", &path, body.clone()).await, Err(TransportError::Broken(_))));
    assert_eq!(lab.state(id).0, JobState::Success);
    assert_eq!(call(&lab, "PUT", &path, body).await.unwrap().status(), 403);
}

#[tokio::test(start_paused = true)]
async fn rules_count_their_requests_and_delays_add_up() {
    let lab = Lab::new();
    lab.gitlab.script(Matcher::on(Route::RequestJob).after(1).times(2), Fault::status(503));
    lab.gitlab.script(Matcher::on(Route::RequestJob).always(), Fault::Delay(Duration::from_secs(5)));
    let start = Instant::now();
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(lab.poll(None).await.status);
    }
    assert_eq!(statuses, [204, 503, 503, 204]);
    // The delay is planned after the 503, which ends the list of a request that it meets.
    assert_eq!(start.elapsed().as_secs(), 10);
    let faulted: Vec<bool> = lab.gitlab.requests().iter().map(|request| request.faulted).collect();
    assert_eq!(faulted, [true; 4]);
}

#[tokio::test(start_paused = true)]
async fn silence_meets_the_callers_limits() {
    let lab = Lab::new();
    lab.gitlab.script(Matcher::any(), Fault::Silence);
    let start = Instant::now();
    let answer = call(&lab, "POST", "/api/v4/jobs/request", json!({})).await;
    assert!(matches!(answer, Err(TransportError::Timeout(_))));
    assert_eq!(start.elapsed().as_secs(), 30);
    let dribble = Fault::DribbleBody { piece: 1, every: Duration::from_secs(1) };
    lab.gitlab.script(Matcher::any(), dribble);
    let _job = lab.gitlab.enqueue(lab.project, JobSpec::default());
    let token = lab.gitlab.runner_token(lab.runner).unwrap();
    let answer = call(&lab, "POST", "/api/v4/jobs/request", json!({ "token": token.expose() })).await.unwrap();
    assert!(answer.into_body().collect().await.is_err());
    assert_eq!(start.elapsed().as_secs(), 90);
}

#[tokio::test(start_paused = true)]
async fn a_truncated_answer_breaks_off() {
    let lab = Lab::new();
    lab.gitlab.script(Matcher::any(), Fault::TruncateBody(10));
    let _job = lab.gitlab.enqueue(lab.project, JobSpec::default());
    let token = lab.gitlab.runner_token(lab.runner).unwrap();
    let answer = call(&lab, "POST", "/api/v4/jobs/request", json!({ "token": token.expose() })).await.unwrap();
    assert_eq!(answer.status(), 201);
    let mut body = answer.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 10);
    assert!(body.frame().await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_hook_sees_each_request_with_its_headers() {
    let lab = Lab::new();
    let refuse = |request: &Recorded| match request.headers.get("private-token") {
        Some(_) => vec![Fault::status(418)],
        None => Vec::new(),
    };
    lab.gitlab.hook(Arc::new(refuse));
    assert_eq!(lab.send("GET", "/x", &[("private-token", "p")], "").await.status, 418);
    assert_eq!(lab.send("GET", "/x", &[], "").await.status, 404);
    lab.gitlab.behave();
    assert_eq!(lab.send("GET", "/x", &[("private-token", "p")], "").await.status, 404);
    let shown = format!("{:?}", lab.gitlab.requests());
    assert!(shown.contains("GET /x") && !shown.contains("private"), "{shown}");
}
