//! The routes about runners themselves: verify, register, delete, reset, discovery.

use super::answer::Answer;
use super::auth;
use super::model::{Model, after};
use super::params::Params;
use super::runner::{Runner, RunnerId, RunnerType};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::time::Duration;

/// GitLab's own limit, from its documentation.
const TAGS_MAX: usize = 50;

/// With milliseconds, as GitLab's JSON has it.
fn date(at: Option<Timestamp>) -> Value {
    at.map_or(Value::Null, |at| Value::String(at.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()))
}

fn credentials(runner: &Runner) -> Value {
    json!({ "id": runner.id.0, "token": runner.token.expose(), "token_expires_at": date(runner.token_expires_at) })
}

fn forbidden() -> Answer {
    Answer::refusal(StatusCode::FORBIDDEN, None)
}

/// `POST /runners/verify`. A contact, but no poll: a runner made in the UI stays `started`.
pub(super) fn verify(model: &mut Model, params: &Params, now: Timestamp) -> Result<Answer, Answer> {
    params.object("info")?;
    let id = auth::runner(model, params, true, now)?;
    let runner = model.runners.get(&id).ok_or_else(forbidden)?;
    Ok(Answer::json(StatusCode::OK, &credentials(runner)))
}

/// `DELETE /runners`
pub(super) fn delete(
    model: &mut Model,
    params: &Params,
    headers: &HeaderMap,
    now: Timestamp,
) -> Result<Answer, Answer> {
    let id = auth::runner(model, params, false, now)?;
    let runner = model.runners.get(&id).ok_or_else(forbidden)?;
    check_unmodified(headers, runner.updated_at)?;
    model.runners.remove(&id);
    Ok(Answer::empty(StatusCode::NO_CONTENT))
}

/// `DELETE /runners/managers`
pub(super) fn delete_manager(
    model: &mut Model,
    params: &Params,
    headers: &HeaderMap,
    now: Timestamp,
) -> Result<Answer, Answer> {
    params.required_text("token")?;
    let system_id = params.required_text("system_id")?;
    let id = auth::runner(model, params, false, now)?;
    let runner = model.runners.get_mut(&id).ok_or_else(forbidden)?;
    let Some(manager) = runner.managers.get(&system_id) else {
        return Err(Answer::message(StatusCode::NOT_FOUND, "404 Runner manager not found Not Found"));
    };
    check_unmodified(headers, manager.updated_at)?;
    runner.managers.remove(&system_id);
    Ok(Answer::empty(StatusCode::NO_CONTENT))
}

/// 412 if the record changed after the date in `If-Unmodified-Since`; 400 for no date.
fn check_unmodified(headers: &HeaderMap, changed: Timestamp) -> Result<(), Answer> {
    let Some(since) = auth::header(headers, "if-unmodified-since") else { return Ok(()) };
    let Ok(since) = jiff::fmt::rfc2822::parse(&since) else {
        return Err(Answer::refusal(StatusCode::BAD_REQUEST, None));
    };
    if changed.as_second() > since.timestamp().as_second() {
        return Err(Answer::refusal(StatusCode::PRECONDITION_FAILED, None));
    }
    Ok(())
}

/// `POST /runners/reset_authentication_token`
pub(super) fn reset(model: &mut Model, params: &Params, now: Timestamp) -> Result<Answer, Answer> {
    let id = auth::runner(model, params, true, now)?;
    let word = model.random_word(20);
    let expires_at = model.settings.runner_token_expiry.map(|expiry| after(now, expiry));
    let runner = model.runners.get_mut(&id).ok_or_else(forbidden)?;
    let prefix = token_prefix(runner.token.expose()).to_owned();
    runner.token = dayfly::secret::Secret::new(format!("{prefix}{word}"));
    runner.token_expires_at = expires_at;
    runner.updated_at = now;
    let body = json!({ "token": runner.token.expose(), "token_expires_at": date(expires_at) });
    Ok(Answer::json(StatusCode::CREATED, &body))
}

fn token_prefix(token: &str) -> &str {
    ["glrt-t1_", "glrt-t2_", "glrt-t3_", "glrt-", "glrtr-"]
        .into_iter()
        .find(|prefix| token.starts_with(prefix))
        .unwrap_or("")
}

