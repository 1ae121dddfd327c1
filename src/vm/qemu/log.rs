//! QEMU's own words about one VM, and what they tell of its end.
//!
//! The file takes the first [`BYTES_MAX`] bytes, and no more: a guest can make QEMU complain at will. So what stands
//! there is the truth, but a full file tells nothing by what it does not say.

use super::args::SHUTDOWN_TRACE;
use crate::files::plain;
use crate::vm::Ending;
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Bytes of one machine's log.
pub(super) const BYTES_MAX: u32 = 16 * 1024;

/// Bytes of what is told.
const TOLD_MAX: usize = 300;

/// QEMU's `SHUTDOWN_CAUSE_GUEST_SHUTDOWN`.
const BY_GUEST: &str = "reason=6";

/// One machine's log, which may be unlinked meanwhile. None: there is none, or it cannot be read.
pub(super) struct Log(Option<File>);

impl Log {
    /// Blocks.
    pub(super) fn open(path: &Path) -> Self {
        Self(plain::open(path).ok())
    }

    /// Whether nothing more comes: who copies into it what QEMU says, and may be behind, has ended.
    pub(super) fn is_whole(&self) -> bool {
        self.0.as_ref().is_none_or(|file| flock(file, FlockOperation::NonBlockingLockShared).is_ok())
    }

    /// All that it holds. Blocks.
    pub(super) fn read(self) -> String {
        let mut bytes = Vec::new();
        if let Some(file) = self.0 {
            // What was read before an error is as good.
            let _ = file.take(BYTES_MAX.into()).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// How a guest shut its machine down that nobody watched: QEMU notes a power-off there, and no reset.
pub(super) fn of_shutdown(log: &str) -> Ending {
    let noted = |line: &str| line.contains(SHUTDOWN_TRACE) && line.contains(BY_GUEST);
    if log.lines().any(noted) {
        Ending::PoweredOff
    } else if log.len() >= BYTES_MAX as usize || log.contains("trace event") {
        // No room for it; or a QEMU that was built without.
        Ending::Unseen
    } else {
        Ending::Restarted
    }
}

/// How a QEMU went that nobody watched: it tells of a signal that asked it to, and stays for anything that its guest does.
pub(super) fn of_process(log: &str) -> Ending {
    if log.contains("terminating on signal") { Ending::Destroyed } else { Ending::Died }
}

/// The first lines that QEMU has written.
pub(super) fn head(log: &str) -> Option<String> {
    let own = log.lines().map(|line| line.strip_prefix("qemu-system-x86_64: ").unwrap_or(line).trim());
    let own = own.filter(|line| !line.is_empty() && !line.contains(SHUTDOWN_TRACE));
    let mut told = String::new();
    for line in own {
        if !told.is_empty() {
            told.push_str(" | ");
        }
        told.push_str(line);
        if told.len() > TOLD_MAX {
            let cut = (0..=TOLD_MAX).rev().find(|at| told.is_char_boundary(*at)).unwrap_or(0);
            told.truncate(cut);
            told.push('…');
            break;
        }
    }
    (!told.is_empty()).then_some(told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::bounded_log;
    use std::io::Write as _;
    use std::time::Duration;

    #[test]
    fn an_end_that_nobody_saw_is_told_by_what_qemu_wrote_and_by_nothing_less() {
        assert_eq!(of_shutdown("qemu_system_shutdown_request reason=6\n"), Ending::PoweredOff);
        assert_eq!(of_shutdown("warning: something\n"), Ending::Restarted);
        assert_eq!(of_shutdown("trace event 'qemu_system_shutdown_request' does not exist\n"), Ending::Unseen);
        assert_eq!(of_shutdown(&"x".repeat(BYTES_MAX as usize)), Ending::Unseen);
        assert_eq!(of_process("qemu-system-x86_64: terminating on signal 15 from pid 1 (init)\n"), Ending::Destroyed);
        assert_eq!(of_process(""), Ending::Died);
    }

    /// Its last words may be under way when QEMU has gone already.
    #[tokio::test]
    async fn a_log_is_whole_once_all_that_was_said_stands_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut qemu = bounded_log(&path, BYTES_MAX).unwrap();
        let log = Log::open(&path);
        qemu.write_all(b"-device: no such bus\n").unwrap();
        assert!(!log.is_whole(), "more may come");
        drop(qemu);
        // As a start does that failed.
        std::fs::remove_file(&path).unwrap();
        let whole = async {
            while !log.is_whole() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), whole).await.unwrap();
        assert_eq!(log.read(), "-device: no such bus\n");
        assert!(Log::open(&path).is_whole(), "there is none");
    }

    #[test]
    fn an_operator_reads_qemus_first_lines() {
        let log = "qemu-system-x86_64: -drive: no space\nqemu_system_shutdown_request reason=6\nmore\n";
        assert_eq!(head(log).as_deref(), Some("-drive: no space | more"));
        assert_eq!(head("qemu_system_shutdown_request reason=2\n"), None);
        let long = head(&"é".repeat(500)).unwrap();
        assert!(long.len() <= TOLD_MAX + 3 && long.ends_with('…'));
    }
}
