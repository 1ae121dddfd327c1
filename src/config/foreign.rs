//! What is it called here? Names that gitlab-runner's config.toml has for what dayfly calls otherwise, and what becomes
//! of those that have no use here.

/// A name of gitlab-runner's, and what is said to who writes it here.
const NAMES: &[(&str, &str)] = &[
    ("check_interval", "here it is `poll_interval` of a `[[runner]]`, like \"3s\""),
    ("connection_max_age", "leave it away: connections to GitLab are made anew every 15 min"),
    ("listen_address", "here it is `listen` of `[status]`"),
    ("log_format", "here it is `format` of `[log]`"),
    ("log_level", "here it is `level` of `[log]`"),
    ("runners", "here they are `[[runner]]`; `dayfly migrate` takes them over"),
    ("sentry_dsn", "leave it away: nothing is reported to others"),
    ("session_server", "leave it away: there are no web terminals of jobs"),
    ("shutdown_timeout", "here it is `drain_timeout` of `[limits]`, like \"1h\""),
    ("build_dir", "leave it away: each job's machine has its own"),
    ("builds_dir", "leave it away: each job's machine has its own"),
    ("cache", "leave it away: `cache:` of jobs is served by dayfly itself, by `[cache]`"),
    ("cache_dir", "leave it away: each job's machine has its own"),
    ("docker", "leave it away: a job's machine is what its `class` says"),
    ("executor", "leave it away: each job has a machine of its own, which its `class` describes"),
    ("kubernetes", "leave it away: a job's machine is what its `class` says"),
    ("machine", "leave it away: dayfly makes the machines itself"),
    ("autoscaler", "leave it away: dayfly makes the machines itself"),
    ("output_limit", "here it is `output_limit_mib`, in MiB and not in KiB"),
    ("request_concurrency", "leave it away: one question at a time is asked for each runner"),
    ("shell", "leave it away: it is bash"),
    ("token", "here it is `token_file`, the path of a file with the token; `dayfly register` writes it"),
    ("tls-ca-file", "here it is `tls_ca_file`"),
    ("tls-cert-file", "here it is `tls_cert_file`"),
    ("tls-key-file", "here it is `tls_key_file`"),
    ("tls_verify", "leave it away: verification is never off; `tls_ca_file` names a CA of your own"),
    ("unhealthy_interval", "leave it away: a runner that cannot take jobs asks for none"),
    ("unhealthy_requests_limit", "leave it away: a runner that cannot take jobs asks for none"),
    ("memory", "here it is `memory_mib` of a `[[class]]`"),
];

/// What is said to who writes this key.
pub(super) fn remedy(key: &str) -> Option<&'static str> {
    NAMES.iter().find(|(name, _)| *name == key).map(|(_, remedy)| *remedy)
}
