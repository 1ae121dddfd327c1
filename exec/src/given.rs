//! `-e KEY=VALUE` and `-e FILE:KEY=PATH`: variables that the developer gives to the jobs.

use super::pipeline::sources::read_text;
use crate::standin::Variable;
use std::io;
use std::path::PathBuf;

/// A variable as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// `KEY=VALUE`.
    Value(String, String),
    /// `FILE:KEY=PATH`: the variable holds the path of a file with this one's content, as GitLab's file type.
    File(String, PathBuf),
}

/// Why a file-type variable cannot be given.
#[derive(Debug, thiserror::Error)]
#[error("read `{}` for variable {key}", path.display())]
pub(super) struct GivenError {
    key: String,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Reads one argument. A name has no colon, so `FILE:` is never the beginning of one.
pub(super) fn parse(text: &str) -> Result<Given, String> {
    let (key, value) = text.split_once('=').ok_or("write it like KEY=VALUE or FILE:KEY=PATH")?;
    let (key, is_file) = key.strip_prefix("FILE:").map_or((key, false), |key| (key, true));
    if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err("a name has letters, digits and _ only".into());
    }
    Ok(if is_file { Given::File(key.into(), value.into()) } else { Given::Value(key.into(), value.into()) })
}

/// All of them, files read.
pub(super) fn read_all(given: &[Given]) -> Result<Vec<Variable>, GivenError> {
    given.iter().map(read).collect()
}

fn read(given: &Given) -> Result<Variable, GivenError> {
    let (key, path) = match given {
        Given::Value(key, value) => return Ok(Variable::new(key, value)),
        Given::File(key, path) => (key, path),
    };
    let failed = |source| GivenError { key: key.clone(), path: path.clone(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    // A text, as GitLab's variables are; theirs have 10,000 characters at most, and keys and kubeconfigs are longer.
    let content = read_text(file).map_err(failed)?;
    Ok(Variable { file: true, raw: true, public: false, ..Variable::new(key, content) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U49: a file-type variable holds a file's content, whole and without expansion
    #[test]
    fn a_file_type_variable_is_read_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key=1");
        std::fs::write(&path, "line $HOME\n").unwrap();
        let given = parse(&format!("FILE:DEPLOY_KEY={}", path.display())).unwrap();
        let variable = read(&given).unwrap();
        assert_eq!((variable.key.as_str(), variable.value.as_str()), ("DEPLOY_KEY", "line $HOME\n"));
        assert!(variable.file && variable.raw && !variable.public);
        let plain = read(&parse("A=b=c").unwrap()).unwrap();
        assert_eq!((plain.value.as_str(), plain.file, plain.public), ("b=c", false, true));
        std::fs::write(&path, vec![b'x'; (1 << 20) + 1]).unwrap();
        assert_eq!(read(&given).unwrap_err().source.kind(), io::ErrorKind::FileTooLarge);
        std::fs::remove_file(&path).unwrap();
        let error = read(&given).unwrap_err().to_string();
        assert!(error.ends_with("/key=1` for variable DEPLOY_KEY"), "{error}");
    }

    #[test]
    fn names_are_letters_digits_and_underscores() {
        for text in ["A", "=x", "A-B=x", "FILE:=x", "file:A=x", "FILE:A:B=x", "FILE:A"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(parse("A_1="), Ok(Given::Value("A_1".into(), String::new())));
    }
}
