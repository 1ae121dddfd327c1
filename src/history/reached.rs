//! What have jobs of a class reached, and which list would let them? For `dayfly egress suggest`: what it prints may be put
//! into the configuration by somebody who has looked at it.
//!
//! Pure: the ends of jobs go in, a list comes out. What was refused is not in it, nor what a job cannot do without.

use super::End;
use dayfly_egress::audit::Destination;
use dayfly_egress::policy::PATTERNS_MAX;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

/// Destinations that are kept with a job at most; one that has so many may have reached more.
pub const DESTINATIONS_MAX: usize = 100;

/// So many names below one domain are a `*.domain`.
const NAMES_OF_A_DOMAIN: usize = 5;

/// Refused destinations that are told at most.
const REFUSED_MAX: usize = 20;

/// What would be allowed, or was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// As in `allow`.
    pub pattern: String,
    /// Jobs that it is of.
    pub jobs: u64,
    /// Connections that were made, or refused.
    pub connections: u64,
    /// Bytes of both ways.
    pub bytes: u64,
}

/// The list for a class.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suggestion {
    /// The class.
    pub class: String,
    /// Over so many days.
    pub days: u32,
    /// Jobs of the class that have ended in that time and are still kept.
    pub jobs: u64,
    /// Of them, those that may have reached more than is kept of them.
    pub incomplete: u64,
    /// What they have reached, what most jobs need first.
    pub allow: Vec<Row>,
    /// What they were refused, likewise; at most 20.
    pub refused: Vec<Row>,
}

/// Jobs that go in one after the other.
#[derive(Debug, Default)]
pub struct Reached {
    jobs: u64,
    incomplete: u64,
    made: BTreeMap<Place, Sum>,
    refused: BTreeMap<Place, Sum>,
}

/// A name or an address, and a port; 0: any.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Name(String, u16),
    Below(String, u16),
    Address(IpAddr, u16),
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    jobs: u64,
    connections: u64,
    bytes: u64,
}

impl Place {
    fn of(to: &Destination) -> Option<Self> {
        match (&to.name, to.address) {
            (Some(name), _) => Some(Self::Name(name.clone(), to.port)),
            (None, Some(address)) => Some(Self::Address(address, to.port)),
            (None, None) => None,
        }
    }

    fn pattern(&self) -> String {
        let (host, port) = match self {
            Self::Name(name, port) => (name.clone(), port),
            Self::Below(name, port) => (format!("*.{name}"), port),
            Self::Address(IpAddr::V6(address), port) if *port != 0 => (format!("[{address}]"), port),
            Self::Address(address, port) => (address.to_string(), port),
        };
        if *port == 0 { host } else { format!("{host}:{port}") }
    }
}

impl Sum {
    fn add(&mut self, connections: u64, bytes: u64) {
        self.connections = self.connections.saturating_add(connections);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// The domain that a `*.domain` for this name would name; `None`: it would be everybody's. Below a country's top level a
/// second label (`co.uk`) may be a registry's, too.
fn domain(name: &str) -> Option<&str> {
    let (_, domain) = name.split_once('.')?;
    let labels = domain.split('.').count();
    let country = domain.rsplit('.').next().is_some_and(|last| last.len() == 2);
    (labels >= if country { 3 } else { 2 }).then_some(domain)
}

impl Reached {
    /// Adds what a job has reached.
    pub fn add(&mut self, end: &End) {
        self.jobs += 1;
        self.incomplete +=
            u64::from(end.reached.len() >= DESTINATIONS_MAX || end.reached.iter().any(Destination::is_rest));
        let gitlab = url::Url::parse(&end.gitlab).ok().and_then(|url| Some(url.host_str()?.to_owned()));
        let (mut made, mut refused) = (BTreeSet::new(), BTreeSet::new());
        for to in &end.reached {
            let Some(place) = Place::of(to).filter(|_| to.name.is_none() || to.name != gitlab) else { continue };
            if to.connections > 0 {
                let sum = self.made.entry(place.clone()).or_default();
                sum.add(to.connections, to.up.saturating_add(to.down));
                sum.jobs += u64::from(made.insert(place.clone()));
            }
            if to.refused > 0 {
                let sum = self.refused.entry(place.clone()).or_default();
                sum.add(to.refused, 0);
                sum.jobs += u64::from(refused.insert(place));
            }
        }
    }

    /// The list.
    #[must_use]
    pub fn suggest(self, class: &str, days: u32) -> Suggestion {
        let mut names: BTreeMap<(&str, u16), usize> = BTreeMap::new();
        for place in self.made.keys() {
            if let Place::Name(name, port) = place
                && let Some(domain) = domain(name)
            {
                *names.entry((domain, *port)).or_default() += 1;
            }
        }
        let whole = |place: &Place| match place {
            Place::Name(name, port) => {
                let domain =
                    domain(name).filter(|of| names.get(&(*of, *port)).is_some_and(|n| *n >= NAMES_OF_A_DOMAIN));
                domain.map_or_else(|| place.clone(), |domain| Place::Below(domain.to_owned(), *port))
            }
            other => other.clone(),
        };
        let mut allow: BTreeMap<Place, Sum> = BTreeMap::new();
        for (place, sum) in &self.made {
            let into = allow.entry(whole(place)).or_default();
            into.add(sum.connections, sum.bytes);
            // Of several names of a domain, no more than this is known.
            into.jobs = into.jobs.max(sum.jobs);
        }
        Suggestion {
            class: class.to_owned(),
            days,
            jobs: self.jobs,
            incomplete: self.incomplete,
            allow: rows(allow, PATTERNS_MAX),
            refused: rows(self.refused, REFUSED_MAX),
        }
    }
}

fn rows(of: BTreeMap<Place, Sum>, most: usize) -> Vec<Row> {
    let mut rows: Vec<Row> = of
        .into_iter()
        .map(|(place, Sum { jobs, connections, bytes })| Row { pattern: place.pattern(), jobs, connections, bytes })
        .collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.jobs, row.connections)));
    rows.truncate(most);
    rows
}

