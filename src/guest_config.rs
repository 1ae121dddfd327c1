//! What is a guest told, and how is it written?
//!
//! Puts the guest config together: identity, network, and the text of the guest runner's
//! config.toml (decision D9). Its form on the wire is the crate `dayfly-guest-config`'s.

use crate::clock::Clock;
use crate::machine_spec::MachineSpec;
use crate::network::Lease;
use crate::rng::Rng;
use crate::secret::Secret;
use crate::vm::VmId;
use dayfly_guest_config::{CA_FILE, GuestConfig, GuestRunner, Pass, RELAY_URL};
use std::fmt::Write as _;
use std::time::Duration;

/// How often the guest runner tries its final PUT; the door answers from the host, so that this
/// many cover a long restart (the official runner's default is 10).
const FINAL_UPDATE_TRIES: u32 = 20;

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
        network: parts.lease.guest_network(),
        runner: GuestRunner {
            config_toml: config_toml(parts, user),
            ca_pem: parts.spec.runner.ca_pem.clone(),
            name: parts.spec.runner.name.clone(),
            user: user.to_owned(),
            wait_timeout_s: parts.wait_timeout.as_secs(),
        },
        door_patience_s: parts.door_patience.as_secs(),
        power_off_after_s: parts.power_off_after.as_secs(),
    }
}

/// The guest runner's config.toml. Unknown keys are ignored by every version, so newer ones may
/// always be written.
fn config_toml(parts: &GuestParts<'_>, user: &str) -> String {
    let runner = &parts.spec.runner;
    let quoted = |text: &str| toml_edit::Value::from(text).to_string();
    let home = if user == "root" { "/root".to_owned() } else { format!("/home/{user}") };
    let mut text = String::new();
    let mut add = |line: String| writeln!(text, "{line}").expect("a String takes all");
    add("concurrent = 1".into());
    add("check_interval = 3".into());
    add("[[runners]]".into());
    add(format!("  name = {}", quoted(&runner.name)));
    add(format!("  url = {}", quoted(RELAY_URL)));
    add(format!("  token = {}", quoted(runner.token.expose())));
    add(format!("  executor = {}", quoted(&parts.spec.executor)));
    add("  limit = 1".into());
    add(format!("  clone_url = {}", quoted(runner.clone_url.as_str().trim_end_matches('/'))));
    if runner.ca_pem.is_some() {
        add(format!("  tls-ca-file = {}", quoted(CA_FILE)));
    }
    add(format!("  builds_dir = {}", quoted(&format!("{home}/builds"))));
    add(format!("  cache_dir = {}", quoted(&format!("{home}/cache"))));
    add(format!("  job_status_final_update_retry_limit = {FINAL_UPDATE_TRIES}"));
    // Pinned: GitLab decides from line 1, which is ours, whether a log has timestamps.
    add("  [runners.feature_flags]".into());
    add("    FF_TIMESTAMPS = true".into());
    add("    FF_USE_JOB_ROUTER = false".into());
    add("    FF_CONCRETE = false".into());
    text
}

/// The guest token, out of the config.toml that carries it.
#[must_use]
pub fn guest_token(config: &GuestConfig) -> Secret {
    let parsed = config.runner.config_toml.parse::<toml_edit::DocumentMut>().ok();
    let token = parsed.as_ref().and_then(|doc| doc.get("runners")?.get(0)?.get("token")?.as_str().map(str::to_owned));
    Secret::new(token.unwrap_or_default())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes all");
        text
    })
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

    fn config(name: &str) -> GuestConfig {
        let rng = Rng::seeded(1);
        let mut spec = MachineSpec::example();
        spec.runner.name = name.to_owned();
        spec.runner.clone_url = "https://gitlab.example/root/".parse().unwrap();
        spec.runner.ca_pem = Some("PEM".into());
        let parts = GuestParts {
            vm: &VmId::random(&rng),
            lease: &Lease::User { port: 20_000 },
            spec: &spec,
            installation_machine_id: "0123456789abcdef0123456789abcdef",
            wait_timeout: Duration::from_secs(360),
            door_patience: Duration::from_secs(60),
            power_off_after: Duration::from_secs(1800),
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

    #[test]
    fn the_config_travels_whole_and_never_prints_its_secrets() {
        let config = config("r");
        let read = GuestConfig::from_line(&config.to_line()).unwrap();
        assert_eq!(read.to_line(), config.to_line());
        let printed = format!("{config:?}");
        assert!(!printed.contains(&config.pass) && !printed.contains(&config.seed) && !printed.contains("glrt-"));
    }
}
