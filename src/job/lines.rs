//! Our own lines in the trace: the author's words, in the runner's timestamp format.
//!
//!     2026-01-31T12:34:56.123456Z 00O text of a line
//!
//! GitLab decides from the first line whether a log has timestamps, so ours must have them
//! (design D20). Lines name no host, no path and no secret: the CI user reads them.

use super::refuse::Refusal;
use super::state::Failure;
use crate::gitlab::Containers;
use crate::vm::Ending;
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

/// What the author of a job reads that asks for containers on machines whose runner starts none (the shell executor
/// ignores both keys); `None`: it asks for none.
#[must_use]
pub(super) fn no_containers(asked: &Containers) -> Option<String> {
    let image = asked.image.as_ref().map(|name| format!("`image: {name}`"));
    let services = (!asked.services.is_empty()).then(|| format!("`services: {}`", asked.services.join(", ")));
    let keys = [image, services].into_iter().flatten().collect::<Vec<_>>().join(" and ");
    (!keys.is_empty()).then(|| {
        format!("  {keys} has no effect here: this runner's jobs run in the virtual machine itself, not in a container")
    })
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
        Failure::DiedBooting(_) => ("the virtual machine ended before it was ready, twice".into(), NOT_YOURS),
        Failure::BootDeadline => (format!("the virtual machine was not ready within {limit}"), NOT_YOURS),
        Failure::Died(ending) => died(ending),
        Failure::HostMemory => (
            "the virtual machine ended while this runner's host had too little memory, and its kernel ended processes"
                .into(),
            NOT_YOURS,
        ),
        Failure::HostDisk => ("the host's disk failed or is full".into(), NOT_YOURS),
        Failure::HostStopped => ("the virtual machine's processors were stopped by QEMU itself".into(), NOT_YOURS),
        Failure::HostPaused => {
            (format!("somebody at this runner's host paused the virtual machine for {limit}"), NOT_YOURS)
        }
        Failure::Silent => (format!("the virtual machine said nothing for {limit}"), SILENT),
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
        Failure::DiedBooting(_) => "machine died booting",
        Failure::BootDeadline => "boot deadline",
        Failure::Died(Ending::Unseen) => "machine ended",
        Failure::Died(Ending::PoweredOff) => "machine powered off",
        Failure::Died(Ending::Restarted) => "machine restarted",
        Failure::Died(Ending::Panicked) => "guest kernel panicked",
        Failure::Died(Ending::Slept) => "machine went to sleep",
        Failure::Died(Ending::Hung) => "machine's watchdog",
        Failure::Died(Ending::Destroyed) => "machine ended at the host",
        Failure::Died(Ending::Died) => "machine's process ended",
        Failure::HostMemory => "machine died, host out of memory",
        Failure::HostDisk => "host disk",
        Failure::HostStopped => "machine stopped by QEMU",
        Failure::HostPaused => "machine paused at the host",
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
const FROM_INSIDE: &str = "If the job brought that about, change it; else please retry.";
const SILENT: &str =
    "If the job cut off the machine's network, or stopped what runs there, change the job; else please retry.";
const AGAIN: &str = "Please retry; if that happens again, tell your operators.";

/// How a machine ended in mid-job, as far as that was seen, and whose move it is.
fn died(ending: Ending) -> (String, &'static str) {
    let (how, whose) = match ending {
        Ending::Unseen => ("ended", "If the job powered it off or restarted it, change the job; else please retry."),
        Ending::PoweredOff => ("was powered off from inside,", FROM_INSIDE),
        Ending::Restarted => ("was restarted from inside, which ends it,", FROM_INSIDE),
        Ending::Panicked => ("ended by a panic of its kernel", FROM_INSIDE),
        Ending::Slept => ("was put to sleep from inside, which ends it,", FROM_INSIDE),
        Ending::Hung => ("was ended by its watchdog", FROM_INSIDE),
        Ending::Destroyed => ("was ended by somebody at this runner's host", NOT_YOURS),
        Ending::Died => ("ended because its process crashed or was killed", AGAIN),
    };
    (format!("the virtual machine {how} in the middle of the job"), whose)
}

/// What a machine said of its own end: it may be wrong, so each line says who speaks.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// The exit code of its gitlab-runner, which ended before it gave the job's verdict; 128 + n for signal n.
    pub(super) runner_exited: Option<i32>,
    /// See [`kernel_words`].
    pub(super) console: Option<String>,
}

