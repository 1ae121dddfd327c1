//! What a host says when its job has failed and its machine is to be looked at: the guest program ends the runner and does
//! not power off, for so long. A line on the channel, said again to a guest that may not have heard it.

use std::fmt;

/// For how long a guest stays at most, whatever it is told: somebody forgot it.
pub const STAY_MAX_S: u64 = 24 * 3600;

const WORD: &str = "stay";

/// `stay SECONDS`: from now on, so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stay {
    /// Seconds, at most [`STAY_MAX_S`].
    pub seconds: u64,
}

impl Stay {
    /// For so long, but no longer than may be.
    #[must_use]
    pub fn of(seconds: u64) -> Self {
        Self { seconds: seconds.min(STAY_MAX_S) }
    }

    /// Reads one line, without its line break. `None`: it says something else.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (word, seconds) = std::str::from_utf8(line).ok()?.split_once(' ')?;
        (word == WORD).then_some(())?;
        Some(Self::of(seconds.parse().ok()?))
    }
}

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{WORD} {}", self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_back_and_is_bounded() {
        assert_eq!(Stay::parse(Stay::of(1800).to_string().as_bytes()), Some(Stay { seconds: 1800 }));
        assert_eq!(Stay::parse(b"stay 999999999"), Some(Stay { seconds: STAY_MAX_S }));
        for other in ["stay", "stay  9", "stay -1", "stay 1 2", "clock 1 2", "{\"version\":3}", "stayed 7"] {
            assert_eq!(Stay::parse(other.as_bytes()), None, "{other}");
        }
    }
}
