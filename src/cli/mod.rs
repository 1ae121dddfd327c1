//! What did the operator ask for? Arguments, exit codes, and what people see of errors.
//!
//! Each command is a file here; the work is done by the modules it names. Exit codes: 64 for a
//! wrong command line, 78 for configuration (and journal), 1 for the rest; `exec` has its own.
//! An error is printed once, here, with its causes.

mod cache;
mod check;
pub mod doctor;
mod egress;
mod exec;
mod fit;
pub(crate) mod image;
mod jobs;
mod migrate;
mod operate;
mod prompt;
mod register;
mod resolved;
mod run;
mod runners;
mod scratch;
mod shell;

use crate::config::ConfigError;
use crate::daemon::{Connect, DaemonError};
use crate::job::journal::JournalError;
use crate::telemetry::printable;
use clap::{CommandFactory as _, Parser as _};
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

/// `EX_USAGE` of sysexits.h.
const EXIT_USAGE: u8 = 64;
/// 128 + SIGINT, as shells have it.
const EXIT_INTERRUPTED: u8 = 130;
/// What `dayfly exec` says of a job that could not be run.
const EXIT_NOT_THE_JOBS: u8 = 125;
/// `EX_CONFIG` of sysexits.h; `RestartPreventExitStatus` of the unit names it.
const EXIT_CONFIG: u8 = 78;

