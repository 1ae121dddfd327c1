//! The job as GitLab sends it with a 201, as far as the stand-in reads it.

use serde::{Deserialize, Deserializer};

/// The answer to `jobs/request`. Unknown members are ignored; `null` is like missing.
#[derive(Clone, Deserialize)]
pub(crate) struct Job {
    /// Key of every later call.
    pub(crate) id: u64,
    /// The job token.
    pub(crate) token: String,
    #[serde(default = "yes")]
    pub(crate) allow_git_fetch: bool,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) git_info: GitInfo,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) runner_info: RunnerInfo,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) variables: Vec<Variable>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) steps: Vec<Step>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) artifacts: Vec<Artifact>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) cache: Vec<CacheEntry>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) dependencies: Vec<Dependency>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) features: Features,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) hooks: Vec<Hook>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) image: Image,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) services: Vec<Service>,
    /// Steps of the `run` keyword, as JSON in a string.
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) run: String,
    /// `X-Request-Id` of the 201, which git requests carry on; not part of the payload.
    #[serde(skip)]
    pub(crate) correlation_id: String,
}

/// The container image of the job.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Image {
    #[serde(deserialize_with = "or_default")]
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) pull_policy: Vec<String>,
}

/// A container beside the job's.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Service {
    #[serde(deserialize_with = "or_default")]
    pub(crate) name: String,
    /// Several, parted by blanks or commas.
    #[serde(deserialize_with = "or_default")]
    pub(crate) alias: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) command: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) variables: Vec<Variable>,
}

/// What to check out.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GitInfo {
    #[serde(deserialize_with = "or_default")]
    pub(crate) repo_url: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) repo_object_format: String,
    #[serde(rename = "ref", deserialize_with = "or_default")]
    pub(crate) reference: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) sha: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) refspecs: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) depth: u64,
}

/// Seconds that the job may run; 0: two hours.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RunnerInfo {
    #[serde(deserialize_with = "or_default")]
    pub(crate) timeout: u64,
}

/// One variable; the last of a name counts.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Variable {
    pub(crate) key: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) value: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) file: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) masked: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) raw: bool,
}

/// `script`, `after_script` or `release`.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Step {
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) script: Vec<String>,
}

/// One archive or report to upload.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Artifact {
    #[serde(deserialize_with = "or_default")]
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) untracked: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) paths: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) exclude: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) when: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) artifact_type: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) artifact_format: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) expire_in: String,
}

/// What a job leaves for later ones, and takes of earlier ones.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CacheEntry {
    #[serde(deserialize_with = "or_default")]
    pub(crate) key: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) untracked: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) policy: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) paths: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) when: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) fallback_keys: Vec<String>,
}

/// A job whose artifacts this one wants.
#[derive(Clone, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) id: u64,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) name: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) token: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) artifacts_file: ArtifactsFile,
}

/// Present only if the dependency has artifacts.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ArtifactsFile {
    #[serde(deserialize_with = "or_default")]
    pub(crate) filename: String,
}

/// What this GitLab understands.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Features {
    #[serde(deserialize_with = "or_default")]
    pub(crate) trace_sections: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) token_mask_prefixes: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) failure_reasons: Vec<String>,
}

/// `pre_get_sources_script` or `post_get_sources_script`.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Hook {
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) script: Vec<String>,
}

impl Job {
    /// Reads a 201's body.
    ///
    /// # Errors
    /// Whatever makes the official 19.3 refuse the payload too: no JSON, a member of a wrong type.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body)
    }

    /// The commands of a hook, if the job has it.
    pub(crate) fn hook(&self, name: &str) -> &[String] {
        self.hooks.iter().find(|hook| hook.name == name).map_or(&[], |hook| &hook.script)
    }

    /// A failure reason in words that this GitLab knows: three are always accepted, others only if listed.
    pub(crate) fn failure_reason(&self, reason: &'static str) -> &'static str {
        let known = |name: &str| self.features.failure_reasons.iter().any(|listed| listed == name);
        match reason {
            "script_failure" | "runner_system_failure" | "job_execution_timeout" => reason,
            listed if known(listed) => listed,
            "runner_configuration_error" => "script_failure",
            _ => "unknown_failure",
        }
    }
}

fn yes() -> bool {
    true
}

fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_and_missing_members_are_alike() {
        let job = Job::parse(
            br#"{"id": 9007199254740993, "token": "t", "cache": null, "services": null, "artifacts": null, "surprise": {},
                "variables": [{"key": "A", "value": null, "public": true}], "runner_info": {"timeout": null}}"#,
        )
        .expect("a payload");
        assert_eq!((job.id, job.variables[0].value.as_str(), job.runner_info.timeout), (9_007_199_254_740_993, "", 0));
    }

    #[test]
    fn an_id_of_the_wrong_type_is_refused() {
        assert!(Job::parse(br#"{"id": "7", "token": "t"}"#).is_err());
    }

    #[test]
    fn only_listed_reasons_are_sent() {
        let mut job = Job::parse(br#"{"id": 1, "token": "t"}"#).expect("a payload");
        assert_eq!(job.failure_reason("runner_interrupted"), "unknown_failure");
        assert_eq!(job.failure_reason("job_execution_timeout"), "job_execution_timeout");
        job.features.failure_reasons = vec!["runner_interrupted".to_owned()];
        assert_eq!(job.failure_reason("runner_interrupted"), "runner_interrupted");
        assert_eq!(job.failure_reason("job_canceled"), "unknown_failure");
    }
}
