//! Prints what programs are made of, as CycloneDX JSON: `sbom PACKAGE...`, the first of which gives name and version.
//!
//! The time in it is that of SOURCE_DATE_EPOCH, without which there is none.
#![allow(clippy::print_stdout, reason = "a tool's output is its result")]

use dayfly_packaging::sbom::{Sbom, SbomError};
use std::process::ExitCode;

fn main() -> ExitCode {
    let packages: Vec<String> = std::env::args().skip(1).collect();
    if packages.is_empty() {
        eprintln!("usage: sbom PACKAGE...");
        return ExitCode::from(64);
    }
    match printed(&packages) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("sbom: {error}");
            ExitCode::FAILURE
        }
    }
}

fn printed(packages: &[String]) -> Result<String, SbomError> {
    let time = std::env::var("SOURCE_DATE_EPOCH").ok();
    Sbom::of_workspace(packages)?.to_json(time.as_deref())
}
