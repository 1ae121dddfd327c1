//! One upgrade: the last version's daemon takes jobs and ends, and this version's goes on with them.

use super::{CLEAN_LIMIT, Cell, Failed, LOOK_PAUSE, POINT_LIMIT, count};
use crate::daemon::status;
use crate::place::{CONCURRENT, boot_with, build_again};
use crate::upgrade::{Last, Upgrade};
use crate::work::Wanted;
use dayfly::gitlab::JobId;
use dayfly::job::journal::RECORD_VERSION;
use dayfly_exec::standin::{JobState, Model, Route};
use dayfly_guest_config::{CONTRACT, CONTRACT_OLDEST};
use dayfly_test_tools::killing::Step;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A planted loss need not be waited for as long as a job that may still come; the jobs beside it have ended by then.
const PLANTED_LIMIT: Duration = Duration::from_secs(20);

/// Bytes of the artifact of a job whose daemon ends while it is on its way.
const UPLOAD_BYTES: usize = 2 << 20;

/// Jobs that wait at GitLab while no image can run them.
const WAITING: u16 = 2;

/// What the daemon logs for an image that it cannot use.
const NO_POLLS: &str = "no job is asked for";

/// What one upgrade came to.
#[derive(Debug, Default)]
pub(crate) struct Upgraded {
    pub(crate) jobs: u32,
    /// What the last version's records say of its jobs, one word each.
    pub(crate) stages: Vec<String>,
}

impl Cell {
    /// One upgrade, in a directory that no daemon has seen, judged.
    pub(crate) async fn upgrade(&mut self, upgrade: Upgrade, last: &Last) -> Result<Upgraded, Failed> {
        // Contracts were counted from the second on.
        let of_last = (CONTRACT_OLDEST > 1).then_some(CONTRACT_OLDEST);
        self.image(of_last, &last.guest)?;
        match upgrade {
            Upgrade::Point { point, visit } => self.last_dies_at(point, visit, last).await?,
            Upgrade::HandOver => {
                self.last_works(last).await?;
                self.hand_over().await?;
            }
            Upgrade::Kill | Upgrade::TooOld | Upgrade::Planted => {
                self.last_works(last).await?;
                self.daemon.take().ok_or_else(|| "no daemon runs".to_owned())?.kill().await?;
            }
        }
        let mut found = Upgraded { jobs: 0, stages: self.stages()? };
        match upgrade {
            Upgrade::TooOld => self.too_old(of_last).await?,
            Upgrade::Planted => {
                self.clean_limit = PLANTED_LIMIT;
                let first = *self.jobs.keys().next().ok_or_else(|| "there is no job to lose".to_owned())?;
                let of_first = |path: &PathBuf| path.to_string_lossy().ends_with(&format!("-{first}"));
                let record = self.records().into_iter().find(of_first).ok_or_else(|| "it has no record".to_owned())?;
                fs::remove_dir_all(record).map_err(|error| format!("remove a record: {error}"))?;
                self.start(None)?;
            }
            Upgrade::Point { .. } | Upgrade::Kill | Upgrade::HandOver => self.start(None)?,
        }
        found.jobs += self.judge(false, false).await?.0;
        // A machine of the last version's image, begun by this daemon; then one of an image that was built again.
        self.started = Instant::now();
        self.enqueue(quick());
        found.jobs += self.judge(false, false).await?.0;
        let guest = self.paths.guest.clone();
        self.image(Some(CONTRACT), &guest)?;
        self.started = Instant::now();
        self.enqueue(quick());
        found.jobs += self.judge(false, false).await?.0;
        Ok(found)
    }

