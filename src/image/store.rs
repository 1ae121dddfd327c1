//! The image directory: finds images, checks them, replaces them while VMs run on them.
//!
//! ```text
//! debian-12-shell -> debian-12-shell@3f9a0c12     what `get` follows
//! debian-12-shell@3f9a0c12/                       image.toml, disk.qcow2, vmlinuz, initrd
//! debian-12-shell@77e1b0aa/                       the one before: overlays may still name it
//! .staging-x7Qk2a/                                being built
//! ```
//!
//! A plain directory with an `image.toml` is an image too, for those who bring their own. All calls
//! read little and block; none of them runs a program. Nothing here trusts a file because of its
//! name: each `get` checks the manifest, each file's length and the disk's header again, so that a
//! broken image is one clear sentence and not a VM that never says a word.

use super::manifest::{BootKind, ImageFile, Learnt, MANIFEST_FILE, Manifest, ManifestError};
use super::qcow2::{self, Qcow2Error};
use super::stamp::{Known, Stamp, Stamps};
use crate::BoxFuture;
use crate::files::plain;
use crate::hex::hex;
use crate::machine_spec::ImageRef;
use crate::vm::Boot;
use crate::vm::proof::Subject;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Bytes of a manifest at most; a real one has 10 KiB, nearly all of it packages.
pub(super) const MANIFEST_BYTES_MAX: u64 = 1024 * 1024;

/// Why an image cannot be used. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No name for an image.
    #[error("`{0}` is no image name (lower-case letters, digits, `-`, `_`, `.`; at most 64)")]
    Name(String),
    /// There is none of this name.
    #[error("no image `{name}` in {}; build it with `dayfly image build {name}`", .directory.display())]
    Missing {
        /// The name.
        name: String,
        /// The image directory.
        directory: PathBuf,
    },
    /// Its manifest is of no use.
    #[error("use image `{name}` at {}; build it again", .path.display())]
    Manifest {
        /// The image.
        name: String,
        /// The manifest.
        path: PathBuf,
        /// Cause.
        #[source]
        source: ManifestError,
    },
    /// It was made for another kind of machine.
    #[error("image `{name}` is for {architecture}, this host is {}", std::env::consts::ARCH)]
    Architecture {
        /// The image.
        name: String,
        /// What its manifest says.
        architecture: String,
    },
    /// A file of it is missing or unreadable.
    #[error("read {} of image `{name}`; build it again", .path.display())]
    File {
        /// The image.
        name: String,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A file of it is not the one that was built.
    #[error("{} of image `{name}` {problem}; build it again", .path.display())]
    Broken {
        /// The image.
        name: String,
        /// The file.
        path: PathBuf,
        /// What is wrong: `has 5 bytes instead of 327155712`.
        problem: String,
    },
    /// It knows no machine without a network card, and its class wants nothing else.
    #[error(
        "image `{name}` was built before jobs could do without a network card, which `network = \"relay\"` of class `{class}` means; rebuild it with `dayfly image build {name}`"
    )]
    NoRelay {
        /// The image.
        name: String,
        /// The class.
        class: String,
    },
    /// The version that is asked for has been replaced, and removed since.
    #[error("the version {} of image `{name}` that this job was accepted for was replaced and is not here any more", .digest.get(..12).unwrap_or_default())]
    Replaced {
        /// The image.
        name: String,
        /// The version's digest.
        digest: String,
    },
    /// There is no such version.
    #[error("no version `{wanted}` of image `{name}`; `dayfly image inspect {name}` shows those that there are")]
    NoVersion {
        /// The image.
        name: String,
        /// What was asked for.
        wanted: String,
    },
    /// A version that nobody has seen boot.
    #[error("put `{0}` into use: it was never boot-tested; run `dayfly image test {0}`")]
    Untested(String),
    /// A version cannot go.
    #[error("remove `{version}`: {why}")]
    InUse {
        /// The version.
        version: String,
        /// By whom, and what to do.
        why: &'static str,
    },
    /// Another command is changing the images.
    #[error("change the images in {}: another command is at it; try again when that is done", .0.display())]
    Busy(PathBuf),
    /// There is one version alone, or none.
    #[error("image `{0}` has no version before the one in use")]
    NothingBefore(String),
    /// The image directory itself cannot be read or changed.
    #[error("{what} {}", .path.display())]
    Directory {
        /// The attempt, in words.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// An image that has been checked and may be started from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its directory, links resolved: the version that stays while VMs use it.
    pub dir: PathBuf,
    /// Its disk, the backing file of overlays.
    pub disk: PathBuf,
    /// Virtual size of the disk in bytes: no overlay is smaller.
    pub disk_bytes: u64,
    /// How a VM boots from it.
    pub boot: Boot,
    /// What is in it.
    pub manifest: Manifest,
    /// By what its files were known when they were checked.
    pub stamp: Stamp,
}

