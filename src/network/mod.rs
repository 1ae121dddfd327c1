//! What is this VM's lease, and what may it reach?
//!
//! | mode | network card | what a job reaches |
//! | --- | --- | --- |
//! | `relay` | none | what the VM's own `dayfly-egress` lets through, by name: TCP and DNS (decision D27) |
//! | `user` | QEMU's SLIRP | what this host reaches, its loopback included, but for what a fence keeps from users of VMs (packaging/fence) |
//!
//! In both the door is behind a wire of the VM's own, which takes nothing of the host's network (decision D26). A guest
//! of the contract before that has its door at a loopback port from a configured range: it reaches the host's loopback at
//! 10.0.2.2, as every VM in mode `user` reaches every loopback port of the host, such doors included, and the pass alone
//! separates them (decision D14).
//!
//! A lease is plain data in a record. It is nobody else's from [`Network::acquire`], or [`Network::adopt`] after a
//! restart, to [`Network::release`], which comes when no record on disk names it any more: two records must never name
//! one port, for after a restart each opens its own door again. Used by `supply`, alone.

mod egress;
mod forward;
mod listen;
mod policy;

pub use dayfly_egress::policy::Pattern;
pub use egress::{Egress, EgressError, EgressOf, EgressProcesses, PROGRAM as EGRESS_PROGRAM, SERVICE_SOCKET, Terms};
pub use forward::{Forward, ForwardConfig};
pub use listen::{DoorListener, Entrance, Listen, Tcp};
pub use policy::{EgressChange, EgressConfig, always};

use crate::vm::Attachment;
use crate::vm::sockets::DoorSocket;
use dayfly_guest_config::{DOOR_WIRE, GuestNetwork};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Section `[network]` of the configuration: what is left of it since classes choose their network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The network of classes that choose none.
    pub mode: Option<Choice>,
    /// Loopback ports for the doors of guests of the contract before doors were wires. Outside the ephemeral range
    /// (32768–60999 on Linux), or a port could be taken while the daemon is away.
    pub guest_ports: PortRange,
}

impl Default for Config {
    fn default() -> Self {
        Self { mode: None, guest_ports: PortRange { first: 20_000, last: 20_999 } }
    }
}

/// What a class may say of its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// [`Mode::Relay`].
    Relay,
    /// [`Mode::User`].
    User,
    /// A network of the host's; refused so far.
    Bridge,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "relay" => Ok(Self::Relay),
            "user" => Ok(Self::User),
            _ => Err("one of relay, user".to_owned()),
        }
    }
}

/// What network a machine has. Plain data: it stands in records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// SLIRP: no host set-up, no isolation from the host's loopback and network.
    User,
    /// No network card: TCP and DNS go over a port of the VM's to a process outside, which decides by name.
    Relay,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "user",
            Self::Relay => "relay",
        })
    }
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

/// By what a guest reaches its door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorKind {
    /// A wire of its own.
    Wire,
    /// A port of the host's loopback: all that a guest of the contract before knows.
    Port,
}

/// What one VM holds of the host's network. Plain data: it stands in records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Lease {
    /// Mode `user`, the door behind a wire: nothing.
    #[serde(rename = "wire")]
    Wire,
    /// Mode `relay`, whose door is always behind a wire: nothing.
    #[serde(rename = "relay")]
    Relay,
    /// Mode `user`, the door at a port.
    #[serde(untagged)]
    User {
        /// Port of the door on the host's loopback.
        port: u16,
    },
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wire => write!(f, "wire"),
            Self::Relay => write!(f, "relay"),
            Self::User { port } => write!(f, "port {port}"),
        }
    }
}

impl Lease {
    /// Where the guest connects to. SLIRP maps 10.0.2.2 to the host's loopback.
    #[must_use]
    pub fn guest_door(&self) -> String {
        match self {
            Self::Wire | Self::Relay => DOOR_WIRE.to_owned(),
            Self::User { port } => format!("10.0.2.2:{port}"),
        }
    }

    /// What the VM's network is attached to.
    #[must_use]
    pub fn attachment(&self) -> Attachment {
        match self {
            Self::Relay => Attachment::Egress,
            Self::Wire | Self::User { .. } => Attachment::User,
        }
    }

