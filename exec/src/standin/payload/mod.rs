//! The 201's body: a complete job of the newest family, built from project, runner and spec.
//!
//! Members as GitLab's own specs and samples show them (docs/protocol.md): `steps` is absent when
//! `run` is there, `file` and `raw` of a variable only appear when true, `services` is a list even
//! when there are none, `image` and `artifacts` are null.

mod config;
mod variables;

pub(super) use config::artifact_format;

use super::job::Job;
use super::model::Model;
use super::project::Project;
use super::runner::{Runner, RunnerId, RunnerType};
use bytes::Bytes;
use dayfly::gitlab::JobId;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// Every reason this GitLab knows, in its order.
pub const FAILURE_REASONS: [&str; 29] = [
    "unknown_failure",
    "script_failure",
    "api_failure",
    "stuck_or_timeout_failure",
    "runner_system_failure",
    "missing_dependency_failure",
    "runner_unsupported",
    "stale_schedule",
    "job_execution_timeout",
    "archived_failure",
    "unmet_prerequisites",
    "scheduler_failure",
    "data_integrity_failure",
    "forward_deployment_failure",
    "user_blocked",
    "project_deleted",
    "ci_quota_exceeded",
    "pipeline_loop_detected",
    "trace_size_exceeded",
    "builds_disabled",
    "secrets_provider_not_found",
    "job_token_expired",
    "no_updates_running",
    "no_updates_canceling",
    "server_timeout_running",
    "server_timeout_canceling",
    "runner_configuration_error",
    "runner_external_dependency_failure",
    "runner_interrupted",
];

/// What the parts of the payload are built from.
struct Parts<'a> {
    model: &'a Model,
    project: &'a Project,
    runner: &'a Runner,
    job: &'a Job,
    now: Timestamp,
}

/// The payload of a job that was just assigned to `runner`.
pub(super) fn build(model: &Model, id: JobId, runner: RunnerId, now: Timestamp) -> Bytes {
    let (Some(job), Some(runner)) = (model.jobs.get(&id), model.runners.get(&runner)) else { return Bytes::new() };
    let Some(project) = model.projects.get(&job.project) else { return Bytes::new() };
    if let Some(raw) = &job.spec.raw {
        return raw.clone();
    }
    Bytes::from(Parts { model, project, runner, job, now }.payload().to_string())
}

