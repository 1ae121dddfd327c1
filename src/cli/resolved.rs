//! Which names that jobs may reach does this host not know? A list with a slip in it lets nobody through, and says nothing.

use crate::config::Config;
use dayfly_egress::policy::{Pattern, To};
use std::collections::BTreeSet;
use std::net::ToSocketAddrs as _;
use std::sync::mpsc;
use std::time::Duration;
use tokio::time::Instant;

/// Names that are looked up at most, each by a thread of its own: no list of wildcards and networks has more.
const NAMES_MAX: usize = 64;

/// For all of them together: a person waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// The names in lists of `allow` that cannot be resolved here, each as a sentence with the remedy; nothing of those for
/// which no answer came in time.
pub(super) fn unresolved(config: &Config) -> Vec<String> {
    let rules = config.rule.iter().filter_map(|rule| rule.egress.as_ref()).flat_map(|change| &change.allow);
    let lists = config.class.iter().flat_map(|class| &class.egress.allow).chain(rules);
    missing(&names(lists), |name| (name, 0).to_socket_addrs().is_ok())
}

fn names<'a>(patterns: impl Iterator<Item = &'a Pattern>) -> BTreeSet<String> {
    let exact = |pattern: &'a Pattern| match &pattern.to {
        To::Name(name) => Some(name.clone()),
        To::Gitlab | To::Any | To::Below(_) | To::Net(_) => None,
    };
    patterns.filter_map(exact).take(NAMES_MAX).collect()
}

fn missing(names: &BTreeSet<String>, resolves: fn(&str) -> bool) -> Vec<String> {
    let (found, answers) = mpsc::channel();
    for name in names.iter().cloned() {
        let found = found.clone();
        // Nobody waits for one that takes too long; it ends with the process.
        std::thread::spawn(move || drop(found.send((resolves(&name), name))));
    }
    drop(found);
    let until = Instant::now() + PATIENCE;
    let mut missing = BTreeSet::new();
    while let Ok((resolves, name)) = answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if !resolves {
            missing.insert(name);
        }
    }
    let sentence = |name| {
        format!(
            "`allow` names `{name}`, which this host cannot resolve: no job will reach it; correct it, or take it out"
        )
    };
    missing.into_iter().map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_resolved_are_named_and_nothing_else_is_asked_for() {
        let patterns: Vec<Pattern> =
            ["gitlab", "*", "*.below.example", "10.0.0.0/8:80", "here.example:443", "gone.example"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect();
        let names = names(patterns.iter());
        assert_eq!(names.iter().collect::<Vec<_>>(), ["gone.example", "here.example"]);
        let found = missing(&names, |name| name != "gone.example");
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("`allow` names `gone.example`, which this host cannot resolve"), "{found:?}");
    }
}
