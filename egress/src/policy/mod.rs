//! What may a job reach? A pure answer, from lists of names and networks and from what its VM was told.
//!
//! A name decides, not an address: an address counts for the names that this VM was told it belongs to. What is not
//! public is refused in both modes unless it is named. The order: what a job cannot do without (`always`), `deny`, what
//! is not public, then `allow` where the mode is `enforce`.
//!
//! No I/O, no clock: used by the daemon for its configuration, and by the process that carries a VM's egress.

mod pattern;
mod ranges;
#[cfg(test)]
mod tests;

pub(crate) use pattern::host_name;
pub use pattern::{Cidr, Host, HostPort, Pattern, PatternError, To};
pub use ranges::{Special, canonical, special};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Patterns of one list at most.
pub const PATTERNS_MAX: usize = 500;

/// Bytes of both lists together at most: a policy is handed over in one message.
pub const PATTERNS_BYTES_MAX: usize = 32 * 1024;

/// What a policy does about a public destination that no list names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is reached, and written down.
    #[default]
    Observe,
    /// It is refused, and written down.
    Enforce,
}

/// How much one VM may send and receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes a second, of both ways together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_a_second: Option<u64>,
    /// Connections at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
}

/// What one VM may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// About public destinations that no list names.
    #[serde(default)]
    pub mode: Mode,
    /// What may be reached.
    #[serde(default)]
    pub allow: Vec<Pattern>,
    /// What may not, though `allow` names it.
    #[serde(default)]
    pub deny: Vec<Pattern>,
    /// What a job cannot do without: from GitLab and the daemon's configuration, never from a job's author.
    #[serde(default)]
    pub always: Vec<HostPort>,
    /// The host's own addresses.
    #[serde(default)]
    pub own: Vec<IpAddr>,
    /// `None`: as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
}

/// Whether something is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Allowed,
    /// It is not.
    Refused(Reason),
}

impl Verdict {
    /// Whether it is reached.
    #[must_use]
    pub fn is_allowed(self) -> bool {
        self == Self::Allowed
    }
}

/// Why something is not reached. Its text ends the sentence "`host:port` was not reached: …", for a job's author.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// `deny` names it.
    Denied,
    /// `allow` does not, and the mode is `enforce`.
    Unlisted,
    /// One of the host's own addresses, which is not named.
    Own,
    /// The name in a TLS hello is refused, by either list.
    ServerName,
    /// Not the public Internet, and not named.
    #[serde(untagged)]
    Special(Special),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denied => "the egress policy denies it",
            Self::Unlisted => "the egress policy does not list it",
            Self::Own => "it is the host that the machine runs on",
            Self::ServerName => "the egress policy does not allow the server name that TLS asks for",
            Self::Special(Special::Loopback) => "it is a loopback address",
            Self::Special(Special::Metadata) => "it is a cloud's metadata service",
            Self::Special(Special::LinkLocal) => "it is a link-local address",
            Self::Special(Special::Private) => "it is a private address, which the egress policy does not list",
            Self::Special(Special::Multicast) => "it is a multicast address",
            Self::Special(Special::Reserved) => "it is a reserved address",
        })
    }
}

