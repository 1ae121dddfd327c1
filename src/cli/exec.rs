//! `dayfly exec`: a program of its own, `dayfly-exec`, to be found beside this one or in `PATH` (decision D29).

use crate::process;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

/// The program's name, also that of its package in the source tree.
const PROGRAM: &str = "dayfly-exec";

/// All of it is `dayfly-exec`'s but `--config`, which every command has, and of which a run needs nothing.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Jobs and options; `dayfly exec --help` names them
    #[arg(value_name = "ARGUMENT", allow_hyphen_values = true)]
    before: Vec<OsString>,
    /// What stands after `--`
    #[arg(last = true, hide = true)]
    after: Vec<OsString>,
}

impl Args {
    fn into_argv(self) -> Vec<OsString> {
        let mark = (!self.after.is_empty()).then(|| OsString::from("--"));
        self.before.into_iter().chain(mark).chain(self.after).collect()
    }
}

/// There is no program that could run jobs.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoProgram {
    #[error(
        "run `{PROGRAM}`: it is neither in {} nor in PATH; install it there from the package or build that has this dayfly \
         (in the source tree: cargo build --locked -p {PROGRAM})",
        .0.display()
    )]
    Nowhere(PathBuf),
    #[error("run {}", .0.display())]
    Unusable(PathBuf, #[source] io::Error),
}

/// Where `dayfly-exec` is.
pub(super) fn program() -> Result<PathBuf, NoProgram> {
    // Without a path of our own (no /proc) there is PATH.
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_owned)).unwrap_or_default();
    find(&beside, std::env::var_os("PATH").as_deref()).ok_or(NoProgram::Nowhere(beside))
}

/// Replaces this process by `dayfly-exec`, whose exit code is then ours. Returns if that cannot be.
pub(super) fn become_it(args: Args) -> anyhow::Error {
    let program = match program() {
        Ok(program) => program,
        Err(error) => return error.into(),
    };
    let error = process::replace_by(&program, args.into_argv());
    NoProgram::Unusable(program, error).into()
}

/// The program beside ours, else the first in `path`.
fn find(beside: &Path, path: Option<&OsStr>) -> Option<PathBuf> {
    process::find(PROGRAM, beside, path)
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser as _;

    fn argv(line: &[&str]) -> Vec<OsString> {
        let cli = Cli::try_parse_from(std::iter::once("dayfly").chain(line.iter().copied())).unwrap();
        let Command::Exec(args) = cli.command else { panic!("another command") };
        args.into_argv()
    }

    #[test]
    fn what_stands_after_exec_goes_on_as_it_is() {
        for whole in [
            &["hello"][..],
            &[],
            &["--help"],
            &["-V"],
            &["--list", "-f", "other.yml"],
            &["-e", "A=--b", "-vv", "--root", "test: [linux, 3.11]", "-x"],
            &["a", "--", "--not-an-option", "--help"],
            &["--", "-job"],
        ] {
            assert_eq!(argv(&[&["exec"], whole].concat()), whole, "{whole:?}");
            assert_eq!(argv(&[&["--config", "exec", "exec"], whole].concat()), whole, "{whole:?}");
        }
        // As every command has it.
        assert_eq!(argv(&["exec", "--config", "x", "hello"]), ["hello"]);
    }

    #[test]
    fn it_is_looked_for_beside_us_then_in_path() {
        let dir = tempfile::tempdir().unwrap();
        let (beside, first, second) = (dir.path().join("beside"), dir.path().join("first"), dir.path().join("second"));
        for place in [&beside, &first, &second] {
            std::fs::create_dir(place).unwrap();
        }
        // A directory of this name is no program.
        std::fs::create_dir(first.join(PROGRAM)).unwrap();
        let path = std::env::join_paths([Path::new("relative"), Path::new(""), &first, &second]).unwrap();
        assert_eq!(find(&beside, Some(&path)), None);
        std::fs::write(second.join(PROGRAM), "").unwrap();
        assert_eq!(find(&beside, Some(&path)), Some(second.join(PROGRAM)));
        assert_eq!(find(&beside, None), None);
        std::fs::write(beside.join(PROGRAM), "").unwrap();
        assert_eq!(find(&beside, Some(&path)), Some(beside.join(PROGRAM)));
    }

    #[test]
    fn without_it_the_sentence_says_what_to_do() {
        let text = NoProgram::Nowhere("/usr/bin".into()).to_string();
        assert!(text.contains("/usr/bin") && text.contains("cargo build --locked -p dayfly-exec"), "{text}");
        assert_eq!(super::super::exit_code(&NoProgram::Nowhere("/usr/bin".into()).into()), 125);
    }
}
