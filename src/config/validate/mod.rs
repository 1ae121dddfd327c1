//! Is this configuration one that can work? Each problem says what, where and the remedy.
//!
//! [`validate`] looks at the values only, so that it can judge a file before it is written;
//! [`Loaded::check_for_running`] also looks at the files that they name, as `run` and `check` need.

mod caches;
mod classes;
mod forwards;
mod status;

use super::origin::nearest_name;
use super::{Config, ConfigError, Loaded, Origin, Origins, Runner};
use crate::control::group_id;
use crate::files::{plain, private};
use crate::gitlab::RunnerToken;
use crate::machine_spec::PINNED_FLAGS;
use crate::network::Choice;
use crate::telemetry::chain;
use crate::vm::{AccelChoice, Backend, VmUsers};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::time::Duration;
use url::Url;

/// Bytes of `runtime_directory` at most: a unix socket path has 107, `/vm/df-<16 characters>.egress`
/// takes 30.
const RUNTIME_DIRECTORY_BYTES_MAX: usize = 77;

/// Bytes of an entry's scripts and variables at most: a guest config has 256 KiB, of which a CA bundle may take half.
const GUEST_SETTINGS_BYTES_MAX: usize = 64 * 1024;

/// Ended jobs at most: the list of them is in memory, a KiB each.
const HISTORY_JOBS_MAX: u32 = 10_000;

/// Something wrong with one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    key: String,
    origin: Origin,
    what: String,
    remedy: String,
}

impl Problem {
    /// A problem with the value at `key`, found where the key, or its nearest parent, stands.
    pub(super) fn at(origins: &Origins, key: &str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { key: key.to_owned(), origin: origins.nearest(key), what: what.into(), remedy: remedy.into() }
    }

    /// Where the key, or its nearest parent, stands.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The key, as `limits.keepalive`.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.key)?;
        if self.origin != Origin::Default {
            write!(f, " ({})", self.origin)?;
        }
        write!(f, " {}; {}", self.what, self.remedy)
    }
}

/// All problems of one configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut problems = self.0.iter();
        if let Some(first) = problems.next() {
            first.fmt(f)?;
        }
        problems.try_for_each(|problem| write!(f, "\n  and {problem}"))
    }
}

struct Report<'a> {
    origins: &'a Origins,
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Report<'_> {
    fn error(&mut self, key: &str, what: impl Into<String>, remedy: impl Into<String>) {
        self.errors.push(Problem::at(self.origins, key, what, remedy));
    }

    fn warning(&mut self, key: &str, what: impl Into<String>, remedy: impl Into<String>) {
        self.warnings.push(Problem::at(self.origins, key, what, remedy));
    }

    fn not_zero(&mut self, key: &str, is_zero: bool) {
        if is_zero {
            self.error(key, "is 0", "give it a positive value");
        }
    }
}

/// Errors and warnings about the values themselves.
pub(super) fn validate(config: &Config, origins: &Origins) -> (Vec<Problem>, Vec<Problem>) {
    let mut report = Report { origins, errors: Vec::new(), warnings: Vec::new() };
    general(config, &mut report);
    network(
        config,
        &std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default(),
        &mut report,
    );
    status::judge(config, &mut report);
    caches::judge(config, &mut report);
    limits(config, &mut report);
    classes::classes(config, &mut report);
    classes::rules(config, &mut report);
    forwards::judge(config, &mut report);
    for (i, runner) in config.runner.iter().enumerate() {
        one_runner(i, runner, config, &mut report);
    }
    unique("runner", config.runner.iter().map(|runner| runner.name.as_str()), &mut report);
    shared_tokens(config, &mut report);
    (report.errors, report.warnings)
}

