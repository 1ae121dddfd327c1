//! A pipeline's job as the stand-in GitLab wants it.
//!
//! The stand-in makes the payload of it and adds GitLab's predefined variables; here come those that
//! follow from the local repository, the developer's own, and what exec has to insist on.

use super::pipeline::{AllowFailure, Artifacts, Job, Service};
use super::repository::Repository;
use crate::standin::{JobSpec, Variable};
use dayfly::gitlab::JobId;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// What all jobs of a run have in common.
#[derive(Debug)]
pub(super) struct Common<'a> {
    /// Number of the pipeline.
    pub(super) pipeline: u64,
    /// Where the jobs clone from; none: they start in an empty directory.
    pub(super) repository: Option<&'a Repository>,
    /// Path of the pipeline file, as the developer named it.
    pub(super) file: String,
    /// Timeout of jobs that name none.
    pub(super) timeout: Duration,
    /// `--variable`: they win over the file's.
    pub(super) variables: &'a [Variable],
}

/// Variables that are known before a job is: they may stand in names of includes and in inputs.
pub(super) fn known(repository: Option<&Repository>, given: &[Variable]) -> BTreeMap<String, String> {
    let mut known = BTreeMap::new();
    let mut put = |key: &str, value: &str| known.insert(key.to_owned(), value.to_owned());
    put("CI", "true");
    put("GITLAB_CI", "true");
    if let Some(repository) = repository {
        let (namespace, name) = repository.project_path.rsplit_once('/').unwrap_or(("", &repository.project_path));
        put("CI_COMMIT_SHA", &repository.sha);
        put("CI_COMMIT_SHORT_SHA", repository.sha.get(..8).unwrap_or_default());
        put("CI_COMMIT_REF_NAME", &repository.ref_name);
        put(if repository.is_tag { "CI_COMMIT_TAG" } else { "CI_COMMIT_BRANCH" }, &repository.ref_name);
        put("CI_DEFAULT_BRANCH", repository.default_branch.as_ref().unwrap_or(&repository.ref_name));
        put("CI_PROJECT_PATH", &repository.project_path);
        put("CI_PROJECT_NAMESPACE", namespace);
        put("CI_PROJECT_NAME", name);
        put("CI_PROJECT_ROOT_NAMESPACE", namespace.split('/').next().unwrap_or_default());
    }
    // GitLab does not expand file-type variables there either.
    for variable in given.iter().filter(|v| !v.file) {
        put(&variable.key, &variable.value);
    }
    known
}

/// The job, and a remark if something of it cannot be as it says.
pub(super) fn spec(job: &Job, common: &Common<'_>, ids: &BTreeMap<String, JobId>) -> (JobSpec, Option<String>) {
    let mut variables = predefined(common);
    variables
        .extend(job.variables.iter().map(|v| Variable { raw: v.raw, ..Variable::new(v.key.clone(), v.value.clone()) }));
    if let Some((index, total)) = job.node {
        variables
            .extend([("CI_NODE_INDEX", index), ("CI_NODE_TOTAL", total)].map(|(k, n)| Variable::new(k, n.to_string())));
    }
    variables.extend(common.variables.iter().cloned());
    let mut remark = None;
    if common.repository.is_none() {
        variables.push(Variable::new("GIT_STRATEGY", "none"));
    } else if let Some(depth) = variables.iter().rev().find(|v| v.key == "GIT_DEPTH").filter(|v| v.value != "0") {
        // Plain files over HTTP know no shallow fetch.
        remark = Some(format!("GIT_DEPTH={} is ignored: the whole history of HEAD is cloned", depth.value));
        variables.push(Variable::new("GIT_DEPTH", "0"));
    }
    let mut spec = JobSpec {
        pipeline: Some(common.pipeline),
        name: job.name.clone(),
        stage: job.stage.clone(),
        script: job.script.clone(),
        after_script: job.after_script.clone(),
        timeout: Some(job.timeout.unwrap_or(common.timeout)),
        allow_failure: job.allow_failure == AllowFailure::Yes,
        exit_codes_allowed: match &job.allow_failure {
            AllowFailure::ExitCodes(codes) => Some(codes.iter().map(|code| i64::from(*code)).collect()),
            AllowFailure::No | AllowFailure::Yes => None,
        },
        hooks: (!job.pre_get_sources_script.is_empty())
            .then(|| json!({ "pre_get_sources_script": job.pre_get_sources_script })),
        image: job.image.as_ref().map(|image| json!({ "name": image.name, "entrypoint": image.entrypoint })),
        services: (!job.services.is_empty()).then(|| job.services.iter().map(service).collect()),
        artifacts: artifacts(&job.artifacts),
        dependencies: job.artifacts_from.iter().filter_map(|name| ids.get(name)).copied().collect(),
        depth: Some(0),
        sha: "0".repeat(40),
        refspecs: Some(Vec::new()),
        variables,
        ..JobSpec::default()
    };
    if let Some(repository) = common.repository {
        let name = &repository.ref_name;
        let target =
            if repository.is_tag { format!("refs/tags/{name}") } else { format!("refs/remotes/origin/{name}") };
        spec.refspecs = Some(vec![format!("+{}:{target}", repository.full_ref())]);
        spec.git_ref.clone_from(name);
        spec.is_tag = repository.is_tag;
        spec.sha.clone_from(&repository.sha);
        spec.before_sha.clone_from(&repository.before_sha);
    }
    (spec, remark)
}

