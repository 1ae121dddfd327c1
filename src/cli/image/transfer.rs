//! `dayfly image import` and `export`.

use super::build::test_and_take_in;
use super::{inspect, say};
use crate::config::Config;
use crate::image::build;
use crate::image::store::ImageStore;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Import {
    /// Directory or .tar file that `dayfly image export` has made
    from: PathBuf,
    /// Name for it here [default: its own]
    #[arg(long)]
    name: Option<String>,
    /// Do not put it into use: `dayfly image promote` does
    #[arg(long)]
    keep_aside: bool,
}

/// Takes an image in, boot-tests it, and puts it into use.
pub(super) async fn import(config: &Config, store: ImageStore, args: Import) -> anyhow::Result<()> {
    let Import { from, name, keep_aside } = args;
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
