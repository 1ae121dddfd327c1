//! From `.gitlab-ci.yml` shapes to payload shapes: image, services, artifacts, cache and the like.

use crate::standin::project::Project;
use crate::standin::spec::JobSpec;
use serde_json::{Map, Value, json};

/// File names that reports get when the job does not choose, and their formats; all others are raw
/// and named `gl-<type>-report.json`, as GitLab's table has it.
const GZIP_REPORTS: [(&str, &str); 10] = [
    ("junit", "junit.xml"),
    ("metrics", "metrics.txt"),
    ("metrics_referee", "metrics-referee.txt"),
    ("network_referee", "network-referee.txt"),
    ("dotenv", ".env"),
    ("cobertura", "cobertura-coverage.xml"),
    ("jacoco", "jacoco-coverage.xml"),
    ("cyclonedx", "gl-sbom.cdx.json"),
    ("annotations", "gl-annotations.json"),
    ("repository_xray", "gl-repository-xray.json"),
];

/// Format in which a report must be uploaded; `None`: no such type.
pub(in crate::standin) fn artifact_format(kind: &str) -> Option<&'static str> {
    match kind {
        "archive" | "lsif" => Some("zip"),
        "metadata" => Some("gzip"),
        "trace" => Some("raw"),
        kind if GZIP_REPORTS.iter().any(|(name, _)| *name == kind) => Some("gzip"),
        "cluster_applications" => Some("gzip"),
        "codequality"
        | "sast"
        | "secret_detection"
        | "dependency_scanning"
        | "container_scanning"
        | "cluster_image_scanning"
        | "dast"
        | "license_scanning"
        | "license_management"
        | "performance"
        | "browser_performance"
        | "load_performance"
        | "terraform"
        | "requirements"
        | "requirements_v2"
        | "coverage_fuzzing"
        | "api_fuzzing"
        | "accessibility" => Some("raw"),
        _ => None,
    }
}

fn report_filename(kind: &str) -> String {
    match kind {
        kind if GZIP_REPORTS.iter().any(|(name, _)| *name == kind) => {
            GZIP_REPORTS.iter().find(|(name, _)| *name == kind).map(|(_, file)| (*file).to_owned()).unwrap_or_default()
        }
        "codequality" => "gl-code-quality-report.json".into(),
        "terraform" => "tfplan.json".into(),
        "performance" => "performance.json".into(),
        "browser_performance" => "browser-performance.json".into(),
        "load_performance" => "load-performance.json".into(),
        "requirements" => "requirements.json".into(),
        "requirements_v2" => "requirements_v2.json".into(),
        "lsif" => "lsif.json".into(),
        kind => format!("gl-{}-report.json", kind.replace('_', "-")),
    }
}

/// A list of texts out of a list, a single text, or nothing.
fn texts(value: Option<&Value>) -> Value {
    match value {
        Some(Value::Array(list)) => Value::Array(list.clone()),
        Some(Value::String(text)) => json!([text]),
        _ => json!([]),
    }
}

fn or_null(value: Option<&Value>) -> Value {
    value.cloned().unwrap_or(Value::Null)
}

fn list_or_null(value: Option<&Value>) -> Value {
    match value {
        None | Some(Value::Null) => Value::Null,
        value => texts(value),
    }
}

fn ports(value: Option<&Value>) -> Value {
    let Some(Value::Array(list)) = value else { return json!([]) };
    list.iter()
        .map(|port| match port {
            Value::Object(_) => port.clone(),
            number => json!({ "number": number, "protocol": "http", "name": "default_port" }),
        })
        .collect()
}

/// `executor_opts`, or the newer spelling `docker:`/`kubernetes:` beside the name.
fn executor_options(image: &Value) -> Value {
    if let Some(options) = image.get("executor_opts") {
        return options.clone();
    }
    let mut options = Map::new();
    for executor in ["docker", "kubernetes"] {
        if let Some(value) = image.get(executor) {
            options.insert(executor.into(), value.clone());
        }
    }
    Value::Object(options)
}

