//! 6: a payload goes to one VM, once unless it asks again before it speaks; its bytes but for the timeout's number.

use super::{Checker, Findings};
use crate::event::{Event, GuestDoes};
use crate::ledger::Ledger;

pub(crate) struct Payload;

impl Checker for Payload {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        let Event::Guest { vm, job, does: GuestDoes::Payload { bytes, spoke } } = event else { return };
        let Some(note) = ledger.jobs.get(job) else { return };
        if note.handed.iter().any(|(other, _)| other != vm) {
            findings.add(6, format!("job {job} was given to a second VM"));
        }
        // Over a restart a guest is known to have spoken by its trace alone.
        let known = note.taken > 0 || note.handed.first().is_some_and(|(_, at)| *at >= ledger.began_at);
        if note.handed.len() > 1 && *spoke && known {
            findings.add(6, format!("job {job} was given again to a VM that had spoken for it"));
        }
        if !note.payloads.iter().any(|sent| same_but_timeout(sent, bytes)) {
            findings.add(6, format!("job {job}: its guest was given other bytes than GitLab sent"));
        }
    }
}

/// Equal but for the digits after `"timeout":` of `runner_info`.
fn same_but_timeout(sent: &[u8], given: &[u8]) -> bool {
    if sent == given {
        return true;
    }
    let before = sent.iter().zip(given).take_while(|(a, b)| a == b).count();
    let after = sent.iter().rev().zip(given.iter().rev()).take_while(|(a, b)| a == b).count();
    let digits = |bytes: &[u8]| {
        let end = bytes.len().saturating_sub(after).max(before);
        let begin = (0..before).rev().take_while(|i| bytes[*i].is_ascii_digit()).last().unwrap_or(before);
        (begin, bytes[begin..end].iter().all(u8::is_ascii_digit))
    };
    let ((begin, a), (_, b)) = (digits(sent), digits(given));
    a && b && sent[..begin].ends_with(b"\"timeout\":")
}
