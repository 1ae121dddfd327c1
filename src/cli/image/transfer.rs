//! `dayfly image import` and `export`.

use super::build::test_and_take_in;
use super::cloud::{Cloud, is_cloud_image};
use super::{inspect, say};
use crate::config::Config;
use crate::image::build;
use crate::image::store::ImageStore;
use anyhow::Context as _;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Import {
    /// Directory or .tar file that `dayfly image export` has made; or a cloud image: https:// address, or file
    from: String,
    /// Name for it here [default: its own; a cloud image's: its file's]
    #[arg(long)]
    name: Option<String>,
    /// Do not put it into use: `dayfly image promote` does
    #[arg(long)]
    keep_aside: bool,
    #[command(flatten)]
    cloud: Cloud,
}

/// Takes an image in, boot-tests it, and puts it into use.
pub(super) async fn import(config: &Config, store: ImageStore, args: Import) -> anyhow::Result<()> {
    let Import { from, name, keep_aside, cloud } = args;
    if is_cloud_image(&from).with_context(|| format!("read {from}"))? {
        return Box::pin(super::cloud::import(config, store, &from, name, keep_aside, cloud)).await;
    }
    let from = PathBuf::from(from);
    let interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    // On a thread, for a disk is large. An interruption is met when it is there: what was taken in then goes.
    let import = move || build::import(&from, &store, name.as_deref(), &mut say);
    let staged = tokio::task::spawn_blocking(import).await??;
    test_and_take_in(config, staged, keep_aside, interrupted).await
}

/// Writes an image for other hosts.
pub(super) fn export(store: &ImageStore, name: &str, to: &Path) -> anyhow::Result<()> {
    let image = store.named(name)?;
    build::export(store, &image, to)?;
    say(&format!("version {} is in {}", inspect::version(&image), to.display()));
    Ok(())
}
