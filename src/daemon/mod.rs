//! Who is wired to whom, and how do we stop?
//!
//! [`start`] makes every part once, adopts the jobs of before, and starts the pollers;
//! [`Daemon::run`] joins jobs until a [`Shutdown`] says how to end. The process around it (signals,
//! lock, systemd) is in [`process`]; `exec` and the tests use this module without it.
//!
//! | mode | polls | jobs |
//! | --- | --- | --- |
//! | hand-over (SIGTERM) | none | let go; their VMs live on and the next daemon adopts them |
//! | drain (SIGQUIT) | none | run to their end |
//! | end (second signal of a drain) | none | ended with an honest verdict |

mod caches;
mod clones;
mod consoles;
mod disk;
mod error;
mod goldens;
mod handler;
mod installation;
mod listener;
mod places;
mod problems;
mod process;
mod reload;
mod setup;
mod shells;
mod shutdown;
mod sweeper;
mod tokens;
mod wiring;

pub use error::DaemonError;
pub use installation::Installation;
pub use places::socket_directory;
pub use process::{Connect, Lock, lock, main};
pub use reload::{ReloadError, Reloader};
pub use setup::endpoint;
pub use shutdown::{Mode, Shutdown};

use crate::awake::Awake;
use crate::capacity::{Capacity, Held, Resources};
use crate::clock::Clock;
use crate::clones::workshop::Workshop;
use crate::config::Config;
use crate::control::ControlHandler;
use crate::files::Files;
use crate::gitlab::OpenTransport;
use crate::guest;
use crate::history::{Consoles, History};
use crate::image::store::Images;
use crate::job::journal::{JobKey, Journal, Record};
use crate::job::{self, Jobs, Keeps, Parts, Runner, Started};
use crate::metrics::Metrics;
use crate::network::{Egress, Listen, Network};
use crate::recovery;
use crate::repeats::Repeats;
use crate::rng::Rng;
use crate::shell::Recordings;
use crate::supply::goldens::Goldens;
use crate::supply::{Setup, Supply};
use crate::telemetry::chain;
use crate::vm::proof::Places;
use crate::vm::{Accel, Host, own_memory_mib};
use disk::Disk;
use handler::Handler;
use reload::Reloads;
use setup::{accel, runner_of, runners, users};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use sweeper::Sweeper;
use tokens::Tokens;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wiring::Wiring;
pub(crate) use wiring::{bounds, needs, overhead_mib};

/// How long jobs and polls may take to let go at a hand-over: of the 5 s in all (decision D11,
/// threats.md E1) all but what the end itself needs.
const HAND_OVER_PATIENCE: Duration = Duration::from_millis(4400);

/// And the tasks of the daemon's own.
const BACKGROUND_PATIENCE: Duration = Duration::from_millis(200);

/// How long the first polls wait for leftovers of former daemons to go. Most take less than a
/// second; a domain whose destruction hangs takes for ever.
const FIRST_SWEEP_PATIENCE: Duration = Duration::from_secs(3);

/// How long ending all jobs may take (threats.md E2).
const END_PATIENCE: Duration = Duration::from_secs(30);

/// The seams.
#[derive(Clone)]
pub struct Backends {
    /// Machines, and what lies beside them.
    pub host: Host,
    /// Where doors are opened.
    pub listen: Arc<dyn Listen>,
    /// Who carries what machines without a network card send out.
    pub egress: Arc<dyn Egress>,
    /// GitLab.
    pub transport: Arc<dyn OpenTransport>,
    /// Files.
    pub files: Arc<dyn Files>,
    /// Wall time.
    pub clock: Clock,
    /// Randomness.
    pub rng: Rng,
    /// Base images.
    pub images: Arc<dyn Images>,
    /// Git, and the disks that are made of repositories.
    pub workshop: Arc<dyn Workshop>,
    /// Limits of doors.
    pub door_limits: guest::Limits,
}

