//! How a job that we had to end is told to its author: what happened, whose move it is, whether a retry helps.
//!
//! No line names memory, disk or host unless that was measured. `docs/authors.md` lists them all, held to this file.

use super::line;
use super::people;
use crate::job::state::Failure;
use crate::secret::Secret;
use crate::vm::Ending;
use jiff::Timestamp;
use std::time::Duration;

/// The words of one end.
struct Words {
    /// For the operators' line, and for their `grep`.
    label: &'static str,
    what: String,
    whose: &'static str,
}

/// What the author reads when we had to end the job: what happened and whose move it is, then a
/// line to hand to the operators. `limit`: the deadline that has passed, if one has; `about`: the base image of the
/// job's machine, or what is allowed to a job that is refused.
#[must_use]
pub(in crate::job) fn failure(now: Timestamp, failure: Failure, job: u64, limit: Duration, about: &str) -> String {
    let Words { label, what, whose } = words(failure, &people(limit), about);
    let seconds = now.strftime("%Y-%m-%dT%H:%M:%SZ");
    let mut text = line(now, &format!("\x1b[31;1mdayfly: {what}. {whose}\x1b[0;m"));
    text.push_str(&line(now, &format!("dayfly: for your operators: job {job}, {label}, {seconds}")));
    text
}

fn words(failure: Failure, limit: &str, about: &str) -> Words {
    let (label, what, whose): (_, String, _) = match failure {
        Failure::NoMachine => ("no machine", "no virtual machine could be started".into(), NOT_YOURS),
        Failure::DiedBooting(_) => {
            ("machine died booting", "the virtual machine ended before it was ready, twice".into(), NOT_YOURS)
        }
        Failure::BootDeadline => {
            ("boot deadline", format!("the virtual machine was not ready within {limit}"), NOT_YOURS)
        }
        Failure::NotTaken => (
            "job not taken",
            "the virtual machine's gitlab-runner was given the job several times and did not begin it".into(),
            OPERATORS,
        ),
        Failure::Died(ending) => died(ending),
        Failure::HostMemory => (
            "machine died, host out of memory",
            "the virtual machine ended while this runner's host had too little memory, and its kernel ended processes"
                .into(),
            NOT_YOURS,
        ),
        Failure::HostDisk => ("host disk", "the host's disk failed or is full".into(), NOT_YOURS),
        Failure::HostStopped => (
            "machine stopped by QEMU",
            "the virtual machine's processors were stopped by QEMU itself".into(),
            NOT_YOURS,
        ),
        Failure::HostPaused => (
            "machine paused at the host",
            format!("somebody at this runner's host paused the virtual machine for {limit}"),
            NOT_YOURS,
        ),
        Failure::Silent => ("silence deadline", format!("the virtual machine said nothing for {limit}"), SILENT),
        Failure::Timeout => (
            "timeout",
            format!("the job did not end within its timeout of {limit}"),
            "Make the job shorter, or raise its timeout in .gitlab-ci.yml or the project's settings; a retry alone does not help.",
        ),
        Failure::CanceledBooting => (
            "canceled booting",
            "the job was canceled before it started".into(),
            "Nothing of it has run; a retry runs it.",
        ),
        Failure::CancelGrace => (
            "cancel grace",
            format!("the job was canceled, and its after_script did not end within {limit}"),
            "Shorten after_script if its work must be finished; a retry begins the job anew.",
        ),
        Failure::Killed => {
            ("killed", "an operator of this runner ended the job".into(), "Please retry it, or ask your operators.")
        }
        Failure::HostLost => ("host lost", "this runner's host was restarted".into(), NOT_YOURS),
        Failure::Lost => (
            "lost",
            "this runner was restarted, and what it needs to go on with the job was not there any more".into(),
            NOT_YOURS,
        ),
        Failure::NoImage => {
            ("no image", format!("the image `{about}` of this runner's machines cannot be used"), OPERATORS)
        }
        Failure::Bug => ("bug", "this runner made a mistake of its own, a bug in dayfly".into(), NOT_YOURS),
        Failure::Unreadable => ("unreadable", "what GitLab sent of this job could not be read".into(), NOT_YOURS),
        Failure::NotKept => ("not kept", "this runner's host could not write the job down".into(), NOT_YOURS),
        Failure::GivenTwice => {
            ("given twice", "GitLab gave this job out again while this runner was ending it".into(), NOT_YOURS)
        }
        Failure::BugTwice => ("bug", "this runner made a mistake of its own, twice, a bug in dayfly".into(), NOT_YOURS),
        Failure::Unmet => (
            "wish unmet",
            format!("this runner cannot give the job the machine that it asks for: {about}"),
            "Change the job's variables, or ask your operators; a retry alone does not help.",
        ),
        Failure::Denied => (
            "denied by a rule",
            format!("this runner does not take the job: {}", about.trim_end().trim_end_matches('.')),
            "Ask your operators; a retry alone does not help.",
        ),
    };
    Words { label, what, whose }
}

