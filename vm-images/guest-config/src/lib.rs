//! What a guest is told at hand-out, what it reports, and by what its relay and its door believe each other.
//!
//! The one crate that the daemon and the guest program share, so that both sides of each format
//! stand in one place. No I/O: bytes in, bytes out.
//!
//! The guest config travels as one line of JSON over the virtio-serial port
//! [`PORT_NAME`]; the guest's reports come back as short lines of text. On the same port the guest
//! may ask what time it is.

mod clock;
mod greeting;
mod identity;
mod report;
mod session;
mod shell;
mod stay;

pub use clock::{ClockAnswer, ClockQuestion};
pub use greeting::{GREETING_LINE_MAX, Greeting, GreetingError, Nonce, PASS_BYTES, Pass};
pub use identity::system_id;
pub use report::{Can, REPORT_LINE_MAX, Report};
pub use session::{PROOF_BYTES, SessionProofs};
pub use shell::{BadFrame, ShellFrame, ShellFrames, TYPED_BYTES_MAX, TerminalSize, plain_term};
pub use stay::{STAY_MAX_S, Stay};

use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Name of the virtio-serial port, as in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "org.dayfly.guest.0";

/// Name of the virtio-serial port that is the wire to the door.
pub const DOOR_PORT_NAME: &str = "org.dayfly.door.0";

/// Name of the virtio-serial port over which what a job sends out leaves a VM without a network card.
pub const EGRESS_PORT_NAME: &str = "org.dayfly.egress.0";

/// Name of the virtio-serial port over which a host asks for a shell. Nobody has to be behind it.
pub const SHELL_PORT_NAME: &str = "org.dayfly.shell.0";

/// What [`GuestConfig::door`] says where the door is behind [`DOOR_PORT_NAME`].
pub const DOOR_WIRE: &str = "wire";

/// The contract since which a guest can be told that.
pub const WIRE_CONTRACT: u32 = 3;

/// A word of the kernel command line: the init of the initrd says [`PROOF_LINE`] and powers off.
pub const PROOF_WORD: &str = "dayfly.proof";

/// The contract since which it knows that word.
pub const PROOF_CONTRACT: u32 = 2;

/// What it says on the console. Without the end of its line, which a terminal may write in another way.
pub const PROOF_LINE: &str = "dayfly-init: a guest runs here";

/// Where the relay listens inside the guest: an address on `lo`, reachable from containers too.
/// From TEST-NET-1 (RFC 5737), so it collides with no real network.
pub const RELAY_ADDRESS: &str = "192.0.2.1:80";

/// Ports of the relay's address that are the guest program's own: name servers, relay, and the listener to which what a
/// machine without a network card sends out is redirected, at all addresses.
pub const PORTS_TAKEN: [u16; 3] = [53, 80, 9999];

/// The URL that the guest runner's config.toml names.
pub const RELAY_URL: &str = "http://192.0.2.1";

/// The guest contract: what the guest config and the reports may hold. It counts versions of dayfly that were released
/// with a change of it, not changes.
///
/// | contract | since then |
/// | --- | --- |
/// | 1 | the guest config as in `golden/contract-1.json`; a guest refuses members that it does not know |
/// | 2 | a guest ignores members and words that it does not know, and says its contract when it is up; its init knows [`PROOF_WORD`]; it may ask for the time ([`ClockQuestion`]) |
/// | 3 | the door may be behind a virtio-serial port ([`DOOR_PORT_NAME`]): `door` says [`DOOR_WIRE`], and the relay speaks as `dayfly_wire` does; the machine may have no network card ([`GuestNetwork::relay`]), if the guest has said that it can do without; it may be told to stay when its runner has ended ([`Stay`]) and asked for a shell ([`SHELL_PORT_NAME`]), if it has said that it can; it may have forwards ([`GuestConfig::forwards`]); it may be frozen while it waits for a job ([`GuestConfig::hold`]), if it has said that it can |
///
/// A daemon speaks this one and the one before, each as the image's manifest says ([`CONTRACT_OLDEST`]); what is new in
/// a contract has a default in [`GuestConfig`] and is left out of lines for guests of the one before.
pub const CONTRACT: u32 = 3;

/// The oldest contract that is spoken.
pub const CONTRACT_OLDEST: u32 = CONTRACT - 1;

/// Where a guest puts what its host has of the job's repository: a repository without branches, on memory, whose packs are
/// those of the disks. Below it, the disks.
pub const CLONE_DIR: &str = "/run/dayfly/clone";

/// What git in a job is told by `GIT_ALTERNATE_OBJECT_DIRECTORIES`.
pub const CLONE_OBJECTS: &str = "/run/dayfly/clone/objects";

