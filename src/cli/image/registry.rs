//! `dayfly image export` and `import` to and from a container registry.

use super::say;
use crate::cli::Interrupted;
use crate::image::build::{self, Staged, opener};
use crate::image::registry::{Access, Patience, Reference, Registry, SCHEME, push};
use crate::image::store::{Image, ImageStore};
use std::path::PathBuf;
use std::pin::Pin;

/// How a registry is reached.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// For oci://: file with the registry's credentials, of the form of Docker's config.json, mode 0600 [default: Docker's own]
    #[arg(long, value_name = "FILE")]
    auth_file: Option<PathBuf>,
    /// For oci://: CA certificates, PEM, besides the system's
    #[arg(long, value_name = "FILE")]
    registry_ca: Option<PathBuf>,
    /// For oci://: speak http:// to a registry that is not on this host's loopback, in the clear
    #[arg(long)]
    plain_http: bool,
}

/// Whether it names a place in a registry.
pub(super) fn is_registry(place: &str) -> bool {
    place.starts_with(SCHEME)
}

impl Args {
    fn registry(self, place: &str) -> anyhow::Result<Registry> {
        let Self { auth_file, registry_ca, plain_http } = self;
        let access = Access { auth_file, ca_file: registry_ca, plain_http, patience: Patience::default() };
        Ok(Registry::new(Reference::parse(place)?, &access, opener())?)
    }

    /// Fetches an image.
    pub(super) async fn import(
        self,
        store: &ImageStore,
        place: &str,
        name: Option<&str>,
        interrupted: &mut Pin<&mut impl Future>,
    ) -> anyhow::Result<Staged> {
        let mut registry = self.registry(place)?;
        let mut progress = say;
        tokio::select! {
            biased;
            // What has come of it stays for the next time.
            staged = build::pull(&mut registry, store, name, &mut progress) => Ok(staged?),
            _ = interrupted => Err(Interrupted.into()),
        }
    }

    /// Puts an image there.
    pub(super) async fn export(self, store: &ImageStore, image: &Image, place: &str) -> anyhow::Result<()> {
        let mut registry = self.registry(place)?;
        let (checked, of) = (store.clone(), image.clone());
        // What is sent on is what was built.
        tokio::task::spawn_blocking(move || checked.verify(&of)).await??;
        let mut progress = say;
        let digest = push(&mut registry, image, &mut progress).await?;
        let reference = registry.reference();
        say(&format!(
            "version {} is at {reference}: {SCHEME}{}/{}@{digest}",
            super::inspect::version(image),
            reference.registry(),
            reference.repository()
        ));
        Ok(())
    }
}
