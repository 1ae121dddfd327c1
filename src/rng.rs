//! The one source of randomness: ids, passes, seeds, jitter. One of the seams.
//!
//! In production every byte comes from the operating system. A simulation seeds it, and the same
//! seed gives the same ids in the same order.

use sha2::{Digest as _, Sha256};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What chance is made of.
pub trait Dice: Send + Sync + 'static {
    /// Fills `bytes`.
    fn fill(&self, bytes: &mut [u8]);
}

/// A handle to the source; clones share it.
#[derive(Clone)]
pub struct Rng(Arc<dyn Dice>);

/// The operating system's generator.
struct System;

impl Dice for System {
    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the kernel always has randomness after boot");
    }
}

/// SHA-256 over seed and number of blocks drawn. A mutex held for a few lines, never across an await.
struct Seeded(Mutex<(u64, u64)>);

impl Dice for Seeded {
    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(32) {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.1 += 1;
            let block =
                Sha256::new().chain_update(state.0.to_le_bytes()).chain_update(state.1.to_le_bytes()).finalize();
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
    }
}

impl Rng {
    /// The operating system's generator.
    #[must_use]
    pub fn system() -> Self {
        Self::of(Arc::new(System))
    }

    /// A reproducible generator, for simulations only: SHA-256 over seed and counter.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self::of(Arc::new(Seeded(Mutex::new((seed, 0)))))
    }

    /// Chance from elsewhere.
    #[must_use]
    pub fn of(dice: Arc<dyn Dice>) -> Self {
        Self(dice)
    }

    /// Fills `bytes`.
    ///
    /// # Panics
    /// If the operating system has no randomness: nothing of ours would be safe then.
    pub fn fill(&self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    /// `N` random bytes.
    #[must_use]
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    /// A number below `bound` (0 for a bound of 0). The bias is below `bound` / 2^64.
    #[must_use]
    pub fn below(&self, bound: u64) -> u64 {
        u64::from_le_bytes(self.bytes()).checked_rem(bound).unwrap_or(0)
    }

    /// `duration`, made up to `percent` shorter or longer.
    #[must_use]
    pub fn jitter(&self, duration: Duration, percent: u32) -> Duration {
        let span = duration.mul_f64(f64::from(percent) / 100.0);
        let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX / 2);
        (duration - span.min(duration))
            .saturating_add(Duration::from_nanos(self.below(nanos.saturating_mul(2).saturating_add(1))))
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rng")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        let (a, b) = (Rng::seeded(7), Rng::seeded(7));
        assert_eq!(a.bytes::<48>(), b.bytes::<48>());
        assert_ne!(a.bytes::<16>(), a.bytes::<16>());
        assert_ne!(Rng::seeded(8).bytes::<16>(), Rng::seeded(7).bytes::<16>());
    }

    #[test]
    fn jitter_stays_within_its_share() {
        let rng = Rng::seeded(1);
        for _ in 0..1000 {
            let d = rng.jitter(Duration::from_secs(10), 20);
            assert!((Duration::from_secs(8)..=Duration::from_millis(12_001)).contains(&d), "{d:?}");
        }
        assert_eq!(rng.jitter(Duration::from_secs(3), 0), Duration::from_secs(3));
    }
}
