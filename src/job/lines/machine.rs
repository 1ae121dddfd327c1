//! The last section of a job's log: what its machine has used. Collapsed, after the guest's last byte, for authors who
//! ask what their job needs.
//!
//! Whoever knows more of the job's machine adds rows (the egress its destinations, caches their hits): by
//! [`Section::row`], before the text is made. Rows are bounded here, and masked; an empty section is no section.

use super::{line, people, stamp};
use crate::secret::Secret;
use crate::telemetry::sized;
use crate::vm::Usage;
use jiff::Timestamp;

/// Rows at most; more are counted.
const ROWS_MAX: usize = 100;

/// Characters of a row at most.
const ROW_CHARACTERS_MAX: usize = 200;

/// The section, as far as it is known.
#[derive(Clone, Debug, Default)]
pub(in crate::job) struct Section {
    rows: Vec<String>,
    /// Rows beyond those.
    more: usize,
}

impl Section {
    /// What a machine has used; what is not known is left out.
    pub(in crate::job) fn of(usage: &Usage) -> Self {
        let mut section = Self::default();
        match (usage.memory_peak_bytes, usage.memory_bytes) {
            (Some(peak), _) => section.row(&format!("memory, at most: {}", sized(peak))),
            (None, Some(now)) => section.row(&format!("memory at the end: {}", sized(now))),
            (None, None) => {}
        }
        if let Some(cpu) = usage.cpu {
            section.row(&format!("processors: {:.1} s ({})", cpu.as_secs_f64(), people(cpu)));
        }
        if let Some(written) = usage.disk_written_bytes {
            section.row(&format!("written to its disk: {}", sized(written)));
        }
        match (usage.network_received_bytes, usage.network_sent_bytes) {
            (Some(received), Some(sent)) => {
                section.row(&format!("network: {} received, {} sent", sized(received), sized(sent)));
            }
            (Some(received), None) => section.row(&format!("network: {} received", sized(received))),
            (None, Some(sent)) => section.row(&format!("network: {} sent", sized(sent))),
            (None, None) => {}
        }
        section
    }

    /// One row more. Control characters become blanks.
    pub(in crate::job) fn row(&mut self, text: &str) {
        if self.rows.len() >= ROWS_MAX {
            self.more += 1;
            return;
        }
        let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(ROW_CHARACTERS_MAX).collect();
        self.rows.push(plain);
    }

    /// The section's lines, without the values of `masks`; empty: there is nothing to tell. `sections`: GitLab knows such.
    #[must_use]
    pub(in crate::job) fn text(&self, now: Timestamp, sections: bool, masks: &[Secret]) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let title = "\x1b[0K\x1b[36;1mdayfly: what the virtual machine used\x1b[0;m";
        let mut text = if sections {
            let start = format!("section_start:{}:dayfly_machine[collapsed=true]\r\x1b[0K", now.as_second());
            format!("{}{} 00O+{title}\n", line(now, &start), stamp(now))
        } else {
            line(now, title)
        };
        for row in &self.rows {
            text.push_str(&line(now, &format!("  {}", super::masked(row, masks))));
        }
        if self.more > 0 {
            text.push_str(&line(now, &format!("  … and {} more", self.more)));
        }
        if sections {
            text.push_str(&line(now, &format!("section_end:{}:dayfly_machine\r\x1b[0K", now.as_second())));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::lines::tests::now;
    use std::time::Duration;

    #[test]
    fn what_is_known_is_told_in_a_collapsed_section_and_nothing_else() {
        let usage = Usage {
            memory_peak_bytes: Some(1_610_612_736),
            memory_bytes: Some(5),
            cpu: Some(Duration::from_millis(90_250)),
            disk_written_bytes: Some(700_000),
            network_received_bytes: Some(3 << 20),
            network_sent_bytes: Some(12),
        };
        let text = Section::of(&usage).text(now(), true, &[]);
        let rows: Vec<&str> = text.lines().map(|line| &line[32..]).collect();
        assert_eq!(
            rows,
            [
                "section_start:1767355391:dayfly_machine[collapsed=true]\r\u{1b}[0K",
                "\u{1b}[0K\u{1b}[36;1mdayfly: what the virtual machine used\u{1b}[0;m",
                "  memory, at most: 1.5 GiB",
                "  processors: 90.2 s (1 min 30 s)",
                "  written to its disk: 683.6 KiB",
                "  network: 3.0 MiB received, 12 bytes sent",
                "section_end:1767355391:dayfly_machine\r\u{1b}[0K",
            ]
        );
        assert!(text.lines().nth(1).unwrap().contains(" 00O+"), "the title goes on in the mark's line");
        assert_eq!(Section::of(&Usage::default()).text(now(), true, &[]), "");
        let plain = Section::of(&Usage { memory_bytes: Some(2048), ..Usage::default() }).text(now(), false, &[]);
        assert!(!plain.contains("section_") && plain.contains("  memory at the end: 2.0 KiB\n"), "{plain}");
    }

    /// Whatever others add: bounded, one line each, and without what the log masks.
    #[test]
    fn rows_are_bounded_plain_and_masked() {
        let mut section = Section::default();
        section.row("hunter2-hunter2\n\u{1b}[2J");
        for _ in 0..150 {
            section.row(&"x".repeat(1000));
        }
        let text = section.text(now(), true, &[Secret::new("hunter2-hunter2")]);
        assert!(text.contains("  [MASKED]  [2J\n") && !text.contains("hunter2"), "{text}");
        assert_eq!(text.lines().count(), 2 + ROWS_MAX + 1 + 1);
        assert!(text.contains("  … and 51 more\n") && text.lines().all(|line| line.chars().count() < 260));
    }
}
