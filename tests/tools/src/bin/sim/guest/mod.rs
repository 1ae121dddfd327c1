//! The guests of a run: each boots, asks for its job and works as its job's script says, well-behaved or not.

mod cache;
mod hostile;
mod job;
mod transfer;
mod wire;

pub(crate) use cache::Whose;

use crate::dice::Dice;
use crate::event::GuestDoes;
use crate::kinds::Kind;
use crate::plan::{Before, Script};
use crate::story::Story;
use dayfly::gitlab::JobId;
use dayfly::vm::VmName;
use dayfly_doubles::fake::GuestMachine;
use dayfly_guest_config::{DOOR_WIRE, GuestConfig, Report};
use dayfly_test_guest::boot::{self, report, wait_for_config};
use dayfly_test_guest::{Answer, job::ask as poll};
use job::Runner;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep};
use wire::{Line, Way};

/// A guest that has its config.
pub(crate) struct Guest {
    pub(crate) machine: GuestMachine,
    pub(crate) line: Line,
    pub(crate) token: String,
    pub(crate) script: Arc<Script>,
    pub(crate) wait: Duration,
    pub(crate) may_stay: bool,
}

/// The life of one VM's inside.
pub(crate) async fn run(machine: GuestMachine, story: Story) {
    let vm = VmName::from(machine.spec.id.clone()).to_string();
    let Some(job) = machine.spec.bound.as_ref().map(|(_, job)| JobId(*job)) else {
        // Somebody else's VM, or one that was left.
        return std::future::pending().await;
    };
    let (script, number, dice) = {
        let mut inner = story.inner();
        let Some(note) = inner.ledger.jobs.get(&job) else { return };
        let number = u32::try_from(note.vms.len()).unwrap_or(0);
        let script = Arc::clone(&note.script);
        (script, number, Dice::new(inner.dice().next(), 5))
    };
    if let Some(guest) = boot(machine, &story, &vm, job, script, number, dice).await {
        guest.live(number).await;
    }
}

/// Boots, as the script wants it. `None`: it never gets further.
async fn boot(
    mut machine: GuestMachine,
    story: &Story,
    vm: &str,
    job: JobId,
    script: Arc<Script>,
    number: u32,
    mut dice: Dice,
) -> Option<Guest> {
    let boot = match script.before {
        Before::Boots(ms) => Duration::from_millis(ms),
        _ => Duration::from_millis(700),
    };
    sleep(boot).await;
    match script.before {
        Before::NeverPolls => {
            story.hit(Kind::NeverPolls);
            let _ = machine.console.write_all(b"Kernel panic - not syncing: no working init found\n").await;
            std::future::pending::<()>().await;
        }
        Before::Reboots(machines) if number <= machines && dice.chance(500) => {
            story.hit(Kind::RebootsBooting);
            machine.power.reboot();
            std::future::pending::<()>().await;
        }
        Before::Crashes(machines) if number <= machines && dice.chance(500) => {
            story.hit(Kind::CrashesBooting);
            machine.power.crash();
            std::future::pending::<()>().await;
        }
        _ => {}
    }
    report(&mut machine.channel, &Report::Ready).await;
    let line = wait_for_config(&mut machine.channel).await?;
    let config = GuestConfig::from_line(&line).ok()?;
    story.tell(&crate::event::Event::Guest { vm, job, does: GuestDoes::Reads(&line) });
    report(&mut machine.channel, &Report::Applied).await;
    if script.before == Before::NoRunner {
        story.hit(Kind::NoRunner);
        report(&mut machine.channel, &Report::Failed("gitlab-runner: not found".into())).await;
        std::future::pending::<()>().await;
    }
    report(&mut machine.channel, &Report::RunnerStarted).await;
    match script.before {
        Before::Reboots(machines) if number <= machines => {
            story.hit(Kind::RebootsBooting);
            machine.power.reboot();
            std::future::pending::<()>().await;
        }
        Before::Crashes(machines) if number <= machines => {
            story.hit(Kind::CrashesBooting);
            machine.power.crash();
            std::future::pending::<()>().await;
        }
        _ => {}
    }
    let token = boot::guest_token(&config)?;
    let way = if config.door == DOOR_WIRE {
        Way::Wire { relay: machine.relay.clone(), port: machine.door.clone() }
    } else {
        Way::Port { doors: machine.doors.clone(), door: boot::door(&config)? }
    };
    let patience = Duration::from_secs(config.door_patience_s);
    let who = (story.clone(), vm.to_owned(), job);
    let line = Line::new(way, &config.pass, patience, who, dice);
    line.tell(GuestDoes::Configured { pass: &config.pass });
    let (wait, may_stay) = (Duration::from_secs(config.runner.wait_timeout_s), config.may_stay);
    Some(Guest { machine, line, token, script, wait, may_stay })
}

