//! What goes between host and guest besides HTTP: the guest config, reports, the console.

use dayfly::vm::console::{Ring, TAIL_BYTES_MAX};
use dayfly_guest_config::{CONTRACT, CONTRACT_OLDEST, ClockQuestion, GuestConfig, Report};

/// A guest config is one line, and reads as itself; a report and a question for the time are one line whatever is in
/// them, and never both; a console's tail is text
/// that a terminal can be shown.
pub fn guest_config(input: &[u8]) {
    if let Ok(config) = GuestConfig::from_line(input) {
        assert!((CONTRACT_OLDEST..=CONTRACT).contains(&config.version));
        let line = config.to_line();
        assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1), "a config of two lines");
        let again = GuestConfig::from_line(&line).expect("what was read can be written and read");
        assert_eq!(again.to_line(), line);
        let shown = format!("{config:?}");
        assert!(config.pass.len() < 16 || !shown.contains(&config.pass));
    }
    let question = std::str::from_utf8(input).ok().and_then(ClockQuestion::parse);
    if let Some(question) = question {
        let line = question.answer(0).to_string();
        assert!(!line.contains('\n') && ClockQuestion::parse(&question.to_string()) == Some(question), "{line:?}");
    }
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(report) = Report::parse(text)
    {
        let line = report.to_string();
        assert!(question.is_none());
        assert!(!line.contains('\n') && line.len() <= text.len().max(8) * 4, "{line:?}");
        let again = Report::parse(&line).expect("what was read can be written and read");
        assert_eq!(again.to_string(), line);
    }
    let mut ring = Ring::default();
    ring.push(input);
    let tail = ring.tail(TAIL_BYTES_MAX);
    assert!(tail.len() <= TAIL_BYTES_MAX && !tail.chars().any(|c| c != '\n' && c.is_control()), "{tail:?}");
}
