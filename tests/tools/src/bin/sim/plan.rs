//! What one run is made of, all drawn from its seed before it begins: host, runners, GitLab, jobs, faults, operator.

use crate::dice::Dice;
use crate::kinds::Kind;
use crate::planted::Bug;
use dayfly_doubles::workshop::Mood;
use std::time::Duration;

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) runners: usize,
    pub(crate) concurrent: u32,
    pub(crate) limits: Limits,
    pub(crate) gitlab: Gitlab,
    pub(crate) jobs: Vec<(Duration, Script)>,
    /// Of 10,000 opportunities.
    pub(crate) rates: Vec<u16>,
    pub(crate) actions: Vec<(Duration, Action)>,
    /// From here on nothing new goes wrong.
    pub(crate) heals: Duration,
    /// What is wrong with the daemon.
    pub(crate) bug: Option<Bug>,
    /// The image's guests are of the contract before, whose doors are ports.
    pub(crate) by_port: bool,
    /// For so many seconds the machine of a job that failed is kept.
    pub(crate) keep_s: Option<u64>,
    /// Repositories are kept on the host, and what fetches come to, one after the other.
    pub(crate) clones: Option<Vec<(Mood, Duration)>>,
}

/// Deadlines and bounds of the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) boot_s: u64,
    pub(crate) silence_s: u64,
    pub(crate) guest_interval_s: u64,
    pub(crate) spool_mib: u64,
    pub(crate) poll_s: u64,
    pub(crate) ports: u16,
}

/// How GitLab is set up.
#[derive(Clone, Debug)]
pub(crate) struct Gitlab {
    pub(crate) long_poll_s: u64,
    pub(crate) two_phase: bool,
    /// Of its clock against ours.
    pub(crate) skew_s: i64,
    /// Reports answered with 202 before the verdict is taken; `None`: until GitLab gives up waiting.
    pub(crate) final_waits: Option<u32>,
    pub(crate) trace_interval_s: Option<u64>,
}

/// How a guest comes to its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// As a good guest does, after a boot of this many milliseconds.
    Boots(u64),
    /// Never says anything.
    NeverPolls,
    /// Reports that it could not do its part, and never asks.
    NoRunner,
    /// Asks this many milliseconds before (or after) the boot deadline.
    AtDeadline(i64),
    /// Asks several times at once.
    Parallel,
    /// Asks again before it does anything.
    AsksAgain,
    /// This many machines reboot before they ask.
    Reboots(u32),
    /// This many machines die before they ask.
    Crashes(u32),
    /// Tries wrong passes first; or never the right one.
    WrongPass { ever_right: bool },
    /// Asks with another token first.
    WrongToken,
}

/// One thing that a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes into the trace, with a line break at the end or without.
    Print(usize, bool),
    /// Works on for so many milliseconds.
    Work(u64),
    /// Uploads an artifact of so many bytes; slowly.
    Upload(usize, bool),
    /// Fetches what it has uploaded, in parts.
    Download,
    /// Looks for the cache of this key.
    Restore(u8),
    /// Saves one of so many bytes by this key; or hangs up in the middle of it.
    Save(u8, usize, bool),
    /// An end without a verdict, or something nasty.
    Bad(Kind),
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// Its verdict, then power-off.
    Good,
    /// Its verdict, then this.
    Bad(Kind),
}

/// One job.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) before: Before,
    pub(crate) steps: Vec<Step>,
    pub(crate) exit_code: i64,
    pub(crate) after: After,
    pub(crate) timeout_s: u64,
    /// Neither timeout nor cancel ends it.
    pub(crate) deaf: bool,
    /// Its project is one of those that are deleted or have small limits.
    pub(crate) doomed_project: bool,
    /// Its ref is protected.
    pub(crate) protected: bool,
}

/// What the operator, GitLab's users, the host or fate do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// A kind of fault, for this long where it has a length.
    Do(Kind, Duration),
}

