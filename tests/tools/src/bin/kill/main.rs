//! `kill-test`: the real daemon ended by SIGKILL at each named point and at random times, started again, and judged.
//!
//! ```text
//!  this process, which survives               processes of their own
//!  stand-in GitLab ◄────────── HTTP ───────── dayfly run ──(hypervisor of processes)──► kill-guest, outlives it
//!  rounds: feed jobs, kill, start, judge          ▲                                          │
//!                                                 └──────────── relay, greeting, HTTP ───────┘
//! ```
//!
//! Several state directories ([`cell`]) work side by side through one list of rounds ([`plan`]). In each round jobs
//! are fed ([`work`]), the daemon dies, the next one is started, and as soon as the host is clean, at the latest 60 s
//! after that start, all is judged ([`judge`]): each job that GitLab handed out has ended once, with its verdict and
//! each byte of its trace, and nothing is left. Only a job of which GitLab knows and the disk does not may be lost
//! (K1 to K3); it is counted apart. With `--last` the daemon that dies is another version's ([`upgrade`]).

mod cell;
mod daemon;
mod judge;
mod leftovers;
mod place;
mod plan;
mod repository;
mod upgrade;
mod window;
mod work;

use cell::Cell;
use dayfly::rng::Rng;
use place::Paths;
use plan::{Kind, Plan, Round};
use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::JoinSet;

const USAGE: &str =
    "usage: kill-test --dayfly PROGRAM --guest PROGRAM [--kills N] [--seed S] [--point K0..K20] [--last DIRECTORY]";

/// State directories side by side.
const CELLS: u16 = 4;

/// What the command line asks for.
struct Wanted {
    dayfly: PathBuf,
    guest: PathBuf,
    kills: u32,
    seed: u64,
    /// This point only.
    point: Option<u8>,
    /// The programs of the last version: no kills, but upgrades from it.
    last: Option<PathBuf>,
}

impl Wanted {
    fn read(arguments: &[String]) -> Option<Self> {
        let (mut dayfly, mut guest, mut kills, mut seed, mut point, mut last) = (None, None, 200, None, None, None);
        for pair in arguments.chunks(2) {
            let [name, value] = pair else { return None };
            match name.as_str() {
                "--dayfly" => dayfly = Some(PathBuf::from(value)),
                "--guest" => guest = Some(PathBuf::from(value)),
                "--kills" => kills = value.parse().ok()?,
                "--seed" => seed = Some(value.parse().ok()?),
                "--point" => point = Some(value.strip_prefix('K')?.parse().ok().filter(|n| *n < plan::POINTS)?),
                "--last" => last = Some(PathBuf::from(value)),
                _ => return None,
            }
        }
        let seed = seed.unwrap_or_else(|| Rng::system().below(1 << 32));
        Some(Self { dayfly: dayfly?, guest: guest?, kills, seed, point, last })
    }
}

/// What has been found so far, over all cells.
#[derive(Default)]
struct Tally {
    kills: u32,
    hand_overs: u32,
    drains: u32,
    jobs: u32,
    windows: u32,
    lost: u32,
    leaked: u32,
    /// Deaths at each point, confirmed.
    hits: BTreeMap<u8, u32>,
    /// Milliseconds from the last byte of a 201 to the journal.
    journal_ms: Vec<f64>,
    /// Milliseconds of one fsync of the same disk meanwhile.
    fsync_ms: Vec<f64>,
    failures: Vec<String>,
}

/// Shared by the cells: the rounds that are left, and what was found.
type Shared<T> = Arc<Mutex<T>>;

fn locked<T>(shared: &Shared<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(wanted) = Wanted::read(&arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(64);
    };
    let ran = match &wanted.last {
        Some(last) => upgrade::run(&wanted, last).await,
        None => run(&wanted).await,
    };
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("kill-test: {why} (seed {})", wanted.seed);
            ExitCode::FAILURE
        }
    }
}