/// The serial number of the `n`th disk with a part of the repository: it has 20 bytes at most.
#[must_use]
pub fn clone_serial(n: usize) -> String {
    format!("dayfly-clone-{n}")
}

/// The serial number of the disk that is empty at first, and may be written until the job is handed out.
pub const CLONE_SLOT_SERIAL: &str = "dayfly-clone-slot";

/// In the root of such a disk: a line `<name> <bytes>` for each pack that the disk's [`CLONE_REFS`] need, wherever it is.
pub const CLONE_PACKS: &str = "packs";

/// In the root of such a disk: what git's `packed-refs` holds.
pub const CLONE_REFS: &str = "packed-refs";

/// Bytes of one guest config at most, its line break included.
pub const CONFIG_BYTES_MAX: usize = 256 * 1024;

/// Everything that a guest is told, once, at hand-out.
#[derive(Clone, Serialize, Deserialize)]
pub struct GuestConfig {
    /// The [`CONTRACT`] that it is written in.
    pub version: u32,
    /// The VM's id, 16 characters of base32.
    pub vm: String,
    /// `address:port` of the door as the guest reaches it, or [`DOOR_WIRE`].
    pub door: String,
    /// The pass, base64url without padding. In the relay's memory only.
    pub pass: String,
    /// The guest's host name.
    pub hostname: String,
    /// This VM's machine-id, 32 hex digits, in force once the runner has read its files.
    pub machine_id: String,
    /// The installation's machine-id, in force while the runner starts, so that the runner's
    /// system id is the one that GitLab shows (decision D9).
    pub runner_machine_id: String,
    /// A fresh boot id (UUID), bind-mounted over the kernel's.
    pub boot_id: String,
    /// Random seed, hex.
    pub seed: String,
    /// Wall clock of the host when this was written, microseconds since 1970: for a guest whose [`ClockQuestion`] is not
    /// answered, or that does not ask.
    pub clock_us: i64,
    /// Address and name servers.
    pub network: GuestNetwork,
    /// Ports of the relay's address, beside its own, at which the guest listens for whatever wants to reach what the host
    /// forwards there: a stream of the door's wire each, by `dayfly_wire::forward_authority`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<u16>,
    /// The guest runner.
    pub runner: GuestRunner,
    /// What the host has of the job's repository. Only for a guest whose [`Report::Contract`] says that it knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone: Option<GuestClone>,
    /// Seconds that the relay waits for a door that refuses, before it gives a connection up.
    pub door_patience_s: u64,
    /// Seconds after which a guest whose door has not answered powers off by itself.
    pub power_off_after_s: u64,
    /// Its host may say [`Stay`]: when its runner has ended it waits a moment for that. Only for a guest whose
    /// [`Report::Contract`] says that it can.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub may_stay: bool,
    /// This is not the guest's own yet: it starts the runner that this config describes, takes no identity, reports
    /// [`Report::Held`], and waits to be frozen and, as whatever is restored from that, for a config of its own, which
    /// has the same [`GuestConfig::runner`]. Only for a guest whose [`Report::Contract`] says that it can.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hold: bool,
}

/// The disks with what the host has of the job's repository, found by their serial numbers ([`clone_serial`]). Whatever
/// of it is missing costs the job time and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestClone {
    /// How many there are.
    pub disks: usize,
    /// Whether there is one more ([`CLONE_SLOT_SERIAL`]), which may be written while the machine boots.
    pub slot: bool,
}

/// The guest's side of its network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// MAC to set, `52:…`; none: the device's own is right.
    pub mac: Option<String>,
    /// `address/prefix-length`.
    pub address: String,
    /// Default gateway.
    pub gateway: IpAddr,
    /// Name servers for resolv.conf; empty: resolution is off, and the file says so.
    pub dns: Vec<IpAddr>,
    /// There is no network card: `address` is on `lo`, and what the machine sends out goes over a virtio-serial port
    /// of its own. Only for a guest whose [`Report::Contract`] says that it can.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub relay: bool,
}

/// How the guest starts its runner.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRunner {
    /// Whole text of the runner's config.toml.
    pub config_toml: String,
    /// GitLab's chain as PEM, written where config.toml's `tls-ca-file` points
    /// ([`CA_FILE`]).
    pub ca_pem: Option<String>,
    /// The `name` in config.toml, for `-r`.
    pub name: String,
    /// The user that runs jobs; `root` only if the class says so.
    pub user: String,
    /// `--wait-timeout`, seconds.
    pub wait_timeout_s: u64,
}