const OPERATORS: &str = "Your job is not the cause; please tell your operators, and retry it later.";
const NOT_YOURS: &str = "Your job is not the cause; please retry.";
const FROM_INSIDE: &str = "If the job brought that about, change it; else please retry.";
const SILENT: &str =
    "If the job cut off the machine's network, or stopped what runs there, change the job; else please retry.";
const AGAIN: &str = "Please retry; if that happens again, tell your operators.";

/// How a machine ended in mid-job, as far as that was seen, and whose move it is.
fn died(ending: Ending) -> (&'static str, String, &'static str) {
    let (label, how, whose) = match ending {
        Ending::Unseen => {
            ("machine ended", "ended", "If the job powered it off or restarted it, change the job; else please retry.")
        }
        Ending::PoweredOff => ("machine powered off", "was powered off from inside,", FROM_INSIDE),
        Ending::Restarted => ("machine restarted", "was restarted from inside, which ends it,", FROM_INSIDE),
        Ending::Panicked => ("guest kernel panicked", "ended by a panic of its kernel", FROM_INSIDE),
        Ending::Slept => ("machine went to sleep", "was put to sleep from inside, which ends it,", FROM_INSIDE),
        Ending::Hung => ("machine's watchdog", "was ended by its watchdog", FROM_INSIDE),
        Ending::Destroyed => ("machine ended at the host", "was ended by somebody at this runner's host", NOT_YOURS),
        Ending::Died => ("machine's process ended", "ended because its process crashed or was killed", AGAIN),
    };
    (label, format!("the virtual machine {how} in the middle of the job"), whose)
}

/// What a machine said of its own end: it may be wrong, so each line says who speaks.
#[derive(Debug, Default)]
pub(in crate::job) struct Hints {
    /// The exit code of its gitlab-runner, which ended before it gave the job's verdict; 128 + n for signal n.
    pub(in crate::job) runner_exited: Option<i32>,
    /// What its guest program said last that it could not do, or of its own end.
    pub(in crate::job) guest: Option<String>,
    /// See [`kernel_words`].
    pub(in crate::job) console: Option<String>,
    /// See [`runner_words`].
    pub(in crate::job) runner: Option<String>,
}

impl Hints {
    #[must_use]
    pub(in crate::job) fn lines(&self, now: Timestamp) -> String {
        let mut text = String::new();
        if let Some(code) = self.runner_exited {
            let how =
                if code > 128 { format!("killed by signal {}", code - 128) } else { format!("with exit code {code}") };
            let says = format!("dayfly: the machine says that its gitlab-runner had ended before that, {how}.");
            text.push_str(&line(now, &says));
        }
        if let Some(words) = &self.guest {
            let plain: String =
                words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(ROW_CHARS_MAX).collect();
            text.push_str(&line(now, &format!("dayfly: the machine says: {plain}")));
        }
        if let Some(words) = &self.console {
            text.push_str(&line(now, &format!("dayfly: the machine's console says: {words}")));
        }
        if let Some(words) = &self.runner {
            text.push_str(&line(now, &format!("dayfly: the machine's gitlab-runner says: {words}")));
        }
        text
    }
}