impl Image {
    /// Tells this version of the image apart from all others: the digest of its manifest, which names those of its
    /// files, but for what a boot test has learnt. SHA-256, hex.
    #[must_use]
    pub fn digest(&self) -> String {
        hex(&Sha256::digest(
            Manifest { info: None, contract: 0, networks: Vec::new(), abilities: Vec::new(), ..self.manifest.clone() }
                .to_text(),
        ))
    }

    #[cfg(test)]
    pub(crate) fn example(manifest: Manifest) -> Self {
        Self {
            name: manifest.name.clone(),
            dir: "/images/i".into(),
            disk: "/images/i/disk.qcow2".into(),
            disk_bytes: 1 << 30,
            boot: Boot::Disk,
            manifest,
            stamp: Stamp::default(),
        }
    }

    /// What proves that guests run: its own kernel, where that can.
    #[must_use]
    pub fn proof(&self) -> Subject {
        Subject::of(&self.boot, self.manifest.contract, self.digest())
    }
}

/// An image's name, and the image or what is wrong with it.
pub type Listed = (String, Result<Image, ImageError>);

/// Where a job's image comes from: [`ImageStore`], or one image on no disk.
pub trait Images: Send + Sync {
    /// The image of this name, checked. [`ImageStore::get`] on a blocking thread; dropping the future is safe.
    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Image, ImageError>>;

    /// This very version of an image: the one in use, or the one before; [`ImageError::Replaced`] if it is not here any
    /// more. [`ImageStore::get_version`] on a blocking thread; dropping the future is safe.
    fn load_version<'a>(&'a self, wanted: &'a ImageRef) -> BoxFuture<'a, Result<Image, ImageError>>;
}

impl Images for ImageStore {
    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Image, ImageError>> {
        let name = name.to_owned();
        Box::pin(self.on_a_thread(move |store| store.get(&name)))
    }

    fn load_version<'a>(&'a self, wanted: &'a ImageRef) -> BoxFuture<'a, Result<Image, ImageError>> {
        let wanted = wanted.clone();
        Box::pin(self.on_a_thread(move |store| store.get_version(&wanted)))
    }
}

/// An image directory.
#[derive(Clone, Debug)]
pub struct ImageStore {
    directory: PathBuf,
    stamps: Stamps,
    /// Versions of an image that are kept, the one in use among them.
    keep: usize,
    /// Where machines' disks are.
    overlays: Option<PathBuf>,
}

/// So many versions of an image are kept: the one in use, and the one before, to go back to.
pub const VERSIONS_KEPT: usize = 2;

impl ImageStore {
    /// Images below `directory`, which need not exist yet.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into(), stamps: Stamps::default(), keep: VERSIONS_KEPT, overlays: None }
    }

    /// Keeps so many versions of an image, and those on which a disk in `overlays` lies. Less than two are no way back.
    #[must_use]
    pub fn keeping(self, versions: usize, overlays: impl Into<PathBuf>) -> Self {
        Self { keep: versions.max(1), overlays: Some(overlays.into()), ..self }
    }

    /// Looks on a blocking thread, and passes a panic of it on.
    async fn on_a_thread(
        &self,
        look: impl FnOnce(&Self) -> Result<Image, ImageError> + Send + 'static,
    ) -> Result<Image, ImageError> {
        let store = self.clone();
        match tokio::task::spawn_blocking(move || look(&store)).await {
            Ok(image) => image,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The image of this name, checked: format, architecture, each file's length, the disk's header.
    ///
    /// # Errors
    /// [`ImageError`]; none is transient.
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        let link = self.directory.join(valid(name)?);
        let dir = match fs::canonicalize(&link) {
            Ok(dir) => dir,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Missing { name: name.to_owned(), directory: self.directory.clone() });
            }
            Err(source) => return Err(ImageError::Directory { what: "read image directory", path: link, source }),
        };
        let image = open(name, dir)?;
        self.is_as_before(&image)?;
        Ok(image)
    }

    /// Files that were exchanged or written over since they were first seen are compared with their digests: seconds,
    /// once, and only then.
    fn is_as_before(&self, image: &Image) -> Result<(), ImageError> {
        let refused = || ImageError::Broken {
            name: image.name.clone(),
            path: image.dir.clone(),
            problem: "was changed in place, under the machines that run from it; build it again, or put its files back"
                .to_owned(),
        };
        match self.stamps.known(&image.dir, &image.stamp) {
            Known::Good => return Ok(()),
            Known::Refused => return Err(refused()),
            Known::New => {}
            Known::Changed => {
                if self.verify(image).is_err() {
                    self.stamps.note(&image.dir, &image.stamp, false);
                    return Err(refused());
                }
            }
        }
        self.stamps.note(&image.dir, &image.stamp, true);
        Ok(())
    }

    /// Records what a boot test has learnt of an image in use.
    ///
    /// # Errors
    /// [`ImageError::Directory`]; the manifest is then as it was.
    pub fn learn(&self, image: &Image, learnt: Learnt) -> Result<(), ImageError> {
        let path = image.dir.join(super::manifest::MANIFEST_FILE);
        let failed = |source| ImageError::Directory { what: "write", path: path.clone(), source };
        let mut manifest = image.manifest.clone();
        manifest.learn(learnt);
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(&image.dir).map_err(failed)?;
        io::Write::write_all(&mut file, manifest.to_text().as_bytes()).map_err(failed)?;
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644)).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// All images, by name, each with what is wrong with it.
    ///
    /// # Errors
    /// [`ImageError::Directory`]. A directory that does not exist has no images.
    pub fn list(&self) -> Result<Vec<Listed>, ImageError> {
        let names = self.entries()?.into_iter().filter(|name| valid(name).is_ok());
        Ok(names
            .map(|name| {
                let image = self.get(&name);
                (name, image)
            })
            .collect())
    }

    /// An image that has no name here yet, checked like others.
    pub(super) fn open_staged(&self, staged: &Path, name: &str) -> Result<Image, ImageError> {
        let dir = fs::canonicalize(staged);
        let dir =
            dir.map_err(|source| ImageError::Directory { what: "read staged image", path: staged.to_owned(), source })?;
        open(valid(name)?, dir)
    }

    /// Reads all files of an image and compares their digests: seconds, not for the way of a job.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn verify(&self, image: &Image) -> Result<(), ImageError> {
        for file in image.manifest.files() {
            let path = image.dir.join(&file.file);
            let found = digest(&path).map_err(|source| ImageError::File {
                name: image.name.clone(),
                path: path.clone(),
                source,
            })?;
            if found != file.sha256 {
                let problem = "is not the file that was built (its SHA-256 differs)".to_owned();
                return Err(ImageError::Broken { name: image.name.clone(), path, problem });
            }
        }
        Ok(())
    }

    /// Names in the directory, sorted.
    fn entries(&self) -> Result<Vec<String>, ImageError> {
        let failed =
            |source| ImageError::Directory { what: "read image directory", path: self.directory.clone(), source };
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed(source)),
        };
        let mut names = Vec::new();
        for entry in entries {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// The name of an image, and of a recipe: nothing that leads elsewhere.
pub(super) fn valid(name: &str) -> Result<&str, ImageError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest = name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.'));
    if first && rest && name.len() <= 64 { Ok(name) } else { Err(ImageError::Name(name.to_owned())) }
}

