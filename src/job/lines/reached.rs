//! What a job has reached outside of its machine, as its author reads it: one collapsed section at the end of the log.

use super::{line, stamp};
use dayfly_egress::audit::Destination;
use jiff::Timestamp;
use std::collections::BTreeMap;

/// Rows of the section at most; what is beyond is summed up in one.
const ROWS_MAX: usize = 40;

/// One row: a name or address, and a port.
#[derive(Clone, Debug, Default)]
struct Row {
    connections: u64,
    refused: u64,
    failed: u64,
    up: u64,
    down: u64,
    reason: Option<String>,
}

impl Row {
    fn add(&mut self, to: &Destination) {
        let sum = |into: &mut u64, count: u64| *into = into.saturating_add(count);
        sum(&mut self.connections, to.connections);
        sum(&mut self.refused, to.refused);
        sum(&mut self.failed, to.failed);
        sum(&mut self.up, to.up);
        sum(&mut self.down, to.down);
        if to.refused > 0 {
            self.reason = to.reason.map(|reason| reason.to_string());
        }
    }

    fn words(&self) -> String {
        let mut words = Vec::new();
        if self.refused > 0 {
            words.push(format!(
                "refused {} times: {}",
                self.refused,
                self.reason.as_deref().unwrap_or("by the egress policy")
            ));
        }
        if self.failed > 0 {
            words.push(format!("{} without an answer", self.failed));
        }
        if self.connections > 0 || words.is_empty() {
            words.push(format!(
                "{} connections, {} sent, {} received",
                self.connections,
                bytes(self.up),
                bytes(self.down)
            ));
        }
        words.join("; ")
    }
}

/// Bytes in the words of people.
fn bytes(count: u64) -> String {
    let mut unit = 0;
    let mut rest = count;
    while rest >= 10_240 && unit < 3 {
        rest /= 1024;
        unit += 1;
    }
    format!("{rest} {}", ["B", "KiB", "MiB", "GiB"][unit])
}

/// The first `most` of what is sorted, refused ones first, and the rest. Those have no more than half of the room where
/// others want it: a job that tries a thousand addresses does not hide what it did reach.
pub(in crate::job) fn told<T>(sorted: Vec<T>, most: usize, is_refused: impl Fn(&T) -> bool) -> (Vec<T>, Vec<T>) {
    let refused = sorted.iter().filter(|one| is_refused(one)).count();
    let others = sorted.len() - refused;
    let of_refused = refused.min((most / 2).max(most.saturating_sub(others)));
    let mut left = [of_refused, most - of_refused];
    sorted.into_iter().partition(|one| {
        let left = &mut left[usize::from(!is_refused(one))];
        let is_told = *left > 0;
        *left = left.saturating_sub(1);
        is_told
    })
}

