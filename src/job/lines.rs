//! Our own lines in the trace: the author's words, in the runner's timestamp format.
//!
//!     2026-01-31T12:34:56.123456Z 00O text of a line
//!
//! GitLab decides from the first line whether a log has timestamps, so ours must have them
//! (design D20). Lines name no host, no path and no secret: the CI user reads them.

use super::refuse::Refusal;
use super::state::Failure;
use jiff::Timestamp;
use std::fmt::Write as _;
use std::time::Duration;

/// Opens the collapsed section of the boot.
#[must_use]
pub(super) fn boot_section_start(now: Timestamp, sections: bool) -> String {
    let title = "\x1b[0K\x1b[36;1mdayfly: preparing a fresh virtual machine\x1b[0;m";
    if sections {
        let start = format!("section_start:{}:dayfly_boot[collapsed=true]\r\x1b[0K", now.as_second());
        format!("{}{} 00O+{title}\n", line(now, &start), stamp(now))
    } else {
        line(now, title)
    }
}

/// Closes it.
#[must_use]
pub(super) fn boot_section_end(now: Timestamp, sections: bool) -> String {
    if sections { line(now, &format!("section_end:{}:dayfly_boot\r\x1b[0K", now.as_second())) } else { String::new() }
}

/// One phase of the boot and when it was reached.
#[must_use]
pub(super) fn phase(now: Timestamp, what: &str, since_received: Duration) -> String {
    line(now, &format!("  {:>7.2} s  {what}", since_received.as_secs_f64()))
}

/// A plain line.
#[must_use]
pub(super) fn note(now: Timestamp, text: &str) -> String {
    line(now, text)
}

/// What the author reads when we had to end the job: what happened and whose move it is, then a
/// line to hand to the operators. `limit`: the deadline that has passed, if one has; `image`: the
/// base image of the job's machine class.
#[must_use]
pub(super) fn failure(now: Timestamp, failure: Failure, job: u64, limit: Duration, image: &str) -> String {
    let limit = people(limit);
    let (what, whose) = match failure {
        Failure::NoMachine => ("no virtual machine could be started".into(), NOT_YOURS),
        Failure::DiedBooting => ("the virtual machine ended before it was ready, twice".into(), NOT_YOURS),
        Failure::BootDeadline => (format!("the virtual machine was not ready within {limit}"), NOT_YOURS),
        Failure::Died => ("the virtual machine ended in the middle of the job".into(), DIED),
        Failure::HostMemory => (
            "the virtual machine ended while this runner's host had too little memory, and its kernel ended processes"
                .into(),
            NOT_YOURS,
        ),
        Failure::HostDisk => ("the host's disk failed or is full".into(), NOT_YOURS),
        Failure::Silent => (format!("the virtual machine said nothing for {limit}"), DIED),
        Failure::Timeout => (
            format!("the job did not end within its timeout of {limit}"),
            "Make the job shorter, or raise its timeout in .gitlab-ci.yml or the project's settings.",
        ),
        Failure::CanceledBooting => ("the job was canceled before it started".into(), "Nothing of it has run."),
        Failure::CancelGrace => (
            format!("the job was canceled, and its after_script did not end within {limit}"),
            "Shorten after_script if its work must be finished.",
        ),
        Failure::Killed => {
            ("an operator of this runner ended the job".into(), "Please retry it, or ask your operators.")
        }
        Failure::HostLost => ("this runner's host was restarted".into(), NOT_YOURS),
        Failure::NoImage => (format!("the image `{image}` of this runner's machines cannot be used"), OPERATORS),
        Failure::Bug => ("this runner made a mistake of its own, a bug in dayfly".into(), NOT_YOURS),
    };
    let label = match failure {
        Failure::NoMachine => "no machine",
        Failure::DiedBooting => "machine died booting",
        Failure::BootDeadline => "boot deadline",
        Failure::Died => "machine died",
        Failure::HostMemory => "machine died, host out of memory",
        Failure::HostDisk => "host disk",
        Failure::Silent => "silence deadline",
        Failure::Timeout => "timeout",
        Failure::CanceledBooting => "canceled booting",
        Failure::CancelGrace => "cancel grace",
        Failure::Killed => "killed",
        Failure::HostLost => "host lost",
        Failure::NoImage => "no image",
        Failure::Bug => "bug",
    };
    let seconds = now.strftime("%Y-%m-%dT%H:%M:%SZ");
    let mut text = line(now, &format!("\x1b[31;1mdayfly: {what}. {whose}\x1b[0;m"));
    text.push_str(&line(now, &format!("dayfly: for your operators: job {job}, {label}, {seconds}")));
    text
}

