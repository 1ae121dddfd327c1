//! 4: a failure that we cause has one of our reasons, says why in the trace, and has a cause.

use super::{Checker, Findings};
use crate::event::{Event, FileOp};
use crate::ledger::{JobNote, Ledger, job_of};
use crate::plan::Plan;
use dayfly_exec::standin::{JobState, Route};
use std::time::Duration;

const REASONS: [&str; 3] = ["runner_system_failure", "job_execution_timeout", "runner_interrupted"];

const MARKER: &str = "dayfly: for your operators: job ";

/// The cause as the operators' line names it: `job 42, boot deadline, 2026-…`.
fn label(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    Some(text.split_once(MARKER)?.1.split(", ").nth(1)?.to_owned())
}

pub(crate) struct OurFailures {
    boot: Duration,
    silence: Duration,
}

impl OurFailures {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { boot: Duration::from_secs(plan.limits.boot_s), silence: Duration::from_secs(plan.limits.silence_s) }
    }

    /// What the daemon names as the cause, against what has happened. `Some`: it cannot be.
    fn cannot_be(&self, label: &str, note: &JobNote, ledger: &Ledger) -> Option<String> {
        let now = ledger.now;
        let since = now.saturating_sub(note.assigned_at.unwrap_or_default());
        let replaced = note.vms.len() > 1;
        let ended = note.mishap.is_some();
        let was = |word: &str| note.mishap.is_some_and(|(what, _)| what == word);
        let libvirt = note.vm_call_failed || note.files_failed.is_some();
        let holds = match label {
            "no machine" => ledger.image_was_missing || libvirt || replaced || note.vms.is_empty() || ended,
            "machine died booting" => ended || libvirt || ledger.image_was_missing,
            // At the latest when the job's own time is over.
            "boot deadline" => {
                since + Duration::from_secs(1) >= self.boot.min(Duration::from_secs(note.script.timeout_s))
            }
            "job not taken" => note.handed.len() >= 3,
            // Nobody saw how.
            "machine ended" => ended || libvirt,
            "machine powered off" => was("powered off"),
            "machine restarted" => was("rebooted"),
            "guest kernel panicked" => was("panicked"),
            "machine went to sleep" => was("slept"),
            "machine's process ended" => was("crashed"),
            // By nobody but a former daemon, which had ended the job, and whose disk did not take that.
            "machine ended at the host" => note.files_failed.is_some(),
            "host disk" => was("paused") || note.files_failed.is_some(),
            "machine stopped by QEMU" => was("stopped"),
            "machine paused at the host" => was("paused by somebody"),
            "silence deadline" => {
                let spoke = note.guest_spoke_at.or(note.handed.last().map(|(_, at)| *at)).unwrap_or_default();
                now.saturating_sub(spoke) + Duration::from_secs(1) >= self.silence
            }
            "timeout" => since + Duration::from_secs(1) >= Duration::from_secs(note.script.timeout_s),
            "canceled booting" | "cancel grace" => note.users.is_some(),
            "killed" => note.killed_at.is_some(),
            "host lost" => note.mishap.is_some_and(|(what, _)| what == "the host rebooted") || ledger.reboots > 0,
            "lost" => {
                note.mishap.is_some_and(|(what, _)| what == "the host rebooted")
                    || libvirt
                    || ledger.reboots > 0
                    || ledger.stale_records
            }
            "unreadable" => note.payloads.is_empty(),
            "not kept" => note.files_failed.is_some(),
            "no image" => ledger.image_was_missing,
            "bug" => note.panicked.is_some(),
            "given twice" => true,
            _ => return Some(format!("nobody knows the label `{label}`")),
        };
        (!holds).then(|| format!("`{label}` is named as its cause, which it is not"))
    }
}

impl Checker for OurFailures {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        if let Event::File { op: FileOp::WriteAt, path, bytes, ok: true } = event
            && let Some((job, "trace")) = job_of(path)
            && let Some(label) = label(bytes)
            && let Some(note) = ledger.jobs.get(&job)
            && let Some(wrong) = self.cannot_be(&label, note, ledger)
        {
            findings.add(4, format!("job {job}: {wrong}"));
        }
        let Event::Request(request) = event else { return };
        let (Route::UpdateJob, Some(update), Some(job)) = (request.route, request.update, request.job) else { return };
        if update.state != "failed" {
            return;
        }
        let Some(note) = ledger.jobs.get(&job) else { return };
        let of_guest = note.verdict_said.as_ref().is_some_and(|(state, _)| state == "failed");
        let reason = update.reason.as_deref().unwrap_or_default();
        if !of_guest && !REASONS.contains(&reason) {
            findings.add(4, format!("job {job} is failed by us with reason `{reason}`"));
        }
    }

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (id, note) in &ledger.jobs {
            // A guest may end before it learns that its verdict was taken.
            let of_guest = |state: &String, reason: &Option<String>| {
                note.verdict_said.as_ref().is_some_and(|(said, why)| said == state && why == reason)
            };
            let by_us =
                note.sent.first().is_some_and(|(_, state, reason)| state == "failed" && !of_guest(state, reason))
                    && note.verdict_taken.is_none();
            if !by_us || note.verdicts == 0 || note.state != JobState::Failed || note.trace_spoilt.is_some() {
                continue;
            }
            let marker = MARKER.as_bytes();
            let held = &note.held_trace;
            let lines = held.windows(marker.len()).filter(|window| *window == marker).count();
            // A record that was behind has begun a job anew whose end was in its trace already.
            if lines != 1 && !note.spool_failed && !(note.begun_anew && lines > 1) {
                findings.add(4, format!("job {id} was failed by us, and {lines} lines of its trace say why"));
            }
        }
    }
}
