//! `dayfly image`: build, test, list and remove base images.

use super::Interrupted;
use crate::boot_test::{BootTest, Booted, DEADLINE};
use crate::config::Config;
use crate::image::build::{
    BuildRequest, Downloaded, RECIPES, RUNNER_DOWNLOADS, Release, RunnerSource, build, check_recipe,
    find_guest_program, opener,
};
use crate::image::store::{Image, ImageStore, Images as _};
use crate::network::Tcp;
use crate::telemetry::printable;
use crate::vm::AccelChoice;
use anyhow::{Context as _, bail};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use url::Url;

/// Where a fetched runner lies while an image is built, as the build's own files do: programs may run there, and nobody
/// else may write to a file of ours.
const DOWNLOADS: &str = "/var/tmp";

/// Arguments of all image commands.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where images are, instead of `image_directory` of the configuration
    #[arg(long, global = true, value_name = "DIR")]
    image_directory: Option<PathBuf>,
    /// libvirt URI for boot tests, instead of `hypervisor.uri`, or `none`: QEMU without libvirt
    #[arg(long, global = true, value_name = "URI")]
    libvirt: Option<String>,
    /// Virtualisation for boot tests, instead of `hypervisor.accel`
    #[arg(long, global = true, value_name = "auto|kvm|tcg")]
    accel: Option<AccelChoice>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Build an image from a recipe of vm-images, boot-test it, and put it into use
    Build {
        /// Name of the recipe: debian-12-shell
        recipe: String,
        /// gitlab-runner to put in; else $DAYFLY_GITLAB_RUNNER, else the host's, else the stand-in
        #[arg(long, value_name = "FILE")]
        runner: Option<PathBuf>,
        /// Fetch this release of the official gitlab-runner (like 19.3.0) and put that in
        #[arg(long, value_name = "VERSION", conflicts_with = "runner")]
        runner_download: Option<String>,
        /// SHA-256 that the fetched runner must have [default: as the release's list says]
        #[arg(long, value_name = "DIGEST", requires = "runner_download")]
        runner_sha256: Option<String>,
        /// Where releases are: GitLab's own place, or a mirror of the same layout
        #[arg(long, value_name = "URL", env = "DAYFLY_RUNNER_DOWNLOAD_URL", default_value = RUNNER_DOWNLOADS)]
        runner_download_url: Url,
    },
    /// Boot an image once and keep what its runner says of itself
    Test {
        /// Name of the image
        name: String,
    },
    /// Show all images, and whose runner is in each
    List,
    /// Remove an image; VMs that run from it go on
    Remove {
        /// Name of the image
        name: String,
    },
}