/// Ends and nasty things of guests; the plan gives each job at most one.
const GUEST_KINDS: &[Kind] = &[
    Kind::NeverPolls,
    Kind::NoRunner,
    Kind::PollsAtDeadline,
    Kind::ParallelPolls,
    Kind::AsksAgain,
    Kind::AsksLate,
    Kind::RebootsBooting,
    Kind::RebootsRunning,
    Kind::WrongPass,
    Kind::WrongGuestToken,
    Kind::CrashesBooting,
    Kind::CrashesRunning,
    Kind::PowersOff,
    Kind::CrashesAfterFinal,
    Kind::Hangs,
    Kind::DiskPaused,
    Kind::QemuStops,
    Kind::OperatorPauses,
    Kind::KernelPanics,
    Kind::Sleeps,
    Kind::IgnoresShutdown,
    Kind::DiesBeforeFinal,
    Kind::BadOffsets,
    Kind::ParallelPatches,
    Kind::SlowLoris,
    Kind::ManyConnections,
    Kind::HugeHead,
    Kind::HugeBody,
    Kind::Pipelined,
    Kind::Tunnel,
    Kind::HalfClosed,
    Kind::KeptOpen,
    Kind::OthersJob,
    Kind::NoGreeting,
    Kind::LateTrace,
    Kind::SecondVerdict,
    Kind::StrangeVerdict,
    Kind::LyingReports,
    Kind::IgnoresTimeout,
    Kind::IgnoresCancel,
    Kind::UploadVmDies,
    Kind::DownloadRange,
    Kind::TraceTooLarge,
];

/// Faults of single calls, drawn at each opportunity while they are switched on.
const CALL_KINDS: &[(Kind, u16)] = &[
    (Kind::ServerError, 400),
    (Kind::HtmlError, 300),
    (Kind::RateLimited, 150),
    (Kind::RateLimitedUntil, 150),
    (Kind::RunnerRefused, 600),
    (Kind::Conflict, 600),
    (Kind::AssignTruncated, 1500),
    (Kind::AssignNonsense, 1500),
    (Kind::ConnectFails, 300),
    (Kind::BlackHole, 100),
    (Kind::SlowHead, 300),
    (Kind::SlowBody, 300),
    (Kind::AssignedTwice, 4000),
    (Kind::OverAtFirstWord, 1500),
    (Kind::FirstWordLost, 1500),
    (Kind::LoginPage, 300),
    (Kind::NotFound, 300),
    (Kind::Redirect, 300),
    (Kind::PatchLost, 1000),
    (Kind::PatchReplyLost, 1000),
    (Kind::TraceLostPart, 400),
    (Kind::TraceAhead, 500),
    (Kind::TraceReset, 400),
    (Kind::FinalRefused, 1500),
    (Kind::FinalReplyLost, 2000),
    (Kind::FinalLost, 2000),
    (Kind::UploadReset, 4000),
    (Kind::UploadRefused, 4000),
    (Kind::UploadBusy, 4000),
    (Kind::CreateRefused, 1000),
    (Kind::OverlayRefused, 1000),
    (Kind::OverlayHangs, 1500),
    (Kind::CreateHangs, 1000),
    (Kind::CreateAnswerLost, 800),
    (Kind::DestroyFails, 4000),
    (Kind::DestroyHangs, 5000),
    (Kind::EgressRefused, 1500),
    (Kind::EgressHangs, 800),
    (Kind::EgressDies, 2000),
    (Kind::EgressStays, 2000),
    (Kind::AuditFails, 2000),
    (Kind::Panics, 150),
    (Kind::FdShort, 800),
    (Kind::LibvirtBlips, 300),
    (Kind::ListHangs, 300),
    (Kind::NoSpaceStart, 300),
    (Kind::NoSpaceSpool, 200),
    (Kind::SyncFails, 600),
    (Kind::ReadFails, 200),
    (Kind::PortTaken, 500),
    (Kind::WireCut, 4000),
];

