//! 24 hours in one life of a daemon: what it holds of memory, tasks and descriptors must not grow.
//!
//! The fakes remember everything, so what is over is taken out of them now and then; what grows is then the daemon's.

use crate::dice::Dice;
use crate::guest;
use crate::plan::{After, Before, Gitlab, Limits, Plan, Script, Step};
use crate::report::say;
use crate::story::{Keep, Story};
use crate::world::World;
use dayfly_doubles::fake::GuestMachine;
use dayfly_exec::standin::History;
use std::time::Duration;
use tokio::time::sleep;

/// Virtual time of it all.
const HOURS: u64 = 24;

/// Jobs: one every four seconds.
const EVERY: Duration = Duration::from_millis(4200);

/// After this the caches of allocator and fakes are full.
const WARM: Duration = Duration::from_secs(4 * 3600);

/// Between two looks at memory.
const LOOK: Duration = Duration::from_secs(600);

/// What may come on top: the allocator's own unrest.
const GROWTH_MIB_MAX: f64 = 5.0;

/// Runs it. `false`: something has grown, or a job has failed.
pub(crate) fn soak(seed: u64) -> bool {
    say(&format!("seed {seed}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without I/O can always be made");
    runtime.block_on(day(seed))
}

async fn day(seed: u64) -> bool {
    let plan = plan(seed);
    // The daemon's lines are made and thrown away.
    let sink = tracing_subscriber::fmt().with_writer(std::io::sink).with_ansi(false).finish();
    let _listening = tracing::subscriber::set_default(sink);
    let story = Story::without_checkers(&plan, Keep::Nothing);
    let mut world = World::new(&plan, story.clone());
    let told = story.clone();
    world.fake.set_guest(move |machine: GuestMachine| guest::run(machine, told.clone()));
    let metrics = tokio::runtime::Handle::current().metrics();
    if !world.start(None).await {
        say("the daemon does not start");
        return false;
    }
    sleep(Duration::from_secs(30)).await;
    let (tasks, fds) = (metrics.num_alive_tasks(), descriptors());
    let mut dice = Dice::new(seed, 9);
    let (mut jobs, mut failed, mut next_look) = (0_u64, 0_u64, LOOK);
    let (mut warm, mut last) = (Vec::new(), Vec::new());
    let end = Duration::from_secs(HOURS * 3600);
    while story.now() < end {
        world.enqueue(&script(&mut dice));
        jobs += 1;
        sleep(EVERY).await;
        if story.now() >= next_look {
            next_look += LOOK;
            failed += world.forget();
            let rss = rss_mib();
            if story.now() >= WARM && warm.len() < 12 {
                warm.push(rss);
            } else if story.now() + Duration::from_secs(2 * 3600) >= end {
                last.push(rss);
            }
        }
    }
    // The last jobs end.
    let mut patience = 3600;
    while patience > 0 && world.daemon.as_ref().is_some_and(|daemon| !daemon.jobs.views().is_empty()) {
        sleep(Duration::from_secs(1)).await;
        patience -= 1;
    }
    sleep(Duration::from_secs(300)).await;
    failed += world.forget();
    let unfinished = world.standin.read(|model| model.jobs.len());
    let hours = story.now().as_secs() / 3600;
    let growth = median(&mut last) - median(&mut warm);
    let left = i64::try_from(metrics.num_alive_tasks()).unwrap_or(i64::MAX) - i64::try_from(tasks).unwrap_or(0);
    let fds_left = i64::try_from(descriptors()).unwrap_or(i64::MAX) - i64::try_from(fds).unwrap_or(0);
    say(&format!("{failed} jobs failed, {unfinished} did not end; RSS is {:.1} MiB", rss_mib()));
    say(&format!("figure soak.jobs {jobs}"));
    say(&format!("figure soak.virtual_hours {hours}"));
    say(&format!("figure soak.rss_growth_mib {growth:.1}"));
    say(&format!("figure soak.tasks_left {left}"));
    say(&format!("figure soak.fds_left {fds_left}"));
    failed == 0 && unfinished == 0 && growth <= GROWTH_MIB_MAX && left == 0 && fds_left == 0
}

impl World {
    /// Takes what is over out of the fakes. How many of those jobs did not end as their guests said.
    fn forget(&self) -> u64 {
        let over: Vec<_> = self.standin.edit(|model| {
            model.history = History::default();
            let over: Vec<_> =
                model.jobs.values().filter(|job| job.state.is_over()).map(|job| (job.id, job.state)).collect();
            model.jobs.retain(|_, job| !job.state.is_over());
            over
        });
        let mut inner = self.story.inner();
        let mut wrong = 0;
        for (id, state) in over {
            let Some(note) = inner.ledger.jobs.remove(&id) else { continue };
            wrong += u64::from(note.verdict_said.is_none_or(|(said, _)| said != state.as_str()));
            inner.ledger.tokens.remove(&note.token);
            for vm in note.vms {
                inner.ledger.vms.remove(&vm);
            }
        }
        inner.ledger.troubles.clear();
        wrong
    }
}

fn plan(seed: u64) -> Plan {
    let limits = Limits { boot_s: 300, silence_s: 300, guest_interval_s: 3, spool_mib: 256, poll_s: 3, ports: 100 };
    let gitlab = Gitlab { long_poll_s: 50, two_phase: false, skew_s: 0, final_waits: Some(0), trace_interval_s: None };
    Plan {
        seed,
        runners: 2,
        concurrent: 12,
        limits,
        gitlab,
        jobs: Vec::new(),
        rates: vec![0; crate::kinds::Kind::ALL.len()],
        actions: Vec::new(),
        heals: Duration::ZERO,
        bug: None,
        by_port: false,
        keep_s: None,
        clones: None,
    }
}

fn script(dice: &mut Dice) -> Script {
    let bytes = usize::try_from(dice.range(10, 20_000)).unwrap_or(10);
    let mut steps =
        vec![Step::Print(bytes, true), Step::Work(dice.range(100, 30_000)), Step::Print(50, dice.chance(500))];
    if dice.chance(200) {
        steps.push(Step::Upload(usize::try_from(dice.range(1, 20_000)).unwrap_or(1), dice.chance(300)));
    }
    Script {
        before: Before::Boots(dice.range(200, 8_000)),
        steps,
        exit_code: i64::from(dice.chance(200)),
        after: After::Good,
        timeout_s: 3600,
        deaf: false,
        doomed_project: false,
        protected: false,
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Resident memory of this process.
fn rss_mib() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0.0);
    pages * 4096.0 / 1_048_576.0
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
