//! The jobs of a round: short, of every kind, with bytes that are known beforehand.

use crate::plan::small;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly_exec::standin::JobSpec;
use dayfly_test_tools::killing::Step;
use std::time::Duration;

/// What a job is, and what must become of it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) script: Vec<Step>,
    pub(crate) cancel: Option<Cancel>,
    /// The job whose artifact it fetches.
    pub(crate) source: Option<JobId>,
}

/// Somebody cancels the job while it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cancel {
    pub(crate) graceful: bool,
    /// After it was handed out.
    pub(crate) after: Duration,
}

/// An artifact that every job may fetch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) job: JobId,
    pub(crate) bytes: usize,
}

impl Wanted {
    /// A job of some kind.
    pub(crate) fn choose(rng: &Rng, source: Source) -> Self {
        let work = |rng: &Rng, most: u32| Step::Work(u64::from(10 + small(rng, most)));
        let bytes = |rng: &Rng, most: usize| Step::Bytes(1 + usize::try_from(rng.below(most as u64)).unwrap_or(0));
        let script = match small(rng, 20) {
            0..=4 => vec![bytes(rng, 300), work(rng, 200), bytes(rng, 4000)],
            5..=8 => {
                let round = |_| [bytes(rng, 2000), work(rng, 160)];
                (0..4).flat_map(round).collect()
            }
            // More than one PATCH can carry.
            9 => vec![bytes(rng, 1000), work(rng, 100), Step::Bytes((1 << 20) + 70_000), work(rng, 100), bytes(rng, 9)],
            10..=12 => return Self::uploading(rng),
            13..=14 => {
                let fetch = Step::Download(source.job.0, source.bytes);
                let script = vec![work(rng, 50), fetch, bytes(rng, 500)];
                return Self { script, cancel: None, source: Some(source.job) };
            }
            15..=16 => vec![bytes(rng, 3000), work(rng, 150), Step::Exit(1 + i64::from(small(rng, 120)))],
            17 => vec![work(rng, 20)],
            _ => {
                let cancel = Cancel { graceful: small(rng, 2) == 0, after: Duration::from_millis(rng.below(500)) };
                let script = vec![bytes(rng, 900), work(rng, 900), bytes(rng, 900)];
                return Self { script, cancel: Some(cancel), source: None };
            }
        };
        Self { script, cancel: None, source: None }
    }

    /// A job that moves no artifact: the official runner tries that three times, each kill may cut one of them, and a
    /// fourth is nobody's promise.
    pub(crate) fn without_transfer(rng: &Rng, source: Source) -> Self {
        let transfers = |step: &Step| matches!(step, Step::Upload(_) | Step::Download(..));
        loop {
            let wanted = Self::choose(rng, source);
            if !wanted.script.iter().any(transfers) {
                return wanted;
            }
        }
    }

    /// A job that uploads an artifact of some MiB.
    pub(crate) fn uploading(rng: &Rng) -> Self {
        let count = (1 << 20) + usize::try_from(rng.below(4 << 20)).unwrap_or(0);
        Self { script: vec![Step::Bytes(200), Step::Upload(count), Step::Bytes(200)], cancel: None, source: None }
    }

    /// A job that saves a cache of some hundred KiB by the key that all have, and looks for it.
    pub(crate) fn caching(rng: &Rng) -> Self {
        let count = 1000 + usize::try_from(rng.below(900_000)).unwrap_or(0);
        Self { script: vec![Step::Bytes(200), Step::Cache(count), Step::Bytes(200)], cancel: None, source: None }
    }

    /// As GitLab gets it.
    pub(crate) fn spec(&self) -> JobSpec {
        let spec = JobSpec::script(self.script.iter().map(ToString::to_string));
        match self.source {
            Some(source) => spec.depending_on(source),
            None => spec,
        }
    }
}
