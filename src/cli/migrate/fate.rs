//! What becomes of each key of gitlab-runner's.

use crate::machine_spec::PINNED_FLAGS;
use toml_edit::{Item, Value};

/// What becomes of a key.
#[derive(Debug)]
pub(super) enum Fate {
    /// Nothing worth a word: it is read elsewhere.
    Silent,
    /// A key of a section of the configuration.
    Top(&'static str, &'static str, Value),
    /// The pause between polls.
    PollInterval(String),
    /// A key of the runner's entry, and what is said.
    Key(&'static str, Value, String),
    /// A feature flag.
    Flag(String, bool),
    /// CPUs of the class.
    Cpus(i64),
    /// Memory of the class.
    MemoryMib(i64),
    /// A file of certificates or a key.
    Tls(&'static str, String),
    /// Nothing, and why.
    Left(String),
}

const MADE_HERE: &str = "dayfly makes each job's machine itself, fresh, and as its class says";
const OWN_DISK: &str = "each job has a disk of its own, which goes with it";

fn left(why: &str) -> Fate {
    Fate::Left(why.to_owned())
}

/// A value that is of another kind than gitlab-runner's.
fn odd() -> Fate {
    left("its value is of another kind than gitlab-runner's")
}

/// Whether a table of an entry's is looked into key by key.
pub(super) fn is_walked(path: &str) -> bool {
    matches!(path, "docker" | "kubernetes" | "feature_flags" | "custom_build_dir")
}

/// A key above the entries.
pub(super) fn of_top(key: &str, item: &Item) -> Fate {
    let number = item.as_integer();
    match key {
        "concurrent" => match number {
            Some(n) if n > 0 => Fate::Top("", "concurrent", n.into()),
            _ => odd(),
        },
        "check_interval" => match number {
            Some(n) if n <= 0 => left("it is the default, as here: 3 s"),
            Some(n) => Fate::PollInterval(format!("{}s", n.min(60))),
            None => odd(),
        },
        "log_level" => match item.as_str() {
            Some("debug") => Fate::Top("log", "level", "debug".into()),
            Some("info") => left("it is the default, as here"),
            Some("warn" | "warning") => Fate::Top("log", "level", "warn".into()),
            Some("error" | "fatal" | "panic") => Fate::Top("log", "level", "error".into()),
            _ => odd(),
        },
        "log_format" => match item.as_str() {
            Some("json") => Fate::Top("log", "format", "json".into()),
            Some("text" | "runner") => left("it is the default, as here: text"),
            _ => odd(),
        },
        "shutdown_timeout" => match number {
            Some(n) if n > 0 => Fate::Top("limits", "drain_timeout", format!("{n}s").into()),
            _ => odd(),
        },
        "session_server" => left("there are no web terminals of jobs; GitLab offers none for this runner"),
        "listen_address" => {
            left("gitlab-runner's own metrics are not dayfly's; docs/operators.md says where those are")
        }
        "sentry_dsn" => left("nothing is reported to others; errors are in the log"),
        "connection_max_age" => left("not needed: connections to GitLab are made anew every 15 min"),
        "experimental" => left("these are gitlab-runner's own"),
        "user" => left("the user of jobs is the image's, `gitlab-runner`, or root by the class's `run_as_root`"),
        _ => left("dayfly knows no such key"),
    }
}

/// A key of an entry, by its path below that.
pub(super) fn of_runner(path: &str, item: &Item) -> Fate {
    if let Some(flag) = path.strip_prefix("feature_flags.") {
        return match item.as_bool() {
            _ if PINNED_FLAGS.iter().any(|(pinned, _)| *pinned == flag) => left("dayfly sets this one"),
            Some(on) if flag.starts_with("FF_") => Fate::Flag(flag.to_owned(), on),
            _ => odd(),
        };
    }
    if let Some(fate) = of_executors(path, item) {
        return fate;
    }
    let text = item.as_str().filter(|text| !text.is_empty());
    let same = |key: &'static str| match text {
        Some(text) => Fate::Key(key, text.into(), "taken over".into()),
        None if item.as_str().is_some() => left("it is empty"),
        None => odd(),
    };
    match path {
        "name" | "url" | "token" => Fate::Silent,
        "limit" => match item.as_integer() {
            Some(0) => left("it is the default, as here: no limit but `concurrent`"),
            Some(n) if n > 0 => Fate::Key("limit", n.into(), "taken over".into()),
            _ => odd(),
        },
        "output_limit" => match item.as_integer() {
            Some(n) if n > 0 => {
                let mib = n.div_euclid(1024) + i64::from(n.rem_euclid(1024) > 0);
                Fate::Key("output_limit_mib", mib.into(), format!("output_limit_mib = {mib}"))
            }
            _ => odd(),
        },
        "executor" => match text {
            Some("shell") => left(
                "the class's image says it: with one like debian-12-shell jobs run by the shell executor, in a machine of its own each",
            ),
            Some(other) => Fate::Left(format!(
                "instead of `{other}`, the class's image says how jobs run, in a machine of its own each: with one like debian-12-docker in containers there, `image:` and `services:` of a job"
            )),
            None => odd(),
        },
        "environment" => match item.as_array() {
            Some(lines) if lines.iter().all(|line| line.as_str().is_some_and(is_variable)) => Fate::Key(
                "environment",
                Value::Array(lines.iter().filter_map(Value::as_str).collect()),
                "taken over; users of this host can read it there, so let no value be a secret".into(),
            ),
            _ => left("a line of it is not NAME=value"),
        },
        "pre_clone_script" => same("pre_get_sources_script"),
        "post_clone_script" => same("post_get_sources_script"),
        "pre_get_sources_script" => same("pre_get_sources_script"),
        "post_get_sources_script" => same("post_get_sources_script"),
        "pre_build_script" => same("pre_build_script"),
        "post_build_script" => same("post_build_script"),
        "clone_url" => match text.map(str::parse::<url::Url>) {
            Some(Ok(url)) if url.scheme() == "https" => same("clone_url"),
            Some(Ok(url)) if url.scheme() == "http" => {
                left("it is http; set it by hand, with allow_insecure_http = true")
            }
            _ => left("it is no address"),
        },
        "tls-ca-file" | "tls-cert-file" | "tls-key-file" => match text {
            Some(source) => Fate::Tls(
                match path {
                    "tls-ca-file" => "tls_ca_file",
                    "tls-cert-file" => "tls_cert_file",
                    _ => "tls_key_file",
                },
                source.to_owned(),
            ),
            None => left("it is empty"),
        },
        "custom_build_dir.enabled" => match item.as_bool() {
            Some(true) => Fate::Key("custom_build_dir", true.into(), "taken over".into()),
            Some(false) => left("it is the default, as here"),
            None => odd(),
        },
        "builds_dir" | "cache_dir" => left(OWN_DISK),
        "shell" => match text {
            Some("bash") => left("it is the only one, as here"),
            _ => left("jobs have their machine's bash"),
        },
        "id" | "token_obtained_at" | "token_expires_at" => left("GitLab tells it anew"),
        "request_concurrency" | "strict_check_interval" => {
            left("not needed: jobs are asked for whenever there is room")
        }
        "unhealthy_requests_limit" | "unhealthy_interval" => {
            left("not needed: dayfly has pauses of its own where GitLab fails")
        }
        "debug_trace_disabled" => {
            left("CI_DEBUG_TRACE is its job's own affair: GitLab shows such logs to developers only")
        }
        "cache" => left("`cache:` needs no store here; `[cache.upstream]` names one that is there"),
        "machine" | "autoscaler" | "instance" | "ssh" | "parallels" | "virtualbox" | "custom" => left(MADE_HERE),
        "referees" | "monitoring" | "labels" => left("these are gitlab-runner's own"),
        _ => left("dayfly knows no such key"),
    }
}

/// What of an executor's table says how large a job is.
fn of_executors(path: &str, item: &Item) -> Option<Fate> {
    let (executor, key) = path.split_once('.').filter(|(executor, _)| matches!(*executor, "docker" | "kubernetes"))?;
    let text = item.as_str().unwrap_or_default();
    Some(match (executor, key) {
        ("docker", "cpus") | ("kubernetes", "cpu_limit") => match cpus(text) {
            Some(cpus) => Fate::Cpus(cpus),
            None => odd(),
        },
        ("docker", "memory") | ("kubernetes", "memory_limit") => match memory_mib(text) {
            Some(mib) => Fate::MemoryMib(mib),
            None => odd(),
        },
        (_, "privileged") => {
            left("not needed: a job has a whole machine, and may be its root by the class's `run_as_root`")
        }
        (_, "image" | "helper_image" | "services" | "allowed_images" | "allowed_services" | "pull_policy") => {
            left("commands run in the job's machine, not in a container; what they need is in the class's image")
        }
        ("docker", "volumes" | "cache_dir" | "disable_cache" | "volumes_from" | "shm_size" | "tmpfs") => left(OWN_DISK),
        ("docker", _) => left("there are no containers here"),
        _ => left("there is no cluster here"),
    })
}

fn is_variable(line: &str) -> bool {
    line.split_once('=').is_some_and(|(name, _)| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    })
}

