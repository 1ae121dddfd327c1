//! What time the host has: asked over the channel once the config is here, before the runner starts, so that the times
//! of the runner's lines go on where the host's own left off.
#![expect(clippy::disallowed_types, reason = "no async runtime in the guest")]

use crate::channel::{Line, Reporter};
use crate::machine;
use dayfly_guest_config::{ClockAnswer, ClockQuestion};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// An answer that was under way for no longer is good enough: it is wrong by half of this at most.
const TRIP_GOOD_US: u64 = 10_000;

/// Questions at most. The quickest answer counts: on a busy host one of them may wait for a CPU.
const QUESTIONS_MAX: u32 = 5;

/// For one answer, until the question is asked again: its line may have been lost.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);

/// For all of them: a host that is away for a moment, or that does not know the question, is not waited for.
const DEADLINE: Duration = Duration::from_secs(2);

/// An answer, and when it was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostClock {
    host_us: i64,
    trip_us: u64,
    heard_us: u64,
}

impl HostClock {
    /// `heard_us`: when it came, by the guest's own clock. `None`: it answers no question of this machine.
    fn new(answer: ClockAnswer, heard_us: u64) -> Option<Self> {
        Some(Self { host_us: answer.host_us, trip_us: heard_us.checked_sub(answer.asked_us)?, heard_us })
    }

    /// The host's wall clock at this moment of the guest's own clock, in microseconds since 1970. Question and answer
    /// are taken to have been under way for equally long.
    #[must_use]
    pub fn at(self, own_us: u64) -> i64 {
        let since_us = (self.trip_us / 2).saturating_add(own_us.saturating_sub(self.heard_us));
        self.host_us.saturating_add(i64::try_from(since_us).unwrap_or(i64::MAX))
    }
}

/// Asks. `None`: nobody answers.
#[must_use]
pub fn ask(reporter: &Reporter, inbox: &Receiver<Line>) -> Option<HostClock> {
    let since = Instant::now();
    let mut best: Option<HostClock> = None;
    for _ in 0..QUESTIONS_MAX {
        if since.elapsed() >= DEADLINE || best.is_some_and(|best| best.trip_us <= TRIP_GOOD_US) {
            break;
        }
        reporter.ask(ClockQuestion { asked_us: machine::own_us() });
        if let Some(heard) = answer(inbox) {
            best = best.filter(|best| best.trip_us <= heard.trip_us).or(Some(heard));
        }
    }
    best
}

/// The next answer, within its time. A config that the host has written once more is none.
fn answer(inbox: &Receiver<Line>) -> Option<HostClock> {
    let asked = Instant::now();
    loop {
        match inbox.recv_timeout(ANSWER_DEADLINE.saturating_sub(asked.elapsed())) {
            Ok(Line::Whole(line)) => {
                let heard_us = machine::own_us();
                if let Some(heard) = ClockAnswer::parse(&line).and_then(|answer| HostClock::new(answer, heard_us)) {
                    return Some(heard);
                }
            }
            Ok(Line::TooLong) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    const HOST_US: i64 = 1_800_000_000_000_000;

    fn heard(asked_us: u64, heard_us: u64) -> HostClock {
        HostClock::new(ClockAnswer { asked_us, host_us: HOST_US }, heard_us).unwrap()
    }

    /// U24: the answer's age counts: half of the way there and back, and what has passed since.
    #[test]
    fn an_answer_is_as_old_as_half_its_way_and_the_time_since() {
        let clock = heard(1_000_000, 1_030_000);
        assert_eq!(clock.at(1_030_000), HOST_US + 15_000);
        assert_eq!(clock.at(1_530_000), HOST_US + 515_000);
        // However the way's 30 ms were shared between question and answer, it is wrong by 15 ms at most.
        for there_us in [0, 15_000, 30_000] {
            let true_us = HOST_US + (30_000 - there_us);
            assert!((clock.at(1_030_000) - true_us).abs() <= 15_000);
        }
    }

    #[test]
    fn no_number_overflows() {
        assert_eq!(HostClock::new(ClockAnswer { asked_us: 2, host_us: 0 }, 1), None, "asked after it was heard");
        let last = ClockAnswer { asked_us: 0, host_us: i64::MAX };
        assert_eq!(HostClock::new(last, u64::MAX).unwrap().at(u64::MAX), i64::MAX);
    }

    /// U24: a host that needs long for one answer is asked again, and the quickest counts; configs in between do not.
    #[test]
    fn the_quickest_answer_counts() {
        let (lines, inbox) = sync_channel(8);
        let line = |asked_us: u64, host_us: i64| {
            Line::Whole(ClockQuestion { asked_us }.answer(host_us).to_string().into_bytes())
        };
        let now_us = machine::own_us();
        lines.send(Line::Whole(b"{\"version\":2}".into())).unwrap();
        lines.send(line(now_us.saturating_sub(60_000_000), HOST_US)).unwrap();
        lines.send(Line::TooLong).unwrap();
        lines.send(line(u64::MAX, HOST_US)).unwrap();
        lines.send(line(now_us, HOST_US + 60_000_000)).unwrap();
        let clock = ask(&Reporter::silent(), &inbox).unwrap();
        assert!(clock.trip_us < 60_000_000, "{clock:?}");
        assert_eq!(clock.host_us, HOST_US + 60_000_000);
    }

    /// U24: a host that does not know the question, or is away, costs no more than its time.
    #[test]
    fn a_host_that_does_not_answer_is_not_waited_for() {
        let (lines, inbox) = sync_channel(1);
        drop(lines);
        assert_eq!(ask(&Reporter::silent(), &inbox), None);
        let (_lines, inbox) = sync_channel(1);
        let since = Instant::now();
        assert_eq!(ask(&Reporter::silent(), &inbox), None);
        assert!(since.elapsed() >= DEADLINE && since.elapsed() < DEADLINE * 2, "{:?}", since.elapsed());
    }
}
