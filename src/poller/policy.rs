//! When may GitLab be asked, and when again? Pure: what was seen goes in, with the time and dice, and the next step
//! comes out.
//!
//! ```text
//! image ─► verify, once ─► room ─► host ─► ask ─► rest ─► image …
//!    └──────────┴────────────┴──────┴─ no ─────────┘
//! ```
//!
//! The room is handed from step to step, so that nothing can be asked without any, and none is kept over a rest
//! (decision D3).

use super::trouble::Cause;
use crate::gitlab::GitlabError;
use crate::retry::Backoff;
use crate::rng::Rng;
use std::time::Duration;
use tokio::time::Instant;

/// Rest after GitLab refused the token (threats.md G4): nothing but an operator helps.
const REFUSED_REST: Duration = Duration::from_secs(300);

/// Rest while something on this host is missing: an image, disk.
const BLOCKED_REST: Duration = Duration::from_secs(10);

/// How often a host that loses one machine after the other is tried with a job (threats.md V1).
const TRY_INTERVAL: Duration = Duration::from_secs(60);

/// A poll that GitLab held at least this long was a long poll: the queue moved, or its time ran
/// out. Either way the next one may go out at once.
const HELD: Duration = Duration::from_secs(1);

/// Rest after such a poll.
const HELD_REST: Duration = Duration::from_millis(200);

/// What a poller does next. `R`: room for one job.
#[derive(Debug)]
pub(super) enum Step<R> {
    /// Look whether the class's image can be used.
    LookAtImage,
    /// Tell GitLab the features of this runner.
    Verify,
    /// Wait for room.
    Reserve,
    /// Look whether a job would have a chance here.
    LookAtHost(R),
    /// Ask for a job; with what GitLab said of its queue last, or it answers at once.
    Ask(R, Option<String>),
    /// Do nothing for so long.
    Rest(Duration, Why),
}

/// Why a poller rests.
#[derive(Debug)]
pub(super) enum Why {
    /// It has a job, or GitLab has none.
    Answered,
    /// Something on this host keeps it from asking; why, for operators.
    Blocked(Cause, String),
    /// GitLab refuses the token.
    Refused(GitlabError),
    /// GitLab gave out a job that cannot be read.
    Unreadable(GitlabError),
    /// GitLab gave no answer, or one that makes no sense.
    NoAnswer(GitlabError),
}

/// What a poller has seen.
#[derive(Debug)]
pub(super) enum Seen<R> {
    /// It begins, or has rested.
    Rested,
    /// The image can be used.
    Image,
    /// It cannot; why, for operators.
    NoImage(String),
    /// GitLab knows this runner's features.
    Verified,
    /// There is room.
    Room(R),
    /// There never will be; why, for operators.
    NeverFits(Cause, String),
    /// How the host is. `shared`: another runner wants this room too.
    Host { room: R, host: Host, shared: bool },
    /// GitLab gave out a job, which has the room now.
    Job,
    /// GitLab has no job, said so after `held`, and what to tell it the next time.
    NoJob { held: Duration, last_update: Option<String> },
    /// A call to GitLab failed.
    Failed(GitlabError),
}

/// How the host is.
#[derive(Debug)]
pub(super) enum Host {
    /// A job has every chance.
    Well,
    /// It loses one machine after the other; why, for operators.
    LosesMachines(String),
    /// A job has no chance; why, for operators.
    Unfit(Cause, String),
}

/// The policy of one poller.
pub(super) struct Policy {
    /// Rest after an answer without a job.
    interval: Duration,
    backoff: Backoff,
    /// Conflicts in a row.
    conflicts: u32,
    verified: bool,
    last_update: Option<String>,
    /// When a host that loses machines was tried last.
    tried: Option<Instant>,
}