/// Things that are done at a time. One stands twice if it often finds nothing to be done to.
const ACTION_KINDS: &[(Kind, u64, u64)] = &[
    // Kind, and how many seconds it lasts, from and to.
    (Kind::Outage, 20, 900),
    (Kind::HandOver, 0, 3),
    (Kind::HandOver, 0, 90),
    (Kind::HeldPoll, 0, 3),
    (Kind::CancelBooting, 0, 0),
    (Kind::CancelRunning, 0, 0),
    (Kind::HardCancel, 0, 0),
    (Kind::Erased, 0, 0),
    (Kind::ProjectDeleted, 0, 0),
    (Kind::ProjectDeleted, 0, 0),
    (Kind::OomKilled, 0, 0),
    (Kind::SecondSignal, 0, 20),
    (Kind::Drain, 0, 5),
    (Kind::Killed, 0, 90),
    (Kind::KillJob, 0, 0),
    (Kind::WallJump, 0, 0),
    (Kind::RecordDamaged, 0, 20),
    (Kind::KillStorm, 0, 10),
    (Kind::LibvirtDown, 5, 600),
    (Kind::HostReboot, 10, 120),
    (Kind::LowDisk, 5, 120),
    (Kind::ReadOnly, 1, 60),
    (Kind::ImageMissing, 5, 120),
    (Kind::Leftovers, 0, 0),
    (Kind::Foreign, 0, 0),
    (Kind::KillK0, 0, 30),
    (Kind::KillK0, 0, 30),
    (Kind::KillK1, 0, 30),
    (Kind::KillK2, 0, 30),
    (Kind::KillK3, 0, 30),
    (Kind::KillK4, 0, 60),
    (Kind::KillK5, 0, 60),
    (Kind::KillK6, 0, 60),
    (Kind::KillK7, 0, 60),
    (Kind::KillK8, 0, 60),
    (Kind::KillK9, 0, 60),
    (Kind::KillK10, 0, 60),
    (Kind::KillK11, 0, 60),
    (Kind::KillK12, 0, 60),
    (Kind::KillK13, 0, 60),
    (Kind::KillK13, 0, 60),
    (Kind::KillK14, 0, 60),
    (Kind::KillK15, 0, 60),
    (Kind::KillK16, 0, 60),
    (Kind::KillK17, 0, 60),
    (Kind::KillK18, 0, 60),
];

impl Plan {
    /// Draws a run.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut dice = Dice::new(seed, 1);
        let runners = *dice.pick(&[1, 1, 2, 2, 3]);
        let concurrent = u32::try_from(dice.range(1, 8)).unwrap_or(1);
        let limits = Limits {
            boot_s: *dice.pick(&[60, 90, 300]),
            silence_s: *dice.pick(&[90, 120, 300]),
            guest_interval_s: dice.range(1, 3),
            spool_mib: if dice.chance(100) { 1 } else { 256 },
            poll_s: *dice.pick(&[3, 3, 5, 10]),
            // Fewer ports than jobs at once, now and then.
            ports: if dice.chance(60) { u16::try_from(concurrent / 2).unwrap_or(0).max(1) } else { 100 },
        };
        let gitlab = Gitlab {
            long_poll_s: if dice.chance(600) { 50 } else { 0 },
            two_phase: dice.chance(60),
            skew_s: if dice.chance(150) { *dice.pick(&[-7200, 7200, 3600, -600]) } else { 0 },
            final_waits: *dice.pick(&[Some(0), Some(0), Some(0), Some(0), Some(0), Some(0), Some(2), Some(5), None]),
            trace_interval_s: *dice.pick(&[None, None, Some(3), Some(1), Some(30)]),
        };
        let count = dice.range(20, 60);
        let span = dice.range(1, 12) * count * 1000 / u64::from(concurrent);
        let mut jobs: Vec<(Duration, Script)> =
            (0..count).map(|_| (dice.time(0, span), Script::draw(&mut dice, &limits))).collect();
        jobs.sort_by_key(|(at, _)| *at);
        // Dice of their own: what was found before there were caches is found by the same seeds.
        let mut caching = Dice::new(seed, 11);
        for (_, script) in &mut jobs {
            script.cache(&mut caching);
        }
        let mut rates = vec![0; Kind::ALL.len()];
        for (kind, rate) in CALL_KINDS {
            if dice.chance(130) {
                rates[*kind as usize] = rate / *dice.pick(&[1, 1, 3]);
            }
        }
        // What GitLab sends is never quite what a parser would write.
        rates[Kind::StrangeMembers as usize] = 5000;
        let span = span.max(20_000) + 30_000;
        let mut actions: Vec<(Duration, Action)> = (0..dice.below(13))
            .map(|_| {
                let (kind, from, to) = *dice.pick(ACTION_KINDS);
                (dice.time(0, span), Action::Do(kind, dice.time(from * 1000, to * 1000)))
            })
            .collect();
        actions.sort_by_key(|(at, _)| *at);
        let heals = Duration::from_millis(span);
        Self {
            seed,
            runners,
            concurrent,
            limits,
            gitlab,
            jobs,
            rates,
            actions,
            heals,
            bug: None,
            by_port: Dice::new(seed, 9).chance(350),
            keep_s: {
                let mut dice = Dice::new(seed, 11);
                if dice.chance(250) { Some(*dice.pick(&[15, 60, 200])) } else { None }
            },
            clones: fetches(seed, 300),
        }
    }
}

