//! What use found otherwise than it is at GitLab; tests/facts-found-by-use.json says the same over HTTP.

use super::*;
use std::time::Duration;
use tokio::time::Instant;

/// Downloads the archive of `of` with this job token.
async fn download(lab: &Lab, of: JobId, token: &str) -> Reply {
    lab.send("GET", &format!("/api/v4/jobs/{of}/artifacts"), &[("job-token", token)], "").await
}

/// Uploads an archive, in a form of its own bytes.
async fn upload(lab: &Lab, id: JobId, token: &str) -> u16 {
    let headers = [("content-type", "multipart/form-data; boundary=x"), ("job-token", token)];
    let body = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.zip\"\r\n\r\nPK\r\n--x--\r\n";
    lab.send("POST", &format!("/api/v4/jobs/{id}/artifacts"), &headers, body).await.status
}

/// U42: the variables of a service come to the runner in the order of the pipeline file: later ones name earlier ones.
#[tokio::test(start_paused = true)]
async fn variables_of_a_service_keep_the_order_of_the_file() {
    let lab = Lab::new();
    let services = r#"[{"name": "postgres", "variables": {"ZONE": "eu", "USER": "app", "ALL": "$USER.$ZONE"}}]"#;
    let spec = JobSpec { services: serde_json::from_str(services).unwrap(), ..JobSpec::default() };
    let _id = lab.gitlab.enqueue(lab.project, spec);
    let payload = lab.poll(None).await.json();
    let variables = payload["services"][0]["variables"].as_array().unwrap();
    let keys: Vec<_> = variables.iter().map(|variable| variable["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["ZONE", "USER", "ALL"]);
}

/// U42: a poll that is held is answered 204 as soon as the runner's queue moves: the runner is paused, or a job of its
/// kind is queued that it cannot have.
#[tokio::test(start_paused = true)]
async fn a_held_poll_ends_with_whatever_moves_the_queue() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.long_poll = Duration::from_secs(50));
    let pause = |model: &mut Model| model.edit_runner(lab.runner, |runner| runner.paused = true);
    let queue = |model: &mut Model| {
        model.projects.get_mut(&lab.project).unwrap().builds_enabled = false;
        model.enqueue(lab.project, JobSpec::default(), lab.gitlab.now());
    };
    for change in [&pause as &dyn Fn(&mut Model), &queue] {
        let value = lab.poll(None).await.header("x-gitlab-last-update").unwrap().to_owned();
        let start = Instant::now();
        let (held, ()) = tokio::join!(lab.poll(Some(&value)), async {
            tokio::time::sleep(Duration::from_secs(20)).await;
            lab.gitlab.edit(change);
        });
        assert_eq!((held.status, start.elapsed().as_secs()), (204, 20));
    }
}

/// U42: an empty piece of log is a sign of life for a job that has been silent for a quarter of an hour.
#[tokio::test(start_paused = true)]
async fn an_empty_piece_keeps_a_silent_job_alive() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default().with_timeout(Duration::from_secs(7200))).await;
    assert_eq!(lab.patch(id, &token, 0, "line\n").await.status, 202);
    let before = lab.gitlab.job(id).unwrap().updated_at;
    tokio::time::sleep(Duration::from_secs(16 * 60)).await;
    assert_eq!(lab.patch(id, &token, 5, "").await.status, 202);
    let silent = lab.gitlab.job(id).unwrap().updated_at.duration_since(before);
    assert_eq!(silent.as_secs(), 16 * 60);
}

/// U42: without `expire_in` and without a default an artifact stays for ever; a download is said to be binary.
#[tokio::test(start_paused = true)]
async fn an_artifact_that_nobody_gives_an_end_stays() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.default_artifacts_expire_in = None);
    let (id, token) = lab.running_job(JobSpec::default().with_timeout(Duration::from_secs(86_400))).await;
    assert_eq!(upload(&lab, id, &token).await, 201);
    assert_eq!(lab.gitlab.job(id).unwrap().artifacts_expire_at, None);
    let reply = download(&lab, id, &token).await;
    assert_eq!((reply.status, reply.header("content-transfer-encoding")), (200, Some("binary")));
}

/// U42: another project's allow list that does not let jobs be read refuses by naming the permission.
#[tokio::test(start_paused = true)]
async fn an_entry_of_the_allow_list_without_the_permission_is_named() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(upload(&lab, id, &token).await, 201);
    let other = lab.gitlab.add_project("tools/downstream");
    lab.gitlab.edit(|model| {
        model.runners.get_mut(&lab.runner).unwrap().projects.insert(other);
        let project = model.projects.get_mut(&lab.project).unwrap();
        project.job_token_allowlist.insert("downstream".into());
        project.job_token_policies_enabled = true;
    });
    let _asking = lab.gitlab.enqueue(other, JobSpec::default());
    let asking = lab.poll(None).await.json()["token"].as_str().unwrap().to_owned();
    let reply = download(&lab, id, &asking).await;
    let message = "403 Forbidden - Insufficient permissions to access this resource in project lint. \
                   The following token permission is required: read_jobs.";
    assert_eq!((reply.status, reply.json()), (403, json!({ "message": message })));
}

/// U42: a verify is no poll: a runner made in the UI is `started` until it asks for a job.
#[tokio::test(start_paused = true)]
async fn a_runner_made_in_the_ui_is_started_until_it_polls() {
    let lab = Lab::new();
    let token = lab.gitlab.runner_token(lab.runner).unwrap();
    let finished = || lab.gitlab.read(|model| model.runners[&lab.runner].creation_finished);
    let reply = lab.send_json("POST", "/api/v4/runners/verify", json!({ "token": token.expose() })).await;
    assert_eq!((reply.status, finished()), (200, false));
    assert_eq!((lab.poll(None).await.status, finished()), (204, true));
}
