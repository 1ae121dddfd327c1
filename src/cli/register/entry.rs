//! The `[[runner]]` entry of a runner: judged as part of the whole file, then written.
//!
//! The file keeps its bytes, comments and order: a new entry only ever comes behind them, and in one that is registered
//! anew only those keys change that were asked for.

use crate::config::{Config, EXAMPLE, Loaded, Runner};
use crate::files::plain;
use crate::gitlab::RunnerToken;
use crate::secret::Secret;
use anyhow::{Context as _, bail};
use std::fs::{DirBuilder, File, Metadata, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, Value};

/// A key of an entry and its value.
pub(in crate::cli) type Change = (&'static str, Value);

/// The configuration file as it stands; where there is none, `config.example.toml`.
pub(in crate::cli) struct Entry {
    file: PathBuf,
    text: String,
    loaded: Loaded,
}

/// A file with its entry, valid as a whole; not written yet.
pub(in crate::cli) struct Prepared {
    file: PathBuf,
    text: String,
    loaded: Loaded,
    index: usize,
}

/// A file of the operator's that the daemon gets a copy of.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Copied {
    /// The configuration's key.
    pub(in crate::cli) key: &'static str,
    /// Where it was read.
    pub(in crate::cli) source: PathBuf,
    /// Where the copy goes.
    pub(in crate::cli) target: PathBuf,
    /// Whether nobody but the daemon may read it.
    pub(in crate::cli) private: bool,
    pub(in crate::cli) bytes: Vec<u8>,
}

/// What was written.
pub(in crate::cli) struct Written {
    pub(in crate::cli) config: PathBuf,
    pub(in crate::cli) token: PathBuf,
}

/// A runner's name as a file's.
pub(in crate::cli) fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '-' };
    name.chars().map(plain).collect()
}

/// Where the token of a runner of this name goes, relative to the configuration file.
pub(in crate::cli) fn token_file(name: &str) -> PathBuf {
    Path::new("tokens").join(file_name(name))
}

impl Entry {
    /// Reads and judges `file`.
    pub(in crate::cli) fn open(file: &Path) -> anyhow::Result<Self> {
        // A link stays a link: what it points to is replaced.
        let file =
            std::fs::canonicalize(file).or_else(|_| std::path::absolute(file)).context("find the current directory")?;
        let read = plain::open(&file).and_then(io::read_to_string);
        let text = match read {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => EXAMPLE.to_owned(),
            Err(error) => return Err(error).with_context(|| format!("read configuration `{}`", file.display())),
        };
        let loaded = Config::assemble(Some((file.clone(), text.clone())), crate::config::environment())?;
        Ok(Self { file, text, loaded })
    }

    pub(in crate::cli) fn config(&self) -> &Config {
        &self.loaded.config
    }

    pub(in crate::cli) fn file(&self) -> &Path {
        &self.file
    }

    /// The file's text as it stands.
    pub(in crate::cli) fn text(&self) -> &str {
        &self.text
    }

    /// The file with this text in its place, judged.
    pub(in crate::cli) fn edited(self, text: String) -> anyhow::Result<Changed> {
        let loaded = Config::assemble(Some((self.file.clone(), text.clone())), crate::config::environment())?;
        Ok(Changed { file: self.file, text, loaded })
    }

    /// The entry of this name.
    pub(in crate::cli) fn runner(&self, name: &str) -> Option<&Runner> {
        self.loaded.config.runner.iter().find(|runner| runner.name == name)
    }

