//! What time is it? The guest asks over the channel when it has its config, and the host answers:
//!
//! ```text
//! guest → host   clock <the guest's own microseconds>
//! host → guest   clock <the same> <the host's wall clock>
//! ```
//!
//! The config's `clock_us` is as old as the boot is long, or older; an answer is as old as its way, and by the guest's
//! own microseconds the guest knows how long that took, whichever of its questions is answered. A guest need not ask,
//! and goes on without an answer.

use std::fmt;

/// A guest's question: when it was asked, by a clock of the guest's that nobody sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockQuestion {
    /// Microseconds since some moment that only the guest knows.
    pub asked_us: u64,
}

impl ClockQuestion {
    /// Reads one line, without its line break. `None`: something else.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        Some(Self { asked_us: line.strip_prefix("clock ")?.parse().ok()? })
    }

    /// The host's answer, of the moment at which it is made.
    #[must_use]
    pub fn answer(self, host_us: i64) -> ClockAnswer {
        ClockAnswer { asked_us: self.asked_us, host_us }
    }
}

impl fmt::Display for ClockQuestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "clock {}", self.asked_us)
    }
}

/// The host's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockAnswer {
    /// As in the question.
    pub asked_us: u64,
    /// Wall clock of the host, microseconds since 1970.
    pub host_us: i64,
}

impl ClockAnswer {
    /// Reads one line, without its line break. `None`: something else.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (asked, host) = std::str::from_utf8(line).ok()?.strip_prefix("clock ")?.split_once(' ')?;
        Some(Self { asked_us: asked.parse().ok()?, host_us: host.parse().ok()? })
    }
}

impl fmt::Display for ClockAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "clock {} {}", self.asked_us, self.host_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestConfig, Report};

    #[test]
    fn question_and_answer_read_back_as_they_were_written() {
        let question = ClockQuestion { asked_us: 17 };
        assert_eq!(ClockQuestion::parse(&question.to_string()), Some(question));
        for host_us in [0, -1, 1_800_000_000_000_000, i64::MAX] {
            let answer = question.answer(host_us);
            assert_eq!(ClockAnswer::parse(answer.to_string().as_bytes()), Some(answer));
        }
        for other in ["clock", "clock ", "clock -1", "clock 1 2", "clocks 1", "clock 1\r", "ready"] {
            assert_eq!(ClockQuestion::parse(other), None, "{other}");
        }
        for other in ["clock 1", "clock 1 x", "clock 1 2 3", "{\"clock\":1}", ""] {
            assert_eq!(ClockAnswer::parse(other.as_bytes()), None, "{other}");
        }
    }

    /// U24: a host that does not know the question takes it for no report, and an answer is no config.
    #[test]
    fn neither_is_taken_for_anything_else() {
        let question = ClockQuestion { asked_us: 17 };
        assert_eq!(Report::parse(&question.to_string()), None);
        assert!(GuestConfig::from_line(question.answer(1).to_string().as_bytes()).is_err());
    }
}
