//! `kill-test --last DIRECTORY`: the daemon of the last version, with its guest program, takes jobs and ends; this
//! version's is started in its place, and all is judged.
//!
//! ```text
//! dayfly of the last version ──► record, guest config, guest, all of its kind
//!           │ ends                              │ stay
//! dayfly of this version ◄──────────────────────┘ each job ends once, green, its trace whole; nothing is left
//! ```
//!
//! Each upgrade has a state directory of its own. In what state its jobs were, the records tell that the last daemon
//! has left: each of [`STAGES`] has to be among them. A loss is planted as well, and has to be found.

use crate::cell::Cell;
use crate::place::Paths;
use crate::{CELLS, Shared, Wanted, locked, say};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::task::JoinSet;

/// States of a job that an upgrade has to meet, as records name them.
const STAGES: [&str; 4] = ["accepted", "booting", "running", "releasing"];

/// Points at which the last version's daemon ends, and how often one job passes each.
const POINTS: [(u8, u32); 15] = [
    (4, 2),
    (5, 1),
    (6, 1),
    (7, 1),
    (8, 3),
    (9, 2),
    (10, 3),
    (11, 2),
    (12, 4),
    (13, 1),
    (14, 3),
    (15, 2),
    (16, 1),
    (17, 3),
    (18, 1),
];

/// The programs of the last version.
#[derive(Clone, Debug)]
pub(crate) struct Last {
    pub(crate) dayfly: PathBuf,
    pub(crate) guest: PathBuf,
}

/// How the last version's daemon ends, and what the next one finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// By itself, at this visit of a point, with one job.
    Point { point: u8, visit: u32 },
    /// By SIGKILL, with several jobs running.
    Kill,
    /// By SIGTERM, with several jobs running.
    HandOver,
    /// As by `Kill`; and the image is one contract older than those that are spoken.
    TooOld,
    /// As by `Kill`; and somebody removes a record.
    Planted,
}

impl fmt::Display for Upgrade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Point { point, visit } => write!(f, "upgrade at K{point}, visit {visit}"),
            Self::Kill => write!(f, "upgrade after SIGKILL"),
            Self::HandOver => write!(f, "upgrade after SIGTERM"),
            Self::TooOld => write!(f, "upgrade with an image that is too old"),
            Self::Planted => write!(f, "upgrade with a planted loss"),
        }
    }
}

/// All of them; those that take longest come first.
fn plan() -> VecDeque<Upgrade> {
    let several = [Upgrade::TooOld, Upgrade::Planted, Upgrade::HandOver, Upgrade::Kill];
    let visits = |(point, visits)| (1..=visits).map(move |visit| Upgrade::Point { point, visit });
    several.into_iter().chain(POINTS.into_iter().flat_map(visits)).collect()
}

/// What was found.
#[derive(Default)]
struct Tally {
    upgrades: u32,
    jobs: u32,
    lost: u32,
    stages: BTreeMap<String, u32>,
    planted: u32,
    failures: Vec<String>,
}

impl Tally {
    /// What is missing even if nothing failed.
    fn missing(&self) -> Vec<String> {
        let unseen = STAGES.iter().filter(|stage| !self.stages.contains_key(**stage));
        let mut missing: Vec<String> = unseen.map(|stage| format!("no job was {stage} at the upgrade")).collect();
        if self.planted == 0 {
            missing.push("the planted loss was not found".into());
        }
        missing
    }
}

/// `false`: something was lost, or did not go as it must.
pub(crate) async fn run(wanted: &Wanted, last: &Path) -> Result<bool, String> {
    let there =
        |name| std::fs::canonicalize(last.join(name)).map_err(|error| format!("the last version's {name}: {error}"));
    let last = Last { dayfly: there("dayfly")?, guest: there("kill-guest")? };
    let paths = Paths::make(&wanted.dayfly, &wanted.guest, false)?;
    let (left, tally): (Shared<VecDeque<Upgrade>>, Shared<Tally>) = (Arc::new(Mutex::new(plan())), Arc::default());
    let mut lanes = JoinSet::new();
    for lane in 0..CELLS {
        let (paths, last, left, tally) = (paths.clone(), last.clone(), left.clone(), tally.clone());
        lanes.spawn(async move {
            for number in (lane..).step_by(CELLS.into()) {
                // A statement of its own: the lock goes before the await.
                let next = locked(&left).pop_front();
                let Some(upgrade) = next else { break };
                one(number, upgrade, &paths, &last, &tally).await;
                if !locked(&tally).failures.is_empty() {
                    // Nobody begins another one: what is there now is to be looked at.
                    locked(&left).clear();
                }
            }
        });
    }
    while let Some(ended) = lanes.join_next().await {
        ended.map_err(|error| format!("an upgrade's task died: {error}"))?;
    }
    let mut tally = locked(&tally);
    if tally.failures.is_empty() {
        tally.failures = tally.missing();
    }
    report(&tally)?;
    if tally.failures.is_empty() {
        paths.remove();
    } else {
        for failure in &tally.failures {
            eprintln!("{failure}");
        }
        eprintln!("upgrade: state directories are kept below {}", paths.describe());
    }
    Ok(tally.failures.is_empty())
}

async fn one(number: u16, upgrade: Upgrade, paths: &Paths, last: &Last, tally: &Shared<Tally>) {
    let mut cell = match Cell::new(number, paths).await {
        Ok(cell) => cell,
        Err(why) => return locked(tally).failures.push(format!("{upgrade}: {why}")),
    };
    match (cell.upgrade(upgrade, last).await, upgrade) {
        (Err(failed), Upgrade::Planted) if failed.lost == 1 => locked(tally).planted += 1,
        (Ok(_), Upgrade::Planted) => {}
        (Err(failed), _) => {
            let mut tally = locked(tally);
            tally.lost += failed.lost;
            tally.failures.push(format!("{upgrade} failed: {}\n{}", failed.why, cell.story(failed.job)));
        }
        (Ok(found), _) => {
            let ended = cell.end(Cell::known(upgrade)).await;
            let mut tally = locked(tally);
            (tally.upgrades, tally.jobs) = (tally.upgrades + 1, tally.jobs + found.jobs);
            for stage in found.stages {
                *tally.stages.entry(stage).or_default() += 1;
            }
            tally.failures.extend(ended.err().map(|why| format!("{upgrade}: {why}")));
        }
    }
}

fn report(tally: &Tally) -> Result<(), String> {
    for (stage, jobs) in &tally.stages {
        say(&format!("{jobs} jobs were {stage} when the last version ended"))?;
    }
    say(&format!("{} upgrades; planted losses found: {}", tally.upgrades, tally.planted))?;
    say(&format!("figure upgrade.jobs {}", tally.jobs))?;
    say(&format!("figure upgrade.lost {}", tally.lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_a_stage_or_that_finds_no_planted_loss_has_failed() {
        let seen = |stages: &[&str], planted| Tally {
            stages: stages.iter().map(|stage| ((*stage).to_owned(), 1)).collect(),
            planted,
            ..Tally::default()
        };
        assert_eq!(seen(&STAGES, 1).missing(), [""; 0]);
        assert_eq!(seen(&STAGES, 0).missing(), ["the planted loss was not found"]);
        assert_eq!(seen(&STAGES[1..], 1).missing(), ["no job was accepted at the upgrade"]);
    }
}
