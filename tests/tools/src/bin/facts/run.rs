//! One fact from set-up to verdict.

use crate::expect;
use crate::fact::{Action, Fact, Sent, SentBody, Step};
use crate::given::{self, Trouble};
use crate::names::Names;
use crate::send::{self, Reply};
use crate::state::{Snapshot, snapshot};
use dayfly::clock::Clock;
use dayfly::rng::Rng;
use dayfly_exec::standin::{Chunks, Standin, serve};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Instant;

/// What became of a fact.
pub(crate) enum Outcome {
    Passed,
    /// Only what no source asserts differs.
    Soft(String),
    Failed(String),
    Skipped(String),
}

/// What the stand-in can do; a fact that needs more is skipped.
const ABILITIES: [&str; 21] = [
    "payload_builder",
    "heartbeats",
    "actions",
    "ee",
    "rate_limit",
    "backoff",
    "old_era",
    "two_phase",
    "long_poll",
    "clock",
    "live_trace_chunks",
    "metrics",
    "trace_lock",
    "job_token_expiry",
    "internal_api",
    "remote_storage",
    "artifact_expiry",
    "permissions",
    "registration",
    "forwarded_for",
    "session",
];

/// Sets up, plays, compares.
pub(crate) async fn run(fact: &Fact) -> Outcome {
    let missing = fact.needs.iter().find(|need| !ABILITIES.contains(&need.as_str()) && !need.starts_with("fault:"));
    if let Some(missing) = missing {
        return Outcome::Skipped(missing.clone());
    }
    match play(fact).await {
        Ok(outcome) => outcome,
        Err(Trouble::Skip(reason)) => Outcome::Skipped(reason),
        Err(Trouble::Error(error)) => Outcome::Failed(error),
    }
}

/// The fact's stand-in and who is in it.
struct Stage {
    standin: Standin,
    names: Names,
    address: SocketAddr,
}

async fn play(fact: &Fact) -> Result<Outcome, Trouble> {
    let standin = Standin::new(Clock::system(), Rng::system());
    let names = given::set_up(&standin, fact)?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| format!("listen: {error}"))?;
    let served = serve(standin.clone(), listener, None).map_err(|error| format!("serve: {error}"))?;
    let stage = Stage { standin, names, address: served.address() };

    for step in steps(fact, "history")? {
        match step {
            Step::Action(action) => stage.act(&action)?,
            Step::Request(request) => {
                stage.send(&request).await?;
            }
        }
    }
    let system_id = system_id(&fact.request);
    let before = stage.snapshot(system_id.as_deref(), None);
    let placeholders = stage.standin.read(|model| stage.names.placeholders(model));
    let during = steps(fact, "during")?;
    let start = Instant::now();
    let (reply, acted) = tokio::join!(stage.send_measured(&fact.request), stage.act_beside(&during, start));
    let (reply, elapsed) = reply?;
    acted?;
    for step in steps(fact, "then")? {
        match step {
            Step::Action(action) => stage.act(&action)?,
            Step::Request(_) => return Err("then holds a request".to_owned().into()),
        }
    }
    let after = stage.snapshot(system_id.as_deref(), Some(&before)).with("elapsed_s", json!(elapsed.as_secs_f64()));
    served.stop().await;
    if let Err(difference) = expect::judge(&fact.expect, &reply, &before, &after, &placeholders) {
        return Ok(Outcome::Failed(difference));
    }
    let soft = fact.expect.soft.as_ref().map(|soft| expect::judge(soft, &reply, &before, &after, &placeholders));
    Ok(match soft {
        Some(Err(difference)) => Outcome::Soft(difference),
        Some(Ok(())) | None => Outcome::Passed,
    })
}

fn steps(fact: &Fact, key: &str) -> Result<Vec<Step>, String> {
    match fact.given.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(steps) => serde_json::from_value(steps.clone()).map_err(|error| format!("given {key}: {error}")),
    }
}

/// The manager that the request names.
fn system_id(request: &Sent) -> Option<String> {
    let value = match &request.body {
        SentBody::Json { value } => value.get("system_id"),
        SentBody::Form { value } => value.get("system_id"),
        SentBody::None | SentBody::Text { .. } | SentBody::Multipart { .. } => None,
    };
    value.and_then(Value::as_str).map(str::to_owned)
}

impl Stage {
    fn snapshot(&self, system_id: Option<&str>, before: Option<&Snapshot>) -> Snapshot {
        let now = self.standin.now();
        self.standin.read(|model| snapshot(model, &self.names, system_id, before.map(|before| &before.runners), now))
    }

    async fn send(&self, request: &Sent) -> Result<Reply, String> {
        let placeholders = self.standin.read(|model| self.names.placeholders(model));
        send::send(self.address, request, &placeholders).await
    }

    async fn send_measured(&self, request: &Sent) -> Result<(Reply, Duration), String> {
        let start = Instant::now();
        let reply = self.send(request).await?;
        Ok((reply, start.elapsed()))
    }

    async fn act_beside(&self, steps: &[Step], start: Instant) -> Result<(), String> {
        for step in steps {
            let Step::Action(action) = step else { return Err("during holds a request".into()) };
            let at = Duration::try_from_secs_f64(action.at_s).map_err(|error| format!("at_s: {error}"))?;
            tokio::time::sleep_until(start + at).await;
            self.act(action)?;
        }
        Ok(())
    }

    fn act(&self, action: &Action) -> Result<(), String> {
        match (action.what.as_str(), self.names.job) {
            ("persist_trace", Some(job)) => self.standin.edit(|model| {
                if let Some(job) = model.jobs.get_mut(&job) {
                    job.trace.chunks = Chunks::Persisted;
                }
            }),
            ("cancel_job", Some(job)) => self.standin.cancel(job, true),
            ("enqueue_job", _) => {
                let now = self.standin.now();
                self.standin.edit(|model| given::enqueue_another(model, &self.names, now));
            }
            ("pause_runner", _) => self.standin.edit(|model| {
                if let Some(runner) = self.names.runner {
                    model.edit_runner(runner, |runner| runner.paused = true);
                }
            }),
            (other, _) => return Err(format!("action {other} is unknown")),
        }
        Ok(())
    }
}
