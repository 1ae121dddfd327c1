//! Section `[cache]`: who shares one?

use super::{Report, unique};
use crate::cache::CacheTenant;
use crate::config::{CacheUpstream, Config};
use crate::files::private;

/// Characters of a pattern at most, as in rules.
const PATTERN_CHARS_MAX: usize = 255;

pub(super) fn judge(config: &Config, report: &mut Report<'_>) {
    if config.cache.enabled {
        report.not_zero("cache.size_gib", config.cache.size_gib == 0);
        report.not_zero("cache.project_gib", config.cache.project_gib == 0);
        report.not_zero("cache.max_age", config.cache.max_age.get().is_zero());
    }
    for (i, CacheTenant { name, projects }) in config.cache.tenant.iter().enumerate() {
        let key = |name: &str| format!("cache.tenant.{i}.{name}");
        if !CacheTenant::is_name(name) {
            report.error(
                &key("name"),
                format!("is `{name}`, which is no name of a tenant"),
                "give it 1 to 32 small letters, digits, `-` and `_`: a directory is called so",
            );
        }
        if projects.is_empty() {
            report.error(&key("projects"), "is empty", "name the projects that share, like [\"group/*\", \"42\"]");
        }
        for entry in projects {
            let is_id = entry.parse::<u64>().is_ok_and(|id| id > 0);
            let is_path = entry.contains('/') && entry.chars().count() <= PATTERN_CHARS_MAX && !entry.starts_with('/');
            if !is_id && !is_path {
                report.error(
                    &key("projects"),
                    format!("has `{entry}`, which is no project's path and no id"),
                    "write whole paths or patterns of them, like \"group/project\" or \"group/**\", or ids",
                );
            }
            if matches!(&**entry, "*/*" | "**/*" | "*/**" | "**/**") {
                report.warning(
                    &key("projects"),
                    format!("has `{entry}`: all projects share one cache"),
                    "whoever has a project can then read what others' jobs have cached, and write what they read",
                );
            }
        }
    }
    if let Some(of) = &config.cache.upstream {
        upstream(of, report);
    }
    unique("cache.tenant", config.cache.tenant.iter().map(|tenant| tenant.name.as_str()), report);
}

/// What of an operator's store can be judged without asking it.
fn upstream(of: &CacheUpstream, report: &mut Report<'_>) {
    match of.url.scheme() {
        "https" => {}
        "http" if of.allow_insecure_http => report.warning(
            "cache.upstream.url",
            "is not https: whoever is on the way reads and writes caches",
            "give the store a certificate",
        ),
        _ => report.error(
            "cache.upstream.url",
            "is not https",
            "use https, or set `cache.upstream.allow_insecure_http = true` for a store on this host",
        ),
    }
    if !of.url.username().is_empty() || of.url.password().is_some() || of.url.query().is_some() {
        report.error("cache.upstream.url", "has more than an address in it", "keys go into `secret_key_file`");
    }
    let plain = |text: &str, more: &[u8]| {
        text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte) || more.contains(&byte))
    };
    if of.bucket.is_empty() || !plain(&of.bucket, b"") || of.bucket.starts_with('.') {
        report.error("cache.upstream.bucket", "is no name of a bucket", "name one that exists");
    }
    if !plain(&of.prefix, b"/") || of.prefix.split('/').any(|part| part.starts_with('.')) {
        report.error("cache.upstream.prefix", "is no path", "use letters, digits, `-`, `_`, `.` and `/`");
    }
    if of.region.is_empty() || !plain(&of.region, b"") {
        report.error("cache.upstream.region", "is no region", "leave it away where the store does not care");
    }
    if of.access_key.is_empty() || !plain(&of.access_key, b"+=@") {
        report.error("cache.upstream.access_key", "is no name of a key", "take it from the store");
    }
}

/// Whether the key's file is there and private.
pub(super) fn judge_files(config: &Config, report: &mut Report<'_>) {
    let Some(of) = config.cache.upstream.as_ref().filter(|_| config.cache.enabled) else { return };
    if let Err(error) = private::read_line(&of.secret_key_file) {
        report.error(
            "cache.upstream.secret_key_file",
            format!("cannot be used: `{}`: {error}", of.secret_key_file.display()),
            "the key belongs in a file of mode 0600 that the daemon's user owns",
        );
    }
}
