//! dayfly for the kill harness: the same daemon, which ends itself where it is told to, and whose machines may be
//! processes (`hypervisor.uri = "processes:///DIRECTORY"`).

use dayfly::config::Config;
use dayfly::daemon::{Backends, DaemonError};
use dayfly_doubles::failpoints;
use dayfly_doubles::processes::Processes;
use std::process::ExitCode;

fn main() -> ExitCode {
    failpoints::arm();
    dayfly::cli::main(std::env::args_os(), backends)
}

fn backends(config: &Config) -> Result<Backends, DaemonError> {
    let mut backends = Backends::real(config)?;
    if let Some(processes) = Processes::of(&config.hypervisor) {
        backends.host = processes.host();
    }
    Ok(backends)
}
