//! How does somebody else's cloud image become one of ours? It is booted once, and makes itself ready.
//!
//! ```text
//! URL or file ─► look: format, size, no other file, a boot loader of a PC
//!                  └─► overlay + seed (a FAT disk `CIDATA`: guest program, runner, units, take-in.sh)
//!                        └─► one boot: its cloud-init runs take-in.sh, which powers off
//!                              └─► flattened ─► looked through for secrets ─► Staged, as a build's
//! ```
//!
//! Nothing of it is opened by the host but by qemu-img, and by debugfs where its root file system is an ext4; nothing is
//! mounted. The image is the operator's choice, and so is believed what its take-in.sh says of what is in it; that it boots,
//! what its runner says and what its kernel can, the boot test learns. `vm-images/cloud/README.md` says what it must have.

mod look;
mod machine;
mod said;
mod seed;

pub use look::DiskFormat;

use super::rootfs::{Privilege, Work, compress};
use super::staging::Staging;
use super::{BuildError, DISK_FILE, Progress, RunnerSource, Staged, file_error, programs, sealed};
use crate::image::gpt;
use crate::image::manifest::{BootKind, BuildInputs, ExecutorKind, FORMAT_VERSION, Manifest};
use crate::image::store::{ImageStore, valid};
use crate::process::Program;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A cloud image's first boot takes a quarter of a minute, five under QEMU's translator on a busy host.
pub const DEADLINE: Duration = Duration::from_secs(15 * 60);

/// Copying a disk of some GiB.
const STEP_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// What the disk gets on top of its own size, for what is put in: base images of clouds are full.
const ROOM_BYTES: u64 = 2 << 30;

/// What to take in, and with what.
#[derive(Clone, Debug)]
pub struct CloudRequest {
    /// The disk.
    pub disk: PathBuf,
    /// Its format, as the operator says it: none is guessed.
    pub format: DiskFormat,
    /// What the image will be called.
    pub name: String,
    /// Where images are.
    pub store: ImageStore,
    /// The runner to put in.
    pub runner: RunnerSource,
    /// `dayfly-guest`, linked statically.
    pub guest_program: PathBuf,
    /// Certificates that its machines shall trust, PEM.
    pub ca: Option<PathBuf>,
    /// Packages to install, from its own sources.
    pub packages: Vec<String>,
    /// Whether KVM runs its machine.
    pub is_kvm: bool,
    /// How long it may take to power off.
    pub within: Duration,
}

/// Why a cloud image cannot be taken in. What is wrong stands with what to do.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// The file.
    #[error("take in {}: {why}", .path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// No name of a package.
    #[error("install `{0}` in it: that is no name of a package")]
    Package(String),
    /// Its machine has said what is wrong.
    #[error("take it in: {0}")]
    Machine(String),
    /// Its machine did not end.
    #[error("take it in: within {} s {why}", .within.as_secs())]
    Deadline {
        /// How long it was waited for.
        within: Duration,
        /// How far it came, and what to do.
        why: String,
    },
}

/// The name of an image by the name of its file; `None`: it can be none.
#[must_use]
pub fn name_of(file: &Path) -> Option<String> {
    let stem = file.file_stem()?.to_str()?.to_ascii_lowercase();
    valid(&stem).ok().map(str::to_owned)
}

