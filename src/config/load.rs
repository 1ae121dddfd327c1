//! Puts defaults, file and environment together, in this order, and has the result judged.

use super::foreign;
use super::origin::{ENV_PREFIX, Origins, line_of, nearest_name};
use super::validate::{Problem, Problems, validate};
use super::{Config, Origin};
use crate::files::plain;
use crate::files::private::CREDENTIALS_VARIABLE;
use crate::web::Address;
use figment::Figment;
use figment::error::Kind;
use figment::providers::{Format as _, Serialized, Toml};
use figment::value::Value;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use toml_edit::Document;

/// A configuration file has a few kilobytes; this is a wrong path.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// A path that begins so is a credential that systemd gives to the service.
const CREDENTIALS_PREFIX: &str = "$CREDENTIALS_DIRECTORY";

/// Where those of the packaged service are, for commands that systemd did not start.
const OUR_CREDENTIALS: &str = "/run/credentials/dayfly.service";

/// Opening brackets in a variable's value at most: figment's reader of values recurses without a bound of its own, in
/// debug builds with 9 KiB of a thread's 2 MiB each time. A list of that many runners belongs in the file.
const VALUE_BRACKETS_MAX: usize = 64;

/// A configuration and where it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The values. Relative paths are resolved against the file's directory.
    pub config: Config,
    /// The file, if one was read.
    pub file: Option<PathBuf>,
    /// What is allowed but unwise; to be shown once at start.
    pub warnings: Vec<Problem>,
    /// Where each value came from.
    pub origins: Origins,
}

/// Why the configuration cannot be used. Exit code 78.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("read configuration `{}`; `dayfly register` makes one, `--config FILE` names another", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("parse configuration `{}`, line {line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key that does not exist, or a value of the wrong form.
    #[error("configuration key {0}")]
    Key(Box<Problem>),
    /// Values that make no sense, all of them.
    #[error("configuration key {0}")]
    Invalid(Problems),
}

impl Config {
    /// Reads defaults, `file` and the environment, and validates.
    ///
    /// # Errors
    /// [`ConfigError`], naming key and source.
    pub fn load(file: &Path) -> Result<Loaded, ConfigError> {
        let text = read(file).map_err(|source| ConfigError::Read { path: file.to_owned(), source })?;
        Self::assemble(Some((absolute(file), text)), environment())
    }

    /// Like [`Config::load`], for the commands that can do without a file (`image`, `doctor`).
    ///
    /// # Errors
    /// As [`Config::load`], but for a file that does not exist.
    pub fn load_or_default(file: &Path) -> Result<Loaded, ConfigError> {
        match Self::load(file) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Self::assemble(None, environment())
            }
            other => other,
        }
    }

    /// Reads defaults, `text` as the content of `file`, and these variables, and validates.
    /// `register` asks it about a file that it is going to write.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn assemble(
        file: Option<(PathBuf, String)>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Loaded, ConfigError> {
        let environment: Vec<_> = environment.into_iter().collect();
        let credentials = environment.iter().find(|(name, _)| name == CREDENTIALS_VARIABLE);
        let credentials = credentials.map_or_else(|| PathBuf::from(OUR_CREDENTIALS), |(_, value)| value.into());
        let environment = configuring(environment);
        let document = match file {
            Some((path, text)) => Some(parse(path, text)?),
            None => None,
        };
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some((_, document)) = &document {
            figment = figment.merge(Toml::string(document.raw()));
        }
        for (key, (_, value)) in &environment {
            // Never fails: what is no number, truth value or list is text. So is what is nested too deep for its reader.
            let value = if value.matches(['[', '{']).count() > VALUE_BRACKETS_MAX {
                Value::from(value.as_str())
            } else {
                let Ok(value) = value.parse();
                value
            };
            figment = figment.merge(Serialized::default(key, value));
        }
        let origins = Origins::new(document, environment.into_iter().map(|(key, (name, _))| (key, name)).collect());
        let mut config: Self =
            figment.extract().map_err(|error| ConfigError::Key(Box::new(explain(&error, &origins))))?;
        if let Some(dir) = origins.file().and_then(Path::parent) {
            config.resolve_paths(dir, &credentials);
        }
        let (errors, warnings) = validate(&config, &origins);
        if !errors.is_empty() {
            return Err(ConfigError::Invalid(Problems(errors)));
        }
        // Read for one version more, where a class has no word of its own.
        for class in &mut config.class {
            class.network = class.network.or(config.network.mode);
        }
        Ok(Loaded { config, file: origins.file().map(Path::to_owned), warnings, origins })
    }

    fn resolve_paths(&mut self, dir: &Path, credentials: &Path) {
        let own = [&mut self.state_directory, &mut self.runtime_directory, &mut self.image_directory];
        let runners = self.runner.iter_mut().flat_map(|runner| {
            let optional = [&mut runner.tls_ca_file, &mut runner.tls_cert_file, &mut runner.tls_key_file];
            optional.into_iter().flatten().chain([&mut runner.token_file])
        });
        if let Some(Address::Unix(path)) = &mut self.status.listen {
            *path = dir.join(&path);
        }
        let status = &mut self.status;
        let status =
            [&mut status.token_file, &mut status.tls_cert_file, &mut status.tls_key_file, &mut status.fleet_ca_file];
        let upstream = self.cache.upstream.iter_mut();
        let upstream = upstream.flat_map(|of| of.tls_ca_file.iter_mut().chain([&mut of.secret_key_file]));
        for path in own.into_iter().chain(runners).chain(status.into_iter().flatten()).chain(upstream) {
            // An empty path stays one, for validation to name it.
            if path.as_os_str().is_empty() {
                continue;
            }
            *path = match path.strip_prefix(CREDENTIALS_PREFIX) {
                Ok(name) => credentials.join(name),
                Err(_) => dir.join(&path),
            };
        }
    }
}