/// A daemon that has been started.
pub struct Daemon {
    parts: Parts,
    jobs: Jobs,
    joined: mpsc::UnboundedReceiver<Started>,
    /// Jobs whose task has panicked, and how often.
    panicked: BTreeMap<JobKey, u32>,
    runners: BTreeMap<String, Arc<Runner>>,
    pollers: JoinSet<()>,
    stop_polling: CancellationToken,
    /// Polls under way are awaited for a moment only.
    close_polls: CancellationToken,
    /// Ends the tasks of the daemon's own.
    stop: CancellationToken,
    background: JoinSet<&'static str>,
    /// Whose tokens are kept fresh.
    fresh: watch::Sender<Vec<Arc<Runner>>>,
    shutdown: Shutdown,
    handler: Arc<Handler>,
    /// What pollers are made from, again at each reload.
    wiring: Wiring,
    reloader: Reloader,
    reloads: Reloads,
}

/// Starts and runs a daemon to its end.
///
/// # Errors
/// [`DaemonError`], before anything of a job has been touched.
pub async fn run(config: Config, backends: Backends, shutdown: Shutdown) -> Result<(), DaemonError> {
    if start(config, backends, shutdown).await?.run().await { Ok(()) } else { Err(DaemonError::Failed) }
}

/// Makes every part, adopts the jobs of before, starts the pollers.
///
/// # Errors
/// [`DaemonError`].
pub async fn start(config: Config, backends: Backends, shutdown: Shutdown) -> Result<Daemon, DaemonError> {
    let files = backends.files.clone();
    let overlay_dir = config.state_directory.join("overlays");
    let socket_dir = socket_directory(&config.runtime_directory);
    backends.host.prepare(&overlay_dir, &socket_dir).await.map_err(|source| DaemonError::Files {
        what: "make the directories for VMs below",
        path: config.state_directory.clone(),
        source,
    })?;
    let installation = Installation::open(&*files, &config.state_directory, &backends.rng).await?;
    let journal = Journal::open(files.clone(), &config.state_directory, &config.runtime_directory).await?;
    let journal = journal.of(installation.id.clone());
    let loaded = journal.load_all().await?;
    let restart = !loaded.records.is_empty();
    let (memory_mib, host) = match backends.host.hypervisor.probe().await {
        Ok(host) => (host.memory_mib, Some(host)),
        // Guests wait for their doors, and those need no libvirt. No job is asked for before it answers.
        Err(error) if restart => {
            tracing::warn!(error = chain(&error), "the hypervisor does not answer; the jobs of before go on");
            (own_memory_mib(), None)
        }
        Err(error) => return Err(error.into()),
    };
    let places = Places { disks: &overlay_dir, sockets: &socket_dir };
    let accel = accel(&config, &backends, places, &installation.id, restart, host.as_ref()).await?;
    let overhead = overhead_mib(accel == Accel::Tcg);
    let disk = Disk {
        files: files.clone(),
        disks: backends.host.disks.clone(),
        overlay_dir: overlay_dir.clone(),
        reserve_gib: config.capacity.disk_reserve_gib,
        found: Arc::new(AtomicBool::new(config.capacity.disk_gib.is_none())),
    };
    let disk_gib = match config.capacity.disk_gib {
        Some(disk_gib) => disk_gib,
        None => disk.promisable_gib().await.map_err(|source| DaemonError::Files {
            what: "look for free disk at",
            path: overlay_dir.clone(),
            source,
        })?,
    };
    let capacity = Capacity::new(bounds(&config, memory_mib, disk_gib));
    // What a VM takes of which no record tells: at most what the largest class does.
    let unknown = config.class.iter().fold(Resources::default(), |most, class| {
        let needs = needs(class, overhead);
        Resources {
            cpus: most.cpus.max(needs.cpus),
            memory_mib: most.memory_mib.max(needs.memory_mib),
            disk_gib: most.disk_gib.max(needs.disk_gib),
        }
    });
    let stop = CancellationToken::new();
    let leave = CancellationToken::new();
    let users = users(&config, &*files).await?;
    let setup =
        Setup { installation: installation.id.clone(), accel, overlay_dir: overlay_dir.clone(), socket_dir, users };
    let network = Network::new(&config.network, backends.listen.clone(), backends.egress.clone());
    let metrics = Metrics::new();
    let (supply, lister) = Supply::new(
        backends.host.clone(),
        backends.clock.clone(),
        backends.rng.clone(),
        network,
        setup,
        metrics.clone(),
        stop.clone(),
    );
    // Of these the guests may be in the middle of a cache.
    let readers = loaded.records.iter().map(|record| record.key.directory()).collect();
    let caches = caches::open(&config, &backends, &readers).await?;
    let clones = clones::open(&config, &backends, &metrics).await?;
    let history =
        History::open(files.clone(), backends.clock.clone(), &config.state_directory, config.history.bounds());
    let consoles =
        Consoles::new(files.clone(), backends.clock.clone(), &config.state_directory, config.history.console_bounds());
    let recordings = Recordings::new(
        files.clone(),
        backends.clock.clone(),
        &config.state_directory,
        config.history.shell_keep.get(),
    );
    let parts = Parts {
        history: history.await,
        consoles,
        files,
        clock: backends.clock.clone(),
        rng: backends.rng.clone(),
        supply,
        journal,
        images: backends.images.clone(),
        caches,
        clones,
        limits: Arc::new(config.limits.clone()),
        door_limits: backends.door_limits.clone(),
        metrics,
        machine_id: installation.machine_id.clone(),
        awake: Awake::default(),
        keeps: Keeps::default(),
        drain: CancellationToken::new(),
        leave,
    };
    let runners = runners(&config, &backends, &installation, &parts.metrics, &BTreeMap::new()).await?;
    let (jobs, joined) = Jobs::new();
    let adopted =
        recovery::adopt_all(&parts, loaded, &capacity, &|record: &Record| runner_of(record, &runners, &config.class))
            .await;
    for handle in adopted.jobs {
        jobs.add(handle);
    }
    let mut background = JoinSet::new();
    let (awake, stops) = (parts.awake.clone(), stop.clone());
    background.spawn(async move {
        // Cancel safe.
        stops.run_until_cancelled(awake.watch()).await;
        "watch of the clock"
    });
    background.spawn(async move {
        let ended = lister.await;
        assert!(ended.is_ok(), "the task that lists VMs panicked");
        "lister"
    });
    let disk_is_found = disk.found.clone();
    background.spawn(disk.keep_up(capacity.clone(), stop.clone()));
    let (kept, keeper, stops) = (jobs.clone(), parts.consoles.clone(), stop.clone());
    background.spawn(async move {
        consoles::keep(kept, keeper, stops).await;
        "keeper of consoles"
    });
    let on_host = host.map(|host| (host.version, overhead));
    if let Some(keeper) = goldens::keeper(&config, &backends, &parts, &capacity, on_host).await {
        background.spawn(goldens::keep(keeper, parts.clone(), stop.clone()));
    }
    let sweeper = Sweeper {
        parts: parts.clone(),
        jobs: jobs.clone(),
        kept: adopted.kept,
        capacity: capacity.clone(),
        unknown,
        workspaces: [config.image_directory.clone(), goldens::directory(&config)],
        hypervisor: config.hypervisor.clone(),
        unseen: Repeats::new("look for orphans; trying again in a minute"),
    };
    let first_sweep = sweeper.begin(stop.clone(), &mut background);
    // The common case is clean before the first poll; a domain that is stuck keeps nobody waiting.
    let _ = tokio::time::timeout(FIRST_SWEEP_PATIENCE, first_sweep).await;
    let (stop_polling, close_polls) = (CancellationToken::new(), CancellationToken::new());
    let mut pollers = JoinSet::new();
    let wiring = Wiring {
        config,
        backends,
        installation,
        capacity: capacity.clone(),
        jobs: jobs.clone(),
        memory_mib,
        disk_gib,
        disk_is_found,
        overhead_mib: overhead,
        overlay_dir,
    };
    let (fresh, watched) = watch::channel(runners.values().cloned().collect());
    let (tokens, stops) = (Tokens::new(wiring.backends.clock.clone(), watched, parts.metrics.clone()), stop.clone());
    background.spawn(async move {
        tokens.keep_fresh(stops).await;
        "watch of the tokens"
    });
    let views = wiring.poll(&runners, &parts, &stop_polling, &close_polls, &mut pollers);
    let (reloader, reloads) = reload::channel();
    let handler = Arc::new(Handler::new(jobs.clone(), capacity.clone(), views, shutdown.clone(), recordings, &parts));
    handler.set_image_max_age(wiring.config.image_max_age);
    handler.set_shells(&wiring.config);
    Ok(Daemon {
        parts,
        jobs,
        joined,
        panicked: BTreeMap::new(),
        runners,
        pollers,
        stop_polling,
        close_polls,
        stop,
        background,
        fresh,
        shutdown,
        handler,
        wiring,
        reloader,
        reloads,
    })
}

