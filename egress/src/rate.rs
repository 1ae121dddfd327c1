//! How fast may it be? An allowance that comes back with time, and what waits for it.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep};

/// Not shorter than a timer can tell.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// Units that are taken, and come back.
pub(crate) struct Bucket {
    a_second: u64,
    at_once: u64,
    /// Billionths of a unit; negative: owed.
    left: i128,
    since: Instant,
}

const BILLION: i128 = 1_000_000_000;

impl Bucket {
    /// So many units a second, and so many at once after a pause.
    pub(crate) fn new(a_second: u64, at_once: u64) -> Self {
        Self { a_second: a_second.max(1), at_once, left: i128::from(at_once) * BILLION, since: Instant::now() }
    }

    /// Units that may be taken now, at least 1, or how long until there is one.
    fn left(&mut self) -> Result<u64, Duration> {
        let now = Instant::now();
        let passed = i128::try_from((now - self.since).as_nanos()).unwrap_or(0);
        self.since = now;
        self.left = (self.left + passed * i128::from(self.a_second)).min(i128::from(self.at_once) * BILLION);
        if self.left >= BILLION {
            return Ok(u64::try_from(self.left / BILLION).unwrap_or(u64::MAX));
        }
        let nanos = (BILLION - self.left) / i128::from(self.a_second);
        Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).max(WAIT_MIN))
    }

    /// Takes them, even if that many are not left: who comes next waits for it.
    pub(crate) fn charge(&mut self, units: u64) {
        self.left -= i128::from(units) * BILLION;
    }

    /// Takes as many as soon as there is one.
    pub(crate) async fn take(this: &RefCell<Self>, units: u64) {
        loop {
            let wait = match this.borrow_mut().left() {
                Ok(_) => break,
                Err(wait) => wait,
            };
            sleep(wait).await;
        }
        this.borrow_mut().charge(units);
    }
}

/// Waits for a bucket that many share, for one of them.
#[derive(Default)]
pub(crate) struct Waiting(Option<Pin<Box<Sleep>>>);

impl Waiting {
    /// Ready with how many of `wanted` may be taken. Taken they are by [`Bucket::charge`].
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        bucket: Option<&RefCell<Bucket>>,
        wanted: usize,
    ) -> Poll<usize> {
        let Some(bucket) = bucket else { return Poll::Ready(wanted) };
        loop {
            if let Some(wait) = &mut self.0 {
                ready!(wait.as_mut().poll(cx));
                self.0 = None;
            }
            match bucket.borrow_mut().left() {
                Ok(left) => return Poll::Ready(wanted.min(usize::try_from(left).unwrap_or(usize::MAX))),
                Err(wait) => self.0 = Some(Box::pin(sleep(wait))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_comes_back_with_time() {
        let bucket = RefCell::new(Bucket::new(100, 50));
        let start = Instant::now();
        for _ in 0..250 {
            Bucket::take(&bucket, 1).await;
        }
        let took = start.elapsed();
        assert!((Duration::from_millis(1990)..Duration::from_millis(2100)).contains(&took), "{took:?}");
        // A long pause gives no more than what may be taken at once.
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert_eq!(bucket.borrow_mut().left(), Ok(50));
        bucket.borrow_mut().charge(150);
        assert_eq!(bucket.borrow_mut().left(), Err(Duration::from_millis(1010)));
    }
}
