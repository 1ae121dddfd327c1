//! From the queue to the final report.

use super::*;
use std::time::Duration;
use tokio::time::Instant;

#[tokio::test(start_paused = true)]
async fn a_job_goes_from_the_queue_to_success_once() {
    let lab = Lab::new();
    assert_eq!(lab.poll(None).await.status, 204);
    let (id, token) = lab.running_job(JobSpec::script(["make"])).await;
    assert_eq!(lab.poll(None).await.status, 204, "the same job is not given twice");
    let reply = lab.put(id, json!({ "token": token, "state": "running" })).await;
    assert_eq!((reply.status, reply.header("job-status")), (200, Some("running")));
    let reply = lab.put(id, json!({ "token": token, "state": "success" })).await;
    assert_eq!(
        (reply.status, reply.header("job-status"), &reply.body[..]),
        (200, Some("success"), b"\"200\"".as_slice())
    );
    let reply = lab.put(id, json!({ "token": token, "state": "failed" })).await;
    assert_eq!((reply.status, reply.header("job-status")), (403, Some("success")));
    let job = lab.gitlab.job(id).unwrap();
    assert_eq!((job.state, job.handed_out, job.verdicts), (JobState::Success, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_current_last_update_hides_even_a_waiting_job() {
    let lab = Lab::new();
    let _job = lab.gitlab.enqueue(lab.project, JobSpec::default());
    lab.gitlab.edit(|model| model.jobs.values_mut().for_each(|job| job.queued = false));
    let first = lab.poll(None).await;
    let value = first.header("x-gitlab-last-update").unwrap().to_owned();
    lab.gitlab.edit(|model| model.jobs.values_mut().for_each(|job| job.queued = true));
    assert_eq!(lab.poll(Some(&value)).await.status, 204);
    assert_eq!(lab.poll(Some("older")).await.status, 201);
}

#[tokio::test(start_paused = true)]
async fn a_long_poll_ends_with_204_when_the_queue_moves_and_the_job_comes_next() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.long_poll = Duration::from_secs(50));
    let value = lab.poll(None).await.header("x-gitlab-last-update").unwrap().to_owned();
    let start = Instant::now();
    let (held, ()) = tokio::join!(lab.poll(Some(&value)), async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        let _job = lab.gitlab.enqueue(lab.project, JobSpec::default());
    });
    assert_eq!((held.status, held.header("x-gitlab-last-update")), (204, None));
    assert_eq!(held.header("gitlab-ci-builds-polling"), Some("yes"));
    assert_eq!(start.elapsed().as_secs(), 20);
    assert_eq!(lab.poll(Some(&value)).await.status, 201);
    let value = lab.poll(None).await.header("x-gitlab-last-update").unwrap().to_owned();
    let start = Instant::now();
    assert_eq!(lab.poll(Some(&value)).await.status, 204);
    assert_eq!(start.elapsed().as_secs(), 50);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_cancel_needs_a_manager_that_can() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    lab.gitlab.cancel(id, true);
    let reply = lab.put(id, json!({ "token": token, "state": "running" })).await;
    assert_eq!((reply.status, reply.header("job-status")), (200, Some("canceling")));
    let reply = lab.put(id, json!({ "token": token, "state": "failed", "failure_reason": "script_failure" })).await;
    assert_eq!((reply.status, reply.header("job-status")), (200, Some("canceled")));

    let id = lab.gitlab.enqueue(lab.project, JobSpec::default());
    let body = json!({ "token": lab.gitlab.runner_token(lab.runner).unwrap().expose(), "system_id": "s_bbbbbbbbbbbb" });
    assert_eq!(lab.send_json("POST", "/api/v4/jobs/request", body).await.status, 201);
    lab.gitlab.cancel(id, true);
    assert_eq!(lab.state(id), (JobState::Canceled, None));
}

