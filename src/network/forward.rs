//! What of this host's network may a machine reach beside its door? `[[forward]]`: one address, at a port of the relay's.
//!
//! It goes over the door's wire, so that it is there in every network mode and no egress policy has a say: a stream names
//! a port, and what is behind that is looked up on this side alone (`guest::forward`).

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// `[[forward]]`: what jobs of some classes reach at the relay's address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardConfig {
    /// Its name, for logs and metrics.
    pub name: String,
    /// Where the daemon connects to.
    pub address: SocketAddr,
    /// Where a job does, at 192.0.2.1.
    pub port: u16,
    /// The classes whose jobs do.
    pub classes: Vec<String>,
}

impl ForwardConfig {
    /// What of it a machine gets.
    #[must_use]
    pub fn forward(&self) -> Forward {
        Forward { name: self.name.clone(), address: self.address, port: self.port }
    }
}

/// One forward of a machine. Plain data: it stands in records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// See [`ForwardConfig::name`].
    pub name: String,
    /// See [`ForwardConfig::address`].
    pub address: SocketAddr,
    /// See [`ForwardConfig::port`].
    pub port: u16,
}