/// `POST /runners`, the old way of registering.
pub(super) fn register(model: &mut Model, params: &Params, now: Timestamp) -> Result<Answer, Answer> {
    let token = params.required_text("token")?;
    let wanted = Wanted::read(params)?;
    if !model.settings.registration_allowed {
        return Err(Answer::message(StatusCode::GONE, "410 Gone - runner registration disallowed"));
    }
    let project =
        model.projects.values().find(|project| project.runners_token.matches(&token)).map(|project| project.id);
    if project.is_none() && !model.registration_token.matches(&token) {
        model.metrics.refused += 1;
        return Err(Answer::message(StatusCode::FORBIDDEN, "403 Forbidden - invalid token supplied"));
    }
    wanted.validate()?;
    let limit = project.and_then(|id| model.projects.get(&id)).and_then(|project| project.runner_limit);
    let registered =
        model.runners.values().filter(|runner| project.is_some_and(|id| runner.projects.contains(&id))).count();
    if limit.is_some_and(|limit| u64::try_from(registered).unwrap_or(u64::MAX) >= limit) {
        let text = format!("Maximum number of ci registered project runners ({}) exceeded", limit.unwrap_or_default());
        return Err(Answer::json(StatusCode::BAD_REQUEST, &json!({ "message": { "runner_projects.base": [text] } })));
    }
    let id = model.add_runner("", project.as_slice(), now);
    let expiry = model.settings.runner_token_expiry;
    let runner = model.runners.get_mut(&id).ok_or_else(forbidden)?;
    runner.kind = if project.is_some() { RunnerType::Project } else { RunnerType::Instance };
    runner.token_expires_at = expiry.map(|expiry| after(now, expiry));
    wanted.apply(runner);
    Ok(Answer::json(StatusCode::CREATED, &credentials(runner)))
}

/// Attributes of a runner to register.
struct Wanted {
    description: Option<String>,
    maintenance_note: Option<String>,
    tags: Vec<String>,
    run_untagged: bool,
    locked: bool,
    paused: bool,
    access_level: Option<String>,
    maximum_timeout: Option<i64>,
}

impl Wanted {
    fn read(params: &Params) -> Result<Self, Answer> {
        let note = match params.text("maintenance_note")? {
            Some(note) => Some(note),
            None => params.text("maintainer_note")?,
        };
        let paused = match params.boolean("paused")? {
            Some(paused) => paused,
            None => params.boolean("active")?.is_some_and(|active| !active),
        };
        let access_level = params.text("access_level")?;
        if access_level.as_deref().is_some_and(|level| !["not_protected", "ref_protected"].contains(&level)) {
            return Err(Answer::bad_parameter("access_level does not have a valid value"));
        }
        Ok(Self {
            description: params.text("description")?,
            maintenance_note: note,
            tags: params.list("tag_list")?.unwrap_or_default(),
            run_untagged: params.boolean("run_untagged")?.unwrap_or(true),
            locked: params.boolean("locked")?.unwrap_or(false),
            paused,
            access_level,
            maximum_timeout: params.integer("maximum_timeout")?,
        })
    }

    fn validate(&self) -> Result<(), Answer> {
        let invalid = |member: &str, text: &str| {
            let message = json!({ "message": { member: [text] } });
            Err(Answer::json(StatusCode::BAD_REQUEST, &message))
        };
        if self.tags.is_empty() && !self.run_untagged {
            return invalid("tags_list", "can not be empty when runner is not allowed to pick untagged jobs");
        }
        if self.tags.len() > TAGS_MAX {
            return invalid("tags_list", "Too many tags specified. Please limit the number of tags to 50");
        }
        if self.maximum_timeout.is_some_and(|seconds| seconds < 600) {
            return invalid("maximum_timeout", "needs to be at least 10 minutes");
        }
        if self.maintenance_note.as_ref().is_some_and(|note| note.chars().count() > 1024) {
            return invalid("maintenance_note", "is too long (maximum is 1024 characters)");
        }
        Ok(())
    }

    fn apply(self, runner: &mut Runner) {
        runner.description = self.description.unwrap_or_default();
        runner.maintenance_note = self.maintenance_note;
        runner.tags = self.tags.into_iter().collect();
        runner.run_untagged = self.run_untagged;
        runner.locked = self.locked;
        runner.paused = self.paused;
        runner.protected_only = self.access_level.as_deref() == Some("ref_protected");
        runner.maximum_timeout =
            self.maximum_timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
        runner.creation_finished = true;
    }
}

/// `GET /runners/router/discovery`
pub(super) fn discovery(model: &mut Model, headers: &HeaderMap, now: Timestamp) -> Result<Answer, Answer> {
    let token = auth::header(headers, "runner-token").unwrap_or_default();
    let known: Option<RunnerId> = model.runner_by_token(&token, now);
    if known.is_none() {
        model.metrics.refused += 1;
        return Err(forbidden());
    }
    match &model.settings.job_router {
        Some(url) => Ok(Answer::json(StatusCode::OK, &json!({ "server_url": url }))),
        None => Err(Answer::message(StatusCode::NOT_IMPLEMENTED, "501 Not Implemented")),
    }
}
