//! When do we try again? Named policies, each with its reason.
//!
//! A [`Backoff`] is asked for the next pause and knows nothing else: the caller waits, on Tokio's
//! clock, and may be stopped while it does. The steps are backon's; its jitter is not used, because
//! jitter comes from our [`Rng`], so that a simulation repeats itself.

use crate::rng::Rng;
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use std::time::Duration;

/// A server that told us when to come back is believed, and given up to this much more, so that
/// not all who were told the same come at once.
const TOLD_SPREAD: Duration = Duration::from_millis(500);

/// Tries of [`few`], and the pause between them: 1.5 s in all.
const FEW: u32 = 4;
const FEW_PAUSE: Duration = Duration::from_millis(500);

/// Makes a quick call again that failed as things fail for a moment, as a disk's single error.
/// `passing`: whether an error is of that kind.
///
/// # Errors
/// The last try's, or the first that does not pass.
pub async fn few<T, E, F>(mut call: impl FnMut() -> F, passing: impl Fn(&E) -> bool) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    for _ in 1..FEW {
        match call().await {
            Err(error) if passing(&error) => tokio::time::sleep(FEW_PAUSE).await,
            result => return result,
        }
    }
    call().await
}

/// Growing pauses between tries of one thing.
#[derive(Debug)]
pub struct Backoff {
    steps: ExponentialBuilder,
    now: ExponentialBackoff,
    longest: Duration,
    jitter_percent: u32,
}

impl Backoff {
    fn new(first: Duration, longest: Duration, jitter_percent: u32) -> Self {
        let steps = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(longest)
            .with_factor(2.0)
            .without_max_times();
        Self { now: steps.build(), steps, longest, jitter_percent }
    }

    /// Asking for jobs while GitLab fails: 1, 2, 4, then 5 s, ± 20 %.
    ///
    /// The official runner polls a failing server every 3 s, so this is no burden; and short
    /// pauses are what makes the first poll after an outage come within 15 s.
    #[must_use]
    pub fn poll() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(5), 20)
    }

    /// Trace and verdict of one job: 1 s doubling to 60 s, then every 60 s, ± 10 %.
    ///
    /// The verdict is owed for a day, so patience costs nothing, and many jobs may be waiting for
    /// the same GitLab to come back.
    #[must_use]
    pub fn uploader() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(60), 10)
    }

    /// A libvirt that can't be reached: 0.25 s doubling to 5 s, ± 20 %.
    ///
    /// A restart of libvirtd takes about a second; the machines run on meanwhile, and what they
    /// hold of the host is given back only once libvirt answers.
    #[must_use]
    pub fn hypervisor() -> Self {
        Self::new(Duration::from_millis(250), Duration::from_secs(5), 20)
    }

    /// A wire without a session: 50 ms doubling to 0.5 s, ± 20 %.
    ///
    /// To look for a machine's socket costs next to nothing, and a runner waits meanwhile; a guest that throws session
    /// after session away is not followed at its own speed.
    #[must_use]
    pub fn wire() -> Self {
        Self::new(Duration::from_millis(50), Duration::from_millis(500), 20)
    }

    /// The pause before the next try.
    pub fn next(&mut self, rng: &Rng) -> Duration {
        let step = self.now.next().unwrap_or(self.longest);
        rng.jitter(step, self.jitter_percent)
    }

    /// The pause before the next try, where the server may have told when to come back: not
    /// before that time, and not before our own.
    pub fn next_told(&mut self, rng: &Rng, told: Option<Duration>) -> Duration {
        let own = self.next(rng);
        let Some(told) = told else { return own };
        let spread = u64::try_from(TOLD_SPREAD.as_nanos()).unwrap_or(u64::MAX);
        own.max(told + Duration::from_nanos(rng.below(spread)))
    }

    /// It worked: the next failure starts from the shortest pause.
    pub fn reset(&mut self) {
        self.now = self.steps.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mut backoff: Backoff, percent: f64, expected: &[f64]) {
        let rng = Rng::seeded(3);
        for round in 0..20 {
            for step in expected {
                let pause = backoff.next(&rng).as_secs_f64();
                let share = step * percent / 100.0;
                assert!((step - share..=step + share + 1e-6).contains(&pause), "round {round}: {pause} for {step}");
            }
            backoff.reset();
        }
    }

    /// G1: 1 to 5 s, ± 20 %.
    #[test]
    fn pauses_grow_to_their_bound_and_start_over() {
        check(Backoff::poll(), 20.0, &[1.0, 2.0, 4.0, 5.0, 5.0, 5.0]);
        check(Backoff::uploader(), 10.0, &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
        check(Backoff::hypervisor(), 20.0, &[0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]);
    }

    #[test]
    fn pauses_never_end() {
        let (rng, mut backoff) = (Rng::seeded(1), Backoff::uploader());
        for _ in 0..10_000 {
            backoff.next(&rng);
        }
        assert!(backoff.next(&rng) >= Duration::from_secs(54));
    }

    /// G3: what GitLab said is obeyed, within a second.
    #[test]
    fn a_told_time_is_obeyed_and_spread() {
        let (rng, mut backoff) = (Rng::seeded(1), Backoff::poll());
        let told = Duration::from_secs(30);
        let pauses: Vec<_> = (0..20).map(|_| backoff.next_told(&rng, Some(told))).collect();
        assert!(pauses.iter().all(|p| (told..told + TOLD_SPREAD).contains(p)), "{pauses:?}");
        assert!(pauses.windows(2).any(|p| p[0] != p[1]));
        assert!(backoff.next_told(&rng, Some(Duration::ZERO)) >= Duration::from_secs(4), "our own pause holds too");
    }

    #[test]
    fn the_same_seed_gives_the_same_pauses() {
        let run =
            || (0..10).scan((Rng::seeded(9), Backoff::poll()), |(rng, b), _| Some(b.next(rng))).collect::<Vec<_>>();
        assert_eq!(run(), run());
    }
}