fn general(config: &Config, report: &mut Report<'_>) {
    let directories = [
        ("state_directory", &config.state_directory),
        ("runtime_directory", &config.runtime_directory),
        ("image_directory", &config.image_directory),
    ];
    for (key, path) in directories {
        if path.as_os_str().is_empty() {
            report.error(key, "is empty", "name a directory");
        } else if !path.is_absolute() {
            report.error(
                key,
                format!("is the relative path `{}`", path.display()),
                "without a file only absolute paths make sense",
            );
        }
    }
    if config.runtime_directory.as_os_str().len() > RUNTIME_DIRECTORY_BYTES_MAX {
        let what = format!("is longer than {RUNTIME_DIRECTORY_BYTES_MAX} bytes, too long for the sockets in it");
        report.error("runtime_directory", what, "choose a shorter path");
    }
    report.not_zero("concurrent", config.concurrent == 0);
    report.not_zero("image_versions", config.image_versions == 0);
    report.not_zero("image_max_age", config.image_max_age.is_some_and(|age| age.get().is_zero()));
    let clones = &config.clones;
    report.not_zero("clones.project_gib", clones.project_gib == 0);
    report.not_zero("clones.fetch_mib", clones.fetch_mib == 0);
    report.not_zero("clones.fetch_deadline", clones.fetch_deadline.get().is_zero());
    report.not_zero("clones.max_age", clones.max_age.get().is_zero());
    if clones.size_gib < clones.project_gib {
        let what = format!("is less than one project may have, {} GiB", clones.project_gib);
        report.error("clones.size_gib", what, "raise it, or lower `clones.project_gib`");
    }
    report.not_zero("capacity.cpus", config.capacity.cpus == Some(0));
    report.not_zero("capacity.memory_mib", config.capacity.memory_mib == Some(0));
    report.not_zero("capacity.disk_gib", config.capacity.disk_gib == Some(0));
    if config.control.group.as_deref().is_some_and(|group| group.trim().is_empty()) {
        report.error("control.group", "is empty", "name a group, or leave the key away");
    }
    if config.control.group.is_none() && !config.control.shell_users.is_empty() {
        let remedy = "set `control.group` to a group that they are members of";
        report.warning("control.shell_users", "names users who do not reach the control socket", remedy);
    }
    if let Err(error) = config.log.filter() {
        report.error("log.level", chain(&error), "use error, warn, info, debug or trace");
    }
    if config.hypervisor.backend == Backend::Libvirt && config.hypervisor.uri.trim().is_empty() {
        report.error("hypervisor.uri", "is empty", "use qemu:///system or qemu:///session");
    }
    if let Some(users @ VmUsers::Range { .. }) = &config.hypervisor.vm_users {
        let have = users.all().len();
        if !config.hypervisor.is_system() {
            let what = "has no effect: QEMU has users of its own at `qemu:///system` only";
            report.warning("hypervisor.vm_users", what, "leave it away, or set `uri = \"qemu:///system\"`");
        } else if u32::try_from(have).unwrap_or(u32::MAX) <= config.concurrent {
            report.error(
                "hypervisor.vm_users",
                format!(
                    "has {have} users for {} jobs at once, and one is for machines without a job",
                    config.concurrent
                ),
                "make and name more, or lower `concurrent`",
            );
        }
    }
    if config.hypervisor.accel == AccelChoice::Tcg {
        report.warning(
            "hypervisor.accel",
            "is `tcg`: jobs are slow and QEMU promises no isolation",
            "use it for trials only",
        );
    }
}

fn network(config: &Config, local_port_range: &str, report: &mut Report<'_>) {
    let range = config.network.guest_ports;
    let ports = u32::from(range.last) - u32::from(range.first) + 1;
    if ports < config.concurrent {
        report.error(
            "network.guest_ports",
            format!("has {ports} ports for {} jobs at once", config.concurrent),
            "widen it, or lower `concurrent`",
        );
    }
    let mut bounds = local_port_range.split_whitespace().map(str::parse::<u16>);
    if let (Some(Ok(low)), Some(Ok(high))) = (bounds.next(), bounds.next())
        && range.first <= high
        && low <= range.last
    {
        let what = format!(
            "overlaps the host's ephemeral ports {low}-{high}: another program may hold a door's port after a restart"
        );
        report.warning("network.guest_ports", what, "choose a range outside, or change net.ipv4.ip_local_port_range");
    }
    if report.origins.of("network.guest_ports") != Origin::Default {
        report.warning(
            "network.guest_ports",
            "is read for this version only: machines have no ports of this host any more, but those of images built before that",
            "build the images again, and leave it away",
        );
    }
    match config.network.mode {
        Some(Choice::Bridge) => report.error("network.mode", BRIDGE, BRIDGE_REMEDY),
        Some(mode @ (Choice::User | Choice::Relay)) => report.warning(
            "network.mode",
            "is read for this version only, for classes without a `network` of their own",
            format!(
                "set `network = \"{}\"` in each [[class]] instead",
                if mode == Choice::User { "user" } else { "relay" }
            ),
        ),
        None => {}
    }
}

const BRIDGE: &str = "is `bridge`, which this version does not offer yet";
const BRIDGE_REMEDY: &str = "use \"relay\" or \"user\"";

