//! Which rounds there are: each point five times, random kills up to a number, hand-overs and drains, one storm. All
//! from a seed.

use dayfly::rng::Rng;
use std::fmt;

/// K0 to K20.
pub(crate) const POINTS: u8 = 21;

/// How often each point is died at.
const KILLS_AT_EACH: u32 = 5;

/// How often a daemon hands over to the next one in between, with a second one beside it every other time.
const HAND_OVERS: u32 = 8;

/// How often one is drained, and how often a drain is cut short by a second signal.
const DRAINS: u32 = 3;

/// Kills of one storm, in at most a minute (threats.md E15).
pub(crate) const STORM_KILLS: u32 = 20;

/// With fewer random kills than this there is no storm among them.
const STORM_FROM: u32 = 3 * STORM_KILLS;

/// How a round's daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By itself, at this visit of a named point; again, by us, while the next one starts: a random kill.
    Point { point: u8, visit: u32, again: bool },
    /// By us: once while it works, and the rest while it starts.
    Random { kills: u32 },
    /// By us, again and again.
    Storm,
    /// By SIGTERM; `beside`: while it runs, a second one is started on the same directory.
    HandOver { beside: bool },
    /// By SIGQUIT; `twice`: by two of them.
    Drain { twice: bool },
}

/// One round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    pub(crate) number: usize,
    pub(crate) kind: Kind,
    seed: u64,
}

impl Round {
    /// The round's own choices.
    pub(crate) fn rng(&self) -> Rng {
        Rng::seeded(self.seed)
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {} ", self.number)?;
        match self.kind {
            Kind::Point { point, visit, again } => {
                let again = if again { ", again while it recovers" } else { "" };
                write!(f, "(K{point}, visit {visit}{again})")
            }
            Kind::Random { kills } => write!(f, "({kills} random kills)"),
            Kind::Storm => write!(f, "(storm of {STORM_KILLS} kills)"),
            Kind::HandOver { .. } => write!(f, "(hand-over)"),
            Kind::Drain { twice: false } => write!(f, "(drain)"),
            Kind::Drain { twice: true } => write!(f, "(drain cut short)"),
        }
    }
}

/// All rounds, in the order in which they are begun.
pub(crate) struct Plan {
    pub(crate) rounds: Vec<Round>,
}

impl Plan {
    /// `only`: no other point, and no other rounds but `kills` random ones.
    pub(crate) fn new(seed: u64, kills: u32, only: Option<u8>) -> Self {
        let rng = Rng::seeded(seed);
        let mut kinds = Vec::new();
        let storm = only.is_none() && kills >= STORM_FROM;
        let mut left = if storm { kills - STORM_KILLS } else { kills };
        for point in (0..POINTS).filter(|point| only.is_none_or(|only| *point == only)) {
            for _ in 0..KILLS_AT_EACH {
                let again = left > 0 && small(&rng, 4) == 0;
                left -= u32::from(again);
                kinds.push(Kind::Point { point, visit: 1 + small(&rng, visits(point)), again });
            }
        }
        while left > 0 {
            // Most die once; some again while they recover.
            let wished = match small(&rng, 10) {
                0..=5 => 1,
                6..=8 => 2,
                _ => 3,
            };
            kinds.push(Kind::Random { kills: left.min(wished) });
            left -= left.min(wished);
        }
        if only.is_none() {
            kinds.extend((0..HAND_OVERS).map(|n| Kind::HandOver { beside: n % 2 == 0 }));
            kinds.extend((0..2 * DRAINS).map(|n| Kind::Drain { twice: n % 2 == 0 }));
        }
        shuffle(&mut kinds, &rng);
        if storm {
            // First: it takes longest.
            kinds.insert(0, Kind::Storm);
        }
        let rounds = kinds.into_iter().enumerate();
        Self { rounds: rounds.map(|(number, kind)| Round { number, kind, seed: rng.below(u64::MAX) }).collect() }
    }
}

/// Up to which visit of a point a round waits: several lines are one point, and several jobs pass each.
fn visits(point: u8) -> u32 {
    match point {
        // Pieces of traces and artifacts: many for one job.
        12 => 16,
        13 => 60,
        // One line, passed once for each job.
        0..=2 | 5..=7 | 16 | 18 => 3,
        _ => 6,
    }
}

/// A number below `bound`.
pub(crate) fn small(rng: &Rng, bound: u32) -> u32 {
    u32::try_from(rng.below(bound.into())).unwrap_or(0)
}

fn shuffle<T>(items: &mut [T], rng: &Rng) {
    for last in (1..items.len()).rev() {
        let other = usize::try_from(rng.below(last as u64 + 1)).unwrap_or(0);
        items.swap(last, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_has_each_point_five_times_and_as_many_random_kills_as_asked_for() {
        for kills in [0, 1, 59, 60, 200] {
            let plan = Plan::new(7, kills, None);
            for point in 0..POINTS {
                let of = |round: &&Round| matches!(round.kind, Kind::Point { point: p, .. } if p == point);
                assert_eq!(plan.rounds.iter().filter(of).count(), 5, "K{point}");
            }
            let random: u32 = plan
                .rounds
                .iter()
                .map(|round| match round.kind {
                    Kind::Random { kills } => kills,
                    Kind::Storm => STORM_KILLS,
                    Kind::Point { again, .. } => u32::from(again),
                    Kind::HandOver { .. } | Kind::Drain { .. } => 0,
                })
                .sum();
            assert_eq!(random, kills);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_rounds() {
        let text =
            |seed| Plan::new(seed, 50, None).rounds.iter().map(|r| format!("{r} {}", r.seed)).collect::<Vec<_>>();
        assert_eq!(text(3), text(3));
        assert_ne!(text(3), text(4));
    }
}
