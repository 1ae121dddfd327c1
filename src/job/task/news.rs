//! What the job's guest and machine tell it: asks, verdicts and phases become events.

use super::Job;
use super::commands::Asking;
use crate::failpoint::{Point, reached};
use crate::guest::GuestEvent;
use crate::job::lines;
use crate::job::state::{Event, State};
use crate::metrics::Phase;
use crate::supply::MachineEvent;
use crate::telemetry::chain;
use crate::vm::Pause;
use dayfly_guest_config::Report;
use tokio::time::Instant;

impl Job {
    pub(super) async fn guest(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Greeted => {
                reached(Point::K9);
                self.m.greeted();
                self.m.last_spoke = self.m.parts.awake.now();
            }
            GuestEvent::Spoke => {
                self.given.spoke = true;
                self.m.last_spoke = self.m.parts.awake.now();
                self.told_of_the_end();
            }
            GuestEvent::HandOutLost => self.given.lost(),
            GuestEvent::DebugTrace => self.m.mark_debug(),
            GuestEvent::AsksForJob { reply, .. } => {
                self.hear(Event::GuestAsked(self.ask()), Some(Asking::Job(reply))).await;
            }
            GuestEvent::Verdict { verdict, reply } => {
                let event = self.keeping(Event::GuestVerdict(verdict));
                self.hear(event, Some(Asking::Verdict(reply))).await;
            }
        }
    }

    pub(super) async fn machine(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::DiskReady => {
                self.m.begin_phase(Phase::Create);
                self.phase("disk ready").await;
            }
            MachineEvent::Started => {
                self.m.begin_phase(Phase::Boot);
                self.m.clone_is_up();
                self.phase("machine started").await;
            }
            MachineEvent::Restored(took) => {
                self.m.came_from = "restored";
                tracing::info!(
                    took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                    "the machine was restored"
                );
                // Its guest is up.
                self.m.begin_phase(Phase::Boot);
                self.m.begin_phase(Phase::PickUp);
                self.phase("machine restored").await;
            }
            MachineEvent::NotRestored => {
                self.m.came_from = "cold";
                self.phase("machine could not be restored; it boots").await;
            }
            MachineEvent::Report(report) => self.report(report).await,
            MachineEvent::Failed(error) => {
                tracing::warn!(error = chain(&error), "the machine could not be made");
                self.feed(Event::MachineFailed).await;
            }
            // It gave up to ask us to write its verdict down.
            MachineEvent::Stopped(_) if self.given.verdict_unkept => self.feed(Event::HostDiskFailed).await,
            MachineEvent::Stopped(ending) => self.feed(Event::MachineStopped(ending)).await,
            MachineEvent::Paused(why) => {
                if why == Pause::Operator {
                    tracing::warn!("somebody at the host paused the machine; the job's deadlines run on");
                    self.seen.paused = Some(Instant::now());
                    self.say_phase("paused by somebody at the host");
                }
                self.feed(Event::MachinePaused(why)).await;
            }
            MachineEvent::Resumed => {
                tracing::info!("the machine goes on after a pause");
                self.seen.paused = None;
                self.m.last_spoke = self.m.parts.awake.now();
                self.say_phase("goes on after a pause");
            }
            MachineEvent::Gone => {
                let another = self.m.machine_released().await;
                self.m.note("the machine is gone");
                if another && matches!(self.m.record.state, State::Booting { .. }) {
                    if let Err(event) = self.m.take_machine(false).await {
                        self.feed(event).await;
                    }
                } else {
                    self.feed(Event::MachineReleased).await;
                }
            }
        }
        self.publish();
    }

    async fn report(&mut self, report: Report) {
        match report {
            // A line in the log and one in the trace for each.
            Report::Ready | Report::Applied | Report::RunnerStarted if !self.m.repeated.phases.is_news() => {}
            Report::Ready => {
                self.m.begin_phase(Phase::PickUp);
                self.phase("guest is up").await;
            }
            Report::Applied => self.phase("guest has its identity").await,
            Report::RunnerStarted => self.phase("gitlab-runner started").await,
            Report::Contract { .. } | Report::Held | Report::RunnerConnected => {
                tracing::debug!(%report, "guest reports")
            }
            Report::RunnerExited(code) => {
                tracing::debug!(code, "guest reports the end of its runner");
                self.seen.runner_exited = Some(code);
                let spec = self.m.record.machine_spec.as_ref();
                let waits = spec.is_some_and(|spec| spec.keep_failed.is_some());
                if waits && matches!(self.m.record.state, State::Releasing { .. }) {
                    // It does not power off before it has heard whether it is to stay.
                    self.feed(Event::GuestIdle).await;
                }
            }
            Report::Failed(text) => {
                self.m.repeated.failures.log(|line| tracing::warn!(text, "{line}"));
                self.seen.guest_failed = Some(text);
            }
        }
    }

    pub(super) fn say_phase(&self, what: &str) {
        self.view.send_modify(|view| view.phase = what.to_owned());
    }

    /// Writes a phase into the boot section; after the hand-out the trace is the guest's.
    async fn phase(&mut self, what: &'static str) {
        if self.m.record.guest_base.is_none() && matches!(self.m.record.state, State::Booting { .. }) {
            self.say_phase(what);
            self.m.note(what);
            let since = self.m.elapsed();
            self.m.metrics().job().boot_step(what, since);
            tracing::info!(
                phase = what,
                elapsed_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
                "boot goes on"
            );
            self.m.own_line(|now| lines::phase(now, what, since)).await;
        }
    }
}
