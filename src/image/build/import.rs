//! How does an image come from another host? From a directory or a file that `dayfly image export` has made there.
//!
//! What comes is checked like what is built, and believed in nothing: format, architecture, each file's length and
//! digest, the disk's header; what its runner says of itself the boot test learns anew. It is filled in beside the
//! images, as a build is, and takes its place by [`Staged::promote`].

use super::staging::Staging;
use super::{BuildError, Progress, Staged, file_error};
use crate::files::plain;
use crate::image::manifest::{ImageFile, MANIFEST_FILE, Manifest};
use crate::image::store::{Image, ImageError, ImageStore, MANIFEST_BYTES_MAX, valid};
use crate::image::tar;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};

/// Free disk beyond the image's own size, so that no image fills the host's disk to the brim.
const SPARE_BYTES: u64 = 1 << 30;

/// Takes an image in, under its own name or another one. Blocks for as long as the disk takes.
///
/// # Errors
/// [`BuildError`]: nothing is left of it.
pub fn import(
    from: &Path,
    store: &ImageStore,
    name: Option<&str>,
    progress: &mut Progress<'_>,
) -> Result<Staged, BuildError> {
    let image_directory = store.directory();
    let refused = |why: String| BuildError::Import { path: from.to_owned(), why };
    if let Some(name) = name {
        valid(name)?;
    }
    let found = fs::metadata(from).map_err(file_error("read", from))?;
    let staging = Staging::new(image_directory)?;
    let mut manifest = if found.is_dir() {
        let path = from.join(MANIFEST_FILE);
        let manifest = read_manifest(plain::open(&path).map_err(file_error("read", &path))?, from)?;
        has_room(image_directory, &manifest, from)?;
        for file in manifest.files() {
            let path = from.join(&file.file);
            progress(&format!("{}, {} MiB", file.file, file.bytes >> 20));
            take(&staging, file, plain::open(&path).map_err(file_error("read", &path))?, from)?;
        }
        manifest
    } else {
        let mut files =
            tar::Files::new(io::BufReader::new(plain::open_chosen(from).map_err(file_error("read", from))?));
        let next = |files: &mut tar::Files<io::BufReader<File>>| files.next().map_err(file_error("read", from));
        let first = next(&mut files)?;
        let Some((_, bytes)) = first.filter(|(name, _)| name == MANIFEST_FILE) else {
            return Err(refused(format!("its first file is no {MANIFEST_FILE}")));
        };
        let manifest = read_manifest(files.content(bytes), from)?;
        has_room(image_directory, &manifest, from)?;
        let mut missing: Vec<&ImageFile> = manifest.files().collect();
        while let Some((name, bytes)) = next(&mut files)? {
            let Some(at) = missing.iter().position(|file| file.file == name) else {
                return Err(refused(format!("its manifest knows no file `{name}`, or it is there twice")));
            };
            progress(&format!("{name}, {} MiB", bytes >> 20));
            take(&staging, missing.remove(at), files.content(bytes), from)?;
        }
        if let Some(file) = missing.first() {
            return Err(refused(format!("`{}` is not in it", file.file)));
        }
        manifest
    };
    if let Some(name) = name {
        name.clone_into(&mut manifest.name);
    }
    valid(&manifest.name)?;
    manifest.info = None;
    let staged = Staged { store: store.clone(), directory: staging, manifest };
    staged.write()?;
    staged.image()?;
    Ok(staged)
}

fn read_manifest(from: impl Read, path: &Path) -> Result<Manifest, BuildError> {
    let mut text = String::new();
    from.take(MANIFEST_BYTES_MAX).read_to_string(&mut text).map_err(file_error("read the manifest of", path))?;
    let (name, path) = (path.display().to_string(), path.to_owned());
    Manifest::parse(&text).map_err(|source| ImageError::Manifest { name, path, source }.into())
}

