//! Is this configuration one that can work? Each problem says what, where and the remedy.
//!
//! [`validate`] looks at the values only, so that it can judge a file before it is written;
//! [`Loaded::check_for_running`] also looks at the files that they name, as `run` and `check` need.

use super::origin::nearest_name;
use super::{Class, Config, ConfigError, Loaded, Origin, Origins, Runner};
use crate::gitlab::RunnerToken;
use crate::telemetry::chain;
use crate::vm::libvirt::AccelChoice;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;
use url::Url;

/// Bytes of `runtime_directory` at most: a unix socket path has 107, `/vm/df-<16 characters>.guest`
/// takes 29.
const RUNTIME_DIRECTORY_BYTES_MAX: usize = 78;

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
    limits(config, &mut report);
    for (i, class) in config.class.iter().enumerate() {
        one_class(i, class, &mut report);
    }
    for (i, runner) in config.runner.iter().enumerate() {
        one_runner(i, runner, config, &mut report);
    }
    unique("class", config.class.iter().map(|class| class.name.as_str()), &mut report);
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
    report.not_zero("capacity.cpus", config.capacity.cpus == Some(0));
    report.not_zero("capacity.memory_mib", config.capacity.memory_mib == Some(0));
    report.not_zero("capacity.disk_gib", config.capacity.disk_gib == Some(0));
    if let Err(error) = config.log.filter() {
        report.error("log.level", chain(&error), "use error, warn, info, debug or trace");
    }
    if config.hypervisor.uri.trim().is_empty() {
        report.error("hypervisor.uri", "is empty", "use qemu:///system or qemu:///session");
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
}

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
    ];
    for (key, span) in spans {
        report.not_zero(key, span.get().is_zero());
    }
    report.not_zero("limits.spool_mib", l.spool_mib == 0);
    // The runner in the guest counts in whole seconds; above 3 its cancel latency grows.
    let interval = l.guest_update_interval.get();
    if interval.subsec_nanos() != 0 || !(1..=3).contains(&interval.as_secs()) {
        report.error("limits.guest_update_interval", format!("is {}", l.guest_update_interval), "use 1s, 2s or 3s");
    }
}

