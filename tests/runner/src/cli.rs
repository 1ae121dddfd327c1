//! The command line: the official runner's commands and flags, as far as an image or a job's script uses them.

use crate::artifacts::{self, ArtifactsError, DownloadArguments, UploadArguments};
use crate::cache;
use crate::config::ConfigError;
use crate::single::{self, SingleArguments};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

/// Why the program ends with code 1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// An argument is not valid UTF-8.
    #[error("argument is not UTF-8: {0:?}")]
    NotUtf8(OsString),
    /// No such command or flag.
    #[error(
        "unknown argument `{0}`; this stand-in knows run-single, artifacts-uploader, artifacts-downloader, cache-extractor, cache-archiver, --version"
    )]
    Unknown(String),
    /// A flag stands without its value.
    #[error("flag `{0}` needs a value")]
    NoValue(String),
    /// A number was expected.
    #[error("flag `{0}` needs a number, not `{1}`")]
    NotANumber(String, String),
    /// config.toml is unusable.
    #[error("load the runner's configuration")]
    Config(#[from] ConfigError),
    /// An up- or download failed for good.
    #[error("move artifacts")]
    Artifacts(#[from] ArtifactsError),
    /// Standard output is gone.
    #[error("print the version")]
    Print(#[source] std::io::Error),
    /// Signals cannot be caught.
    #[error("listen for signals")]
    Signals(#[source] std::io::Error),
}

/// Runs the command that `arguments` (without the program's name) asks for.
///
/// # Errors
/// Everything that ends the official runner with code 1: bad arguments, no such runner, failed transfers.
pub(crate) fn run(arguments: impl Iterator<Item = OsString>) -> Result<ExitCode, CliError> {
    let mut words: VecDeque<String> =
        arguments.map(|word| word.into_string().map_err(CliError::NotUtf8)).collect::<Result<_, _>>()?;
    match words.pop_front().as_deref() {
        Some("--version" | "-v") => print_version()?,
        Some("run-single") => return single::run(single_arguments(words)?),
        Some("artifacts-uploader") => artifacts::upload(&upload_arguments(words)?)?,
        Some("artifacts-downloader") => artifacts::download(&download_arguments(words)?)?,
        Some(cache::EXTRACTOR) => cache::extract(&cache_arguments(words)?.0),
        Some(cache::ARCHIVER) => {
            let (urls, paths) = cache_arguments(words)?;
            cache::archive(urls.first().ok_or(CliError::NoValue("--url".into()))?, &paths);
        }
        other => return Err(CliError::Unknown(other.unwrap_or("").to_owned())),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_version() -> Result<(), CliError> {
    let text = format!(
        "Version:      {}\nGit revision: {}\nGit branch:   standin\nGO version:   none\nBuilt:        unknown\n\
         OS/Arch:      {}/{}\nThis is dayfly's stand-in for tests and demos, not the official gitlab-runner.\n",
        crate::VERSION,
        crate::REVISION,
        crate::info::platform(),
        crate::info::architecture(),
    );
    std::io::stdout().write_all(text.as_bytes()).map_err(CliError::Print)
}

/// The flags of one command: `--name value`, `--name=value`, `-n value`, and switches.
struct Flags(VecDeque<String>);

impl Flags {
    /// The next flag, and its value if it was written with `=`.
    fn next(&mut self) -> Option<(String, Option<String>)> {
        let word = self.0.pop_front()?;
        match word.split_once('=') {
            Some((name, value)) if name.starts_with('-') => Some((name.to_owned(), Some(value.to_owned()))),
            _ => Some((word, None)),
        }
    }

    fn value(&mut self, name: &str, inline: Option<String>) -> Result<String, CliError> {
        inline.or_else(|| self.0.pop_front()).ok_or_else(|| CliError::NoValue(name.to_owned()))
    }

    fn number<T: std::str::FromStr>(&mut self, name: &str, inline: Option<String>) -> Result<T, CliError> {
        let value = self.value(name, inline)?;
        value.parse().map_err(|_| CliError::NotANumber(name.to_owned(), value))
    }
}

fn single_arguments(words: VecDeque<String>) -> Result<SingleArguments, CliError> {
    let mut arguments = SingleArguments::default();
    let mut flags = Flags(words);
    while let Some((name, inline)) = flags.next() {
        match name.as_str() {
            "-c" | "--config" => arguments.config_file = flags.value(&name, inline)?.into(),
            "-r" | "--runner" => arguments.runner_name = flags.value(&name, inline)?,
            "--max-builds" => arguments.builds_max = flags.number(&name, inline)?,
            "--wait-timeout" => arguments.wait_timeout_s = flags.number(&name, inline)?,
            _ => return Err(CliError::Unknown(name)),
        }
    }
    Ok(arguments)
}

fn upload_arguments(words: VecDeque<String>) -> Result<UploadArguments, CliError> {
    let mut arguments = UploadArguments::default();
    let mut flags = Flags(words);
    while let Some((name, inline)) = flags.next() {
        match name.as_str() {
            "--url" => arguments.target.url = flags.value(&name, inline)?,
            "--token" => arguments.target.token = flags.value(&name, inline)?,
            "--id" => arguments.target.job = flags.value(&name, inline)?,
            "--path" => arguments.paths.push(flags.value(&name, inline)?),
            "--exclude" => arguments.excludes.push(flags.value(&name, inline)?),
            "--untracked" => arguments.untracked = true,
            "--name" => arguments.name = flags.value(&name, inline)?,
            "--expire-in" => arguments.expire_in = flags.value(&name, inline)?,
            "--artifact-format" => arguments.format = flags.value(&name, inline)?,
            "--artifact-type" => arguments.kind = flags.value(&name, inline)?,
            _ => return Err(CliError::Unknown(name)),
        }
    }
    Ok(arguments)
}

fn download_arguments(words: VecDeque<String>) -> Result<DownloadArguments, CliError> {
    let mut arguments = DownloadArguments::default();
    let mut flags = Flags(words);
    while let Some((name, inline)) = flags.next() {
        match name.as_str() {
            "--url" => arguments.target.url = flags.value(&name, inline)?,
            "--token" => arguments.target.token = flags.value(&name, inline)?,
            "--id" => arguments.target.job = flags.value(&name, inline)?,
            _ => return Err(CliError::Unknown(name)),
        }
    }
    Ok(arguments)
}

/// URLs, and what to pack.
fn cache_arguments(words: VecDeque<String>) -> Result<(Vec<String>, UploadArguments), CliError> {
    let (mut urls, mut arguments) = (Vec::new(), UploadArguments::default());
    let mut flags = Flags(words);
    while let Some((name, inline)) = flags.next() {
        match name.as_str() {
            "--url" => urls.push(flags.value(&name, inline)?),
            "--path" => arguments.paths.push(flags.value(&name, inline)?),
            "--untracked" => arguments.untracked = true,
            _ => return Err(CliError::Unknown(name)),
        }
    }
    Ok((urls, arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> VecDeque<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn run_single_takes_the_official_runners_flags() {
        let arguments =
            single_arguments(words("-c /etc/c.toml -r name --max-builds 1 --wait-timeout=60")).expect("valid");
        assert_eq!(arguments.config_file, std::path::PathBuf::from("/etc/c.toml"));
        assert_eq!((arguments.runner_name.as_str(), arguments.builds_max, arguments.wait_timeout_s), ("name", 1, 60));
    }

    #[test]
    fn a_runner_name_may_begin_with_a_dash() {
        assert_eq!(single_arguments(words("-r -x")).expect("valid").runner_name, "-x");
    }

    #[test]
    fn the_flag_that_makes_the_official_runner_panic_is_refused() {
        let error = single_arguments(words("--shutdown-timeout 5")).expect_err("refused");
        assert!(matches!(error, CliError::Unknown(name) if name == "--shutdown-timeout"));
    }

    #[test]
    fn the_uploader_collects_repeated_paths() {
        let arguments =
            upload_arguments(words("--url u --token t --id 4 --path a --path b --untracked")).expect("valid");
        assert_eq!((arguments.paths.len(), arguments.untracked, arguments.target.job.as_str()), (2, true, "4"));
    }
}