impl Plan {
    /// Draws a run that a planted bug is looked for in: what is rare, and shows some bugs alone, is done once more. So is a
    /// hand-over, now and then to a life whose doors are somebody else's for a while: adoption takes its time then.
    pub(crate) fn for_bugs(seed: u64, bug: Option<Bug>) -> Self {
        const RARE: &[Kind] = &[Kind::Outage, Kind::Foreign];
        const FEW: &[Kind] =
            &[Kind::RateLimited, Kind::OverAtFirstWord, Kind::FinalLost, Kind::DestroyFails, Kind::SyncFails];
        let (mut plan, mut dice) = (Self { bug, ..Self::draw(seed) }, Dice::new(seed, 3));
        plan.by_port |= bug == Some(Bug::DoorLeftOpen);
        if matches!(bug, Some(Bug::ForeignClone | Bug::SlotKept)) {
            (plan.clones, plan.by_port) = (fetches(seed, 1000), false);
        }
        for kind in [*dice.pick(RARE), Kind::HandOver] {
            if let Some((_, from, to)) = ACTION_KINDS.iter().find(|(of, _, _)| *of == kind) {
                let at = dice.time(0, u64::try_from(plan.heals.as_millis()).unwrap_or(u64::MAX));
                plan.actions.push((at, Action::Do(kind, dice.time(from * 1000, to * 1000))));
            }
        }
        plan.actions.sort_by_key(|(at, _)| *at);
        if dice.chance(250) {
            plan.rates[Kind::PortTaken as usize] = 3000;
        }
        // Doors that do not open at once keep a start and its first sweep apart.
        if dice.chance(600) {
            plan.rates[Kind::FdShort as usize] = 800;
        }
        for (kind, rate) in CALL_KINDS.iter().filter(|(kind, _)| FEW.contains(kind)) {
            if dice.chance(250) {
                plan.rates[*kind as usize] = *rate;
            }
        }
        plan
    }
}

/// What becomes of fetches, in so many runs of a thousand.
fn fetches(seed: u64, per_mille: u64) -> Option<Vec<(Mood, Duration)>> {
    let mut dice = Dice::new(seed, 11);
    if !dice.chance(per_mille) {
        return None;
    }
    let moods = [Mood::Refused, Mood::Broken, Mood::Full, Mood::NoDisk, Mood::Damaged];
    let count = dice.range(1, 8);
    let mut fetch = || {
        let longest = *dice.pick(&[500, 3_000, 200_000]);
        let mood = if dice.chance(500) { Mood::Well } else { *dice.pick(&moods) };
        (mood, dice.time(0, longest))
    };
    Some((0..count).map(|_| fetch()).collect())
}