/// Predefined variables of GitLab's that the repository tells. A commit message is no template, so
/// none of them is expanded.
fn predefined(common: &Common<'_>) -> Vec<Variable> {
    let mut list = vec![("CI_CONFIG_PATH", common.file.clone())];
    if let Some(repository) = common.repository {
        let (title, description) = repository.message.split_once('\n').unwrap_or((&repository.message, ""));
        let default_branch = repository.default_branch.as_ref().unwrap_or(&repository.ref_name);
        list.extend([
            ("CI_COMMIT_MESSAGE", repository.message.clone()),
            ("CI_COMMIT_TITLE", title.to_owned()),
            ("CI_COMMIT_DESCRIPTION", description.trim_start_matches('\n').to_owned()),
            ("CI_COMMIT_AUTHOR", repository.author.clone()),
            ("CI_COMMIT_TIMESTAMP", repository.timestamp.clone()),
            ("CI_DEFAULT_BRANCH", default_branch.clone()),
        ]);
    }
    list.into_iter().map(|(key, value)| Variable { raw: true, ..Variable::new(key, value) }).collect()
}

/// One of `services` in the shape of the file.
fn service(service: &Service) -> Value {
    let Service { name, alias, entrypoint, command, variables } = service;
    let variables: serde_json::Map<String, Value> =
        variables.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
    let list = |words: &[String]| if words.is_empty() { Value::Null } else { json!(words) };
    json!({ "name": name, "alias": alias, "entrypoint": list(entrypoint), "command": list(command), "variables": variables })
}

/// `artifacts` in the shape of the file, without what is not there: an archive is uploaded only if
/// it has paths or takes untracked files.
fn artifacts(artifacts: &Artifacts) -> Option<Value> {
    let mut members = Map::new();
    if artifacts.untracked || !artifacts.paths.is_empty() {
        members.insert("paths".into(), json!(artifacts.paths));
        members.insert("untracked".into(), json!(artifacts.untracked));
        members.insert("when".into(), json!(artifacts.when.as_str()));
        if !artifacts.name.is_empty() {
            members.insert("name".into(), json!(artifacts.name));
        }
        if !artifacts.exclude.is_empty() {
            members.insert("exclude".into(), json!(artifacts.exclude));
        }
    }
    if !artifacts.reports.is_empty() {
        let reports: Map<String, Value> =
            artifacts.reports.iter().map(|(kind, paths)| (kind.clone(), json!(paths))).collect();
        members.insert("reports".into(), Value::Object(reports));
    }
    if members.is_empty() {
        return None;
    }
    if let Some(expire_in) = &artifacts.expire_in {
        members.insert("expire_in".into(), json!(expire_in));
    }
    Some(Value::Object(members))
}

#[cfg(test)]
mod tests {
    use super::super::pipeline;
    use super::*;
    use crate::standin::Standin;
    use dayfly::clock::Clock;
    use dayfly::rng::Rng;
    use std::path::Path;

    fn repository() -> Repository {
        Repository {
            top: "/home/me/p".into(),
            sha: "1".repeat(40),
            before_sha: "2".repeat(40),
            ref_name: "topic".into(),
            is_tag: false,
            default_branch: Some("trunk".into()),
            project_path: "group/p".into(),
            message: "Title\n\nBody $HOME".into(),
            author: "A <a@b>".into(),
            timestamp: "2026-01-31T12:00:00+01:00".into(),
            relative_submodules: Vec::new(),
            changes: Some(0),
        }
    }

    fn plan(text: &str) -> pipeline::Plan {
        pipeline::plan(Path::new(".gitlab-ci.yml"), text, &["job".into()]).unwrap()
    }

    /// The payload that a runner gets for this pipeline's `job`.
    async fn payload(text: &str, repository: Option<&Repository>, variables: &[Variable]) -> (Value, Option<String>) {
        let common = Common {
            pipeline: 7,
            repository,
            file: ".gitlab-ci.yml".into(),
            timeout: Duration::from_secs(3600),
            variables,
        };
        let (spec, remark) = spec(&plan(text).jobs[0], &common, &BTreeMap::new());
        let standin = Standin::new(Clock::system(), Rng::seeded(1));
        let project = standin.add_project("group/p");
        let runner = standin.add_runner(project);
        let _ = standin.enqueue(project, spec);
        let features = json!({"artifacts": true, "variables": true, "upload_multiple_artifacts": true, "upload_raw_artifacts": true});
        (standin.handed_out(runner, &features).await, remark)
    }

