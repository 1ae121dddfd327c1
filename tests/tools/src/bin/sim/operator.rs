//! What is done to a run from outside: by operators, by GitLab's users, by the host, by fate.

use crate::event::{DaemonDoes, Event, Trouble};
use crate::kinds::Kind as K;
use crate::mortal::{End, Seam, When};
use crate::world::World;
use dayfly::gitlab::JobId;
use dayfly::job::state::State;
use dayfly::rng::Rng;
use dayfly::vm::paths::Paths as _;
use dayfly::vm::{Accel, Attachment, Boot, Confinement, Hypervisor as _, VmId, VmName, VmSpec};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long a condition is waited for before an action is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a GitLab that is made to hold polls holds them.
const LONG_POLL: Duration = Duration::from_secs(50);

/// How long a guest is waited for that has to be destroyed, before one is made to be.
const DESTROY_PATIENCE: Duration = Duration::from_secs(5);

/// Something that ends later.
pub(crate) struct Lasting {
    pub(crate) until: Duration,
    pub(crate) kind: K,
}

impl World {
    fn says(&self, does: DaemonDoes) {
        self.story.tell(&Event::Daemon(does));
    }

    /// Does it; what lasts is given back, to be ended with [`World::over`].
    pub(crate) async fn act(&mut self, kind: K, lasts: Duration) -> Option<Lasting> {
        let lasting = || Some(Lasting { until: self.story.now() + lasts, kind });
        match kind {
            K::Outage | K::LibvirtDown | K::LowDisk | K::ReadOnly | K::ImageMissing => {
                let lasting = lasting();
                self.begins(kind);
                return lasting;
            }
            K::CancelBooting | K::CancelRunning | K::HardCancel | K::Erased | K::ProjectDeleted => {
                self.users_act(kind).await
            }
            K::OomKilled => self.oom().await,
            K::KillJob => self.kill_job().await,
            K::WallJump => self.wall_jumps(),
            K::Leftovers | K::Foreign => self.leaves(kind).await,
            K::HandOver | K::HeldPoll => self.hand_over(kind, lasts).await,
            K::SecondSignal | K::Drain => self.drain(kind, lasts).await,
            K::RecordDamaged => self.damage(lasts).await,
            K::HostReboot => self.reboot(lasts).await,
            K::KillStorm => self.storm(lasts).await,
            K::Killed => self.dies_at_any_call(lasts).await,
            kind => self.dies_at(kind, lasts).await,
        }
        None
    }

    fn begins(&mut self, kind: K) {
        self.story.hit(kind);
        let trouble = match kind {
            K::Outage => Trouble::Gitlab,
            K::LibvirtDown => {
                self.fake.set_reachable(false);
                Trouble::Libvirt
            }
            K::LowDisk => {
                self.files.set_free_bytes(1 << 20);
                // Nothing fails: no job is asked for.
                return self.says(DaemonDoes::Trouble(Trouble::Image, true));
            }
            K::ImageMissing => {
                self.images.set_missing(true);
                Trouble::Image
            }
            _ => Trouble::Disk,
        };
        self.says(DaemonDoes::Trouble(trouble, true));
    }