/// `2`, `1.5`, `1500m`: whole CPUs that are enough for it.
fn cpus(text: &str) -> Option<i64> {
    let thousandths: i64 = match text.strip_suffix('m') {
        Some(number) => number.parse().ok()?,
        None => {
            let (whole, part) = text.split_once('.').unwrap_or((text, ""));
            let part: String = part.chars().chain("000".chars()).take(3).collect();
            whole.parse::<i64>().ok()?.checked_mul(1000)?.checked_add(part.parse().ok()?)?
        }
    };
    (1..=1_024_000)
        .contains(&thousandths)
        .then(|| thousandths.div_euclid(1000) + i64::from(thousandths.rem_euclid(1000) > 0))
}

/// `4g`, `512m`, `4Gi`, `1073741824`.
fn memory_mib(text: &str) -> Option<i64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let bytes: i64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "ki" => 1 << 10,
        "m" | "mb" | "mi" => 1 << 20,
        "g" | "gb" | "gi" => 1 << 30,
        "t" | "tb" | "ti" => 1 << 40,
        _ => return None,
    };
    let mib = number.parse::<i64>().ok()?.checked_mul(bytes)? >> 20;
    (1..=16_777_216).contains(&mib).then_some(mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_docker_and_kubernetes_write_them() {
        for (text, mib) in
            [("4g", 4096), ("512m", 512), ("4Gi", 4096), ("1073741824", 1024), ("2 GB", 2048), ("8388608k", 8192)]
        {
            assert_eq!(memory_mib(text), Some(mib), "{text}");
        }
        for text in ["", "g", "4x", "-1g", "99999999999999999999", "1k", "4.5g"] {
            assert_eq!(memory_mib(text), None, "{text}");
        }
        for (text, n) in [("2", 2), ("1.5", 2), ("0.25", 1), ("1500m", 2), ("2000m", 2), ("2.000", 2)] {
            assert_eq!(cpus(text), Some(n), "{text}");
        }
        for text in ["", "x", "0", "0m", "-1", "99999999999"] {
            assert_eq!(cpus(text), None, "{text}");
        }
    }
}