/// Characters of a console's row that are shown.
const ROW_CHARS_MAX: usize = 160;

/// Characters of a runner's row: its fields stand before what it says of an answer.
const RUNNER_CHARS_MAX: usize = 400;

/// What the kernel has printed last, on the tail of a console, of a panic or of its own end. All of a console is its
/// guest's to write, and a job may print there what its log would mask: so no more than such a row, and it is a hint.
#[must_use]
pub(in crate::job) fn kernel_words(tail: &str) -> Option<String> {
    let row = |mark: &str| {
        let row = tail.lines().rev().find_map(|row| row.find(mark).map(|at| &row[at..]))?;
        Some(row.trim_end_matches(" ]---").chars().take(ROW_CHARS_MAX).collect())
    };
    row("Kernel panic - not syncing: ").or_else(|| row("reboot: "))
}

/// What the machine's gitlab-runner has said last, on the tail of a console, of its asking for jobs: an answer that it
/// cannot decode stands there. Of a job that it did not begin nothing has run, so nothing of it is printed either.
#[must_use]
pub(in crate::job) fn runner_words(tail: &str) -> Option<String> {
    let row = tail.lines().rev().find(|row| row.contains("Checking for jobs"))?;
    let words = row.split_whitespace().collect::<Vec<_>>().join(" ");
    Some(words.chars().take(RUNNER_CHARS_MAX).collect())
}

/// `text` with each of `masks` taken out, as the job's log would have it.
#[must_use]
pub(in crate::job) fn masked(text: &str, masks: &[Secret]) -> String {
    let mut masks: Vec<&str> = masks.iter().map(Secret::expose).filter(|mask| !mask.is_empty()).collect();
    // A value may hold another one.
    masks.sort_by_key(|mask| std::cmp::Reverse(mask.len()));
    masks.iter().fold(text.to_owned(), |text, mask| text.replace(mask, "[MASKED]"))
}

