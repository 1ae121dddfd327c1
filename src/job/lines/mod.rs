//! Our own lines in the trace: the author's words, in the runner's timestamp format.
//!
//!     2026-01-31T12:34:56.123456Z 00O text of a line
//!
//! GitLab decides from the first line whether a log has timestamps, so ours must have them
//! (decision D20). Lines name no host, no path and no secret: the CI user reads them.

mod clone;
mod ends;
mod machine;
mod reached;

pub(super) use clone::clone;
pub(super) use ends::{Hints, console, failure, kernel_words, masked, runner_words};
pub(super) use machine::Section;
pub(super) use reached::{reached, told};

use crate::gitlab::Containers;
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
/// ignores both keys); `None`: it asks for none. `images`: what it may name there instead.
#[must_use]
pub(super) fn no_containers(asked: &Containers, images: Option<&str>) -> Option<String> {
    let image = asked.image.as_ref().map(|name| format!("`image: {name}`"));
    let services = (!asked.services.is_empty()).then(|| format!("`services: {}`", asked.services.join(", ")));
    let keys = [image, services].into_iter().flatten().collect::<Vec<_>>().join(" and ");
    (!keys.is_empty()).then(|| {
        let images = images.map(|images| format!("; its images are {images}")).unwrap_or_default();
        format!(
            "{keys} has no effect here: this runner's jobs run in the virtual machine itself, not in a container{images}"
        )
    })
}

/// What the author of a job that failed reads of its machine.
#[must_use]
pub(super) fn kept(now: Timestamp, job: u64, length: Duration) -> String {
    let text = format!(
        "dayfly: the job failed, and its machine is kept for {}: who operates this runner can look inside, by `dayfly shell {job}`.",
        people(length)
    );
    line(now, &text)
}

/// A plain line.
#[must_use]
pub(super) fn note(now: Timestamp, text: &str) -> String {
    line(now, text)
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

    pub(super) fn now() -> Timestamp {
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
    fn durations_read_like_words() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (300, "5 min"), (61, "1 min 1 s"), (3600, "1 h"), (5400, "1 h 30 min")]
        {
            assert_eq!(people(Duration::from_secs(seconds)), text);
        }
    }
}
