//! Who may have which entry? Pure: a job's tenant and a key, to the spaces that it reads and the one that it writes.
//!
//! | job | writes to | reads |
//! | --- | --- | --- |
//! | of a protected ref | `protected` | `protected` |
//! | of another, or where GitLab does not say | `open` | `open`; then, by a plain key, `protected` |
//!
//! So nothing that a job of an unprotected ref has written is ever read by one of a protected ref. A plain key is one
//! without GitLab's own ending (`-protected`, `-non_protected`, which it appends where a project keeps the two apart) that
//! the runner has not hashed: where they are apart, or nobody can tell, a job reads what its own kind wrote, and nothing
//! else. Each tenant is a project of one GitLab, or those of one GitLab that the operator has named together; no key leads
//! out of it.

use crate::hex::hex;
use crate::rules::path_fits;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use url::Url;

/// Characters of a tenant's name at most.
const NAME_CHARS_MAX: usize = 32;

/// Bytes of a key as it stands in a URL.
const KEY_BYTES_MAX: usize = 2048;

/// `[[cache.tenant]]`: projects of one GitLab that share a cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheTenant {
    /// Its name, which its directory has: see [`CacheTenant::is_name`].
    pub name: String,
    /// Patterns of projects' whole paths, whatever the case, or ids.
    pub projects: Vec<String>,
}

impl CacheTenant {
    /// Whether that can be a tenant's name: small letters, digits, `-` and `_`.
    #[must_use]
    pub fn is_name(name: &str) -> bool {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        (1..=NAME_CHARS_MAX).contains(&name.len()) && name.bytes().all(fits)
    }
}

/// Whose cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// GitLab's id of the job's project.
    pub project: u64,
    /// For people: the project's path, or the name by which the operator has named several together.
    pub name: String,
    /// A name for its directory: the same for the same project of the same GitLab.
    directory: String,
    /// Whether the job's ref is protected, by GitLab's word.
    pub protected: bool,
}

impl Tenant {
    /// The project's, at the GitLab of this URL. `protected`: `git_info.protected`.
    #[must_use]
    pub fn new(gitlab: &Url, project: u64, protected: Option<bool>) -> Self {
        let directory = format!("{}-{project}", of_gitlab(gitlab));
        Self { project, name: project.to_string(), directory, protected: protected == Some(true) }
    }

    /// The same, by the project's whole path too: the first of these tenants that has the project is whose it is.
    #[must_use]
    pub fn among(self, tenants: &[CacheTenant], gitlab: &Url, path: Option<&str>) -> Self {
        let has = |entry: &String| match entry.parse::<u64>() {
            Ok(id) => id == self.project,
            Err(_) => path.is_some_and(|path| path_fits(entry, path)),
        };
        match tenants.iter().find(|tenant| tenant.projects.iter().any(has)) {
            // No project's directory has a word in it.
            Some(CacheTenant { name, .. }) => {
                Self { directory: format!("{}-tenant-{name}", of_gitlab(gitlab)), name: name.clone(), ..self }
            }
            None => Self { name: path.map_or(self.name, str::to_owned), ..self },
        }
    }

    /// Its directory's name.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// Where it writes.
    #[must_use]
    pub fn writes(&self) -> Space {
        if self.protected { Space::Protected } else { Space::Open }
    }

    /// Where it reads an entry of this key, in this order.
    #[must_use]
    pub fn reads(&self, key: &Key) -> &'static [Space] {
        match (self.protected, key.is_plain()) {
            (true, _) => &[Space::Protected],
            (false, true) => &[Space::Open, Space::Protected],
            (false, false) => &[Space::Open],
        }
    }
}

/// Two GitLabs may both have a project 42.
fn of_gitlab(gitlab: &Url) -> String {
    let digest = Sha256::digest(gitlab.as_str().trim_end_matches('/').as_bytes());
    hex(&digest)[..8].to_owned()
}

/// A part of a tenant's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// Written by jobs of protected refs.
    Protected,
    /// Written by others.
    Open,
}