/// The section; empty if nothing was reached, or tried. What was refused comes first, then what most bytes went to.
#[must_use]
pub(in crate::job) fn reached(now: Timestamp, sections: bool, destinations: &[Destination]) -> String {
    let mut rows: BTreeMap<(String, u16), Row> = BTreeMap::new();
    for to in destinations {
        let of = match (&to.name, to.address) {
            (Some(name), _) => name.clone(),
            (None, Some(address)) => address.to_string(),
            (None, None) => "others".to_owned(),
        };
        rows.entry((of, to.port)).or_default().add(to);
    }
    if rows.is_empty() {
        return String::new();
    }
    let mut rows: Vec<_> = rows.into_iter().collect();
    rows.sort_by_key(|(_, row)| std::cmp::Reverse((row.refused > 0, row.up.saturating_add(row.down))));
    let title = "\x1b[0K\x1b[36;1mdayfly: what this job reached\x1b[0;m";
    let mut text = if sections {
        let start = format!("section_start:{}:dayfly_reached[collapsed=true]\r\x1b[0K", now.as_second());
        format!("{}{} 00O+{title}\n", line(now, &start), stamp(now))
    } else {
        line(now, title)
    };
    let (rows, beyond) = told(rows, ROWS_MAX, |(_, row)| row.refused > 0);
    for ((of, port), row) in &rows {
        let port = if *port == 0 { String::new() } else { format!(":{port}") };
        text.push_str(&line(now, &format!("  {of}{port}  {}", row.words())));
    }
    if !beyond.is_empty() {
        let sum = |of: fn(&Row) -> u64| beyond.iter().fold(0_u64, |sum, (_, row)| sum.saturating_add(of(row)));
        let rest = Row {
            connections: sum(|row| row.connections),
            refused: sum(|row| row.refused),
            failed: sum(|row| row.failed),
            up: sum(|row| row.up),
            down: sum(|row| row.down),
            reason: None,
        };
        text.push_str(&line(now, &format!("  and {} more  {}", beyond.len(), rest.words())));
    }
    if sections {
        text.push_str(&line(now, &format!("section_end:{}:dayfly_reached\r\x1b[0K", now.as_second())));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::lines::tests::now;
    use dayfly_egress::policy::{Reason, Special};

    fn to(name: &str, port: u16) -> Destination {
        Destination { name: Some(name.into()), port, ..Destination::default() }
    }

    #[test]
    fn what_was_refused_leaves_room_for_what_was_reached() {
        // Below ten: refused.
        let sorted = |refused: u32, others: u32| (0..refused).chain(10..10 + others).collect::<Vec<_>>();
        let told = |refused, others| told(sorted(refused, others), 4, |one| *one < 10);
        assert_eq!(told(6, 6), (vec![0, 1, 10, 11], vec![2, 3, 4, 5, 12, 13, 14, 15]));
        assert_eq!(told(6, 1), (vec![0, 1, 2, 10], vec![3, 4, 5]));
        assert_eq!(told(1, 6), (vec![0, 10, 11, 12], vec![13, 14, 15]));
        assert_eq!(told(1, 2), (vec![0, 10, 11], vec![]));
    }

    #[test]
    fn what_was_refused_comes_first_and_addresses_of_one_name_are_one_row() {
        let one = |address: &str, down| Destination {
            address: Some(address.parse().unwrap()),
            connections: 1,
            up: 100,
            down,
            ..to("deb.debian.org", 443)
        };
        let refused =
            Destination { refused: 2, reason: Some(Reason::Special(Special::Private)), ..to("db.corp", 5432) };
        let destinations = [
            one("192.0.2.1", 50_000),
            one("192.0.2.2", 50_000),
            refused,
            Destination { failed: 1, ..to("a.example", 80) },
        ];
        let text = reached(now(), true, &destinations);
        let rows: Vec<&str> = text.lines().map(|line| &line[32..]).collect();
        assert!(rows[0].starts_with("section_start:1767355391:dayfly_reached[collapsed=true]"), "{text}");
        assert_eq!(
            rows[2..5],
            [
                "  db.corp:5432  refused 2 times: it is a private address, which the egress policy does not list",
                "  deb.debian.org:443  2 connections, 200 B sent, 97 KiB received",
                "  a.example:80  1 without an answer",
            ]
        );
        assert!(rows[5].starts_with("section_end:1767355391:dayfly_reached"), "{text}");
        assert!(!reached(now(), false, &destinations).contains("section_"));
        assert_eq!(reached(now(), true, &[]), "");
    }

    #[test]
    fn a_job_that_reaches_the_whole_world_fills_no_log() {
        let many: Vec<_> =
            (0..1000).map(|n| Destination { connections: 1, up: n, ..to(&format!("h{n}.example"), 443) }).collect();
        let text = reached(now(), true, &many);
        assert_eq!(text.lines().count(), 3 + ROWS_MAX + 1);
        assert!(text.contains("h999.example") && text.contains("  and 960 more  960 connections"), "{text}");
    }
}
