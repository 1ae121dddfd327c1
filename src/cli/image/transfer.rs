//! `dayfly image import` and `export`.

use super::build::test_and_take_in;
use super::registry::{self, is_registry};
use super::{inspect, say};
use crate::config::Config;
use crate::image::build;
use crate::image::store::ImageStore;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Import {
    /// Directory or .tar file that `dayfly image export` has made, or oci://REGISTRY/NAME:TAG where it has put one
    from: String,
    /// Name for it here [default: its own]
    #[arg(long)]
    name: Option<String>,
    /// Do not put it into use: `dayfly image promote` does
    #[arg(long)]
    keep_aside: bool,
    #[command(flatten)]
    registry: registry::Args,
}

#[derive(Debug, clap::Args)]
pub(super) struct Export {
    /// Name of the image, or NAME@VERSION
    name: String,
    /// Where to: a new directory, a new file that ends in .tar, or oci://REGISTRY/NAME:TAG
    to: String,
    #[command(flatten)]
    registry: registry::Args,
}

/// Takes an image in, boot-tests it, and puts it into use.
pub(super) async fn import(config: &Config, store: ImageStore, args: Import) -> anyhow::Result<()> {
    let Import { from, name, keep_aside, registry } = args;
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    if is_registry(&from) {
        let staged = registry.import(&store, &from, name.as_deref(), &mut interrupted).await?;
        return test_and_take_in(config, staged, keep_aside, interrupted).await;
    }
    let from = PathBuf::from(from);
    // On a thread, for a disk is large. An interruption is met when it is there: what was taken in then goes.
    let import = move || build::import(&from, &store, name.as_deref(), &mut say);
    let staged = tokio::task::spawn_blocking(import).await??;
    test_and_take_in(config, staged, keep_aside, interrupted).await
}

/// Writes an image for other hosts.
pub(super) async fn export(store: &ImageStore, args: Export) -> anyhow::Result<()> {
    let Export { name, to, registry } = args;
    let image = store.named(&name)?;
    if is_registry(&to) {
        return registry.export(store, &image, &to).await;
    }
    build::export(store, &image, Path::new(&to))?;
    say(&format!("version {} is in {to}", inspect::version(&image)));
    Ok(())
}
