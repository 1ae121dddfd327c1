//! Names of files that begin with a time: in the order in which they came, and too old without being opened.

use jiff::Timestamp;
use std::time::Duration;

/// `rest` behind this time, to the millisecond.
#[must_use]
pub fn dated_name(at: Timestamp, rest: &str) -> String {
    format!("{:013}-{rest}", at.as_millisecond().max(0))
}

/// Whether its time is longer ago than `keep`. One without a time is not.
#[must_use]
pub fn is_too_old(name: &str, now: Timestamp, keep: Duration) -> bool {
    let oldest = now.as_millisecond().saturating_sub(i64::try_from(keep.as_millis()).unwrap_or(i64::MAX));
    let at = name.split('-').next().and_then(|at| at.parse::<i64>().ok());
    at.is_some_and(|at| at < oldest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_too_old_after_its_time_and_not_before() {
        let at = |ms| Timestamp::from_millisecond(ms).unwrap();
        let name = dated_name(at(12_000), "ci-1.log");
        assert_eq!(name, "0000000012000-ci-1.log");
        assert!(name < dated_name(at(9_876_543_210_123), "ci-1.log"));
        let second = Duration::from_secs(1);
        assert!(!is_too_old(&name, at(13_000), second) && is_too_old(&name, at(13_001), second));
        assert!(!is_too_old(&name, at(13_001), Duration::MAX));
        assert!(!is_too_old("lost+found", at(13_001), second), "somebody else's");
    }
}