#[tokio::test(start_paused = true)]
async fn a_silent_job_is_dropped_after_an_hour() {
    let lab = Lab::new();
    let spec = JobSpec::default().with_timeout(Duration::from_secs(7200));
    let (id, _) = lab.running_job(spec).await;
    let start = Instant::now();
    let over = |model: &Model| model.jobs[&id].state.is_over();
    lab.gitlab.wait_for(over, Duration::from_secs(86_400)).await.unwrap();
    assert_eq!(lab.state(id), (JobState::Failed, Some("no_updates_running".into())));
    assert_eq!(start.elapsed().as_secs(), 3600);
}

#[tokio::test(start_paused = true)]
async fn a_job_token_dies_five_minutes_after_the_timeout() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default().with_timeout(Duration::from_secs(600))).await;
    tokio::time::sleep(Duration::from_secs(600 + 299)).await;
    assert_eq!(lab.put(id, json!({ "token": token, "state": "running" })).await.status, 200);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let reply = lab.put(id, json!({ "token": token, "state": "success" })).await;
    assert_eq!((reply.status, reply.header("job-status")), (403, Some("failed")));
    assert_eq!(lab.state(id), (JobState::Failed, Some("job_token_expired".into())));
}

#[tokio::test(start_paused = true)]
async fn unknown_reasons_are_mapped_and_exit_codes_clamped() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let body =
        json!({ "token": token, "state": "failed", "failure_reason": "image_pull_failure", "exit_code": 70_000 });
    assert_eq!(lab.put(id, body).await.status, 200);
    let job = lab.gitlab.job(id).unwrap();
    assert_eq!((job.failure_reason.as_deref(), job.exit_code), (Some("unknown_failure"), Some(32_767)));
}

#[tokio::test(start_paused = true)]
async fn a_two_phase_server_wants_running_within_two_minutes() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.two_phase = true);
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(lab.state(id).0, JobState::Pending);
    assert_eq!(lab.put(id, json!({ "token": token, "state": "failed" })).await.status, 400);
    assert_eq!(lab.put(id, json!({ "token": token, "state": "running" })).await.status, 200);
    assert_eq!(lab.state(id).0, JobState::Running);

    let (silent, _) = lab.running_job(JobSpec::default()).await;
    tokio::time::sleep(Duration::from_secs(121)).await;
    assert_eq!(lab.state(silent), (JobState::Failed, Some("runner_provisioning_timeout".into())));
}

#[tokio::test(start_paused = true)]
async fn a_given_payload_passes_byte_for_byte() {
    let lab = Lab::new();
    let raw = br#"{ "id": 42,  "token":"glcbt-x", "new": {"b":1,"a":18446744073709551616} }"#;
    let spec = JobSpec::raw(JobId(42), Secret::new("glcbt-x"), raw.as_slice());
    let _id = lab.gitlab.enqueue(lab.project, spec);
    let reply = lab.poll(None).await;
    assert_eq!((reply.status, &reply.body[..]), (201, raw.as_slice()));
}

#[tokio::test(start_paused = true)]
async fn tokens_of_the_wrong_kind_or_place_open_nothing() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let url = format!("/api/v4/jobs/{id}");
    let json_type = ("content-type", "application/json");
    for (headers, body, status) in [
        (vec![json_type, ("job-token", token.as_str())], json!({ "state": "success" }), 400),
        (vec![json_type, ("job-token", token.as_str())], json!({ "token": "no", "state": "success" }), 403),
        (vec![json_type], json!({ "token": "", "state": "success" }), 403),
    ] {
        assert_eq!(lab.send("PUT", &url, &headers, body.to_string()).await.status, status, "{body}");
    }
    // Two headers are one wrong one, and an underscore is a dash.
    let trace = format!("{url}/trace");
    let range = ("content-range", "0-0");
    let text = ("content-type", "text/plain");
    let both = [text, range, ("job-token", token.as_str()), ("job-token", "x")];
    assert_eq!(lab.send("PATCH", &trace, &both, "x").await.status, 403);
    let folded = [text, range, ("job_token", token.as_str())];
    assert_eq!(lab.send("PATCH", &trace, &folded, "x").await.status, 202);
    assert_eq!(lab.gitlab.job(id).unwrap().state, JobState::Running);
}