    /// The guest's addresses: SLIRP's fixed ones; or those on `lo` that all guests without a card have, from networks
    /// that are nobody's (RFC 5737, RFC 2544).
    #[must_use]
    pub fn guest_network(&self) -> GuestNetwork {
        match self {
            Self::Relay => GuestNetwork {
                mac: None,
                address: "198.18.0.2/32".into(),
                gateway: Ipv4Addr::new(192, 0, 2, 1).into(),
                dns: vec![Ipv4Addr::new(192, 0, 2, 1).into()],
                relay: true,
            },
            Self::Wire | Self::User { .. } => GuestNetwork {
                mac: None,
                address: "10.0.2.15/24".into(),
                gateway: Ipv4Addr::new(10, 0, 2, 2).into(),
                dns: vec![Ipv4Addr::new(10, 0, 2, 3).into()],
                relay: false,
            },
        }
    }
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// No port of the range is free: one may be, in a while.
    #[error("all {0} ports of `network.guest_ports` are in use")]
    NoFreePort(usize),
    /// Each user for VMs has one: one of them will go.
    #[error("all {0} users of `hypervisor.vm_users` have a machine")]
    NoFreeUser(usize),
    /// The host lets nobody listen.
    #[error("listen at {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// The leases given out. Clones share them.
#[derive(Clone)]
pub struct Network(Arc<Shared>);

struct Shared {
    listen: Arc<dyn Listen>,
    egress: Arc<dyn Egress>,
    /// Held for a few lines, never across an await.
    ports: Mutex<Ports>,
}

struct Ports {
    range: PortRange,
    /// Each with its door until somebody wants that.
    taken: BTreeMap<u16, Option<Box<dyn DoorListener>>>,
    /// Found in use by others, skipped until no other is left.
    foreign: BTreeSet<u16>,
}

impl Ports {
    /// Takes the lowest free port.
    fn take(&mut self) -> Result<u16, LeaseError> {
        let range = self.range;
        let port = (range.first..=range.last).find(|p| !self.taken.contains_key(p) && !self.foreign.contains(p));
        let Some(port) = port else {
            // The next call tries those again that were others', who may have gone.
            self.foreign.clear();
            return Err(LeaseError::NoFreePort(usize::from(range.last - range.first) + 1));
        };
        self.taken.insert(port, None);
        Ok(port)
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

impl Network {
    /// A network with nothing given out.
    #[must_use]
    pub fn new(config: &Config, listen: Arc<dyn Listen>, egress: Arc<dyn Egress>) -> Self {
        let ports = Ports { range: config.guest_ports, taken: BTreeMap::new(), foreign: BTreeSet::new() };
        Self(Arc::new(Shared { listen, egress, ports: Mutex::new(ports) }))
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.0.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The processes that carry what machines without a network card send out.
    #[must_use]
    pub fn egress(&self) -> &dyn Egress {
        &*self.0.egress
    }

    /// Another range for the leases to come.
    pub fn set_ports(&self, range: PortRange) {
        self.ports().range = range;
    }

    /// A lease for a new VM. A door at a port is bound already: a port that is somebody else's is no lease of ours, and
    /// the next one is tried. To be released also if nothing is made of it.
    ///
    /// # Errors
    /// [`LeaseError`].
    pub async fn acquire(&self, mode: Mode, door: DoorKind) -> Result<Lease, LeaseError> {
        match (mode, door) {
            (Mode::Relay, _) => Ok(Lease::Relay),
            (Mode::User, DoorKind::Wire) => Ok(Lease::Wire),
            (Mode::User, DoorKind::Port) => loop {
                let port = self.ports().take()?;
                let error = match self.0.listen.listen(loopback(port)).await {
                    Ok(door) => {
                        self.ports().taken.insert(port, Some(door));
                        return Ok(Lease::User { port });
                    }
                    Err(error) => error,
                };
                let mut ports = self.ports();
                ports.taken.remove(&port);
                if error.kind() != io::ErrorKind::AddrInUse {
                    return Err(LeaseError::Listen { address: loopback(port), source: error });
                }
                tracing::info!(port, "somebody else listens at this port; trying another");
                ports.foreign.insert(port);
            },
        }
    }

    /// A lease that a record of before names is taken, by that one.
    pub fn adopt(&self, lease: &Lease) {
        match lease {
            Lease::Wire | Lease::Relay => {}
            Lease::User { port } => {
                self.ports().taken.entry(*port).or_default();
            }
        }
    }

    /// The door of a lease: a port's once as it was bound, and anew when that one is closed. `wire`: the VM's.
    ///
    /// # Errors
    /// The host's; `AddrInUse` while the process before is still closing a port. A wire is there when its VM is.
    pub async fn listen(&self, lease: &Lease, wire: DoorSocket) -> io::Result<Entrance> {
        match lease {
            Lease::Wire | Lease::Relay => Ok(Entrance::Wire(wire)),
            Lease::User { port } => {
                let bound = self.ports().taken.get_mut(port).and_then(Option::take);
                match bound {
                    Some(door) => Ok(Entrance::Port(door)),
                    None => self.0.listen.listen(loopback(*port)).await.map(Entrance::Port),
                }
            }
        }
    }

    /// Gives a lease back. On disk nothing names it any more.
    ///
    /// # Errors
    /// None so far; to be tried again.
    pub async fn release(&self, lease: &Lease) -> Result<(), LeaseError> {
        match lease {
            Lease::Wire | Lease::Relay => Ok(()),
            Lease::User { port } => {
                self.ports().taken.remove(port);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