/// Takes a cloud image in as far as it can be without a boot test.
///
/// # Errors
/// [`BuildError`]: nothing is left of it.
///
/// # Cancel safety
/// Dropping the future ends its machine, and removes its files.
pub async fn take_in(request: &CloudRequest, progress: &mut Progress<'_>) -> Result<Staged, BuildError> {
    valid(&request.name)?;
    if let Some(bad) = request.packages.iter().find(|name| !is_package_name(name)) {
        return Err(CloudError::Package(bad.escape_debug().to_string()).into());
    }
    if !programs::is_static(&request.guest_program).map_err(file_error("read", &request.guest_program))? {
        return Err(BuildError::GuestProgram { name: "dayfly-guest", places: vec![request.guest_program.clone()] });
    }
    let runner = request.runner.inspect().await?;
    progress(&format!(
        "runner: gitlab-runner {} (origin: {}, {})",
        runner.version,
        runner.origin,
        request.runner.path.display()
    ));
    let disk = std::path::absolute(&request.disk).map_err(file_error("find", &request.disk))?;
    let staging = Staging::new(request.store.directory())?;
    let work = Work::new(Privilege::of_us()).await?;
    let filled = fill(request, &disk, &work, &staging, progress).await;
    work.release().await;
    let (disk, said) = filled?;
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        name: request.name.clone(),
        architecture: std::env::consts::ARCH.to_owned(),
        boot: BootKind::Disk,
        cmdline: None,
        contract: dayfly_guest_config::CONTRACT,
        executor: ExecutorKind::Shell,
        networks: Vec::new(),
        info: None,
        runner,
        disk,
        kernel: None,
        initrd: None,
        docker: None,
        build: BuildInputs { suite: said.suite, kernel: said.kernel, packages: said.packages },
    };
    let staged = Staged { store: request.store.clone(), directory: staging, manifest };
    staged.write()?;
    let image = staged.image()?;
    progress(&format!(
        "taken in: {}, disk {} MiB, kernel {}, {} packages",
        image.manifest.build.suite,
        image.manifest.disk.bytes >> 20,
        image.manifest.build.kernel,
        image.manifest.build.packages.len()
    ));
    Ok(staged)
}

async fn fill(
    request: &CloudRequest,
    disk: &Path,
    work: &Work,
    staging: &Staging,
    progress: &mut Progress<'_>,
) -> Result<(crate::image::manifest::ImageFile, said::Facts), BuildError> {
    let found = look::look(disk, request.format, work).await?;
    progress(&format!("disk: {} GiB, {} MiB of it in use", found.bytes.div_ceil(1 << 30), found.needed >> 20));
    look::has_room(disk, found.needed, staging.path())?;
    let seed = seed::make(request, work).await?;
    let overlay = work.path("overlay.qcow2");
    let size = (found.bytes + ROOM_BYTES).to_string();
    Program::new("qemu-img", STEP_DEADLINE)
        .args(["create", "-q", "-f", "qcow2", "-F", request.format.word(), "-b"])
        .arg(disk)
        .arg(&overlay)
        .arg(&size)
        .run()
        .await?;
    let said = machine::run(request, disk, &overlay, &seed, progress).await?;
    progress("disk: flattened");
    let raw = work.path("flat.raw");
    Program::new("qemu-img", STEP_DEADLINE)
        .args(["convert", "-O", "raw"])
        .arg(format!("json:{}", chain(disk, request.format, &overlay)))
        .arg(&raw)
        .run()
        .await?;
    match root_of(&raw)? {
        Some(offset) => sealed::check(&raw, offset).await?,
        None => progress("its root file system is no ext4 in a GPT: its own steps alone have looked through it"),
    }
    let made = work.path(DISK_FILE);
    compress(&raw, &made).await?;
    Ok((staging.copy(DISK_FILE, &made).await?, said))
}

/// Overlay and base with their formats, so that no header decides what the host opens.
fn chain(disk: &Path, format: DiskFormat, overlay: &Path) -> Value {
    json!({ "driver": "qcow2", "file": { "driver": "file", "filename": overlay },
        "backing": { "driver": format.word(), "read-only": true, "file": { "driver": "file", "filename": disk } } })
}

/// Where the largest ext4 of a disk's table begins.
fn root_of(raw: &Path) -> Result<Option<u64>, BuildError> {
    let head = look::read_at(raw, 0, gpt::HEAD_BYTES).map_err(file_error("read", raw))?;
    let mut partitions = gpt::read(&head).unwrap_or_default();
    partitions.sort_by_key(|partition| std::cmp::Reverse(partition.bytes()));
    for partition in partitions {
        // The superblock begins at 1024, and its magic at 56 of that.
        let Some(at) = partition.offset().checked_add(1024 + 56) else { continue };
        if look::read_at(raw, at, 2).is_ok_and(|magic| magic == [0x53, 0xef]) {
            return Ok(Some(partition.offset()));
        }
    }
    Ok(None)
}

/// A word of any package manager, and never an option.
fn is_package_name(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-._:".contains(c))
}

#[cfg(test)]
mod tests;