    /// Whether some runner would ask GitLab.
    fn has_room(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| {
            let status = daemon.handler.status();
            use dayfly::status::RunnerState::{Polling, Retrying};
            status.runners.iter().any(|runner| matches!(runner.state, Polling | Retrying { .. }))
        })
    }

    /// A runner that could not ask for an outage may find only then that nothing is to be asked: that machines are lost
    /// in a row, or a disk is short.
    pub(crate) fn look_after_outage(&self) {
        let back_at = self.story.inner().ledger.back_at;
        if back_at.is_some_and(|at| self.story.now() <= at + Duration::from_secs(20)) && !self.has_room() {
            self.story.inner().ledger.has_room = false;
        }
    }

    /// What lasted is over.
    pub(crate) fn over(&mut self, kind: K) {
        let trouble = match kind {
            K::Outage => {
                let (now, has_room) = (self.story.now(), self.has_room());
                let mut inner = self.story.inner();
                (inner.ledger.has_room, inner.ledger.back_at) = (has_room, Some(now));
                drop(inner);
                Trouble::Gitlab
            }
            K::LibvirtDown => {
                self.fake.set_reachable(true);
                Trouble::Libvirt
            }
            K::LowDisk => {
                self.files.set_free_bytes(1 << 40);
                Trouble::Image
            }
            K::ImageMissing => {
                self.images.set_missing(false);
                Trouble::Image
            }
            _ => Trouble::Disk,
        };
        self.says(DaemonDoes::Trouble(trouble, false));
    }

    /// Waits until some job fulfils this, but not for ever.
    async fn some_job(&self, wanted: impl Fn(&crate::ledger::JobNote) -> bool) -> Option<JobId> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until && self.is_alive() {
            let found = {
                let mut inner = self.story.inner();
                let found: Vec<JobId> = inner
                    .ledger
                    .jobs
                    .iter()
                    .filter(|(_, n)| n.over_at.is_none() && wanted(n))
                    .map(|(id, _)| *id)
                    .collect();
                if found.is_empty() { None } else { Some(*inner.dice().pick(&found)) }
            };
            if found.is_some() {
                return found;
            }
            sleep(Duration::from_millis(700)).await;
        }
        None
    }

    async fn users_act(&mut self, kind: K) {
        let state = |note: &crate::ledger::JobNote| note.record.as_ref().map(|record| record.state.clone());
        let booting = |n: &crate::ledger::JobNote| matches!(state(n), Some(State::Accepted | State::Booting { .. }));
        let running = |n: &crate::ledger::JobNote| matches!(state(n), Some(State::Running { .. }));
        let job = match kind {
            K::CancelBooting => self.some_job(booting).await,
            K::ProjectDeleted => self.some_job(|n| running(n) && n.script.doomed_project).await,
            _ => self.some_job(running).await,
        };
        let Some(job) = job else { return };
        self.story.hit(kind);
        let what = match kind {
            K::HardCancel => "canceled at once",
            K::Erased => "erased",
            K::ProjectDeleted => "deleted",
            _ => "canceled",
        };
        match kind {
            K::Erased => self.standin.erase(job),
            K::ProjectDeleted => self.standin.delete_project(self.doomed),
            K::HardCancel => self.standin.cancel(job, false),
            K::CancelBooting => {
                let graceful = self.story.inner().dice().chance(500);
                self.standin.cancel(job, graceful);
            }
            _ => self.standin.cancel(job, true),
        }
        if kind == K::ProjectDeleted {
            let doomed: Vec<JobId> = {
                let inner = self.story.inner();
                inner.ledger.jobs.iter().filter(|(_, note)| note.script.doomed_project).map(|(id, _)| *id).collect()
            };
            for job in doomed {
                self.says(DaemonDoes::Users(job, what));
            }
        } else {
            self.says(DaemonDoes::Users(job, what));
        }
    }

    async fn oom(&mut self) {
        let Some(job) = self.some_job(|note| !note.handed.is_empty()).await else { return };
        let vm = self.story.inner().ledger.jobs.get(&job).and_then(|note| note.vms.last().cloned());
        if let Some(name) = vm.and_then(|name| VmName::parse(&name)) {
            self.story.hit(K::OomKilled);
            self.fake.crash(name.id());
        }
    }

    async fn kill_job(&mut self) {
        let Some(job) = self.some_job(|note| note.record.is_some()).await else { return };
        let Some(daemon) = self.daemon.as_ref().filter(|daemon| !daemon.life.is_over()) else { return };
        self.story.hit(K::KillJob);
        self.says(DaemonDoes::Kills(job));
        let _ = daemon.handler.kill(job, None, None);
    }

    fn wall_jumps(&mut self) {
        let (forward, by) = {
            let mut inner = self.story.inner();
            let by = *inner.dice().pick(&[60, 3600, 7200, 10 * 365 * 86_400]);
            (inner.dice().chance(500), Duration::from_secs(by))
        };
        self.story.hit(K::WallJump);
        self.clock.jump(forward, by);
    }

    /// VMs and overlays without a record: ours, or somebody else's.
    async fn leaves(&mut self, kind: K) {
        let Some(installation) = self.files.look("/state/installation.json".as_ref(), |bytes| {
            serde_json::from_slice::<dayfly::daemon::Installation>(bytes.unwrap_or_default()).ok()
        }) else {
            return;
        };
        let rng = Rng::seeded(self.story.inner().dice().next());
        let id = VmId::random(&rng);
        let overlay = PathBuf::from(if kind == K::Foreign { "/elsewhere" } else { "/state/overlays" })
            .join(format!("df-{id}.qcow2"));
        let spec = VmSpec {
            id: id.clone(),
            installation: if kind == K::Foreign { VmId::random(&rng) } else { installation.id },
            bound: None,
            cpus: 1,
            memory_mib: 512,
            accel: Accel::Tcg,
            boot: Boot::Disk,
            overlay: overlay.clone(),
            base: "/images/test/disk.qcow2".into(),
            frozen: None,
            attachment: Attachment::User,
            read_only: Vec::new(),
            nested: false,
            confine: Confinement::default(),
            socket_dir: "/run/vm".into(),
        };
        let made = self.fake.make_overlay(&overlay, &spec.base, 1).await.is_ok();
        if kind == K::Foreign {
            let mut foreign = vec![format!("df-{id}")];
            foreign.extend(made.then(|| overlay.display().to_string()));
            let other = "/state/overlays/debian.qcow2";
            if self.fake.make_overlay(other.as_ref(), &spec.base, 1).await.is_ok() {
                foreign.push(other.to_owned());
            }
            self.story.inner().ledger.foreign.extend(foreign);
        }
        if made && self.fake.start(&spec).await.is_ok() {
            self.story.hit(kind);
        }
    }

    /// Waits out the time that nobody runs.
    async fn away(&mut self, lasts: Duration) {
        self.daemon = None;
        self.story.arm(None);
        sleep(lasts).await;
    }

    async fn hand_over(&mut self, kind: K, lasts: Duration) {
        if !self.is_alive() {
            return;
        }
        if kind == K::HeldPoll {
            self.standin.configure(|settings| settings.long_poll = LONG_POLL);
        }
        if self.standin.read(|model| model.settings.long_poll > Duration::ZERO) {
            // The better story is one with a poll under way.
            let patience = if kind == K::HeldPoll { 3 * PATIENCE } else { PATIENCE / 3 };
            let until = Instant::now() + patience;
            while Instant::now() < until && self.story.inner().ledger.polls == 0 && self.is_alive() {
                sleep(Duration::from_millis(300)).await;
            }
        }
        if !self.is_alive() {
            return;
        }
        let held = self.story.inner().ledger.polls > 0;
        if held {
            self.story.hit(K::HeldPoll);
        }
        self.story.hit(K::HandOver);
        self.says(DaemonDoes::HandsOver);
        let Some(daemon) = self.daemon.take() else { return };
        daemon.shutdown.hand_over();
        let twice = self.story.inner().dice().chance(150);
        if twice {
            sleep(Duration::from_millis(300)).await;
            self.story.hit(K::SecondSignal);
            daemon.shutdown.hand_over();
        }
        self.leaves_in(daemon, Duration::from_secs(20)).await;
        self.away(lasts).await;
    }

    /// Waits for a daemon that was told to go.
    async fn leaves_in(&self, mut daemon: crate::world::Daemon, limit: Duration) {
        let gone = tokio::select! {
            biased;
            gone = timeout(limit, &mut daemon.task) => gone.map(|joined| joined.is_err_and(|error| error.is_panic())),
            () = daemon.life.over() => Ok(false),
        };
        match gone {
            Ok(false) => {}
            Ok(true) => self.story.violate(18, "the daemon panicked while it left".to_owned()),
            Err(_) => self.story.violate(18, format!("the daemon has not left within {} s", limit.as_secs())),
        }
        self.says(if daemon.life.is_over() { DaemonDoes::Dies } else { DaemonDoes::Gone });
        // A process that has gone holds nothing.
        daemon.life.kill();
    }

    async fn drain(&mut self, kind: K, lasts: Duration) {
        if !self.is_alive() {
            return;
        }
        self.story.hit(K::Drain);
        self.says(DaemonDoes::Drains);
        let Some(mut daemon) = self.daemon.take() else { return };
        daemon.shutdown.drain();
        if kind == K::SecondSignal {
            let early = tokio::select! {
                biased;
                _ = &mut daemon.task => true,
                () = daemon.life.over() => true,
                () = sleep(lasts) => false,
            };
            if !early {
                self.story.hit(K::SecondSignal);
                self.says(DaemonDoes::Ends);
                daemon.shutdown.end();
                self.leaves_in(daemon, Duration::from_secs(60)).await;
                self.away(Duration::from_secs(1)).await;
                return;
            }
            self.says(if daemon.life.is_over() { DaemonDoes::Dies } else { DaemonDoes::Gone });
            daemon.life.kill();
        } else {
            // As long as its longest job; then somebody loses patience.
            let patience = Duration::from_secs(900);
            let drained = tokio::select! {
                biased;
                _ = &mut daemon.task => true,
                () = daemon.life.over() => true,
                () = sleep(patience) => false,
            };
            if drained {
                self.says(if daemon.life.is_over() { DaemonDoes::Dies } else { DaemonDoes::Gone });
                daemon.life.kill();
            } else {
                self.says(DaemonDoes::Dies);
                daemon.life.kill();
            }
        }
        self.away(Duration::from_secs(1)).await;
    }

    /// The life ends here and now.
    async fn kill_now(&mut self, lasts: Duration) {
        if let Some(daemon) = self.daemon.take() {
            daemon.life.kill();
        }
        self.says(DaemonDoes::Dies);
        self.away(lasts).await;
    }

    /// A record is torn, emptied or overwritten while nobody runs.
    async fn damage(&mut self, lasts: Duration) {
        let Some(job) = self.some_job(|note| note.record.is_some()).await else { return };
        if let Some(daemon) = self.daemon.take() {
            daemon.life.kill();
        }
        self.says(DaemonDoes::Dies);
        let directory =
            self.story.inner().ledger.jobs.get(&job).and_then(|note| Some(note.record.as_ref()?.key.directory()));
        if let Some(directory) = directory {
            let path = PathBuf::from("/state/jobs").join(directory).join("record.json");
            let bytes = self.files.look(&path, |bytes| bytes.map(<[u8]>::to_vec)).unwrap_or_default();
            let torn = match self.story.inner().dice().below(4) {
                0 => Vec::new(),
                1 => bytes[..bytes.len() / 2].to_vec(),
                2 => b"\0\0\0\0\0\0\0\0".to_vec(),
                _ => b"#!/bin/sh\n".to_vec(),
            };
            self.files.meddle(&path, Some(torn));
            self.story.hit(K::RecordDamaged);
            self.says(DaemonDoes::Damaged(job));
        }
        self.away(lasts).await;
    }

    async fn reboot(&mut self, lasts: Duration) {
        self.story.hit(K::HostReboot);
        if let Some(daemon) = self.daemon.take() {
            daemon.life.kill();
        }
        self.says(DaemonDoes::Dies);
        self.fake.reboot_host();
        self.clock.reboot();
        self.files.meddle("/run".as_ref(), None);
        self.says(DaemonDoes::Rebooted);
        self.away(lasts).await;
    }

    /// Killed at some call of its start, again and again.
    async fn storm(&mut self, lasts: Duration) {
        self.story.hit(K::KillStorm);
        self.kill_now(lasts / 10).await;
        for _ in 0..4 {
            let end = self.any_call(60);
            if self.start(Some(end)).await {
                self.kill_now(Duration::from_millis(300)).await;
            } else {
                self.away(Duration::from_millis(300)).await;
            }
        }
        self.away(lasts).await;
    }

    fn any_call(&self, most: u64) -> End {
        let mut inner = self.story.inner();
        let dice = inner.dice();
        let seam = *dice.pick(&[Seam::Files, Seam::Hypervisor, Seam::GitLab]);
        let when = if dice.chance(500) { When::Before } else { When::After };
        End { seam, call: dice.range(1, most), when }
    }

    /// The next life ends at some call of it.
    async fn dies_at_any_call(&mut self, lasts: Duration) {
        self.kill_now(lasts.min(Duration::from_secs(5))).await;
        let end = self.any_call(300);
        let started = self.start(Some(end)).await;
        if started {
            let over = self.daemon.as_ref().map(|daemon| daemon.life.clone());
            if let Some(life) = over {
                let _ = timeout(PATIENCE, life.over()).await;
            }
        }
        self.story.hit(K::Killed);
        self.kill_now(lasts).await;
    }

    /// The life ends when it comes by this point, if it does so soon.
    async fn dies_at(&mut self, kind: K, lasts: Duration) {
        let Some(daemon) = self.daemon.as_ref().filter(|daemon| !daemon.life.is_over()) else { return };
        if kind == K::KillK0 {
            let life = daemon.life.clone();
            let jobs = daemon.jobs.clone();
            let idle = async {
                while !jobs.views().is_empty() {
                    sleep(Duration::from_millis(300)).await;
                }
            };
            let idle = tokio::select! {
                biased;
                () = life.over() => false,
                idle = timeout(3 * PATIENCE, idle) => idle.is_ok(),
            };
            if idle {
                self.story.hit(kind);
                self.kill_now(lasts).await;
            }
            return;
        }
        let life = daemon.life.clone();
        self.story.arm(Some(kind));
        if kind == K::KillK16 && timeout(DESTROY_PATIENCE, life.over()).await.is_err() {
            // Guests power off by themselves: one that is killed does not.
            self.kill_job().await;
        }
        let dead = timeout(PATIENCE, life.over()).await.is_ok();
        self.story.arm(None);
        if dead {
            self.says(DaemonDoes::Dies);
            self.away(lasts).await;
        }
    }
}
