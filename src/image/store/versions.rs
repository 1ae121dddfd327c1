//! Versions of an image: which one a job was accepted for, and how a new one takes the place of the one before.

use super::{Image, ImageError, ImageStore, MANIFEST_FILE, hex, open, valid};
use crate::files::plain;
use crate::machine_spec::ImageRef;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Hex digits of the manifest's digest in the name of a version.
const VERSION_DIGITS: usize = 8;

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
    /// before stays, for VMs that are starting from it; older ones go. (A VM that runs keeps its
    /// files open, whatever is unlinked.)
    ///
    /// # Errors
    /// [`ImageError`]; the old image is then still in place.
    pub fn promote(&self, staged: &Path, name: &str) -> Result<Image, ImageError> {
        let link = self.directory.join(valid(name)?);
        let failed = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| ImageError::Directory { what, path, source }
        };
        let image = self.open_staged(staged, name)?;
        for file in image.manifest.files().map(|file| file.file.as_str()).chain([MANIFEST_FILE]) {
            let path = staged.join(file);
            plain::open_chosen(&path).and_then(|file| file.sync_all()).map_err(failed("write out", &path))?;
        }

        let digest = hex(&Sha256::digest(image.manifest.to_text()));
        let version = format!("{name}@{}", &digest[..VERSION_DIGITS]);
        let target = self.directory.join(&version);
        let before = fs::read_link(&link).ok();
        if target.exists() {
            // The same bytes again, or a promotion that was interrupted: either may be in use.
            fs::remove_dir_all(staged).map_err(failed("remove", staged))?;
        } else {
            fs::rename(staged, &target).map_err(failed("rename staged image to", &target))?;
        }
        self.put_in_use(name, &version)?;

        let keep = [Some(version), before.and_then(|before| Some(before.to_str()?.to_owned()))];
        self.remove_versions(name, &keep)?;
        self.get(name)
    }

    /// The versions of an image, `NAME@DIGITS` each, the one in use first. An image that the operator has put there as a
    /// plain directory has none.
    ///
    /// # Errors
    /// [`ImageError::Name`], [`ImageError::Directory`].
    pub fn versions(&self, name: &str) -> Result<Vec<String>, ImageError> {
        let prefix = format!("{}@", valid(name)?);
        let in_use = fs::read_link(self.directory.join(name)).ok();
        let mut versions: Vec<String> =
            self.entries()?.into_iter().filter(|entry| entry.starts_with(&prefix)).collect();
        versions.sort_by_key(|version| in_use.as_deref() != Some(Path::new(version)));
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

    /// Puts the version before back in use; the one that was stays, so that this can be taken back in the same way.
    /// Jobs that run, and jobs that were accepted, keep the version that they have.
    ///
    /// # Errors
    /// [`ImageError::NothingBefore`], or what is wrong with that version; the one in use then stays.
    pub fn roll_back(&self, name: &str) -> Result<Image, ImageError> {
        let versions = self.versions(name)?;
        // Two are kept. Were there more, a promotion was interrupted before it could remove the oldest.
        let before = versions.iter().skip(1).max_by_key(|version| {
            let manifest = self.directory.join(version).join(MANIFEST_FILE);
            fs::metadata(manifest).and_then(|manifest| manifest.modified()).ok()
        });
        let Some(before) = before else { return Err(ImageError::NothingBefore(name.to_owned())) };
        self.version(name, before)?;
        self.put_in_use(name, before)?;
        self.get(name)
    }

    /// At each moment the name leads to the one before or to this one.
    fn put_in_use(&self, name: &str, version: &str) -> Result<(), ImageError> {
        let failed = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| ImageError::Directory { what, path, source }
        };
        let (link, new_link) = (self.directory.join(name), self.directory.join(format!(".{name}.new")));
        match fs::remove_file(&new_link) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &new_link)(source)),
            _ => {}
        }
        std::os::unix::fs::symlink(version, &new_link).map_err(failed("make link", &new_link))?;
        fs::rename(&new_link, &link).map_err(failed("replace image", &link))?;
        self.sync()
    }

    /// Removes an image and all its versions; none is fine.
    ///
    /// # Errors
    /// [`ImageError::Name`], [`ImageError::Directory`].
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let path = self.directory.join(valid(name)?);
        let removed = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        removed.map_err(|source| ImageError::Directory { what: "remove image", path, source })?;
        self.remove_versions(name, &[])?;
        if self.directory.exists() { self.sync() } else { Ok(()) }
    }

    fn remove_versions(&self, name: &str, keep: &[Option<String>]) -> Result<(), ImageError> {
        let prefix = format!("{name}@");
        for entry in self.entries()? {
            if entry.starts_with(&prefix) && !keep.iter().flatten().any(|kept| *kept == entry) {
                let path = self.directory.join(entry);
                fs::remove_dir_all(&path).map_err(|source| ImageError::Directory {
                    what: "remove image",
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), ImageError> {
        let sync = File::open(&self.directory).and_then(|directory| directory.sync_all());
        sync.map_err(|source| ImageError::Directory {
            what: "write out image directory",
            path: self.directory.clone(),
            source,
        })
    }
}

fn replaced(wanted: &ImageRef) -> ImageError {
    ImageError::Replaced { name: wanted.name.clone(), digest: wanted.digest.clone() }
}