impl Space {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Protected, Self::Open];

    /// Its directory's name.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Open => "open",
        }
    }
}

/// What an entry is found by: the end of a path, as it stands in the URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// The project that a path of the store names, and the key behind it: `/cache/project/42/KEY`. `None`: it is no such
    /// path. Nothing is decoded, and what would need it to be a step up or a separator is no key (threats.md T7).
    #[must_use]
    pub fn of_path(path: &str) -> Option<(u64, Self)> {
        let (project, key) = path.strip_prefix("/cache/project/")?.split_once('/')?;
        let digits = (1..=19).contains(&project.len()) && project.bytes().all(|byte| byte.is_ascii_digit());
        if !digits || project.starts_with('0') || key.is_empty() || key.len() > KEY_BYTES_MAX {
            return None;
        }
        let decoded = decoded(key)?;
        let is_step = |part: &str| matches!(part, "" | "." | "..");
        if decoded.split(['/', '\\']).any(is_step) || decoded.contains('\0') {
            return None;
        }
        // `%2f` stands for a slash that somebody did not want to be seen.
        if key.to_ascii_lowercase().contains("%2f") || key.to_ascii_lowercase().contains("%5c") {
            return None;
        }
        Some((project.parse().ok()?, Self(key.to_owned())))
    }

    /// A name for its files: no two keys have the same.
    #[must_use]
    pub fn file(&self) -> String {
        hex(&Sha256::digest(self.0.as_bytes()))
    }

    /// For people: decoded, without what drives a terminal, and cut.
    #[must_use]
    pub fn words(&self) -> String {
        decoded(&self.0).unwrap_or_default().chars().filter(|c| !c.is_control()).take(255).collect()
    }

    /// Whether neither GitLab nor the runner has put into it whose it is.
    fn is_plain(&self) -> bool {
        let decoded = decoded(&self.0).unwrap_or_default();
        let last = decoded.rsplit('/').next().unwrap_or_default();
        let is_hashed = last.len() == 64 && last.bytes().all(|byte| byte.is_ascii_hexdigit());
        !is_hashed && !last.ends_with("-protected") && !last.ends_with("-non_protected")
    }
}

