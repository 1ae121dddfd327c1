//! Who waits for the newest value? A watch that wakes its watchers in the order in which they began to wait.
//!
//! Tokio's own spreads those who wait over eight lists at random. With several watchers that go on at the same instant
//! of paused time, a simulation of the same seed would then not repeat itself (invariant 22: same seed, same event log).

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// A value and its watcher in one. Clones watch the same value; each knows which change it has seen.
#[derive(Debug)]
pub struct Latest<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

#[derive(Debug)]
struct Shared<T> {
    /// Number of changes, and the value. Held for a few lines, never across an await.
    value: Mutex<(u64, T)>,
    changed: Notify,
}

impl<T> Clone for Latest<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), seen: self.seen }
    }
}

impl<T> Latest<T> {
    /// The first value counts as seen.
    pub fn new(value: T) -> Self {
        Self { shared: Arc::new(Shared { value: Mutex::new((0, value)), changed: Notify::new() }), seen: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, T)> {
        self.shared.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the value and wakes all that wait.
    pub fn send(&self, value: T) {
        let mut current = self.lock();
        *current = (current.0.wrapping_add(1), value);
        drop(current);
        self.shared.changed.notify_waiters();
    }

    /// Looks at the value, which counts as seen then.
    pub fn look<R>(&mut self, look: impl FnOnce(&T) -> R) -> R {
        let (seen, result) = {
            let current = self.lock();
            (current.0, look(&current.1))
        };
        self.seen = seen;
        result
    }

    /// Waits for a value that has not been seen. Cancel safe: it is seen when it is looked at.
    pub async fn changed(&self) {
        loop {
            let mut notified = pin!(self.shared.changed.notified());
            // Before the look, or a change between the two would be slept over.
            notified.as_mut().enable();
            if self.lock().0 != self.seen {
                return;
            }
            notified.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::JoinSet;

    /// However often it is tried.
    #[tokio::test(start_paused = true)]
    async fn watchers_are_woken_in_the_order_in_which_they_began_to_wait() {
        for _ in 0..20 {
            let latest = Latest::new(0);
            let order = Arc::new(Mutex::new(Vec::new()));
            let mut watchers = JoinSet::new();
            for number in 0..9 {
                let (latest, order) = (latest.clone(), order.clone());
                watchers.spawn(async move {
                    latest.changed().await;
                    order.lock().unwrap().push(number);
                });
            }
            tokio::task::yield_now().await;
            latest.send(1);
            watchers.join_all().await;
            assert_eq!(*order.lock().unwrap(), (0..9).collect::<Vec<_>>());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_before_the_wait_is_not_missed_and_is_told_once() {
        let (mut watcher, soon) = (Latest::new("old"), std::time::Duration::from_secs(1));
        watcher.clone().send("new");
        watcher.changed().await;
        assert_eq!(watcher.look(|value| *value), "new");
        assert!(tokio::time::timeout(soon, watcher.changed()).await.is_err());
    }
}
