//! What alert rules and dashboard stand on: each metric that they name is one that a daemon has, and each alert has its
//! paragraph for operators. `scripts/promtool` asks Prometheus' own tool the rest.

use dayfly::metrics::{Form, ImageTime, Metrics, Phase, RunnerGauges, Snapshot, Usage};
use std::collections::BTreeSet;
use std::time::Duration;

fn read(path: &str) -> String {
    std::fs::read_to_string(std::path::Path::new(super::ROOT).join(path)).unwrap()
}

/// The metrics of a daemon with one of everything.
fn metrics() -> String {
    let metrics = Metrics::new();
    metrics.job().begin_runner("ci");
    metrics.job().phase(Phase::Run, Duration::from_secs(1));
    metrics.job().boot_step("hand-out", Duration::from_secs(1));
    metrics.job().start("restored", Duration::from_secs(1));
    metrics.gitlab().request("ci", Some(204));
    let guest = metrics.guest();
    let labelled = [&guest.greetings_failed, &guest.connections_closed, &guest.sessions_failed, &guest.sessions_ended];
    for labelled in labelled {
        labelled.inc("too_many");
    }
    metrics.guest().requests.inc("trace");
    metrics.guest().refused.inc("rate");
    metrics.guest().cache.inc("hit");
    metrics.guest().begin_forward("apt-cache");
    metrics.clones().jobs.inc("hit");
    metrics.clones().fetches.inc("fetched");
    metrics.clones().wiped.inc("age");
    metrics.job().begin_rule("rest", "deny");
    metrics.egress().count("default", &[]);
    let usage = Usage { promised: 1, bound: Some(2) };
    let snapshot = Snapshot {
        version: "0.1.0",
        started_s: 1_767_312_000.0,
        jobs: usage,
        cpus: usage,
        memory_bytes: usage,
        disk_bytes: usage,
        runners: vec![RunnerGauges { name: "ci".into(), answered_s: Some(1.0), ..RunnerGauges::default() }],
        jobs_by_state: vec![("ci".into(), "running")],
        machines: vec![("running", 1)],
        cache: Some((1, 2)),
        images: vec![ImageTime { name: "debian-12-shell".into(), age_s: 1.0 }],
        ..Snapshot::default()
    };
    metrics.text(&snapshot, Form::Classic)
}

/// Names of ours in a text.
fn names(text: &str) -> BTreeSet<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_word(c)).filter(|word| word.starts_with("dayfly_") && !word.ends_with('_'));
    words.map(str::to_owned).collect()
}

/// Names of samples.
fn samples(metrics: &str) -> BTreeSet<String> {
    let name = |line: &str| line.split(['{', ' ']).next().unwrap_or_default().to_owned();
    metrics.lines().filter(|line| !line.starts_with('#')).map(name).collect()
}

#[test]
fn each_metric_of_a_rule_or_panel_is_one_of_the_daemons() {
    let metrics = metrics();
    // For promtool.
    if let Some(path) = std::env::var_os("DAYFLY_TEST_METRICS") {
        std::fs::write(path, &metrics).unwrap();
    }
    let samples = samples(&metrics);
    for file in ["dayfly.rules.yml", "dayfly.rules.test.yml", "dayfly.dashboard.json"] {
        let named = names(&read(&format!("packaging/prometheus/{file}")));
        let unknown: Vec<_> = named.difference(&samples).collect();
        assert!(named.len() > 5 && unknown.is_empty(), "{file} names {unknown:?}; there are {samples:?}");
    }
}

#[test]
fn each_metric_that_the_operators_page_names_is_one_of_the_daemons() {
    let metrics = metrics();
    let families: BTreeSet<String> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect();
    let known: BTreeSet<String> = families.union(&samples(&metrics)).cloned().collect();
    let named = names(&read("docs/operators.md"));
    let unknown: Vec<_> = named.difference(&known).collect();
    assert!(unknown.is_empty(), "docs/operators.md names {unknown:?}");
    let untold: Vec<_> = families.iter().filter(|name| !named.contains(*name) && !name.contains("_guest_")).collect();
    assert!(untold.is_empty(), "docs/operators.md does not name {untold:?}");
}

#[test]
fn each_alert_has_its_paragraph_for_operators() {
    let (rules, page) = (read("packaging/prometheus/dayfly.rules.yml"), read("docs/operators.md"));
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in &alerts {
        let paragraph = page.lines().find(|line| line.starts_with(&format!("**{alert}**")));
        assert!(paragraph.is_some_and(|line| line.len() > 40), "docs/operators.md has no paragraph **{alert}**");
    }
    for line in page.lines().filter(|line| line.starts_with("**Dayfly")) {
        let name = line.trim_start_matches('*').split('*').next().unwrap();
        assert!(alerts.contains(&name), "docs/operators.md tells of {name}, which is no alert");
    }
}

#[test]
fn the_dashboard_is_json_whose_panels_do_not_overlap() {
    let dashboard: serde_json::Value =
        serde_json::from_str(&read("packaging/prometheus/dayfly.dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut taken = BTreeSet::new();
    for panel in panels {
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            assert!(x < 24 && taken.insert((x, at("y"))), "{}", panel["title"]);
        }
    }
    assert!(panels.len() >= 10);
}
