//! Section `[cache]`: what jobs leave for later ones, see [`crate::cache`].

use super::Span;
use crate::cache::{CacheTenant, Settings};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use url::Url;

/// The section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Whether guests have a cache at all.
    pub enabled: bool,
    /// GiB of all projects together.
    pub size_gib: u64,
    /// GiB of one project, or of projects that share.
    pub project_gib: u64,
    /// After so long without a save an entry is gone.
    pub max_age: Span,
    /// `[[cache.tenant]]`: projects that share one cache; the first that fits counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tenant: Vec<CacheTenant>,
    /// `[cache.upstream]`: an S3 store of the operator's, in place of this host's disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<CacheUpstream>,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            enabled: true,
            size_gib: 20,
            project_gib: 5,
            max_age: Span::from_secs(30 * 24 * 3600),
            tenant: Vec::new(),
            upstream: None,
        }
    }
}

impl Cache {
    /// What the caches go by.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let bytes = |gib: u64| gib.saturating_mul(1 << 30);
        Settings {
            bytes_max: bytes(self.size_gib),
            project_bytes_max: bytes(self.project_gib),
            max_age: self.max_age.get(),
            tenants: self.tenant.clone(),
        }
    }
}

/// `[cache.upstream]`: where that store is, and who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheUpstream {
    /// Its address, without the bucket.
    pub url: Url,
    /// The bucket.
    pub bucket: String,
    /// Its region.
    #[serde(default = "region")]
    pub region: String,
    /// Before all names in the bucket.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prefix: String,
    /// The name of the key that signs.
    pub access_key: String,
    /// File with that key, mode 0600.
    pub secret_key_file: PathBuf,
    /// The store's CA chain, PEM, besides the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_ca_file: Option<PathBuf>,
    /// Allows `http://`: caches go in the clear.
    #[serde(default)]
    pub allow_insecure_http: bool,
}

/// What S3 takes where none is named.
fn region() -> String {
    "us-east-1".to_owned()
}
