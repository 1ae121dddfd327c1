//! The root file system: packages by mmdebstrap, then ext4, then qcow2, all without root.
//!
//! An unprivileged user's steps run in user namespaces with the user's sub-ids, root's own steps run
//! plainly (root seldom has sub-ids). Files of sub-ids cannot be removed by the user, so the work
//! directory is emptied in such a namespace, too. Kernel, modules and boot loader come out of downloaded
//! packages, never from the host's `/boot`.

use super::recipe::Recipe;
use super::{BuildError, Progress, file_error};
use crate::files::plain;
use crate::image::gpt;
use crate::image::manifest::BootKind;
use crate::process::Program;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Two minutes measured on two busy CPUs; the rest is for slow mirrors.
const PACKAGES_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// Unpacking, mke2fs and qemu-img take 2 to 8 s each.
const STEP_DEADLINE: Duration = Duration::from_secs(3 * 60);

/// Bytes of a block of the root file system.
const FS_BLOCK: u64 = 4096;

/// Reading apt's configuration.
const CONFIG_DEADLINE: Duration = Duration::from_secs(10);

/// Beginning of the names of our work directories.
const WORK_PREFIX: &str = "dayfly-image-";

/// Variables that tell apt about proxies.
pub(super) const PROXY_VARIABLES: [&str; 6] =
    ["http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"];

/// Which steps need a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Privilege {
    Root,
    User,
}

impl Privilege {
    pub(super) fn of_us() -> Self {
        if rustix::process::geteuid().is_root() { Self::Root } else { Self::User }
    }

    /// A program as the (namespace's) root.
    fn as_root(self, program: impl AsRef<OsStr>, deadline: Duration) -> Program {
        match self {
            Self::Root => Program::new(program, deadline),
            Self::User => Program::new("unshare", deadline).args(["--map-root-user", "--map-auto", "--"]).arg(program),
        }
    }
}

/// A directory for what the build needs on the way. In `/var/tmp`, not in the image directory:
/// sub-ids must be able to walk to it, and may not through a home directory.
pub(super) struct Work {
    path: PathBuf,
    privilege: Privilege,
    /// Held as long as the directory is in use, so that no other build takes it for a leftover.
    _lock: File,
}

impl Work {
    /// Makes one, and removes those that builds which were killed have left behind.
    pub(super) async fn new(privilege: Privilege) -> Result<Self, BuildError> {
        let parent =
            ["/var/tmp", "/tmp"].map(Path::new).into_iter().find(|path| path.is_dir()).unwrap_or(Path::new("."));
        Self::sweep(parent, privilege).await;
        let prefix = format!("{WORK_PREFIX}{}-", rustix::process::geteuid().as_raw());
        let directory = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(parent)
            .map_err(file_error("make a work directory in", parent))?;
        let path = directory.keep();
        let lock = File::create(path.join("lock"))
            .and_then(|lock| lock.lock().map(|()| lock))
            .map_err(file_error("lock", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(file_error("open up", &path))?;
        let work = Self { path, privilege, _lock: lock };
        for directory in ["tmp", "files"] {
            let path = work.path(directory);
            fs::create_dir(&path).map_err(file_error("make", &path))?;
        }
        // mmdebstrap's root has another uid than we.
        let tmp = work.path("tmp");
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).map_err(file_error("open up", &tmp))?;
        Ok(work)
    }

    pub(super) async fn sweep(parent: &Path, privilege: Privilege) {
        let ours = format!("{WORK_PREFIX}{}-", rustix::process::geteuid().as_raw());
        let Ok(entries) = fs::read_dir(parent) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_ours = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&ours));
            // Anybody may make such a name here: a link could be their trap, and a directory of theirs is theirs.
            let user = rustix::process::geteuid().as_raw();
            if is_ours && path.symlink_metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == user) {
                // Without a lock file it is just being made, or removed: not ours to judge.
                let left_over = plain::open(&path.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok());
                if left_over {
                    // What cannot be removed costs disk, not this build.
                    let _ = remove(&path, privilege).await;
                }
            }
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes it. Called on every path; Drop is the net.
    pub(super) async fn release(self) {
        if remove(&self.path, self.privilege).await.is_err() {
            tracing::warn!(path = %self.path.display(), "work directory of an image build was left behind");
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What belongs to sub-ids stays, for the next build's sweep.
        let _ = fs::remove_dir_all(&self.path);
    }
}

async fn remove(path: &Path, privilege: Privilege) -> Result<(), BuildError> {
    privilege.as_root("rm", STEP_DEADLINE).args(["-rf", "--one-file-system", "--"]).arg(path).run().await?;
    Ok(())
}

