//! What lies beside a recipe.toml: texts, and overlays.

use crate::files::plain;
use crate::image::build::{BuildError, file_error};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

/// Files that go into the image, as they lie below its root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::image::build) enum Overlay {
    /// Those of a directory.
    Directory(PathBuf),
    /// Those of a recipe of this binary: path and text.
    Carried(&'static [(&'static str, &'static str)]),
}

impl Overlay {
    /// The one that a recipe in `directory` names.
    ///
    /// # Errors
    /// It lies elsewhere, or is no directory.
    pub(super) fn of(directory: &Path, name: &str) -> Result<Self, BuildError> {
        let recipe = directory.join(super::RECIPE_FILE);
        let is_within =
            !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if !is_within {
            let why = format!("overlay `{name}` does not lie beside it");
            return Err(BuildError::RecipeValue { path: recipe, why });
        }
        let path = directory.join(name);
        if !path.is_dir() {
            let why = format!("overlay `{name}` is no directory beside it");
            return Err(BuildError::RecipeValue { path: recipe, why });
        }
        Ok(Self::Directory(path))
    }

    /// Copies it over what is in `files`. All can read what is in an image, for an image has no secrets; who may write
    /// and run it stays.
    pub(in crate::image::build) fn copy_to(&self, files: &Path) -> Result<(), BuildError> {
        let texts = match self {
            Self::Directory(directory) => return copy(directory, files),
            Self::Carried(texts) => texts,
        };
        texts.iter().try_for_each(|(path, text)| write_text(&files.join(path), text))
    }
}

/// Writes a text of ours for all to read, its directory made.
pub(in crate::image::build) fn write_text(path: &Path, text: &str) -> Result<(), BuildError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(file_error("make", parent))?;
    }
    fs::write(path, text).map_err(file_error("write", path))
}

fn copy(from: &Path, to: &Path) -> Result<(), BuildError> {
    fs::create_dir_all(to).map_err(file_error("make", to))?;
    let mut entries: Vec<_> =
        fs::read_dir(from).and_then(|entries| entries.collect()).map_err(file_error("read", from))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(file_error("read", &from))?;
        if kind.is_dir() {
            copy(&from, &to)?;
            continue;
        }
        // What lies there already may be a link, or of an earlier overlay.
        match fs::remove_file(&to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error("replace", &to)(error)),
            _ => {}
        }
        if kind.is_symlink() {
            let target = fs::read_link(&from).map_err(file_error("read", &from))?;
            std::os::unix::fs::symlink(target, &to).map_err(file_error("link", &to))?;
        } else {
            copy_file(&from, &to).map_err(file_error("copy", &from))?;
        }
    }
    Ok(())
}

/// Another kind of file (a FIFO, a device) is refused, and never waited for.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = plain::open(from)?;
    let mode = source.metadata()?.permissions().mode() & 0o777 | 0o444;
    let mut target = fs::File::create(to)?;
    io::copy(&mut source, &mut target)?;
    target.set_permissions(fs::Permissions::from_mode(mode))
}

/// A text of an operator's, up to so many bytes.
pub(super) fn text(path: &Path, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    plain::open_chosen(path)?.take(bytes_max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {bytes_max} bytes")));
    }
    Ok(text)
}
