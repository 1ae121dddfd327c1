//! One run's story: whoever sees something tells it here; it is noted, judged by all checkers, and written down.
//!
//! One lock, held for one event. Who tells may hold the lock of the stand-in or of the fake hypervisor, so nothing here
//! ever calls those.

use crate::check::{self, Checker, Findings, Violation};
use crate::dice::Dice;
use crate::event::Event;
use crate::kinds::{Hits, Kind};
use crate::ledger::Ledger;
use crate::mortal::Life;
use crate::plan::Plan;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::Hasher as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// What is kept of a run besides its ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing.
    Nothing,
    /// A digest of all events.
    Digest,
    /// All events as text.
    Text,
}

/// More events than any run has; a task that runs in circles while time stands would tell them for ever.
const EVENTS_MAX: u64 = 2_000_000;

/// The story. Clones share it.
#[derive(Clone)]
pub(crate) struct Story(Arc<Mutex<Inner>>);

/// Its state.
pub(crate) struct Inner {
    birth: Instant,
    pub(crate) ledger: Ledger,
    checkers: Vec<Box<dyn Checker>>,
    findings: Findings,
    pub(crate) hits: Hits,
    dice: Dice,
    rates: Vec<u16>,
    /// Nothing new goes wrong any more.
    healed: bool,
    /// The life that ends at this kind's point.
    armed: Option<Kind>,
    life: Option<Life>,
    /// Faults that the stand-in is to put on a request, by its id.
    pub(crate) planned: BTreeMap<String, Vec<dayfly_exec::standin::Fault>>,
    /// The life ends at its next call of the file layer.
    pub(crate) kill_at_next_file: bool,
    /// Any number of events is right: the soak.
    endless: bool,
    settings: [(bool, Kind); 3],
    once: std::collections::BTreeSet<(u64, Kind)>,
    keep: Keep,
    text: String,
    digest: std::hash::DefaultHasher,
    events: u64,
}

impl Story {
    /// A story with nothing in it yet; its time counts from now.
    pub(crate) fn new(plan: &Plan, keep: Keep) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            birth: Instant::now(),
            ledger: Ledger::default(),
            checkers: check::all(plan),
            findings: Findings::default(),
            hits: Hits::default(),
            dice: Dice::new(plan.seed, 2),
            rates: plan.rates.clone(),
            healed: false,
            armed: None,
            life: None,
            planned: BTreeMap::new(),
            kill_at_next_file: false,
            endless: false,
            settings: [
                (plan.gitlab.two_phase, Kind::TwoPhase),
                (plan.gitlab.skew_s != 0, Kind::ClockSkew),
                (u32::from(plan.limits.ports) < plan.concurrent, Kind::PortsShort),
            ],
            once: std::collections::BTreeSet::new(),
            keep,
            text: String::new(),
            digest: std::hash::DefaultHasher::new(),
            events: 0,
        })))
    }

    /// One that judges nothing: the checkers remember every job.
    pub(crate) fn without_checkers(plan: &Plan, keep: Keep) -> Self {
        let story = Self::new(plan, keep);
        story.inner().checkers.clear();
        story.inner().endless = true;
        story
    }

    /// Its state. Held for a few lines.
    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells an event.
    pub(crate) fn tell(&self, event: &Event<'_>) {
        self.inner().tell(event);
    }

    /// Whether this kind of fault happens now; if so it is told.
    pub(crate) fn strikes(&self, kind: Kind) -> bool {
        self.inner().strikes(kind)
    }

    /// A fault that is certain.
    pub(crate) fn hit(&self, kind: Kind) {
        self.inner().hit(kind);
    }

    /// Virtual time of the run.
    pub(crate) fn now(&self) -> Duration {
        self.inner().birth.elapsed()
    }

    /// From now on nothing new goes wrong.
    pub(crate) fn heal(&self) {
        let mut inner = self.inner();
        inner.healed = true;
        inner.armed = None;
        inner.write("nothing new goes wrong from here on");
    }

    /// The life that runs, or none.
    pub(crate) fn set_life(&self, life: Option<Life>) {
        self.inner().life = life;
    }

    /// The life that runs ends at this kind's point.
    pub(crate) fn arm(&self, kind: Option<Kind>) {
        self.inner().armed = kind;
    }

    /// What is armed.
    pub(crate) fn armed(&self) -> Option<Kind> {
        self.inner().armed
    }

    /// If this point is armed, the life ends here, and this future never.
    pub(crate) async fn point(&self, kind: Kind) {
        let life = {
            let mut inner = self.inner();
            if inner.armed != Some(kind) {
                return;
            }
            inner.armed = None;
            inner.hit(kind);
            inner.life.take()
        };
        if let Some(life) = life {
            life.kill();
            std::future::pending::<()>().await;
        }
    }

    /// Something that is wrong whatever else is.
    pub(crate) fn violate(&self, invariant: u8, sentence: String) {
        let mut inner = self.inner();
        let at = inner.birth.elapsed();
        inner.findings.now = at;
        inner.findings.add(invariant, sentence);
        inner.publish();
    }

    /// The end: what must be true when all is over.
    pub(crate) fn end(&self) {
        let mut inner = self.inner();
        let inner = &mut *inner;
        inner.ledger.now = inner.birth.elapsed();
        inner.findings.now = inner.ledger.now;
        for checker in &mut inner.checkers {
            checker.end(&inner.ledger, &mut inner.findings);
        }
        inner.publish();
    }

    /// What was found.
    pub(crate) fn violations(&self) -> Vec<Violation> {
        self.inner().findings.all.clone()
    }

    /// The events as text, and their digest.
    pub(crate) fn record(&self) -> (String, u64, u64) {
        let inner = self.inner();
        (inner.text.clone(), inner.digest.finish(), inner.events)
    }
}