/// Whether there is room for what the manifest says is to come; no more than that is read.
fn has_room(image_directory: &Path, manifest: &Manifest, from: &Path) -> Result<(), BuildError> {
    let wanted = manifest.files().fold(SPARE_BYTES, |sum, file| sum.saturating_add(file.bytes));
    let found =
        rustix::fs::statvfs(image_directory).map_err(|error| file_error("look at", image_directory)(error.into()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if wanted <= free {
        return Ok(());
    }
    let why =
        format!("it wants {} MiB and some, {} MiB are free in {}", wanted >> 20, free >> 20, image_directory.display());
    Err(BuildError::Import { path: from.to_owned(), why })
}

/// Copies one file; it is the one that the manifest names, or none.
fn take(staging: &Staging, file: &ImageFile, content: impl Read, from: &Path) -> Result<(), BuildError> {
    let at = || staging.path().join(&file.file);
    // One byte more tells that there is more.
    let found = staging.write(&file.file, content.take(file.bytes.saturating_add(1)));
    let found = found.map_err(file_error("write", &at()))?;
    let wrong = match (found.bytes == file.bytes, found.sha256 == file.sha256) {
        (true, true) => return Ok(()),
        (false, _) if found.bytes > file.bytes => "is longer than its manifest says".to_owned(),
        (false, _) => format!("has {} bytes instead of {}", found.bytes, file.bytes),
        (true, false) => "is not the file that was exported (its SHA-256 differs)".to_owned(),
    };
    Err(BuildError::Import { path: from.to_owned(), why: format!("`{}` {wrong}", file.file) })
}

/// Writes an image for another host: to a directory, which is made, or to one file, if the name ends in `.tar`. It is
/// there as a whole or not at all, and nothing is written over. Blocks for as long as the disk takes.
///
/// # Errors
/// [`ImageError`]: a file of the image is not the one that was built; the disk's.
pub fn export(store: &ImageStore, image: &Image, to: &Path) -> Result<(), ImageError> {
    let failed = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Directory { what, path, source }
    };
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if fs::symlink_metadata(to).is_ok() {
        return Err(failed("write to", to)(io::ErrorKind::AlreadyExists.into()));
    }
    // What is sent on is what was built.
    store.verify(image)?;
    let manifest = Manifest { info: None, ..image.manifest.clone() }.to_text();
    let files: Vec<(&ImageFile, PathBuf)> =
        image.manifest.files().map(|file| (file, image.dir.join(&file.file))).collect();
    if to.extension().is_some_and(|extension| extension == "tar") {
        let mut out =
            tempfile::Builder::new().prefix(".export-").tempfile_in(parent).map_err(failed("write to", parent))?;
        let mut write = || -> io::Result<()> {
            let mut out = io::BufWriter::new(out.as_file_mut());
            tar::write_file(&mut out, MANIFEST_FILE, manifest.len() as u64, &mut manifest.as_bytes())?;
            for (file, path) in &files {
                tar::write_file(&mut out, &file.file, file.bytes, &mut plain::open_chosen(path)?)?;
            }
            tar::write_end(&mut out)?;
            out.flush()
        };
        write().and_then(|()| out.as_file().sync_all()).map_err(failed("write", to))?;
        out.persist_noclobber(to).map_err(|error| failed("write", to)(error.error))?;
    } else {
        let directory =
            tempfile::Builder::new().prefix(".export-").tempdir_in(parent).map_err(failed("write to", parent))?;
        let write = |name: &str, content: &mut dyn Read| -> io::Result<()> {
            let mut file = File::create_new(directory.path().join(name))?;
            io::copy(content, &mut file)?;
            file.sync_all()
        };
        for (file, path) in &files {
            let written = plain::open_chosen(path).and_then(|mut content| write(&file.file, &mut content));
            written.map_err(failed("write", to))?;
        }
        write(MANIFEST_FILE, &mut manifest.as_bytes()).map_err(failed("write", to))?;
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(directory.path(), open).map_err(failed("open up", to))?;
        // An empty directory that came in between is no loss; anything else stays.
        fs::rename(directory.path(), to).map_err(failed("write", to))?;
        drop(directory.keep());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
