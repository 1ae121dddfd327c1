//! What is a guest told, and how is it written?
//!
//! Puts the guest config together: identity, network, and the text of the guest runner's
//! config.toml (decision D9). Its form on the wire is the crate `dayfly-guest-config`'s.

use crate::clock::Clock;
use crate::clones::Attached;
use crate::hex::hex;
use crate::machine_spec::{DockerSettings, EnvironmentLine, Executor, MachineSpec, PINNED_FLAGS};
use crate::network::Lease;
use crate::rng::Rng;
use crate::secret::Secret;
use crate::vm::VmId;
use dayfly_guest_config::{
    CA_FILE, CLONE_OBJECTS, GuestClone, GuestConfig, GuestNetwork, GuestRunner, Pass, RELAY_URL,
};
use std::fmt::Write as _;
use std::time::Duration;

/// How often the guest runner tries its final PUT; the door answers from the host, so that this
/// many cover a long restart (the official runner's default is 10).
const FINAL_UPDATE_TRIES: u32 = 20;

/// The store that the runner takes for S3: the door's. It signs its requests with these, which nobody looks at. Without a
/// location it would ask for one.
const CACHE: [&str; 12] = [
    "  [runners.cache]",
    "    Type = \"s3\"",
    "    Shared = true",
    "    [runners.cache.s3]",
    "      ServerAddress = \"192.0.2.1\"",
    "      Insecure = true",
    "      PathStyle = true",
    "      AuthenticationType = \"access-key\"",
    "      AccessKey = \"dayfly\"",
    "      SecretKey = \"dayfly\"",
    "      BucketName = \"cache\"",
    "      BucketLocation = \"dayfly\"",
];
/// Where the Docker executor has a job's sources: the runner's own default, and in the machine the same.
const BUILDS_VOLUME: &str = "/builds:/builds";

/// Docker's socket, where its clients look for it.
const SOCKET_VOLUME: &str = "/var/run/docker.sock:/var/run/docker.sock";

/// What the host has of the repository, where it is in the machine, too.
const CLONE_VOLUME: &str = "/run/dayfly/clone:/run/dayfly/clone:ro";

/// By what git finds objects besides its own. In the environment only: nothing of it is written into a job's clone.
const ALTERNATES: &str = "GIT_ALTERNATE_OBJECT_DIRECTORIES";

/// Seconds until the runner says that a service does not answer, and goes on: the runner's own default, as is that it goes on.
const SERVICE_WAIT_S: u32 = 30;

/// What one guest's config is made from.
#[derive(Debug)]
pub struct GuestParts<'a> {
    /// The VM.
    pub vm: &'a VmId,
    /// Its door and addresses.
    pub lease: &'a Lease,
    /// What machine its job gets.
    pub spec: &'a MachineSpec,
    /// The installation's machine-id, behind the system id that GitLab shows.
    pub installation_machine_id: &'a str,
    /// The runner's `--wait-timeout`.
    pub wait_timeout: Duration,
    /// See [`GuestConfig::door_patience_s`].
    pub door_patience: Duration,
    /// See [`GuestConfig::power_off_after_s`].
    pub power_off_after: Duration,
    /// MiB of a job's log that are kept here: the guest's runner would cut it at 4 by itself.
    pub log_mib_max: u64,
    /// Whether its jobs have a cache at its door.
    pub cache: bool,
    /// Disks with what the host has of its job's repository.
    pub clone: Option<&'a Attached>,
}