    /// A path of the file, as it is meant.
    pub(in crate::cli) fn resolve(&self, path: &Path) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("/")).join(path)
    }

    /// Puts these keys into the entry of this name, or behind all others as a new one, and judges the whole.
    pub(in crate::cli) fn put(self, name: &str, changes: Vec<Change>) -> anyhow::Result<Prepared> {
        let text = if self.runner(name).is_some() {
            self.changed(name, changes)?
        } else {
            let mut text = self.text.clone();
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text.push('\n');
            text.push_str(&written_form("runner", changes));
            text
        };
        let loaded = Config::assemble(Some((self.file.clone(), text.clone())), crate::config::environment())?;
        let Some(index) = loaded.config.runner.iter().position(|other| other.name == name) else {
            bail!("find the new entry in {}", self.file.display());
        };
        Ok(Prepared { file: self.file, text, loaded, index })
    }

    fn changed(&self, name: &str, changes: Vec<Change>) -> anyhow::Result<String> {
        let mut document = self.document()?;
        let table =
            entries(&mut document)
                .and_then(|entries| entries.iter_mut().find(|table| is_named(table, name)))
                .with_context(|| format!("find runner `{name}` in {}: change it there by hand", self.file.display()))?;
        for (key, mut new) in changes {
            match table.get_mut(key).and_then(Item::as_value_mut) {
                Some(old) => {
                    *new.decor_mut() = old.decor().clone();
                    *old = new;
                }
                None => drop(table.insert(key, Item::Value(new))),
            }
        }
        Ok(document.to_string())
    }

    /// Takes the entry of this name out of the file; all others keep their bytes.
    pub(in crate::cli) fn remove(&self, name: &str) -> anyhow::Result<()> {
        let mut document = self.document()?;
        let found = entries(&mut document).and_then(|entries| {
            let at = entries.iter().position(|table| is_named(table, name))?;
            entries.remove(at);
            Some(entries.is_empty())
        });
        match found {
            Some(true) => drop(document.remove("runner")),
            Some(false) => {}
            None => bail!("find runner `{name}` in {}: remove it there by hand", self.file.display()),
        }
        write_config(&self.file, &document.to_string())
            .with_context(|| format!("write configuration `{}`", self.file.display()))
    }

    fn document(&self) -> anyhow::Result<DocumentMut> {
        self.text.parse().with_context(|| format!("parse configuration `{}`", self.file.display()))
    }
}

fn entries(document: &mut DocumentMut) -> Option<&mut ArrayOfTables> {
    document.get_mut("runner").and_then(Item::as_array_of_tables_mut)
}

fn is_named(table: &Table, name: &str) -> bool {
    table.get("name").and_then(Item::as_str) == Some(name)
}

/// An entry of this kind with these keys, as TOML.
pub(in crate::cli) fn written_form(kind: &str, changes: Vec<Change>) -> String {
    let mut table = Table::new();
    for (key, new) in changes {
        table.insert(key, Item::Value(new));
    }
    let mut entries = ArrayOfTables::new();
    entries.push(table);
    let mut document = DocumentMut::new();
    document.insert(kind, Item::ArrayOfTables(entries));
    document.to_string()
}

impl Prepared {
    pub(in crate::cli) fn config(&self) -> &Config {
        &self.loaded.config
    }

    /// The entry, its paths resolved.
    pub(in crate::cli) fn runner(&self) -> &Runner {
        &self.loaded.config.runner[self.index]
    }

    /// Writes token and copies, then the configuration, each atomically; all or nothing.
    pub(in crate::cli) fn write(self, token: &Secret, copies: &[Copied]) -> anyhow::Result<Written> {
        let token = NewFile::token(self.runner().token_file.clone(), &RunnerToken::new(token.clone()));
        let path = token.path.clone();
        let copies = copies.iter().map(|copy| NewFile::tls(copy.target.clone(), copy.bytes.clone(), copy.private));
        let files: Vec<NewFile> = std::iter::once(token).chain(copies).collect();
        let changed = Changed { file: self.file, text: self.text, loaded: self.loaded };
        Ok(Written { config: changed.write(&files)?, token: path })
    }
}

/// A file beside the configuration that is to be written.
pub(in crate::cli) struct NewFile {
    path: PathBuf,
    bytes: Vec<u8>,
    mode: u32,
    /// Of its directory, should that be made.
    directory_mode: u32,
}

impl NewFile {
    /// A token: its daemon's and nobody else's.
    pub(in crate::cli) fn token(path: PathBuf, token: &RunnerToken) -> Self {
        Self { path, bytes: token.to_file(), mode: 0o600, directory_mode: 0o700 }
    }

    /// A file of certificates, or a key.
    pub(in crate::cli) fn tls(path: PathBuf, bytes: Vec<u8>, private: bool) -> Self {
        Self { path, bytes, mode: if private { 0o600 } else { 0o644 }, directory_mode: 0o755 }
    }
}

/// A configuration that is valid as a whole; not written yet.
pub(in crate::cli) struct Changed {
    file: PathBuf,
    text: String,
    loaded: Loaded,
}