/// Why a policy makes no sense as a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// In `allow`, and nothing of it is left.
    #[error("`{allow}` in `allow` has no effect, for `{deny}` in `deny` covers it: remove one of them")]
    Contradiction {
        /// The one without effect.
        allow: String,
        /// The other one.
        deny: String,
    },
    /// What a job cannot do without.
    #[error("`{deny}` in `deny` covers `{always}`, without which no job runs: remove it")]
    Needed {
        /// The pattern.
        deny: String,
        /// What it covers.
        always: String,
    },
    /// `deny = ["*"]`, `deny = ["gitlab"]`.
    #[error("`{0}` in `deny` leaves nothing: list what is allowed, with `mode = \"enforce\"`")]
    Nothing(String),
    /// Too many.
    #[error("`{0}` has more than {PATTERNS_MAX} patterns: use networks and `*.domain`")]
    TooMany(&'static str),
    /// Too long together.
    #[error("`allow` and `deny` are longer than {PATTERNS_BYTES_MAX} bytes together: use networks and `*.domain`")]
    TooLong,
    /// A rate of nothing.
    #[error("`rate` allows nothing: leave `{0}` out, or say at least {1}")]
    Rate(&'static str, u64),
}

/// A rate's least: less is a mistake in the unit.
const BYTES_A_SECOND_MIN: u64 = 1024;

impl Policy {
    /// Whether it makes sense as a whole.
    ///
    /// # Errors
    /// [`PolicyError`], the first one found.
    pub fn validate(&self) -> Result<(), PolicyError> {
        for (name, list) in [("allow", &self.allow), ("deny", &self.deny)] {
            if list.len() > PATTERNS_MAX {
                return Err(PolicyError::TooMany(name));
            }
        }
        let bytes = self.allow.iter().chain(&self.deny).map(|pattern| pattern.to_string().len()).sum::<usize>();
        if bytes > PATTERNS_BYTES_MAX {
            return Err(PolicyError::TooLong);
        }
        for deny in &self.deny {
            if matches!(deny.to, To::Gitlab) || *deny == (Pattern { to: To::Any, port: None }) {
                return Err(PolicyError::Nothing(deny.to_string()));
            }
            if let Some(allow) = self.allow.iter().find(|allow| deny.covers(allow)) {
                return Err(PolicyError::Contradiction { allow: allow.to_string(), deny: deny.to_string() });
            }
            let covers = |always: &&HostPort| {
                deny.on(always.port)
                    && match &always.host {
                        Host::Name(name) => deny.to.has_name(name),
                        Host::Address(address) => names_address(&deny.to, *address),
                    }
            };
            if let Some(always) = self.always.iter().find(covers) {
                return Err(PolicyError::Needed { deny: deny.to_string(), always: always.to_string() });
            }
        }
        match self.rate {
            Some(Rate { bytes_a_second: Some(bytes), .. }) if bytes < BYTES_A_SECOND_MIN => {
                Err(PolicyError::Rate("bytes_a_second", BYTES_A_SECOND_MIN))
            }
            Some(Rate { connections: Some(0), .. }) => Err(PolicyError::Rate("connections", 1)),
            _ => Ok(()),
        }
    }

    /// Whether a VM reaches this address on this port. `names`: those that it was told the address belongs to.
    #[must_use]
    pub fn check(&self, address: IpAddr, port: u16, names: &[&str]) -> Verdict {
        let address = canonical(address);
        self.check_of(address, port, names, self.is_own(address))
    }

    /// As [`Policy::check`], for an address that is the host's own, whether [`Policy::own`] holds it or not: it may have
    /// come since.
    #[must_use]
    pub fn check_own(&self, address: IpAddr, port: u16, names: &[&str]) -> Verdict {
        self.check_of(canonical(address), port, names, true)
    }

    fn check_of(&self, address: IpAddr, port: u16, names: &[&str], own: bool) -> Verdict {
        if self.always_on(Some(port), names, Some(address)) {
            return Verdict::Allowed;
        }
        let names_it = |to: &To| names.iter().any(|name| to.has_name(name)) || names_address(to, address);
        if self.deny.iter().any(|deny| deny.on(port) && names_it(&deny.to)) {
            return Verdict::Refused(Reason::Denied);
        }
        self.beyond_deny(Some(port), names, address, own)
    }

    /// Whether a VM may ask for this name at all. What it does not reach on any port is not asked for, for a question
    /// carries bytes out, too.
    #[must_use]
    pub fn lookup(&self, name: &str) -> Verdict {
        if self.always_on(None, &[name], None) {
            return Verdict::Allowed;
        }
        if self.deny.iter().any(|deny| deny.port.is_none() && deny.to.has_name(name)) {
            return Verdict::Refused(Reason::Denied);
        }
        // Whether a network holds it, its address tells.
        let may = |allow: &Pattern| allow.to.has_name(name) || matches!(allow.to, To::Net(_));
        if self.mode == Mode::Observe || self.allow.iter().any(may) {
            Verdict::Allowed
        } else {
            Verdict::Refused(Reason::Unlisted)
        }
    }

    /// Whether a VM may be told that this address belongs to this name.
    #[must_use]
    pub fn answer(&self, name: &str, address: IpAddr) -> Verdict {
        let address = canonical(address);
        if self.always_on(None, &[name], Some(address)) {
            return Verdict::Allowed;
        }
        let names_it = |to: &To| to.has_name(name) || names_address(to, address);
        if self.deny.iter().any(|deny| deny.port.is_none() && names_it(&deny.to)) {
            return Verdict::Refused(Reason::Denied);
        }
        self.beyond_deny(None, &[name], address, self.is_own(address))
    }

    /// Whether a connection to what was allowed may go on that asks for this server in its TLS hello.
    #[must_use]
    pub fn server_name(&self, server: &str, address: IpAddr, port: u16) -> Verdict {
        let address = canonical(address);
        let server = host_name(server).unwrap_or_default();
        if self.always_on(Some(port), &[&server], None) {
            return Verdict::Allowed;
        }
        if self.deny.iter().any(|deny| deny.on(port) && deny.to.has_name(&server)) {
            return Verdict::Refused(Reason::ServerName);
        }
        let names_it = |to: &To| to.has_name(&server) || matches!(to, To::Net(net) if net.contains(address));
        if self.mode == Mode::Observe || self.allow.iter().any(|allow| allow.on(port) && names_it(&allow.to)) {
            Verdict::Allowed
        } else {
            Verdict::Refused(Reason::ServerName)
        }
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.own.iter().any(|own| canonical(*own) == address)
    }

    /// Whether it is one of those that a job cannot do without: by one of these names, or by its address.
    fn always_on(&self, port: Option<u16>, names: &[&str], address: Option<IpAddr>) -> bool {
        self.always.iter().any(|always| {
            port.is_none_or(|port| port == always.port)
                && match &always.host {
                    Host::Name(ours) => names.contains(&ours.as_str()),
                    Host::Address(ours) => Some(*ours) == address,
                }
        })
    }

    /// What is not public must be named, whatever the mode; what is, in `enforce`. `port`: `None` is any.
    fn beyond_deny(&self, port: Option<u16>, names: &[&str], address: IpAddr, own: bool) -> Verdict {
        // A loopback address is the host's own on every host, and has a reason that says more.
        let reason = match special(address) {
            None | Some(Special::Private) if own => Some(Reason::Own),
            special => special.map(Reason::Special),
        };
        let may = |to: &To| match (to, reason) {
            (To::Gitlab, _) => false,
            (To::Any, reason) => reason.is_none(),
            (To::Name(ours), _) => names.contains(&ours.as_str()),
            // A name below somebody's domain may point at anything: at a machine of a private network by intent, at the
            // host by malice.
            (To::Below(_), None | Some(Reason::Special(Special::Private))) => {
                names.iter().any(|name| to.has_name(name))
            }
            (To::Below(_), _) => false,
            // A network that an operator lists is seldom meant to hold the host itself.
            (To::Net(net), Some(Reason::Own)) => net.is_single() && net.contains(address),
            (To::Net(net), _) => net.contains(address),
        };
        if self.allow.iter().any(|allow| port.is_none_or(|port| allow.on(port)) && may(&allow.to)) {
            return Verdict::Allowed;
        }
        match (reason, self.mode) {
            (Some(reason), _) => Verdict::Refused(reason),
            (None, Mode::Observe) => Verdict::Allowed,
            (None, Mode::Enforce) => Verdict::Refused(Reason::Unlisted),
        }
    }
}

/// Whether this address is named by itself.
fn names_address(to: &To, address: IpAddr) -> bool {
    match to {
        To::Any => true,
        To::Net(net) => net.contains(address),
        To::Gitlab | To::Name(_) | To::Below(_) => false,
    }
}
