//! What machine does a job get? Plain data, resolved once and part of the job (decision D23).
//!
//! `job::resolve` makes it of class, runner entry and payload between GitLab's 201 and the journal. It stands in the
//! job's record, and everything behind that reads it from there: whatever the configuration says after a reload or a
//! restart, a job that was accepted runs in what it was accepted for. A boot test makes one by hand.

use crate::network;
use crate::secret::{self, Secret};
use crate::vm;
use dayfly_egress::policy::Policy;
use dayfly_guest_config::WIRE_CONTRACT;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use url::Url;

/// One job's machine, from its image to what its runner believes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// The base image.
    pub image: ImageRef,
    /// The guest contract that the image's guest program speaks.
    pub contract: u32,
    /// How the guest's runner runs the job.
    pub executor: Executor,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Virtual disk, GiB; no smaller than the image's.
    pub disk_gib: u64,
    /// Whether the job runs as root in the guest.
    pub run_as_root: bool,
    /// Whether its guest may run VMs of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nested: bool,
    /// How much it may use of the host; none in records of before there were such limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<vm::Limits>,
    /// Where its machine may come from.
    #[serde(default, skip_serializing_if = "Start::is_auto")]
    pub start: Start,
    /// What the guest's network is.
    pub network: network::Mode,
    /// What its job may reach, where it has no network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Policy>,
    /// What of this host's network it reaches beside its door.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<network::Forward>,
    /// What the guest's runner is called and told.
    pub runner: GuestRunnerSpec,
    /// For how long it is kept when its job has failed; none: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_failed: Option<KeepFailed>,
    /// What its author is told of how it was chosen, a line each: what was asked for, and what came of that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// That a machine is kept when its job has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepFailed {
    /// For how long, seconds.
    pub for_s: u64,
    /// So many of its class at once at most.
    pub at_once: u32,
}

/// Where a job's machine comes from. Its job does not know the difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// The quickest way that this host has proven.
    #[default]
    Auto,
    /// It boots.
    Cold,
    /// It is restored from one that was frozen while it waited for a job; until there is one, it boots.
    Restored,
}

impl Start {
    /// Whether nothing else was asked for.
    #[must_use]
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// How large a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Virtual disk, GiB.
    pub disk_gib: u64,
}

/// How a guest's runner runs a job: what its config.toml says of that (`guest_config`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Executor {
    /// In the machine itself.
    Shell,
    /// In containers of a Docker in the machine, `image:` and `services:` of the job.
    Docker(DockerSettings),
}

/// What the class and the image say about a job's containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DockerSettings {
    /// The container image of a job that names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The runner's helper image, inside the VM's image; none: the runner fetches its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub helper_image: Option<String>,
    /// Whether a job's containers see the socket of the machine's Docker, so that a job can build and run containers.
    pub socket: bool,
    /// Whether a job's containers may do what the machine's root may.
    pub privileged: bool,
}

impl Executor {
    /// Its name in the runner's config.toml, and in ours.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shell => "shell",
            Self::Docker(_) => "docker",
        }
    }
}

/// One version of a base image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRef {
    /// Its name.
    pub name: String,
    /// Its content, see `image::store::Image::digest`: hex.
    pub digest: String,
}

/// What a guest's runner is called and told (decision D9), and what its door lets through.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRunnerSpec {
    /// Name of the runner as GitLab's users know it.
    pub name: String,
    /// The token that only looks right.
    #[serde(with = "secret::text")]
    pub token: Secret,
    /// GitLab's URL as the guest reaches it.
    pub clone_url: Url,
    /// GitLab's chain, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_pem: Option<String>,
    /// Whether the guest fetches artifacts straight from object storage.
    pub direct_download: bool,
    /// What the entry wants of the guest's runner besides.
    #[serde(default, skip_serializing_if = "GuestSettings::is_default")]
    pub settings: GuestSettings,
}

/// Flags that no entry and no job can change, for the runner believes its config.toml first.
///
/// GitLab decides from line 1 of a log, which is ours, whether it has timestamps. Jobs come by polls of ours. And no
/// machine can be suspended and found again: a job variable could else make a system failure of a success.
pub const PINNED_FLAGS: [(&str, bool); 4] = [
    ("FF_TIMESTAMPS", true),
    ("FF_USE_JOB_ROUTER", false),
    ("FF_CONCRETE", false),
    ("FF_SUSPENDABLE_ENVIRONMENTS", false),
];

/// What a runner's entry says for its guests' config.toml, by gitlab-runner's own keys. None of it is looked at here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSettings {
    /// MiB of a job's log; none: as much as is kept here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_limit_mib: Option<u64>,
    /// Variables of every job.
    pub environment: Vec<EnvironmentLine>,
    /// Before a job's sources are fetched.
    pub pre_get_sources_script: Option<String>,
    /// After that.
    pub post_get_sources_script: Option<String>,
    /// Before a job's own commands.
    pub pre_build_script: Option<String>,
    /// After them.
    pub post_build_script: Option<String>,
    /// Feature flags, on or off.
    pub feature_flags: BTreeMap<String, bool>,
    /// Whether jobs may choose their build directory (`GIT_CLONE_PATH`).
    pub custom_build_dir: bool,
}

impl GuestSettings {
    /// Whether nothing is wanted.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// `NAME=value`. The value may be what people should not see, a proxy's password say, and is not printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EnvironmentLine(pub String);

impl EnvironmentLine {
    /// The name, or all of it where there is no value.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split_once('=').map_or(&self.0, |(name, _)| name)
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> &str {
        self.0.split_once('=').map_or("", |(_, value)| value)
    }
}

impl fmt::Debug for EnvironmentLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=[redacted]", self.name())
    }
}

impl MachineSpec {
    /// By what its guest reaches its door: the image says what its guest program knows.
    #[must_use]
    pub fn door(&self) -> network::DoorKind {
        if self.contract >= WIRE_CONTRACT { network::DoorKind::Wire } else { network::DoorKind::Port }
    }
}

#[cfg(test)]
impl MachineSpec {
    /// The machine of a small class on the image `test`.
    #[must_use]
    pub fn example() -> Self {
        Self {
            image: ImageRef { name: "test".into(), digest: "ab".repeat(32) },
            contract: dayfly_guest_config::CONTRACT,
            executor: Executor::Shell,
            cpus: 1,
            memory_mib: 512,
            disk_gib: 10,
            run_as_root: false,
            nested: false,
            limits: None,
            start: Start::Auto,
            network: network::Mode::User,
            egress: None,
            forwards: Vec::new(),
            runner: GuestRunnerSpec {
                name: "linux \"vm\"/1".into(),
                token: Secret::new("glrt-123456789abcdef"),
                clone_url: "https://gitlab.example".parse().unwrap(),
                ca_pem: None,
                direct_download: false,
                settings: GuestSettings::default(),
            },
            keep_failed: None,
            notes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of before there was another executor names it as a text.
    #[test]
    fn an_executor_is_read_from_records_of_before() {
        let read = |text: &str| serde_json::from_str::<Executor>(text).map_err(|error| error.to_string());
        assert_eq!(read("\"shell\""), Ok(Executor::Shell));
        let docker = Executor::Docker(DockerSettings {
            image: Some("debian:12".into()),
            socket: true,
            ..DockerSettings::default()
        });
        let text = serde_json::to_string(&docker).unwrap();
        assert_eq!(text, r#"{"docker":{"image":"debian:12","socket":true,"privileged":false}}"#);
        assert_eq!(read(&text), Ok(docker));
        assert!(read("\"custom\"").unwrap_err().contains("expected `shell` or `docker`"));
    }
}
