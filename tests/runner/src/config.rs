//! The official runner's config.toml, as far as the stand-in obeys it; other keys are ignored, as there.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Why there is no runner to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("read `{0}`")]
    Read(PathBuf, #[source] std::io::Error),
    /// The file is no config.toml.
    #[error("parse `{0}`")]
    Parse(PathBuf, #[source] Box<toml::de::Error>),
    /// No `[[runners]]` has this name.
    #[error("no runner is named `{0}`")]
    NoRunner(String),
    /// A key without which no runner can work.
    #[error("runner has no {0}")]
    Missing(&'static str),
    /// Only two are done here.
    #[error("executor `{0}` is not known to this stand-in, only `shell` and `docker`")]
    Executor(String),
    /// Only plain HTTP is spoken: in a guest the URL is the relay's.
    #[error("url `{0}` is not plain http")]
    Url(String),
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    runners: Vec<Runner>,
}

/// One `[[runners]]` entry.
#[derive(Clone, Deserialize)]
#[serde(default)]
#[derive(Default)]
pub(crate) struct Runner {
    /// Shown in the log's second line, and what `-r` looks for.
    pub(crate) name: String,
    /// Base URL of GitLab, without `/api/v4`.
    pub(crate) url: String,
    /// The runner token.
    pub(crate) token: String,
    /// `shell` or `docker`.
    pub(crate) executor: String,
    /// Where projects are checked out; empty: `builds` in the working directory.
    pub(crate) builds_dir: String,
    /// Base of clone URLs in place of the payload's; empty: the payload's `repo_url`.
    pub(crate) clone_url: String,
    /// GitLab's chain, given to git and to the job as a file variable. A file that is missing is ignored, as there.
    #[serde(rename = "tls-ca-file")]
    pub(crate) tls_ca_file: String,
    /// Bytes of a job's log at most, in KiB; 0: 4096.
    pub(crate) output_limit: u64,
    /// Tries of the final update; 0: 10.
    pub(crate) job_status_final_update_retry_limit: u32,
    /// `KEY=value` lines that every job gets before its own variables.
    pub(crate) environment: Vec<String>,
    /// Script before the clone.
    pub(crate) pre_get_sources_script: String,
    /// Script after the clone.
    pub(crate) post_get_sources_script: String,
    /// Script before a step's own.
    pub(crate) pre_build_script: String,
    /// Script after a step's own.
    pub(crate) post_build_script: String,
    /// Where caches are kept.
    pub(crate) cache: Cache,
    /// `FF_…` switches; they win over a job's variables.
    pub(crate) feature_flags: BTreeMap<String, bool>,
    /// Of the executor `docker`.
    pub(crate) docker: Docker,
}

/// `[runners.docker]`.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Docker {
    /// The image of a job that names none.
    pub(crate) image: String,
    /// Looked for, no more.
    pub(crate) helper_image: String,
    /// `HOST:CONTAINER` directories.
    pub(crate) volumes: Vec<String>,
    /// Whether containers may do all.
    pub(crate) privileged: bool,
    /// The first counts.
    pub(crate) pull_policy: Vec<String>,
}

/// `[runners.cache]`, as far as it is obeyed: plain HTTP, and a store that is shared.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Cache {
    /// `s3`; empty: there is none.
    #[serde(rename = "Type")]
    pub(crate) kind: String,
    pub(crate) s3: S3,
}

/// `[runners.cache.s3]`.
#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct S3 {
    /// Host, or host and port.
    pub(crate) server_address: String,
    /// The first part of each path.
    pub(crate) bucket_name: String,
}