/// A new guest config, with a pass of its own.
#[must_use]
pub fn guest_config(parts: &GuestParts<'_>, clock: &Clock, rng: &Rng) -> GuestConfig {
    let user = if parts.spec.run_as_root { "root" } else { "gitlab-runner" };
    GuestConfig {
        version: parts.spec.contract,
        vm: parts.vm.to_string(),
        door: parts.lease.guest_door(),
        pass: Pass::new(rng.bytes()).to_text(),
        hostname: format!("df-{}", parts.vm),
        machine_id: hex(&rng.bytes::<16>()),
        runner_machine_id: parts.installation_machine_id.to_owned(),
        boot_id: uuid(rng.bytes::<16>()),
        seed: hex(&rng.bytes::<64>()),
        clock_us: clock.now().as_microsecond(),
        network: network(parts),
        forwards: parts.spec.forwards.iter().map(|forward| forward.port).collect(),
        runner: GuestRunner {
            config_toml: config_toml(parts, user),
            ca_pem: parts.spec.runner.ca_pem.clone(),
            name: parts.spec.runner.name.clone(),
            user: user.to_owned(),
            wait_timeout_s: parts.wait_timeout.as_secs(),
        },
        clone: parts.clone.map(|clone| GuestClone { disks: clone.disks.len(), slot: clone.slot.is_some() }),
        door_patience_s: parts.door_patience.as_secs(),
        power_off_after_s: parts.power_off_after.as_secs(),
        may_stay: parts.spec.keep_failed.is_some(),
        hold: false,
    }
}

/// What a guest is told that is to be nobody yet: its runner is the one of `config`, and nothing else is ever somebody's.
#[must_use]
pub fn held(config: &GuestConfig, vm: &VmId, rng: &Rng) -> GuestConfig {
    GuestConfig {
        vm: vm.to_string(),
        pass: Pass::new(rng.bytes()).to_text(),
        hostname: "dayfly".into(),
        machine_id: config.runner_machine_id.clone(),
        boot_id: uuid(rng.bytes::<16>()),
        seed: hex(&rng.bytes::<64>()),
        hold: true,
        ..config.clone()
    }
}

/// A card has the machine's own address, also in a machine that was restored, whose card thinks that it is another's.
fn network(parts: &GuestParts<'_>) -> GuestNetwork {
    let network = parts.lease.guest_network();
    if network.relay { network } else { GuestNetwork { mac: Some(parts.vm.mac()), ..network } }
}

/// The guest runner's config.toml. Unknown keys are ignored by every version, so newer ones may
/// always be written.
fn config_toml(parts: &GuestParts<'_>, user: &str) -> String {
    let runner = &parts.spec.runner;
    let quoted = |text: &str| toml_edit::Value::from(text).to_string();
    let home = if user == "root" { "/root".to_owned() } else { format!("/home/{user}") };
    let settings = &runner.settings;
    let mut text = String::new();
    let mut add = |line: String| writeln!(text, "{line}").expect("a String takes all");
    add("concurrent = 1".into());
    add("check_interval = 3".into());
    add("[[runners]]".into());
    add(format!("  name = {}", quoted(&runner.name)));
    add(format!("  url = {}", quoted(RELAY_URL)));
    add(format!("  token = {}", quoted(runner.token.expose())));
    add(format!("  executor = {}", quoted(parts.spec.executor.name())));
    add("  limit = 1".into());
    add(format!("  clone_url = {}", quoted(runner.clone_url.as_str().trim_end_matches('/'))));
    if runner.ca_pem.is_some() {
        add(format!("  tls-ca-file = {}", quoted(CA_FILE)));
    }
    if parts.spec.executor == Executor::Shell {
        add(format!("  builds_dir = {}", quoted(&format!("{home}/builds"))));
        add(format!("  cache_dir = {}", quoted(&format!("{home}/cache"))));
    }
    add(format!("  job_status_final_update_retry_limit = {FINAL_UPDATE_TRIES}"));
    let log_mib = settings.output_limit_mib.map_or(parts.log_mib_max, |mib| mib.min(parts.log_mib_max));
    // An `int` of Go's; in KiB, whatever its documentation calls them.
    add(format!("  output_limit = {}", log_mib.saturating_mul(1024).min(i64::MAX.unsigned_abs())));
    let mut environment = environment(&settings.environment);
    // An entry's own wins: whoever has one knows why.
    if parts.clone.is_some() && !settings.environment.iter().any(|line| line.name() == ALTERNATES) {
        environment.push(format!("{ALTERNATES}={CLONE_OBJECTS}"));
    }
    if !environment.is_empty() {
        let lines: Vec<String> = environment.iter().map(|line| quoted(line)).collect();
        add(format!("  environment = [{}]", lines.join(", ")));
    }
    for (key, script) in [
        ("pre_get_sources_script", &settings.pre_get_sources_script),
        ("post_get_sources_script", &settings.post_get_sources_script),
        ("pre_build_script", &settings.pre_build_script),
        ("post_build_script", &settings.post_build_script),
    ] {
        if let Some(script) = script {
            add(format!("  {key} = {}", quoted(script)));
        }
    }
    if let Executor::Docker(containers) = &parts.spec.executor {
        docker(containers, parts.clone.is_some()).into_iter().for_each(&mut add);
    }
    if settings.custom_build_dir {
        add("  [runners.custom_build_dir]".into());
        add("    enabled = true".into());
    }
    if parts.cache {
        for line in CACHE {
            add(line.into());
        }
    }
    add("  [runners.feature_flags]".into());
    for (flag, on) in &settings.feature_flags {
        // Ours win, should both be there: a line twice is no TOML.
        if !PINNED_FLAGS.iter().any(|(pinned, _)| pinned == flag) {
            add(format!("    {} = {on}", quoted(flag)));
        }
    }
    for (flag, on) in PINNED_FLAGS {
        add(format!("    {flag} = {on}"));
    }
    text
}

