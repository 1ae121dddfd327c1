//! What the job's guest and machine tell it: asks, verdicts and phases become events.

use super::Job;
use crate::failpoint::{Point, reached};
use crate::guest::{GuestEvent, HandOut, VerdictAnswer};
use crate::job::lines;
use crate::job::state::{Event, State};
use crate::supply::MachineEvent;
use crate::telemetry::chain;
use crate::vm::Pause;
use dayfly_guest_config::Report;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A second ask is answered with the payload again only this long after the first (V5): parallel
/// asks are one runner's slip or a hostile guest; an ask after a failed write comes 3 s later.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// So often a job is given to a guest that shows no work of it, as far as is known in vain: a runner that cannot read
/// the payload (of a newer GitLab than itself) asks every 3 s.
const HAND_OUTS_MAX: u32 = 3;

impl Job {
    pub(super) async fn guest(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Greeted => {
                reached(Point::K9);
                self.m.greeted();
                self.m.last_spoke = self.m.parts.awake.now();
            }
            GuestEvent::Spoke => {
                self.spoke = true;
                self.m.last_spoke = self.m.parts.awake.now();
                self.told_of_the_end();
            }
            GuestEvent::HandOutLost => {
                self.last_hand_out = None;
                self.hand_outs = self.hand_outs.saturating_sub(1);
            }
            GuestEvent::DebugTrace => self.m.mark_debug(),
            GuestEvent::AsksForJob { reply, .. } => self.asked(reply).await,
            GuestEvent::Verdict { verdict, reply } => {
                let answer = self.verdict(verdict).await;
                // The door may have given up waiting; the guest asks again and gets the same.
                let _ = reply.send(answer);
            }
        }
    }

    /// The guest has made a call since its job was over at GitLab, and read so: it gets its grace to end properly.
    fn told_of_the_end(&mut self) {
        if std::mem::take(&mut self.untold) && self.grace.is_some() {
            self.graced = self.m.parts.limits.cancel_grace.get();
            self.grace = Some(self.m.parts.awake.now());
        }
    }

    /// Exactly one hand-out: the state machine decides whether, this whether a second ask (V5) gets
    /// the same again.
    async fn asked(&mut self, reply: oneshot::Sender<Option<HandOut>>) {
        if self.m.is_being_replaced() {
            // It came up after all, and its end is on the way.
            let _ = reply.send(None);
            return;
        }
        let first = matches!(self.m.record.state, State::Booting { .. });
        let rested = self.last_hand_out.is_none_or(|at| at.elapsed() >= ASK_AGAIN_AFTER);
        let lost = !self.spoke && rested;
        let again = matches!(self.m.record.state, State::Running { canceling: false }) && lost;
        let mut answer = None;
        if first {
            answer = self.m.hand_out().await;
            if answer.is_some() {
                // Written down before it goes out, or a restart would find a guest that works on a
                // job which it was never given. Asked again, it gets it then.
                reached(Point::K10);
                if !self.m.keep_hand_out().await {
                    let _ = reply.send(None);
                    return;
                }
                reached(Point::K10);
                self.feed(Event::GuestAsked).await;
                self.m.last_spoke = self.m.parts.awake.now();
            } else {
                // Nothing is left of the job's time.
                self.feed(Event::TimeoutDeadline).await;
            }
        } else if again && self.hand_outs >= HAND_OUTS_MAX {
            self.feed(Event::NotTaken).await;
        } else if again {
            answer = self.m.hand_out().await;
        } else if lost {
            // Canceled or over meanwhile: this guest has nothing to do, and nothing to end.
            self.feed(Event::GuestAsked).await;
        }
        if answer.is_some() {
            self.last_hand_out = Some(Instant::now());
            self.hand_outs += 1;
        }
        // An ask whose connection went away: the next one is a second ask.
        let _ = reply.send(answer);
    }

    /// 200 only after spool and record are on disk.
    async fn verdict(&mut self, verdict: crate::gitlab::Verdict) -> VerdictAnswer {
        match &self.m.record.state {
            State::Running { .. } => {}
            State::Releasing { verdict: Some(known), .. } if *known == verdict => return VerdictAnswer::Taken,
            _ => return VerdictAnswer::Over,
        }
        let (state, _) = self.m.record.state.clone().on(Event::GuestVerdict(verdict.clone()));
        reached(Point::K14);
        if !self.m.keep_verdict(state).await {
            self.unkept = true;
            return VerdictAnswer::Later;
        }
        self.unkept = false;
        reached(Point::K14);
        self.m.parts.supply.machine_did_well();
        self.feed(Event::GuestVerdict(verdict)).await;
        VerdictAnswer::Taken
    }

    pub(super) async fn machine(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::DiskReady => self.phase("disk ready").await,
            MachineEvent::Started => self.phase("machine started").await,
            MachineEvent::Report(report) => self.report(report).await,
            MachineEvent::Failed(error) => {
                tracing::warn!(error = chain(&error), "the machine could not be made");
                self.feed(Event::MachineFailed).await;
            }
            // It gave up to ask us to write its verdict down.
            MachineEvent::Stopped(_) if self.unkept => self.feed(Event::HostDiskFailed).await,
            MachineEvent::Stopped(ending) => self.feed(Event::MachineStopped(ending)).await,
            MachineEvent::Paused(why) => {
                if why == Pause::Operator {
                    tracing::warn!("somebody at the host paused the machine; the job's deadlines run on");
                    self.paused = Some(Instant::now());
                    self.say_phase("paused by somebody at the host");
                }
                self.feed(Event::MachinePaused(why)).await;
            }
            MachineEvent::Resumed => {
                tracing::info!("the machine goes on after a pause");
                self.paused = None;
                self.m.last_spoke = self.m.parts.awake.now();
                self.say_phase("goes on after a pause");
            }
            MachineEvent::Released => {
                let another = self.m.machine_released().await;
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
            Report::Ready => self.phase("guest is up").await,
            Report::Applied => self.phase("guest has its identity").await,
            Report::RunnerStarted => self.phase("gitlab-runner started").await,
            Report::Contract(_) | Report::RunnerConnected => tracing::debug!(%report, "guest reports"),
            Report::RunnerExited(code) => {
                tracing::debug!(code, "guest reports the end of its runner");
                self.runner_exited = Some(code);
            }
            Report::Failed(text) => {
                self.m.repeated.failures.log(|line| tracing::warn!(text, "{line}"));
                self.guest_failed = Some(text);
            }
        }
    }

    pub(super) fn say_phase(&self, what: &str) {
        self.view.send_modify(|view| view.phase = what.to_owned());
    }

    /// Writes a phase into the boot section; after the hand-out the trace is the guest's.
    async fn phase(&mut self, what: &'static str) {
        self.say_phase(what);
        if self.m.record.guest_base.is_none() && matches!(self.m.record.state, State::Booting { .. }) {
            let since = self.m.elapsed();
            self.m.metrics().job().phase(what, since);
            tracing::info!(
                phase = what,
                elapsed_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
                "boot goes on"
            );
            self.m.own_line(|now| lines::phase(now, what, since)).await;
        }
    }
}