/// Runs each GitLab CI job in a fresh, throw-away virtual machine.
#[derive(Debug, clap::Parser)]
#[command(name = "dayfly", version, propagate_version = true)]
struct Cli {
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE", env = "DAYFLY_CONFIG", default_value = "/etc/dayfly/config.toml")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run the daemon
    Run,
    /// Register a runner of GitLab's here
    Register(Box<register::Args>),
    /// Show the runners that are registered here
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask GitLab whether it knows the runners' tokens; all of them unless --name says which
    Verify {
        #[command(flatten)]
        which: runners::Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a runner's entry and token here, and this host from it at GitLab
    Unregister(runners::Unregister),
    /// Have GitLab make a runner's token anew, and keep that in place of the old one
    ResetToken(runners::Which),
    /// Take over the runners of gitlab-runner's config.toml, and say of each line what became of it
    Migrate(migrate::Args),
    /// Check the configuration and show its values with their sources
    Check {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Look at the configuration's form
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Look at this host: libvirt, virtualisation, network, images, settings
    Doctor(doctor::Args),
    /// Build, test, list and remove base images
    Image(Box<image::Args>),
    /// Run jobs of a local pipeline file, each in a fresh VM, without a GitLab
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Exec(exec::Args),
    /// Show how the running daemon is doing
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Only what needs a person: exit code 0 if nothing does, 2 if something does, 3 if no daemon answers
        #[arg(long, conflicts_with = "json")]
        check: bool,
    },
    /// Show the jobs of the running daemon, or those that have ended
    Jobs(jobs::Jobs),
    /// Look at one job
    Job {
        #[command(subcommand)]
        command: jobs::Job,
    },
    /// Show what a job's machine prints on its console, or had printed last
    Console(jobs::Console),
    /// Look at what jobs have left for later ones (`cache:`), or throw it away
    Cache {
        #[command(subcommand)]
        command: cache::Cache,
    },
    /// Open a root shell in the machine of a job under way, or of one that failed and is kept; recorded
    Shell(jobs::Which),
    /// Look at what jobs reach outside of their machines
    Egress {
        #[command(subcommand)]
        command: egress::Egress,
    },
    /// Show what the running daemon has counted, in the Prometheus text format
    Metrics,
    /// Print the completions of a shell: `dayfly completion bash > /etc/bash_completion.d/dayfly`
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Tell the running daemon to take no more jobs, and to end after those it has
    Drain {
        /// Return when it has ended
        #[arg(long)]
        wait: bool,
    },
    /// End one job of the running daemon now; GitLab is told why
    Kill {
        /// GitLab's id of the job
        job: u64,
        /// Name of its runner entry, if several have a job of this id
        #[arg(long)]
        runner: Option<String>,
        /// What the job's author reads of the reason
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
}

#[derive(Debug, clap::Subcommand)]
enum ConfigCommand {
    /// Print the configuration's JSON schema, for editors
    Schema,
}

/// The command line asks for something that cannot be meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Ctrl-C, obeyed.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// The command line's own definition, for pages about it.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs the command line and returns its exit code; a daemon's seams are what `connect` makes.
pub fn main(args: impl Iterator<Item = OsString>, connect: Connect) -> ExitCode {
    let (notes, args) = register::foreign::take(args.collect());
    let cli = match Cli::try_parse_from(args) {
        Ok(mut cli) => {
            if let Command::Register(args) = &mut cli.command {
                args.notes = notes;
            }
            cli
        }
        Err(error) => {
            // To stdout for --help and --version, else to stderr. Nobody can be told if that fails.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match dispatch(cli, connect) {
        Ok(code) => code,
        Err(error) => {
            let lines: Vec<String> = format!("dayfly: {error:#}").lines().map(printable).collect();
            let _ = writeln!(io::stderr(), "{}", lines.join("\n"));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn dispatch(cli: Cli, connect: Connect) -> anyhow::Result<ExitCode> {
    let config = cli.config;
    match cli.command {
        Command::Run => run::run(&config, connect)?,
        Command::Register(args) => wait_for(register::with_gitlab(&config, *args))?,
        Command::List { json } => runners::list(&config, json)?,
        Command::Verify { which, json } => return wait_for(runners::verify(&config, &which, json)),
        Command::Unregister(args) => wait_for(runners::unregister(&config, &args))?,
        Command::ResetToken(which) => wait_for(runners::reset_token(&config, &which))?,
        Command::Migrate(args) => migrate::migrate(&config, &args)?,
        Command::Check { json } => check::check(&config, json)?,
        Command::Config { command: ConfigCommand::Schema } => {
            print(&format!("{}\n", serde_json::to_string_pretty(&crate::config::schema())?))?
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "dayfly", &mut script);
            print(&String::from_utf8_lossy(&script))?;
        }
        Command::Doctor(args) => return wait_for(doctor::doctor(&config, args)),
        Command::Image(args) => wait_for(image::image(&config, *args))?,
        Command::Exec(args) => return Err(exec::become_it(args)),
        Command::Status { check: true, .. } => return wait_for(operate::check(&config)),
        Command::Status { json, .. } => wait_for(operate::status(&config, json))?,
        Command::Jobs(args) => wait_for(jobs::jobs(&config, &args))?,
        Command::Job { command } => wait_for(jobs::job(&config, command))?,
        Command::Console(args) => wait_for(jobs::console(&config, args))?,
        Command::Cache { command } => wait_for(cache::cache(&config, command))?,
        Command::Shell(which) => wait_for(shell::shell(&config, which))?,
        Command::Egress { command } => wait_for(egress::egress(&config, command))?,
        Command::Metrics => wait_for(operate::metrics(&config))?,
        Command::Drain { wait } => wait_for(operate::drain(&config, wait))?,
        Command::Kill { job, runner, reason } => wait_for(operate::kill(&config, job, runner, reason))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The exit code that an error stands for, by its type anywhere in the chain.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(needs_a_change) {
        EXIT_CONFIG
    } else if error.is::<Usage>() {
        EXIT_USAGE
    } else if error.is::<Interrupted>() {
        EXIT_INTERRUPTED
    } else if error.is::<exec::NoProgram>() {
        EXIT_NOT_THE_JOBS
    } else {
        1
    }
}

/// Whether somebody must change configuration or journal before another start makes sense.
fn needs_a_change(cause: &(dyn std::error::Error + 'static)) -> bool {
    let daemon = cause.downcast_ref::<DaemonError>().is_some_and(|error| error.exit_code() == EXIT_CONFIG);
    let journal = cause
        .downcast_ref::<JournalError>()
        .is_some_and(|error| matches!(error, JournalError::Newer { .. } | JournalError::Foreign { .. }));
    daemon || journal || cause.is::<ConfigError>() || cause.is::<check::UnfitImage>()
}

/// Prints to stdout. Who has read enough closes the pipe, as `head` does: that is no error of ours.
fn print(text: &str) -> io::Result<()> {
    quietly(io::stdout().lock().write_all(text.as_bytes()))
}

fn quietly(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Runs one short command on a runtime of its own.
fn wait_for<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::Backends;
    use std::path::Path;

    fn exit_of(args: &[&str]) -> ExitCode {
        main(std::iter::once("dayfly").chain(args.iter().copied()).map(OsString::from), Backends::real)
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    /// Each command that the completions name is one, in each shell that there is.
    #[test]
    fn completions_are_made_for_each_shell() {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            assert_eq!(exit_of(&["completion", shell]), ExitCode::SUCCESS, "{shell}");
        }
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut Cli::command(), "dayfly", &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(["reset-token", "--ended", "--config"].iter().all(|word| script.contains(word)), "{script}");
        assert_eq!(exit_of(&["config", "schema"]), ExitCode::SUCCESS);
        assert_eq!(exit_of(&["completion", "tcsh"]), ExitCode::from(64));
    }

    #[test]
    fn a_wrong_command_line_exits_with_64_and_help_with_0() {
        for args in [
            &[][..],
            &["fly"],
            &["status", "--yaml"],
            &["status", "--check", "--json"],
            &["kill"],
            &["kill", "x"],
            &["check", "--config"],
        ] {
            assert_eq!(exit_of(args), ExitCode::from(64), "{args:?}");
        }
        assert_eq!(exit_of(&["--help"]), ExitCode::SUCCESS);
        assert_eq!(exit_of(&["--version"]), ExitCode::SUCCESS);
    }

    /// U20: `dayfly status | head`.
    #[test]
    fn a_pipe_that_its_reader_has_closed_is_no_error() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        let written = writer.write_all(b"a long report");
        assert_eq!(written.as_ref().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(quietly(written).is_ok());
        assert!(quietly(Err(io::ErrorKind::StorageFull.into())).is_err(), "a full disk is one");
    }

    #[test]
    fn a_wrong_configuration_exits_with_78() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let config = file.to_str().unwrap();
        for command in [&["run"][..], &["check"], &["status"], &["drain"], &["kill", "1"]] {
            std::fs::write(&file, "concurent = 1\n").unwrap();
            assert_eq!(exit_of(&[command, &["--config", config]].concat()), ExitCode::from(78), "{command:?}");
        }
        // A good file without a runner is not enough for these two.
        std::fs::write(&file, "concurrent = 1\n").unwrap();
        assert_eq!(exit_of(&["run", "--config", config]), ExitCode::from(78));
        assert_eq!(exit_of(&["check", "--config", config]), ExitCode::from(78));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(exit_of(&["run", "--config", config]), ExitCode::from(78));
    }

    #[test]
    fn a_daemon_that_does_not_run_exits_with_1() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, "runtime_directory = \".\"\n").unwrap();
        for command in [&["status"][..], &["status", "--json"], &["drain"], &["kill", "1"]] {
            assert_eq!(
                exit_of(&[command, &["--config", file.to_str().unwrap()]].concat()),
                ExitCode::from(1),
                "{command:?}"
            );
        }
    }

    /// U19: monitoring's code where nobody answers, whatever keeps them from it.
    #[test]
    fn a_check_of_the_status_without_a_daemon_exits_with_3() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        for text in ["runtime_directory = \".\"\n", "concurent = 1\n"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(exit_of(&["status", "--check", "--config", file.to_str().unwrap()]), ExitCode::from(3));
        }
    }

    #[test]
    fn the_kind_of_error_decides_wherever_it_stands_in_the_chain() {
        let config =
            || anyhow::Error::new(crate::config::Config::load(Path::new("/nonexistent/config.toml")).unwrap_err());
        assert_eq!(exit_code(&config()), 78);
        assert_eq!(exit_code(&config().context("do something")), 78);
        let newer = DaemonError::Journal(JournalError::Newer { path: "x".into(), version: 9 });
        assert_eq!(exit_code(&anyhow::Error::new(newer).context("run")), 78);
        assert_eq!(exit_code(&DaemonError::NoKvm("no byte came".into()).into()), 78);
        assert_eq!(exit_code(&DaemonError::Locked { directory: "x".into(), pid: "7".into() }.into()), 1);
        assert_eq!(exit_code(&Usage("no".into()).into()), 64);
        assert_eq!(exit_code(&anyhow::anyhow!("broken")), 1);
    }
}
