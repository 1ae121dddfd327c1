//! Whether one job ended as it must: once, with the right verdict, and with each byte of its trace.

use crate::work::Wanted;
use dayfly_exec::standin::{Job, JobState};
use dayfly_test_tools::killing::{CANCELED_LINE, Step, artifact, expected, first_line};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;

/// What is wrong with this job; `None`: nothing.
pub(crate) fn wrong(job: &Job, wanted: &Wanted) -> Option<String> {
    let (bytes, code) = expected(job.id.0, &wanted.script);
    let natural = if code == 0 { JobState::Success } else { JobState::Failed };
    if job.handed_out > 1 {
        return Some(format!("it was handed out {} times", job.handed_out));
    }
    if job.state == JobState::Canceled && wanted.cancel.is_some() {
        return canceled_trace(&job.trace.bytes, &bytes, job.id.0);
    }
    if job.state != natural {
        return Some(format!("it ended as {:?} ({:?}), not as {natural:?}", job.state, job.failure_reason));
    }
    if job.verdicts != 1 {
        return Some(format!("GitLab took {} verdicts of it", job.verdicts));
    }
    if natural == JobState::Failed
        && (job.failure_reason.as_deref() != Some("script_failure") || job.exit_code != Some(code))
    {
        return Some(format!(
            "it failed with {:?}, {:?}, not with its script's {code}",
            job.failure_reason, job.exit_code
        ));
    }
    whole_trace(&job.trace.bytes, &bytes, job.id.0).or_else(|| wrong_artifact(job, &wanted.script))
}

/// Whether this job was ended with its daemon, honestly: once, as no fault of its own, with a line that says so.
pub(crate) fn was_cut(job: &Job, wanted: &Wanted) -> bool {
    const WORDS: &[u8] = b"an operator of this runner ended the job";
    let (bytes, _) = expected(job.id.0, &wanted.script);
    let reason = job.failure_reason.as_deref();
    job.state == JobState::Failed
        && (job.handed_out, job.verdicts) == (1, 1)
        && matches!(reason, Some("runner_interrupted" | "runner_system_failure"))
        && find(&job.trace.bytes, WORDS).is_some()
        && canceled_trace(&job.trace.bytes, &bytes, job.id.0).is_none()
}

/// Own lines, the guest's bytes, own lines.
fn whole_trace(trace: &[u8], guest: &[u8], job: u64) -> Option<String> {
    let Some(at) = find(trace, first_line(job).as_bytes()) else {
        return Some("its guest's first line is missing".into());
    };
    let (head, rest) = trace.split_at(at);
    let shared = rest.iter().zip(guest).take_while(|(a, b)| a == b).count();
    if shared < guest.len() {
        let (have, want) = (excerpt(rest, shared), excerpt(guest, shared));
        return Some(format!(
            "byte {shared} of the guest's {} is not the right one: {have:?} instead of {want:?}",
            guest.len()
        ));
    }
    not_ours(head).or_else(|| not_ours(&rest[shared..]))
}

/// Own lines, a beginning of the guest's bytes, and whatever ended it.
fn canceled_trace(trace: &[u8], guest: &[u8], job: u64) -> Option<String> {
    let Some(at) = find(trace, first_line(job).as_bytes()) else { return not_ours(trace) };
    let (head, rest) = trace.split_at(at);
    let shared = rest.iter().zip(guest).take_while(|(a, b)| a == b).count();
    let tail = &rest[shared..];
    // The line of the cancel may begin as the script's next one does.
    let back =
        (0..=CANCELED_LINE.len().min(shared)).find(|back| rest[shared - back..].starts_with(CANCELED_LINE.as_bytes()));
    let tail = match back {
        Some(back) => &rest[shared - back + CANCELED_LINE.len()..],
        None => tail,
    };
    not_ours(head).or_else(|| not_ours(tail))
}

/// The first line that dayfly cannot have written; its own begin with a time and `00O`.
fn not_ours(text: &[u8]) -> Option<String> {
    let ours =
        |line: &&[u8]| line.len() > 32 && line[0].is_ascii_digit() && line[10] == b'T' && line[27..31] == *b" 00O";
    let foreign = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).find(|line| !ours(line))?;
    Some(format!("{:?} stands among dayfly's own lines", excerpt(foreign, 0)))
}

fn wrong_artifact(job: &Job, script: &[Step]) -> Option<String> {
    let count = script.iter().find_map(|step| if let Step::Upload(count) = step { Some(*count) } else { None })?;
    let mut digest = String::new();
    for byte in Sha256::digest(artifact(job.id.0, count)) {
        // Writing to a String never fails.
        let _ = write!(digest, "{byte:02x}");
    }
    match job.artifacts.get("archive") {
        Some(stored) if stored.size == count as u64 && stored.sha256 == digest => None,
        Some(stored) => {
            Some(format!("its artifact has {} bytes, or others than the {count} that were sent", stored.size))
        }
        None => Some("its artifact is missing".into()),
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

fn excerpt(bytes: &[u8], at: usize) -> String {
    String::from_utf8_lossy(&bytes[at.min(bytes.len())..bytes.len().min(at + 80)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "2026-01-02T12:03:11.052991Z 00O dayfly: preparing\n";

    #[test]
    fn a_trace_is_own_lines_then_the_guests_bytes_then_own_lines() {
        let (guest, _) = expected(5, &[Step::Bytes(300)]);
        let whole = [OURS.as_bytes(), &guest, OURS.as_bytes()].concat();
        assert_eq!(whole_trace(&whole, &guest, 5), None);
        assert_eq!(whole_trace(&guest, &guest, 5), None);
        let cut = &whole[..whole.len() - OURS.len() - 1];
        assert!(whole_trace(cut, &guest, 5).is_some(), "the last byte is missing");
        let mut doubled = whole.clone();
        doubled.extend_from_slice(&guest[guest.len() - 20..]);
        assert!(whole_trace(&doubled, &guest, 5).is_some(), "a piece came twice");
        let mut inside = whole;
        inside.splice(OURS.len() + 100..OURS.len() + 100, OURS.bytes());
        assert!(whole_trace(&inside, &guest, 5).is_some(), "an own line stands between");
        assert!(whole_trace(OURS.as_bytes(), &guest, 5).is_some(), "the guest has not spoken");
    }

    #[test]
    fn a_canceled_trace_may_end_anywhere_in_the_guests_bytes() {
        let (guest, _) = expected(5, &[Step::Bytes(300)]);
        for end in [0, 10, 40, 200, guest.len()] {
            let mut trace = [OURS.as_bytes(), &guest[..end]].concat();
            if end == 10 {
                // Shorter than the first line: nothing of a guest can be told apart in it.
                assert!(canceled_trace(&trace, &guest, 5).is_some());
                continue;
            }
            assert_eq!(canceled_trace(&trace, &guest, 5), None, "{end}");
            if end > 40 {
                trace.extend_from_slice(CANCELED_LINE.as_bytes());
                trace.extend_from_slice(OURS.as_bytes());
                assert_eq!(canceled_trace(&trace, &guest, 5), None, "{end}");
                trace.extend_from_slice(b"more of the guest\n");
                assert!(canceled_trace(&trace, &guest, 5).is_some(), "{end}");
            }
        }
    }
}
