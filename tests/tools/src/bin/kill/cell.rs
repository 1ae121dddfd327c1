//! One state directory: its GitLab, its daemon, and the rounds that it goes through.

mod upgrade;

use crate::daemon::Daemon;
use crate::judge;
use crate::leftovers::{self, Places};
use crate::place::{self, Paths};
use crate::plan::{Kind, Round, STORM_KILLS, small};
use crate::repository::{REFSPEC, Repository};
use crate::window;
use crate::work::{Source, Wanted};
use dayfly::clock::Clock;
use dayfly::control::{self, Answer, Request};
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly_exec::standin::{Job, JobSpec, JobState, Model, ProjectId, Served, Standin, serve};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// From the restart to a clean host (threats.md, B2).
const CLEAN_LIMIT: Duration = Duration::from_secs(60);

/// How long a daemon may take to come by its point: jobs are fed all the time.
const POINT_LIMIT: Duration = Duration::from_secs(60);

/// A storm is over within a minute (threats.md E15).
const STORM_LIMIT: Duration = Duration::from_secs(60);

/// Nothing fails here but the daemon itself, so none of its lines should tell of an error.
const ERROR: &str = "\"level\":\"ERROR\"";

/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// A job that nobody has written down after this time never will be.
const WINDOW_AGE: Duration = Duration::from_secs(2);

/// A poll that a dead daemon left in the socket is answered within this time.
const LATE_ANSWER: Duration = Duration::from_secs(1);

/// One state directory.
pub(crate) struct Cell {
    paths: Paths,
    config: PathBuf,
    log: PathBuf,
    places: Places,
    standin: Standin,
    project: ProjectId,
    _served: Served,
    source: Source,
    repository: Repository,
    on_disk: bool,
    daemon: Option<Daemon>,
    /// When the last daemon was started, and when the one before it died.
    started: Instant,
    died: Timestamp,
    /// From that start to a clean host.
    clean_limit: Duration,
    /// The jobs of this round.
    jobs: BTreeMap<JobId, Wanted>,
    cancels: JoinSet<()>,
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    pub(crate) kills: u32,
    pub(crate) jobs: u32,
    pub(crate) windows: u32,
}

/// Why a round failed.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) lost: u32,
    pub(crate) leaked: u32,
    pub(crate) why: String,
    /// The job to look at.
    pub(crate) job: Option<JobId>,
}

impl From<String> for Failed {
    fn from(why: String) -> Self {
        Self { lost: 0, leaked: 0, why, job: None }
    }
}

impl Cell {
    pub(crate) async fn new(number: u16, paths: &Paths) -> Result<Self, String> {
        let standin = Standin::new(Clock::system(), Rng::system());
        let project = standin.add_project("group/project");
        let runner = standin.add_runner(project);
        let token = standin.runner_token(runner).ok_or("the runner has no token")?;
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await;
        let listener = listener.map_err(|error| format!("listen: {error}"))?;
        let served = serve(standin.clone(), listener, None).map_err(|error| format!("serve: {error}"))?;
        let url = format!("http://{}", served.address());
        standin.configure(|settings| {
            settings.external_url.clone_from(&url);
            settings.trace_update_interval = Some(Duration::from_secs(1));
            // Every other GitLab holds a poll until there is a job.
            settings.long_poll = Duration::from_secs(u64::from(number % 2));
        });
        let source = place::source(&standin, project);
        let (config, places) = paths.cell(number, &url, token.expose())?;
        let repository = Repository::make(config.with_file_name("repository.git"));
        let repository = repository.map_err(|error| format!("make a repository: {error}"))?;
        standin.edit(|model| {
            model.settings.smart_git = true;
            if let Some(project) = model.projects.get_mut(&project) {
                project.repository = Some(repository.path().to_owned());
            }
        });
        Ok(Self {
            paths: paths.clone(),
            log: config.with_file_name("log"),
            config,
            places,
            standin,
            project,
            _served: served,
            source,
            repository,
            on_disk: paths.is_on_disk(number),
            daemon: None,
            started: Instant::now(),
            died: Timestamp::now(),
            clean_limit: CLEAN_LIMIT,
            jobs: BTreeMap::new(),
            cancels: JoinSet::new(),
        })
    }

