//! What does a job's author ask for, and what has GitLab said of the job? Read from the payload alone.
//!
//! [`Asked`] is the author's: anybody who may change the pipeline may set variables. [`Source`] is GitLab's own word, of
//! members that no variable changes (`CI_PROJECT_PATH`, `GITLAB_USER_LOGIN` and the like can be overridden by the job).

use super::{Object, get};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use url::Url;

/// Characters of a wish that are kept: enough to quote it.
const WISH_CHARS_MAX: usize = 255;

/// Bytes of a project's path and of a ref that are kept; GitLab's own limits are below.
const PATH_BYTES_MAX: usize = 4096;

/// What the author asks for, as it was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `DAYFLY_IMAGE`.
    pub image: Option<String>,
    /// `DAYFLY_CPUS`.
    pub cpus: Option<String>,
    /// `DAYFLY_MEMORY`.
    pub memory: Option<String>,
    /// `DAYFLY_DISK`.
    pub disk: Option<String>,
    /// `image:`, with the job's variables in their places, as the runner would put them.
    pub container: Option<String>,
    /// `DAYFLY_CLONE` says `off`, or the job wants no sources: nothing of its repository is wanted here.
    pub no_clone: bool,
}

/// Whose job it is, and of what, by GitLab's word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// `job_info.project_full_path`.
    pub project: Option<String>,
    /// The path of `git_info.repo_url` without `.git`: that of the project, behind the one of GitLab's own URL. Older
    /// GitLabs say no other.
    pub repository: Option<String>,
    /// `git_info.ref`.
    pub git_ref: Option<String>,
    /// `git_info.protected`, since GitLab 18.3.
    pub protected: Option<bool>,
    /// `job_info.user_id`.
    pub user_id: Option<u64>,
    /// `job_info.project_id`.
    pub project_id: Option<u64>,
    /// `git_info.sha`.
    pub sha: Option<String>,
    /// `git_info.refspecs`: what the runner fetches.
    pub refspecs: Vec<String>,
}

impl Source {
    /// The project's whole path at the GitLab of this URL.
    #[must_use]
    pub fn project_at(&self, gitlab: &Url) -> Option<&str> {
        let of_repository = || {
            let below = self.repository.as_deref()?.strip_prefix(gitlab.path().trim_end_matches('/'))?;
            below.strip_prefix('/').filter(|path| !path.is_empty())
        };
        self.project.as_deref().or_else(of_repository)
    }
}

pub(super) fn asked(object: &Object<'_>, variables: &[Object<'_>]) -> Asked {
    let mut values = BTreeMap::new();
    for variable in variables {
        let Some(key) = get::<String>(variable, "key") else { continue };
        // The value of such a variable is a path in the guest.
        if get::<bool>(variable, "file") != Some(true) {
            values.insert(key, get::<String>(variable, "value").unwrap_or_default());
        }
    }
    let wish = |name: &str| values.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
    let kept = |text: &str| text.chars().take(WISH_CHARS_MAX).collect::<String>();
    let image: Option<Object<'_>> =
        object.get("image").and_then(|raw: &&RawValue| serde_json::from_str(raw.get()).ok());
    let container = image.and_then(|image| get::<String>(&image, "name"));
    Asked {
        image: wish("DAYFLY_IMAGE").map(kept),
        cpus: wish("DAYFLY_CPUS").map(kept),
        memory: wish("DAYFLY_MEMORY").map(kept),
        disk: wish("DAYFLY_DISK").map(kept),
        container: container.map(|name| expanded(&name, &values)).filter(|name| !name.is_empty()),
        no_clone: wish("DAYFLY_CLONE").is_some_and(|word| matches!(word, "off" | "false" | "no" | "0"))
            || wish("GIT_STRATEGY").is_some_and(|word| matches!(word, "none" | "empty")),
    }
}

pub(super) fn source(object: &Object<'_>) -> Source {
    let info: Object<'_> = get(object, "job_info").unwrap_or_default();
    let git: Object<'_> = get(object, "git_info").unwrap_or_default();
    let path = |text: String| Some(text).filter(|text| !text.is_empty() && text.len() <= PATH_BYTES_MAX);
    let repository = get::<String>(&git, "repo_url").and_then(path).and_then(|url| Url::parse(&url).ok());
    Source {
        project: get::<String>(&info, "project_full_path").and_then(path),
        repository: repository.map(|url| url.path().strip_suffix(".git").unwrap_or(url.path()).to_owned()),
        git_ref: get::<String>(&git, "ref").and_then(path),
        protected: get(&git, "protected"),
        user_id: get(&info, "user_id"),
        project_id: get(&info, "project_id").filter(|id| *id > 0),
        sha: get::<String>(&git, "sha").and_then(path),
        refspecs: get(&git, "refspecs").unwrap_or_default(),
    }
}

