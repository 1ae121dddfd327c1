//! What a guest tells its host over the channel: a word a line, for phases and failures only.
//!
//! Reports are hints. The guest is hostile, so nothing but times and texts in the job's own log
//! may follow from them.

use std::fmt;

/// Bytes of one report line at most, its line break not counted.
pub const REPORT_LINE_MAX: usize = 4096;

/// What a guest can besides its contract: a word each, of which a later guest may have more. The default: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Can {
    /// Its kernel can give a machine without a card its network ([`crate::GuestNetwork::relay`]).
    pub relay: bool,
    /// It stays when its runner has ended, if its host says so ([`crate::Stay`]).
    pub stay: bool,
    /// It gives its host a shell ([`crate::SHELL_PORT_NAME`]).
    pub shell: bool,
    /// It puts what its host has of a job's repository where git finds it ([`crate::GuestClone`]).
    pub clone: bool,
    /// It waits for a job without being anybody ([`crate::GuestConfig::hold`]).
    pub hold: bool,
}

impl Can {
    fn words(self) -> impl Iterator<Item = &'static str> {
        [("relay", self.relay), ("stay", self.stay), ("shell", self.shell), ("clone", self.clone), ("hold", self.hold)]
            .into_iter()
            .filter_map(|(w, can)| can.then_some(w))
    }

    fn of<'a>(words: impl Iterator<Item = &'a str>) -> Self {
        words.fold(Self::default(), |can, word| match word {
            "relay" => Self { relay: true, ..can },
            "stay" => Self { stay: true, ..can },
            "shell" => Self { shell: true, ..can },
            "clone" => Self { clone: true, ..can },
            "hold" => Self { hold: true, ..can },
            _ => can,
        })
    }
}

/// One report of the guest program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The guest program runs and waits for its config.
    Ready,
    /// What it can; one that says nothing speaks the first contract, and has a network card or no network.
    Contract {
        /// The contract that it speaks.
        contract: u32,
        /// And what it can besides.
        can: Can,
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
                let mut words = rest.split(' ');
                Self::Contract { contract: words.next()?.parse().ok()?, can: Can::of(words) }
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
            Self::Contract { contract, can } => {
                write!(f, "contract {contract}")?;
                can.words().try_for_each(|word| write!(f, " {word}"))
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
            Report::Contract { contract: 2, can: Can::default() },
            Report::Contract { contract: 3, can: Can { relay: true, ..Can::default() } },
            Report::Contract { contract: 3, can: Can { stay: true, shell: true, ..Can::default() } },
            Report::Contract { contract: 3, can: Can { clone: true, ..Can::default() } },
            Report::Contract { contract: 3, can: Can { hold: true, ..Can::default() } },
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
            Some(Report::Contract { contract: 3, can }) => can.relay,
            other => panic!("{line}: {other:?}"),
        };
        assert!(relay("contract 3 bridge relay clones tap") && !relay("contract 3 relays") && !relay("contract 3 "));
    }

    #[test]
    fn a_failure_stays_one_line() {
        assert_eq!(Report::Failed("a\nb".into()).to_string(), "failed a b");
    }
}