    /// One round, judged.
    pub(crate) async fn round(&mut self, round: &Round) -> Result<Found, Failed> {
        let rng = round.rng();
        let mut found = Found::default();
        match round.kind {
            Kind::Point { point, visit, again } => {
                self.hand_over().await?;
                let name = format!("K{point}");
                self.start(Some(&format!("{name}:{visit}")))?;
                self.until_dead(&name, &rng).await?;
                found.kills += 1;
                if again {
                    self.start(None)?;
                    self.kill_after(&rng, 150).await?;
                    found.kills += 1;
                }
                self.start(None)?;
            }
            Kind::Random { kills } => {
                self.running()?;
                match kills {
                    1 | 2 => self.feed(&rng, 3 + small(&rng, 3))?,
                    _ => self.feed_simple(&rng, 3 + small(&rng, 3)),
                }
                self.kill_after(&rng, 1500).await?;
                for _ in 1..kills {
                    self.start(None)?;
                    self.kill_after(&rng, 250).await?;
                }
                self.start(None)?;
                found.kills += kills;
            }
            Kind::Storm => {
                self.running()?;
                let since = Instant::now();
                self.feed_simple(&rng, 3);
                for _ in 0..STORM_KILLS {
                    self.feed_simple(&rng, 1);
                    self.kill_after(&rng, 2500).await?;
                    self.start(None)?;
                    found.kills += 1;
                }
                if since.elapsed() > STORM_LIMIT {
                    return Err(format!("the storm took {:?}", since.elapsed()).into());
                }
            }
            Kind::HandOver { beside } => {
                self.running()?;
                self.feed(&rng, 3 + small(&rng, 3))?;
                sleep(Duration::from_millis(rng.below(1200))).await;
                if beside {
                    self.another()?.until_refused().await?;
                }
                self.hand_over().await?;
                self.start(None)?;
            }
            Kind::Drain { twice } => {
                self.running()?;
                self.feed(&rng, 3 + small(&rng, 3))?;
                sleep(Duration::from_millis(rng.below(1200))).await;
                let daemon = self.daemon.take().ok_or_else(|| "no daemon runs".to_owned())?;
                daemon.drain(twice.then(|| Duration::from_millis(rng.below(400)))).await?;
                self.nothing_is_left()?;
                self.start(None)?;
            }
        }
        let died = !matches!(round.kind, Kind::HandOver { .. } | Kind::Drain { .. });
        (found.jobs, found.windows) = self.judge(died, round.kind == Kind::Drain { twice: true }).await?;
        Ok(found)
    }

    fn start(&mut self, failpoint: Option<&str>) -> Result<(), String> {
        let program = self.paths.dayfly.clone();
        self.start_program(&program, failpoint)
    }

    fn start_program(&mut self, program: &Path, failpoint: Option<&str>) -> Result<(), String> {
        let daemon = Daemon::start(program, &self.config, &self.log, failpoint);
        self.daemon = Some(daemon.map_err(|error| format!("start the daemon: {error}"))?);
        self.started = Instant::now();
        Ok(())
    }

    /// A second daemon on the same directory, with a log of its own.
    fn another(&self) -> Result<Daemon, String> {
        let daemon = Daemon::start(&self.paths.dayfly, &self.config, &self.log.with_file_name("log-of-another"), None);
        daemon.map_err(|error| format!("start a second daemon: {error}"))
    }

    /// After a drain: no job is under way, and nothing of one is there.
    fn nothing_is_left(&self) -> Result<(), Failed> {
        let open: Vec<Job> = self.open_jobs().into_iter().filter(|job| job.state.is_executing()).collect();
        let left = leftovers::left(&self.places);
        if open.is_empty() && left.is_empty() {
            return Ok(());
        }
        let why = format!("a drained daemon left {} jobs and {left:?}", open.len());
        Err(Failed { lost: count(open.len()), leaked: count(left.len()), why, job: open.first().map(|job| job.id) })
    }

    /// Starts a daemon if none runs.
    fn running(&mut self) -> Result<(), String> {
        if self.daemon.is_none() { self.start(None) } else { Ok(()) }
    }

    async fn kill_after(&mut self, rng: &Rng, most_ms: u64) -> Result<(), String> {
        sleep(Duration::from_millis(rng.below(most_ms))).await;
        let daemon = self.daemon.take().ok_or("no daemon is there to be killed")?;
        daemon.kill().await?;
        self.died = Timestamp::now();
        Ok(())
    }

    /// The daemon that runs, if any, hands over.
    async fn hand_over(&mut self) -> Result<(), String> {
        if let Some(daemon) = self.daemon.take() {
            daemon.hand_over().await?;
            self.died = Timestamp::now();
        }
        Ok(())
    }

