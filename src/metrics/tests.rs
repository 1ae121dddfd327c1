//! What the texts hold, and how the two forms differ.

use super::*;
use std::time::Duration;

/// One of everything.
pub(crate) fn full() -> (Metrics, Snapshot) {
    let metrics = Metrics::new();
    metrics.guest().refused.inc("other_job");
    metrics.guest().trace_bytes.inc_by(7);
    metrics.job().begin_runner("ci");
    metrics.job().ended("ci", "success");
    metrics.job().phase(Phase::Overlay, Duration::from_millis(70));
    metrics.job().boot_step("disk ready", Duration::from_secs(1));
    metrics.gitlab().request("ci", Some(204));
    metrics.gitlab().request("ci", None);
    let usage = |promised| Usage { promised, bound: Some(2 * promised) };
    let snapshot = Snapshot {
        version: "0.1.0",
        started_s: 1_767_312_000.5,
        draining: false,
        problems: 1,
        jobs: usage(1),
        cpus: Usage { promised: 2, bound: None },
        memory_bytes: usage(2048 << 20),
        disk_bytes: usage(20 << 30),
        runners: vec![RunnerGauges {
            name: "ci".into(),
            blocked: Some("disk"),
            answered_s: Some(3.0),
            unanswered_s: 0.0,
        }],
        jobs_by_state: vec![("ci".into(), "running")],
        machines: vec![("running", 1)],
        cache: Some((3 << 30, 20 << 30)),
        images: vec![ImageTime { name: "debian".into(), age_s: 86_400.0 }],
    };
    (metrics, snapshot)
}

/// U19: what an operator's alert rules stand on: each thing has its metric, its prefix and its labels.
#[test]
fn the_text_names_each_metric_with_its_prefix_and_labels() {
    let (metrics, snapshot) = full();
    let text = metrics.text(&snapshot, Form::Open);
    for line in [
        "dayfly_guest_requests_refused_total{reason=\"other_job\"} 1\n",
        "dayfly_guest_trace_bytes_total 7\n",
        "dayfly_jobs_ended_total{runner=\"ci\",verdict=\"success\"} 1\n",
        "dayfly_jobs_ended_total{runner=\"ci\",verdict=\"failed\"} 0\n",
        "dayfly_job_phase_seconds_bucket{le=\"0.1\",phase=\"overlay\"} 1\n",
        "dayfly_job_phase_seconds_count{phase=\"clean-up\"} 0\n",
        "dayfly_gitlab_requests_total{runner=\"ci\",status=\"204\"} 1\n",
        "dayfly_gitlab_requests_total{runner=\"ci\",status=\"none\"} 1\n",
        "dayfly_polls_blocked{runner=\"ci\",reason=\"disk\"} 1\n",
        "dayfly_polls_blocked{runner=\"ci\",reason=\"room\"} 0\n",
        "dayfly_gitlab_answered_seconds{runner=\"ci\"} 3.0\n",
        "dayfly_gitlab_unanswered_seconds{runner=\"ci\"} 0.0\n",
        "dayfly_room_memory_promised_bytes 2147483648\n",
        "dayfly_room_memory_bound_bytes 4294967296\n",
        "dayfly_room_cpus_promised 2\n",
        "dayfly_jobs{runner=\"ci\",state=\"running\"} 1\n",
        "dayfly_machines{state=\"running\"} 1\n",
        "dayfly_image_age_seconds{image=\"debian\"} 86400.0\n",
        "dayfly_build_info{version=\"0.1.0\",arch=\"x86_64\"} 1\n",
        "dayfly_uploader_backlog_bytes 0\n",
    ] {
        assert!(text.contains(line), "no {line:?} in\n{text}");
    }
    assert!(!text.contains("room_cpus_bound"), "what has no bound shows none:\n{text}");
    assert!(text.ends_with("# EOF\n"));
    assert_eq!(text.matches("# EOF").count(), 1);
}

/// In the older format a counter's family has its suffix, and nothing is there that only OpenMetrics knows.
#[test]
fn the_classic_text_has_the_same_samples_under_names_that_old_readers_know() {
    let (metrics, snapshot) = full();
    let (open, classic) = (metrics.text(&snapshot, Form::Open), metrics.text(&snapshot, Form::Classic));
    let samples = |text: &str| {
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(samples(&open), samples(&classic));
    assert!(classic.contains("# TYPE dayfly_jobs_ended_total counter\n"), "{classic}");
    assert!(classic.contains("# TYPE dayfly_build_info gauge\n"), "{classic}");
    assert!(!classic.contains("EOF") && !classic.contains("# UNIT"), "{classic}");
    for line in classic.lines() {
        assert!(!line.starts_with('#') || line.starts_with("# HELP ") || line.starts_with("# TYPE "), "{line}");
    }
}

/// A status that a server makes up adds no label of its own.
#[test]
fn statuses_that_are_none_share_a_label() {
    let metrics = Metrics::new();
    for status in [0, 42, 600, 999] {
        metrics.gitlab().request("ci", Some(status));
    }
    let text = metrics.text(&Snapshot::default(), Form::Open);
    assert!(text.contains("dayfly_gitlab_requests_total{runner=\"ci\",status=\"other\"} 4\n"), "{text}");
}
