//! Which files are meant, and how they are packed and unpacked.

use super::{ArtifactsError, UploadArguments};
use std::collections::BTreeSet;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// What to upload: paths relative to the working directory, sorted.
///
/// # Errors
/// [`ArtifactsError::Pattern`], and git's failure to list what it does not track.
pub(crate) fn collect(arguments: &UploadArguments) -> Result<Vec<PathBuf>, ArtifactsError> {
    let here = std::env::current_dir().map_err(ArtifactsError::Archive)?;
    let mut found = BTreeSet::new();
    for path in &arguments.paths {
        let before = found.len();
        let pattern = here.join(path.trim_end_matches('/'));
        let matches =
            glob::glob(&pattern.to_string_lossy()).map_err(|error| ArtifactsError::Pattern(path.clone(), error))?;
        for entry in matches.flatten() {
            add_tree(&mut found, &here, &entry).map_err(ArtifactsError::Archive)?;
        }
        match found.len() - before {
            0 => crate::log(&format!(
                "WARNING: {path}: no matching files. Ensure that the artifact path is relative to the working directory ({})",
                here.display()
            )),
            count => crate::log(&format!("{path}: found {count} matching artifact files and directories")),
        }
    }
    if arguments.untracked {
        let listed = Command::new("git").args(["ls-files", "-o", "-z"]).output().map_err(ArtifactsError::Archive)?;
        for name in listed.stdout.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            found.insert(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
        }
    }
    for exclude in &arguments.excludes {
        let pattern = glob::Pattern::new(exclude).map_err(|error| ArtifactsError::Pattern(exclude.clone(), error))?;
        let before = found.len();
        found.retain(|path| !pattern.matches_path(path));
        crate::log(&format!("{exclude}: excluded {} files", before - found.len()));
    }
    Ok(found.into_iter().collect())
}

/// Adds a file, or a directory and all below it; nothing outside of `here`, and nothing below `.git`.
fn add_tree(found: &mut BTreeSet<PathBuf>, here: &Path, entry: &Path) -> io::Result<()> {
    let Ok(relative) = entry.strip_prefix(here) else { return Ok(()) };
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
    let is_git = relative.components().next().is_some_and(|part| part.as_os_str() == ".git");
    if !inside || is_git {
        return Ok(());
    }
    if !relative.as_os_str().is_empty() {
        found.insert(relative.to_owned());
    }
    if entry.symlink_metadata()?.is_dir() {
        for child in std::fs::read_dir(entry)? {
            add_tree(found, here, &child?.path())?;
        }
    }
    Ok(())
}

/// Writes the files as a zip, streaming: sizes stand behind the data.
///
/// # Errors
/// A file that cannot be read, or `out`'s.
pub(crate) fn write_zip(out: impl Write, files: &[PathBuf]) -> io::Result<()> {
    let mut zip = zip::ZipWriter::new_stream(out);
    for file in files {
        let metadata = file.symlink_metadata()?;
        let name = file.to_string_lossy();
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .unix_permissions(metadata.permissions().mode())
            .large_file(metadata.len() > u64::from(u32::MAX));
        if metadata.is_symlink() {
            zip.add_symlink(name, std::fs::read_link(file)?.to_string_lossy(), options)?;
        } else if metadata.is_dir() {
            zip.add_directory(name, options)?;
        } else if metadata.is_file() {
            zip.start_file(name, options)?;
            io::copy(&mut std::fs::File::open(file)?, &mut zip)?;
        }
        // Sockets and devices are left out.
    }
    zip.finish()?;
    Ok(())
}

/// Writes each file as a gzip member that names it, one behind the other.
///
/// # Errors
/// A file that cannot be read, or `out`'s.
pub(super) fn write_gzip(mut out: impl Write, files: &[PathBuf]) -> io::Result<()> {
    for file in files.iter().filter(|file| file.is_file()) {
        let name = file.file_name().unwrap_or(file.as_os_str());
        let mut member =
            flate2::GzBuilder::new().filename(name.as_bytes()).write(&mut out, flate2::Compression::default());
        io::copy(&mut std::fs::File::open(file)?, &mut member)?;
        member.finish()?;
    }
    Ok(())
}

/// Writes the one file as it is.
///
/// # Errors
/// Several files: the official runner notices that only in the middle of the request, and cuts it. So does this.
pub(super) fn write_raw(mut out: impl Write, files: &[PathBuf]) -> io::Result<()> {
    match files {
        [file] => io::copy(&mut std::fs::File::open(file)?, &mut out).map(|_| ()),
        files => Err(io::Error::other(format!("only one file can be sent as raw, got {}", files.len()))),
    }
}

/// Unpacks a zip into the working directory; names that lead out of it are refused by the library.
///
/// # Errors
/// No zip, or the file system's.
pub(crate) fn unpack(archive: impl Read + Seek) -> io::Result<()> {
    zip::ZipArchive::new(archive)?.extract(".")?;
    Ok(())
}
