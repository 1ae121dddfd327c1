//! Where the status listener listens, and by what it knows who may look: section `[status]`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use url::Url;

/// Section `[status]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where metrics, health and page are served; none: `status.sock` in the runtime directory.
    pub listen: Option<Address>,
    /// File with the token of who may see consoles, and anything at all from afar; mode 0600.
    pub token_file: Option<PathBuf>,
    /// Certificate of an address that is not the host's own, PEM.
    pub tls_cert_file: Option<PathBuf>,
    /// Its key, PEM, mode 0600.
    pub tls_key_file: Option<PathBuf>,
    /// Status listeners of the fleet's other daemons, which the page names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fleet: Vec<Url>,
    /// CA certificates of those, PEM; none: the system's.
    pub fleet_ca_file: Option<PathBuf>,
}

/// Where it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// Nowhere.
    Off,
    /// A unix socket.
    Unix(PathBuf),
    /// A port.
    Tcp(SocketAddr),
}

/// The text is no address.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no path of a socket like `/run/dayfly/status.sock`, no address with a port like `127.0.0.1:9480`, and not `off`"
)]
pub struct BadAddress(String);

impl Config {
    /// The address, with this runtime directory.
    #[must_use]
    pub fn address(&self, runtime_directory: &Path) -> Address {
        self.listen.clone().unwrap_or_else(|| Address::Unix(runtime_directory.join("status.sock")))
    }
}

impl Address {
    /// Whether only this host reaches it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Off | Self::Unix(_) => true,
            Self::Tcp(address) => address.ip().is_loopback(),
        }
    }
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        if text == "off" {
            return Ok(Self::Off);
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.strip_prefix("unix:").unwrap_or(text).into()));
        }
        text.parse().map(Self::Tcp).map_err(|_| BadAddress(text.to_owned()))
    }
}

impl TryFrom<String> for Address {
    type Error = BadAddress;

    fn try_from(text: String) -> Result<Self, BadAddress> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        match address {
            Address::Off => "off".to_owned(),
            Address::Unix(path) => path.to_string_lossy().into_owned(),
            Address::Tcp(address) => address.to_string(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", String::from(self.clone()))
    }
}
