//! The log, and the final report that waits for it.

use super::*;
use std::time::Duration;

#[tokio::test(start_paused = true)]
async fn the_log_grows_by_offset_only() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let reply = lab.patch(id, &token, 0, "one\n").await;
    assert_eq!((reply.status, reply.header("range"), reply.header("job-status")), (202, Some("0-4"), Some("running")));
    assert_eq!(reply.header("x-gitlab-trace-update-interval"), Some("60"));
    let reply = lab.patch(id, &token, 9, "x").await;
    assert_eq!((reply.status, reply.header("range"), reply.header("job-status")), (416, Some("0-4"), None));
    assert_eq!(lab.patch(id, &token, 4, "two\n").await.status, 202);
    assert_eq!(lab.patch(id, &token, 4, "two\n").await.status, 202, "the last piece again");
    assert_eq!(lab.patch(id, &token, 0, "one\n").await.status, 416, "an earlier piece again");
    assert_eq!(lab.gitlab.job(id).unwrap().trace.bytes, b"one\ntwo\n");
}

#[tokio::test(start_paused = true)]
async fn the_size_limit_comes_before_the_offset() {
    let lab = Lab::new();
    lab.gitlab.edit(|model| model.projects.get_mut(&lab.project).unwrap().trace_size_limit_mib = Some(1));
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let reply = lab.patch(id, &token, 1 << 20, "x").await;
    assert_eq!((reply.status, reply.header("job-status")), (403, None));
    assert_eq!(lab.state(id), (JobState::Failed, Some("trace_size_exceeded".into())));
}

#[tokio::test(start_paused = true)]
async fn a_final_report_with_a_checksum_waits_for_the_live_log() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.live_trace_persist_after = Persist::AfterReports(2));
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(lab.patch(id, &token, 0, "wxyz").await.status, 202);
    let report =
        json!({ "token": token, "state": "success", "output": { "checksum": "crc32:c363244c", "bytesize": 4 } });
    for _ in 0..2 {
        let reply = lab.put(id, report.clone()).await;
        assert_eq!((reply.status, reply.header("x-gitlab-trace-update-interval")), (202, Some("1")));
        assert_eq!(lab.state(id).0, JobState::Running);
    }
    assert_eq!(lab.put(id, report).await.status, 200);
    assert_eq!(lab.gitlab.read(|model| model.metrics.trace_invalid), 0);
}

#[tokio::test(start_paused = true)]
async fn gitlab_gives_up_on_a_log_after_five_minutes() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.live_trace_persist_after = Persist::Never);
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(lab.patch(id, &token, 0, "wxyz").await.status, 202);
    let report = json!({ "token": token, "state": "success", "checksum": "crc32:c363244c" });
    assert_eq!(lab.put(id, report.clone()).await.status, 202);
    tokio::time::sleep(Duration::from_secs(301)).await;
    assert_eq!(lab.put(id, report).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_checksum_is_counted_and_accepted() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(lab.patch(id, &token, 0, "wxyz").await.status, 202);
    let output = json!({ "checksum": "crc32:00000001", "bytesize": 3 });
    assert_eq!(lab.put(id, json!({ "token": token, "state": "success", "output": output })).await.status, 200);
    let metrics = lab.gitlab.read(|model| model.metrics);
    assert_eq!((metrics.trace_invalid, metrics.trace_corrupted), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_locked_log_takes_nothing() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    lab.gitlab.edit(|model| model.jobs.get_mut(&id).unwrap().trace.locked = true);
    let reply = lab.patch(id, &token, 0, "x").await;
    assert_eq!((reply.status, reply.json()), (409, json!({ "message": "409 Conflict: Resource lock" })));
}
