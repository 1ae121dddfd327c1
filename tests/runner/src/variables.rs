//! A job's variables: their order, what they become in each other, and which of them are files.

use crate::payload::Variable;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// All variables of a job, expanded; a later one of the same name wins.
pub(crate) struct Variables {
    list: Vec<Variable>,
    /// Beside the project directory: file variables, git's include, `GITLAB_ENV`.
    files_dir: PathBuf,
}

/// A variable that the runner itself adds: neither masked nor a file, taken as it is.
pub(crate) fn plain(key: &str, value: impl Into<String>) -> Variable {
    Variable { key: key.to_owned(), value: value.into(), raw: true, ..Variable::default() }
}

impl Variables {
    /// Expands `$NAME` and `${NAME}` in all variables that are not `raw`, once, from the values as they came.
    pub(crate) fn new(list: Vec<Variable>, files_dir: PathBuf) -> Self {
        let unexpanded = Self { list, files_dir };
        let list = unexpanded
            .list
            .iter()
            .map(|variable| match variable.raw {
                true => variable.clone(),
                false => Variable { value: unexpanded.expand(&variable.value), ..variable.clone() },
            })
            .collect();
        Self { list, files_dir: unexpanded.files_dir }
    }

    /// The value of a variable (not the path of a file variable).
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.last(key).map(|variable| variable.value.as_str())
    }

    /// Changes a variable or adds it.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.list.push(plain(key, value));
    }

    /// Whether a variable says yes, in Go's words for it.
    pub(crate) fn is_true(&self, key: &str) -> bool {
        matches!(self.get(key), Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
    }

    /// What must not appear in the log.
    pub(crate) fn masked(&self) -> Vec<String> {
        self.list.iter().filter(|variable| variable.masked).map(|variable| variable.value.clone()).collect()
    }

    /// Replaces variables in a text as the runner does, not as a shell: no defaults, no commands.
    pub(crate) fn expand(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            let (name, after) = variable_name(&rest[at + 1..]);
            match name {
                Some("$") => out.push('$'),
                Some(name) => out.push_str(&self.for_scripts(name)),
                None => out.push('$'),
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }

    /// What a script sees: name and value, for a file variable its path. Names that no shell takes are left out.
    pub(crate) fn exports(&self) -> BTreeMap<&str, String> {
        let last: BTreeMap<&str, &Variable> =
            self.list.iter().map(|variable| (variable.key.as_str(), variable)).collect();
        last.into_iter()
            .filter(|(key, _)| is_identifier(key))
            .map(|(key, variable)| {
                let value = if variable.file { self.path_text(key) } else { variable.value.clone() };
                (key, value)
            })
            .collect()
    }

    /// Writes the file variables into their directory, for the job's user only.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write_files(&self) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.files_dir)?;
        let last: BTreeMap<&str, &Variable> =
            self.list.iter().map(|variable| (variable.key.as_str(), variable)).collect();
        for (key, variable) in last {
            if variable.file && is_identifier(key) {
                write_private(&self.files_dir.join(key), variable.value.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Where file variables lie.
    pub(crate) fn files_dir(&self) -> &Path {
        &self.files_dir
    }

    fn last(&self, key: &str) -> Option<&Variable> {
        self.list.iter().rev().find(|variable| variable.key == key)
    }

    fn for_scripts(&self, key: &str) -> String {
        match self.last(key) {
            Some(variable) if variable.file => self.path_text(key),
            Some(variable) => variable.value.clone(),
            None => String::new(),
        }
    }

    fn path_text(&self, key: &str) -> String {
        self.files_dir.join(key).to_string_lossy().into_owned()
    }
}

/// Writes a file that only its owner may read.
///
/// # Errors
/// The file system's.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)
}

/// Whether a shell can have a variable of this name.
fn is_identifier(key: &str) -> bool {
    let mut chars = key.chars();
    chars.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Splits what stands behind a `$` into a variable's name and the rest; `None`: no name, the `$` is just that.
fn variable_name(text: &str) -> (Option<&str>, &str) {
    if let Some(braced) = text.strip_prefix('{') {
        return match braced.split_once('}') {
            Some((name, rest)) => (Some(name), rest),
            None => (None, text),
        };
    }
    let end = match text.chars().next() {
        // `$$` is a dollar; `$1`, `$@` and their like are one character long and empty.
        Some(c) if "$*#@!?-0123456789".contains(c) => 1,
        _ => text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len()),
    };
    if end == 0 { (None, text) } else { (Some(&text[..end]), &text[end..]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(list: &[(&str, &str)]) -> Variables {
        let list = list
            .iter()
            .map(|(key, value)| Variable { raw: false, ..plain(key, *value) })
            .chain([Variable { file: true, raw: false, ..plain("KUBECONFIG", "secret text") }, plain("RAW", "$A")])
            .collect();
        Variables::new(list, PathBuf::from("/b/proj.tmp"))
    }

    fn check(text: &str, expected: &str) {
        assert_eq!(variables(&[("A", "old"), ("A", "new"), ("B", "x-$A")]).expand(text), expected, "of {text}");
    }

    #[test]
    fn names_are_replaced_by_their_last_value() {
        check("$A ${A}s $B", "new news x-new");
        check("$MISSING.${MISSING}", ".");
        check("100$", "100$");
        check("$$A $1 $@", "$A  ");
        check("${A", "${A");
        check("a-$A-ünï", "a-new-ünï");
    }

    #[test]
    fn a_file_variable_is_its_path_and_a_raw_one_is_left_alone() {
        check("$KUBECONFIG $RAW", "/b/proj.tmp/KUBECONFIG $A");
        let variables = variables(&[]);
        assert_eq!(variables.exports()["KUBECONFIG"], "/b/proj.tmp/KUBECONFIG");
        assert_eq!(variables.get("KUBECONFIG"), Some("secret text"));
    }

    #[test]
    fn names_that_no_shell_takes_are_not_exported() {
        let variables = variables(&[("1A", "x"), ("A-B", "x"), ("A=B", "x"), ("_a1", "x"), ("", "x")]);
        let names: Vec<&str> = variables.exports().into_keys().collect();
        assert_eq!(names, ["KUBECONFIG", "RAW", "_a1"]);
    }
}