impl Inner {
    fn tell(&mut self, event: &Event<'_>) {
        let now = self.birth.elapsed();
        self.events += 1;
        // Time stands still and somebody runs in circles: whoever it is, its task ends here, and the run with it.
        assert!(self.endless || !self.events.is_multiple_of(EVENTS_MAX), "{EVENTS_MAX} events and no end: {event:?}");
        match self.keep {
            Keep::Nothing => {}
            Keep::Digest => {
                self.text.clear();
                let _ = write!(self.text, "{} {event:?}", now.as_nanos());
                self.digest.write(self.text.as_bytes());
            }
            Keep::Text => drop(writeln!(self.text, "{:12.6} {event:?}", now.as_secs_f64())),
        }
        self.ledger.now = now;
        self.findings.now = now;
        self.ledger.note(event);
        self.settings_strike(event);
        for checker in &mut self.checkers {
            checker.on(event, &self.ledger, &mut self.findings);
        }
        self.publish();
    }

    /// Faults that lie in how a run is set up count when a job meets them.
    fn settings_strike(&mut self, event: &Event<'_>) {
        let (job, kind) = match event {
            Event::Assigned { job, .. } => {
                for (applies, kind) in self.settings {
                    if applies {
                        self.hit_once(job.0, kind);
                    }
                }
                return;
            }
            Event::Answer(answer) if answer.status == Some(202) && !answer.faulted => {
                let last = answer.update.is_some_and(|update| update.state != "running");
                (answer.job.filter(|_| last), Kind::FinalWaits)
            }
            Event::Held { job, .. } => {
                let large = job.failure_reason.as_deref() == Some("trace_size_exceeded");
                (large.then_some(job.id), Kind::TraceTooLarge)
            }
            _ => return,
        };
        if let Some(job) = job {
            self.hit_once(job.0, kind);
        }
    }

    /// New findings into the text.
    fn publish(&mut self) {
        let news: Vec<String> = self.findings.news().map(ToString::to_string).collect();
        for line in news {
            self.write(&line);
        }
    }

    pub(crate) fn write(&mut self, line: &str) {
        if self.keep == Keep::Text {
            let _ = writeln!(self.text, "{:12.6} {line}", self.birth.elapsed().as_secs_f64());
        }
    }

    /// Whether this kind of fault happens now.
    pub(crate) fn strikes(&mut self, kind: Kind) -> bool {
        let rate = u64::from(self.rates[kind as usize]);
        if rate == 0 || self.healed || self.dice.below(10_000) >= rate {
            return false;
        }
        self.hit(kind);
        true
    }

    pub(crate) fn hit(&mut self, kind: Kind) {
        self.hits.hit(kind);
        self.tell(&Event::Fault(kind));
    }

    /// The same, counted once for one job.
    pub(crate) fn hit_once(&mut self, job: u64, kind: Kind) {
        if self.once.insert((job, kind)) {
            self.hit(kind);
        }
    }

    pub(crate) fn dice(&mut self) -> &mut Dice {
        &mut self.dice
    }
}