/// The variables of this process. Those that are no text cannot be ours.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

fn read(file: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    plain::open_chosen(file)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {FILE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

fn absolute(file: &Path) -> PathBuf {
    std::path::absolute(file).unwrap_or_else(|_| file.to_owned())
}

fn parse(path: PathBuf, text: String) -> Result<(PathBuf, Document<String>), ConfigError> {
    let lines = text.clone();
    match Document::parse(text) {
        Ok(document) => Ok((path, document)),
        Err(error) => {
            let line = line_of(&lines, error.span().map_or(0, |span| span.start));
            Err(ConfigError::Syntax { path, line, message: error.message().trim().replace('\n', ", ") })
        }
    }
}

/// The variables that are configuration, by key: `DAYFLY_LOG__LEVEL` is `log.level`.
///
/// Other programs of ours have variables too (`DAYFLY_CONFIG`), so a name without `__` counts only
/// if it is, or was surely meant to be, a key of the top level.
fn configuring(environment: impl IntoIterator<Item = (String, String)>) -> BTreeMap<String, (String, String)> {
    let top_level: Vec<String> = match serde_json::to_value(Config::default()) {
        Ok(serde_json::Value::Object(keys)) => {
            keys.into_iter().filter(|(_, v)| !v.is_object()).map(|(k, _)| k).collect()
        }
        _ => Vec::new(),
    };
    let mut found = BTreeMap::new();
    for (name, value) in environment {
        let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
        let key = rest.to_ascii_lowercase().replace("__", ".");
        let meant = nearest_name(&key, top_level.iter().map(String::as_str));
        if key.contains('.') || meant.is_some_and(|meant| meant.len().abs_diff(key.len()) <= 2) {
            found.insert(key, (name, value));
        }
    }
    found
}

/// One clear sentence from figment's error: which key, where, what is wrong, what was meant.
fn explain(error: &figment::Error, origins: &Origins) -> Problem {
    let parent = error.path.join(".");
    let child = |name: &str| match error.path.last() {
        None => name.to_owned(),
        // For an unknown key figment's path ends in the key itself.
        Some(last) if last == name => parent.clone(),
        Some(_) => format!("{parent}.{name}"),
    };
    match &error.kind {
        Kind::UnknownField(name, known) => {
            let remedy = match (foreign::remedy(name), nearest_name(name, known.iter().copied())) {
                // Of another's configuration, and no slip.
                (Some(remedy), _) => remedy.to_owned(),
                (None, Some(meant)) => format!("did you mean `{meant}`?"),
                (None, None) => format!("known here: {}", known.join(", ")),
            };
            Problem::at(origins, &child(name), "does not exist", remedy)
        }
        Kind::MissingField(name) => {
            Problem::at(origins, &child(name), "is missing", "add it; config.example.toml explains it")
        }
        Kind::InvalidType(found, wanted) | Kind::InvalidValue(found, wanted) => {
            Problem::at(origins, &parent, format!("is {found}, not {wanted}"), "config.example.toml shows its form")
        }
        Kind::UnknownVariant(name, known) => {
            Problem::at(origins, &parent, format!("cannot be `{name}`"), format!("it is one of: {}", known.join(", ")))
        }
        other => Problem::at(origins, &parent, other.to_string(), "config.example.toml shows its form"),
    }
}

impl Loaded {
    /// All values with their origin, sorted by key: what `dayfly check` prints. No secret is in a
    /// [`Config`].
    #[must_use]
    pub fn resolved(&self) -> Vec<(String, String, Origin)> {
        let mut values = Vec::new();
        if let Ok(value) = serde_json::to_value(&self.config) {
            leaves("", &value, &mut values);
        }
        let shown = |key: &str, value: String| if is_variable(key) { without_value(&value) } else { value };
        values.into_iter().map(|(key, value)| (key.clone(), shown(&key, value), self.origins.of(&key))).collect()
    }
}

/// `runner.0.environment.2`.
fn is_variable(key: &str) -> bool {
    matches!(key.split('.').collect::<Vec<_>>()[..], ["runner", _, "environment", _])
}

/// A variable's value may be a secret for all that we know.
fn without_value(shown: &str) -> String {
    shown.split_once('=').map_or_else(|| shown.to_owned(), |(name, _)| format!("{name}=…\""))
}

fn leaves(key: &str, value: &serde_json::Value, found: &mut Vec<(String, String)>) {
    let child = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        serde_json::Value::Object(members) => {
            members.iter().for_each(|(name, value)| leaves(&child(name), value, found))
        }
        serde_json::Value::Array(elements) if elements.is_empty() => found.push((key.to_owned(), "none".into())),
        serde_json::Value::Array(elements) => {
            elements.iter().enumerate().for_each(|(i, value)| leaves(&child(&i.to_string()), value, found))
        }
        serde_json::Value::Null => found.push((key.to_owned(), "not set".into())),
        other => found.push((key.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U16: a path may name the directory by systemd's own variable.
    #[test]
    fn a_credential_may_be_named_by_systemds_variable() {
        let text = "[[class]]\nname = \"s\"\nimage = \"i\"\n[[runner]]\nname = \"ci\"\nurl = \"https://g.example\"\nclass = \"s\"\n\
                    token_file = \"$CREDENTIALS_DIRECTORY/ci\"\ntls_cert_file = \"c\"\ntls_key_file = \"$CREDENTIALS_DIRECTORY/key\"\n";
        let runner = |environment: &[(&str, &str)]| {
            let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            Config::assemble(Some(("/etc/dayfly/config.toml".into(), text.into())), environment)
                .unwrap()
                .config
                .runner
                .remove(0)
        };
        let given = runner(&[("CREDENTIALS_DIRECTORY", "/run/credentials/other.service")]);
        assert_eq!(given.token_file, Path::new("/run/credentials/other.service/ci"));
        assert_eq!(given.tls_key_file.as_deref(), Some(Path::new("/run/credentials/other.service/key")));
        assert_eq!(given.tls_cert_file.as_deref(), Some(Path::new("/etc/dayfly/c")));
        assert_eq!(runner(&[]).token_file, Path::new("/run/credentials/dayfly.service/ci"));
    }

    /// U29: a configuration that is a FIFO is refused at once; one that is a link is the operator's own.
    #[test]
    fn a_configuration_is_a_file_or_a_link_to_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "a = 1").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        plain::tests::fifo(&path("fifo"));
        assert_eq!(read(&path("link")).unwrap(), "a = 1");
        let fifo = path("fifo");
        let refused = plain::tests::in_time(move || read(&fifo)).unwrap_err();
        assert_eq!(refused.to_string(), "is no plain file");
    }
}