/// `false`: something was lost, leaked, or did not go as it must.
async fn run(wanted: &Wanted) -> Result<bool, String> {
    let plan = Plan::new(wanted.seed, wanted.kills, wanted.point);
    say(&format!("seed {}: {} rounds in {CELLS} state directories", wanted.seed, plan.rounds.len()))?;
    let rounds: Shared<VecDeque<Round>> = Arc::new(Mutex::new(plan.rounds.into()));
    let tally: Shared<Tally> = Arc::default();
    let paths = Paths::make(&wanted.dayfly, &wanted.guest, true)?;
    let mut disk = JoinSet::new();
    let (watched, tallied) = (paths.disk().to_owned(), tally.clone());
    disk.spawn(async move { window::watch_disk(&watched, |ms| locked(&tallied).fsync_ms.push(ms)).await });
    let mut cells = JoinSet::new();
    for number in 0..CELLS {
        let (rounds, tally, paths) = (rounds.clone(), tally.clone(), paths.clone());
        cells.spawn(async move {
            let worked = work_through(number, &paths, &rounds, &tally).await;
            if let Err(why) = worked {
                // Nobody begins another round: what is there now is to be looked at.
                locked(&rounds).clear();
                locked(&tally).failures.push(why);
            }
        });
    }
    while let Some(ended) = cells.join_next().await {
        ended.map_err(|error| format!("a state directory's task died: {error}"))?;
    }
    disk.abort_all();
    let tally = locked(&tally);
    report(&tally)?;
    let well = tally.failures.is_empty() && tally.lost == 0 && tally.leaked == 0;
    if well {
        paths.remove();
    } else {
        for failure in &tally.failures {
            eprintln!("{failure}");
        }
        eprintln!("kill-test: seed {}; state directories are kept below {}", wanted.seed, paths.describe());
    }
    Ok(well)
}

async fn work_through(
    number: u16,
    paths: &Paths,
    rounds: &Shared<VecDeque<Round>>,
    tally: &Shared<Tally>,
) -> Result<(), String> {
    let mut cell = Cell::new(number, paths).await?;
    loop {
        // A statement of its own: the lock goes before the await.
        let next = locked(rounds).pop_front();
        let Some(round) = next else { break };
        let found = cell.round(&round).await;
        let mut tally = locked(tally);
        let found = match found {
            Ok(found) => found,
            Err(failed) => {
                (tally.lost, tally.leaked) = (tally.lost + failed.lost, tally.leaked + failed.leaked);
                return Err(format!("kill-test: {round} failed: {}\n{}", failed.why, cell.story(failed.job)));
            }
        };
        tally.kills += found.kills;
        tally.jobs += found.jobs;
        tally.windows += found.windows;
        match round.kind {
            Kind::Point { point, .. } => *tally.hits.entry(point).or_default() += 1,
            Kind::HandOver { .. } => tally.hand_overs += 1,
            Kind::Drain { .. } => tally.drains += 1,
            Kind::Random { .. } | Kind::Storm => {}
        }
    }
    let journal_ms = cell.end(None).await?;
    locked(tally).journal_ms.extend(journal_ms);
    Ok(())
}

fn report(tally: &Tally) -> Result<(), String> {
    for (point, hits) in &tally.hits {
        say(&format!("K{point}: {hits} kills, {hits} died there"))?;
    }
    say(&format!("{} jobs judged, {} hand-overs, {} drains", tally.jobs, tally.hand_overs, tally.drains))?;
    let window = window::Figures::of(&tally.journal_ms);
    say(&format!("from a 201's last byte to the record on disk: {window}"))?;
    say(&format!("one fsync of this disk meanwhile: {}", window::Figures::of(&tally.fsync_ms)))?;
    say(&format!("figure kill.kills {}", tally.kills))?;
    say(&format!("figure kill.lost {}", tally.lost))?;
    say(&format!("figure kill.leaked {}", tally.leaked))?;
    say(&format!("figure kill.windows {}", tally.windows))?;
    say(&format!("figure kill.journal_window_ms {:.2} ms", window.p99))
}

fn say(line: &str) -> Result<(), String> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| format!("print: {error}"))
}
