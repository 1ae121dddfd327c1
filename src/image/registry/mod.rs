//! Images in a container registry: how many hosts get the same one (decision D30).
//!
//! ```text
//! oci://registry/name:tag ─► manifest ─► config: image.toml
//!                                   └──► layers: each file in pieces of 64 MiB, zstd, holes left out
//! ```
//!
//! Any registry of the OCI distribution specification will do: the media types are our own, and a registry keeps bytes
//! under their digests whatever they are. It is believed in nothing: each piece has the digest of its compressed form (the
//! registry's name for it) and that of its content, and each file the one that `image.toml` says.
//!
//! [`reference`] says where, [`credentials`] as whom, [`http`] and [`client`] speak, [`format`] is what lies there, [`push`]
//! brings it; how it comes back into an image directory, `image::build` knows.

pub mod client;
mod credentials;
pub mod format;
mod http;
mod push;
mod reference;

pub use client::Registry;
pub use push::push;
pub use reference::{Reference, SCHEME};

use crate::gitlab::TransportError;
use crate::gitlab::transport::OpenError;
use std::path::PathBuf;
use std::time::Duration;

/// What the operator says besides the reference.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Docker's config.json, or one like it; none: where Docker has its own, if it is there.
    pub auth_file: Option<PathBuf>,
    /// CA certificates, PEM, besides the system's.
    pub ca_file: Option<PathBuf>,
    /// `http://` is allowed. Without it only to a registry on the host's loopback.
    pub plain_http: bool,
    /// How often is asked again.
    pub patience: Patience,
}

/// How often a registry that fails is asked again.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Asked in all.
    pub tries: u32,
    /// Before the second time; doubles.
    pub pause: Duration,
}

impl Default for Patience {
    /// A registry that is started anew is back by then.
    fn default() -> Self {
        Self { tries: 5, pause: Duration::from_secs(1) }
    }
}

/// Why an image does not get into or out of a registry. Each message says what to do, where somebody can do something.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// It names no place in a registry.
    #[error("use `{text}`: {why}; write it like oci://registry.example.com/images/debian-12-shell:1")]
    Reference {
        /// What was given.
        text: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Credentials cannot be had.
    #[error("read credentials from {}: {why}", .path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the remedy.
        why: String,
    },
    /// No connection can be made.
    #[error("ask {place}")]
    Open {
        /// The place.
        place: String,
        /// Cause.
        #[source]
        source: Box<OpenError>,
    },
    /// It did not answer, or broke off.
    #[error("ask {url}{}", source.explain().map(|remedy| format!(" ({remedy})")).unwrap_or_default())]
    Transport {
        /// What was asked for.
        url: String,
        /// Cause.
        #[source]
        source: TransportError,
    },
    /// It is down.
    #[error("ask {url}: status {status}: it is down or overloaded; try again")]
    Down {
        /// What was asked for.
        url: String,
        /// What it answered.
        status: u16,
    },
    /// Broke off in a body, and again.
    #[error("fetch {url}: it broke off after {bytes} bytes")]
    BrokeOff {
        /// What was asked for.
        url: String,
        /// What had come.
        bytes: u64,
    },
    /// It wants to know who asks, or does not let them.
    #[error("ask {url}: status {status}: {why}")]
    Refused {
        /// What was asked for.
        url: String,
        /// What it answered.
        status: u16,
        /// The remedy.
        why: String,
    },
    /// There is no such thing.
    #[error("find {0}: the registry has none of this name")]
    Missing(String),
    /// Any other answer.
    #[error("ask {url}: {why}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What came.
        why: String,
    },
    /// It sends us where we do not go.
    #[error("ask {url}: it sends us to {to}, {why}")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where to.
        to: String,
        /// Why not.
        why: &'static str,
    },
    /// What came is not what it was said to be.
    #[error("believe {what}: {why}; it was changed on its way or at its place, and nothing of it is used")]
    Lie {
        /// Which part.
        what: String,
        /// In what it differs.
        why: String,
    },
    /// It is no image of ours.
    #[error("use {what}: {why}")]
    Unfit {
        /// The reference.
        what: String,
        /// What it is instead.
        why: String,
    },
    /// A file of the image here.
    #[error("read {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

impl RegistryError {
    /// Whether trying again may help: what has come so far is kept for that.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Transport { .. } | Self::Down { .. } | Self::BrokeOff { .. })
    }
}

#[cfg(test)]
pub(crate) mod tests;