impl Hints {
    #[must_use]
    pub(super) fn lines(&self, now: Timestamp) -> String {
        let mut text = String::new();
        if let Some(code) = self.runner_exited {
            let how =
                if code > 128 { format!("killed by signal {}", code - 128) } else { format!("with exit code {code}") };
            let says = format!("dayfly: the machine says that its gitlab-runner had ended before that, {how}.");
            text.push_str(&line(now, &says));
        }
        if let Some(words) = &self.console {
            text.push_str(&line(now, &format!("dayfly: the machine's console says: {words}")));
        }
        text
    }
}

/// Characters of a console's row that are shown.
const ROW_CHARS_MAX: usize = 160;

/// What the kernel has printed last, on the tail of a console, of a panic or of its own end. All of a console is its
/// guest's to write, and a job may print there what its log would mask: so no more than such a row, and it is a hint.
#[must_use]
pub(super) fn kernel_words(tail: &str) -> Option<String> {
    let row = |mark: &str| {
        let row = tail.lines().rev().find_map(|row| row.find(mark).map(|at| &row[at..]))?;
        Some(row.trim_end_matches(" ]---").chars().take(ROW_CHARS_MAX).collect())
    };
    row("Kernel panic - not syncing: ").or_else(|| row("reboot: "))
}

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

    /// U47: what was seen of a machine's end is said, and nothing else; no line names memory.
    #[test]
    fn each_end_of_a_machine_has_its_own_words() {
        let mut seen = std::collections::BTreeSet::new();
        for (ending, words) in [
            (Ending::Unseen, "the virtual machine ended in the middle of the job. If the job powered it off"),
            (
                Ending::PoweredOff,
                "the virtual machine was powered off from inside, in the middle of the job. If the job",
            ),
            (Ending::Restarted, "the virtual machine was restarted from inside, which ends it, in the middle"),
            (Ending::Panicked, "the virtual machine ended by a panic of its kernel in the middle of the job."),
            (Ending::Slept, "the virtual machine was put to sleep from inside, which ends it,"),
            (Ending::Hung, "the virtual machine was ended by its watchdog"),
            (
                Ending::Destroyed,
                "ended by somebody at this runner's host in the middle of the job. Your job is not the",
            ),
            (Ending::Died, "ended because its process crashed or was killed in the middle of the job. Please retry"),
        ] {
            let text = failure(now(), Failure::Died(ending), 42, Duration::ZERO, "debian");
            assert!(text.contains(words), "{text}");
            let other = ["memory", "disk"].iter().any(|word| text.contains(word));
            assert!(!other && (ending == Ending::Destroyed || !text.contains("host")), "nobody measured that: {text}");
            assert!(seen.insert(text), "each its own");
        }
        let silent = failure(now(), Failure::Silent, 42, Duration::from_secs(300), "debian");
        assert!(silent.contains("said nothing for 5 min.") && !silent.contains("memory"), "{silent}");
    }

    /// U47: what the machine says itself is quoted as its own words.
    #[test]
    fn a_panic_on_the_console_is_quoted_and_nothing_else_of_it() {
        let tail = "MASKED=hunter2\n[    4.1] sysrq: Trigger a crash\n[    4.2] Kernel panic - not syncing: sysrq triggered crash\n\
                    [    4.3] CPU: 0\n[    4.4] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\n";
        let words = kernel_words(tail);
        assert_eq!(words.as_deref(), Some("Kernel panic - not syncing: sysrq triggered crash"));
        assert_eq!(kernel_words("[   3.36] reboot: Power down\n").as_deref(), Some("reboot: Power down"));
        assert_eq!(kernel_words("MASKED=hunter2\n"), None);
        let hints = Hints { runner_exited: Some(137), console: words };
        assert_eq!(
            hints.lines(now()).lines().map(|line| &line[32..]).collect::<Vec<_>>(),
            [
                "dayfly: the machine says that its gitlab-runner had ended before that, killed by signal 9.",
                "dayfly: the machine's console says: Kernel panic - not syncing: sysrq triggered crash"
            ]
        );
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
