//! `dayfly image build`.

use super::{boot, describe, inspect, say, to_its_end};
use crate::cli::Interrupted;
use crate::config::Config;
use crate::image::build::{
    BuildRequest, Downloaded, HelperSource, RUNNER_DOWNLOADS, Recipes, Release, RunnerSource, Staged,
    find_guest_program, opener,
};
use crate::image::store::ImageStore;
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use url::Url;

/// Where a fetched runner lies while an image is built, as the build's own files do: programs may run there, and nobody
/// else may write to a file of ours.
const DOWNLOADS: &str = "/var/tmp";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the recipe, as `dayfly image recipes` lists them
    recipe: String,
    /// Directory with recipes that come before all others
    #[arg(long, value_name = "DIR")]
    recipes: Option<PathBuf>,
    /// gitlab-runner to put in; else $DAYFLY_GITLAB_RUNNER, else the host's, else the stand-in
    #[arg(long, value_name = "FILE")]
    runner: Option<PathBuf>,
    /// The runner's helper image, for recipes with Docker: a docker archive, or prebuilt-x86_64.tar.xz of GitLab's package
    /// gitlab-runner-helper-images; of the runner's version
    #[arg(long, value_name = "FILE")]
    helper_image: Option<PathBuf>,
    /// Fetch this release of the official gitlab-runner (like 19.3.0) and put that in
    #[arg(long, value_name = "VERSION", conflicts_with = "runner")]
    runner_download: Option<String>,
    /// SHA-256 that the fetched runner must have [default: as the release's list says]
    #[arg(long, value_name = "DIGEST", requires = "runner_download")]
    runner_sha256: Option<String>,
    /// Do not put the new version into use: `dayfly image promote` does
    #[arg(long)]
    keep_aside: bool,
    /// Where releases are: GitLab's own place, or a mirror of the same layout
    #[arg(long, value_name = "URL", env = "DAYFLY_RUNNER_DOWNLOAD_URL", default_value = RUNNER_DOWNLOADS)]
    runner_download_url: Url,
}

/// Builds an image, boot-tests it and puts it into use.
pub(super) async fn build(config: &Config, store: ImageStore, args: Args) -> anyhow::Result<()> {
    let recipes = Recipes::default().before_others(args.recipes.map(std::path::absolute).transpose()?);
    recipes.check(&args.recipe)?;
    let (url, sha256) = (args.runner_download_url, args.runner_sha256);
    let release = args.runner_download.map(|version| Release::new(&version, url, sha256.as_deref())).transpose()?;
    let (guest_program, init) = (find_guest_program("dayfly-guest")?, find_guest_program("dayfly-init")?);
    let mut progress = say;
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    // Kept until the image is made.
    let mut downloaded: Option<Downloaded> = None;
    if let Some(release) = release {
        let open = opener();
        downloaded = Some(tokio::select! {
            biased;
            // Dropping it removes what has come.
            fetched = release.fetch(&*open, Path::new(DOWNLOADS), &mut progress) => fetched?,
            _ = &mut interrupted => return Err(Interrupted.into()),
        });
    }
    let request = BuildRequest {
        recipe: args.recipe,
        recipes,
        store,
        runner: match &downloaded {
            Some(downloaded) => downloaded.runner.clone(),
            None => RunnerSource::find(args.runner)?,
        },
        helper: args.helper_image.map(|path| HelperSource { path }),
        accel: config.hypervisor.accel,
        guest_program,
        init,
    };
    // What is done is done. Dropping a build ends its programs and removes its files.
    let staged = tokio::select! {
        biased;
        staged = crate::image::build::build(&request, &mut progress) => staged?,
        _ = &mut interrupted => return Err(Interrupted.into()),
    };
    test_and_take_in(config, staged, args.keep_aside, interrupted).await
}

/// Boots a staged image, and puts it into use, or aside, if it came up.
pub(super) async fn test_and_take_in(
    config: &Config,
    mut staged: Staged,
    keep_aside: bool,
    interrupted: Pin<&mut impl Future>,
) -> anyhow::Result<()> {
    let image = staged.image()?;
    let booted = to_its_end(boot(config, &image), interrupted)
        .await?
        .context("boot-test the new image; the old one, if any, stays in use")?;
    staged.learn(booted.learnt())?;
    let take_in = move || if keep_aside { staged.keep() } else { staged.promote() };
    let image = tokio::task::spawn_blocking(take_in).await??;
    if keep_aside {
        let version = inspect::version(&image);
        say(&format!("version {version} is kept aside: {}; `dayfly image promote {version}`", describe(&image)));
    } else {
        say(&format!("image `{}` is ready: {}", image.name, describe(&image)));
    }
    Ok(())
}
