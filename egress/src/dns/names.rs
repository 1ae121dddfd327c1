//! Which names does an address count for? Those that the guest was told it belongs to, for as long as it may remember.

use crate::dns::message::Record;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::Instant;

/// Pairs of a name and an address at most; then the oldest goes.
const PAIRS_MAX: usize = 8192;

/// Names of one address at most; then its oldest goes. Hosts of content have some hundred thousand.
const NAMES_MAX: usize = 64;

/// Beyond its time to live: programs keep addresses for longer than they should.
const GRACE: Duration = Duration::from_secs(3600);

/// A time to live at most.
const TTL_MAX: Duration = Duration::from_secs(24 * 3600);

/// Answers that are kept at most, and for how long at most.
const ANSWERS_MAX: usize = 1024;
const ANSWER_KEPT_MAX: Duration = Duration::from_secs(300);

/// What a VM was told.
#[derive(Default)]
pub(crate) struct Names {
    by_address: HashMap<IpAddr, Vec<(Rc<str>, Instant)>>,
    /// In the order in which they were first told.
    pairs: VecDeque<(IpAddr, Rc<str>)>,
    answers: HashMap<(Rc<str>, u16), Kept>,
}

/// Records, and until when they hold.
type Kept = (Rc<[Record]>, Instant);

impl Names {
    /// The guest is told that this address belongs to this name, for `ttl` seconds.
    pub(crate) fn learn(&mut self, name: &str, address: IpAddr, ttl: u32, now: Instant) {
        let until = now + Duration::from_secs(ttl.into()).min(TTL_MAX) + GRACE;
        let names = self.by_address.entry(address).or_default();
        if let Some((_, known)) = names.iter_mut().find(|(known, _)| **known == *name) {
            *known = (*known).max(until);
            return;
        }
        if names.len() >= NAMES_MAX {
            names.remove(0);
        }
        let name: Rc<str> = name.into();
        names.push((Rc::clone(&name), until));
        self.pairs.push_back((address, name));
        while self.pairs.len() > PAIRS_MAX {
            let Some((address, name)) = self.pairs.pop_front() else { break };
            if let Some(names) = self.by_address.get_mut(&address) {
                names.retain(|(known, _)| *known != name);
                if names.is_empty() {
                    self.by_address.remove(&address);
                }
            }
        }
    }

    /// The names that this address counts for, the last one that was told first.
    pub(crate) fn of(&self, address: IpAddr, now: Instant) -> Vec<Rc<str>> {
        let names = self.by_address.get(&crate::policy::canonical(address)).map_or(&[][..], Vec::as_slice);
        names.iter().rev().filter(|(_, until)| *until > now).map(|(name, _)| Rc::clone(name)).collect()
    }

    /// Keeps an answer for as long as it says.
    pub(crate) fn keep(&mut self, name: &str, kind: u16, records: &Rc<[Record]>, now: Instant) {
        let Some(ttl) = records.iter().map(|record| record.ttl).min().filter(|ttl| *ttl > 0) else { return };
        if self.answers.len() >= ANSWERS_MAX {
            self.answers.retain(|_, (_, until)| *until > now);
            if self.answers.len() >= ANSWERS_MAX {
                self.answers.clear();
            }
        }
        let until = now + Duration::from_secs(ttl.into()).min(ANSWER_KEPT_MAX);
        self.answers.insert((name.into(), kind), (Rc::clone(records), until));
    }

    /// An answer that still holds, and for how many seconds.
    pub(crate) fn kept(&self, name: &str, kind: u16, now: Instant) -> Option<(Rc<[Record]>, u32)> {
        let (records, until) = self.answers.get(&(name.into(), kind))?;
        let left = until.checked_duration_since(now)?;
        Some((Rc::clone(records), u32::try_from(left.as_secs()).unwrap_or(u32::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_counts_for_what_was_told_and_for_no_longer() {
        let mut names = Names::default();
        let now = Instant::now();
        let address: IpAddr = "1.1.1.1".parse().unwrap();
        names.learn("a.example", address, 60, now);
        names.learn("b.example", address, 0, now);
        let of = |names: &Names, after: u64| -> Vec<String> {
            names.of(address, now + Duration::from_secs(after)).iter().map(ToString::to_string).collect()
        };
        assert_eq!(of(&names, 0), ["b.example", "a.example"]);
        assert_eq!(of(&names, 3601), ["a.example"]);
        assert_eq!(of(&names, 3661), [""; 0]);
        names.learn("a.example", address, 60, now + Duration::from_secs(100));
        assert_eq!(of(&names, 3661), ["a.example"]);
        assert!(names.of("1.1.1.2".parse().unwrap(), now).is_empty());
        assert_eq!(names.of("::ffff:1.1.1.1".parse().unwrap(), now).len(), 2);
    }

    #[test]
    fn what_is_told_is_bounded() {
        let mut names = Names::default();
        let now = Instant::now();
        for n in 0..50_000u32 {
            names.learn(&format!("{n}.example"), IpAddr::V4((n % 100).into()), 60, now);
            names.learn("one.example", IpAddr::V4((n + 1000).into()), 60, now);
        }
        assert!(names.pairs.len() <= PAIRS_MAX && names.by_address.len() <= PAIRS_MAX);
        assert!(names.by_address.values().all(|names| !names.is_empty() && names.len() <= NAMES_MAX));
        assert_eq!(&*names.of(IpAddr::V4(50_999.into()), now)[0], "one.example");
    }
}
