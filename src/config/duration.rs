//! Durations in the configuration: `"90s"`, `"5m"`, `"1h 30m"`, `"7d"`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// A duration that reads and prints like people write it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(Duration);

/// Longest duration of a configuration: whatever is added to it is far from the ends of time.
const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

/// The text is no duration, or too long a one.
#[derive(Debug, thiserror::Error)]
pub enum BadSpan {
    /// Another text.
    #[error("`{0}` is no duration like \"90s\", \"5m\", \"1h 30m\" or \"7d\"")]
    Text(String),
    /// Longer than ten years.
    #[error("`{0}` is longer than ten years")]
    TooLong(String),
}

impl Span {
    /// Whole seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Milliseconds, for tests.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// The duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// Whole days, of 24 hours each: `7d`.
fn days(text: &str) -> Option<Duration> {
    let days: u64 = text.trim().strip_suffix('d')?.trim_end().parse().ok()?;
    Some(Duration::from_secs(days.checked_mul(24 * 3600)?))
}

impl TryFrom<String> for Span {
    type Error = BadSpan;
    fn try_from(text: String) -> Result<Self, BadSpan> {
        let parsed = match days(&text) {
            Some(days) => Some(days),
            None => text.parse::<jiff::SignedDuration>().ok().and_then(|d| Duration::try_from(d).ok()),
        };
        match parsed {
            Some(duration) if duration > LONGEST => Err(BadSpan::TooLong(text)),
            Some(duration) => Ok(Self(duration)),
            None => Err(BadSpan::Text(text)),
        }
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::SignedDuration::try_from(self.0) {
            Ok(duration) => write!(f, "{duration:#}"),
            Err(_) => write!(f, "{}s", self.0.as_secs()),
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