fn one_class(i: usize, class: &Class, report: &mut Report<'_>) {
    let key = |name: &str| format!("class.{i}.{name}");
    name_of(&key("name"), &class.name, report);
    // It names a directory below `image_directory`.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if class.image.is_empty() || class.image.starts_with('.') || !class.image.chars().all(plain) {
        report.error(
            &key("image"),
            format!("is `{}`", class.image.escape_debug()),
            "name an image as `dayfly image list` shows it",
        );
    }
    report.not_zero(&key("cpus"), class.cpus == 0);
    report.not_zero(&key("disk_gib"), class.disk_gib == 0);
    report.not_zero(&key("memory_mib"), class.memory_mib == 0);
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
        for (i, runner) in self.config.runner.iter().enumerate() {
            let key = |name: &str| format!("runner.{i}.{name}");
            if let Err(error) = RunnerToken::from_file(&runner.token_file) {
                let remedy = format!(
                    "the token belongs in a file of mode 0600 that the daemon's user owns; `dayfly register` writes {}",
                    runner.token_file.display()
                );
                report.error(&key("token_file"), format!("cannot be used: {}", chain(&error)), remedy);
            }
            for (name, path) in [
                ("tls_ca_file", &runner.tls_ca_file),
                ("tls_cert_file", &runner.tls_cert_file),
                ("tls_key_file", &runner.tls_key_file),
            ] {
                if let Some(path) = path
                    && let Err(error) = std::fs::File::open(path)
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
                && metadata.permissions().mode() & 0o077 != 0
            {
                let what = format!("has mode {:o}: others may read the key", metadata.permissions().mode() & 0o777);
                report.error(&key("tls_key_file"), what, format!("chmod 0600 {}", path.display()));
            }
        }
        if report.errors.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(Problems(report.errors))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is right, to be spoilt.
    const GOOD: &str = r#"
concurrent = 2
[[class]]
name = "small"
image = "debian-12-shell"
[[runner]]
name = "ci"
url = "https://gitlab.example.com"
token_file = "tokens/ci"
class = "small"
"#;

    fn load(text: &str, environment: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
        let environment = environment.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        Config::assemble(Some(("/etc/dayfly/config.toml".into(), text.into())), environment)
    }

    /// `text` is refused, and the message has all of `parts`.
    fn refused(text: &str, parts: &[&str]) {
        let message = chain(&load(text, &[]).map(|loaded| loaded.config).unwrap_err());
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }

    #[test]
    fn a_good_file_loads_and_relative_paths_are_its_own() {
        let loaded = load(GOOD, &[]).unwrap();
        assert_eq!(loaded.config.runner[0].token_file, Path::new("/etc/dayfly/tokens/ci"));
        assert_eq!(loaded.config.class[0].memory_mib, 2048);
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    }

    #[test]
    fn an_unknown_key_names_line_and_what_was_meant() {
        refused("concurent = 2\n", &["`concurent`", "/etc/dayfly/config.toml, line 1", "did you mean `concurrent`?"]);
        refused("[log]\n\nlevle = \"info\"\n", &["`log.levle`", "line 3", "did you mean `level`?"]);
        refused(&GOOD.replace("token_file", "token"), &["`runner.0.token`", "line 9"]);
        refused(&format!("{GOOD}check_interval = 3\n"), &["`runner.0.check_interval`", "line 11", "poll_interval"]);
    }

    #[test]
    fn a_missing_key_names_its_section() {
        refused(&GOOD.replace("class = \"small\"", ""), &["`runner.0.class`", "line 6", "is missing"]);
    }

    #[test]
    fn a_value_of_the_wrong_form_names_its_line() {
        refused("concurrent = \"many\"\n", &["`concurrent`", "line 1", "string \"many\""]);
        refused("\n[limits]\nkeepalive = 30\n", &["`limits.keepalive`", "line 3"]);
        refused("[limits]\nkeepalive = \"soon\"\n", &["`limits.keepalive`", "line 2", "no duration"]);
        refused("[network]\nguest_ports = \"80-90\"\n", &["`network.guest_ports`", "no port range"]);
        refused("[hypervisor]\naccel = \"hvf\"\n", &["`hypervisor.accel`", "line 2", "auto, kvm, tcg"]);
        refused("a = [\n", &["/etc/dayfly/config.toml`, line "]);
    }

    #[test]
    fn the_environment_beats_the_file_and_its_slips_are_named() {
        let loaded = load(
            GOOD,
            &[
                ("DAYFLY_CONCURRENT", "7"),
                ("DAYFLY_LIMITS__KEEPALIVE", "10s"),
                ("DAYFLY_CONFIG", "/x"),
                ("DAYFLY_REGISTER_TOKEN", "t"),
            ],
        )
        .unwrap();
        assert_eq!(loaded.config.concurrent, 7);
        assert_eq!(loaded.config.limits.keepalive.get(), Duration::from_secs(10));
        assert_eq!(loaded.origins.of("concurrent"), Origin::Environment("DAYFLY_CONCURRENT".into()));
        for (name, value) in
            [("DAYFLY_LOG__LEVLE", "info"), ("DAYFLY_CONCURENT", "2"), ("DAYFLY_LIMITS__KEEPALIVE", "x")]
        {
            let message = chain(&load(GOOD, &[(name, value)]).map(|l| l.config).unwrap_err());
            assert!(message.contains(&format!("environment variable {name}")), "{message}");
        }
    }

    #[test]
    fn each_senseless_value_is_named() {
        for (from, to, part) in [
            ("concurrent = 2", "concurrent = 0", "`concurrent` (/etc/dayfly/config.toml, line 2) is 0"),
            ("concurrent = 2", "concurrent = 2000", "1000 ports for 2000 jobs"),
            (
                "concurrent = 2",
                "runtime_directory = \"/run/a-directory-that-is-much-too-long/for-any/unix-socket/that-should-be-made/below-it/here\"",
                "too long",
            ),
            ("class = \"small\"", "class = \"smal\"", "did you mean `small`?"),
            ("class = \"small\"", "class = \"gigantic\"", "add a [[class]]"),
            ("https:", "http:", "allow_insecure_http"),
            ("https:", "ssh:", "begins with `ssh:`"),
            ("https://", "https://me:secret@", "leave user, password"),
            ("name = \"ci\"", "name = \"\"", "printable"),
            ("name = \"ci\"", "name = \"a\\nb\"", "is `a\\nb`"),
            ("image = \"debian-12-shell\"", "image = \"../x\"", "dayfly image list"),
            ("image =", "cpus = 0\nimage =", "`class.0.cpus`"),
            ("url =", "limit = 0\nurl =", "`runner.0.limit`"),
            ("url =", "poll_interval = \"5m\"\nurl =", "up to 60s"),
            ("url =", "tls_cert_file = \"c.pem\"\nurl =", "`tls_key_file` too"),
            ("url =", "tls_key_file = \"k.pem\"\nurl =", "`tls_cert_file` too"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            refused(&GOOD.replacen(from, to, 1), &[part]);
        }
        for (line, part) in [
            ("[log]\nlevel = \"loud=very\"", "`log.level`"),
            ("[limits]\nguest_update_interval = \"4s\"", "1s, 2s or 3s"),
            ("[limits]\nguest_update_interval = \"1500ms\"", "1s, 2s or 3s"),
            ("[limits]\nboot_deadline = \"0s\"", "`limits.boot_deadline`"),
            ("[limits]\nspool_mib = 0", "`limits.spool_mib`"),
            ("[hypervisor]\nuri = \"\"", "`hypervisor.uri`"),
            ("[capacity]\ncpus = 0", "`capacity.cpus`"),
        ] {
            refused(&format!("{GOOD}\n{line}\n"), &[part]);
        }
    }

    #[test]
    fn duplicates_are_refused() {
        let class = "[[class]]\nname = \"small\"\nimage = \"x\"\n";
        refused(&format!("{GOOD}{class}"), &["`class.1.name`", "line 12", "another [[class]]"]);
        let runner = &GOOD[GOOD.find("[[runner]]").unwrap()..];
        refused(&format!("{GOOD}{runner}"), &["`runner.1.name`", "and `runner.1.token_file`", "line 14"]);
    }

    #[test]
    fn all_problems_come_in_one_message() {
        refused(
            &GOOD.replace("concurrent = 2", "concurrent = 0").replace("https:", "http:"),
            &["`concurrent`", "`runner.0.url`"],
        );
    }

    #[test]
    fn ports_that_the_kernel_gives_away_are_warned_about() {
        let mut config = Config::default();
        let judge = |config: &Config| {
            let mut report = Report { origins: &Origins::default(), errors: Vec::new(), warnings: Vec::new() };
            network(config, "32768\t60999\n", &mut report);
            report.warnings.len()
        };
        assert_eq!(judge(&config), 0);
        config.network.guest_ports = "30000-33000".parse().unwrap();
        assert_eq!(judge(&config), 1);
        config.network.guest_ports = "61000-62000".parse().unwrap();
        assert_eq!(judge(&config), 0);
    }

    #[test]
    fn risky_but_allowed_settings_are_warnings() {
        let text = GOOD.replace("https:", "http:").replace("[[runner]]", "[[runner]]\nallow_insecure_http = true");
        let loaded = load(&format!("{text}[hypervisor]\naccel = \"tcg\"\n"), &[]).unwrap();
        let keys: Vec<_> = loaded.warnings.iter().map(Problem::key).collect();
        assert_eq!(keys, ["hypervisor.accel", "runner.0.url"]);
    }

    #[test]
    fn running_needs_a_runner() {
        let message = chain(&load("concurrent = 1\n", &[]).unwrap().check_for_running().unwrap_err());
        assert!(message.contains("no runner is configured") && message.contains("dayfly register"), "{message}");
    }

    #[test]
    fn every_value_has_an_origin() {
        let resolved = load(GOOD, &[("DAYFLY_LOG__LEVEL", "debug")]).unwrap().resolved();
        let get =
            |key: &str| resolved.iter().find(|(k, ..)| k == key).map(|(_, v, o)| (v.as_str(), o.to_string())).unwrap();
        assert_eq!(get("log.level"), ("\"debug\"", "environment variable DAYFLY_LOG__LEVEL".into()));
        assert_eq!(get("concurrent"), ("2", "/etc/dayfly/config.toml, line 2".into()));
        assert_eq!(get("runner.0.poll_interval").1, "default");
        assert_eq!(get("capacity.cpus"), ("not set", "default".into()));
    }
}
