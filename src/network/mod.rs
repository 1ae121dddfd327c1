//! Which address and port has this machine, and what may it reach?
//!
//! Mode `user` (SLIRP) needs no host set-up: the guest reaches the host's loopback at 10.0.2.2, so
//! a door is a loopback port from a configured range. Every VM reaches every loopback port of the
//! host, other doors included: the pass alone separates them (decision D14).
//! Used by `supply`. A lease is plain data in the job's record; the range is kept in one place.

use crate::vm::Attachment;
use dayfly_guest_config::GuestNetwork;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

/// Section `[network]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The network mode.
    pub mode: Mode,
    /// Loopback ports for doors, in mode `user`. Outside the ephemeral range (32768–60999 on
    /// Linux), or a port could be taken while the daemon is away.
    pub guest_ports: PortRange,
}

impl Default for Config {
    fn default() -> Self {
        Self { mode: Mode::User, guest_ports: PortRange { first: 20_000, last: 20_999 } }
    }
}

/// Network mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// SLIRP: no host set-up, no isolation from the host's loopback and network.
    User,
}

/// An inclusive range of ports, written `20000-20999`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

/// The text is no port range.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no port range like 20000-20999 with ports from 1024")]
pub struct BadPortRange(String);

impl FromStr for PortRange {
    type Err = BadPortRange;
    fn from_str(text: &str) -> Result<Self, BadPortRange> {
        let bad = || BadPortRange(text.to_owned());
        let (first, last) = text.split_once('-').ok_or_else(bad)?;
        let (first, last) = (first.trim().parse().map_err(|_| bad())?, last.trim().parse().map_err(|_| bad())?);
        if first < 1024 || last < first { Err(bad()) } else { Ok(Self { first, last }) }
    }
}

impl TryFrom<String> for PortRange {
    type Error = BadPortRange;
    fn try_from(text: String) -> Result<Self, BadPortRange> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Address and port of one VM's door. Plain data: it stands in the job's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Port of the door on the host's loopback.
    pub port: u16,
}

impl Lease {
    /// Where the host listens.
    #[must_use]
    pub fn listen_address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Where the guest connects to: SLIRP maps 10.0.2.2 to the host's loopback.
    #[must_use]
    pub fn guest_door(&self) -> String {
        format!("10.0.2.2:{}", self.port)
    }

    /// What the VM's network card is attached to.
    #[must_use]
    pub fn attachment(&self) -> Attachment {
        Attachment::User
    }

    /// The guest's addresses: SLIRP's fixed ones.
    #[must_use]
    pub fn guest_network(&self) -> GuestNetwork {
        GuestNetwork {
            mac: None,
            address: "10.0.2.15/24".into(),
            gateway: Ipv4Addr::new(10, 0, 2, 2).into(),
            dns: vec![Ipv4Addr::new(10, 0, 2, 3).into()],
        }
    }
}

/// No port of the range is free.
#[derive(Debug, thiserror::Error)]
#[error("all {0} ports of `network.guest_ports` are in use")]
pub struct NoFreePort(usize);

/// The leases given out. A small set under a mutex, never held across an await; clones share it.
#[derive(Clone, Debug)]
pub struct Network {
    range: Arc<Mutex<PortRange>>,
    taken: Arc<Mutex<BTreeSet<u16>>>,
    /// Ports found in use by others, skipped until no other is left.
    foreign: Arc<Mutex<BTreeSet<u16>>>,
}

impl Network {
    /// A network with nothing given out.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { range: Arc::new(Mutex::new(config.guest_ports)), taken: Arc::default(), foreign: Arc::default() }
    }

    /// Another range for the leases to come.
    pub fn set_ports(&self, range: PortRange) {
        *self.range.lock().unwrap_or_else(PoisonError::into_inner) = range;
    }

    /// Takes the lowest free port.
    ///
    /// # Errors
    /// [`NoFreePort`]: the next call tries those again that were others', who may have gone.
    pub fn lease(&self) -> Result<Lease, NoFreePort> {
        let range = *self.range.lock().unwrap_or_else(PoisonError::into_inner);
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let port = (range.first..=range.last).find(|p| !taken.contains(p) && !foreign.contains(p));
        let Some(port) = port else {
            foreign.clear();
            return Err(NoFreePort(usize::from(range.last - range.first) + 1));
        };
        taken.insert(port);
        Ok(Lease { port })
    }

    /// Takes the port of a recorded lease again, at adoption.
    pub fn adopt(&self, lease: &Lease) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(lease.port);
    }

    /// Gives a lease back.
    pub fn release(&self, lease: &Lease) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&lease.port);
    }

    /// Gives a lease back and skips its port while there are others: somebody else listens there.
    pub fn release_in_use(&self, lease: &Lease) {
        self.foreign.lock().unwrap_or_else(PoisonError::into_inner).insert(lease.port);
        self.release(lease);
    }

    /// How many leases are out.
    #[must_use]
    pub fn leased(&self) -> usize {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_out_once_and_come_back() {
        let network = Network::new(&Config { guest_ports: "2000-2001".parse().unwrap(), ..Config::default() });
        let (a, b) = (network.lease().unwrap(), network.lease().unwrap());
        assert_ne!(a, b);
        assert!(network.lease().is_err());
        network.release_in_use(&a);
        network.release(&b);
        assert_eq!(network.lease().unwrap(), b, "a port in use elsewhere is not tried again at once");
        assert!(network.lease().is_err());
        assert_eq!(network.lease().unwrap(), a, "its holder may have gone");
    }

    #[test]
    fn bad_ranges_are_refused() {
        for text in ["", "80-90", "3000", "3000-2000", "a-b", "70000-70001"] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }
}