impl Runner {
    /// Reads the entry `name` of the config.toml at `path`.
    ///
    /// # Errors
    /// [`ConfigError`]: no file, no TOML, no such name, or an entry that this program cannot serve.
    pub(crate) fn load(path: &Path, name: &str) -> Result<Self, ConfigError> {
        if name.is_empty() {
            // The official runner then takes its flags, of which there are none here.
            return Err(ConfigError::Missing("name given (-r)"));
        }
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read(path.to_owned(), error))?;
        let file: File = toml::from_str(&text).map_err(|error| ConfigError::Parse(path.to_owned(), Box::new(error)))?;
        let runner = file
            .runners
            .into_iter()
            .find(|runner| runner.name == name)
            .ok_or_else(|| ConfigError::NoRunner(name.to_owned()))?;
        runner.check()?;
        Ok(runner)
    }

    fn check(&self) -> Result<(), ConfigError> {
        match () {
            () if self.url.is_empty() => Err(ConfigError::Missing("url")),
            () if self.token.is_empty() => Err(ConfigError::Missing("token")),
            () if !self.url.starts_with("http://") => Err(ConfigError::Url(self.url.clone())),
            () if !["shell", "docker"].contains(&self.executor.as_str()) => {
                Err(ConfigError::Executor(self.executor.clone()))
            }
            () => Ok(()),
        }
    }

    /// The first nine characters of the runner token after its prefix.
    pub(crate) fn short_token(&self) -> String {
        short_token(&self.token)
    }

    /// Whether a feature flag is on: config, then the job's variable, then the flag's default.
    pub(crate) fn feature(&self, name: &str, job: Option<&str>, default: bool) -> bool {
        let job = job.and_then(|value| match value {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
            _ => None,
        });
        self.feature_flags.get(name).copied().or(job).unwrap_or(default)
    }
}

/// What of a token may be shown: nine characters after its prefix (`glrt-`, `glrt-t1_`, `glcbt-`…), as
/// gitlab-runner from 18.2 on derives it; cache paths and build directories carry it too.
pub(crate) fn short_token(token: &str) -> String {
    let rest = ["glrtr-", "glrt-", "glcbt-", "GR1348941"]
        .iter()
        .find_map(|prefix| token.strip_prefix(prefix))
        .unwrap_or(token);
    let rest = match rest.as_bytes() {
        [b't', b'1'..=b'3', b'_', ..] => &rest[3..],
        _ => rest,
    };
    rest.chars().take(9).collect()
}

/// This process's system id: from `/etc/machine-id` at start, as the official runner does.
pub(crate) fn system_id() -> String {
    match std::fs::read_to_string("/etc/machine-id") {
        Ok(id) if !id.trim().is_empty() => dayfly_guest_config::system_id(id.trim()),
        _ => format!("r_{}", crate::random_hex(12)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_short(token: &str, expected: &str) {
        assert_eq!(short_token(token), expected, "of {token}");
    }

    #[test]
    fn a_short_token_is_nine_characters_after_the_whole_prefix() {
        check_short("glrt-t1_FAKErunner0123456789", "FAKErunne");
        check_short("glrt-FAKErunner", "FAKErunne");
        check_short("glcbt-64_FAKEjobtoken", "64_FAKEjo");
        check_short("t1_abc", "abc");
        check_short("plain-token-without-prefix", "plain-tok");
    }

    #[test]
    fn an_entry_is_found_by_its_name_and_unknown_keys_are_ignored() {
        let file: File = toml::from_str(
            "concurrent = 1\n[[runners]]\nname = \"a\"\n[[runners]]\nname = \"b \\\"x\\\"\"\nurl = \"http://192.0.2.1\"\n\
             token = \"t\"\nexecutor = \"shell\"\ntls-ca-file = \"/ca\"\nsurprise = 3\n[runners.feature_flags]\nFF_TIMESTAMPS = false\n",
        )
        .expect("valid TOML");
        let runner = &file.runners[1];
        assert_eq!((runner.name.as_str(), runner.tls_ca_file.as_str()), ("b \"x\"", "/ca"));
        runner.check().expect("usable");
        assert!(!runner.feature("FF_TIMESTAMPS", Some("true"), true), "the config wins over the job");
    }

    #[test]
    fn a_job_variable_decides_where_the_config_is_silent() {
        let runner = Runner::default();
        assert!(!runner.feature("FF_TIMESTAMPS", Some("false"), true));
        assert!(runner.feature("FF_TIMESTAMPS", Some("maybe"), true), "no boolean: the default");
    }

    #[test]
    fn another_executor_is_refused() {
        let runner = Runner {
            url: "http://192.0.2.1".to_owned(),
            token: "t".to_owned(),
            executor: "custom".to_owned(),
            ..Runner::default()
        };
        assert!(matches!(runner.check(), Err(ConfigError::Executor(name)) if name == "custom"));
    }
}