impl Daemon {
    /// What the control socket serves.
    #[must_use]
    pub fn handler(&self) -> Arc<dyn ControlHandler> {
        self.handler.clone()
    }

    /// Hands it new configurations.
    #[must_use]
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// What its machines are restored from.
    #[must_use]
    pub fn goldens(&self) -> Goldens {
        self.parts.supply.goldens().clone()
    }

    /// The jobs under way.
    #[must_use]
    pub fn jobs(&self) -> Jobs {
        self.jobs.clone()
    }

    /// Joins jobs until the shutdown's mode is done. `false`: a part of the daemon itself failed, and
    /// somebody should start it again.
    pub async fn run(mut self) -> bool {
        let mut well = true;
        let mut mode = self.shutdown.mode();
        let mut tasks: JoinSet<Ended> = JoinSet::new();
        let mut count = self.jobs.count();
        let mut end_by: Option<Instant> = None;
        let mut drain_by: Option<Instant> = None;
        loop {
            let wished = *mode.borrow_and_update();
            match wished {
                Mode::Run => {}
                Mode::HandOver | Mode::HandOverNow => {
                    self.stop_polling.cancel();
                    self.close_polls.cancel();
                    self.parts.leave.cancel();
                    break;
                }
                Mode::Drain => {
                    self.stop_polling.cancel();
                    self.parts.drain.cancel();
                    let timeout = self.parts.limits.drain_timeout.map(|span| Instant::now() + span.get());
                    drain_by = drain_by.or(timeout);
                }
                Mode::End => {
                    self.stop_polling.cancel();
                    self.parts.drain.cancel();
                    self.close_polls.cancel();
                    // Again with each round: a poll that was under way may have brought another.
                    self.jobs.kill_all();
                    end_by.get_or_insert_with(|| Instant::now() + END_PATIENCE);
                }
            }
            let draining = matches!(wished, Mode::Drain | Mode::End);
            if draining && self.pollers.is_empty() && *count.borrow_and_update() == 0 {
                break;
            }
            tokio::select! {
                biased;
                // All are cancel safe. The shutdown first.
                _ = mode.changed() => {}
                Some(started) = self.joined.recv() => watch_task(&mut tasks, started),
                Some(ended) = tasks.join_next() => match ended {
                    Ok(ended) => self.ended(ended).await,
                    Err(error) => tracing::error!(error = chain(&error), "the watch over a job's task died"),
                },
                Some(poller) = self.pollers.join_next() => if let Err(error) = poller {
                    // A poller is long-lived: without it a runner would be silent for ever.
                    tracing::error!(error = chain(&error), "a poller died; the daemon hands over to a fresh start");
                    well = false;
                    self.shutdown.fail();
                },
                Some(task) = self.background.join_next() => {
                    tracing::error!(error = task.err().map(|e| chain(&e)), "a task of the daemon's own died; the daemon hands over to a fresh start");
                    well = false;
                    self.shutdown.fail();
                }
                // Not when it is about to end: the next one reads the file itself.
                Some(request) = self.reloads.next(), if wished == Mode::Run => self.serve_reload(request).await,
                Ok(()) = count.changed() => {}
                () = sleep_until(drain_by.filter(|_| wished == Mode::Drain)) => {
                    tracing::warn!(left = self.jobs.views().len(), "the drain has taken as long as it may; its jobs are ended");
                    self.shutdown.end();
                }
                () = sleep_until(end_by) => {
                    tracing::warn!(left = self.jobs.views().len(), "some jobs did not end in time; the next start goes on with them");
                    break;
                }
            }
        }
        self.parts.leave.cancel();
        let patience = if *mode.borrow() == Mode::HandOverNow { Duration::ZERO } else { HAND_OVER_PATIENCE };
        let hurry = async {
            // A second signal during a hand-over only skips the wait.
            let _ = mode.wait_for(|mode| *mode == Mode::HandOverNow).await;
        };
        let mut pollers = std::mem::take(&mut self.pollers);
        let runners: Vec<Arc<Runner>> = self.runners.values().cloned().collect();
        let clones = self.parts.clones.clone();
        let quiet = async {
            if let Some(clones) = &clones {
                clones.stop().await;
            }
            while pollers.join_next().await.is_some() {}
            self.join_all(&mut tasks, patience).await;
            tokens::settled(&runners).await;
        };
        tokio::select! {
            biased;
            // What is dropped here is in the journal; the next daemon goes on with it.
            () = hurry => tracing::info!("leaving at once"),
            quiet = tokio::time::timeout(patience, quiet) => if quiet.is_err() {
                tracing::warn!("some parts did not let go in time; the next start goes on with them");
            },
        }
        self.stop.cancel();
        let background = async { while self.background.join_next().await.is_some() {} };
        // They end at their next await but for a call to the hypervisor, which has a deadline.
        if tokio::time::timeout(BACKGROUND_PATIENCE, background).await.is_err() {
            tracing::debug!("a background task is still in a call to the hypervisor");
        }
        well
    }