impl Parts<'_> {
    fn payload(&self) -> Value {
        let spec = &self.job.spec;
        let mut payload = json!({
            "id": self.job.id,
            "token": self.job.token.expose(),
            "allow_git_fetch": true,
            "job_info": self.job_info(),
            "git_info": self.git_info(),
            "runner_info": { "timeout": self.job.timeout.as_secs(), "runner_session_url": null, "uuid": null },
            "inputs": config::inputs(spec),
            "variables": self.variables(),
            "hooks": config::hooks(spec.hooks.as_ref()),
            "image": config::image(spec.image.as_ref()),
            "services": config::services(spec.services.as_ref()),
            "artifacts": config::artifacts(spec.artifacts.as_ref()),
            "cache": config::caches(spec.cache.as_ref(), self.project, spec.protected),
            "credentials": self.credentials(),
            "features": { "trace_sections": true, "failure_reasons": FAILURE_REASONS },
            "dependencies": self.dependencies(),
        });
        let Some(members) = payload.as_object_mut() else { return payload };
        match &spec.run {
            Some(run) => members.insert("run".into(), Value::String(run.to_string())),
            None => members.insert("steps".into(), self.steps()),
        };
        let licensed = &self.model.settings.licensed;
        if licensed.contains("ci_secrets_management") {
            members.insert("secrets".into(), config::secrets(spec));
        }
        if licensed.contains("security_orchestration_policies") {
            members.insert("policy_options".into(), config::policy(spec.policy.as_ref()));
        }
        payload
    }

    fn job_info(&self) -> Value {
        let (job, project) = (self.job, self.project);
        let waited = super::model::age(job.queued_at, self.now).as_secs();
        let waiting = self.model.jobs.values().filter(|other| other.queued).count();
        json!({
            "id": job.id,
            "name": job.spec.name,
            "stage": job.spec.stage,
            "pipeline_id": job.pipeline,
            "project_id": project.id.0,
            "project_name": project.name(),
            "project_full_path": project.path,
            "namespace_id": project.id.0 + 1_000_000,
            "root_namespace_id": project.id.0 + 1_000_000,
            "organization_id": 1,
            "instance_id": "standin",
            "instance_uuid": "0f8c1d2e-53a4-4b6f-9c7d-8e9fa0b1c2d3",
            "user_id": 31_337,
            "scoped_user_id": null,
            "time_in_queue_seconds": waited,
            "project_jobs_running_on_instance_runners_count": self.instance_count(),
            "queue_size": waiting,
            "queue_depth": 0,
        })
    }

    /// How many other jobs of the project run on instance runners: a text, `+Inf` where that is no question.
    fn instance_count(&self) -> String {
        if self.runner.kind != RunnerType::Instance {
            return "+Inf".into();
        }
        let on_instance = |job: &&Job| {
            let runner = job.runner.and_then(|runner| self.model.runners.get(&runner));
            job.id != self.job.id
                && job.project == self.project.id
                && job.state.is_executing()
                && runner.is_some_and(|runner| runner.kind == RunnerType::Instance)
        };
        let counted = self.model.jobs.values().filter(on_instance).count();
        let count = self.project.extra_instance_runner_jobs + u64::try_from(counted).unwrap_or(u64::MAX / 2);
        let bucket = self.model.settings.running_jobs_bucket;
        if count >= bucket { format!("{bucket}+") } else { count.to_string() }
    }

    fn git_info(&self) -> Value {
        let spec = &self.job.spec;
        let depth = self.depth();
        json!({
            "repo_url": self.repository_url(),
            "repo_object_format": "sha1",
            "ref": spec.git_ref,
            "ref_type": if spec.is_tag { "tag" } else { "branch" },
            "sha": spec.sha,
            "before_sha": spec.before_sha,
            "refspecs": spec.refspecs.clone().unwrap_or_else(|| self.refspecs(depth)),
            "depth": depth,
            "protected": spec.protected,
        })
    }

    /// `GIT_DEPTH` of the job, else what the spec or the project says; 0 is everything.
    fn depth(&self) -> u64 {
        let spec = &self.job.spec;
        let variable = spec.variables.iter().rev().find(|variable| variable.key == "GIT_DEPTH");
        match variable {
            Some(variable) => variable.value.trim().parse().unwrap_or(0),
            None => spec.depth.or(self.project.default_git_depth).unwrap_or(0),
        }
    }

    fn refspecs(&self, depth: u64) -> Vec<String> {
        let (spec, pipeline) = (&self.job.spec, self.job.pipeline);
        let name = &spec.git_ref;
        let mut refspecs = vec![format!("+refs/pipelines/{pipeline}:refs/pipelines/{pipeline}")];
        if spec.merge_request_ref {
            return refspecs;
        }
        if depth == 0 {
            refspecs.push("+refs/heads/*:refs/remotes/origin/*".into());
            refspecs.push("+refs/tags/*:refs/tags/*".into());
        } else if spec.is_tag {
            refspecs.push(format!("+refs/tags/{name}:refs/tags/{name}"));
        } else {
            refspecs.push(format!("+refs/heads/{name}:refs/remotes/origin/{name}"));
        }
        refspecs
    }

    /// The clone URL, the job token in it.
    fn repository_url(&self) -> String {
        let base = &self.model.settings.external_url;
        let (scheme, rest) = base.split_once("://").unwrap_or(("https", base));
        format!("{scheme}://gitlab-ci-token:{}@{rest}/{}.git", self.job.token.expose(), self.project.path)
    }

    fn steps(&self) -> Value {
        let (spec, timeout) = (&self.job.spec, self.job.timeout.as_secs());
        let step = |name: &str, script: &[String], when: &str, allow_failure: bool| json!({ "name": name, "script": script, "timeout": timeout, "when": when, "allow_failure": allow_failure });
        let mut steps = vec![step("script", &spec.script, "on_success", false)];
        if let Some(release) = &spec.release {
            steps.push(step("release", &config::release_script(release), "on_success", false));
        }
        if !spec.after_script.is_empty() {
            steps.push(step("after_script", &spec.after_script, "always", true));
        }
        Value::Array(steps)
    }

    fn credentials(&self) -> Value {
        let Some(registry) = &self.model.settings.registry else { return json!([]) };
        json!([{
            "type": "registry",
            "url": registry,
            "username": "gitlab-ci-token",
            "password": self.job.token.expose(),
        }])
    }

    fn dependencies(&self) -> Value {
        let jobs = self.job.spec.dependencies.iter().filter_map(|id| self.model.jobs.get(id));
        let entry = |job: &Job| {
            let mut entry = Map::new();
            entry.insert("id".into(), json!(job.id));
            entry.insert("name".into(), json!(job.spec.name));
            entry.insert("token".into(), json!(self.job.token.expose()));
            if let Some(archive) = job.artifacts.get("archive") {
                entry.insert("artifacts_file".into(), json!({ "filename": archive.filename, "size": archive.size }));
            }
            Value::Object(entry)
        };
        jobs.map(entry).collect()
    }
}