/// Where the guest program writes the runner's config.toml.
pub const CONFIG_FILE: &str = "/etc/gitlab-runner/config.toml";
/// Where the guest program writes GitLab's chain.
pub const CA_FILE: &str = "/etc/gitlab-runner/gitlab-ca.pem";

/// Why a guest config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON of this format.
    #[error("parse guest config")]
    Json(#[source] serde_json::Error),
    /// It is written in a contract that is not spoken here.
    #[error("guest config has version {0}, this program reads {CONTRACT_OLDEST} to {CONTRACT}")]
    Version(u32),
}

impl GuestConfig {
    /// One line of JSON, its line break included.
    ///
    /// # Panics
    /// Never: all members are strings and numbers.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("strings and numbers always serialise");
        line.push(b'\n');
        line
    }

    /// Reads what [`GuestConfig::to_line`] wrote, of this contract or the one before, and what a later program of the
    /// same contract may have added to it.
    ///
    /// # Errors
    /// [`ConfigError::Json`] for anything else, [`ConfigError::Version`] for another contract.
    pub fn from_line(line: &[u8]) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let versioned: Versioned = serde_json::from_slice(line).map_err(ConfigError::Json)?;
        if !(CONTRACT_OLDEST..=CONTRACT).contains(&versioned.version) {
            return Err(ConfigError::Version(versioned.version));
        }
        serde_json::from_slice(line).map_err(ConfigError::Json)
    }
}

impl std::fmt::Debug for GuestConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Pass, seed and config.toml (guest token) stay out of logs.
        f.debug_struct("GuestConfig").field("vm", &self.vm).field("door", &self.door).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    /// The configs of each contract, as its daemons write them: never edited, only added to.
    const GOLDEN: [(u32, &str); 7] = [
        (2, include_str!("../golden/contract-2.json")),
        (3, include_str!("../golden/contract-3.json")),
        (3, include_str!("../golden/contract-3-relay.json")),
        (3, include_str!("../golden/contract-3-stay.json")),
        (3, include_str!("../golden/contract-3-forwards.json")),
        (3, include_str!("../golden/contract-3-clone.json")),
        (3, include_str!("../golden/contract-3-hold.json")),
    ];

    fn members(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        if let Value::Object(object) = value {
            for (key, value) in object {
                let path = format!("{path}/{key}");
                members(value, &path, into);
                into.insert(path);
            }
        }
    }

    fn members_of(line: &[u8]) -> BTreeSet<String> {
        let mut into = BTreeSet::new();
        members(&serde_json::from_slice(line).unwrap(), "", &mut into);
        into
    }

    /// U5: what goes to a guest of the contract before has the members that it knows, and no others.
    #[test]
    fn each_contract_is_written_as_it_was() {
        assert_eq!(GOLDEN.map(|(contract, _)| contract).last(), Some(&CONTRACT), "each contract has its line");
        for (contract, line) in GOLDEN {
            let config = GuestConfig::from_line(line.as_bytes()).unwrap();
            assert_eq!((config.version, config.vm.as_str()), (contract, "abcdefghijklmnop"));
            let again = config.to_line();
            assert_eq!(members_of(&again), members_of(line.as_bytes()), "contract {contract}");
            assert_eq!(config.network.relay, line.contains("\"relay\":true"));
            assert_eq!(config.forwards, if line.contains("\"forwards\"") { vec![3142, 5000] } else { vec![] });
            assert_eq!(config.clone.is_some(), line.contains("\"clone\""));
            assert_eq!(config.hold, line.contains("\"hold\":true"));
        }
    }

    /// U5: a member that is new costs neither an image nor a job that is under way, wherever it stands.
    #[test]
    fn what_is_not_known_is_passed_over() {
        let line = GOLDEN[1].1;
        for place in ["{\"version\"", "{\"mac\"", "{\"config_toml\""] {
            let newer = line.replacen(place, &place.replacen('{', "{\"new\":{\"in\":[3]},", 1), 1);
            assert_ne!(newer, line);
            assert_eq!(
                GuestConfig::from_line(newer.as_bytes()).unwrap().to_line(),
                GuestConfig::from_line(line.as_bytes()).unwrap().to_line()
            );
        }
    }

    #[test]
    fn a_contract_that_is_not_spoken_is_named() {
        let fallen_out = include_str!("../golden/contract-1.json");
        let of = |version: u32| GOLDEN[0].1.replace("\"version\":2", &format!("\"version\":{version}"));
        for (version, line) in [(0, of(0)), (1, fallen_out.to_owned()), (CONTRACT + 1, of(CONTRACT + 1))] {
            let error = GuestConfig::from_line(line.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), format!("guest config has version {version}, this program reads 2 to 3"));
        }
    }
}
