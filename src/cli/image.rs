//! `dayfly image`: build, take in, test, list, put into use and remove base images.

mod build;
mod inspect;
mod transfer;

use super::Interrupted;
use crate::boot_test::{BootTest, Booted, DEADLINE};
use crate::config::Config;
use crate::image::build::Recipes;
use crate::image::store::{Image, ImageError, ImageStore};
use crate::network::Tcp;
use crate::telemetry::printable;
use crate::vm::AccelChoice;
use anyhow::bail;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

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
    /// Build an image from a recipe, boot-test it, and put it into use
    Build(build::Args),
    /// Build those images anew that are older than they may be; each takes its place when it has booted
    Refresh(build::Refresh),
    /// Show all recipes, and where each is
    Recipes {
        /// Directory with recipes that come before all others
        #[arg(long, value_name = "DIR")]
        recipes: Option<PathBuf>,
    },
    /// Take in an image that `export` has made on another host, boot-test it, and put it into use
    Import(transfer::Import),
    /// Write an image for other hosts, to a new directory or to a new file that ends in .tar
    Export {
        /// Name of the image, or NAME@VERSION
        name: String,
        /// Where to
        to: PathBuf,
    },
    /// Boot an image once and keep what its runner says of itself
    Test {
        /// Name of the image, or NAME@VERSION
        name: String,
    },
    /// Put a version that has passed its boot test into use
    Promote {
        /// NAME@VERSION, as `image inspect NAME` lists them
        #[arg(value_name = "NAME@VERSION")]
        name: String,
    },
    /// Show all images, and whose runner is in each
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one image, or one version of it: what is in it, of what it was made, which versions there are
    Inspect {
        /// Name of the image, or NAME@VERSION
        name: String,
        /// As JSON, with all packages
        #[arg(long)]
        json: bool,
    },
    /// Show what differs between two images or versions: suite, kernel, runner, packages
    Diff {
        /// Name of an image, or NAME@VERSION
        one: String,
        /// Another
        other: String,
    },
    /// Put the newest version that is not in use back in use; again, and the other one is back
    Rollback {
        /// Name of the image
        name: String,
    },
    /// Remove an image, VMs that run from it go on; or one version of it, if nothing needs that
    Remove {
        /// Name of the image, or NAME@VERSION
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
    let overlays = config.state_directory.join("overlays");
    let store = ImageStore::new(&config.image_directory).keeping(config.image_versions, overlays);
    match args.command {
        Command::Build(args) => build::build(&config, store, args).await?,
        Command::Refresh(args) => build::refresh(&config, &store, args).await?,
        Command::Import(args) => transfer::import(&config, store, args).await?,
        Command::Export { name, to } => transfer::export(&store, &name, &to)?,
        Command::Recipes { recipes } => {
            for recipe in Recipes::default().before_others(recipes).all() {
                let place = recipe.directory.map_or("inside dayfly".to_owned(), |path| path.display().to_string());
                say(&format!("{}  {place}", recipe.name));
            }
        }
        Command::Test { name } => {
            let image = store.named(&name)?;
            let booted = to_its_end(boot(&config, &image), std::pin::pin!(tokio::signal::ctrl_c())).await??;
            store.learn(&image, booted.learnt())?;
            say(&format!("image `{name}` boots: {}", describe(&store.named(&name)?)));
        }
        Command::List { json: true } => {
            let images: Vec<_> = store.list()?.into_iter().map(|(name, image)| facts(&name, image.as_ref())).collect();
            super::print(&format!("{}\n", serde_json::to_string_pretty(&images)?))?;
        }
        Command::List { json: false } => {
            let images = store.list()?;
            if images.is_empty() {
                say(&format!(
                    "no images in {}; `dayfly image build debian-12-shell` makes one",
                    store.directory().display(),
                ));
            }
            for (name, image) in images {
                match image {
                    Ok(image) => say(&format!("{name}  {}", describe(&image))),
                    Err(error) => say(&format!("{name}  unusable: {}", crate::telemetry::chain(&error))),
                }
            }
        }
        Command::Inspect { name, json } => inspect::inspect(&store, &name, json)?,
        Command::Diff { one, other } => inspect::differences(&store, &one, &other)?,
        Command::Promote { name } => {
            let image = store.promote_version(&name)?;
            say(&format!("image `{}` is {} now: {}", image.name, inspect::version(&image), describe(&image)));
        }
        Command::Rollback { name } => {
            let image = store.roll_back(&name)?;
            say(&format!("image `{name}` is {} again: {}", inspect::version(&image), describe(&image)));
        }
        Command::Remove { name } => {
            if name.contains('@') {
                store.remove_version(&name)?;
                return Ok(());
            }
            // A removal that was interrupted leaves versions that no name leads to.
            if !store.list()?.iter().any(|(listed, _)| *listed == name) && store.versions(&name)?.is_empty() {
                bail!("remove image `{name}`: there is none; `dayfly image list` shows them");
            }
            store.remove(&name)?;
        }
    }
    Ok(())
}

/// What is known of an image, for programs.
fn facts(name: &str, image: Result<&Image, &ImageError>) -> serde_json::Value {
    match image {
        Ok(image) => serde_json::json!({
            "name": name,
            "runner": image.manifest.runner.version,
            "runner_origin": image.manifest.runner.origin.to_string(),
            "executor": image.manifest.executor,
            "boot_tested": image.manifest.info.is_some(),
            "takes_no_job": image.manifest.unspoken(),
        }),
        Err(error) => serde_json::json!({ "name": name, "unusable": crate::telemetry::chain(error) }),
    }
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
