//! Versions of an image: which one a job was accepted for, how a new one takes the place of the one before, which go.
//!
//! Each change is one rename, so that a kill at any point leaves the name leading to a whole version: a version comes by
//! the rename of its staged directory, is put into use by that of a link, and goes by that to a name that no version has.
//! What lies there half removed, or staged, the next change removes. One change at a time in an image directory.

use super::{Image, ImageError, ImageStore, MANIFEST_FILE, Manifest, open, valid};
use crate::files::plain;
use crate::hex::hex;
use crate::image::qcow2;
use crate::machine_spec::ImageRef;
use sha2::{Digest as _, Sha256};
use std::cmp::Reverse;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Hex digits of the manifest's digest in the name of a version.
const VERSION_DIGITS: usize = 8;

/// Held while a directory of images is changed: for as long as a rename takes, or the removal of a disk.
const LOCK_FILE: &str = ".store.lock";

/// How often it is tried: another change is waited for some 30 s.
const LOCK_TRIES: u32 = 1500;

/// Pause between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Beginning of the names of what is on its way in or out: no version's, no image's.
const GOING: &str = ".going-";

impl ImageStore {
    /// This very version of an image: the one in use, or the one before.
    ///
    /// # Errors
    /// [`ImageError`]; [`ImageError::Replaced`] if it is not here any more.
    pub fn get_version(&self, wanted: &ImageRef) -> Result<Image, ImageError> {
        let name = valid(&wanted.name)?;
        let in_use = self.get(name);
        if let Ok(image) = &in_use
            && image.digest() == wanted.digest
        {
            return in_use;
        }
        let prefix = format!("{name}@");
        for entry in self.entries()?.iter().filter(|entry| entry.starts_with(&prefix)) {
            // One that is broken is not the one that is looked for.
            let Some(image) = fs::canonicalize(self.directory.join(entry)).map_or(None, |dir| open(name, dir).ok())
            else {
                continue;
            };
            if image.digest() == wanted.digest {
                self.is_as_before(&image)?;
                return Ok(image);
            }
        }
        // What is wrong with the one in use, if it is that.
        in_use.and(Err(replaced(wanted)))
    }