/// The section of the Docker executor. The VM goes with its job: a volume for the sources and a cache would cost a container
/// each and keep nothing, and a container image that is there was put there for this. For the same reason a job may ask for
/// any policy.
fn docker(containers: &DockerSettings, clone: bool) -> Vec<String> {
    let quoted = |text: &str| toml_edit::Value::from(text).to_string();
    let mut lines = vec!["  [runners.docker]".to_owned()];
    for (key, image) in [("image", &containers.image), ("helper_image", &containers.helper_image)] {
        lines.extend(image.as_deref().map(|image| format!("    {key} = {}", quoted(image))));
    }
    lines.push(r#"    pull_policy = ["if-not-present"]"#.into());
    lines.push(r#"    allowed_pull_policies = ["always", "if-not-present", "never"]"#.into());
    lines.push(format!("    wait_for_services_timeout = {SERVICE_WAIT_S}"));
    lines.push("    disable_cache = true".into());
    let mut volumes = vec![BUILDS_VOLUME];
    volumes.extend(containers.socket.then_some(SOCKET_VOLUME));
    volumes.extend(clone.then_some(CLONE_VOLUME));
    lines.push(format!(
        "    volumes = [{}]",
        volumes.iter().map(|volume| quoted(volume)).collect::<Vec<_>>().join(", ")
    ));
    lines.push(format!("    privileged = {}", containers.privileged));
    lines
}

/// The variables as they are wanted; with a proxy among them, the way to GitLab stays out of it: in a guest that is the
/// relay, which no proxy can reach.
fn environment(wanted: &[EnvironmentLine]) -> Vec<String> {
    let is = |line: &EnvironmentLine, names: &[&str]| names.contains(&line.name().to_ascii_lowercase().as_str());
    let mut lines: Vec<String> = wanted.iter().map(|line| line.0.clone()).collect();
    if wanted.iter().any(|line| is(line, &["http_proxy", "https_proxy", "all_proxy"])) {
        let relay = RELAY_URL.trim_start_matches("http://");
        let but: Vec<&str> =
            wanted.iter().filter(|line| is(line, &["no_proxy"])).map(EnvironmentLine::value).chain([relay]).collect();
        let but = but.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(",");
        lines.retain(|line| !line.to_ascii_lowercase().starts_with("no_proxy="));
        // Programs differ in which of the two they read.
        lines.extend(["NO_PROXY", "no_proxy"].map(|name| format!("{name}={but}")));
    }
    lines
}

/// The guest token, out of the config.toml that carries it.
#[must_use]
pub fn guest_token(config: &GuestConfig) -> Secret {
    let parsed = config.runner.config_toml.parse::<toml_edit::DocumentMut>().ok();
    let token = parsed.as_ref().and_then(|doc| doc.get("runners")?.get(0)?.get("token")?.as_str().map(str::to_owned));
    Secret::new(token.unwrap_or_default())
}

/// Random bytes as a UUID of version 4.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let h = hex(&bytes);
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// A machine-id for the whole installation, made once.
#[must_use]
pub fn new_machine_id(rng: &Rng) -> String {
    hex(&rng.bytes::<16>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_spec::GuestSettings;

    fn config(name: &str) -> GuestConfig {
        config_with(name, GuestSettings::default())
    }

    fn config_with(name: &str, settings: GuestSettings) -> GuestConfig {
        let mut spec = MachineSpec::example();
        spec.runner.name = name.to_owned();
        spec.runner.settings = settings;
        spec.runner.clone_url = "https://gitlab.example/root/".parse().unwrap();
        spec.runner.ca_pem = Some("PEM".into());
        config_of(&spec, true, None)
    }

    /// What a guest of this machine is told.
    fn config_of(spec: &MachineSpec, cache: bool, clone: Option<&Attached>) -> GuestConfig {
        let rng = Rng::seeded(1);
        let parts = GuestParts {
            vm: &VmId::random(&rng),
            lease: &Lease::User { port: 20_000 },
            spec,
            installation_machine_id: "0123456789abcdef0123456789abcdef",
            wait_timeout: Duration::from_secs(360),
            door_patience: Duration::from_secs(60),
            power_off_after: Duration::from_secs(1800),
            log_mib_max: 256,
            cache,
            clone,
        };
        guest_config(&parts, &Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap()), &rng)
    }

    #[test]
    fn any_runner_name_survives_toml() {
        for name in ["plain", "with \"quotes\" and \\", "ünïcode [x]", "-c /etc/passwd", "tab\tand\u{7f}"] {
            let text = config(name).runner.config_toml;
            let parsed: toml_edit::DocumentMut = text.parse().unwrap();
            assert_eq!(parsed["runners"][0]["name"].as_str(), Some(name));
            assert_eq!(parsed["runners"][0]["clone_url"].as_str(), Some("https://gitlab.example/root"));
            assert_eq!(parsed["runners"][0]["feature_flags"]["FF_TIMESTAMPS"].as_bool(), Some(true));
        }
    }

    fn runner_of(settings: GuestSettings) -> toml_edit::Table {
        let text = config_with("r", settings).runner.config_toml;
        let parsed: toml_edit::DocumentMut = text.parse().unwrap_or_else(|error| panic!("{error}: {text}"));
        parsed["runners"].as_array_of_tables().unwrap().get(0).unwrap().clone()
    }

    /// U15: the guest's runner cuts a log where the daemon would, and not at its own 4 MiB; an entry may want less.
    #[test]
    fn the_runners_own_limit_of_a_log_follows_the_spools() {
        let limit = |output_limit_mib| {
            let settings = GuestSettings { output_limit_mib, ..GuestSettings::default() };
            runner_of(settings)["output_limit"].as_integer().unwrap()
        };
        assert_eq!(limit(None), 256 * 1024);
        assert_eq!(limit(Some(1)), 1024);
        assert_eq!(limit(Some(1000)), 256 * 1024);
    }

    /// What shops have in their runners' entries arrives in the guest's config.toml, whatever is in it.
    #[test]
    fn the_entrys_settings_are_the_guest_runners() {
        let script = "echo \"a 'b' \\ \"\"\"\n\tset -e\n".to_owned();
        let settings = GuestSettings {
            environment: vec![EnvironmentLine("A=b \"c\"=d".into())],
            pre_get_sources_script: Some(script.clone()),
            post_get_sources_script: Some("two".into()),
            pre_build_script: Some("three".into()),
            post_build_script: Some("four".into()),
            feature_flags: [("FF_USE_FASTZIP".to_owned(), true), ("FF_TIMESTAMPS".to_owned(), false)].into(),
            custom_build_dir: true,
            ..GuestSettings::default()
        };
        let runner = runner_of(settings);
        assert_eq!(runner["environment"][0].as_str(), Some("A=b \"c\"=d"));
        assert_eq!(runner["pre_get_sources_script"].as_str(), Some(script.as_str()));
        for (key, text) in
            [("post_get_sources_script", "two"), ("pre_build_script", "three"), ("post_build_script", "four")]
        {
            assert_eq!(runner[key].as_str(), Some(text));
        }
        assert_eq!(runner["custom_build_dir"]["enabled"].as_bool(), Some(true));
        assert_eq!(runner["feature_flags"]["FF_USE_FASTZIP"].as_bool(), Some(true));
        assert_eq!(runner["feature_flags"]["FF_TIMESTAMPS"].as_bool(), Some(true), "pinned");
    }

    /// The runner finds a store at its relay, and signs for it with what is worth nothing.
    #[test]
    fn a_cache_is_at_the_relay() {
        let runner = runner_of(GuestSettings::default());
        let s3 = &runner["cache"]["s3"];
        assert_eq!(s3["ServerAddress"].as_str(), RELAY_URL.strip_prefix("http://"));
        assert_eq!((s3["BucketName"].as_str(), s3["Insecure"].as_bool()), (Some("cache"), Some(true)));
        assert_eq!(runner["cache"]["Shared"].as_bool(), Some(true));
        assert!(s3.get("RoleARN").is_none() && s3.get("UploadRoleARN").is_none());
    }

    fn toml_of(executor: Executor) -> toml_edit::Table {
        let rng = Rng::seeded(1);
        let spec = MachineSpec { executor, ..MachineSpec::example() };
        let parts = GuestParts {
            vm: &VmId::random(&rng),
            lease: &Lease::User { port: 20_000 },
            spec: &spec,
            installation_machine_id: "0123456789abcdef0123456789abcdef",
            wait_timeout: Duration::from_secs(360),
            door_patience: Duration::from_secs(60),
            power_off_after: Duration::from_secs(1800),
            log_mib_max: 256,
            cache: true,
            clone: None,
        };
        let parsed: toml_edit::DocumentMut = config_toml(&parts, "gitlab-runner").parse().unwrap();
        parsed["runners"].as_array_of_tables().unwrap().get(0).unwrap().clone()
    }

    #[test]
    fn each_executor_has_its_own_part_of_the_file() {
        let shell = toml_of(Executor::Shell);
        assert_eq!(
            (shell["executor"].as_str(), shell["builds_dir"].as_str()),
            (Some("shell"), Some("/home/gitlab-runner/builds"))
        );
        assert!(!shell.contains_key("docker"));

        let plain = toml_of(Executor::Docker(DockerSettings::default()));
        assert_eq!(plain["executor"].as_str(), Some("docker"));
        assert!(
            !plain.contains_key("builds_dir") && !plain.contains_key("cache_dir"),
            "the runner's own, in the container"
        );
        let docker = plain["docker"].as_table().unwrap();
        assert!(!docker.contains_key("image") && !docker.contains_key("helper_image"));
        assert_eq!(docker["volumes"].as_array().unwrap().len(), 1);
        assert_eq!((docker["disable_cache"].as_bool(), docker["privileged"].as_bool()), (Some(true), Some(false)));

        let containers = DockerSettings {
            image: Some("registry.example/a\"b".into()),
            helper_image: Some("dayfly/helper:19.3.0".into()),
            socket: true,
            privileged: true,
        };
        let all = toml_of(Executor::Docker(containers));
        let docker = all["docker"].as_table().unwrap();
        assert_eq!(docker["image"].as_str(), Some("registry.example/a\"b"));
        assert_eq!(docker["helper_image"].as_str(), Some("dayfly/helper:19.3.0"));
        assert_eq!(docker["volumes"][1].as_str(), Some("/var/run/docker.sock:/var/run/docker.sock"));
        assert_eq!(
            (docker["privileged"].as_bool(), docker["pull_policy"][0].as_str()),
            (Some(true), Some("if-not-present"))
        );
        assert_eq!(all["feature_flags"]["FF_TIMESTAMPS"].as_bool(), Some(true), "what comes after it");
    }

    /// Git in a job is told where to look, by its environment and nothing else; in a container the place is the same.
    #[test]
    fn what_the_host_has_of_a_repository_is_told_to_git() {
        let attached = Attached { disks: vec!["/a".into(), "/b".into()], slot: Some("/c".into()) };
        let with = |environment: Vec<EnvironmentLine>, executor: Executor, clone: Option<&Attached>| {
            let mut spec = MachineSpec { executor, ..MachineSpec::example() };
            spec.runner.settings.environment = environment;
            config_of(&spec, false, clone)
        };
        let line = "GIT_ALTERNATE_OBJECT_DIRECTORIES=/run/dayfly/clone/objects";
        let config = with(Vec::new(), Executor::Shell, Some(&attached));
        assert_eq!(config.clone, Some(GuestClone { disks: 2, slot: true }));
        assert!(
            config.runner.config_toml.contains(&format!("environment = [\"{line}\"]")),
            "{}",
            config.runner.config_toml
        );
        let none = with(Vec::new(), Executor::Shell, None);
        assert!(none.clone.is_none() && !none.runner.config_toml.contains("GIT_ALTERNATE"));
        let own =
            with(vec![EnvironmentLine("GIT_ALTERNATE_OBJECT_DIRECTORIES=/x".into())], Executor::Shell, Some(&attached));
        assert_eq!(own.runner.config_toml.matches("GIT_ALTERNATE").count(), 1);
        let docker = with(Vec::new(), Executor::Docker(DockerSettings::default()), Some(&attached));
        assert!(docker.runner.config_toml.contains("\"/run/dayfly/clone:/run/dayfly/clone:ro\""));
        assert!(
            !with(Vec::new(), Executor::Docker(DockerSettings::default()), None)
                .runner
                .config_toml
                .contains("/run/dayfly")
        );
    }

    /// U43: no job can have itself suspended: there is nobody to wake it.
    #[test]
    fn suspending_is_switched_off_where_no_job_can_switch_it_on() {
        let flags = [("FF_SUSPENDABLE_ENVIRONMENTS".to_owned(), true)].into();
        for settings in [GuestSettings::default(), GuestSettings { feature_flags: flags, ..GuestSettings::default() }] {
            let runner = runner_of(settings);
            assert_eq!(runner["feature_flags"]["FF_SUSPENDABLE_ENVIRONMENTS"].as_bool(), Some(false));
        }
    }

    #[test]
    fn the_way_to_gitlab_goes_by_no_proxy() {
        let of =
            |lines: &[&str]| environment(&lines.iter().map(|line| EnvironmentLine((*line).into())).collect::<Vec<_>>());
        assert_eq!(of(&["A=b", "NO_PROXY=x"]), ["A=b", "NO_PROXY=x"]);
        assert_eq!(
            of(&["https_proxy=http://p:3128", "No_Proxy=a,b"]),
            ["https_proxy=http://p:3128", "NO_PROXY=a,b,192.0.2.1", "no_proxy=a,b,192.0.2.1"]
        );
        assert_eq!(of(&["HTTP_PROXY=p"])[1], "NO_PROXY=192.0.2.1");
    }

    #[test]
    fn the_config_travels_whole_and_never_prints_its_secrets() {
        let config = config("r");
        let read = GuestConfig::from_line(&config.to_line()).unwrap();
        assert_eq!(read.to_line(), config.to_line());
        let printed = format!("{config:?}");
        assert!(!printed.contains(&config.pass) && !printed.contains(&config.seed) && !printed.contains("glrt-"));
    }
}
