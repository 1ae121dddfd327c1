//! Where the files come from that a pipeline includes: the repository around it, and nothing else of the host.
//!
//! A pipeline may be a stranger's: a name leads to a regular file below the top, through directories that are no
//! links, or nowhere. Looking for what a wildcard matches has bounds, too. Blocks; used before anything runs.

use dayfly::files::plain;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

/// Directories that a wildcard looks into, inside each other.
const DEPTH_MAX: usize = 32;
/// Entries that a wildcard looks at. The largest public repositories have 500,000 files; few keep their pipelines
/// beside them.
const ENTRIES_MAX: usize = 200_000;

/// What `include:local` reads, and the variables that may stand in its names and in inputs.
pub trait Sources {
    /// The text of a file at `path` below the top; `None`: there is none.
    ///
    /// # Errors
    /// In words that go on after the file's name: it leads out of the repository, is no file, is too long.
    fn read(&self, path: &str) -> Result<Option<String>, String>;

    /// Paths of all files that `pattern` matches, in order of their bytes.
    ///
    /// # Errors
    /// In words, as with `read`.
    fn matching(&self, pattern: &str) -> Result<Vec<String>, String>;

    /// A variable's value, of those that are known before a job runs.
    fn variable(&self, name: &str) -> Option<String>;
}

/// Files in memory: none at all for a text that stands alone, or those of a test.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Path and text.
    pub files: BTreeMap<String, String>,
    /// Variables.
    pub variables: BTreeMap<String, String>,
}

impl Sources for Memory {
    fn read(&self, path: &str) -> Result<Option<String>, String> {
        Ok(self.files.get(&relative(path)?).cloned())
    }

    fn matching(&self, pattern: &str) -> Result<Vec<String>, String> {
        let pattern = relative(pattern)?;
        Ok(self.files.keys().filter(|path| matches(&pattern, path)).cloned().collect())
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }
}

/// A directory: the top of a repository.
#[derive(Clone, Debug)]
pub struct Directory {
    top: PathBuf,
    variables: BTreeMap<String, String>,
}

impl Directory {
    /// The repository around the pipeline file `file`: the nearest directory upwards that has a `.git`, else the one
    /// that it is in. git is not asked: a repository's configuration may name any directory as its top.
    #[must_use]
    pub fn around(file: &Path, variables: BTreeMap<String, String>) -> Self {
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        let own = file.parent().unwrap_or(Path::new("/"));
        let own = own.canonicalize().unwrap_or_else(|_| own.to_owned());
        let top = own.ancestors().find(|path| path.join(".git").symlink_metadata().is_ok()).unwrap_or(&own).to_owned();
        Self { top, variables }
    }

    /// The directory `top`, whatever is in it.
    #[cfg(test)]
    pub(crate) fn at(top: &Path, variables: BTreeMap<String, String>) -> Self {
        Self { top: top.to_owned(), variables }
    }

    /// Opens what `path` names, through no link.
    fn open(&self, path: &str) -> Result<Option<fs::File>, String> {
        let mut place = self.top.clone();
        let mut parts = Path::new(path).components().peekable();
        while let Some(part) = parts.next() {
            place.push(part);
            let Ok(metadata) = place.symlink_metadata() else { return Ok(None) };
            match (metadata.is_symlink(), parts.peek().is_some()) {
                (true, _) => return Err("is a link or behind one; exec follows none".to_owned()),
                (false, true) if !metadata.is_dir() => return Ok(None),
                (false, false) if !metadata.is_file() => return Err("is no file".to_owned()),
                _ => {}
            }
        }
        plain::open(&place).map(Some).map_err(|error| format!("cannot be read: {error}"))
    }
}

impl Sources for Directory {
    fn read(&self, path: &str) -> Result<Option<String>, String> {
        let Some(file) = self.open(&relative(path)?)? else { return Ok(None) };
        read_text(file).map(Some).map_err(|error| format!("cannot be read: {error}"))
    }