/// What came out of the package archive.
pub(super) struct Packages {
    /// The root file system.
    pub(super) tar: PathBuf,
    /// `Package version` lines.
    pub(super) list: String,
    /// Package and version of the kernel.
    pub(super) kernel_version: String,
    /// Who loads the kernel.
    pub(super) start: Start,
}

/// What a machine of the image starts by.
pub(super) enum Start {
    /// The hypervisor loads them.
    Direct {
        /// The kernel's image.
        kernel: PathBuf,
        /// Its modules.
        modules: PathBuf,
    },
    /// The disk's own boot loader.
    Loader(Loader),
}

/// GRUB for a PC's BIOS, as the recipe's steps have made it.
pub(super) struct Loader {
    /// The first sector's program.
    pub(super) boot: PathBuf,
    /// What that one loads.
    pub(super) core: PathBuf,
}

/// Runs mmdebstrap with all that is in `work`'s `files`.
pub(super) async fn packages(
    work: &Work,
    recipe: &Recipe,
    progress: &mut Progress<'_>,
) -> Result<Packages, BuildError> {
    let write = |name: &str, text: &str, mode: u32| {
        let path = work.path(name);
        let written =
            fs::write(&path, text).and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)));
        written.map(|()| path.clone()).map_err(file_error("write", &path))
    };
    let mut hooks = Vec::new();
    for (number, script) in recipe.scripts.iter().enumerate() {
        let path = write(&format!("customize-{number}.sh"), script, 0o755)?;
        hooks.push(format!("--customize-hook={}", path.display()));
    }
    match recipe.inputs.boot {
        BootKind::Direct => write("kernel-package", &recipe.inputs.kernel_package, 0o644)?,
        BootKind::Disk => write("cmdline", &recipe.inputs.cmdline, 0o644)?,
    };
    let modules: String = recipe.inputs.guest_modules.iter().map(|module| format!("{module}\n")).collect();
    write("guest-modules", &modules, 0o644)?;
    write("executor", &recipe.inputs.executor.to_string(), 0o644)?;
    if recipe.inputs.all_modules {
        write("all-modules", "", 0o644)?;
    }
    let tar = work.path("root.tar");

    let mode = if work.privilege == Privilege::Root { "--mode=root" } else { "--mode=unshare" };
    let mut mmdebstrap = Program::new("mmdebstrap", PACKAGES_DEADLINE)
        .args(["--variant=minbase", mode, "--format=tar"])
        .args(["--aptopt=Apt::Install-Recommends \"false\""])
        .args(["doc", "man", "locale"].map(|directory| format!("--dpkgopt=path-exclude=/usr/share/{directory}/*")))
        .arg(format!("--include={}", recipe.inputs.all_packages().collect::<Vec<_>>().join(",")))
        .args(hooks)
        .env("TMPDIR", work.path("tmp"))
        .directory(&work.path);
    for variable in PROXY_VARIABLES {
        if let Some(value) = std::env::var_os(variable) {
            mmdebstrap = mmdebstrap.env(variable, value);
        }
    }
    for option in host_apt_options().await {
        mmdebstrap = mmdebstrap.arg(format!("--aptopt={option}"));
    }
    mmdebstrap = mmdebstrap.arg(&recipe.inputs.suite).arg(&tar);
    let sources = super::sources::of_host(Path::new("/etc/apt"), &recipe.inputs.suite);
    if !sources.is_empty() {
        mmdebstrap = mmdebstrap.arg(write("host.sources", &sources, 0o644)?);
    }
    mmdebstrap.run_lines(progress).await?;
    take_kernel(work, recipe, tar).await
}

/// The host's proxies and date checks, as apt.conf lines: mmdebstrap does not read the host's.
async fn host_apt_options() -> Vec<String> {
    let names = ["Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until", "Acquire::Check-Date"];
    let dump = Program::new("apt-config", CONFIG_DEADLINE)
        .args(["dump", "--no-empty", "--format", "%f \"%v\";%n"])
        .args(names)
        .run()
        .await;
    // Without apt on the host there is nothing to take over.
    let text = dump.map(|output| output.text()).unwrap_or_default();
    text.lines()
        .filter(|line| names.iter().any(|name| line.starts_with(&format!("{name} "))))
        .map(str::to_owned)
        .collect()
}