pub(super) fn image(image: Option<&Value>) -> Value {
    match image {
        None | Some(Value::Null) => Value::Null,
        Some(Value::String(name)) => {
            json!({ "name": name, "entrypoint": null, "ports": [], "executor_opts": {}, "pull_policy": null })
        }
        Some(image) => json!({
            "name": or_null(image.get("name")),
            "entrypoint": list_or_null(image.get("entrypoint")),
            "ports": ports(image.get("ports")),
            "executor_opts": executor_options(image),
            "pull_policy": list_or_null(image.get("pull_policy")),
        }),
    }
}

pub(super) fn services(services: Option<&Value>) -> Value {
    let Some(Value::Array(list)) = services else { return json!([]) };
    list.iter().map(service).collect()
}

fn service(service: &Value) -> Value {
    let mut members = match image(Some(service)) {
        Value::Object(members) => members,
        other => return other,
    };
    members.insert("alias".into(), or_null(service.get("alias")));
    members.insert("command".into(), list_or_null(service.get("command")));
    let variables = match service {
        Value::String(_) => Value::Null,
        service => match service.get("variables") {
            Some(Value::Object(map)) => map.iter().map(|(key, value)| json!({ "key": key, "value": value })).collect(),
            Some(Value::Array(list)) => Value::Array(list.clone()),
            _ => json!([]),
        },
    };
    members.insert("variables".into(), variables);
    Value::Object(members)
}

pub(super) fn artifacts(artifacts: Option<&Value>) -> Value {
    let Some(artifacts) = artifacts.filter(|artifacts| artifacts.is_object()) else { return Value::Null };
    let expire_in = or_null(artifacts.get("expire_in"));
    let mut entries = Vec::new();
    let untracked = artifacts.get("untracked");
    if artifacts.get("paths").is_some() || untracked == Some(&Value::Bool(true)) {
        let mut archive = json!({
            "name": or_null(artifacts.get("name")),
            "paths": list_or_null(artifacts.get("paths")),
            "when": or_null(artifacts.get("when")),
            "expire_in": expire_in,
            "artifact_type": "archive",
            "artifact_format": "zip",
        });
        for key in ["untracked", "exclude"] {
            if let Some(value) = artifacts.get(key) {
                archive[key] = value.clone();
            }
        }
        entries.push(archive);
    }
    if let Some(Value::Object(reports)) = artifacts.get("reports") {
        for (kind, paths) in reports {
            entries.push(report(kind, paths, &expire_in));
        }
    }
    if entries.is_empty() { Value::Null } else { Value::Array(entries) }
}

fn report(kind: &str, paths: &Value, expire_in: &Value) -> Value {
    let (kind, paths) = match (kind, paths.get("coverage_format"), paths.get("path")) {
        ("coverage_report", Some(format), Some(path)) => (format.as_str().unwrap_or("cobertura"), json!([path])),
        _ => (kind, texts(Some(paths))),
    };
    json!({
        "name": report_filename(kind),
        "paths": paths,
        "when": "always",
        "artifact_type": kind,
        "artifact_format": artifact_format(kind).unwrap_or("raw"),
        "expire_in": expire_in,
    })
}

pub(super) fn caches(caches: Option<&Value>, project: &Project, protected: bool) -> Value {
    let list = match caches {
        None | Some(Value::Null) => return json!([]),
        Some(Value::Array(list)) => list.as_slice(),
        Some(entry) => std::slice::from_ref(entry),
    };
    list.iter().map(|entry| cache(entry, project, protected)).collect()
}

fn cache(entry: &Value, project: &Project, protected: bool) -> Value {
    let unprotect = entry.get("unprotect") == Some(&Value::Bool(true));
    let mut suffix = String::new();
    if let Some(index) = project.jobs_cache_index.filter(|index| *index > 0) {
        suffix = format!("-{index}");
    }
    if project.separated_caches {
        suffix += if protected && !unprotect { "-protected" } else { "-non_protected" };
    }
    let key = match entry.get("key") {
        Some(Value::String(key)) => key.clone(),
        // `key:files` hashes the files' commits; no repository is at hand here, the prefix is.
        Some(key) => format!("{}-default", key.get("prefix").and_then(Value::as_str).unwrap_or("0_files")),
        None => "default".into(),
    };
    let fallback: Vec<String> = match entry.get("fallback_keys") {
        Some(Value::Array(keys)) => keys.iter().filter_map(Value::as_str).map(|key| format!("{key}{suffix}")).collect(),
        _ => Vec::new(),
    };
    json!({
        "key": format!("{key}{suffix}"),
        "untracked": entry.get("untracked").cloned().unwrap_or(Value::Bool(false)),
        "paths": texts(entry.get("paths")),
        "policy": entry.get("policy").cloned().unwrap_or_else(|| json!("pull-push")),
        "when": entry.get("when").cloned().unwrap_or_else(|| json!("on_success")),
        "fallback_keys": fallback,
    })
}

