//! libvirt's log of one VM: what QEMU itself has written there.

use crate::files::plain;
use std::io::Read as _;
use std::path::Path;

/// Bytes of the file that are looked at: QEMU's command line has 5 KiB, and a register dump 4.
const READ_MAX: u64 = 64 * 1024;

/// Bytes of what is told.
const TOLD_MAX: usize = 300;

/// The first lines that QEMU has written, behind the command line by which libvirt started it. `None`: it has written
/// none, or we may not look.
pub(super) fn head(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    plain::open(path).ok()?.take(READ_MAX).read_to_end(&mut bytes).ok()?;
    qemus(&String::from_utf8_lossy(&bytes))
}

fn qemus(log: &str) -> Option<String> {
    // The command line's lines end in a backslash, all but the last.
    let lines: Vec<&str> = log.lines().collect();
    let begins = lines.iter().rposition(|line| line.ends_with('\\')).map_or(0, |at| at + 2);
    let own = lines.into_iter().skip(begins).map(str::trim).filter(|line| {
        // Register dumps tell an operator nothing.
        let libvirts =
            ["char device ", "libvirt: ", "-chardev ", "extra data["].iter().any(|with| line.starts_with(with))
                || line.contains(": shutting down, reason=")
                || line.contains(": starting up libvirt");
        !libvirts && !line.is_empty()
    });
    let mut told = own.take(4).collect::<Vec<_>>().join(" | ");
    if told.len() > TOLD_MAX {
        let end = (0..=TOLD_MAX).rev().find(|end| told.is_char_boundary(*end)).unwrap_or(0);
        told.truncate(end);
        told.push('…');
    }
    (!told.is_empty()).then_some(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "2026-11-29 04:41:00.123+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22\nLC_ALL=C \\\nPATH=/bin \\\n/usr/bin/qemu-system-x86_64 \\\n-name guest=df-a \\\n-msg timestamp=on\n";

    /// U1: the message names what QEMU said.
    #[test]
    fn qemus_own_lines_are_told_and_its_command_line_is_not() {
        let log = format!(
            "{BEFORE}char device redirected to /dev/pts/1 (label charserial0)\nKVM internal error. Suberror: 1\nemulation failure\nRAX=1\nRBX=2\nRCX=3\n2026-11-29 04:42:00.000+0000: shutting down, reason=destroyed\n"
        );
        assert_eq!(qemus(&log).as_deref(), Some("KVM internal error. Suberror: 1 | emulation failure | RAX=1 | RBX=2"));
        assert_eq!(qemus(BEFORE), None);
        assert_eq!(qemus(""), None);
        let long = qemus(&format!("{BEFORE}{}\n", "é".repeat(500))).unwrap();
        assert!(long.len() <= TOLD_MAX + 3 && long.ends_with('…'));
    }
}