impl Script {
    /// Half of the jobs are plain; the others have one trouble each.
    fn draw(dice: &mut Dice, limits: &Limits) -> Self {
        let mut steps = Vec::new();
        for _ in 0..dice.range(1, 3) {
            let bytes = match dice.below(200) {
                0 => 1_300_000,
                1..10 => dice.range(2_000, 40_000),
                _ => dice.range(1, 200),
            };
            steps.push(Step::Print(usize::try_from(bytes).unwrap_or(1), dice.chance(850)));
            let work = match dice.below(40) {
                0 => dice.range(30_000, 100_000),
                1..6 => dice.range(5_000, 20_000),
                _ => dice.range(10, 4_000),
            };
            steps.push(Step::Work(work));
        }
        if dice.chance(200) {
            steps.push(Step::Upload(usize::try_from(dice.range(1, 3000)).unwrap_or(1), dice.chance(300)));
        }
        let mut script = Self {
            before: Before::Boots(dice.range(200, 6_000)),
            steps,
            exit_code: if dice.chance(150) { *dice.pick(&[1, 2, 137]) } else { 0 },
            after: After::Good,
            timeout_s: 3600,
            deaf: false,
            doomed_project: dice.chance(120),
            protected: false,
        };
        if dice.chance(500) {
            let kind = *dice.pick(GUEST_KINDS);
            script.give(kind, dice, limits);
        }
        script
    }

    /// What it saves and looks for by `cache:`, of few keys, so that jobs meet.
    fn cache(&mut self, dice: &mut Dice) {
        self.protected = dice.chance(350);
        let key = |dice: &mut Dice| u8::try_from(dice.below(4)).unwrap_or(0);
        if dice.chance(350) {
            self.steps.insert(0, Step::Restore(key(dice)));
        }
        if dice.chance(350) {
            let at = usize::try_from(dice.below(self.steps.len() as u64 + 1)).unwrap_or(0);
            let bytes = if dice.chance(100) { dice.range(300_000, 600_000) } else { dice.range(64, 5_000) };
            let cut = dice.chance(200);
            self.steps.insert(at, Step::Save(key(dice), usize::try_from(bytes).unwrap_or(64), cut));
        }
    }

    /// Makes it a job with this trouble.
    fn give(&mut self, kind: Kind, dice: &mut Dice, limits: &Limits) {
        let boot_ms = i64::try_from(limits.boot_s * 1000).unwrap_or(0);
        match kind {
            Kind::NeverPolls => self.before = Before::NeverPolls,
            Kind::NoRunner => self.before = Before::NoRunner,
            Kind::PollsAtDeadline => {
                let off = *dice.pick(&[-400, -50, -5, -1, 0, 1, 5, 50]);
                self.before = Before::AtDeadline(boot_ms + off);
            }
            Kind::ParallelPolls => self.before = Before::Parallel,
            Kind::AsksAgain => self.before = Before::AsksAgain,
            Kind::RebootsBooting => self.before = Before::Reboots(if dice.chance(700) { 1 } else { 2 }),
            Kind::CrashesBooting => self.before = Before::Crashes(if dice.chance(700) { 1 } else { 2 }),
            Kind::WrongPass => self.before = Before::WrongPass { ever_right: dice.chance(800) },
            Kind::WrongGuestToken => self.before = Before::WrongToken,
            Kind::CrashesAfterFinal
            | Kind::IgnoresShutdown
            | Kind::KeptOpen
            | Kind::LateTrace
            | Kind::SecondVerdict => {
                self.after = After::Bad(kind);
            }
            Kind::DiesBeforeFinal => self.steps.push(Step::Bad(kind)),
            Kind::IgnoresTimeout => {
                self.deaf = true;
                self.timeout_s = dice.range(30, 120);
                self.steps.push(Step::Work(600_000));
            }
            Kind::IgnoresCancel => {
                self.deaf = true;
                self.steps.push(Step::Work(dice.range(20_000, 700_000)));
            }
            Kind::DownloadRange => {
                self.steps.push(Step::Upload(usize::try_from(dice.range(100, 5000)).unwrap_or(100), false));
                self.steps.push(Step::Download);
            }
            Kind::TraceTooLarge => {
                self.doomed_project = true;
                self.steps.push(Step::Print(1_200_000, true));
                self.steps.push(Step::Work(dice.range(5_000, 70_000)));
            }
            kind => {
                let at = usize::try_from(dice.below(self.steps.len() as u64 + 1)).unwrap_or(0);
                self.steps.insert(at, Step::Bad(kind));
            }
        }
    }
}
