//! What a guest tells its host over the channel: a word a line, for phases and failures only.
//!
//! Reports are hints. The guest is hostile, so nothing but times and texts in the job's own log
//! may follow from them.

use std::fmt;

/// Bytes of one report line at most, its line break not counted.
pub const REPORT_LINE_MAX: usize = 4096;

/// What a guest adds to its contract if it can do without a network card.
const RELAY_WORD: &str = "relay";

/// One report of the guest program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The guest program runs and waits for its config.
    Ready,
    /// What it can; one that says nothing speaks the first contract, and has a network card or no network.
    Contract {
        /// The contract that it speaks.
        contract: u32,
        /// Whether its kernel can give a machine without a card its network ([`crate::GuestNetwork::relay`]).
        relay: bool,
    },
    /// Identity, network and files are in place.
    Applied,
    /// The guest runner has been started.
    RunnerStarted,
    /// The guest runner has connected to the relay.
    RunnerConnected,
    /// The guest runner has ended, with this exit code (128 + n for signal n).
    RunnerExited(i32),
    /// The guest program could not do its part; the text is for the operator.
    Failed(String),
}

impl Report {
    /// Reads one line, without its line break. `None`: not a report of this version.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Some(match word {
            "ready" => Self::Ready,
            "contract" => {
                // A later guest may say more.
                let mut words = rest.split(' ');
                Self::Contract { contract: words.next()?.parse().ok()?, relay: words.any(|word| word == RELAY_WORD) }
            }
            "applied" => Self::Applied,
            "runner-started" => Self::RunnerStarted,
            "runner-connected" => Self::RunnerConnected,
            "runner-exited" => Self::RunnerExited(rest.parse().ok()?),
            "failed" => Self::Failed(rest.to_owned()),
            _ => return None,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Contract { contract, relay: false } => write!(f, "contract {contract}"),
            Self::Contract { contract, relay: true } => write!(f, "contract {contract} {RELAY_WORD}"),
            Self::Applied => f.write_str("applied"),
            Self::RunnerStarted => f.write_str("runner-started"),
            Self::RunnerConnected => f.write_str("runner-connected"),
            Self::RunnerExited(code) => write!(f, "runner-exited {code}"),
            Self::Failed(text) => {
                let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(1000).collect();
                write!(f, "failed {line}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back_as_it_was_written() {
        for report in [
            Report::Ready,
            Report::Contract { contract: 2, relay: false },
            Report::Contract { contract: 3, relay: true },
            Report::Applied,
            Report::RunnerStarted,
            Report::RunnerConnected,
            Report::RunnerExited(137),
            Report::Failed("no eth0 after 5 s".into()),
        ] {
            assert_eq!(Report::parse(&report.to_string()), Some(report));
        }
        assert_eq!(Report::parse("reboot now"), None);
        for bad in ["contract", "contract relay", "contract -1 relay", "contract  3"] {
            assert_eq!(Report::parse(bad), None, "{bad}");
        }
    }

    /// U5: a guest of a later dayfly may say more of itself.
    #[test]
    fn words_that_are_not_known_are_passed_over() {
        let relay = |line| match Report::parse(line) {
            Some(Report::Contract { contract: 3, relay }) => relay,
            other => panic!("{line}: {other:?}"),
        };
        assert!(relay("contract 3 bridge relay tap") && !relay("contract 3 relays") && !relay("contract 3 "));
    }

    #[test]
    fn a_failure_stays_one_line() {
        assert_eq!(Report::Failed("a\nb".into()).to_string(), "failed a b");
    }
}
