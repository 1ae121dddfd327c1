//! What a job is, before GitLab makes a payload of it: a builder for tests and `exec`.
//!
//! Structured members (`image`, `services`, `artifacts`, `cache`…) have the shape that they have in
//! `.gitlab-ci.yml`, as JSON; [`super::payload`] turns them into what a runner gets.

use super::job::User;
use bytes::Bytes;
use dayfly::gitlab::JobId;
use dayfly::secret::Secret;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::time::Duration;

/// One variable of a job.
#[derive(Clone, Debug)]
pub struct Variable {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Whether anybody may see it.
    pub public: bool,
    /// Whether the runner masks it in the log.
    pub masked: bool,
    /// Whether the runner puts it in a file.
    pub file: bool,
    /// Whether `$` in it is no reference.
    pub raw: bool,
}

impl Variable {
    /// A public variable.
    pub fn new(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { key: key.into(), value: value.into(), public: true, masked: false, file: false, raw: false }
    }

    /// A masked, hidden variable.
    pub fn secret(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { public: false, masked: true, ..Self::new(key, value) }
    }
}

/// What a job is.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// Id; `None`: the next one.
    pub id: Option<JobId>,
    /// Job token; `None`: a random one.
    pub token: Option<Secret>,
    /// Pipeline; `None`: one of its own.
    pub pipeline: Option<u64>,
    /// The whole payload as bytes: nothing else of the spec goes into it.
    pub raw: Option<Bytes>,
    /// Name.
    pub name: String,
    /// Stage.
    pub stage: String,
    /// Number of the stage.
    pub stage_idx: u64,
    /// Branch, tag, or full merge request ref.
    pub git_ref: String,
    /// Whether the ref is a tag.
    pub is_tag: bool,
    /// Whether the ref is that of a detached merge request pipeline.
    pub merge_request_ref: bool,
    /// Whether the ref is protected.
    pub protected: bool,
    /// The commit, 40 hex digits.
    pub sha: String,
    /// The commit before, or zeroes.
    pub before_sha: String,
    /// Refspecs, instead of those that GitLab would name.
    pub refspecs: Option<Vec<String>>,
    /// Clone depth, instead of the project's.
    pub depth: Option<u64>,
    /// Tags that the runner must have.
    pub tags: BTreeSet<String>,
    /// Lines of the script.
    pub script: Vec<String>,
    /// Lines that run afterwards in any case.
    pub after_script: Vec<String>,
    /// Timeout, instead of the project's.
    pub timeout: Option<Duration>,
    /// Whether its failure is no failure of the pipeline.
    pub allow_failure: bool,
    /// Exit codes that are no failure of the pipeline.
    pub exit_codes_allowed: Option<Vec<i64>>,
    /// `retry:`.
    pub retry: Option<Value>,
    /// `release:`.
    pub release: Option<Value>,
    /// `hooks:`.
    pub hooks: Option<Value>,
    /// `run:`, instead of a script.
    pub run: Option<Value>,
    /// `image:`.
    pub image: Option<Value>,
    /// `services:`.
    pub services: Option<Value>,
    /// `artifacts:`.
    pub artifacts: Option<Value>,
    /// `cache:`.
    pub cache: Option<Value>,
    /// `secrets:` (Enterprise Edition).
    pub secrets: Option<Value>,
    /// Members of `policy_options` (Enterprise Edition).
    pub policy: Option<Value>,
    /// Declared inputs: name to `{type, default}`.
    pub inputs_spec: Option<Map<String, Value>>,
    /// Given inputs.
    pub inputs: Map<String, Value>,
    /// Variables of the job, after the predefined ones.
    pub variables: Vec<Variable>,
    /// Earlier jobs whose artifacts it fetches.
    pub dependencies: Vec<JobId>,
    /// Whether those artifacts still exist.
    pub dependencies_valid: bool,
    /// What started the pipeline.
    pub pipeline_source: String,
    /// Whether the pipeline was started by a trigger.
    pub triggered: bool,
    /// Who started it.
    pub user: User,
    /// Whether that user is blocked.
    pub user_blocked: bool,
    /// Whether the job is too old to run.
    pub archived: bool,
    /// Key of a suspended environment.
    pub runtime_environment_key: Option<String>,
}

impl Default for JobSpec {
    fn default() -> Self {
        Self {
            id: None,
            token: None,
            pipeline: None,
            raw: None,
            name: "test".into(),
            stage: "test".into(),
            stage_idx: 0,
            git_ref: "main".into(),
            is_tag: false,
            merge_request_ref: false,
            protected: false,
            sha: "5f1c9a7e02d4b86f3a9c1e57d0b24c6688e7f013".into(),
            before_sha: "0000000000000000000000000000000000000000".into(),
            refspecs: None,
            depth: None,
            tags: BTreeSet::new(),
            script: vec!["echo hello".into()],
            after_script: Vec::new(),
            timeout: None,
            allow_failure: false,
            exit_codes_allowed: None,
            retry: None,
            release: None,
            hooks: None,
            run: None,
            image: None,
            services: None,
            artifacts: None,
            cache: None,
            secrets: None,
            policy: None,
            inputs_spec: None,
            inputs: Map::new(),
            variables: Vec::new(),
            dependencies: Vec::new(),
            dependencies_valid: true,
            pipeline_source: "push".into(),
            triggered: false,
            user: User::Everywhere,
            user_blocked: false,
            archived: false,
            runtime_environment_key: None,
        }
    }
}

impl JobSpec {
    /// A job with a script of these lines.
    pub fn script<S: Into<String>>(lines: impl IntoIterator<Item = S>) -> Self {
        Self { script: lines.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// A job whose payload is exactly these bytes; `id` and `token` are those that stand in it.
    pub fn raw(id: JobId, token: Secret, payload: impl Into<Bytes>) -> Self {
        Self { id: Some(id), token: Some(token), raw: Some(payload.into()), ..Self::default() }
    }

    /// Sets the name.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds an `after_script`.
    #[must_use]
    pub fn with_after_script<S: Into<String>>(mut self, lines: impl IntoIterator<Item = S>) -> Self {
        self.after_script = lines.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the timeout.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Adds a variable.
    #[must_use]
    pub fn with_variable(mut self, variable: Variable) -> Self {
        self.variables.push(variable);
        self
    }

    /// Asks for runners with this tag.
    #[must_use]
    pub fn with_tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.insert(tag.into());
        self
    }

    /// Sets `artifacts:`.
    #[must_use]
    pub fn with_artifacts(mut self, artifacts: Value) -> Self {
        self.artifacts = Some(artifacts);
        self
    }

    /// Fetches the artifacts of an earlier job.
    #[must_use]
    pub fn depending_on(mut self, job: JobId) -> Self {
        self.dependencies.push(job);
        self
    }
}
