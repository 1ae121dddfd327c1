//! What is asked for.

/// For people.
pub(crate) const USAGE: &str = "usage: sim --jobs N [--seed S] [--threads T] [--twice R] | sim --seed S | sim --planted [--seed S] | sim --soak [--seed S]";

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Runs of so many jobs.
    Jobs { jobs: u64, seed: Option<u64> },
    /// One run, told in full.
    One { seed: u64 },
    /// All planted bugs.
    Planted { seed: Option<u64> },
    /// 24 hours of one daemon.
    Soak { seed: Option<u64> },
}

/// All of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) task: Task,
    pub(crate) threads: usize,
    /// Seeds that are run twice.
    pub(crate) twice: u64,
}

/// Reads the arguments.
pub(crate) fn parse(mut given: impl Iterator<Item = String>) -> Result<Args, String> {
    let (mut jobs, mut seed) = (None, None);
    let mut threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (mut twice, mut planted, mut soak) = (None, false, false);
    while let Some(word) = given.next() {
        let mut number = || -> Result<u64, String> {
            let value = given.next().ok_or_else(|| format!("`{word}` needs a number"))?;
            value.parse().map_err(|_| format!("`{value}` is no number"))
        };
        match word.as_str() {
            "--planted" => planted = true,
            "--soak" => soak = true,
            "--jobs" => jobs = Some(number()?),
            "--seed" => seed = Some(number()?),
            "--twice" => twice = Some(number()?),
            "--threads" => threads = usize::try_from(number()?).unwrap_or(1).max(1),
            _ => return Err(format!("`{word}` is no argument")),
        }
    }
    let task = match (jobs, seed) {
        (None, seed) if planted && !soak => Task::Planted { seed },
        (None, seed) if soak && !planted => Task::Soak { seed },
        _ if planted || soak => return Err("`--planted`, `--soak` and `--jobs` are three things".to_owned()),
        (Some(0), _) => return Err("no job is nothing to simulate".to_owned()),
        (Some(jobs), seed) => Task::Jobs { jobs, seed },
        (None, Some(seed)) => Task::One { seed },
        (None, None) => return Err("nothing to do".to_owned()),
    };
    Ok(Args { task, threads, twice: twice.unwrap_or(0) })
}