/// The console's last lines, for a job whose guest has written nothing of its log. `tail` is escaped and masked already.
#[must_use]
pub(in crate::job) fn console(now: Timestamp, tail: &str) -> String {
    if tail.trim().is_empty() {
        return line(now, "dayfly: the machine's console printed nothing.");
    }
    let mut text = line(now, "dayfly: the last lines of the machine's console:");
    for row in tail.lines() {
        text.push_str(&line(now, &format!("  | {row}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::lines::tests::now;
    use crate::vm::console::Ring;

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
        let hints = Hints { runner_exited: Some(137), console: words, ..Hints::default() };
        assert_eq!(
            hints.lines(now()).lines().map(|line| &line[32..]).collect::<Vec<_>>(),
            [
                "dayfly: the machine says that its gitlab-runner had ended before that, killed by signal 9.",
                "dayfly: the machine's console says: Kernel panic - not syncing: sysrq triggered crash"
            ]
        );
    }

    /// U10: of all that stands on the console, what the runner says of its asking.
    #[test]
    fn a_runners_complaint_is_found_on_the_console() {
        let tail = "Starting\nWARNING: Checking for jobs... failed  status=first\nERROR: Checking for jobs... error  \
                    status=Error decoding json payload json: cannot unmarshal string into Go struct field Job.image\n[ 4.1] eth0\n";
        let words = runner_words(tail).unwrap();
        assert!(words.starts_with("ERROR: Checking for jobs... error") && words.ends_with("Job.image"), "{words}");
        // As 17.5 writes it, in colours and columns.
        let mut ring = Ring::default();
        ring.push(
            b"\x1b[0;33mWARNING: Checking for jobs... failed              \x1b[0;m  \x1b[0;33mrunner\x1b[0;m=public002 \
              \x1b[0;33mstatus\x1b[0;m=Error decoding json payload json: cannot unmarshal string\r\n",
        );
        assert_eq!(
            runner_words(&ring.tail(4096)).unwrap(),
            "WARNING: Checking for jobs... failed runner=public002 status=Error decoding json payload json: cannot \
             unmarshal string"
        );
        assert_eq!(runner_words("nothing of it\n"), None);
        assert_eq!(runner_words(&format!("Checking for jobs... {}", "x".repeat(9000))).unwrap().len(), 400);
    }

    /// U51: a console's tail goes into a log only without what the log masks.
    #[test]
    fn masked_values_are_taken_out_whole() {
        let masks = ["hunter2", "hunter2-and-more", "", "x"].map(Secret::new);
        assert_eq!(masked("a hunter2-and-more b hunter2 c", &masks[..3]), "a [MASKED] b [MASKED] c");
        assert_eq!(masked("six", &masks[3..]), "si[MASKED]");
    }

    const ENDINGS: [Ending; 8] = [
        Ending::Unseen,
        Ending::PoweredOff,
        Ending::Restarted,
        Ending::Panicked,
        Ending::Slept,
        Ending::Hung,
        Ending::Destroyed,
        Ending::Died,
    ];

    /// Each failure there is. A new one fails to compile here until it is listed.
    fn failures() -> Vec<Failure> {
        let listed = [
            Failure::NoMachine,
            Failure::DiedBooting(Ending::Unseen),
            Failure::BootDeadline,
            Failure::NotTaken,
            Failure::HostMemory,
            Failure::HostDisk,
            Failure::HostStopped,
            Failure::HostPaused,
            Failure::Silent,
            Failure::Timeout,
            Failure::CanceledBooting,
            Failure::CancelGrace,
            Failure::Killed,
            Failure::HostLost,
            Failure::Lost,
            Failure::NoImage,
            Failure::Bug,
            Failure::Unreadable,
            Failure::NotKept,
            Failure::GivenTwice,
            Failure::BugTwice,
            Failure::Unmet,
            Failure::Denied,
        ];
        for failure in listed {
            match failure {
                Failure::NoMachine
                | Failure::DiedBooting(_)
                | Failure::BootDeadline
                | Failure::NotTaken
                | Failure::Died(_)
                | Failure::HostMemory
                | Failure::HostDisk
                | Failure::HostStopped
                | Failure::HostPaused
                | Failure::Silent
                | Failure::Timeout
                | Failure::CanceledBooting
                | Failure::CancelGrace
                | Failure::Killed
                | Failure::HostLost
                | Failure::Lost
                | Failure::NoImage
                | Failure::Bug
                | Failure::Unreadable
                | Failure::NotKept
                | Failure::GivenTwice
                | Failure::BugTwice
                | Failure::Unmet
                | Failure::Denied => {}
            }
        }
        listed.into_iter().chain(ENDINGS.map(Failure::Died)).collect()
    }

    /// The page that lists these lines for authors has each of them, word for word, and no other.
    #[test]
    fn the_authors_page_is_held_to_the_code() {
        let page = include_str!("../../../docs/authors.md");
        let mut rows: Vec<String> = failures()
            .into_iter()
            .map(|failure| {
                let about = if failure == Failure::NoImage { "NAME" } else { "WHY" };
                let Words { label, what, whose } = words(failure, "LIMIT", about);
                format!("| {label} | {what}. {whose} | `{}` |", failure.reason())
            })
            .collect();
        let listed =
            page.lines().filter(|line| line.ends_with("` |") && line.contains("`r") || line.contains("`job_execution"));
        let mut listed: Vec<&str> = listed.collect();
        rows.sort();
        listed.sort_unstable();
        assert!(listed == rows, "the page should have these rows, and no others:\n{}", rows.join("\n"));
    }
}
