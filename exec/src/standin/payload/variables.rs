//! The payload's variables: predefined ones first, then the job's own. Order matters, the last wins.

use super::Parts;
use crate::standin::spec::Variable;
use serde_json::{Map, Value, json};

impl Parts<'_> {
    pub(super) fn variables(&self) -> Value {
        let mut all = self.predefined();
        all.extend(self.dependencies_dotenv());
        all.extend(self.job.spec.variables.iter().cloned());
        all.iter().map(entity).collect()
    }

    fn predefined(&self) -> Vec<Variable> {
        let (job, project, runner) = (self.job, self.project, self.runner);
        let spec = &job.spec;
        let base = &self.model.settings.external_url;
        let (scheme, host_and_port) = base.split_once("://").unwrap_or(("https", base));
        let (host, port) = match host_and_port.rsplit_once(':') {
            Some((host, port)) if port.parse::<u16>().is_ok() => (host, port),
            _ => (host_and_port, if scheme == "http" { "80" } else { "443" }),
        };
        let token = job.token.expose();
        let project_url = format!("{base}/{}", project.path);
        let namespace = project.path.rsplit_once('/').map_or("", |(namespace, _)| namespace);
        let root = namespace.split('/').next().unwrap_or_default();
        let slug = slug(&spec.git_ref);
        let tags = Value::from(runner.tags.iter().cloned().collect::<Vec<_>>()).to_string().replace("\",\"", "\", \"");
        let hidden = |key, value: String| Variable { public: false, ..Variable::new(key, value) };
        let mut list = vec![
            Variable::new("CI_PIPELINE_ID", job.pipeline.to_string()),
            Variable::new("CI_PIPELINE_URL", format!("{project_url}/-/pipelines/{}", job.pipeline)),
            Variable::new("CI_JOB_ID", job.id.to_string()),
            Variable::new("CI_JOB_URL", format!("{project_url}/-/jobs/{}", job.id)),
            Variable::secret("CI_JOB_TOKEN", token),
            Variable::new("CI_JOB_STARTED_AT", self.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
            Variable::new("CI_REGISTRY_USER", "gitlab-ci-token"),
            Variable::secret("CI_REGISTRY_PASSWORD", token),
            hidden("CI_REPOSITORY_URL", self.repository_url()),
            Variable::new("CI_JOB_NAME", spec.name.clone()),
            Variable::new("CI_JOB_NAME_SLUG", self::slug(&spec.name)),
            Variable::new("CI_JOB_STAGE", spec.stage.clone()),
            Variable::new("CI_NODE_TOTAL", "1"),
            Variable::new("CI", "true"),
            Variable::new("GITLAB_CI", "true"),
            Variable::new("CI_SERVER_FQDN", host_and_port),
            Variable::new("CI_SERVER_URL", base.clone()),
            Variable::new("CI_SERVER_HOST", host),
            Variable::new("CI_SERVER_PORT", port),
            Variable::new("CI_SERVER_PROTOCOL", scheme),
            Variable::new("CI_SERVER_NAME", "GitLab"),
            Variable::new("CI_SERVER_VERSION", "19.3.0"),
            Variable::new("CI_SERVER_VERSION_MAJOR", "19"),
            Variable::new("CI_SERVER_VERSION_MINOR", "3"),
            Variable::new("CI_SERVER_VERSION_PATCH", "0"),
            Variable::new("CI_API_V4_URL", format!("{base}/api/v4")),
            Variable::new("CI_API_GRAPHQL_URL", format!("{base}/api/graphql")),
            Variable::new("CI_PROJECT_ID", project.id.0.to_string()),
            Variable::new("CI_PROJECT_NAME", project.name()),
            Variable::new("CI_PROJECT_PATH", project.path.clone()),
            Variable::new("CI_PROJECT_PATH_SLUG", self::slug(&project.path)),
            Variable::new("CI_PROJECT_NAMESPACE", namespace),
            Variable::new("CI_PROJECT_ROOT_NAMESPACE", root),
            Variable::new("CI_PROJECT_URL", project_url),
            Variable::new("CI_PROJECT_VISIBILITY", if project.public { "public" } else { "private" }),
            Variable::new("CI_DEFAULT_BRANCH", "main"),
            Variable::new("CI_PIPELINE_SOURCE", spec.pipeline_source.clone()),
            Variable::new("CI_COMMIT_SHA", spec.sha.clone()),
            Variable::new("CI_COMMIT_SHORT_SHA", spec.sha.get(..8).unwrap_or(&spec.sha)),
            Variable::new("CI_COMMIT_BEFORE_SHA", spec.before_sha.clone()),
            Variable::new("CI_COMMIT_REF_NAME", spec.git_ref.clone()),
            Variable::new("CI_COMMIT_REF_SLUG", slug),
            Variable::new("CI_COMMIT_REF_PROTECTED", spec.protected.to_string()),
            Variable::new("CI_RUNNER_ID", runner.id.0.to_string()),
            Variable::new("CI_RUNNER_DESCRIPTION", runner.description.clone()),
            Variable::new("CI_RUNNER_TAGS", tags),
        ];
        if spec.is_tag {
            list.push(Variable::new("CI_COMMIT_TAG", spec.git_ref.clone()));
        } else if !spec.merge_request_ref {
            list.push(Variable::new("CI_COMMIT_BRANCH", spec.git_ref.clone()));
        }
        if spec.triggered {
            list.push(Variable::new("CI_PIPELINE_TRIGGERED", "true"));
        }
        if let Some(registry) = &self.model.settings.registry {
            list.push(Variable::new("CI_REGISTRY", registry.clone()));
            list.push(Variable::new("CI_REGISTRY_IMAGE", format!("{registry}/{}", project.path.to_lowercase())));
        }
        list
    }

    /// What the dotenv reports of the dependencies hand on.
    fn dependencies_dotenv(&self) -> Vec<Variable> {
        let jobs = self.job.spec.dependencies.iter().filter_map(|id| self.model.jobs.get(id));
        let dotenv = jobs.flat_map(|job| job.dotenv.iter());
        dotenv.map(|(key, value)| Variable { public: false, ..Variable::new(key.clone(), value.clone()) }).collect()
    }
}

fn entity(variable: &Variable) -> Value {
    let mut members = Map::new();
    members.insert("key".into(), json!(variable.key));
    members.insert("value".into(), json!(variable.value));
    members.insert("public".into(), json!(variable.public));
    members.insert("masked".into(), json!(variable.masked));
    if variable.file {
        members.insert("file".into(), json!(true));
    }
    if variable.raw {
        members.insert("raw".into(), json!(true));
    }
    Value::Object(members)
}

/// Lower case, everything but letters and digits a dash, at most 63 characters, no dash at the ends.
fn slug(text: &str) -> String {
    let dashed: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).take(63).collect();
    dashed.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_slug_is_fit_for_host_names() {
        assert_eq!(super::slug("feature/Fix_it!"), "feature-fix-it");
        assert_eq!(super::slug(&"x".repeat(80)).len(), 63);
    }
}
