//! Hands the arguments to `cli` and turns its answer into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    dayfly::cli::main(std::env::args_os(), dayfly::daemon::Backends::real)
}