    /// The value that a job sees: the last one of this name.
    fn variable<'a>(payload: &'a Value, key: &str) -> Option<&'a Value> {
        payload["variables"].as_array().unwrap().iter().rev().find(|v| v["key"] == key)
    }

    #[tokio::test]
    async fn a_job_becomes_the_payload_that_gitlab_would_send() {
        let text = "
variables: {A: file, B: file}
job:
  before_script: [one]
  script: [two]
  after_script: [three]
  image: {name: 'ruby:3', entrypoint: [sh]}
  services: [redis, {name: 'web:1', alias: w, command: [serve, now], variables: {A: 1}}]
  timeout: 10 minutes
  hooks: {pre_get_sources_script: [four]}
  artifacts: {paths: [out], name: n, reports: {junit: j.xml}, expire_in: 1 day}
";
        let repository = repository();
        let (payload, remark) = payload(text, Some(&repository), &[Variable::new("B", "mine")]).await;
        assert_eq!(remark, None);
        assert_eq!(payload["steps"][0]["script"], json!(["one", "two"]));
        assert_eq!(payload["steps"][1]["script"], json!(["three"]));
        assert_eq!(payload["runner_info"]["timeout"], 600);
        assert_eq!(payload["image"]["name"], "ruby:3");
        let services = &payload["services"];
        assert_eq!((&services[0]["name"], &services[0]["command"]), (&json!("redis"), &Value::Null));
        assert_eq!((&services[1]["alias"], &services[1]["command"]), (&json!("w"), &json!(["serve", "now"])));
        assert_eq!(services[1]["variables"], json!([{ "key": "A", "value": "1" }]));
        assert_eq!(payload["hooks"][0]["script"], json!(["four"]));
        let git = &payload["git_info"];
        assert_eq!((&git["ref"], &git["sha"], &git["depth"]), (&json!("topic"), &json!("1".repeat(40)), &json!(0)));
        assert_eq!(git["refspecs"], json!(["+refs/heads/topic:refs/remotes/origin/topic"]));
        assert_eq!(payload["artifacts"][0]["paths"], json!(["out"]));
        assert_eq!(
            (&payload["artifacts"][1]["artifact_type"], &payload["artifacts"][1]["artifact_format"]),
            (&json!("junit"), &json!("gzip"))
        );
        assert_eq!(payload["artifacts"][1]["expire_in"], "1 day");
        for (key, value) in [
            ("A", "file"),
            ("B", "mine"),
            ("CI_COMMIT_TITLE", "Title"),
            ("CI_COMMIT_DESCRIPTION", "Body $HOME"),
            ("CI_COMMIT_BRANCH", "topic"),
            ("CI_DEFAULT_BRANCH", "trunk"),
            ("CI_CONFIG_PATH", ".gitlab-ci.yml"),
            ("CI_PIPELINE_ID", "7"),
            ("CI_PROJECT_PATH", "group/p"),
            ("CI_JOB_NAME", "job"),
        ] {
            assert_eq!(variable(&payload, key).unwrap()["value"], value, "{key}");
        }
        assert_eq!(variable(&payload, "CI_COMMIT_MESSAGE").unwrap()["raw"], true);
        assert_eq!(variable(&payload, "CI_JOB_TOKEN").unwrap()["masked"], true);
        assert_eq!(variable(&payload, "GIT_STRATEGY"), None);
    }

    #[tokio::test]
    async fn a_tag_is_fetched_as_a_tag() {
        let repository = Repository { is_tag: true, ref_name: "v1".into(), ..repository() };
        let (payload, _) = payload("job: {script: x}", Some(&repository), &[]).await;
        assert_eq!(payload["git_info"]["refspecs"], json!(["+refs/tags/v1:refs/tags/v1"]));
        assert_eq!(variable(&payload, "CI_COMMIT_TAG").unwrap()["value"], "v1");
        assert_eq!(payload["artifacts"], Value::Null);
    }

    #[tokio::test]
    async fn the_whole_history_is_cloned_whatever_the_job_says() {
        let repository = repository();
        let (payload, remark) = payload("job: {script: x, variables: {GIT_DEPTH: 50}}", Some(&repository), &[]).await;
        assert_eq!(payload["git_info"]["depth"], 0);
        assert_eq!(variable(&payload, "GIT_DEPTH").unwrap()["value"], "0");
        assert_eq!(remark.as_deref(), Some("GIT_DEPTH=50 is ignored: the whole history of HEAD is cloned"));
    }

    #[tokio::test]
    async fn without_a_repository_nothing_is_cloned() {
        let (payload, remark) = payload("job: {script: x, variables: {GIT_STRATEGY: clone}}", None, &[]).await;
        assert_eq!(variable(&payload, "GIT_STRATEGY").unwrap()["value"], "none");
        assert_eq!(remark, None);
        assert_eq!(payload["git_info"]["sha"], "0".repeat(40));
    }
}