/// Percent-decoded; `None`: it is no UTF-8, or an escape is none.
fn decoded(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        if *byte == b'%' {
            let digits = bytes.get(at + 1..at + 3).filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))?;
            plain.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            at += 3;
        } else {
            plain.push(*byte);
            at += 1;
        }
    }
    String::from_utf8(plain).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(project: u64, protected: Option<bool>) -> Tenant {
        Tenant::new(&"https://gitlab.example".parse().unwrap(), project, protected)
    }

    fn key(key: &str) -> Key {
        Key::of_path(&format!("/cache/project/42/{key}")).unwrap().1
    }

    /// T18: the poisoning matrix: who has written, by which key, and who reads it then.
    #[test]
    fn what_an_unprotected_job_wrote_is_read_by_no_protected_one() {
        let hashed = "ab/ab12345678901234567890123456789012345678901234567890123456789012";
        let keys = ["deps-1", "deps-1-protected", "deps-1-non_protected", "a/b%20c", hashed];
        let jobs = [Some(true), Some(false), None];
        let mut cells = 0;
        for name in keys {
            let key = key(name);
            for writer in jobs {
                for reader in jobs {
                    let (writer, reader) = (tenant(42, writer), tenant(42, reader));
                    let reads = reader.reads(&key).contains(&writer.writes());
                    let plain = matches!(name, "deps-1" | "a/b%20c");
                    let expected = match (writer.protected, reader.protected) {
                        (true, true) | (false, false) => true,
                        (false, true) => false,
                        // What protected branches have built, where GitLab does not keep the two apart.
                        (true, false) => plain,
                    };
                    assert_eq!(reads, expected, "{name}: {writer:?} then {reader:?}");
                    cells += 1;
                }
            }
        }
        assert!(cells >= 40, "{cells}");
    }

    #[test]
    fn a_tenant_is_a_project_of_one_gitlab() {
        let other = Tenant::new(&"https://other.example".parse().unwrap(), 42, None);
        let directories = [tenant(42, None), tenant(43, None), other].map(|t| t.directory().to_owned());
        assert_eq!(directories.iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "{directories:?}");
        assert_eq!(tenant(42, Some(true)).directory(), tenant(42, None).directory());
        let slash = Tenant::new(&"https://gitlab.example/".parse().unwrap(), 42, None);
        assert_eq!(slash.directory(), tenant(42, None).directory());
    }

    /// T18: projects that the operator names together share, by path or id, at one GitLab, and nobody else does.
    #[test]
    fn projects_share_as_the_operator_names_them() {
        let of = |name: &str, projects: &[&str]| CacheTenant {
            name: name.into(),
            projects: projects.iter().map(|project| (*project).to_owned()).collect(),
        };
        let tenants = [of("web", &["shop/*", "77"]), of("late", &["shop/**"])];
        let (here, there): (Url, Url) =
            ("https://gitlab.example".parse().unwrap(), "https://other.example".parse().unwrap());
        let directory = |gitlab: &Url, project: u64, path: Option<&str>| {
            Tenant::new(gitlab, project, None).among(&tenants, gitlab, path).directory().to_owned()
        };
        let web = directory(&here, 1, Some("shop/front"));
        assert_eq!(web, directory(&here, 2, Some("SHOP/back")));
        assert_eq!(web, directory(&here, 77, None));
        assert_ne!(web, directory(&there, 1, Some("shop/front")), "another GitLab's");
        assert_ne!(web, directory(&here, 1, Some("shop/sub/front")), "a star stops at a slash");
        assert_eq!(directory(&here, 5, Some("shop/sub/front")), directory(&here, 6, Some("shop/sub/back")));
        for (project, path) in [(1, Some("shop")), (7, Some("other/x")), (777, None), (42, Some("77"))] {
            let own = Tenant::new(&here, project, None).directory().to_owned();
            assert_eq!(directory(&here, project, path), own, "{project} {path:?}");
        }
        let tenant = Tenant::new(&here, 1, Some(true)).among(&tenants, &here, Some("shop/front"));
        assert_eq!((tenant.writes(), tenant.name.as_str(), tenant.project), (Space::Protected, "web", 1));
        for (name, is) in [("web", true), ("a_b-1", true), ("", false), ("../x", false), ("A", false), ("a/b", false)] {
            assert_eq!(CacheTenant::is_name(name), is, "{name}");
        }
    }

    /// T7: no path leads anywhere else.
    #[test]
    fn paths_that_are_no_keys_match_nothing() {
        for path in [
            "/cache/project/42",
            "/cache/project/42/",
            "/cache/project/042/k",
            "/cache/project/+42/k",
            "/cache/project/18446744073709551616/k",
            "/cache/project//k",
            "/cache/project/42/../43/k",
            "/cache/project/42/%2e%2e/43/k",
            "/cache/project/42/a%2f..%2fb",
            "/cache/project/42/a%5cb",
            "/cache/project/42//k",
            "/cache/project/42/./k",
            "/cache/project/42/k%",
            "/cache/project/42/k%zz",
            "/cache/project/42/%00",
            "/cache/project/42/%ff",
            "/cache/runner/abc/project/42/k",
            "/bucket/project/42/k",
            "/cache/../cache/project/42/k",
        ] {
            assert_eq!(Key::of_path(path), None, "{path}");
        }
        assert_eq!(Key::of_path(&format!("/cache/project/42/{}", "k".repeat(KEY_BYTES_MAX + 1))), None);
        let (project, found) = Key::of_path("/cache/project/7/a/b%20c-1").unwrap();
        assert_eq!((project, found.words()), (7, "a/b c-1".into()));
        assert_ne!(key("a").file(), key("A").file());
    }
}