fn open(name: &str, dir: PathBuf) -> Result<Image, ImageError> {
    let path = dir.join(MANIFEST_FILE);
    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::File { name: name.to_owned(), path, source }
    };
    let mut text = String::new();
    plain::open(&path)
        .and_then(|file| file.take(MANIFEST_BYTES_MAX).read_to_string(&mut text))
        .map_err(file_error(&path))?;
    let manifest =
        Manifest::parse(&text).map_err(|source| ImageError::Manifest { name: name.to_owned(), path, source })?;
    if manifest.architecture != std::env::consts::ARCH {
        return Err(ImageError::Architecture { name: name.to_owned(), architecture: manifest.architecture });
    }
    let broken =
        |path: &Path, problem: String| ImageError::Broken { name: name.to_owned(), path: path.to_owned(), problem };
    for file in manifest.files() {
        let path = dir.join(&file.file);
        let found = fs::metadata(&path).map_err(file_error(&path))?;
        if !found.is_file() {
            return Err(broken(&path, "is no plain file".into()));
        }
        if found.len() != file.bytes {
            return Err(broken(&path, format!("has {} bytes instead of {}", found.len(), file.bytes)));
        }
    }
    let disk = dir.join(&manifest.disk.file);
    let disk_bytes = match qcow2::check(&disk) {
        Ok(bytes) => bytes,
        Err(Qcow2Error::Read(source)) => return Err(file_error(&disk)(source)),
        Err(Qcow2Error::Unfit(why)) => return Err(broken(&disk, format!("cannot be used: {why}"))),
    };
    let beside = |file: &Option<ImageFile>| file.as_ref().map(|file| dir.join(&file.file)).unwrap_or_default();
    let boot = match manifest.boot {
        // `Manifest::parse` has checked that all three are there.
        BootKind::Direct => Boot::Direct {
            kernel: beside(&manifest.kernel),
            initrd: beside(&manifest.initrd),
            cmdline: manifest.cmdline.clone().unwrap_or_default(),
        },
        BootKind::Disk => Boot::Disk,
    };
    let paths: Vec<PathBuf> = manifest.files().map(|file| dir.join(&file.file)).collect();
    let stamp = Stamp::of(paths).map_err(file_error(&disk))?;
    Ok(Image { name: name.to_owned(), dir, disk, disk_bytes, boot, manifest, stamp })
}

/// SHA-256 of a file, hex.
pub(super) fn digest(path: &Path) -> io::Result<String> {
    digest_of(&mut plain::open_chosen(path)?)
}

/// The same of what is left to read of an open file.
pub(super) fn digest_of(file: &mut File) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(file, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
pub(super) mod tests;
mod versions;