/// Hooks as a map of name to script, or already as a list.
pub(super) fn hooks(hooks: Option<&Value>) -> Value {
    match hooks {
        Some(Value::Array(list)) => Value::Array(list.clone()),
        Some(Value::Object(map)) => {
            map.iter().map(|(name, script)| json!({ "name": name, "script": texts(Some(script)) })).collect()
        }
        _ => json!([]),
    }
}

/// Declared inputs with what was given, else their default.
pub(super) fn inputs(spec: &JobSpec) -> Value {
    let Some(declared) = &spec.inputs_spec else { return json!([]) };
    let entry = |(key, declaration): (&String, &Value)| {
        let content = spec.inputs.get(key).or_else(|| declaration.get("default")).cloned().unwrap_or(Value::Null);
        let kind = declaration.get("type").cloned().unwrap_or_else(|| json!("string"));
        json!({ "key": key, "value": { "content": content, "type": kind } })
    };
    declared.iter().map(entry).collect()
}

/// The command line of a release step.
pub(super) fn release_script(release: &Value) -> Vec<String> {
    let tag = release.get("tag_name").and_then(Value::as_str).unwrap_or("$CI_COMMIT_TAG");
    let quote = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let mut command = format!("glab -R $CI_PROJECT_PATH release create {}", quote(tag));
    for (member, option) in [("name", "--name"), ("description", "--notes"), ("ref", "--ref")] {
        if let Some(value) = release.get(member).and_then(Value::as_str) {
            command.push_str(&format!(" {option} {}", quote(value)));
        }
    }
    vec![command]
}

/// Secrets with the address of their provider, which GitLab takes from the job's variables.
pub(super) fn secrets(spec: &JobSpec) -> Value {
    let Some(Value::Object(secrets)) = &spec.secrets else { return json!({}) };
    let variable =
        |key: &str| spec.variables.iter().rev().find(|variable| variable.key == key).map(|v| v.value.clone());
    let mut built = Map::new();
    for (name, secret) in secrets {
        let mut secret = secret.clone();
        let token = secret.get("token").cloned().unwrap_or_else(|| json!("${CI_JOB_JWT}"));
        if let Some(vault) = secret.get_mut("vault") {
            vault["server"] = json!({
                "url": variable("VAULT_SERVER_URL"),
                "namespace": variable("VAULT_NAMESPACE"),
                "auth": {
                    "name": "jwt",
                    "path": variable("VAULT_AUTH_PATH").unwrap_or_else(|| "jwt".into()),
                    "data": { "jwt": token, "role": variable("VAULT_AUTH_ROLE") },
                },
            });
        }
        built.insert(name.clone(), secret);
    }
    Value::Object(built)
}

/// Policy members, null where there is no policy.
pub(super) fn policy(policy: Option<&Value>) -> Value {
    let Some(policy) = policy.filter(|policy| !policy.is_null()) else { return Value::Null };
    json!({
        "execution_policy_job": policy.get("execution_policy_job").cloned().unwrap_or(Value::Bool(true)),
        "policy_name": or_null(policy.get("name").or_else(|| policy.get("policy_name"))),
        "policy_variables_override_allowed": policy
            .get("policy_variables_override_allowed")
            .or_else(|| policy.pointer("/variables_override/allowed"))
            .cloned()
            .unwrap_or(Value::Null),
        "policy_variables_override_exceptions": policy
            .get("policy_variables_override_exceptions")
            .or_else(|| policy.pointer("/variables_override/exceptions"))
            .cloned()
            .unwrap_or(Value::Null),
    })
}