async fn take_kernel(work: &Work, recipe: &Recipe, tar: PathBuf) -> Result<Packages, BuildError> {
    Program::new("tar", STEP_DEADLINE)
        .arg("-C")
        .arg(&work.path)
        .arg("--no-same-owner")
        .arg("-xf")
        .arg(&tar)
        .arg("./.dayfly")
        .run()
        .await?;
    let record = work.path(".dayfly");
    let list = fs::read_to_string(record.join("packages")).map_err(file_error("read", &record.join("packages")))?;
    if recipe.inputs.boot == BootKind::Disk {
        let (boot, core) = (record.join("boot.img"), record.join("core.img"));
        if !boot.is_file() || !core.is_file() {
            return Err(BuildError::Loader("no step of the recipe has left .dayfly/boot.img and .dayfly/core.img"));
        }
        // `linux-image-cloud-amd64` depends on the one that it is.
        let is_kernel = |line: &&str| line.starts_with("linux-image-") && line.contains(|c: char| c.is_ascii_digit());
        let kernel = list.lines().filter(is_kernel).find(|line| !line.starts_with(&recipe.inputs.kernel_package));
        let kernel_version = kernel.ok_or(BuildError::Kernel("no package of the image is a kernel"))?.to_owned();
        return Ok(Packages { tar, list, kernel_version, start: Start::Loader(Loader { boot, core }) });
    }
    let package =
        find(&record, |name| name.ends_with(".deb"))?.ok_or(BuildError::Kernel("no kernel package was downloaded"))?;
    let kernel_version = Program::new("dpkg-deb", STEP_DEADLINE)
        .args(["--showformat=${Package} ${Version}", "--show"])
        .arg(&package)
        .run()
        .await?
        .text();
    let kernel_dir = work.path("kernel");
    Program::new("dpkg-deb", STEP_DEADLINE).arg("--extract").arg(&package).arg(&kernel_dir).run().await?;
    let kernel = find(&kernel_dir.join("boot"), |name| name.starts_with("vmlinuz-"))?
        .ok_or(BuildError::Kernel("it holds no kernel"))?;
    let modules =
        ["usr/lib/modules", "lib/modules"].map(|path| kernel_dir.join(path)).into_iter().find(|path| path.is_dir());
    let modules = modules.ok_or(BuildError::Kernel("it holds no modules"))?;
    Ok(Packages { tar, list, kernel_version, start: Start::Direct { kernel, modules } })
}

fn find(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, BuildError> {
    let entries = fs::read_dir(directory).map_err(file_error("read", directory))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths.into_iter().find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted)))
}

/// tar to ext4: the root file system, as a plain disk of the user's, or as what will be a partition of it.
pub(super) async fn file_system(work: &Work, packages: &Packages, disk_gib: u64) -> Result<PathBuf, BuildError> {
    let disk_bytes = disk_gib << 30;
    let (offset, blocks) = match packages.start {
        Start::Direct { .. } => (0, disk_bytes / FS_BLOCK),
        Start::Loader(_) => {
            let sectors = gpt::root_sectors(disk_bytes).ok_or(BuildError::Loader("the disk is too small"))?;
            (gpt::ROOT_START * gpt::SECTOR, sectors * gpt::SECTOR / FS_BLOCK)
        }
    };
    // Names of files go in as arguments, never into the text of a script. The label and the missing
    // journal: the guest's disk is thrown away, a journal would only be written twice.
    const SCRIPT: &str = r#"
        mkdir "$1"
        tar -C "$1" --numeric-owner --xattrs --exclude='./dev/*' --exclude=./.dayfly -xf "$2"
        truncate -s "$4" "$3"
        mke2fs -q -t ext4 -b 4096 -L root -m 0 -O ^has_journal -E offset="$5" -d "$1" "$3" "$6"
        rm -rf "$1"
    "#;
    let raw = work.path("root.raw");
    work.privilege
        .as_root("sh", STEP_DEADLINE)
        .args(["-euc", SCRIPT, "sh"])
        .arg(work.path("tree"))
        .arg(&packages.tar)
        .arg(&raw)
        .args([format!("{disk_gib}G"), offset.to_string(), blocks.to_string()])
        .run()
        .await?;
    Ok(raw)
}

/// That disk to qcow2.
pub(super) async fn compress(raw: &Path, disk: &Path) -> Result<(), BuildError> {
    // Compressed, a disk with all the tools is less than half its size. By small clusters, for a boot reads a thousand
    // small pieces and unpacks a cluster for each: with 16 KiB of Zstandard that takes hardly longer than a plain disk.
    Program::new("qemu-img", STEP_DEADLINE)
        .args(["convert", "-c", "-o", "compression_type=zstd,cluster_size=16k", "-f", "raw", "-O", "qcow2"])
        .arg(raw)
        .arg(disk)
        .run()
        .await?;
    Ok(())
}