/// `text` with `$NAME` and `${NAME}` replaced once, what is not known by nothing, and cut.
fn expanded(text: &str, values: &BTreeMap<String, String>) -> String {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = text.trim();
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let behind = &rest[at + 1..];
        let (name, after) = match behind.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, after)) => (name, after),
            None => behind.split_at(behind.find(|c| !is_name(c)).unwrap_or(behind.len())),
        };
        if name.is_empty() || !name.chars().all(is_name) {
            out.push('$');
            rest = behind;
        } else {
            out.extend(values.get(name).into_iter().flat_map(|value| value.chars()).take(WISH_CHARS_MAX));
            rest = after;
        }
        if out.len() > WISH_CHARS_MAX * 4 {
            break;
        }
    }
    out.push_str(rest);
    out.chars().take(WISH_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use crate::gitlab::JobPayload;
    use bytes::Bytes;
    use serde_json::{Value, json};

    fn parse(more: Value) -> JobPayload {
        let mut payload = json!({"id": 7, "token": "glcbt-x"});
        payload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        JobPayload::parse(Bytes::from(payload.to_string()), None).unwrap()
    }

    #[test]
    fn wishes_are_variables_and_the_last_one_wins() {
        let payload = parse(json!({
            "variables": [
                {"key": "DAYFLY_MEMORY", "value": "1GiB"}, {"key": "DAYFLY_MEMORY", "value": " 2GiB "},
                {"key": "DAYFLY_CPUS", "value": ""}, {"key": "DAYFLY_DISK", "value": null},
                {"key": "DAYFLY_IMAGE", "value": "x".repeat(1000)},
                {"key": "SUITE", "value": "13"}, {"key": "CERT", "value": "pem", "file": true},
            ],
            "image": {"name": "debian-${SUITE}-$WHAT$CERT-$-shell$"},
        }));
        assert_eq!(payload.asked.memory.as_deref(), Some("2GiB"));
        assert_eq!((&payload.asked.cpus, &payload.asked.disk), (&None, &None));
        assert_eq!(payload.asked.image.map(|image| image.len()), Some(255));
        assert_eq!(payload.asked.container.as_deref(), Some("debian-13--$-shell$"));
    }

    #[test]
    fn what_gitlab_says_of_a_job_is_no_variable() {
        let payload = parse(json!({
            "variables": [{"key": "CI_PROJECT_PATH", "value": "evil/twin"}, {"key": "GITLAB_USER_ID", "value": "1"}],
            "job_info": {"project_full_path": "group/project", "user_id": 31337},
            "git_info": {"ref": "main", "protected": true, "repo_url": "https://t:x@g.example/gitlab/group/project.git"},
        }));
        let root = "https://g.example/gitlab".parse().unwrap();
        assert_eq!(payload.source.project_at(&root), Some("group/project"));
        assert_eq!((payload.source.git_ref.as_deref(), payload.source.protected), (Some("main"), Some(true)));
        assert_eq!(payload.source.user_id, Some(31337));
    }

    /// GitLabs of before name the project in the address of its repository alone.
    #[test]
    fn an_older_gitlab_names_the_project_by_its_repository() {
        let of = |url: &str, gitlab: &str| {
            let payload = parse(json!({"git_info": {"repo_url": url, "protected": null}}));
            assert_eq!(payload.source.protected, None);
            payload.source.project_at(&gitlab.parse().unwrap()).map(str::to_owned)
        };
        assert_eq!(of("https://g.example/a/b/c.git", "https://g.example").as_deref(), Some("a/b/c"));
        assert_eq!(of("https://g.example/lab/a/b.git", "https://g.example/lab/").as_deref(), Some("a/b"));
        assert_eq!(of("https://g.example/a/b.git", "https://g.example/lab"), None);
        assert_eq!(of("no address", "https://g.example"), None);
    }
}