    fn matching(&self, pattern: &str) -> Result<Vec<String>, String> {
        let pattern = relative(pattern)?;
        // Only what stands before the first wildcard is walked.
        let literal = pattern.split('*').next().unwrap_or_default();
        let start = literal.rsplit_once('/').map_or("", |(directory, _)| directory);
        let mut found = Vec::new();
        let mut seen = 0_usize;
        let mut open = vec![(start.to_owned(), 0_usize)];
        // The way to the first directory may hold links as well.
        let mut place = self.top.clone();
        for part in Path::new(start).components() {
            place.push(part);
            if !place.symlink_metadata().is_ok_and(|m| m.is_dir()) {
                return Ok(found);
            }
        }
        while let Some((directory, depth)) = open.pop() {
            let Ok(entries) = fs::read_dir(self.top.join(&directory)) else { continue };
            for entry in entries.flatten() {
                seen += 1;
                if seen > ENTRIES_MAX {
                    return Err(format!("is looked for among more than {ENTRIES_MAX} files; name a directory"));
                }
                let Ok(name) = entry.file_name().into_string() else { continue };
                let path = if directory.is_empty() { name.clone() } else { format!("{directory}/{name}") };
                let Ok(kind) = entry.file_type() else { continue };
                if kind.is_dir() && name != ".git" && depth < DEPTH_MAX {
                    open.push((path, depth + 1));
                } else if kind.is_file() && matches(&pattern, &path) {
                    found.push(path);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }
}

/// A file's text, if it is one of at most a mebibyte.
pub(crate) fn read_text(file: fs::File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.take(super::parse::FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > super::parse::FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The path below the top; a slash at its beginning means the top as well.
fn relative(path: &str) -> Result<String, String> {
    let mut parts = Vec::new();
    for part in Path::new(path.trim_start_matches('/')).components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str().unwrap_or_default()),
            Component::CurDir => {}
            _ => return Err("leads out of the repository".to_owned()),
        }
    }
    if parts.first() == Some(&".git") || path.contains('\0') {
        return Err("is no file of the repository".to_owned());
    }
    Ok(parts.join("/"))
}

/// GitLab's wildcards: `*` is anything but a slash, `**` anything. The work is the product of both lengths at most.
fn matches(pattern: &str, path: &str) -> bool {
    #[derive(Clone, Copy, PartialEq)]
    enum Token {
        Byte(u8),
        Star,
        Stars,
    }
    let mut tokens = Vec::new();
    for byte in pattern.bytes() {
        match (byte, tokens.last()) {
            (b'*', Some(Token::Star)) => {
                tokens.pop();
                tokens.push(Token::Stars);
            }
            (b'*', Some(Token::Stars)) => {}
            (b'*', _) => tokens.push(Token::Star),
            _ => tokens.push(Token::Byte(byte)),
        }
    }
    // `reached[n]`: the first n tokens match what has been read.
    let mut reached = vec![false; tokens.len() + 1];
    reached[0] = true;
    let skip_stars = |reached: &mut Vec<bool>| {
        for (n, token) in tokens.iter().enumerate() {
            if reached[n] && !matches!(token, Token::Byte(_)) {
                reached[n + 1] = true;
            }
        }
    };
    skip_stars(&mut reached);
    for byte in path.bytes() {
        let mut next = vec![false; tokens.len() + 1];
        for (n, token) in tokens.iter().enumerate().filter(|(n, _)| reached[*n]) {
            match token {
                Token::Byte(wanted) => next[n + 1] |= *wanted == byte,
                Token::Star => next[n] |= byte != b'/',
                Token::Stars => next[n] = true,
            }
        }
        reached = next;
        skip_stars(&mut reached);
    }
    reached.last() == Some(&true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_in_gitlab() {
        for (pattern, path, expected) in [
            ("ci/*.yml", "ci/a.yml", true),
            ("ci/*.yml", "ci/b/a.yml", false),
            ("ci/**.yml", "ci/a.yml", true),
            ("ci/**.yml", "ci/b/c/a.yml", true),
            ("ci/**/*.yml", "ci/b/a.yml", true),
            ("ci/**/*.yml", "ci/a.yml", false),
            ("ci/*/a.yml", "ci/b/a.yml", true),
            ("*", "a", true),
            ("*", "a/b", false),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxbyy", false),
            ("a.yml", "a_yml", false),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
        let stars = "*a".repeat(40);
        assert!(!matches(&stars, &"a".repeat(39)), "and soon");
    }

    /// U33: what is included lies inside the repository, whatever a name or a link says
    #[test]
    fn nothing_outside_the_repository_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("repository");
        fs::create_dir_all(top.join(".git")).unwrap();
        fs::create_dir_all(top.join("sub/deep")).unwrap();
        for path in ["a.yml", "sub/b.yml", "sub/deep/c.yml", ".git/d.yml", "../secret.yml"] {
            fs::write(top.join(path), path).unwrap();
        }
        for (link, target) in [("link.yml", "../secret.yml"), ("sub/out", "../.."), ("within.yml", "a.yml")] {
            std::os::unix::fs::symlink(target, top.join(link)).unwrap();
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            top.join("pipe.yml"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        fs::write(top.join("long.yml"), vec![b'#'; (1 << 20) + 1]).unwrap();
        let sources = Directory::around(&top.join("sub/.gitlab-ci.yml"), BTreeMap::new());
        let read = |path: &str| sources.read(path);
        for path in ["a.yml", "/a.yml", "./a.yml", "//a.yml"] {
            assert_eq!(read(path), Ok(Some("a.yml".into())), "{path}");
        }
        assert_eq!(read("sub/deep/c.yml"), Ok(Some("sub/deep/c.yml".into())));
        assert_eq!(read("gone.yml"), Ok(None));
        assert_eq!(read("a.yml/b.yml"), Ok(None));
        for path in ["../secret.yml", "sub/../../secret.yml", "/../secret.yml"] {
            assert_eq!(read(path), Err("leads out of the repository".into()), "{path}");
        }
        for path in ["link.yml", "within.yml", "sub/out/secret.yml"] {
            assert_eq!(read(path), Err("is a link or behind one; exec follows none".into()), "{path}");
        }
        for path in ["pipe.yml", "sub"] {
            assert_eq!(read(path), Err("is no file".into()), "{path}");
        }
        assert_eq!(read(".git/d.yml"), Err("is no file of the repository".into()));
        assert_eq!(read("long.yml"), Err("cannot be read: longer than 1 MiB".into()));
        assert_eq!(sources.matching("**.yml").unwrap(), ["a.yml", "long.yml", "sub/b.yml", "sub/deep/c.yml"]);
        assert_eq!(sources.matching("sub/*.yml").unwrap(), ["sub/b.yml"]);
        assert_eq!(sources.matching("sub/out/*.yml").unwrap(), Vec::<String>::new());
        assert_eq!(sources.matching("../*.yml"), Err("leads out of the repository".into()));
    }
}
