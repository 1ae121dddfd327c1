//! What the listener goes by, besides its address: token, certificate, the fleet. Read at the start and at each reload.

use super::access::{self, Access};
use super::fleet::Fleet;
use super::{Address, Config};
use crate::gitlab::{self, OpenTransport};
use crate::telemetry::chain;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;

/// What a listener goes by.
pub struct Settings {
    pub(super) access: Access,
    /// On a port that others reach.
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) fleet: Fleet,
}

/// Why it cannot be gone by; for the operator.
#[derive(Debug, thiserror::Error)]
#[error("use `{}` (`{key}`): {why}", path.display())]
pub struct SettingsError {
    path: PathBuf,
    key: &'static str,
    why: String,
}

impl Settings {
    /// Nobody sees more than that the process turns.
    #[must_use]
    pub fn closed() -> Self {
        Self { access: Access::closed(), tls: None, fleet: Fleet::default() }
    }

    /// Reads the files that the section names.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub async fn read(
        config: &Config,
        address: &Address,
        transport: &Arc<dyn OpenTransport>,
    ) -> Result<Self, SettingsError> {
        let (config, address, transport) = (config.clone(), address.clone(), transport.clone());
        let read = tokio::task::spawn_blocking(move || Self::read_now(&config, &address, &*transport));
        // It cannot be cancelled, so only a bug of ours ends it early.
        read.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    fn read_now(config: &Config, address: &Address, transport: &dyn OpenTransport) -> Result<Self, SettingsError> {
        let failed = |key, path: &PathBuf, why| SettingsError { path: path.clone(), key, why };
        let token = match &config.token_file {
            None => None,
            Some(path) => {
                Some(access::token(path).map_err(|error| failed("status.token_file", path, error.to_string()))?)
            }
        };
        let tls = match (&config.tls_cert_file, &config.tls_key_file) {
            (Some(cert), Some(key)) if matches!(address, Address::Tcp(_)) => {
                let server = gitlab::server_tls(cert, key);
                let server = server.map_err(|error| failed("status.tls_cert_file", cert, chain(&error)))?;
                Some(TlsAcceptor::from(Arc::new(server)))
            }
            _ => None,
        };
        let fleet = Fleet::open(config, token.clone(), transport).map_err(|error| {
            let none = PathBuf::from("the system's certificates");
            failed("status.fleet", config.fleet_ca_file.as_ref().unwrap_or(&none), chain(&error))
        })?;
        Ok(Self { access: Access::of(address, token), tls, fleet })
    }
}