    /// Feeds jobs until the daemon has died at its point.
    async fn until_dead(&mut self, point: &str, rng: &Rng) -> Result<(), String> {
        let since = Instant::now();
        self.feed(rng, 3)?;
        loop {
            if point == "K13" && !self.jobs.values().any(is_uploading) || self.open_jobs().len() < 2 {
                if point == "K20" {
                    self.push()?;
                }
                self.enqueue(match point {
                    "K13" => Wanted::uploading(rng),
                    "K19" => Wanted::caching(rng),
                    _ => Wanted::choose(rng, self.source),
                });
            }
            let daemon = self.daemon.as_mut().ok_or("no daemon is there to die")?;
            if daemon.died_at(point, Duration::from_millis(200)).await? {
                self.daemon = None;
                self.died = Timestamp::now();
                return Ok(());
            }
            if since.elapsed() > POINT_LIMIT {
                return Err(format!("{point} was not reached within {POINT_LIMIT:?}"));
            }
        }
    }

    fn feed(&mut self, rng: &Rng, count: u32) -> Result<(), String> {
        self.push()?;
        for _ in 0..count {
            let wanted = Wanted::choose(rng, self.source);
            self.enqueue(wanted);
        }
        Ok(())
    }

    /// Jobs from now on are of a commit that no daemon has seen.
    fn push(&mut self) -> Result<(), String> {
        self.repository.push().map_err(|error| format!("push a commit: {error}"))
    }

    /// Jobs that stand any number of kills.
    fn feed_simple(&mut self, rng: &Rng, count: u32) {
        for _ in 0..count {
            let wanted = Wanted::without_transfer(rng, self.source);
            self.enqueue(wanted);
        }
    }

    fn enqueue(&mut self, wanted: Wanted) {
        let spec = wanted.spec();
        let (sha, refspecs) = (self.repository.sha().to_owned(), Some(vec![REFSPEC.into()]));
        let id = self.standin.enqueue(self.project, JobSpec { sha, refspecs, ..spec });
        if let Some(cancel) = wanted.cancel {
            let standin = self.standin.clone();
            self.cancels.spawn(async move {
                let begun = |model: &Model| model.jobs.get(&id).is_none_or(|job| job.state != JobState::Pending);
                if standin.wait_for(begun, CLEAN_LIMIT * 2).await.is_ok() {
                    sleep(cancel.after).await;
                    standin.cancel(id, cancel.graceful);
                }
            });
        }
        self.jobs.insert(id, wanted);
    }

    fn open_jobs(&self) -> Vec<Job> {
        let of_round = |job: &&Job| self.jobs.contains_key(&job.id) && !job.state.is_over();
        self.standin.read(|model| model.jobs.values().filter(of_round).cloned().collect())
    }

    /// Waits until the host is clean, and looks at each job. How many there were, and how many were lost in the
    /// window between GitLab's answer and the journal.
    /// `died`: not by a signal that it obeys. `cut`: its jobs were ended with it.
    async fn judge(&mut self, died: bool, cut: bool) -> Result<(u32, u32), Failed> {
        let mut windows = 0;
        loop {
            let daemon = self.daemon.as_mut().ok_or_else(|| "no daemon runs".to_owned())?;
            if let Some(status) = daemon.ended().map_err(|error| format!("look at the daemon: {error}"))? {
                return Err(format!("the daemon ended by itself with {status}").into());
            }
            let mut open = self.open_jobs();
            let never_kept: Vec<JobId> =
                open.iter().filter(|job| died && self.was_never_kept(job)).map(|job| job.id).collect();
            for id in never_kept {
                windows += 1;
                open.retain(|job| job.id != id);
                self.forget(id);
            }
            let left = if open.is_empty() { self.left().await } else { Vec::new() };
            if open.is_empty() && left.is_empty() {
                break;
            }
            if self.started.elapsed() > self.clean_limit {
                let mut why = format!("not clean {:?} after the restart:", self.clean_limit);
                for job in &open {
                    why.push_str(&format!("\n  job {} is {}", job.id, job.state.as_str()));
                }
                for thing in &left {
                    why.push_str(&format!("\n  {thing} is left"));
                }
                let (lost, leaked) = (count(open.len()), count(left.len()));
                return Err(Failed { lost, leaked, why, job: open.first().map(|job| job.id) });
            }
            sleep(LOOK_PAUSE).await;
        }
        self.cancels.abort_all();
        let (mut why, mut lost, mut first) = (String::new(), 0, None);
        for (id, wanted) in &self.jobs {
            let job = self.standin.job(*id).ok_or_else(|| format!("GitLab has forgotten job {id}"))?;
            if let Some(wrong) = judge::wrong(&job, wanted).filter(|_| !(cut && judge::was_cut(&job, wanted))) {
                why.push_str(&format!("\n  job {id} {:?}: {wrong}", wanted.script));
                lost += 1;
                first = first.or(Some(*id));
            }
        }
        let invalid = self.standin.read(|model| model.metrics.trace_invalid + model.metrics.trace_missing);
        if invalid > 0 {
            why.push_str("\n  a verdict's checksum was not that of the trace");
        }
        if !why.is_empty() {
            return Err(Failed { lost, leaked: 0, why: format!("jobs did not end as they must:{why}"), job: first });
        }
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        for id in &jobs {
            self.forget(*id);
        }
        Ok((count(jobs.len()), windows))
    }

