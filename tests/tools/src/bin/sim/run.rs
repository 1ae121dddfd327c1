//! One run: one seed, one world, one runtime on paused time, from the first job to the last thing gone.

use crate::check::{Findings, Secrets, Violation};
use crate::event::{DaemonDoes, Event};
use crate::kinds::Hits;
use crate::log::Log;
use crate::operator::Lasting;
use crate::panics;
use crate::plan::{Action, Plan};
use crate::story::{Keep, Story};
use crate::world::World;
use dayfly_exec::standin::JobState;
use std::path::Path;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Nothing takes longer than this, in virtual time, once nothing new goes wrong.
const PATIENCE: Duration = Duration::from_secs(8 * 3600);

/// What a machine has alone goes with it, or with a sweep soon after; what has not gone by then is left behind.
const SLOT_PATIENCE: Duration = Duration::from_secs(2 * 3600);

/// Between two looks at the whole.
const LOOK: Duration = Duration::from_millis(1000);

/// What came of a run.
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) jobs: u64,
    pub(crate) hits: Hits,
    pub(crate) violations: Vec<Violation>,
    pub(crate) text: String,
    pub(crate) digest: u64,
    pub(crate) events: u64,
    pub(crate) virtual_time: Duration,
}

impl Outcome {
    /// Of a run that ended in a panic of its own.
    fn broken(seed: u64, jobs: u64) -> Self {
        let (hits, violations, text) = (Hits::default(), Vec::new(), String::new());
        Self { seed, jobs, hits, violations, text, digest: 0, events: 0, virtual_time: Duration::ZERO }
    }
}

/// Runs it.
pub(crate) fn run(plan: Plan, keep: Keep) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without I/O can always be made");
    let _ = panics::take();
    let (seed, jobs) = (plan.seed, plan.jobs.len() as u64);
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(tell(plan, keep))));
    drop(runtime);
    let mut outcome = told.unwrap_or_else(|_| Outcome::broken(seed, jobs));
    for panic in panics::take() {
        outcome.violations.push(Violation {
            invariant: 1,
            at: outcome.virtual_time,
            sentence: format!("a panic: {panic}"),
        });
    }
    outcome
}

async fn tell(plan: Plan, keep: Keep) -> Outcome {
    let story = Story::new(&plan, keep);
    let log = Log::default();
    let listening = log.listen();
    let mut world = World::new(&plan, story.clone());
    if keep == Keep::Text {
        story.inner().write(&format!("{plan:#?}"));
    }
    world.live(&plan).await;
    world.stop().await;
    drop(listening);
    world.judge(&log);
    let (mut text, digest, events) = story.record();
    if keep == Keep::Text {
        text.push_str("--- the daemon said\n");
        text.push_str(&log.text());
    }
    let inner = story.inner();
    Outcome {
        seed: plan.seed,
        jobs: plan.jobs.len() as u64,
        hits: inner.hits.clone(),
        violations: {
            drop(inner);
            story.violations()
        },
        text,
        digest,
        events,
        virtual_time: story.now(),
    }
}

impl World {
    /// Jobs come, things go wrong, lives end and begin, until all jobs are over and nothing is left of them.
    async fn live(&mut self, plan: &Plan) {
        let mut jobs = plan.jobs.iter();
        let mut next_job = jobs.next();
        let mut actions = plan.actions.iter();
        let mut next_action = actions.next();
        let mut lasting: Vec<Lasting> = Vec::new();
        let mut healed = false;
        let limit = plan.heals + PATIENCE;
        loop {
            let now = self.story.now();
            if now > limit {
                let views = self.daemon.as_ref().map(|daemon| daemon.jobs.views()).unwrap_or_default();
                let left: Vec<String> = views.iter().map(|view| format!("{} {}", view.key, view.state)).collect();
                self.story.violate(19, format!("the run does not come to its end; the daemon has {left:?}"));
                return;
            }
            while let Some(at) = lasting.iter().position(|lasting| lasting.until <= now) {
                let Lasting { kind, .. } = lasting.swap_remove(at);
                self.over(kind);
            }
            self.look_after_outage();
            self.look_at_clones();
            if !self.is_alive() {
                self.begin().await;
                continue;
            }
            while let Some((_, script)) = next_job.filter(|(at, _)| *at <= now) {
                self.enqueue(script);
                next_job = jobs.next();
            }
            if let Some((_, Action::Do(kind, lasts))) = next_action.filter(|(at, _)| *at <= now) {
                next_action = actions.next();
                if lasting.iter().all(|lasting| lasting.kind != *kind) {
                    lasting.extend(self.act(*kind, *lasts).await);
                }
                continue;
            }
            if !healed && now >= plan.heals && next_action.is_none() {
                healed = true;
                self.story.heal();
            }
            if healed && next_job.is_none() && lasting.is_empty() && self.is_done() {
                if !self.slots().is_empty() && now < plan.heals + SLOT_PATIENCE {
                    sleep(LOOK).await;
                    continue;
                }
                return;
            }
            let wake =
                [next_job.map(|(at, _)| *at), next_action.map(|(at, _)| *at), lasting.iter().map(|l| l.until).min()];
            let wake = wake
                .into_iter()
                .flatten()
                .min()
                .unwrap_or(now + LOOK)
                .saturating_sub(now)
                .clamp(Duration::from_millis(1), LOOK);
            let Some(daemon) = &mut self.daemon else { continue };
            tokio::select! {
                biased;
                () = daemon.life.over() => {}
                _ = &mut daemon.task => {}
                () = sleep(wake) => {}
            }
        }
    }

