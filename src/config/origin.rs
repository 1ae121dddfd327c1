//! Where did a value come from? Finds the line of a key in the file, and the variable of the
//! environment, so that messages and `dayfly check` can point at what to change.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml_edit::{Document, Item, Table};

/// Prefix of environment variables that are configuration: `DAYFLY_LOG__LEVEL`.
pub(super) const ENV_PREFIX: &str = "DAYFLY_";

/// The source of one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// The file, at this line (from 1).
    File(PathBuf, usize),
    /// This environment variable.
    Environment(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}, line {line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// The sources of one configuration: the text of its file and its environment variables.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    file: Option<(PathBuf, Document<String>)>,
    /// Key as `section.key`, and the variable's name.
    environment: BTreeMap<String, String>,
}

impl Origins {
    pub(super) fn new(file: Option<(PathBuf, Document<String>)>, environment: BTreeMap<String, String>) -> Self {
        Self { file, environment }
    }

    /// The file, if there is one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// Where the value at `key` comes from: `log.level`, `runner.0.url`.
    #[must_use]
    pub fn of(&self, key: &str) -> Origin {
        if let Some(name) = self.environment.get(key) {
            return Origin::Environment(name.clone());
        }
        let Some((path, document)) = &self.file else { return Origin::Default };
        match find(document.as_table(), key) {
            Some(span) => Origin::File(path.clone(), line_of(document.raw(), span.start)),
            None => Origin::Default,
        }
    }

    /// Like [`Origins::of`], but for a key that is not there: its nearest parent that is.
    #[must_use]
    pub fn nearest(&self, key: &str) -> Origin {
        let mut key = key;
        loop {
            match (self.of(key), key.rsplit_once('.')) {
                (Origin::Default, Some((parent, _))) => key = parent,
                (origin, _) => return origin,
            }
        }
    }
}

/// Line of a byte offset, from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

fn find(table: &Table, key: &str) -> Option<Range<usize>> {
    let mut item: Option<&Item> = None;
    let mut span = None;
    for part in key.split('.') {
        let found = match item {
            None => table.get_key_value(part),
            Some(parent) => match parent.as_table_like() {
                Some(table) => table.get_key_value(part),
                None => {
                    // An element of `[[class]]` or `[[runner]]`.
                    let index: usize = part.parse().ok()?;
                    let element = parent.get(index)?;
                    span = element.span().or(span);
                    item = Some(element);
                    continue;
                }
            },
        };
        let (name, value) = found?;
        span = name.span().or_else(|| value.span()).or(span);
        item = Some(value);
    }
    span
}

/// The known name that was most likely meant.
pub(super) fn nearest_name<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.into_iter().map(|name| (distance(typed, name), name)).min()?;
    // Two slips, or one in three characters of a long name.
    (near.0 <= 2.max(typed.chars().count() / 3)).then_some(near.1)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_tables_arrays_and_dotted_form() {
        let text = "concurrent = 2\nnetwork.mode = \"user\"\n\n[log]\nlevel = \"info\"\n\n[[runner]]\nname = \"a\"\n\n[[runner]]\nname = \"b\"\nurl = \"x\"\n";
        let document = Document::parse(text.to_owned()).unwrap();
        let origins = Origins::new(
            Some(("f".into(), document)),
            BTreeMap::from([("capacity.cpus".into(), "DAYFLY_CAPACITY__CPUS".into())]),
        );
        let line = |key: &str| match origins.of(key) {
            Origin::File(_, line) => line,
            other => panic!("{key}: {other:?}"),
        };
        assert_eq!((line("concurrent"), line("network.mode"), line("log.level"), line("log")), (1, 2, 5, 4));
        assert_eq!((line("runner.0"), line("runner.1.name"), line("runner.1.url")), (7, 11, 12));
        assert_eq!(origins.of("runner.0.url"), Origin::Default);
        assert_eq!(origins.nearest("runner.0.url"), Origin::File("f".into(), 7));
        assert_eq!(origins.of("capacity.cpus"), Origin::Environment("DAYFLY_CAPACITY__CPUS".into()));
        assert_eq!(origins.nearest("limits.keepalive"), Origin::Default);
    }

    #[test]
    fn a_slip_finds_its_name_and_nonsense_finds_none() {
        let known = ["concurrent", "log", "limits", "state_directory"];
        assert_eq!(nearest_name("concurent", known), Some("concurrent"));
        assert_eq!(nearest_name("state_dir", known), None);
        assert_eq!(nearest_name("statedirectory", known), Some("state_directory"));
        assert_eq!(nearest_name("check_interval", known), None);
    }
}
