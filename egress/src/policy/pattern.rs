//! How does an operator write down what a job may reach? `host`, `*.domain`, an address or a network, each with a port or
//! without; and `gitlab`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Characters of a pattern at most: a name has 253.
const PATTERN_LENGTH_MAX: usize = 300;

/// One entry of a list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern {
    /// Which destinations.
    pub to: To,
    /// On this port; `None`: on all.
    pub port: Option<u16>,
}

/// Which destinations a [`Pattern`] names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum To {
    /// `gitlab`: GitLab, its registry and what else a job cannot do without.
    Gitlab,
    /// `*`: everything public.
    Any,
    /// This name, in lower case and without a dot at its end.
    Name(String),
    /// `*.domain`: all names below this one, and not itself.
    Below(String),
    /// These addresses.
    Net(Cidr),
}

/// A network, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no pattern. Each is one sentence, with what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing, or far too much.
    #[error("an empty or endless pattern names nothing: write `host`, `*.domain`, an address or a network")]
    Length,
    /// `https://…`.
    #[error("`{0}` is a URL: write `host:port` alone, as in `example.com:443`")]
    Url(String),
    /// `a.*.b`, `a*`.
    #[error("`{0}` has a wildcard within: write `*.domain`, which means all names below it")]
    Wildcard(String),
    /// `*.10.0.0.0`, `10.0.1`, `1.2.3.4.5`.
    #[error("`{0}` looks like an address and is none: write it whole, as in `10.20.0.0/16`")]
    Address(String),
    /// `10.20.1.0/16`.
    #[error("`{0}` has bits set behind its prefix: write `{1}`")]
    HostBits(String, String),
    /// `10.0.0.0/33`.
    #[error("`{0}` has no prefix length from 0 to {1} behind its slash")]
    Prefix(String, u8),
    /// `host:0`, `host:http`.
    #[error("`{0}` has no port from 1 to 65535 behind its colon")]
    Port(String),
    /// `::ffff:10.0.0.0/104`.
    #[error("`{0}` is IPv4 written as IPv6: write the IPv4 form")]
    Mapped(String),
    /// A blank, an empty label, letters of no host's name.
    #[error("`{0}` is no host's name: labels of up to 63 letters, digits, `-` and `_`, with dots between them")]
    Name(String),
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() || text.len() > PATTERN_LENGTH_MAX {
            return Err(PatternError::Length);
        }
        if text.contains("://") {
            return Err(PatternError::Url(shown(text)));
        }
        let (host, port) = split_port(text)?;
        Ok(Self { to: to(host, text)?, port })
    }
}

/// As it stands in an error: what a terminal could not show is left out.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// A host, and the port behind it. IPv6 with a port stands in brackets.
fn split_port(text: &str) -> Result<(&str, Option<u16>), PatternError> {
    let bad = || PatternError::Port(shown(text));
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(|| PatternError::Name(shown(text)))?;
        match rest {
            "" => (host, None),
            _ => (host, Some(rest.strip_prefix(':').ok_or_else(bad)?)),
        }
    } else {
        match text.split_once(':') {
            // More than one colon: IPv6.
            Some((_, rest)) if rest.contains(':') => (text, None),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let Some(port) = port else { return Ok((host, None)) };
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
    Ok((host, Some(port)))
}

fn to(host: &str, text: &str) -> Result<To, PatternError> {
    if host == "*" {
        return Ok(To::Any);
    }
    if let Some((address, prefix)) = host.split_once('/') {
        return Ok(To::Net(cidr(address, prefix, text)?));
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(To::Net(Cidr::new(address, bits(address)).ok_or_else(|| PatternError::Mapped(shown(text)))?));
    }
    let (below, name) = host.strip_prefix("*.").map_or((false, host), |name| (true, name));
    if name.contains('*') {
        return Err(PatternError::Wildcard(shown(text)));
    }
    let name = host_name(name).ok_or_else(|| PatternError::Name(shown(text)))?;
    if name.rsplit('.').next().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(PatternError::Address(shown(text)));
    }
    Ok(match &*name {
        "gitlab" if !below => To::Gitlab,
        _ if below => To::Below(name),
        _ => To::Name(name),
    })
}

