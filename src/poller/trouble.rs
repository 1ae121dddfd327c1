//! What keeps a runner from asking for jobs, and what of that is news? A line when it comes, a line when it has gone.
//!
//! A poller looks again every few seconds, and finds the same for hours. What comes and goes within [`CALM`] is told once:
//! free disk that swings around its bound would else fill the log.

use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// So long a runner must ask undisturbed until what kept it from that counts as gone.
const CALM: Duration = Duration::from_secs(60);

/// What keeps a runner from asking, or from being answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// Its class's image cannot be used.
    Image,
    /// No room here will ever be large enough.
    TooLarge,
    /// Too little disk is free.
    Disk,
    /// The journal cannot be written.
    Journal,
    /// The hypervisor does not answer.
    Hypervisor,
    /// The host loses one machine after the other.
    MachinesLost,
    /// GitLab refuses the token.
    Refused,
    /// GitLab gives no answer, or one that makes no sense.
    Gitlab,
}

impl Cause {
    /// Its word among [`crate::metrics::BLOCKED_BY`].
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::TooLarge => "too-large",
            Self::Disk => "disk",
            Self::Journal => "journal",
            Self::Hypervisor => "hypervisor",
            Self::MachinesLost => "machines-lost",
            Self::Refused => "refused",
            Self::Gitlab => "gitlab",
        }
    }
}

/// What was told and has not gone yet.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    /// Since when.
    told: BTreeMap<Cause, Instant>,
    /// Since when the runner asks undisturbed.
    calm: Option<Instant>,
}

impl Trouble {
    /// There is this trouble. `true`: that is news.
    pub(super) fn is(&mut self, cause: Cause, now: Instant) -> bool {
        self.calm = None;
        let mut news = false;
        self.told.entry(cause).or_insert_with(|| {
            news = true;
            now
        });
        news
    }

    /// The runner asked, and was answered. `Some`: that is news by now, after so long a time of trouble.
    pub(super) fn is_over(&mut self, now: Instant) -> Option<Duration> {
        let since = self.told.values().min().copied()?;
        let calm = *self.calm.get_or_insert(now);
        if now - calm < CALM {
            return None;
        }
        self.told.clear();
        self.calm = None;
        Some(calm - since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::BLOCKED_BY;

    /// U19: what lasts for an hour, and what comes and goes within it, is a line each way.
    #[test]
    fn what_comes_and_goes_is_told_once_each_way() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(trouble.is(Cause::Disk, at(0)));
        assert!((1..360).all(|n| !trouble.is(Cause::Disk, at(10 * n))));
        assert!(trouble.is(Cause::Hypervisor, at(3600)), "another trouble is news of its own");
        assert_eq!(trouble.is_over(at(3610)), None);
        assert!(!trouble.is(Cause::Disk, at(3620)), "it was away for a moment only");
        assert_eq!(trouble.is_over(at(3630)), None);
        assert_eq!(trouble.is_over(at(3690)), Some(Duration::from_secs(3630)));
        assert_eq!(trouble.is_over(at(3700)), None);
        assert!(trouble.is(Cause::Disk, at(3710)));
    }

    #[test]
    fn each_cause_is_a_reason_of_the_metric() {
        for cause in [
            Cause::Image,
            Cause::TooLarge,
            Cause::Disk,
            Cause::Journal,
            Cause::Hypervisor,
            Cause::MachinesLost,
            Cause::Refused,
            Cause::Gitlab,
        ] {
            assert!(BLOCKED_BY.contains(&cause.word()), "{cause:?}");
        }
    }
}
