//! What a guest tells its host over the channel: a word a line, for phases and failures only.
//!
//! Reports are hints. The guest is hostile, so nothing but times and texts in the job's own log
//! may follow from them.

use std::fmt;

/// Bytes of one report line at most, its line break not counted.
pub const REPORT_LINE_MAX: usize = 4096;

/// What a guest adds to its contract if it can do without a network card.
const RELAY_WORD: &str = "relay";

/// What it adds if it can be frozen while it waits for a job.
const HOLD_WORD: &str = "hold";

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
        /// Whether it can wait for a job without being anybody ([`crate::GuestConfig::hold`]).
        hold: bool,
    },
    /// The guest runner has been started and waits at the relay; the machine is nobody yet, and may be frozen.
    Held,
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
                let (contract, words) = rest.split_once(' ').unwrap_or((rest, ""));
                let says = |word| words.split(' ').any(|said| said == word);
                Self::Contract { contract: contract.parse().ok()?, relay: says(RELAY_WORD), hold: says(HOLD_WORD) }
            }
            "held" => Self::Held,
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
            Self::Contract { contract, relay, hold } => {
                write!(f, "contract {contract}")?;
                let words = [(relay, RELAY_WORD), (hold, HOLD_WORD)];
                words.iter().filter(|(says, _)| **says).try_for_each(|(_, word)| write!(f, " {word}"))
            }
            Self::Held => f.write_str("held"),
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
            Report::Contract { contract: 2, relay: false, hold: false },
            Report::Contract { contract: 3, relay: true, hold: false },
            Report::Contract { contract: 3, relay: false, hold: true },
            Report::Contract { contract: 3, relay: true, hold: true },
            Report::Held,
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
            Some(Report::Contract { contract: 3, relay, hold: false }) => relay,
            other => panic!("{line}: {other:?}"),
        };
        assert!(relay("contract 3 bridge relay tap") && !relay("contract 3 relays") && !relay("contract 3 "));
    }

    #[test]
    fn a_failure_stays_one_line() {
        assert_eq!(Report::Failed("a\nb".into()).to_string(), "failed a b");
    }
}
