//! A program that is started and left to itself: the machines of [`crate::vm::processes`], in builds for tests only.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;

/// Starts a program that lives on whatever becomes of us: in a process group of its own, without our environment.
/// Its input is `input`, whose lock it inherits, what it complains of goes to `log`. Tokio buries it, if we live so long.
///
/// # Errors
/// The system's; nothing runs then.
pub(crate) fn start_outliving(program: &Path, arguments: &[&Path], input: File, log: File) -> io::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "no helper with a deadline, but what outlives us on purpose")]
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).env_clear();
    command.stdin(Stdio::from(input)).stdout(Stdio::null()).stderr(Stdio::from(log)).process_group(0);
    drop(command.spawn()?);
    Ok(())
}
