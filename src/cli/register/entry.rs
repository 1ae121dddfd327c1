//! The `[[runner]]` entry of a new runner: judged as part of the whole file, then written.
//!
//! The file keeps its bytes, comments and order: an entry only ever comes behind them.

use crate::config::{Config, EXAMPLE, Loaded, Runner};
use crate::files::plain;
use crate::secret::Secret;
use anyhow::{Context as _, bail};
use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

/// The configuration file as it stands; where there is none, `config.example.toml`.
pub(super) struct Entry {
    file: PathBuf,
    text: String,
    loaded: Loaded,
}

/// A file with one entry more, valid as a whole; not written yet.
pub(super) struct Prepared {
    file: PathBuf,
    text: String,
    loaded: Loaded,
    index: usize,
}

/// What was written.
pub(super) struct Written {
    pub(super) config: PathBuf,
    pub(super) token: PathBuf,
}

/// Where the token of a runner of this name goes, relative to the configuration file.
pub(super) fn token_file(name: &str) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '-' };
    Path::new("tokens").join(name.chars().map(plain).collect::<String>())
}

impl Entry {
    /// Reads and judges `file`.
    pub(super) fn open(file: &Path) -> anyhow::Result<Self> {
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

    pub(super) fn config(&self) -> &Config {
        &self.loaded.config
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// A second entry of this name would be another runner to us and the same to people.
    pub(super) fn refuse_duplicates(&self, runner: &Runner) -> anyhow::Result<()> {
        let file = self.file.display();
        if self.loaded.config.runner.iter().any(|other| other.name == runner.name) {
            bail!(
                "register `{}`: {file} has a runner of this name; choose another --name, or remove that entry first",
                runner.name
            );
        }
        Ok(())
    }

    /// Adds the entry behind all others and judges the whole.
    pub(super) fn append(self, runner: Runner) -> anyhow::Result<Prepared> {
        let mut text = self.text;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push('\n');
        text.push_str(&written_form(&runner));
        let loaded = Config::assemble(Some((self.file.clone(), text.clone())), crate::config::environment())?;
        let Some(index) = loaded.config.runner.iter().position(|other| other.name == runner.name) else {
            bail!("find the new entry in {}", self.file.display());
        };
        let prepared = Prepared { file: self.file, text, loaded, index };
        let token = &prepared.runner().token_file;
        if token.exists() {
            bail!(
                "register `{}`: `{}` exists already; choose another --name, or remove it first",
                runner.name,
                token.display()
            );
        }
        Ok(prepared)
    }
}

/// The entry as TOML: what is set, and nothing that is a default.
fn written_form(runner: &Runner) -> String {
    let mut table = Table::new();
    let mut set = |key: &str, item: Item| drop(table.insert(key, item));
    let path = |path: &Path| value(path.to_string_lossy().into_owned());
    set("name", value(&runner.name));
    set("url", value(runner.url.as_str()));
    set("token_file", path(&runner.token_file));
    set("class", value(&runner.class));
    if let Some(limit) = runner.limit {
        set("limit", value(i64::from(limit)));
    }
    let files = [
        ("tls_ca_file", &runner.tls_ca_file),
        ("tls_cert_file", &runner.tls_cert_file),
        ("tls_key_file", &runner.tls_key_file),
    ];
    for (key, file) in files {
        if let Some(file) = file {
            set(key, path(file));
        }
    }
    if let Some(clone_url) = &runner.clone_url {
        set("clone_url", value(clone_url.as_str()));
    }
    for (key, on) in [("allow_insecure_http", runner.allow_insecure_http), ("direct_download", runner.direct_download)]
    {
        if on {
            set(key, value(true));
        }
    }
    let mut entries = ArrayOfTables::new();
    entries.push(table);
    let mut document = DocumentMut::new();
    document.insert("runner", Item::ArrayOfTables(entries));
    document.to_string()
}

impl Prepared {
    pub(super) fn config(&self) -> &Config {
        &self.loaded.config
    }

    /// The new entry, its paths resolved.
    pub(super) fn runner(&self) -> &Runner {
        &self.loaded.config.runner[self.index]
    }

    /// Writes token, then configuration, each atomically; all or nothing.
    pub(super) fn write(self, token: &Secret) -> anyhow::Result<Written> {
        let path = self.runner().token_file.clone();
        let in_token_file = || format!("write token file `{}`", path.display());
        let made = self.make_directory(&path).with_context(in_token_file)?;
        let written = write_token(&path, token).with_context(in_token_file);
        let written = written.and_then(|()| {
            let configured =
                self.write_config().with_context(|| format!("write configuration `{}`", self.file.display()));
            configured.inspect_err(|_| {
                // The error that is reported is the one that matters.
                let _ = std::fs::remove_file(&path);
            })
        });
        if let (Err(_), Some(made)) = (&written, made) {
            let _ = std::fs::remove_dir(made);
        }
        written.map(|()| Written { config: self.file, token: path })
    }

    /// The directory of the token file, 0700, with the daemon's owner; `Some` if it was made here.
    fn make_directory<'a>(&self, token: &'a Path) -> io::Result<Option<&'a Path>> {
        let dir = parent(token)?;
        std::fs::create_dir_all(parent(dir)?)?;
        match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => {
                if let Ok(metadata) = std::fs::metadata(&self.loaded.config.state_directory) {
                    give(&plain::open_directory(dir)?, &metadata)?;
                }
                Ok(Some(dir))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write_config(&self) -> io::Result<()> {
        let mut new = NamedTempFile::new_in(parent(&self.file)?)?;
        new.write_all(self.text.as_bytes())?;
        match std::fs::metadata(&self.file) {
            Ok(old) => {
                new.as_file().set_permissions(old.permissions())?;
                give(new.as_file(), &old)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                new.as_file().set_permissions(Permissions::from_mode(0o644))?
            }
            Err(error) => return Err(error),
        }
        new.as_file().sync_all()?;
        new.persist(&self.file)?;
        std::fs::File::open(parent(&self.file)?)?.sync_all()
    }
}

/// A temporary file has mode 0600 from the start; it gets its directory's owner, who is the daemon.
fn write_token(path: &Path, token: &Secret) -> io::Result<()> {
    let dir = parent(path)?;
    let mut new = NamedTempFile::new_in(dir)?;
    new.write_all(token.expose().as_bytes())?;
    new.write_all(b"\n")?;
    give(new.as_file(), &std::fs::metadata(dir)?)?;
    new.as_file().sync_all()?;
    new.persist_noclobber(path)?;
    std::fs::File::open(dir)?.sync_all()
}

/// Gives `file` to whom `like` belongs. Only root can, and only root needs to. The open file, not its name: in the
/// daemon's own directories the daemon's user could make that another file's meanwhile.
pub(super) fn give(file: &File, like: &std::fs::Metadata) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(like.uid()), Some(like.gid()))
    } else {
        Ok(())
    }
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no parent"))
}
