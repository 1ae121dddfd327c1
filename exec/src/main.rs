//! Hands the arguments to the library and turns its answer into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    dayfly_exec::main(std::env::args_os())
}