    /// Makes the image in `staged` (a directory beside the images, with a manifest) the one of this
    /// name. Atomic and durable: at each moment `get` finds the old one or the new one. The version
    /// before stays, for VMs that are starting from it; older ones go as [`ImageStore::keeping`] says.
    ///
    /// # Errors
    /// [`ImageError`]; the old image is then still in place.
    pub fn promote(&self, staged: &Path, name: &str) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let version = self.take_in(staged, name)?;
        let before = self.in_use(name);
        self.put_in_use(name, &version)?;
        self.prune(name, &[Some(version), before])?;
        self.get(name)
    }

    /// Keeps the image in `staged` as a version of this name, which [`ImageStore::promote_version`] may put into use.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn keep(&self, staged: &Path, name: &str) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let version = self.take_in(staged, name)?;
        self.sync()?;
        self.prune(name, &[Some(version.clone()), self.in_use(name)])?;
        self.version(name, &version)
    }

    /// Gives a staged image its name as a version, `NAME@DIGITS`.
    fn take_in(&self, staged: &Path, name: &str) -> Result<String, ImageError> {
        let image = self.open_staged(staged, name)?;
        for file in image.manifest.files().map(|file| file.file.as_str()).chain([MANIFEST_FILE]) {
            let path = staged.join(file);
            plain::open_chosen(&path).and_then(|file| file.sync_all()).map_err(failed("write out", &path))?;
        }
        let digest = hex(&Sha256::digest(image.manifest.to_text()));
        let version = format!("{name}@{}", &digest[..VERSION_DIGITS]);
        let target = self.directory.join(&version);
        if target.exists() {
            // The same bytes again, or a promotion that was interrupted: either may be in use.
            fs::remove_dir_all(staged).map_err(failed("remove", staged))?;
        } else {
            fs::rename(staged, &target).map_err(failed("rename staged image to", &target))?;
        }
        Ok(version)
    }

    /// Puts a version into use, `NAME@DIGITS`, that has passed its boot test. Jobs that run, and jobs that were accepted,
    /// keep the version that they have.
    ///
    /// # Errors
    /// [`ImageError::Untested`], or what is wrong with it; the one in use then stays.
    pub fn promote_version(&self, wanted: &str) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let image = self.named(wanted)?;
        if image.manifest.info.is_none() {
            return Err(ImageError::Untested(wanted.to_owned()));
        }
        if wanted.contains('@') {
            self.put_in_use(&image.name, wanted)?;
        }
        self.get(&image.name)
    }

    /// The version in use; `None`: there is none, or a directory that the operator has put there.
    fn in_use(&self, name: &str) -> Option<String> {
        fs::read_link(self.directory.join(name)).ok()?.to_str().map(str::to_owned)
    }

    /// When a version was made: its disk is written once.
    fn made(&self, version: &str) -> Option<SystemTime> {
        let manifest = fs::read_to_string(self.directory.join(version).join(MANIFEST_FILE)).ok()?;
        let disk = Manifest::parse(&manifest).ok()?.disk.file;
        fs::metadata(self.directory.join(version).join(disk)).and_then(|found| found.modified()).ok()
    }

    /// The versions of an image, `NAME@DIGITS` each, the one in use first, then the newest. An image that the operator has put there as a
    /// plain directory has none.
    ///
    /// # Errors
    /// [`ImageError::Name`], [`ImageError::Directory`].
    pub fn versions(&self, name: &str) -> Result<Vec<String>, ImageError> {
        let prefix = format!("{}@", valid(name)?);
        let in_use = self.in_use(name);
        let mut versions: Vec<String> =
            self.entries()?.into_iter().filter(|entry| entry.starts_with(&prefix)).collect();
        versions.sort_by_cached_key(|version| (in_use.as_ref() != Some(version), Reverse(self.made(version))));
        Ok(versions)
    }

    /// An image by its name, or one version of it by `NAME@DIGITS`.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn named(&self, wanted: &str) -> Result<Image, ImageError> {
        let Some((name, _)) = wanted.split_once('@') else { return self.get(wanted) };
        if !self.versions(name)?.iter().any(|version| version == wanted) {
            return Err(ImageError::NoVersion { name: name.to_owned(), wanted: wanted.to_owned() });
        }
        self.version(name, wanted)
    }

    fn version(&self, name: &str, version: &str) -> Result<Image, ImageError> {
        let link = self.directory.join(version);
        let dir =
            fs::canonicalize(&link).map_err(|source| ImageError::File { name: name.to_owned(), path: link, source })?;
        let image = open(name, dir)?;
        self.is_as_before(&image)?;
        Ok(image)
    }

    /// Puts the newest version that is not in use back in use; the one that was stays, so that this can be taken back in
    /// the same way. Jobs that run, and jobs that were accepted, keep the version that they have.
    ///
    /// # Errors
    /// [`ImageError::NothingBefore`], or what is wrong with that version; the one in use then stays.
    pub fn roll_back(&self, name: &str) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let versions = self.versions(name)?;
        let Some(before) = versions.get(1) else { return Err(ImageError::NothingBefore(name.to_owned())) };
        self.version(name, before)?;
        self.put_in_use(name, before)?;
        self.get(name)
    }

    /// At each moment the name leads to the one before or to this one.
    fn put_in_use(&self, name: &str, version: &str) -> Result<(), ImageError> {
        let (link, new_link) = (self.directory.join(name), self.directory.join(format!("{GOING}{name}")));
        let in_place = fs::symlink_metadata(&link).is_ok_and(|found| found.is_dir());
        if in_place {
            return Err(failed("replace image", &link)(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "it is a directory that was put there by hand; move it away",
            )));
        }
        absent(fs::remove_file(&new_link)).map_err(failed("remove", &new_link))?;
        std::os::unix::fs::symlink(version, &new_link).map_err(failed("make link", &new_link))?;
        fs::rename(&new_link, &link).map_err(failed("replace image", &link))?;
        self.sync()
    }

    /// Removes an image and all its versions; none is fine. VMs that run from it keep its files open, and go on.
    ///
    /// # Errors
    /// [`ImageError::Name`], [`ImageError::Directory`].
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let path = self.directory.join(valid(name)?);
        if !self.directory.exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => self.take_away(name)?,
            Ok(_) => fs::remove_file(&path).map_err(failed("remove image", &path))?,
            Err(error) => absent(Err(error)).map_err(failed("remove image", &path))?,
        }
        for version in self.versions(name)? {
            self.take_away(&version)?;
        }
        self.sync()
    }

    /// Removes one version, `NAME@DIGITS`.
    ///
    /// # Errors
    /// [`ImageError::InUse`]: jobs get it, or machines run from it.
    pub fn remove_version(&self, wanted: &str) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let name = wanted.split('@').next().unwrap_or(wanted);
        if !self.versions(name)?.iter().any(|version| version == wanted) {
            return Err(ImageError::NoVersion { name: name.to_owned(), wanted: wanted.to_owned() });
        }
        let in_use = |why: &'static str| ImageError::InUse { version: wanted.to_owned(), why };
        if self.in_use(name).as_deref() == Some(wanted) {
            return Err(in_use(
                "it is the one that jobs get; `dayfly image rollback` or `promote` puts another into use",
            ));
        }
        if self.is_run_from(wanted)? {
            return Err(in_use("machines run from it; it goes with a later one once they have ended"));
        }
        self.take_away(wanted)?;
        self.sync()
    }

    /// Removes the versions beyond those that are kept: not one of `stay`, none that a machine's overlay lies on.
    fn prune(&self, name: &str, stay: &[Option<String>]) -> Result<(), ImageError> {
        let versions = self.versions(name)?;
        let stays = |version: &String| stay.iter().flatten().any(|stays| stays == version);
        let mut kept = versions.iter().filter(|version| stays(version)).count();
        for version in versions.iter().filter(|version| !stays(version)) {
            kept += 1;
            if kept > self.keep && !self.is_run_from(version)? {
                self.take_away(version)?;
            }
        }
        Ok(())
    }

    /// Whether a machine's overlay lies on this version. An overlay that cannot be read may.
    fn is_run_from(&self, version: &str) -> Result<bool, ImageError> {
        let Some(overlays) = &self.overlays else { return Ok(false) };
        let listed = match fs::read_dir(overlays) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            // Who may change a daemon's images may look at its machines: these are the images of somebody else.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
            listed => listed.map_err(failed("look for machines in", overlays))?,
        };
        let dir = fs::canonicalize(self.directory.join(version)).map_err(failed("look at", &self.directory))?;
        for entry in listed {
            let path = entry.map_err(failed("look for machines in", overlays))?.path();
            match qcow2::backing(&path) {
                Ok(Some(base)) if !base.starts_with(&dir) => {}
                // No overlay at all.
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Ok(Some(_)) | Err(_) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Removes a directory of the store under a name that no version has.
    fn take_away(&self, entry: &str) -> Result<(), ImageError> {
        let (path, going) = (self.directory.join(entry), self.directory.join(format!("{GOING}{entry}")));
        absent(fs::remove_dir_all(&going)).map_err(failed("remove", &going))?;
        fs::rename(&path, &going).map_err(failed("remove image", &path))?;
        absent(fs::remove_dir_all(&going)).map_err(failed("remove", &going))
    }

    /// The right to change this directory, and nothing of a change before that was killed.
    fn lock(&self) -> Result<File, ImageError> {
        let path = self.directory.join(LOCK_FILE);
        let lock = plain::open_lock(&path).map_err(failed("open", &path))?;
        let mut tries = 1;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if tries < LOCK_TRIES => std::thread::park_timeout(LOCK_PAUSE),
                Err(TryLockError::WouldBlock) => return Err(ImageError::Busy(self.directory.clone())),
                Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
            }
            tries += 1;
        }
        for entry in self.entries()?.iter().filter(|entry| entry.starts_with(GOING)) {
            let path = self.directory.join(entry);
            let removed = match fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
                Ok(_) => fs::remove_file(&path),
                Err(error) => Err(error),
            };
            absent(removed).map_err(failed("remove", &path))?;
        }
        Ok(lock)
    }

    fn sync(&self) -> Result<(), ImageError> {
        let sync = File::open(&self.directory).and_then(|directory| directory.sync_all());
        sync.map_err(failed("write out image directory", &self.directory))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Directory { what, path, source }
}

/// What is not there is as good as removed.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn replaced(wanted: &ImageRef) -> ImageError {
    ImageError::Replaced { name: wanted.name.clone(), digest: wanted.digest.clone() }
}