impl Changed {
    /// Writes these files, then the configuration, each atomically; all or nothing. Where that is.
    pub(in crate::cli) fn write(self, files: &[NewFile]) -> anyhow::Result<PathBuf> {
        let mut done = Undo::default();
        let owner = std::fs::metadata(&self.loaded.config.state_directory).ok();
        for new in files {
            done.make_directory(&new.path, new.directory_mode, owner.as_ref())
                .and_then(|()| done.replace(&new.path, &new.bytes, new.mode))
                .with_context(|| format!("write `{}`", new.path.display()))?;
        }
        write_config(&self.file, &self.text)
            .with_context(|| format!("write configuration `{}`", self.file.display()))?;
        done.keep();
        Ok(self.file)
    }
}

/// What a file held, and whose it was.
type Before = (Vec<u8>, Metadata);

/// What was changed on the way, and is changed back when this is dropped: the error that is reported is the one that
/// matters.
#[derive(Default)]
struct Undo {
    made: Vec<PathBuf>,
    replaced: Vec<(PathBuf, Option<Before>)>,
}

impl Undo {
    /// The directory of this file, with the daemon's owner, unless it is there.
    fn make_directory(&mut self, file: &Path, mode: u32, owner: Option<&Metadata>) -> io::Result<()> {
        let dir = parent(file)?;
        std::fs::create_dir_all(parent(dir)?)?;
        match DirBuilder::new().mode(mode).create(dir) {
            Ok(()) => {
                self.made.push(dir.to_owned());
                let opened = plain::open_directory(dir)?;
                // Whatever our umask says.
                opened.set_permissions(Permissions::from_mode(mode))?;
                owner.map_or(Ok(()), |owner| give(&opened, owner))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A file of these bytes and this mode, in place of the one that may be there.
    fn replace(&mut self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        let before = match plain::open(path) {
            Ok(file) => {
                let metadata = file.metadata()?;
                let mut bytes = Vec::new();
                file.take(COPY_BYTES_MAX).read_to_end(&mut bytes)?;
                Some((bytes, metadata))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        put(path, bytes, Permissions::from_mode(mode), None)?;
        self.replaced.push((path.to_owned(), before));
        Ok(())
    }

    fn keep(mut self) {
        self.made.clear();
        self.replaced.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for (path, before) in self.replaced.drain(..).rev() {
            let _ = match before {
                Some((bytes, metadata)) => put(&path, &bytes, metadata.permissions(), Some(&metadata)),
                None => std::fs::remove_file(&path),
            };
        }
        for dir in self.made.drain(..).rev() {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Bytes of a file that is copied, at most: the largest bundles of CAs have a fourth of it.
const COPY_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// An operator's file of certificates, or a key.
pub(in crate::cli) fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::take(plain::open_chosen(path)?, COPY_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > COPY_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than any file of certificates"));
    }
    Ok(bytes)
}

/// Puts a file in place, atomically and for good. It is mode 0600 from the start; without `like` it gets its directory's
/// owner, who is the daemon.
pub(in crate::cli) fn put(path: &Path, bytes: &[u8], mode: Permissions, like: Option<&Metadata>) -> io::Result<()> {
    let dir = parent(path)?;
    let mut new = NamedTempFile::new_in(dir)?;
    new.write_all(bytes)?;
    match like {
        Some(like) => give(new.as_file(), like)?,
        None => give(new.as_file(), &std::fs::metadata(dir)?)?,
    }
    new.as_file().set_permissions(mode)?;
    new.as_file().sync_all()?;
    new.persist(path)?;
    File::open(dir)?.sync_all()
}

/// Puts a configuration in place; one that was there leaves it owner and mode.
pub(in crate::cli) fn write_config(file: &Path, text: &str) -> io::Result<()> {
    match std::fs::metadata(file) {
        Ok(old) => put(file, text.as_bytes(), old.permissions(), Some(&old)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(parent(file)?)?;
            put(file, text.as_bytes(), Permissions::from_mode(0o644), None)
        }
        Err(error) => Err(error),
    }
}

/// Gives `file` to whom `like` belongs. Only root can, and only root needs to. The open file, not its name: in the
/// daemon's own directories the daemon's user could make that another file's meanwhile.
pub(in crate::cli) fn give(file: &File, like: &Metadata) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(like.uid()), Some(like.gid()))
    } else {
        Ok(())
    }
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no parent"))
}
