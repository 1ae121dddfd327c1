//! Machines that this host has lost in a row, and why the last one was: what `poller` asks before it takes a job.
//!
//! Two rows, because two things end them. A machine lost before its guest showed the pass tells that none can be made;
//! one that shows it ends that row. A machine that the host stopped in mid-job tells that none lives long; only a job
//! that came to its own end ends that one. What a guest can bring about at will counts in neither (field.md U50).

use std::sync::{Mutex, PoisonError};

/// Losses in a row after which a host is unfit (threats.md V1). A job may lose two machines before it begins.
const IN_A_ROW: u32 = 3;

/// How many, and why the last one.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    count: u32,
    last: &'static str,
}

impl Row {
    fn add(&mut self, why: &'static str) {
        *self = Self { count: self.count.saturating_add(1), last: why };
    }
}

/// Both rows. Each lock is held for one line.
#[derive(Debug, Default)]
pub(super) struct Losses(Mutex<(Row, Row)>);

impl Losses {
    fn change<T>(&self, change: impl FnOnce(&mut (Row, Row)) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One was lost before its guest showed the pass.
    pub(super) fn lost_booting(&self, why: &'static str) {
        self.change(|(booting, _)| booting.add(why));
    }

    /// The host stopped one in mid-job.
    pub(super) fn stopped(&self, why: &'static str) {
        self.change(|(_, running)| running.add(why));
    }

    /// A guest has shown its pass.
    pub(super) fn came_up(&self) {
        self.change(|(booting, _)| *booting = Row::default());
    }

    /// A job came to its own end.
    pub(super) fn did_well(&self) {
        self.change(|rows| *rows = <(Row, Row)>::default());
    }

    /// Why jobs had better run elsewhere, in words for operators.
    pub(super) fn unfit(&self) -> Option<String> {
        let (booting, running) = self.change(|rows| *rows);
        let words = |row: Row, when: &str| {
            (row.count >= IN_A_ROW).then(|| {
                format!(
                    "the last {} machines were lost {when} ({}); see the log, and `dayfly doctor`",
                    row.count, row.last
                )
            })
        };
        words(running, "in the middle of their jobs").or_else(|| words(booting, "before they were ready"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U50: three in a row of either kind make a host unfit, and each row has its own end.
    #[test]
    fn three_in_a_row_are_named_until_a_machine_does_better() {
        let losses = Losses::default();
        for _ in 0..2 {
            losses.lost_booting("first");
            losses.stopped("second");
        }
        assert_eq!(losses.unfit(), None);
        losses.lost_booting("third");
        let said = losses.unfit().unwrap();
        assert!(
            said.starts_with("the last 3 machines were lost before they were ready (third); see the log"),
            "{said}"
        );
        losses.came_up();
        assert_eq!(losses.unfit(), None);
        losses.stopped("QEMU stopped it");
        let said = losses.unfit().unwrap();
        assert!(said.contains("3 machines were lost in the middle of their jobs (QEMU stopped it)"), "{said}");
        losses.came_up();
        assert!(losses.unfit().is_some(), "that it came up proves nothing here");
        losses.did_well();
        assert_eq!(losses.unfit(), None);
    }
}
