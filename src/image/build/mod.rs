//! How is an image made?
//!
//! ```text
//! recipe ─► packages (mmdebstrap, with runner, guest program and units) ─► ext4 ─► disk.qcow2
//!                └─► kernel package ─► vmlinuz, modules + dayfly-init ─► initrd; or, with `boot = "disk"`,
//!                    kernel and boot loader inside, the ext4 a partition behind it
//!                                                                          │
//!     Staged (beside the images) ◄── image.toml, digests ◄─────────────────┘
//!        └─► the boot test learns `info` ─► Staged::promote
//! ```
//!
//! Two or three minutes, without root. One build at a time in an image directory; a build that fails or is
//! dropped leaves nothing, one that is killed is cleaned up by the next.

mod disk;
mod download;
mod import;
mod initrd;
mod preload;
mod programs;
mod recipe;
mod rootfs;
mod sealed;
mod signature;
mod sources;
mod staging;

pub use download::{DownloadError, Downloaded, RUNNER_DOWNLOADS, Release, opener};
pub use import::{export, import};
pub use preload::HelperSource;
pub use programs::{RUNNER_VARIABLE, RunnerSource, STANDIN_RUNNER, find_guest_program};
pub use recipe::{Found, RECIPE_DIRECTORIES, Recipes};

use super::manifest::{
    BootKind, BuildInputs, DockerInside, FORMAT_VERSION, ImageFile, ImageRunner, Learnt, MANIFEST_FILE, Manifest,
};
use super::store::{Image, ImageError, ImageStore};
use crate::process::ProcessError;
use crate::vm::AccelChoice;
use preload::Machine;
use recipe::{Inputs, Recipe};
use rootfs::{Privilege, Start, Work};
use staging::Staging;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Gets each line of progress as it comes.
pub type Progress<'a> = dyn FnMut(&str) + Send + 'a;

const DISK_FILE: &str = "disk.qcow2";
const KERNEL_FILE: &str = "vmlinuz";
const INITRD_FILE: &str = "initrd";