impl Guest {
    async fn live(mut self, number: u32) {
        let payload = self.come_to_payload(number).await;
        if let Some(mut runner) = payload.and_then(|payload| Runner::new(&payload, &self)) {
            runner.run(&mut self).await;
        }
        self.power_off().await;
    }

    /// Ends, as the guest program does when its runner has ended.
    pub(crate) async fn power_off(mut self) {
        report(&mut self.machine.channel, &Report::RunnerExited(0)).await;
        if self.may_stay {
            boot::stay(&mut self.machine.channel).await;
        }
        self.machine.power.off();
        std::future::pending::<()>().await;
    }

    async fn come_to_payload(&mut self, number: u32) -> Option<Vec<u8>> {
        match self.script.before {
            Before::AtDeadline(ms) if number == 1 => {
                let assigned =
                    self.line.story.inner().ledger.jobs.get(&self.line.job).and_then(|note| note.assigned_at);
                let at = assigned.unwrap_or_default() + Duration::from_millis(u64::try_from(ms).unwrap_or(0));
                // The connection stands before, so that the request is all that counts.
                drop(self.line.connect().await);
                sleep(at.saturating_sub(self.line.story.now())).await;
                self.line.story.hit(Kind::PollsAtDeadline);
            }
            Before::Parallel => return self.asks_in_parallel().await,
            Before::WrongPass { ever_right } => {
                hostile::wrong_pass(&mut self.line).await;
                if !ever_right {
                    std::future::pending::<()>().await;
                }
            }
            Before::WrongToken => {
                self.line.story.hit(Kind::WrongGuestToken);
                let wrong = format!("{}x", &self.token[..self.token.len() - 1]);
                let reply = ask(&mut self.line, &wrong).await;
                if reply.is_some_and(|reply| reply.status == 201) {
                    self.line.tell(GuestDoes::Wrong { invariant: 10, what: "a payload for another guest token" });
                }
            }
            _ => {}
        }
        let payload = self.asks().await?;
        if self.script.before == Before::AsksAgain {
            sleep(Duration::from_millis(self.line.dice.range(1_100, 4_000))).await;
            self.line.story.hit(Kind::AsksAgain);
            if let Some(again) = ask(&mut self.line, &self.token.clone()).await.filter(|reply| reply.status == 201) {
                self.line.tell(GuestDoes::Payload { bytes: &again.body, spoke: false });
            }
        }
        Some(payload)
    }

    /// Asks until there is a job, as `run-single` does.
    async fn asks(&mut self) -> Option<Vec<u8>> {
        let until = Instant::now() + self.wait;
        while Instant::now() < until {
            if let Some(reply) = ask(&mut self.line, &self.token.clone()).await.filter(|reply| reply.status == 201) {
                self.line.tell(GuestDoes::Payload { bytes: &reply.body, spoke: false });
                return Some(reply.body);
            }
            sleep(Duration::from_secs(3)).await;
        }
        None
    }

    async fn asks_in_parallel(&mut self) -> Option<Vec<u8>> {
        self.line.story.hit(Kind::ParallelPolls);
        let token = self.token.clone();
        let mut lines = [self.line.another(), self.line.another(), self.line.another()];
        let [a, b, c] = &mut lines;
        let timed = async |line: &mut Line| {
            let reply = ask(line, &token).await;
            if let Some(given) = reply.as_ref().filter(|reply| reply.status == 201) {
                line.tell(GuestDoes::Payload { bytes: &given.body, spoke: false });
            }
            let life = line.story.inner().ledger.lives;
            (life, Instant::now(), reply)
        };
        let (a, b, c) = tokio::join!(timed(a), timed(b), timed(c));
        let given = [a, b, c].into_iter().filter_map(|(life, at, reply)| Some((life, at, reply?)));
        let mut given: Vec<(u32, Instant, Answer)> = given.filter(|(.., reply)| reply.status == 201).collect();
        given.sort_by_key(|(_, at, _)| *at);
        // One whose connection came late is a second ask, which may be answered (V5); so is one to the next daemon.
        let at_once =
            given.windows(2).any(|pair| pair[1].0 == pair[0].0 && pair[1].1 - pair[0].1 < Duration::from_secs(1));
        let Some((.., first)) = given.into_iter().next() else { return self.asks().await };
        if at_once {
            self.line.tell(GuestDoes::Wrong { invariant: 6, what: "two payloads for polls at once" });
        }
        Some(first.body)
    }
}

/// One poll.
pub(crate) async fn ask(line: &mut Line, token: &str) -> Option<Answer> {
    line.call(&poll(token)).await
}