/// Runs one of them.
pub(super) async fn image(config: &Path, args: Args) -> anyhow::Result<()> {
    let mut config = Config::load_or_default(config)?.config;
    if let Some(directory) = args.image_directory {
        config.image_directory = std::path::absolute(directory)?;
    }
    if let Some(libvirt) = args.libvirt {
        config.hypervisor.choose(&libvirt);
    }
    config.hypervisor.accel = args.accel.unwrap_or(config.hypervisor.accel);
    let store = ImageStore::new(&config.image_directory);
    match args.command {
        Command::Build { recipe, runner, runner_download, runner_sha256, runner_download_url } => {
            check_recipe(&recipe)?;
            let (guest_program, init) = (find_guest_program("dayfly-guest")?, find_guest_program("dayfly-init")?);
            let mut progress = say;
            let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
            // Kept until the image is made.
            let mut downloaded: Option<Downloaded> = None;
            if let Some(version) = runner_download {
                let release = Release::new(&version, runner_download_url, runner_sha256.as_deref())?;
                let open = opener();
                downloaded = Some(tokio::select! {
                    biased;
                    // Dropping it removes what has come.
                    fetched = release.fetch(&*open, Path::new(DOWNLOADS), &mut progress) => fetched?,
                    _ = &mut interrupted => return Err(Interrupted.into()),
                });
            }
            let request = BuildRequest {
                recipe,
                image_directory: config.image_directory.clone(),
                runner: match &downloaded {
                    Some(downloaded) => downloaded.runner.clone(),
                    None => RunnerSource::find(runner)?,
                },
                guest_program,
                init,
            };
            // What is done is done. Dropping a build ends its programs and removes its files.
            let mut staged = tokio::select! {
                biased;
                staged = build(&request, &mut progress) => staged?,
                _ = &mut interrupted => return Err(Interrupted.into()),
            };
            let image = staged.image()?;
            let booted = to_its_end(boot(&config, &image), interrupted)
                .await?
                .context("boot-test the new image; the old one, if any, stays in use")?;
            staged.learn(booted.learnt())?;
            let image = tokio::task::spawn_blocking(move || staged.promote()).await??;
            say(&format!("image `{}` is ready: {}", image.name, describe(&image)));
        }
        Command::Test { name } => {
            let image = store.load(&name).await?;
            let booted = to_its_end(boot(&config, &image), std::pin::pin!(tokio::signal::ctrl_c())).await??;
            store.learn(&image, booted.learnt())?;
            say(&format!("image `{name}` boots: {}", describe(&store.load(&name).await?)));
        }
        Command::List => {
            let images = store.list()?;
            if images.is_empty() {
                say(&format!(
                    "no images in {}; `dayfly image build {}` makes one",
                    store.directory().display(),
                    RECIPES.join("|")
                ));
            }
            for (name, image) in images {
                match image {
                    Ok(image) => say(&format!("{name}  {}", describe(&image))),
                    Err(error) => say(&format!("{name}  unusable: {}", crate::telemetry::chain(&error))),
                }
            }
        }
        Command::Remove { name } => {
            if !store.list()?.iter().any(|(listed, _)| *listed == name) {
                bail!("remove image `{name}`: there is none; `dayfly image list` shows them");
            }
            store.remove(&name)?;
        }
    }
    Ok(())
}

/// A boot test goes to its end, within minutes, even when it is interrupted: nobody else would take
/// its VM down.
async fn to_its_end<T>(
    boot: impl Future<Output = T>,
    mut interrupted: Pin<&mut impl Future>,
) -> Result<T, Interrupted> {
    let mut boot = std::pin::pin!(boot);
    // The result first: an interruption that comes with it is too late to matter.
    tokio::select! {
        biased;
        done = &mut boot => Ok(done),
        _ = &mut interrupted => {
            say("interrupted; waiting for the test VM to end");
            boot.await;
            Err(Interrupted)
        }
    }
}

/// One line about an image: whose runner, of which version, and whether it was tested.
pub(super) fn describe(image: &Image) -> String {
    let runner = &image.manifest.runner;
    let whose =
        if image.manifest.is_standin() { "dayfly's STAND-IN runner (not the official one)" } else { "gitlab-runner" };
    let tested = if image.manifest.info.is_some() { "boot-tested" } else { "never boot-tested" };
    let unspoken = image.manifest.unspoken().map_or(String::new(), |why| format!("; takes no job: {why}"));
    format!(
        "{whose} {}, from {}, executor {}, {tested}{unspoken}",
        runner.version, runner.origin, image.manifest.executor
    )
}

/// Boots an image once, with files of its own that are gone afterwards.
async fn boot(config: &Config, image: &Image) -> anyhow::Result<Booted> {
    let sockets = tempfile::Builder::new().prefix("dayfly-").tempdir_in("/tmp")?;
    let host = config.hypervisor.host(sockets.path());
    if config.hypervisor.accel == AccelChoice::Tcg {
        say("booting under TCG: slow, and it isolates nothing");
    }
    let test = BootTest {
        host,
        hypervisor: &config.hypervisor,
        listen: Arc::new(Tcp),
        accel: config.hypervisor.accel,
        image_directory: &config.image_directory,
        socket_dir: sockets.path(),
        network: config.network.clone(),
        deadline: DEADLINE,
    };
    let booted = test.run(image, &mut say).await?;
    say(&format!("{:>6.2} s  gitlab-runner asks for a job", booted.took.as_secs_f64()));
    Ok(booted)
}

/// A line for the operator. Nobody can be told if that fails.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{}", printable(line));
}