    /// Joins job tasks until none is left or `patience` is over.
    async fn join_all(&mut self, tasks: &mut JoinSet<Ended>, patience: Duration) {
        let all = async {
            loop {
                while let Ok(started) = self.joined.try_recv() {
                    watch_task(tasks, started);
                }
                let Some(task) = tasks.join_next().await else { break };
                if let Ok(ended) = task {
                    self.jobs.remove(&ended.key);
                }
            }
        };
        // What is left is in the journal.
        let _ = tokio::time::timeout(patience, all).await;
    }

    /// A job's task has ended: well, or by a panic, which costs that job and nobody else (E5). Its
    /// successor fails the job, unless its verdict was known. If that panics as well, the last one
    /// tells GitLab, whatever becomes of the job's files.
    async fn ended(&mut self, ended: Ended) {
        let Ended { key, panicked, reservation } = ended;
        if !panicked {
            self.panicked.remove(&key);
            self.jobs.remove(&key);
            return;
        }
        tracing::error!(%key, "the task of a job panicked; the job is failed");
        self.parts.metrics.job().panicked.inc();
        let times = self.panicked.entry(key.clone()).or_default();
        *times += 1;
        let times = *times;
        let record = self.parts.journal.load(&key).await;
        let runner = record.as_ref().and_then(|record| runner_of(record, &self.runners, &self.wiring.config.class));
        match (record, runner) {
            (Some(record), Some(runner)) if times == 1 => {
                // In the list all the while, so that nothing of it looks like nobody's.
                self.jobs.add(job::begin_anew(&self.parts, runner, record, reservation));
            }
            (Some(record), Some(runner)) if times == 2 => {
                self.jobs.add(job::give_up(&self.parts, runner, record, reservation));
            }
            (Some(_), Some(_)) => {
                tracing::error!(%key, "giving a job up panicked; the next start takes up what is left of it");
                self.jobs.remove(&key);
            }
            (None, _) | (_, None) => {
                tracing::error!(%key, "its record cannot be used; what is left of it is taken up by the next start");
                self.jobs.remove(&key);
            }
        }
    }
}

/// A job's task that has ended.
struct Ended {
    key: JobKey,
    panicked: bool,
    reservation: Held,
}

fn watch_task(tasks: &mut JoinSet<Ended>, started: Started) {
    tasks.spawn(async move {
        let Started { key, task, reservation } = started;
        let panicked = task.await.is_err();
        Ended { key, panicked, reservation }
    });
}

/// Waits for ever without an instant.
async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