fn limits(config: &Config, report: &mut Report<'_>) {
    let l = &config.limits;
    let spans = [
        ("limits.boot_deadline", l.boot_deadline),
        ("limits.silence_deadline", l.silence_deadline),
        ("limits.default_timeout", l.default_timeout),
        ("limits.timeout_grace", l.timeout_grace),
        ("limits.canceling_grace", l.canceling_grace),
        ("limits.cancel_grace", l.cancel_grace),
        ("limits.power_off_grace", l.power_off_grace),
        ("limits.keepalive", l.keepalive),
        ("limits.door_patience", l.door_patience),
        ("limits.guest_power_off", l.guest_power_off),
        ("limits.outbox_keep", l.outbox_keep),
        ("limits.trace_patience", l.trace_patience),
    ];
    for (key, span) in spans {
        report.not_zero(key, span.get().is_zero());
    }
    report.not_zero("limits.drain_timeout", l.drain_timeout.is_some_and(|span| span.get().is_zero()));
    report.not_zero("limits.spool_mib", l.spool_mib == 0);
    report.not_zero("history.keep", config.history.keep.get().is_zero());
    report.not_zero("history.mib", config.history.mib == 0);
    report.not_zero("history.console_keep", config.history.console_keep.get().is_zero());
    report.not_zero("history.shell_keep", config.history.shell_keep.get().is_zero());
    if config.history.jobs > HISTORY_JOBS_MAX {
        report.error("history.jobs", format!("is {}", config.history.jobs), format!("use up to {HISTORY_JOBS_MAX}"));
    }
    // The runner in the guest counts in whole seconds; above 3 its cancel latency grows.
    let interval = l.guest_update_interval.get();
    if interval.subsec_nanos() != 0 || !(1..=3).contains(&interval.as_secs()) {
        report.error("limits.guest_update_interval", format!("is {}", l.guest_update_interval), "use 1s, 2s or 3s");
    }
}

fn one_runner(i: usize, runner: &Runner, config: &Config, report: &mut Report<'_>) {
    let key = |name: &str| format!("runner.{i}.{name}");
    name_of(&key("name"), &runner.name, report);
    web_address(&key("url"), &runner.url, runner.allow_insecure_http, report);
    if let Some(clone_url) = &runner.clone_url {
        web_address(&key("clone_url"), clone_url, runner.allow_insecure_http, report);
    }
    if !config.class.iter().any(|class| class.name == runner.class) {
        let remedy = match nearest_name(&runner.class, config.class.iter().map(|class| class.name.as_str())) {
            Some(meant) => format!("did you mean `{meant}`?"),
            None => "add a [[class]] of this name".into(),
        };
        report.error(&key("class"), format!("names the unknown class `{}`", runner.class.escape_debug()), remedy);
    }
    report.not_zero(&key("limit"), runner.limit == Some(0));
    let poll = runner.poll_interval.get();
    if poll.is_zero() || poll > Duration::from_secs(60) {
        report.error(&key("poll_interval"), format!("is {}", runner.poll_interval), "use a duration up to 60s");
    }
    guest_settings(i, runner, config, report);
    match (&runner.tls_cert_file, &runner.tls_key_file) {
        (Some(_), None) => report.error(&key("tls_cert_file"), "has no key", "set `tls_key_file` too"),
        (None, Some(_)) => report.error(&key("tls_key_file"), "has no certificate", "set `tls_cert_file` too"),
        _ => {}
    }
    let files = [
        ("token_file", Some(&runner.token_file)),
        ("tls_ca_file", runner.tls_ca_file.as_ref()),
        ("tls_cert_file", runner.tls_cert_file.as_ref()),
        ("tls_key_file", runner.tls_key_file.as_ref()),
    ];
    for (name, path) in files {
        if path.is_some_and(|path| path.as_os_str().is_empty()) {
            report.error(&key(name), "is empty", "name a file");
        }
    }
}

/// What goes into guests' config.toml as it is.
fn guest_settings(i: usize, runner: &Runner, config: &Config, report: &mut Report<'_>) {
    let key = |name: &str| format!("runner.{i}.{name}");
    report.not_zero(&key("output_limit_mib"), runner.output_limit_mib == Some(0));
    if runner.output_limit_mib.is_some_and(|mib| mib > config.limits.spool_mib) {
        let what = format!("is more than `limits.spool_mib`, {}: no more of a log is kept", config.limits.spool_mib);
        report.warning(&key("output_limit_mib"), what, "raise that, too");
    }
    for (n, line) in runner.environment.iter().enumerate() {
        let name = line.name();
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name || !line.0.contains('=') || line.0.contains('\0') {
            report.error(&key(&format!("environment.{n}")), "is no variable", "write it as \"NAME=value\"");
        }
    }
    for flag in runner.feature_flags.keys() {
        let key = key(&format!("feature_flags.{flag}"));
        if PINNED_FLAGS.iter().any(|(pinned, _)| pinned == flag) {
            report.error(&key, "is dayfly's to set", "leave it away");
        } else if !flag.starts_with("FF_") || !flag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            report.error(&key, "is no name of a feature flag", "use a name like FF_USE_FASTZIP");
        }
    }
    let scripts = [
        &runner.pre_get_sources_script,
        &runner.post_get_sources_script,
        &runner.pre_build_script,
        &runner.post_build_script,
    ];
    let bytes: usize = scripts.into_iter().flatten().map(String::len).sum::<usize>()
        + runner.environment.iter().map(|line| line.0.len()).sum::<usize>();
    if bytes > GUEST_SETTINGS_BYTES_MAX {
        let what =
            format!("has {bytes} bytes of scripts and variables; {GUEST_SETTINGS_BYTES_MAX} can be told to a guest");
        report.error(&format!("runner.{i}"), what, "put what is long into the image");
    }
}