/// What to build, of what.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// Name of the recipe; also the image's name.
    pub recipe: String,
    /// Where it is looked for.
    pub recipes: Recipes,
    /// Where images are; its directory is made if missing.
    pub store: ImageStore,
    /// The runner to put in.
    pub runner: RunnerSource,
    /// The runner's helper image, for recipes with Docker; none: the runner fetches its own in each job.
    pub helper: Option<HelperSource>,
    /// What runs the machine that puts container images in.
    pub accel: AccelChoice,
    /// `dayfly-guest`, linked statically; see [`find_guest_program`].
    pub guest_program: PathBuf,
    /// `dayfly-init`, likewise.
    pub init: PathBuf,
}

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No such recipe.
    #[error("find recipe `{name}`{extended_by}; there are: {there_are}")]
    Recipe {
        /// The name.
        name: String,
        /// Who asks for it, if another recipe does.
        extended_by: String,
        /// Names of those that there are.
        there_are: String,
    },
    /// A recipe extends itself.
    #[error("read the recipes: {0}, and so on")]
    RecipeCircle(String),
    /// Not TOML of a recipe.
    #[error("read {}", .path.display())]
    RecipeText {
        /// The recipe.
        path: PathBuf,
        /// What is wrong, and where.
        #[source]
        source: Box<figment::Error>,
    },
    /// A value in it is of no use.
    #[error("read {}: {why}", .path.display())]
    RecipeValue {
        /// The recipe.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A key is neither in it nor in those that it extends.
    #[error(
        "read recipe `{name}`: it has no `{key}`, and extends none that has; most begin with `extends = \"debian-12-shell\"`"
    )]
    RecipeKey {
        /// The recipe.
        name: String,
        /// The key.
        key: &'static str,
    },
    /// It wants containers, and has nothing that runs them.
    #[error(
        "read recipe `{0}`: it wants containers (executor docker, or preload), and has no Docker; extend `debian-12-docker`, or put docker.io among its packages"
    )]
    RecipeDocker(String),
    /// It wants containers inside, and the hypervisor does not load its kernel.
    #[error(
        "read recipe `{0}`: `preload` is for images whose kernel the hypervisor loads; leave it out, or leave `boot = \"disk\"` out"
    )]
    RecipePreload(String),
    /// It leaves out what is not there.
    #[error("read recipe `{name}`: `without` names {package}, which none that it extends has")]
    RecipeWithout {
        /// The recipe.
        name: String,
        /// The package.
        package: String,
    },
    /// The recipe is for another kind of machine.
    #[error("build an image for {0} on {host}", host = std::env::consts::ARCH)]
    Architecture(String),
    /// There is no runner to put in.
    #[error(
        "find a gitlab-runner: let it be fetched by --runner-download VERSION (like 19.3.0), give one by --runner PATH or \
         {RUNNER_VARIABLE}, or install the package gitlab-runner"
    )]
    NoRunner,
    /// The runner cannot be used.
    #[error("use runner {}: it {why}", .path.display())]
    Runner {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A program of ours for the inside of the image is missing.
    #[error("find a statically linked {name} in {}; `cargo build --release` in vm-images/guest makes one", list(.places))]
    GuestProgram {
        /// `dayfly-guest` or `dayfly-init`.
        name: &'static str,
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },
    /// What is to be taken in is no image as it should be.
    #[error("take an image in from {}: {why}", .path.display())]
    Import {
        /// Where it comes from.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Another build is at work here.
    #[error("build in {}: another build is running there", .0.display())]
    Busy(PathBuf),
    /// A program of the host failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Docker did not take what it was to have.
    #[error("put container images into the image: {0}")]
    Preload(String),
    /// It would be the same in all machines.
    #[error(
        "keep the image: it holds {0}, which all its machines would share; take that out in the recipe's customize.sh"
    )]
    Secret(String),
    /// The helper image is of no use.
    #[error("use helper image {}: {why}", .path.display())]
    Helper {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The kernel's package is not what it should be.
    #[error("take the kernel out of its package: {0}")]
    Kernel(&'static str),
    /// The boot loader that the recipe's steps have made.
    #[error("put the boot loader on the disk: {0}")]
    Loader(&'static str),
    /// The kernel's package lacks a module.
    #[error("find module `{0}` in the kernel's package")]
    Module(String),
    /// A file.
    #[error("{what} {}", .path.display())]
    File {
        /// The attempt, in words.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The finished image did not pass the store's checks.
    #[error(transparent)]
    Image(#[from] ImageError),
}

fn list(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(" or ")
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::File { what, path, source }
}

/// An image that has been built and is not yet in use. Dropped, it is removed.
#[derive(Debug)]
pub struct Staged {
    store: ImageStore,
    directory: Staging,
    manifest: Manifest,
}

impl Staged {
    /// Its directory: `image.toml`, disk, kernel, initrd.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What is in it.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The staged image in the form that a VM is started from, for the boot test.
    ///
    /// # Errors
    /// [`BuildError::Image`].
    pub fn image(&self) -> Result<Image, BuildError> {
        Ok(self.store.open_staged(self.directory.path(), &self.manifest.name)?)
    }

    /// Records what the boot test has learnt.
    ///
    /// # Errors
    /// [`BuildError::File`].
    pub fn learn(&mut self, learnt: Learnt) -> Result<(), BuildError> {
        self.manifest.learn(learnt);
        self.write()
    }

    /// Puts the image in place of the one of its name. Blocks for as long as the disk takes.
    ///
    /// # Errors
    /// [`BuildError::Image`]; the old image then stays.
    pub fn promote(self) -> Result<Image, BuildError> {
        Ok(self.store.promote(self.directory.path(), &self.manifest.name)?)
    }

    /// Keeps the image as a version that may be put into use later.
    ///
    /// # Errors
    /// [`BuildError::Image`].
    pub fn keep(self) -> Result<Image, BuildError> {
        Ok(self.store.keep(self.directory.path(), &self.manifest.name)?)
    }

    fn write(&self) -> Result<(), BuildError> {
        let written = self.directory.write(MANIFEST_FILE, self.manifest.to_text().as_bytes());
        written.map(drop).map_err(file_error("write", &self.directory.path().join(MANIFEST_FILE)))
    }
}

/// Builds an image as far as it can be without starting it.
///
/// # Errors
/// [`BuildError`].
///
/// # Cancel safety
/// Dropping the future kills what runs; files of sub-ids stay in `/var/tmp` until the next build.
pub async fn build(request: &BuildRequest, progress: &mut Progress<'_>) -> Result<Staged, BuildError> {
    let recipe = request.recipes.find(&request.recipe)?;
    if recipe.inputs.architecture != std::env::consts::ARCH {
        return Err(BuildError::Architecture(recipe.inputs.architecture));
    }
    for (name, path) in [("dayfly-guest", &request.guest_program), ("dayfly-init", &request.init)] {
        if !programs::is_static(path).map_err(file_error("read", path))? {
            return Err(BuildError::GuestProgram { name, places: vec![path.clone()] });
        }
    }
    if let Some(helper) = &request.helper {
        let why = match (recipe.inputs.has_docker, helper.path.is_file()) {
            _ if recipe.inputs.boot == BootKind::Disk => {
                Some("it is put in where the hypervisor loads the kernel, and this recipe says `boot = \"disk\"`")
            }
            (false, _) => Some("the recipe has no Docker; leave --helper-image out"),
            (true, false) => Some("it is no file"),
            (true, true) => None,
        };
        if let Some(why) = why {
            return Err(BuildError::Helper { path: helper.path.clone(), why });
        }
    }
    let runner = request.runner.inspect().await?;
    progress(&format!(
        "runner: {} {} (origin: {}, {})",
        "gitlab-runner",
        runner.version,
        runner.origin,
        request.runner.path.display()
    ));
    let staging = Staging::new(request.store.directory())?;

    let privilege = Privilege::of_us();
    let work = Work::new(privilege).await?;
    let built = fill(request, &recipe, &work, &staging, runner, progress).await;
    work.release().await;
    let staged = Staged { store: request.store.clone(), directory: staging, manifest: built? };
    staged.write()?;
    let image = staged.image()?;
    let mib = image.manifest.disk.bytes / (1024 * 1024);
    progress(&format!(
        "built: disk {mib} MiB, kernel {}, {} packages",
        image.manifest.build.kernel,
        image.manifest.build.packages.len()
    ));
    Ok(staged)
}

async fn fill(
    request: &BuildRequest,
    recipe: &Recipe,
    work: &Work,
    staging: &Staging,
    runner: ImageRunner,
    progress: &mut Progress<'_>,
) -> Result<Manifest, BuildError> {
    let inputs = &recipe.inputs;
    lay_out(request, recipe, &work.path("files"))?;
    let included: Vec<&str> = inputs.all_packages().collect();
    progress(&format!("packages: {} with {}", inputs.suite, included.join(", ")));
    let packages = rootfs::packages(work, recipe, progress).await?;

    progress(&format!("kernel: {}", packages.kernel_version));
    let beside = match &packages.start {
        Start::Direct { kernel, modules } => Some(beside(request, inputs, staging, kernel, modules).await?),
        Start::Loader(_) => None,
    };
    progress(match beside {
        Some(_) => "disk: ext4, then qcow2",
        None => "disk: a boot loader and ext4 in partitions, then qcow2",
    });
    let raw = rootfs::file_system(work, &packages, inputs.disk_gib).await?;
    let helper_name = preload::helper_name(&runner.version);
    let helper = request.helper.as_ref().map(|source| (source, helper_name.as_str()));
    let images = match &packages.start {
        Start::Loader(loader) => {
            disk::make_bootable(&raw, loader)?;
            Vec::new()
        }
        Start::Direct { .. } => {
            let machine = Machine {
                disk: &raw,
                kernel: &staging.path().join(KERNEL_FILE),
                initrd: &staging.path().join(INITRD_FILE),
                cmdline: &inputs.cmdline,
                accel: request.accel,
            };
            preload::run(work, recipe, helper, &machine, progress).await?
        }
    };
    sealed::check(&raw, inputs.root_offset()).await?;
    let made = work.path(DISK_FILE);
    rootfs::compress(&raw, &made).await?;
    let disk = staging.copy(DISK_FILE, &made).await?;
    let docker = inputs.has_docker.then(|| DockerInside {
        helper_image: helper.map(|(_, name)| name.to_owned()),
        container_image: inputs.container_image.clone(),
        images,
    });

    let cmdline = beside.is_some().then(|| inputs.cmdline.clone());
    let (kernel, initrd) = beside.unzip();
    Ok(Manifest {
        format_version: FORMAT_VERSION,
        name: request.recipe.clone(),
        architecture: inputs.architecture.clone(),
        boot: inputs.boot,
        cmdline,
        // The guest program is of this installation, and the boot test asks it.
        contract: dayfly_guest_config::CONTRACT,
        executor: inputs.executor,
        // As `info`, the boot test learns it.
        networks: Vec::new(),
        abilities: Vec::new(),
        info: None,
        runner,
        disk,
        kernel,
        initrd,
        docker,
        build: BuildInputs {
            suite: format!("debian {}", inputs.suite),
            kernel: packages.kernel_version,
            packages: packages
                .list
                .lines()
                .filter_map(|line| line.split_once(' '))
                .map(|(name, version)| (name.into(), version.into()))
                .collect(),
        },
    })
}

/// Kernel and initial RAM disk of an image that the hypervisor loads them for.
async fn beside(
    request: &BuildRequest,
    inputs: &Inputs,
    staging: &Staging,
    kernel: &Path,
    modules: &Path,
) -> Result<(ImageFile, ImageFile), BuildError> {
    let kernel = staging.copy(KERNEL_FILE, kernel).await?;
    let found = initrd::find_modules(modules, &inputs.modules).map_err(file_error("read", modules))?;
    let modules = found.map_err(BuildError::Module)?;
    let initrd = initrd::make(&request.init, &modules).and_then(|bytes| staging.write(INITRD_FILE, bytes.as_slice()));
    Ok((kernel, initrd.map_err(file_error("write", &staging.path().join(INITRD_FILE)))?))
}

/// Puts what the image gets from us below `files`, as it will lie below its root.
fn lay_out(request: &BuildRequest, recipe: &Recipe, files: &Path) -> Result<(), BuildError> {
    let place = |path: &str| -> Result<PathBuf, BuildError> {
        let path = files.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(file_error("make", parent))?;
        }
        Ok(path)
    };
    for (source, path) in
        [(&request.guest_program, "usr/lib/dayfly/dayfly-guest"), (&request.runner.path, "usr/bin/gitlab-runner")]
    {
        let path = place(path)?;
        fs::copy(source, &path).map_err(file_error("copy", source))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(file_error("open up", &path))?;
    }
    recipe.files.iter().try_for_each(|(path, text)| recipe::write_text(&files.join(path), text))?;
    recipe.overlays.iter().try_for_each(|overlay| overlay.copy_to(files))
}

#[cfg(test)]
mod tests;
