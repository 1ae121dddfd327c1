//! The whole daemon under a plan: its seams are killed at the plan's calls, and the next life goes on.

use super::client::{Client, Heard, Way};
use super::moods::Gitlab;
use super::plan::{Ending, Plan};
use crate::support::guest::Guest;
use crate::support::world::{World, paused};
use dayfly::BoxFuture;
use dayfly::job::journal::JobKey;
use dayfly::vm::Stream;
use dayfly_exec::standin::{Job, JobSpec, JobState};
use dayfly_test_guest::Connection;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Any line of trouble may come of a plan.
const ANYTHING: &[&str] = &[""];

/// What the guest saw.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Length of the trace when it got its job: our first lines.
    first: usize,
    /// Bytes that the door has taken.
    taken: usize,
    heard: Option<Heard>,
}

/// One case.
pub(super) fn case(plan: &Plan) -> Result<(), String> {
    let mut result = Ok(());
    paused(async { result = story(plan).await });
    result
}

async fn story(plan: &Plan) -> Result<(), String> {
    let mut world = World::new(1);
    world.expect_trouble(ANYTHING);
    let job = world.job_of(JobSpec::script(["true"]).with_timeout(Duration::from_secs(10 * 3600)));
    let key = JobKey { runner: world.config.runner[0].name.clone(), id: job };
    let spool = world.config.state_directory.join("jobs").join(key.directory()).join("trace");
    let gitlab = Gitlab::new(world.standin.clone(), job, world.files.clone(), &spool, plan);
    let seen = Arc::new(Mutex::new(None));
    let (at_gitlab, notes, moves) = (gitlab.clone(), seen.clone(), Arc::new(plan.clone()));
    world.set_guest(move |guest| act(guest, at_gitlab.clone(), moves.clone(), notes.clone()));
    let lives = async {
        for end in &plan.kills {
            world.live(Some(*end)).await.map_err(|error| error.to_string())?;
            world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
            if !world.is_dead() {
                world.settle().await;
            }
            if !world.is_dead() {
                return Ok(true);
            }
        }
        world.start().await.map_err(|error| error.to_string())?;
        let written_down = world.until_over(job).await;
        world.settle().await;
        Ok::<_, String>(written_down)
    };
    let (written_down, watched) = tokio::join!(lives, gitlab.watch());
    let written_down = written_down?;
    watched?;
    let found = world.found(job);
    // K1 to K3: GitLab gave the job to a daemon that died before it was written down.
    let lost = found.failure_reason.as_deref() == Some("no_updates_running") && !written_down;
    if !lost {
        let seen = *seen.lock().unwrap_or_else(PoisonError::into_inner);
        gitlab.judge()?;
        judge(plan, &found, seen).map_err(|why| format!("{why}\n{}", world.histories()))?;
    }
    // Checked already, and more closely than by what a line looks like.
    world.standin.erase(job);
    world.assert_clean().await;
    Ok(())
}

/// First lines of ours ‖ the guest's bytes ‖ last lines of ours, and the verdict that the guest was promised.
fn judge(plan: &Plan, found: &Job, seen: Option<Seen>) -> Result<(), String> {
    let Some(seen) = seen else {
        return Err(format!("no guest was given the job, which became {:?}", found.state));
    };
    let (log, trace) = (plan.log.bytes(), &found.trace.bytes);
    let (first, rest) = trace.split_at_checked(seen.first).ok_or("our first lines are not all there")?;
    check_ours(first)?;
    let held = rest.iter().zip(log).take_while(|(a, b)| a == b).count();
    if held < seen.taken {
        return Err(format!("{} bytes of the guest were taken, and {held} are there", seen.taken));
    }
    match plan.ending {
        Ending::Verdict { success } => {
            let promised = if success { JobState::Success } else { JobState::Failed };
            if found.state != promised || matches!(seen.heard, Some(Heard::Refused)) {
                return Err(format!("the guest's {promised:?} became {:?}; it heard {:?}", found.state, seen.heard));
            }
            if rest.len() == log.len() && held == log.len() {
                Ok(())
            } else {
                Err(format!(
                    "{held} of {} bytes of the guest are there, and {} of others",
                    log.len(),
                    rest.len() - held
                ))
            }
        }
        Ending::Ours { .. } => {
            if found.failure_reason.as_deref() != Some("runner_system_failure") {
                return Err(format!("the death of the machine became {:?}", found.failure_reason));
            }
            // The guest's next bytes may look like the first ones of ours: then they begin a line.
            let line = rest[..held].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let says_why = [held, line].into_iter().filter(|begin| *begin >= seen.taken).any(|begin| {
                let last = rest[begin..].strip_prefix(b"\n").unwrap_or(&rest[begin..]);
                check_ours(last).is_ok() && String::from_utf8_lossy(last).contains("dayfly: for your operators")
            });
            let shown = String::from_utf8_lossy(&rest[held..]);
            if says_why { Ok(()) } else { Err(format!("after {held} bytes of the guest: {shown:?}")) }
        }
    }
}

/// Whether all of these lines are the daemon's.
fn check_ours(bytes: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(bytes);
    let alien = text.lines().find(|line| line.as_bytes().get(26) != Some(&b'Z') || line.get(27..31) != Some(" 00O"));
    alien.map_or(Ok(()), |line| Err(format!("a line that is neither the guest's nor ours: {line:?}")))
}

/// The guest of one machine: asks for its job, does what the plan says, powers off.
async fn act(guest: Guest, gitlab: Gitlab, plan: Arc<Plan>, seen: Arc<Mutex<Option<Seen>>>) {
    let Some(payload) = guest.ask().await else { return guest.power_off().await };
    let first = gitlab.spool_length();
    let note = |taken, heard| {
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Seen { first, taken, heard });
    };
    note(0, None);
    let token = payload["token"].as_str().unwrap_or_default().to_owned();
    let way = Inside { guest: &guest, gitlab: &gitlab, note: &|taken| note(taken, None) };
    let mut client = Client::new(&way, gitlab.job.0, token, &plan);
    let heard = client.run(&plan).await.expect("the door answers a guest as it should");
    note(client.taken, Some(heard));
    gitlab.ended();
    guest.power_off().await;
}

struct Inside<'a> {
    guest: &'a Guest,
    gitlab: &'a Gitlab,
    note: &'a (dyn Fn(usize) + Send + Sync),
}

impl Way for Inside<'_> {
    fn connect(&self) -> BoxFuture<'_, Option<Connection<Box<dyn Stream>>>> {
        Box::pin(self.guest.connect())
    }

    fn gitlab_loses(&self, permille: usize) {
        self.gitlab.lose(permille);
    }

    /// The machine dies.
    fn we_end(&self, taken: usize) -> BoxFuture<'_, ()> {
        (self.note)(taken);
        self.gitlab.ended();
        self.guest.machine.power.crash();
        Box::pin(std::future::pending())
    }
}