/// What the author of a job reads that is never run here.
#[must_use]
pub(super) fn refusal(now: Timestamp, why: Refusal, job: u64) -> String {
    let (what, label) = match why {
        Refusal::Unreadable => ("what GitLab sent of this job could not be read", "unreadable"),
        Refusal::NotKept => ("this runner's host could not write the job down", "not kept"),
        Refusal::GivenTwice => ("GitLab gave this job out again while this runner was ending it", "given twice"),
        Refusal::Bug => ("this runner made a mistake of its own, twice, a bug in dayfly", "bug"),
    };
    let seconds = now.strftime("%Y-%m-%dT%H:%M:%SZ");
    let mut text = line(now, &format!("\x1b[31;1mdayfly: {what}. {NOT_YOURS}\x1b[0;m"));
    text.push_str(&line(now, &format!("dayfly: for your operators: job {job}, {label}, {seconds}")));
    text
}

const OPERATORS: &str = "Your job is not the cause; please tell your operators, and retry it later.";
const NOT_YOURS: &str = "Your job is not the cause; please retry.";
const DIED: &str = "If it used up the machine's memory or powered it off, change the job; else please retry.";

/// The console's last lines, for a machine that never asked for its job. `tail` is escaped already.
#[must_use]
pub(super) fn console(now: Timestamp, tail: &str) -> String {
    if tail.trim().is_empty() {
        return line(now, "dayfly: the machine's console printed nothing.");
    }
    let mut text = line(now, "dayfly: the last lines of the machine's console:");
    for row in tail.lines() {
        text.push_str(&line(now, &format!("  | {row}")));
    }
    text
}

fn stamp(now: Timestamp) -> impl std::fmt::Display {
    now.strftime("%Y-%m-%dT%H:%M:%S.%6fZ")
}

fn line(now: Timestamp, text: &str) -> String {
    let mut line = String::with_capacity(text.len() + 34);
    writeln!(line, "{} 00O {text}", stamp(now)).expect("a String takes all");
    line
}

/// A duration in the words of people: `90 s`, `5 min`, `1 h 30 min`.
#[must_use]
pub(super) fn people(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds % 3600 / 60, seconds % 60) {
        (0, 0, _) => format!("{:.0} s", duration.as_secs_f64()),
        (0, minutes, 0) => format!("{minutes} min"),
        (0, minutes, s) => format!("{minutes} min {s} s"),
        (hours, 0, _) => format!("{hours} h"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-01-02T12:03:11.052991Z".parse().unwrap()
    }

    #[test]
    fn our_lines_have_the_runners_timestamp_format() {
        assert_eq!(note(now(), "text"), "2026-01-02T12:03:11.052991Z 00O text\n");
        assert_eq!(
            phase(now(), "disk ready", Duration::from_millis(1234)),
            "2026-01-02T12:03:11.052991Z 00O      1.23 s  disk ready\n"
        );
    }

    #[test]
    fn the_first_line_of_a_log_is_no_continuation() {
        let start = boot_section_start(now(), true);
        assert!(start.starts_with(
            "2026-01-02T12:03:11.052991Z 00O section_start:1767355391:dayfly_boot[collapsed=true]\r\x1b[0K\n"
        ));
        assert!(start.lines().all(|l| l.len() >= 32 && l.as_bytes()[26] == b'Z'));
    }

    #[test]
    fn a_failure_says_what_happened_whose_move_it_is_and_what_operators_need() {
        let text = failure(now(), Failure::BootDeadline, 42, Duration::from_secs(300), "debian");
        assert!(text.contains(
            "dayfly: the virtual machine was not ready within 5 min. Your job is not the cause; please retry."
        ));
        assert!(text.contains("dayfly: for your operators: job 42, boot deadline, 2026-01-02T12:03:11Z"));
    }

    #[test]
    fn durations_read_like_words() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (300, "5 min"), (61, "1 min 1 s"), (3600, "1 h"), (5400, "1 h 30 min")]
        {
            assert_eq!(people(Duration::from_secs(seconds)), text);
        }
    }
}
