//! As whom does a registry know us? Credentials come from a file of Docker's form, never from arguments or variables:
//! `{"auths": {"registry.example.com": {"auth": "BASE64 OF user:password"}}}`.

use super::RegistryError;
use crate::files::{plain, private};
use crate::secret::Secret;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Bytes of such a file at most.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// How we log in.
pub(super) enum Login {
    /// `user:password`.
    Basic(Secret),
    /// A token that the registry takes as it is.
    Bearer(Secret),
}

impl Login {
    /// Value of the header `Authorization`.
    pub(super) fn header(&self) -> Secret {
        match self {
            Self::Basic(login) => Secret::new(format!("Basic {}", STANDARD.encode(login.expose()))),
            Self::Bearer(token) => Secret::new(format!("Bearer {}", token.expose())),
        }
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
struct Entry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    registrytoken: Option<String>,
}

/// What the file says of this registry; `None`: nothing, and it is asked without.
///
/// # Errors
/// [`RegistryError::Credentials`]: a file that was named is not there, others may read it, it makes no sense, or it keeps
/// passwords where we cannot get them.
pub(super) fn find(file: Option<&Path>, registry: &str) -> Result<Option<Login>, RegistryError> {
    let (path, named) = match file {
        Some(path) => (path.to_owned(), true),
        None => match dockers_own(|name| std::env::var_os(name).map(PathBuf::from)) {
            Some(path) => (path, false),
            None => return Ok(None),
        },
    };
    let failed = |why: String| RegistryError::Credentials { path: path.clone(), why };
    let file = match plain::open_chosen(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !named => return Ok(None),
        opened => opened.map_err(|error| failed(error.to_string()))?,
    };
    let found = file.metadata().map_err(|error| failed(error.to_string()))?;
    if let Some(mode) = private::too_open(&path, &found) {
        return Err(failed(format!("mode {mode:o} lets others read the passwords in it; make it 0600")));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    of(&text, registry).map_err(failed)
}

/// Where Docker and its like have theirs.
fn dockers_own(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let docker = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")))?;
    Some(docker.join("config.json"))
}

fn of(text: &str, registry: &str) -> Result<Option<Login>, String> {
    // What it says exactly may have a password in it.
    let file: File = serde_json::from_str(text).map_err(|error| {
        format!("it is no config.json of Docker's (line {}, column {})", error.line(), error.column())
    })?;
    let is_it = |key: &String| {
        let host = key.trim_start_matches("https://").trim_start_matches("http://");
        host.split('/').next() == Some(registry)
    };
    let helper = file.helpers.iter().find(|(key, _)| is_it(key)).map(|(_, helper)| helper);
    let Some((_, entry)) = file.auths.iter().find(|(key, _)| is_it(key)) else {
        return match helper {
            Some(helper) => Err(elsewhere(helper)),
            None => Ok(None),
        };
    };
    if let Some(token) = &entry.registrytoken {
        return Ok(Some(Login::Bearer(Secret::new(token.as_str()))));
    }
    if let Some(auth) = entry.auth.as_deref().filter(|auth| !auth.is_empty()) {
        let login = STANDARD.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let login = login.map(|login| login.trim_end_matches('\0').to_owned()).filter(|login| login.contains(':'));
        let login = login.ok_or_else(|| format!("`auth` of `{registry}` is no base64 of user:password"))?;
        return Ok(Some(Login::Basic(Secret::new(login))));
    }
    match (&entry.username, &entry.password) {
        (Some(user), Some(password)) => Ok(Some(Login::Basic(Secret::new(format!("{user}:{password}"))))),
        // What `docker login` leaves where a helper has the password.
        _ => match helper.or(file.store.as_ref()) {
            Some(helper) => Err(elsewhere(helper)),
            None => Err(format!("`{registry}` has neither `auth` nor `username` and `password`")),
        },
    }
}

fn elsewhere(helper: &str) -> String {
    format!(
        "it leaves passwords to the program docker-credential-{}; give a file that holds one by --auth-file",
        helper.escape_debug()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn shown(found: Result<Option<Login>, String>) -> Result<String, String> {
        found.map(|login| login.map_or("none".into(), |login| login.header().expose().to_owned()))
    }

    #[test]
    fn a_login_is_found_by_its_registry() {
        // "user:pass"
        let text = r#"{"auths": {
            "https://a.example/v1/": {"auth": "dXNlcjpwYXNz"},
            "b.example:5000": {"username": "u", "password": "p"},
            "c.example": {"registrytoken": "t"},
            "d.example": {},
            "e.example": {"auth": "%%%"}
        }, "credHelpers": {"f.example": "gcloud"}, "HttpHeaders": {}}"#;
        for (registry, header) in [
            ("a.example", "Basic dXNlcjpwYXNz"),
            ("b.example:5000", "Basic dTpw"),
            ("c.example", "Bearer t"),
            ("b.example", "none"),
            ("a.example.evil", "none"),
        ] {
            assert_eq!(shown(of(text, registry)).unwrap(), header, "{registry}");
        }
        for (registry, why) in
            [("d.example", "neither"), ("e.example", "no base64"), ("f.example", "docker-credential-gcloud")]
        {
            assert!(shown(of(text, registry)).unwrap_err().contains(why), "{registry}");
        }
        let stored = r#"{"auths": {"a": {}}, "credsStore": "pass"}"#;
        assert!(shown(of(stored, "a")).unwrap_err().contains("docker-credential-pass"));
        let broken = shown(of(r#"{"auths": {"a": "hunter2"#, "a")).unwrap_err();
        assert!(broken.contains("line 1") && !broken.contains("hunter2"), "{broken}");
    }

    #[test]
    fn a_file_that_others_read_is_refused_and_one_that_was_named_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert!(find(Some(&path), "r").is_err());
        fs::write(&path, "{}").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = find(Some(&path), "r").err().unwrap().to_string();
        assert!(error.contains("make it 0600"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(find(Some(&path), "r").unwrap().is_none());
        let variable = |name: &str| (name == "HOME").then(|| PathBuf::from("/home/u"));
        assert_eq!(dockers_own(variable).unwrap(), Path::new("/home/u/.docker/config.json"));
    }
}
