//! What needs a person? A sentence each, whatever else holds.
//!
//! What keeps several runners is one problem, named once. What a part of the daemon can see by itself (GitLab's silence on
//! any call, the hypervisor's) is said even where pollers wait for something else meanwhile.

use super::wiring::View;
use crate::gitlab::PATIENCE;
use crate::metrics::Metrics;
use crate::status::RunnerState;
use crate::supply::Supply;
use crate::telemetry::lasting;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// All that needs a person now. `not_served`: why nothing serves the status.
pub(super) fn problems(
    runners: &[View],
    supply: &Supply,
    metrics: &Metrics,
    not_served: Option<String>,
) -> Vec<String> {
    let mut problems = outages(runners);
    let mut by_reason: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut no_hypervisor = false;
    for view in runners {
        let poller = view.poller.borrow();
        no_hypervisor |= poller.blocked == Some("hypervisor");
        let reason = match &poller.state {
            RunnerState::Refused { error } => error,
            RunnerState::Blocked { reason } => reason,
            // An outage is a problem of its own.
            RunnerState::Retrying { error, .. }
                if view.runner.reach.outage().is_none() && poller.since.elapsed() >= PATIENCE =>
            {
                error
            }
            _ => continue,
        };
        by_reason.entry(reason.clone()).or_default().push(&view.runner.config.name);
    }
    problems.extend(by_reason.into_iter().map(|(reason, runners)| format!("{}: {reason}", named(&runners))));
    if let Some((lasts, why)) = supply.silence().filter(|_| !no_hypervisor) {
        problems.push(format!("the hypervisor has not answered for {}: {why}", lasting(lasts)));
    }
    // Once for all runners of a class.
    let weaker: BTreeSet<String> =
        runners.iter().filter_map(|view| view.poller.borrow().weaker_network.clone()).collect();
    problems.extend(weaker);
    problems.extend(supply.goldens().problem());
    let stuck = metrics.job().machines_stuck.get();
    if stuck > 0 {
        problems.push(format!("{stuck} VMs cannot be taken down, and hold their room until they go; see the log"));
    }
    let waiting = metrics.job().waiting_for_gitlab.get();
    if waiting > 0 {
        problems.push(format!("{waiting} jobs have a log or a verdict that GitLab does not take"));
    }
    problems.extend(not_served.map(|why| format!("status and metrics are not served: {why}")));
    problems
}

/// Images that are older than they may be.
pub(super) fn too_old(ages: &BTreeMap<String, Duration>, max_age: Duration) -> Vec<String> {
    let old = ages.iter().filter(|(_, age)| **age > max_age);
    let sentence = |(name, age): (&String, &Duration)| {
        format!(
            "image `{name}` was made {} ago, longer than `image_max_age`; `dayfly image refresh` builds it anew",
            lasting(*age)
        )
    };
    old.map(sentence).collect()
}

/// GitLabs that do not answer, each once, with the runners that found out.
fn outages(runners: &[View]) -> Vec<String> {
    let mut by_gitlab: BTreeMap<&str, (String, Vec<&str>)> = BTreeMap::new();
    for view in runners {
        let Some(outage) = view.runner.reach.outage().filter(|outage| outage.lasts >= PATIENCE) else { continue };
        let entry =
            by_gitlab.entry(view.runner.config.url.as_str()).or_insert_with(|| (outage.to_string(), Vec::new()));
        entry.1.push(&view.runner.config.name);
    }
    let sentence = |(url, (outage, runners)): (&str, (String, Vec<&str>))| {
        format!("GitLab at {url} {outage} ({})", named(&runners))
    };
    by_gitlab.into_iter().map(sentence).collect()
}

/// `runner `a``, `runners `a`, `b``.
fn named(runners: &[&str]) -> String {
    let names: Vec<_> = runners.iter().map(|name| format!("`{name}`")).collect();
    let word = if names.len() == 1 { "runner" } else { "runners" };
    format!("{word} {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_too_old_is_a_problem_with_its_remedy() {
        let day = Duration::from_secs(86_400);
        let ages = BTreeMap::from([("new".to_owned(), day * 3), ("old".to_owned(), day * 31)]);
        assert_eq!(
            too_old(&ages, day * 30),
            ["image `old` was made 31 d 0 h ago, longer than `image_max_age`; `dayfly image refresh` builds it anew"]
        );
        assert_eq!(too_old(&ages, day * 31), [""; 0]);
    }
}
