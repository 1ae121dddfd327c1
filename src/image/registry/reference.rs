//! Where in which registry: `oci://registry.example.com:5000/images/debian-12-shell:1`.

use super::RegistryError;
use std::fmt;
use std::net::IpAddr;
use url::{Host, Url};

/// What a reference begins with.
pub const SCHEME: &str = "oci://";

/// The tag of a reference that says none.
const TAG: &str = "latest";

/// Bytes of a repository's name, and of a tag, at most, as the distribution specification has it.
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// A place in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `registry.example.com:5000`.
    registry: String,
    /// `images/debian-12-shell`.
    repository: String,
    /// A tag, or `sha256:…`.
    version: String,
}

impl Reference {
    /// Reads one.
    ///
    /// # Errors
    /// [`RegistryError::Reference`].
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        let bad = |why| RegistryError::Reference { text: text.escape_debug().to_string(), why };
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| bad("it does not begin with oci://"))?;
        let (registry, path) = rest.split_once('/').ok_or_else(|| bad("it names no repository"))?;
        let is_host = Url::parse(&format!("https://{registry}/")).is_ok_and(|url| {
            url.host().is_some() && url.username().is_empty() && url.password().is_none() && url.path() == "/"
        });
        if registry.is_empty() || !is_host || !registry.is_ascii() {
            return Err(bad(if registry.contains('@') {
                "it holds a password, which belongs into a file (--auth-file)"
            } else {
                "it names no registry"
            }));
        }
        let (path, digest) = match path.split_once('@') {
            Some((path, digest)) if is_digest(digest) => (path, Some(digest)),
            Some(_) => return Err(bad("what follows the @ is no sha256:…")),
            None => (path, None),
        };
        let (repository, tag) = path.split_once(':').unwrap_or((path, TAG));
        if !is_repository(repository) {
            return Err(bad("it names no repository (lower-case letters and digits, with - _ . / between them)"));
        }
        if !is_tag(tag) {
            return Err(bad("what follows the colon is no tag (letters, digits, _ . -; at most 128)"));
        }
        Ok(Self {
            registry: registry.to_ascii_lowercase(),
            repository: repository.to_owned(),
            version: digest.unwrap_or(tag).to_owned(),
        })
    }

    /// The registry, as credentials name it.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, or the digest.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The digest, where it names one.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        Some(self.version.as_str()).filter(|version| version.contains(':'))
    }

    /// Where the registry is asked: in the clear only on this host's loopback, or by word.
    pub(super) fn base(&self, plain_http: bool, has_ca: bool) -> Result<Url, RegistryError> {
        let secure = format!("https://{}/", self.registry);
        let bad = |_| RegistryError::Reference { text: self.to_string(), why: "it names no registry" };
        let url = Url::parse(&secure).map_err(bad)?;
        if plain_http || is_loopback(&url) && !has_ca {
            return Url::parse(&format!("http://{}/", self.registry)).map_err(bad);
        }
        Ok(url)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.digest().is_some() { '@' } else { ':' };
        write!(f, "{SCHEME}{}/{}{between}{}", self.registry, self.repository, self.version)
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// `sha256:` and 64 hexadecimal digits.
pub(super) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    })
}

fn is_repository(name: &str) -> bool {
    let alone = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let part = |part: &str| {
        let (first, last) = (part.bytes().next(), part.bytes().last());
        first.is_some_and(alone)
            && last.is_some_and(alone)
            && part.bytes().all(|byte| alone(byte) || matches!(byte, b'-' | b'_' | b'.'))
            && !part.contains("..")
    };
    name.len() <= NAME_BYTES_MAX && name.split('/').all(part)
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= TAG_BYTES_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_reads_back_as_it_was_written() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, parts, shown) in [
            ("oci://r.example/a", ("r.example", "a", "latest"), "oci://r.example/a:latest"),
            (
                "oci://R.example:5000/a/b-c_d.e:V1.2",
                ("r.example:5000", "a/b-c_d.e", "V1.2"),
                "oci://r.example:5000/a/b-c_d.e:V1.2",
            ),
            ("oci://[::1]:5000/a:1", ("[::1]:5000", "a", "1"), "oci://[::1]:5000/a:1"),
        ] {
            let found = Reference::parse(text).unwrap();
            assert_eq!((found.registry(), found.repository(), found.version()), parts);
            assert_eq!(found.to_string(), shown);
        }
        let by_digest = Reference::parse(&format!("oci://r/a:1@{digest}")).unwrap();
        assert_eq!((by_digest.digest(), by_digest.to_string()), (Some(&*digest), format!("oci://r/a@{digest}")));
    }

    #[test]
    fn what_leads_elsewhere_is_no_reference() {
        for (text, why) in [
            ("registry/a", "does not begin with oci://"),
            ("oci://registry", "names no repository"),
            ("oci:///a", "names no registry"),
            ("oci://user:secret@registry/a", "holds a password"),
            ("oci://reg istry/a", "names no registry"),
            ("oci://r/../a", "names no repository"),
            ("oci://r/a/../b", "names no repository"),
            ("oci://r/A", "names no repository"),
            ("oci://r/a?x", "names no repository"),
            ("oci://r/a\n", "names no repository"),
            ("oci://r/a:", "is no tag"),
            ("oci://r/a:../x", "is no tag"),
            ("oci://r/a:x y", "is no tag"),
            ("oci://r/a@md5:00", "is no sha256"),
        ] {
            let error = Reference::parse(text).unwrap_err().to_string();
            assert!(
                error.contains(why) && !error.contains('\n') && error.contains("oci://registry.example.com"),
                "{error}"
            );
        }
    }

    /// Without a word nothing goes in the clear but on this host's own loopback.
    #[test]
    fn in_the_clear_is_by_word_or_on_loopback() {
        let base = |text: &str, plain, ca| Reference::parse(text).unwrap().base(plain, ca).unwrap().to_string();
        assert_eq!(base("oci://r.example/a", false, false), "https://r.example/");
        assert_eq!(base("oci://r.example/a", true, false), "http://r.example/");
        for loopback in ["127.0.0.1:5000", "localhost:5000", "[::1]:5000"] {
            assert_eq!(base(&format!("oci://{loopback}/a"), false, false), format!("http://{loopback}/"));
            assert_eq!(base(&format!("oci://{loopback}/a"), false, true), format!("https://{loopback}/"));
        }
        assert_eq!(base("oci://localhost.example/a", false, false), "https://localhost.example/");
    }
}
