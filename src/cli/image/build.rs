//! `dayfly image build` and `refresh`.

use super::{boot, describe, inspect, say, to_its_end};
use crate::cli::Interrupted;
use crate::config::{Config, Span};
use crate::image::build::{
    BuildRequest, Downloaded, HelperSource, RUNNER_DOWNLOADS, Recipes, Release, RunnerSource, Staged,
    find_guest_program, opener,
};
use crate::image::manifest::RunnerOrigin;
use crate::image::store::{Image, ImageStore};
use anyhow::{Context as _, bail};
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
    /// gitlab-runner-helper-images; of the runner's version [default: fetched with the runner, if that is]
    #[arg(long, value_name = "FILE")]
    helper_image: Option<PathBuf>,
    /// Fetch this release of the official gitlab-runner (like 19.3.0) and put that in
    #[arg(long, value_name = "VERSION", conflicts_with = "runner")]
    runner_download: Option<String>,
    /// SHA-256 that the fetched runner must have [default: as the release's list says]
    #[arg(long, value_name = "DIGEST", requires = "runner_download")]
    runner_sha256: Option<String>,
    /// Public key of which the release's list of digests must have a signature, armored or not
    #[arg(long, value_name = "FILE", env = "DAYFLY_RUNNER_KEY")]
    runner_key: Option<PathBuf>,
    /// Do not put the new version into use: `dayfly image promote` does
    #[arg(long)]
    keep_aside: bool,
    /// Where releases are: GitLab's own place, or a mirror of the same layout
    #[arg(long, value_name = "URL", env = "DAYFLY_RUNNER_DOWNLOAD_URL", default_value = RUNNER_DOWNLOADS)]
    runner_download_url: Url,
}

#[derive(Debug, clap::Args)]
pub(super) struct Refresh {
    /// How old an image may be [default: `image_max_age` of the configuration]
    #[arg(long, value_name = "DURATION", value_parser = |text: &str| Span::try_from(text.to_owned()))]
    max_age: Option<Span>,
    /// Directory with recipes that come before all others
    #[arg(long, value_name = "DIR")]
    recipes: Option<PathBuf>,
    /// gitlab-runner to put in; else the same release again where it was fetched, else as `build` finds it
    #[arg(long, value_name = "FILE")]
    runner: Option<PathBuf>,
    /// The runner's helper image, for images with Docker, as `build` takes it
    #[arg(long, value_name = "FILE")]
    helper_image: Option<PathBuf>,
    /// Where releases are: GitLab's own place, or a mirror of the same layout
    #[arg(long, value_name = "URL", env = "DAYFLY_RUNNER_DOWNLOAD_URL", default_value = RUNNER_DOWNLOADS)]
    runner_download_url: Url,
    /// Public key of which a release's list of digests must have a signature, armored or not
    #[arg(long, value_name = "FILE", env = "DAYFLY_RUNNER_KEY")]
    runner_key: Option<PathBuf>,
}

/// Builds an image, boot-tests it and puts it into use.
pub(super) async fn build(config: &Config, store: ImageStore, args: Args) -> anyhow::Result<()> {
    let recipes = Recipes::default().before_others(args.recipes.map(std::path::absolute).transpose()?);
    let with_helper = recipes.has_docker(&args.recipe)? && args.helper_image.is_none();
    let (url, sha256, key) = (args.runner_download_url, args.runner_sha256, args.runner_key);
    let release =
        args.runner_download.map(|version| Release::new(&version, url, sha256.as_deref(), key)).transpose()?;
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
            fetched = release.fetch(&*open, Path::new(DOWNLOADS), with_helper, &mut progress) => fetched?,
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
        helper: match args.helper_image {
            Some(path) => Some(HelperSource { path }),
            None => downloaded.as_ref().and_then(|downloaded| downloaded.helper.clone()),
        },
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

/// Builds those images anew that are older than they may be, each of the same runner; one that fails keeps the others from
/// nothing, and its version of before in use.
pub(super) async fn refresh(config: &Config, store: &ImageStore, args: Refresh) -> anyhow::Result<()> {
    let Some(max_age) = args.max_age.or(config.image_max_age) else {
        bail!("build old images anew: say how old is too old, by `image_max_age` in the configuration or --max-age");
    };
    let recipes = Recipes::default().before_others(args.recipes.clone());
    let mut failed = Vec::new();
    for (name, image) in store.list()? {
        let Ok(image) = image else { continue };
        let age = image.stamp.made().and_then(|made| made.elapsed().ok());
        if age.is_none_or(|age| age <= max_age.get()) {
            continue;
        }
        if recipes.check(&name).is_err() {
            say(&format!("image `{name}` is too old, and there is no recipe of its name; it stays as it is"));
            continue;
        }
        say(&format!("image `{name}` is too old"));
        let built = match again(&image, &args) {
            Ok(args) => Box::pin(build(config, store.clone(), args)).await,
            Err(error) => Err(error),
        };
        match built {
            Ok(()) => {}
            Err(error) if error.is::<Interrupted>() => return Err(error),
            Err(error) => {
                say(&format!("image `{name}` stays as it is: {error:#}"));
                failed.push(name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("build anew: {}", failed.join(", ")) }
}

/// The arguments with which an image is built again: its runner is of the same origin, and of the same release if it was
/// fetched.
fn again(image: &Image, args: &Refresh) -> anyhow::Result<Args> {
    let runner = &image.manifest.runner;
    let fetched = (runner.origin == RunnerOrigin::Download && args.runner.is_none()).then(|| runner.version.clone());
    if fetched.is_none() && !image.manifest.is_standin() {
        let found = RunnerSource::find(args.runner.clone())?;
        if found.origin == RunnerOrigin::Standin {
            bail!(
                "its gitlab-runner came from a path, and none is to be found now; give it by --runner or DAYFLY_GITLAB_RUNNER"
            );
        }
    }
    Ok(Args {
        recipe: image.name.clone(),
        recipes: args.recipes.clone(),
        runner: args.runner.clone(),
        helper_image: args.helper_image.clone(),
        runner_download: fetched,
        runner_sha256: None,
        runner_key: args.runner_key.clone(),
        keep_aside: false,
        runner_download_url: args.runner_download_url.clone(),
    })
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