    /// What this upgrade's daemons may log as an error.
    pub(crate) fn known(upgrade: Upgrade) -> Option<&'static str> {
        (upgrade == Upgrade::TooOld).then_some(NO_POLLS)
    }

    fn image(&self, contract: Option<u32>, guest: &Path) -> Result<(), String> {
        let built = build_again(&self.config, contract).and_then(|()| boot_with(&self.places, guest));
        built.map_err(|error| format!("write the image: {error}"))
    }

    /// The last version's daemon takes one job and dies there.
    async fn last_dies_at(&mut self, point: u8, visit: u32, last: &Last) -> Result<(), String> {
        let name = format!("K{point}");
        self.start_program(&last.dayfly, Some(&format!("{name}:{visit}")))?;
        let work = if point == 13 { Step::Upload(UPLOAD_BYTES) } else { Step::Work(500) };
        self.enqueue(of(vec![Step::Bytes(300), work, Step::Bytes(4000)]));
        let since = Instant::now();
        while since.elapsed() < POINT_LIMIT {
            let daemon = self.daemon.as_mut().ok_or("no daemon is there to die")?;
            if daemon.died_at(&name, Duration::from_millis(200)).await? {
                self.daemon = None;
                return Ok(());
            }
        }
        Err(format!("{name} was not reached within {POINT_LIMIT:?}"))
    }

    /// The last version's daemon takes as many jobs as it has room for, and each guest begins.
    async fn last_works(&mut self, last: &Last) -> Result<(), String> {
        self.start_program(&last.dayfly, None)?;
        for _ in 0..CONCURRENT {
            self.enqueue(of(vec![Step::Bytes(300), Step::Work(4000), Step::Bytes(4000)]));
        }
        let jobs = self.jobs.keys().copied().collect::<Vec<_>>();
        let begun = |model: &Model, id: &JobId| {
            model.jobs.get(id).is_some_and(|job| job.trace.bytes.windows(7).any(|seven| seven == b" begins"))
        };
        let all = self.standin.wait_for(|model| jobs.iter().all(|id| begun(model, id)), CLEAN_LIMIT).await;
        all.map_err(|_| format!("the last version has not begun {CONCURRENT} jobs within {CLEAN_LIMIT:?}"))
    }

    /// Directories of jobs in the journal.
    fn records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.places.state.join("jobs")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.join("record.json").exists()).collect()
    }

    /// What the records of the dead daemon say, each of them in an older version than ours.
    fn stages(&self) -> Result<Vec<String>, String> {
        let mut stages = Vec::new();
        for path in self.records() {
            let read = fs::read(path.join("record.json")).map_err(|error| format!("read a record: {error}"))?;
            let record: Value = serde_json::from_slice(&read).map_err(|error| format!("parse a record: {error}"))?;
            if record["version"].as_u64().is_none_or(|version| version >= RECORD_VERSION.into()) {
                return Err(format!("a record of the last version has version {}", record["version"]));
            }
            let state = &record["state"];
            let name = state.as_str().or_else(|| state.as_object()?.keys().next().map(String::as_str));
            stages.push(name.ok_or("a record names no state")?.to_owned());
        }
        Ok(stages)
    }

    /// This daemon finds an image that no version speaks any more: jobs under way end as they must, and those that wait
    /// go on waiting, until the image has been built again.
    async fn too_old(&mut self, of_last: Option<u32>) -> Result<(), Failed> {
        let under_way: Vec<JobId> = self.jobs.keys().copied().collect();
        let too_old = CONTRACT_OLDEST - 1;
        build_again(&self.config, Some(too_old)).map_err(|error| format!("write the image: {error}"))?;
        for _ in 0..WAITING {
            self.enqueue(quick());
        }
        let polls = |model: &Model| model.history.iter().filter(|request| request.route == Route::RequestJob).count();
        let polls_before = self.standin.read(polls);
        self.start(None)?;
        self.says(&format!(
            "image `test` was built for an older dayfly (guest contract {too_old}; this one speaks {CONTRACT_OLDEST} and {CONTRACT}): rebuild it with `dayfly image build test`"
        ))
        .await?;
        let over = |model: &Model| under_way.iter().all(|id| model.jobs.get(id).is_some_and(|job| job.state.is_over()));
        let ended = self.standin.wait_for(over, CLEAN_LIMIT).await;
        ended.map_err(|_| "the jobs under way did not end while their image was too old".to_owned())?;
        let waiting = self.standin.read(|model| {
            let waits = |id: &&JobId| model.jobs.get(id).is_some_and(|job| job.state == JobState::Pending);
            self.jobs.keys().filter(waits).count()
        });
        let more = self.standin.read(polls) - polls_before;
        if waiting != usize::from(WAITING) || more > 0 {
            let lost = count(usize::from(WAITING) - waiting);
            let why = format!("with an image that is too old there were {more} polls, and {lost} jobs were taken");
            return Err(Failed { lost, leaked: 0, why, job: None });
        }
        build_again(&self.config, of_last).map_err(|error| format!("write the image: {error}"))?;
        self.started = Instant::now();
        Ok(())
    }

    /// Waits until `dayfly status` says this.
    async fn says(&self, sentence: &str) -> Result<(), String> {
        let mut said = String::new();
        while self.started.elapsed() < CLEAN_LIMIT {
            said =
                status(&self.paths.dayfly, &self.config).await.map_err(|error| format!("ask the daemon: {error}"))?;
            if said.contains(sentence) {
                return Ok(());
            }
            sleep(LOOK_PAUSE).await;
        }
        Err(format!("`dayfly status` does not say {sentence:?}:\n{said}"))
    }
}

fn of(script: Vec<Step>) -> Wanted {
    Wanted { script, cancel: None, source: None }
}

fn quick() -> Wanted {
    of(vec![Step::Bytes(200), Step::Work(100), Step::Bytes(200)])
}