/// Names of classes and runners stand in logs, traces and messages, and in the guest's config.toml.
fn name_of(key: &str, name: &str, report: &mut Report<'_>) {
    if name.trim().is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
        report.error(key, format!("is `{}`", name.escape_debug()), "use 1 to 128 printable characters");
    }
}

fn web_address(key: &str, url: &Url, allow_insecure_http: bool, report: &mut Report<'_>) {
    match url.scheme() {
        "https" => {}
        "http" if allow_insecure_http => {
            report.warning(key, "is http: the tokens go in the clear", "use https wherever others share the network")
        }
        "http" => report.error(
            key,
            "is not https",
            "use https, or set `allow_insecure_http = true` to send tokens in the clear",
        ),
        other => {
            report.error(key, format!("begins with `{other}:`"), "use an https address like https://gitlab.example.com")
        }
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        report.error(key, "holds more than an address", "leave user, password, ? and # away");
    }
}

fn unique<'a>(section: &str, names: impl Iterator<Item = &'a str>, report: &mut Report<'_>) {
    let mut seen = BTreeSet::new();
    for (i, name) in names.enumerate() {
        if !seen.insert(name) {
            report.error(
                &format!("{section}.{i}.name"),
                format!("is `{}`, as another [[{section}]] is", name.escape_debug()),
                "choose another name",
            );
        }
    }
}

/// Two entries with one token would take each other's jobs.
fn shared_tokens(config: &Config, report: &mut Report<'_>) {
    let mut seen: BTreeMap<&Path, &str> = BTreeMap::new();
    for (i, runner) in config.runner.iter().enumerate() {
        if let Some(other) = seen.insert(&runner.token_file, &runner.name) {
            let what = format!("is that of runner `{}` too", other.escape_debug());
            report.error(&format!("runner.{i}.token_file"), what, "register each entry with a token of its own");
        }
    }
}

impl Loaded {
    /// Whether the daemon could run with it: there is a runner, and the files it names can be used.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all that is wrong; no secret is in it.
    pub fn check_for_running(&self) -> Result<(), ConfigError> {
        let mut report = Report { origins: &self.origins, errors: Vec::new(), warnings: Vec::new() };
        if self.config.runner.is_empty() {
            report.error("runner", "is empty: no runner is configured", "register one with `dayfly register`");
        }
        if let Some(group) = &self.config.control.group
            && let Err(error) = group_id(group)
        {
            let remedy = format!(
                "make it (`groupadd --system {group}`), and the daemon's user its member (`usermod -aG {group} dayfly`)"
            );
            report.error("control.group", format!("cannot be used: {error}"), remedy);
        }
        caches::judge_files(&self.config, &mut report);
        let mut tokens: Vec<(&Runner, RunnerToken)> = Vec::new();
        for (i, runner) in self.config.runner.iter().enumerate() {
            let key = |name: &str| format!("runner.{i}.{name}");
            match RunnerToken::from_file(&runner.token_file) {
                Ok(token) => {
                    if let Some((other, _)) = tokens.iter().find(|(_, known)| known.same_as(&token)) {
                        let what = format!("holds the very token of runner `{}`", other.name.escape_debug());
                        report.error(&key("token_file"), what, "register each entry with a token of its own");
                    }
                    tokens.push((runner, token));
                }
                Err(error) => {
                    let remedy = format!(
                        "the token belongs in a file of mode 0600 that the daemon's user owns; `dayfly register` writes {}",
                        runner.token_file.display()
                    );
                    report.error(&key("token_file"), format!("cannot be used: {}", chain(&error)), remedy);
                }
            }
            for (name, path) in [
                ("tls_ca_file", &runner.tls_ca_file),
                ("tls_cert_file", &runner.tls_cert_file),
                ("tls_key_file", &runner.tls_key_file),
            ] {
                if let Some(path) = path
                    && let Err(error) = plain::open_chosen(path)
                {
                    report.error(
                        &key(name),
                        format!("cannot be read: `{}`: {error}", path.display()),
                        "check path and owner",
                    );
                }
            }
            if let Some(path) = &runner.tls_key_file
                && let Ok(metadata) = std::fs::metadata(path)
                && let Some(mode) = private::too_open(path, &metadata)
            {
                let what = format!("has mode {mode:o}: others may read the key");
                report.error(&key("tls_key_file"), what, format!("chmod 0600 {}", path.display()));
            }
        }
        if report.errors.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(Problems(report.errors))) }
    }
}

#[cfg(test)]
mod tests;
