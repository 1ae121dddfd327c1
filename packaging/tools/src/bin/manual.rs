//! Writes the manual pages and the completions of shells: `manual DIRECTORY`, which is to become `/usr/share`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [share] = arguments.as_slice() else {
        eprintln!("usage: manual DIRECTORY");
        return ExitCode::from(64);
    };
    match dayfly_packaging::manual::write(Path::new(share)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("manual: write below {}: {error}", share.display());
            ExitCode::FAILURE
        }
    }
}