    fn forget(&mut self, id: JobId) {
        self.jobs.remove(&id);
        self.standin.edit(|model| model.jobs.remove(&id));
    }

    /// Whether GitLab has handed this job out to a daemon that died before anything was on disk: nobody has called for
    /// it since, and nobody could.
    fn was_never_kept(&self, job: &Job) -> bool {
        let Some(began) = job.started_at.filter(|_| job.state.is_executing()) else { return false };
        let since = |at: Timestamp| Duration::try_from(Timestamp::now().duration_since(at)).unwrap_or_default();
        let to_the_dead = began <= self.died.saturating_add(LATE_ANSWER).unwrap_or(Timestamp::MAX);
        to_the_dead && since(began) >= WINDOW_AGE && !self.is_known(job.id) && !self.was_said_kept(job.id)
    }

    /// Whether a daemon has said that this job is in the journal: then it must be, whatever happens.
    fn was_said_kept(&self, id: JobId) -> bool {
        let log = fs::read(&self.log).unwrap_or_default();
        let (said, name) = (window::SAID, format!("/{id}\""));
        String::from_utf8_lossy(&log).lines().any(|line| line.contains(said) && line.contains(&name))
    }

    fn is_known(&self, id: JobId) -> bool {
        let ending = format!("-{id}");
        let mut records = fs::read_dir(self.places.state.join("jobs")).into_iter().flatten().flatten();
        let written = records.any(|entry| {
            entry.file_name().to_str().is_some_and(|name| name.ends_with(&ending))
                && entry.path().join("record.json").exists()
        });
        written || self.standin.read(|model| model.history.iter().any(|request| request.job == Some(id)))
    }

    /// Everything that is left: on the host, and in the daemon's own books.
    async fn left(&self) -> Vec<String> {
        let mut left = leftovers::left(&self.places);
        if !left.is_empty() {
            return left;
        }
        match control::call(&control::socket(&self.places.runtime), &Request::Status).await {
            Ok(Answer::Status { status }) => {
                left.extend(status.jobs.iter().map(|job| format!("the daemon's job {}", job.id)));
                // The poller holds one while it asks.
                if status.capacity.jobs > 1 {
                    left.push(format!("{} reservations", status.capacity.jobs));
                }
            }
            Ok(other) => left.push(format!("the daemon's answer {other:?}")),
            Err(error) => left.push(format!("a daemon that does not answer ({error})")),
        }
        left
    }

    /// Ends the daemon, which may have logged errors with the words `known` only. The journal's windows on this disk,
    /// milliseconds.
    pub(crate) async fn end(mut self, known: Option<&str>) -> Result<Vec<f64>, String> {
        self.hand_over().await?;
        let log = fs::read(&self.log).map_err(|error| format!("read the log: {error}"))?;
        let log = String::from_utf8_lossy(&log);
        let is_known = |line: &str| known.is_some_and(|words| line.contains(words));
        let wrong = |line: &&str| line.contains("panicked") || line.contains(ERROR) && !is_known(line);
        if let Some(line) = log.lines().find(wrong) {
            return Err(format!("the daemon's log has an error: {line}"));
        }
        // In memory there is nothing to wait for.
        Ok(if self.on_disk { window::of_log(&log) } else { Vec::new() })
    }

    /// Log and trace, for somebody who looks for the reason.
    pub(crate) fn story(&self, job: Option<JobId>) -> String {
        let trace = job.and_then(|id| self.standin.job(id)).map(|job| {
            let bytes = &job.trace.bytes;
            format!("--- trace of job {}\n{}\n", job.id, String::from_utf8_lossy(&bytes[..bytes.len().min(6000)]))
        });
        format!("{}--- the daemon's log, {}\n{}", trace.unwrap_or_default(), self.log.display(), tail(&self.log, job))
    }
}

/// The log's last lines, and all that name the job.
fn tail(log: &Path, job: Option<JobId>) -> String {
    const LINES: usize = 60;
    let log = fs::read(log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    let name = job.map(|job| job.to_string());
    let of_job = lines[..from].iter().filter(|line| name.as_ref().is_some_and(|name| line.contains(name)));
    of_job.chain(&lines[from..]).copied().collect::<Vec<_>>().join("\n")
}

fn is_uploading(wanted: &Wanted) -> bool {
    wanted.script.iter().any(|step| matches!(step, dayfly_test_tools::killing::Step::Upload(_)))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
