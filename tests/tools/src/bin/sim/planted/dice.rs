//! Chance that is none, or not the run's.

use super::Bug;
use dayfly::rng::{Dice, Rng};
use std::sync::Arc;

/// Only a pass is made of so many bytes at once.
const PASS_BYTES: usize = 32;

/// So many bytes are drawn for a number, as for the jitter of a pause.
const NUMBER_BYTES: usize = 8;

/// The run's chance with this bug in it.
pub(super) fn plant(bug: Bug, rng: &Rng) -> Rng {
    match bug {
        Bug::PassReused | Bug::OwnDice => Rng::of(Arc::new(Loaded { bug, rng: rng.clone() })),
        _ => rng.clone(),
    }
}

struct Loaded {
    bug: Bug,
    rng: Rng,
}

impl Dice for Loaded {
    fn fill(&self, bytes: &mut [u8]) {
        match (self.bug, bytes.len()) {
            (Bug::PassReused, PASS_BYTES) => bytes.fill(1),
            (Bug::OwnDice, NUMBER_BYTES) => Rng::system().fill(bytes),
            _ => self.rng.fill(bytes),
        }
    }
}