impl Suggestion {
    /// As it could stand in the configuration, with what there is to know in comments.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("# Of {} jobs of class `{}` in the last {} days", self.jobs, self.class, self.days);
        let mut line = |words: std::fmt::Arguments<'_>| {
            // Writing into a text does not fail.
            let _ = text.write_fmt(words);
            text.push('\n');
        };
        line(format_args!(". GitLab and its registry are allowed in any case."));
        if self.incomplete > 0 {
            line(format_args!("# {} of them may have reached more than is kept of them.", self.incomplete));
        }
        line(format_args!("[class.egress]\nmode = \"enforce\"\nallow = ["));
        for row in &self.allow {
            // A name has no character that would have to be escaped.
            line(format_args!(
                "    \"{}\", # {} jobs, {} connections, {} KiB",
                row.pattern,
                row.jobs,
                row.connections,
                row.bytes.div_ceil(1024)
            ));
        }
        line(format_args!("]"));
        for row in &self.refused {
            line(format_args!("# Refused, {} times of {} jobs: {}", row.connections, row.jobs, row.pattern));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::{clock, end};
    use dayfly_egress::policy::Pattern;

    fn to(name: Option<&str>, port: u16, connections: u64) -> Destination {
        let address = Some(IpAddr::from([192, 0, 2, 7]));
        Destination { name: name.map(str::to_owned), port, address, connections, down: 1000, ..Destination::default() }
    }

    fn suggested(jobs: &[Vec<Destination>]) -> Suggestion {
        let mut reached = Reached::default();
        for (id, destinations) in (1..).zip(jobs) {
            reached.add(&End { reached: destinations.clone(), ..end(id, &clock()) });
        }
        reached.suggest("small", 7)
    }

    #[test]
    fn what_jobs_have_reached_is_a_list_that_would_let_them() {
        let pypi = || to(Some("pypi.org"), 443, 2);
        let refused = Destination { refused: 3, ..to(Some("db.corp"), 5432, 0) };
        let asked = Destination { refused: 1, ..to(Some("meta.example"), 0, 0) };
        let found = suggested(&[
            vec![pypi(), to(None, 9418, 1), refused, asked, to(Some("gitlab.example"), 443, 9)],
            vec![pypi(), to(Some("nobody.example"), 80, 0)],
            vec![],
        ]);
        let allow: Vec<_> = found.allow.iter().map(|row| (row.pattern.as_str(), row.jobs, row.connections)).collect();
        assert_eq!(allow, [("pypi.org:443", 2, 4), ("192.0.2.7:9418", 1, 1)]);
        let refused: Vec<_> = found.refused.iter().map(|row| (row.pattern.as_str(), row.connections)).collect();
        assert_eq!(refused, [("db.corp:5432", 3), ("meta.example", 1)]);
        assert_eq!((found.jobs, found.incomplete), (3, 0));
        // It is a configuration.
        let config = format!("[[class]]\nname = \"small\"\nimage = \"i\"\n{}", found.text());
        let document: toml_edit::DocumentMut = config.parse().unwrap();
        let allow = document["class"][0]["egress"]["allow"].as_array().unwrap();
        assert!(allow.iter().all(|one| one.as_str().unwrap().parse::<Pattern>().is_ok()) && allow.len() == 2);
    }

    #[test]
    fn many_names_of_a_domain_are_one_pattern_unless_the_domain_is_everybodys() {
        let many = |domain: &str| (0..5).map(|n| to(Some(&format!("h{n}.{domain}")), 443, 1)).collect::<Vec<_>>();
        let of = |domain: &str| suggested(&[many(domain)]).allow.len();
        assert_eq!(suggested(&[many("cdn.example")]).allow[0].pattern, "*.cdn.example:443");
        assert_eq!((of("cdn.example"), of("example"), of("co.uk"), of("corp.co.uk")), (1, 5, 5, 1));
        assert_eq!(suggested(&[many("cdn.example").split_off(1)]).allow.len(), 4, "few are named");
        let whole = (1..).take(DESTINATIONS_MAX).map(|port| to(None, port, 1)).collect();
        assert_eq!(suggested(&[whole]).incomplete, 1);
    }
}
