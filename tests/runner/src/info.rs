//! What the stand-in says about itself: `info` of `jobs/request` and `PUT`, in the order of 19.3.

use serde_json::value::RawValue;

/// The 31 features that gitlab-runner 19.3 sends with the shell executor, in its order (recorded). Three are told although
/// the stand-in does not do them (cache, secrets, native steps): images learn `info` from whoever runs in them, and a job
/// must not be failed by GitLab for want of a flag that the official runner has.
const FEATURES: [(&str, bool); 31] = [
    ("variables", true),
    ("image", false),
    ("services", false),
    ("artifacts", true),
    ("cache", true),
    ("fallback_cache_keys", true),
    ("shared", true),
    ("upload_multiple_artifacts", true),
    ("upload_raw_artifacts", true),
    ("session", true),
    ("terminal", true),
    ("refspecs", true),
    ("masking", true),
    ("proxy", false),
    ("raw_variables", true),
    ("artifacts_exclude", true),
    ("multi_build_steps", true),
    ("trace_reset", true),
    ("trace_checksum", true),
    ("trace_size", true),
    ("vault_secrets", true),
    ("cancelable", true),
    ("return_exit_code", true),
    ("service_variables", false),
    ("service_multiple_aliases", false),
    ("image_executor_opts", false),
    ("service_executor_opts", false),
    ("cancel_gracefully", true),
    ("native_steps_integration", true),
    ("two_phase_job_commit", true),
    ("job_inputs", true),
];

/// What 19.3 sends besides with the docker executor (by hand). The stand-in does not do all of them.
const DOCKER_FEATURES: [&str; 6] = [
    "image",
    "services",
    "service_variables",
    "service_multiple_aliases",
    "image_executor_opts",
    "service_executor_opts",
];

/// `info` as JSON, members in the recorded order.
pub(crate) fn json(executor: &str) -> Box<RawValue> {
    let is_on = |name: &str, on: bool| on || executor == "docker" && DOCKER_FEATURES.contains(&name);
    let features: Vec<String> = FEATURES.iter().map(|(name, on)| format!("\"{name}\":{}", is_on(name, *on))).collect();
    let text = format!(
        "{{\"name\":\"gitlab-runner\",\"version\":\"{}\",\"revision\":\"{}\",\"platform\":\"{}\",\"architecture\":\"{}\",\
         \"executor\":\"{executor}\",\"shell\":\"bash\",\"features\":{{{}}},\"config\":{{\"gpus\":\"\"}}}}",
        crate::VERSION,
        crate::REVISION,
        platform(),
        architecture(),
        features.join(","),
    );
    RawValue::from_string(text).expect("constants without quotes make valid JSON")
}

/// The `User-Agent` of all calls but the first direct download.
pub(crate) fn user_agent() -> String {
    format!("gitlab-runner {} (standin; dayfly; {}/{})", crate::VERSION, platform(), architecture())
}

/// The operating system by Go's name.
pub(crate) fn platform() -> &'static str {
    std::env::consts::OS
}

/// The processor by Go's name.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_names_the_stand_in_and_all_features() {
        let value: serde_json::Value = serde_json::from_str(json("docker").get()).expect("valid");
        assert_eq!(value["version"], "19.3.0-standin");
        assert_eq!(value["features"].as_object().expect("an object").len(), 31);
        assert_eq!(value["features"]["cancel_gracefully"], true);
        assert_eq!(value["config"]["gpus"], "");
        assert_eq!((&value["executor"], &value["features"]["services"]), (&"docker".into(), &true.into()));
        let shell: serde_json::Value = serde_json::from_str(json("shell").get()).expect("valid");
        assert_eq!((&shell["executor"], &shell["features"]["services"]), (&"shell".into(), &false.into()));
    }
}
