//! The stand-in from outside: requests in, answers out, on a paused clock.

mod artifacts;
mod faults;
mod found_by_use;
mod jobs;
mod served;
mod trace;

use super::*;
use bytes::Bytes;
use dayfly::gitlab::transport::full;
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

/// A GitLab with one project and one runner, and somebody who talks to it.
pub(super) struct Lab {
    pub(super) gitlab: Standin,
    pub(super) project: ProjectId,
    pub(super) runner: RunnerId,
}

/// An answer, read whole.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Reply {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Lab {
    pub(super) fn new() -> Self {
        let start = "2026-03-09T08:15:42Z".parse().unwrap();
        let gitlab = Standin::new(Clock::simulated(start), Rng::seeded(7));
        let project = gitlab.add_project("tools/lint");
        let runner = gitlab.add_runner(project);
        Self { gitlab, project, runner }
    }

    pub(super) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Reply {
        let mut request = http::Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.gitlab.call(request.body(full(body)).unwrap()).await;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Reply { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub(super) async fn send_json(&self, method: &str, path: &str, body: Value) -> Reply {
        self.send(method, path, &[("content-type", "application/json")], body.to_string()).await
    }

    pub(super) async fn poll(&self, last_update: Option<&str>) -> Reply {
        let token = self.gitlab.runner_token(self.runner).unwrap();
        let mut body = json!({
            "token": token.expose(),
            "system_id": "s_0123456789ab",
            "info": { "features": { "cancel_gracefully": true, "two_phase_job_commit": true } },
        });
        if let Some(last_update) = last_update {
            body["last_update"] = json!(last_update);
        }
        self.send_json("POST", "/api/v4/jobs/request", body).await
    }

    /// Queues a job and has it handed out.
    pub(super) async fn running_job(&self, spec: JobSpec) -> (JobId, String) {
        let id = self.gitlab.enqueue(self.project, spec);
        let reply = self.poll(None).await;
        assert_eq!((reply.status, &reply.json()["id"]), (201, &json!(id)));
        (id, reply.json()["token"].as_str().unwrap().to_owned())
    }

    pub(super) async fn put(&self, id: JobId, body: Value) -> Reply {
        self.send_json("PUT", &format!("/api/v4/jobs/{id}"), body).await
    }

    pub(super) async fn patch(&self, id: JobId, token: &str, start: usize, body: &str) -> Reply {
        let range = format!("{start}-{}", (start + body.len()).saturating_sub(1));
        let headers = [("content-type", "text/plain"), ("job-token", token), ("content-range", range.as_str())];
        self.send("PATCH", &format!("/api/v4/jobs/{id}/trace?debug_trace=false"), &headers, body.to_owned()).await
    }

    pub(super) fn state(&self, id: JobId) -> (JobState, Option<String>) {
        let job = self.gitlab.job(id).unwrap();
        (job.state, job.failure_reason)
    }
}

impl Standin {
    /// The job that is handed out to this runner, which has these features: its payload.
    pub(crate) async fn handed_out(&self, runner: RunnerId, features: &Value) -> Value {
        let token = self.runner_token(runner).unwrap();
        let body = json!({"token": token.expose(), "info": {"features": features}}).to_string();
        let request = http::Request::post("/api/v4/jobs/request").header("content-type", "application/json");
        let answer = self.call(request.body(full(body)).unwrap()).await;
        assert_eq!(answer.status(), 201);
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&bytes).unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_path_is_404_with_json() {
    let reply = Lab::new().send("GET", "/api/v4/user", &[], "").await;
    assert_eq!((reply.status, reply.json()), (StatusCode::NOT_FOUND.as_u16(), json!({ "error": "404 Not Found" })));
}
