//! What machine does a job get? Plain data, resolved once and part of the job (decision D23).
//!
//! `job::resolve` makes it of class, runner entry and payload between GitLab's 201 and the journal. It stands in the
//! job's record, and everything behind that reads it from there: whatever the configuration says after a reload or a
//! restart, a job that was accepted runs in what it was accepted for. A boot test makes one by hand.

use crate::network;
use crate::secret::{self, Secret};
use serde::{Deserialize, Serialize};
use url::Url;

/// One job's machine, from its image to what its runner believes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// The base image.
    pub image: ImageRef,
    /// The guest contract that the image's guest program speaks.
    pub contract: u32,
    /// Executor that the guest runner's config.toml names, from the image: `shell`.
    pub executor: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Virtual disk, GiB; no smaller than the image's.
    pub disk_gib: u64,
    /// Whether the job runs as root in the guest.
    pub run_as_root: bool,
    /// What the guest's network is.
    pub network: network::Mode,
    /// What the guest's runner is called and told.
    pub runner: GuestRunnerSpec,
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
}

#[cfg(test)]
impl MachineSpec {
    /// The machine of a small class on the image `test`.
    #[must_use]
    pub fn example() -> Self {
        Self {
            image: ImageRef { name: "test".into(), digest: "ab".repeat(32) },
            contract: dayfly_guest_config::CONTRACT,
            executor: "shell".into(),
            cpus: 1,
            memory_mib: 512,
            disk_gib: 10,
            run_as_root: false,
            network: network::Mode::User,
            runner: GuestRunnerSpec {
                name: "linux \"vm\"/1".into(),
                token: Secret::new("glrt-123456789abcdef"),
                clone_url: "https://gitlab.example".parse().unwrap(),
                ca_pem: None,
                direct_download: false,
            },
        }
    }
}
