//! The other side: the same machine, image and runner, without dayfly.
//!
//! The domain is made of dayfly's own spec by the same hypervisor, and the guest gets a config like any other. Only
//! its runner's config.toml names GitLab itself, as the guest reaches it, and GitLab's token: no relay, no door.

use crate::byhand::{ByHand, Told};
use dayfly::network::Lease;
use dayfly::vm::{Host, VmSpec};
use dayfly_guest_config::RELAY_URL;

/// A machine like dayfly's that runs one job for GitLab itself: `told` says where, as the guest reaches it.
pub(super) async fn start(host: &Host, dayflys: &VmSpec, told: &Told) -> Result<ByHand, String> {
    ByHand::start(host, dayflys, |spec, rng| {
        // Nobody is there, and nobody asks: the runner never goes to the relay.
        let mut config = told.config(spec, &Lease::User { port: 1 }, rng);
        let gitlab = told.clone_url.as_str().trim_end_matches('/');
        config.runner.config_toml = config.runner.config_toml.replace(RELAY_URL, gitlab);
        config
    })
    .await
}