/// A host's name in lower case, without the dot at its end; `None`: it is none.
pub(crate) fn host_name(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let good = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    (name.len() <= 253 && name.split('.').all(good)).then(|| name.to_ascii_lowercase())
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn cidr(address: &str, prefix: &str, text: &str) -> Result<Cidr, PatternError> {
    let address: IpAddr = address.parse().map_err(|_| PatternError::Address(shown(text)))?;
    let most = bits(address);
    let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: Option<u8> = prefix.parse().ok().filter(|prefix| digits && *prefix <= most);
    let prefix = prefix.ok_or_else(|| PatternError::Prefix(shown(text), most))?;
    let cidr = Cidr::new(address, prefix).ok_or_else(|| PatternError::Mapped(shown(text)))?;
    if cidr.address != address {
        return Err(PatternError::HostBits(shown(text), cidr.to_string()));
    }
    Ok(cidr)
}

impl Cidr {
    /// The network of so many leading bits that holds this address; `None`: IPv4 written as IPv6.
    fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) => IpAddr::V4((u32::from(v4) & mask_v4(prefix)).into()),
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => return None,
            IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & mask_v6(prefix)).into()),
        };
        Some(Self { address, prefix })
    }

    /// Whether it holds this address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, super::ranges::canonical(address)) {
            (IpAddr::V4(net), IpAddr::V4(v4)) => u32::from(v4) & mask_v4(self.prefix) == u32::from(net),
            (IpAddr::V6(net), IpAddr::V6(v6)) => u128::from(v6) & mask_v6(self.prefix) == u128::from(net),
            _ => false,
        }
    }

    /// Whether it holds all of the other one.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }

    /// Whether it is one address.
    #[must_use]
    pub fn is_single(&self) -> bool {
        self.prefix == bits(self.address)
    }
}

fn mask_v4(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask_v6(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_single() { write!(f, "{}", self.address) } else { write!(f, "{}/{}", self.address, self.prefix) }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.to, self.port) {
            (To::Gitlab, _) => f.write_str("gitlab")?,
            (To::Any, _) => f.write_str("*")?,
            (To::Name(name), _) => f.write_str(name)?,
            (To::Below(name), _) => write!(f, "*.{name}")?,
            (To::Net(net), Some(_)) if net.address.is_ipv6() => write!(f, "[{net}]")?,
            (To::Net(net), _) => write!(f, "{net}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl To {
    /// Whether this name is named.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Name(ours) => ours == name,
            Self::Below(domain) => is_below(name, domain),
            Self::Gitlab | Self::Net(_) => false,
        }
    }

    /// Whether all that the other one names is named.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, To::Any | To::Name(_) | To::Below(_) | To::Net(_)) => true,
            (_, To::Name(name)) => self.has_name(name),
            (Self::Below(domain), To::Below(name)) => name == domain || is_below(name, domain),
            (Self::Net(net), To::Net(other)) => net.covers(other),
            _ => false,
        }
    }
}

fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

impl Pattern {
    /// Whether it is about this port.
    pub(crate) fn on(&self, port: u16) -> bool {
        self.port.is_none_or(|ours| ours == port)
    }

    /// Whether it names all that the other one does.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.to.covers(&other.to) && (self.port.is_none() || self.port == other.port)
    }
}

/// A destination that is always allowed: a name or an address, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A name in lower case, or an address.
    pub host: Host,
    /// Its port.
    pub port: u16,
}

/// See [`HostPort`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// Reached at whatever addresses the host's resolver has for it.
    Name(String),
    /// Reached at this one.
    Address(IpAddr),
}

impl FromStr for HostPort {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() || text.len() > PATTERN_LENGTH_MAX {
            return Err(PatternError::Length);
        }
        let (host, port) = split_port(text)?;
        let port = port.ok_or_else(|| PatternError::Port(shown(text)))?;
        let host = match host.parse::<IpAddr>() {
            Ok(address) => Host::Address(super::ranges::canonical(address)),
            Err(_) => Host::Name(host_name(host).ok_or_else(|| PatternError::Name(shown(text)))?),
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Address(IpAddr::V4(v4)) => write!(f, "{v4}:{}", self.port),
            Host::Address(IpAddr::V6(v6)) => write!(f, "[{v6}]:{}", self.port),
        }
    }
}

/// Texts in configuration and in the start message.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
as_text!(Pattern, HostPort);
