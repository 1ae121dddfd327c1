//! What jobs leave for later ones, made by the configuration: on this host's disk, or in the operator's own store.

use super::{Backends, DaemonError};
use crate::cache::{Caches, Upstream, UpstreamParts};
use crate::config::{CacheUpstream, Config};
use crate::files::private;
use crate::gitlab::Endpoint;
use std::collections::BTreeSet;

/// The caches that jobs have left, if there are to be any. `readers`: jobs of before, by the names of their directories.
pub(super) async fn open(
    config: &Config,
    backends: &Backends,
    readers: &BTreeSet<String>,
) -> Result<Option<Caches>, DaemonError> {
    if !config.cache.enabled {
        return Ok(None);
    }
    if let Some(of) = &config.cache.upstream {
        return Ok(Some(upstream(of, config, backends)?));
    }
    let directory = config.state_directory.join("cache");
    let reserve = config.capacity.disk_reserve_gib.saturating_mul(1 << 30);
    let (files, clock, rng) = (backends.files.clone(), backends.clock.clone(), backends.rng.clone());
    let caches =
        Caches::open(files, directory.clone(), (config.cache.settings(), reserve), (clock, rng), readers).await;
    let unread = |source| DaemonError::Files { what: "look for caches at", path: directory, source };
    caches.map(Some).map_err(unread)
}

/// Those of the operator's own store.
fn upstream(of: &CacheUpstream, config: &Config, backends: &Backends) -> Result<Caches, DaemonError> {
    let path = of.secret_key_file.clone();
    let unread = |source| DaemonError::Files { what: "read the key of `cache.upstream`", path, source };
    let secret_key = private::read_line(&of.secret_key_file).map_err(unread)?;
    let endpoint = Endpoint {
        url: of.url.clone(),
        tls_ca_file: of.tls_ca_file.clone(),
        tls_client: None,
        allow_insecure_http: of.allow_insecure_http,
    };
    let parts = UpstreamParts {
        transport: backends.transport.open(&endpoint).map_err(DaemonError::CacheStore)?,
        url: of.url.clone(),
        bucket: of.bucket.clone(),
        prefix: of.prefix.clone(),
        region: of.region.clone(),
        access_key: of.access_key.clone(),
        secret_key,
    };
    let upstream = Upstream::new(parts, backends.clock.clone());
    let (files, clock, rng) = (backends.files.clone(), backends.clock.clone(), backends.rng.clone());
    Ok(Caches::at(upstream, files, config.cache.settings(), clock, rng))
}
