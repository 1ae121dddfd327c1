//! A program that is started and left to itself: a machine that must outlive us.
//!
//! No deadline and no cap can hold for it, so it gets nothing of ours that would need one: no pipe to us, no descriptor
//! but its input, our environment neither, and what it writes goes to a file, through [`bounded_log`] where nobody
//! knows how much that is. Who starts it must find it again by what it holds, for a number is soon another's: see
//! `vm::qemu`.

use rustix::fs::{FlockOperation, flock};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeWriter};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Stdio;

/// Starts a program that lives on whatever becomes of us: in a process group of its own, with these variables only.
/// Its input is `input`, whose lock it inherits; what it prints goes to `log`. Tokio buries it, if we live so long.
///
/// # Errors
/// The system's; nothing runs then.
pub fn start_outliving<A: AsRef<OsStr>>(
    program: &OsStr,
    arguments: &[A],
    environment: &[(&str, OsString)],
    input: File,
    log: impl Into<Stdio>,
) -> io::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "no helper with a deadline, but what outlives us on purpose")]
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).env_clear().envs([("PATH", super::PATH), ("LC_ALL", "C.UTF-8")]);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::from(input)).stdout(Stdio::null()).stderr(log).process_group(0);
    drop(command.spawn()?);
    Ok(())
}

/// A new file (mode 0600) that takes the first `bytes_max` bytes of what is written to it by whoever has the writing
/// end, and nothing more: a program that writes on meets a closed pipe. It outlives us, too, and ends with its writers;
/// until then the file is locked, so that who finds it free has all that was said.
///
/// # Errors
/// The system's.
pub(crate) fn bounded_log(path: &Path, bytes_max: u32) -> io::Result<PipeWriter> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    let (reader, writer) = io::pipe()?;
    #[expect(clippy::disallowed_methods, reason = "as above: it lives as long as what it listens to")]
    let mut command = tokio::process::Command::new("dd");
    // Byte by byte, so that what was said is there at once; it is little.
    command.args(["bs=1", &format!("count={bytes_max}"), "status=none"]).env_clear().env("PATH", super::PATH);
    command.stdin(reader).stdout(file).stderr(Stdio::null()).process_group(0);
    drop(command.spawn()?);
    Ok(writer)
}
