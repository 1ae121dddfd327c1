//! What of a job can be looked at: its steps and its machine's console, while it runs and when it has ended.
//!
//! The job's task notes, others look: a console through [`Looks`], a lock held for a few lines; the rest in the job's
//! view. A hand-over takes what was noted along in the runtime directory, masked and bounded, so that the next daemon
//! keeps the whole of it; after a kill what came before is left out.

use super::journal::Record;
use super::lines;
use crate::cache::Note;
use crate::history::{self, AtGitlab, CONSOLE_BYTES_MAX, End, MachineWas, Outcome, Step};
use crate::secret::Secret;
use crate::supply::Screen;
use crate::vm::VmName;
use crate::vm::console::{RING_BYTES_MAX, Rows, last_rows};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a console that are shown at once, before they are escaped.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// The console of a job's machine, for others. Clones look at the same.
#[derive(Clone, Debug, Default)]
pub struct Looks(Arc<Mutex<Option<Shown>>>);

#[derive(Debug)]
struct Shown {
    screen: Screen,
    /// What the job's log masks.
    masks: Vec<Secret>,
}

impl Looks {
    /// It has this machine from now on.
    pub(super) fn at(&self, screen: Screen, masks: Vec<Secret>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Shown { screen, masks });
    }

    /// Whole rows from where `from` bytes were printed, without what the job's log masks; a long way behind, or without
    /// a `from`, the last ones. None: there was no machine yet, or what to mask is not known any more.
    #[must_use]
    pub fn rows_from(&self, from: Option<u64>) -> Option<Rows> {
        let shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Shown { screen, masks } = shown.as_ref()?;
        let rows = match from {
            Some(from) => screen.look(|ring| ring.rows_from(from, PIECE_BYTES_MAX, false)),
            None => {
                let rows = screen.look(|ring| ring.rows_from(0, RING_BYTES_MAX, false));
                Rows { lost: 0, ..rows }
            }
        };
        let text = lines::masked(&rows.text, masks);
        let text = if from.is_none() { last_rows(&text, CONSOLE_BYTES_MAX).to_owned() } else { text };
        Some(Rows { text, ..rows })
    }

    /// What follows on `from`, whole rows or not: the machine prints no more.
    #[must_use]
    pub fn rest_from(&self, from: u64) -> Option<Rows> {
        let shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Shown { screen, masks } = shown.as_ref()?;
        let rows = screen.look(|ring| ring.rows_from(from, RING_BYTES_MAX, true));
        Some(Rows { text: lines::masked(&rows.text, masks), ..rows })
    }

    /// The end of it, for whoever asks when the job has ended; with the rows that were ended in all.
    pub(super) fn kept(&self) -> Option<(String, u64)> {
        let shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Shown { screen, masks } = shown.as_ref()?;
        let rows = screen.look(|ring| ring.rows_from(0, RING_BYTES_MAX, true));
        let text = lines::masked(&rows.text, masks);
        Some((last_rows(&text, CONSOLE_BYTES_MAX).to_owned(), rows.rows))
    }
}

/// What is noted of a job for its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Past {
    /// What it has come to.
    pub(super) steps: Vec<Step>,
    /// The end of its console, and the rows that this has printed: of a machine that is gone, or before a hand-over.
    pub(super) console: Option<(String, u64)>,
    /// What this daemon saw, where it had to end the job.
    pub(super) why: Option<String>,
    /// The hypervisor's name of the last machine.
    pub(super) vm: Option<String>,
    /// What it has had of the caches, before a hand-over.
    pub(super) cache: Vec<Note>,
}

impl Past {
    /// The console as it is kept: what was printed before a hand-over, then the rest.
    pub(super) fn with(&self, now: Option<(String, u64)>) -> Option<(String, u64)> {
        match (&self.console, now) {
            (Some((before, rows_before)), Some((text, rows))) => {
                let whole = format!("{before}{text}");
                Some((last_rows(&whole, CONSOLE_BYTES_MAX).to_owned(), rows_before.saturating_add(rows)))
            }
            (before, now) => now.or_else(|| before.clone()),
        }
    }
}

/// The machine of a record.
pub(super) fn machine_was(record: &Record) -> Option<MachineWas> {
    let spec = record.machine_spec.as_ref()?;
    Some(MachineWas {
        image: spec.image.name.clone(),
        digest: spec.image.digest.clone(),
        executor: spec.executor.name().to_owned(),
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        disk_gib: spec.disk_gib,
        vm: record.machine.as_ref().map(|machine| VmName::from(machine.id.clone()).to_string()),
    })
}

/// The end of a job of which no more is known than its record.
pub(super) fn end_of(record: &Record, now: Timestamp) -> End {
    End {
        version: history::VERSION,
        runner: record.key.runner.clone(),
        id: record.key.id,
        gitlab: record.gitlab.to_string(),
        project: record.project.clone(),
        name: record.name.clone(),
        class: record.class.clone(),
        received: record.received,
        ended: now,
        verdict: Outcome::Unknown,
        failure_reason: None,
        exit_code: None,
        why: None,
        at_gitlab: AtGitlab::All,
        log_bytes: 0,
        machine: machine_was(record),
        steps: Vec::new(),
        // With names that the log masks, and what those are is not known here.
        reached: Vec::new(),
        console_rows: 0,
        console: None,
        cache: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_goes_on_behind_what_was_printed_before_a_hand_over() {
        let past = Past { console: Some(("one\n".into(), 1)), ..Past::default() };
        assert_eq!(past.with(Some(("two\n".into(), 1))), Some(("one\ntwo\n".into(), 2)));
        assert_eq!(past.with(None), Some(("one\n".into(), 1)));
        assert_eq!(Past::default().with(Some(("two\n".into(), 1))), Some(("two\n".into(), 1)));
        let long = Past { console: Some(("x".repeat(CONSOLE_BYTES_MAX) + "\n", 1)), ..Past::default() };
        assert_eq!(long.with(Some(("two\n".into(), 1))), Some(("two\n".into(), 2)), "whole rows");
    }
}