impl Policy {
    /// One that has seen nothing.
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, backoff: Backoff::poll(), conflicts: 0, verified: false, last_update: None, tried: None }
    }

    /// There is another token, of which GitLab has told nothing yet.
    pub(super) fn verify_again(&mut self) {
        self.verified = false;
    }

    /// What comes after this.
    pub(super) fn on<R>(&mut self, seen: Seen<R>, now: Instant, rng: &Rng) -> Step<R> {
        match seen {
            Seen::Rested => Step::LookAtImage,
            Seen::Image if self.verified => Step::Reserve,
            Seen::Image => Step::Verify,
            Seen::NoImage(reason) => Step::Rest(BLOCKED_REST, Why::Blocked(Cause::Image, reason)),
            Seen::Verified => {
                self.verified = true;
                Step::Reserve
            }
            Seen::Room(room) => Step::LookAtHost(room),
            // Disk may be freed.
            Seen::NeverFits(cause, reason) => Step::Rest(BLOCKED_REST, Why::Blocked(cause, reason)),
            Seen::Host { room, host, shared } => self.with_room(room, host, shared, now),
            Seen::Job => {
                self.answered();
                // Only a job tries the host; a poll without one says nothing of it.
                self.tried = self.tried.map(|_| now);
                Step::Rest(Duration::ZERO, Why::Answered)
            }
            Seen::NoJob { held, last_update } => {
                self.answered();
                self.last_update = last_update.or(self.last_update.take());
                Step::Rest(if held >= HELD { HELD_REST } else { self.interval }, Why::Answered)
            }
            Seen::Failed(error) => self.failed(error, rng),
        }
    }

    /// A host that loses every machine must not empty the project's queue: one job now and then finds out whether it
    /// is well again.
    fn with_room<R>(&mut self, room: R, host: Host, shared: bool, now: Instant) -> Step<R> {
        match host {
            Host::Unfit(cause, reason) => return Step::Rest(BLOCKED_REST, Why::Blocked(cause, reason)),
            Host::LosesMachines(reason) if now - *self.tried.get_or_insert(now) < TRY_INTERVAL => {
                return Step::Rest(BLOCKED_REST, Why::Blocked(Cause::MachinesLost, reason));
            }
            Host::LosesMachines(_) => {}
            Host::Well => self.tried = None,
        }
        // GitLab holds a question that says what it knew last. With another runner in want of this room that would
        // keep it from asking.
        Step::Ask(room, self.last_update.clone().filter(|_| !shared))
    }

    fn answered(&mut self) {
        self.backoff = Backoff::poll();
        self.conflicts = 0;
    }

    fn failed<R>(&mut self, error: GitlabError, rng: &Rng) -> Step<R> {
        // Only the queue of a poll changes under a question.
        let conflict = matches!(error, GitlabError::Conflict) && self.verified;
        self.conflicts = if conflict { self.conflicts + 1 } else { 0 };
        match error {
            GitlabError::Forbidden { .. } => Step::Rest(REFUSED_REST, Why::Refused(error)),
            // Ask again at once, but only once.
            GitlabError::Conflict if self.conflicts == 1 => Step::Rest(Duration::ZERO, Why::Answered),
            GitlabError::Conflict => Step::Rest(self.interval, Why::Answered),
            GitlabError::UnreadableJob { .. } => Step::Rest(self.interval, Why::Unreadable(error)),
            error => {
                // The next question is one that GitLab answers at once: it is known soon that it is back.
                self.last_update = None;
                Step::Rest(self.backoff.next_told(rng, error.retry_after()), Why::NoAnswer(error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use proptest::prelude::{ProptestConfig, Strategy, any, prop, prop_assert, proptest};

    const INTERVAL: Duration = Duration::from_secs(3);

    /// What the world answers to one step, whichever it is.
    #[derive(Clone, Debug)]
    struct Lot {
        fine: bool,
        host: u8,
        shared: bool,
        answer: u8,
        told_s: u64,
        held_ms: u64,
    }

    fn any_lot() -> impl Strategy<Value = Lot> {
        (any::<bool>(), 0..4_u8, any::<bool>(), 0..9_u8, 0..400_u64, 0..60_000_u64).prop_map(
            |(fine, host, shared, answer, told_s, held_ms)| Lot { fine, host, shared, answer, told_s, held_ms },
        )
    }

    fn unavailable(retry_after: Option<Duration>) -> GitlabError {
        GitlabError::Unavailable { status: Some(502), retry_after, source: None }
    }

    /// One life of a poller: each step's answer is the next lot's.
    struct Life {
        policy: Policy,
        rng: Rng,
        now: Instant,
        /// Jobs, and polls without one that were followed by no rest.
        jobs: Vec<Instant>,
        at_once: u32,
    }

    impl Life {
        fn new() -> Self {
            let (policy, rng) = (Policy::new(INTERVAL), Rng::seeded(7));
            Self { policy, rng, now: Instant::now(), jobs: Vec::new(), at_once: 0 }
        }

        fn on(&mut self, seen: Seen<u8>) -> Step<u8> {
            self.policy.on(seen, self.now, &self.rng)
        }

        /// Lives `step` by `lot`: what was seen, and by how much GitLab's own word on a rest must be kept.
        fn see(&mut self, step: &Step<u8>, lot: &Lot) -> (Seen<u8>, Duration) {
            let told = Duration::from_secs(lot.told_s);
            let failed = |told| (Seen::Failed(unavailable(Some(told))), told);
            match step {
                Step::LookAtImage if lot.fine => (Seen::Image, Duration::ZERO),
                Step::LookAtImage => (Seen::NoImage("none".into()), Duration::ZERO),
                Step::Verify if lot.fine => (Seen::Verified, Duration::ZERO),
                Step::Verify => match lot.answer {
                    0 => (Seen::Failed(GitlabError::Conflict), Duration::ZERO),
                    1 => (Seen::Failed(GitlabError::Forbidden { status: 403 }), REFUSED_REST),
                    _ => failed(told),
                },
                Step::Reserve if lot.fine => (Seen::Room(1), Duration::ZERO),
                Step::Reserve => (Seen::NeverFits(Cause::TooLarge, "too small".into()), Duration::ZERO),
                Step::LookAtHost(room) => {
                    let host = match lot.host {
                        0 => Host::Unfit(Cause::Disk, "no disk".into()),
                        1 => Host::LosesMachines("they die".into()),
                        _ => Host::Well,
                    };
                    (Seen::Host { room: *room, host, shared: lot.shared }, Duration::ZERO)
                }
                Step::Ask(..) => match lot.answer {
                    0 | 1 => (Seen::Job, Duration::ZERO),
                    2 => (Seen::Failed(GitlabError::Conflict), Duration::ZERO),
                    3 => (Seen::Failed(GitlabError::Forbidden { status: 403 }), REFUSED_REST),
                    4 => (Seen::Failed(GitlabError::RateLimited { retry_after: told }), told),
                    5 => failed(told),
                    6 => (Seen::Failed(unavailable(None)), Duration::ZERO),
                    _ => {
                        let held = Duration::from_millis(lot.held_ms);
                        self.now += held;
                        (Seen::NoJob { held, last_update: lot.fine.then(|| "q7".into()) }, Duration::ZERO)
                    }
                },
                Step::Rest(rest, _) => {
                    self.now += *rest;
                    (Seen::Rested, Duration::ZERO)
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever GitLab and the host do: nothing is asked before features are told and room is there, room is not
        /// kept over a rest, GitLab's word on when to come back is kept, and nothing is a storm (threats.md G1, G3, G4).
        #[test]
        fn nobody_is_asked_too_early_or_too_often(lots in prop::collection::vec(any_lot(), 1..300)) {
            let mut life = Life::new();
            let mut step = life.on(Seen::Rested);
            let (mut verified, mut asked_before) = (false, None);
            for lot in &lots {
                let (seen, told) = life.see(&step, lot);
                verified |= matches!(seen, Seen::Verified);
                match (&step, &seen) {
                    (Step::Ask(..), seen) => {
                        prop_assert!(verified, "asked before GitLab knew this runner");
                        if matches!(seen, Seen::Job) { life.jobs.push(life.now) }
                        asked_before = Some(life.now);
                    }
                    (Step::Verify, _) => prop_assert!(!matches!(seen, Seen::Verified) || asked_before.is_none(), "verified twice"),
                    _ => {}
                }
                let (job, conflict) = (matches!(seen, Seen::Job), matches!(seen, Seen::Failed(GitlabError::Conflict)));
                let held = matches!(seen, Seen::NoJob { held, .. } if held >= HELD);
                let ended = matches!(seen, Seen::NoImage(_) | Seen::NeverFits(..) | Seen::Job | Seen::NoJob { .. } | Seen::Failed(_));
                step = life.on(seen);
                prop_assert!(!ended || matches!(step, Step::Rest(..)), "no rest after an end, but {step:?}");
                if let Step::Rest(rest, _) = &step {
                    prop_assert!(*rest >= told, "{rest:?}, and {told:?} were told");
                    prop_assert!(*rest <= told.max(REFUSED_REST) + Duration::from_secs(7));
                    let least = if job { Duration::ZERO } else if held { HELD_REST } else { Duration::from_millis(800) };
                    if conflict && *rest < least { life.at_once += 1 } else {
                        prop_assert!(*rest >= least, "{rest:?}");
                        // What was asked again at once was answered otherwise, or waited for this time.
                        life.at_once = 0;
                    }
                    prop_assert!(life.at_once <= 1, "a conflict was tried again at once, and again");
                }
            }
        }

        /// V1: whatever else happens, a host that loses machines gets one job a minute at the most.
        #[test]
        fn a_host_that_loses_machines_is_tried_once_a_minute(lots in prop::collection::vec(any_lot(), 1..300)) {
            let mut life = Life::new();
            let mut step = life.on(Seen::Rested);
            for lot in &lots {
                let lot = Lot { host: 1, ..lot.clone() };
                let (seen, _) = life.see(&step, &lot);
                if matches!(seen, Seen::Job) { life.jobs.push(life.now) }
                step = life.on(seen);
            }
            prop_assert!(life.jobs.windows(2).all(|two| two[1] - two[0] >= TRY_INTERVAL), "{:?}", life.jobs);
        }
    }

    /// Goes through the steps until one is asked, with all well.
    fn until_asked(life: &mut Life) -> Option<String> {
        let mut step = life.on(Seen::Rested);
        loop {
            step = match step {
                Step::LookAtImage => life.on(Seen::Image),
                Step::Verify => life.on(Seen::Verified),
                Step::Reserve => life.on(Seen::Room(1)),
                Step::LookAtHost(room) => life.on(Seen::Host { room, host: Host::Well, shared: false }),
                Step::Ask(_, last_update) => return last_update,
                Step::Rest(..) => life.on(Seen::Rested),
            }
        }
    }

    fn rest_after(life: &mut Life, seen: Seen<u8>) -> Duration {
        match life.on(seen) {
            Step::Rest(rest, _) => rest,
            step => panic!("{step:?}"),
        }
    }

    #[test]
    fn what_gitlab_said_of_its_queue_is_told_unless_others_want_the_room() {
        let mut life = Life::new();
        assert_eq!(until_asked(&mut life), None);
        life.on(Seen::NoJob { held: Duration::ZERO, last_update: Some("q1".into()) });
        assert_eq!(until_asked(&mut life).as_deref(), Some("q1"));
        life.on(Seen::NoJob { held: Duration::ZERO, last_update: None });
        assert_eq!(until_asked(&mut life).as_deref(), Some("q1"), "an answer without one keeps it");
        let step = life.on(Seen::Host { room: 1, host: Host::Well, shared: true });
        assert!(matches!(step, Step::Ask(1, None)), "{step:?}");
    }

    #[test]
    fn a_conflict_is_tried_again_at_once_but_once() {
        let mut life = Life::new();
        until_asked(&mut life);
        let rests: Vec<_> = (0..3).map(|_| rest_after(&mut life, Seen::Failed(GitlabError::Conflict))).collect();
        assert_eq!(rests, [Duration::ZERO, INTERVAL, INTERVAL]);
        rest_after(&mut life, Seen::NoJob { held: Duration::ZERO, last_update: None });
        assert_eq!(rest_after(&mut life, Seen::Failed(GitlabError::Conflict)), Duration::ZERO);
    }

    /// G1: the first poll after an outage of any length comes within 6 s.
    #[test]
    fn an_outage_makes_nobody_late() {
        let mut life = Life::new();
        until_asked(&mut life);
        for _ in 0..1000 {
            assert!(rest_after(&mut life, Seen::Failed(unavailable(None))) <= Duration::from_secs(6));
        }
        rest_after(&mut life, Seen::Job);
        assert!(rest_after(&mut life, Seen::Failed(unavailable(None))) <= Duration::from_millis(1200), "counts anew");
    }

    /// U19: after an outage the first question is not held: whoever looks knows at once that GitLab is back.
    #[test]
    fn after_an_outage_gitlab_is_asked_for_an_answer_at_once() {
        let mut life = Life::new();
        until_asked(&mut life);
        life.on(Seen::NoJob { held: Duration::ZERO, last_update: Some("q1".into()) });
        assert_eq!(until_asked(&mut life).as_deref(), Some("q1"));
        life.on(Seen::Failed(unavailable(None)));
        assert_eq!(until_asked(&mut life), None);
    }
}