    /// The next life, after whatever ended the one before.
    async fn begin(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            // It died at a call, or a part of it failed and it left: systemd starts it again.
            let died = daemon.life.is_over();
            daemon.life.kill();
            self.story.tell(&Event::Daemon(if died { DaemonDoes::Dies } else { DaemonDoes::Gone }));
            sleep(Duration::from_millis(500)).await;
        }
        if !self.start(None).await {
            sleep(Duration::from_secs(2)).await;
        }
    }

    /// Whether all jobs are over, or lost as they may be, and the daemon has nothing left of any.
    fn is_done(&self) -> bool {
        let idle = self.daemon.as_ref().is_some_and(|daemon| daemon.jobs.views().is_empty());
        let vms = self.fake.vms();
        let overlays = self.fake.overlays();
        let inner = self.story.inner();
        let foreign = &inner.ledger.foreign;
        // What belongs to nobody goes with the next sweep.
        let clean = vms.iter().all(|(spec, _)| foreign.contains(&format!("df-{}", spec.id)))
            && overlays.keys().all(|path| foreign.contains(path.to_str().unwrap_or_default()));
        let lost = |id| inner.ledger.jobs.get(&id).is_some_and(|note| note.lost.is_some());
        idle && clean
            && self.standin.read(|model| {
                model.jobs.values().all(|job| job.state.is_over() || job.state != JobState::Pending && lost(job.id))
            })
    }

    /// The last daemon drains and goes.
    async fn stop(&mut self) {
        let Some(daemon) = self.daemon.take() else { return };
        self.story.tell(&Event::Daemon(DaemonDoes::Drains));
        daemon.shutdown.drain();
        let mut task = daemon.task;
        if timeout(Duration::from_secs(600), &mut task).await.is_err() {
            self.story.violate(19, "an idle daemon does not drain".to_owned());
        }
        let capacity = daemon.handler.status().capacity;
        let promised = (capacity.jobs, capacity.cpus, capacity.memory_mib, capacity.disk_gib);
        if promised != (0, 0, 0, 0) {
            self.story.violate(13, format!("capacity is not all back: {promised:?}"));
        }
        // GitLab's own workers give up what was lost on the way.
        sleep(Duration::from_secs(3 * 3600)).await;
        self.standin.read(|model| {
            for job in model.jobs.values() {
                self.story.tell(&Event::Held { job, last: true });
            }
        });
    }

    /// What must be true of what is left.
    fn judge(&self, log: &Log) {
        let foreign = self.story.inner().ledger.foreign.clone();
        let vms: Vec<String> = self.fake.vms().iter().map(|(spec, _)| format!("df-{}", spec.id)).collect();
        let overlays: Vec<String> = self.fake.overlays().keys().map(|path| path.display().to_string()).collect();
        let counts = self.fake.counts();
        let left: Vec<&String> = vms.iter().chain(&overlays).filter(|name| !foreign.contains(*name)).collect();
        if !left.is_empty() || counts.listeners > 0 || counts.carriers > 0 {
            let (doors, carriers) = (counts.listeners, counts.carriers);
            self.story.violate(13, format!("left behind: {left:?}, {doors} listeners, {carriers} carriers of egress"));
        }
        let theirs = vms.iter().filter(|name| foreign.contains(*name)).count();
        if counts.sockets > theirs {
            self.story.violate(13, format!("sockets of {} VMs are left behind", counts.sockets - theirs));
        }
        let gone: Vec<&String> =
            foreign.iter().filter(|name| name.ends_with(".qcow2") && !overlays.contains(name)).collect();
        if !gone.is_empty() && self.story.inner().hits.of(crate::kinds::Kind::Foreign) > 0 {
            self.story.violate(15, format!("what was not ours is gone: {gone:?}"));
        }
        let usual = |path: &Path| {
            path.ends_with("installation.json")
                || path.starts_with("/state/set-aside")
                || path.starts_with("/state/ended")
                || path.starts_with("/state/consoles")
                // What a job has left for others; of its own it leaves nothing there.
                || (path.starts_with("/state/cache") && !path.starts_with("/state/cache/pins"))
                || (path.starts_with("/state/clones") && !path.starts_with("/state/clones/slots"))
        };
        let files: Vec<_> = self.files.paths_below(Path::new("/")).into_iter().filter(|path| !usual(path)).collect();
        if !files.is_empty() {
            self.story.violate(13, format!("files are left behind: {files:?}"));
        }
        let mut findings = Findings::default();
        let (passes, tokens) = {
            let inner = self.story.inner();
            let passes = inner.ledger.vms.values().filter_map(|vm| vm.pass.clone()).collect();
            (passes, inner.ledger.tokens.keys().cloned().collect())
        };
        Secrets::log(log.text().as_bytes(), passes, &tokens, &mut findings);
        for found in findings.all {
            self.story.violate(found.invariant, found.sentence);
        }
        self.story.end();
    }
}
