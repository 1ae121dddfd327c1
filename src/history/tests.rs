//! The store on the host's files: bounds, restarts, damage.

use super::*;
use crate::clock::Clock;
use crate::files::RealFiles;
use std::path::Path;
use std::sync::Arc;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn bounds() -> Bounds {
    Bounds { keep: 7 * DAY, jobs: 3, bytes: 1 << 20 }
}

async fn open(dir: &Path, clock: &Clock, bounds: Bounds) -> History {
    History::open(Arc::new(RealFiles), clock.clone(), dir, bounds).await
}

pub(super) fn clock() -> Clock {
    Clock::simulated("2026-01-02T00:00:00Z".parse().unwrap())
}

pub(super) fn end(id: u64, clock: &Clock) -> End {
    let now = clock.now();
    End {
        version: VERSION,
        runner: "ci".into(),
        id: JobId(id),
        gitlab: "https://gitlab.example/".into(),
        project: "group/app".into(),
        name: "test".into(),
        class: "small".into(),
        received: now,
        ended: now,
        verdict: Outcome::Failed,
        failure_reason: Some("script_failure".into()),
        exit_code: Some(3),
        why: None,
        at_gitlab: AtGitlab::All,
        log_bytes: 1000,
        machine: None,
        steps: vec![Step { what: "disk ready".into(), at_ms: 120 }],
        cache: Vec::new(),
        reached: Vec::new(),
        console_rows: 1,
        console: Some(format!("row of {id}\n")),
    }
}

fn ids(history: &History) -> Vec<u64> {
    history.newest(100).iter().map(|end| end.id.0).collect()
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("ended")).map(Iterator::count).unwrap_or(0)
}

/// Keeps jobs 1 to `last`, one after the other.
async fn keep(history: &History, clock: &Clock, last: u64) {
    for id in 1..=last {
        clock.jump(true, Duration::from_secs(1));
        history.keep(end(id, clock), &format!("abc-{id}")).await;
    }
}

#[tokio::test]
async fn ends_are_kept_newest_first_and_over_a_restart() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let history = open(dir.path(), &clock, bounds()).await;
    keep(&history, &clock, 2).await;
    for history in [history, open(dir.path(), &clock, bounds()).await] {
        assert_eq!(ids(&history), [2, 1]);
        assert!(history.newest(1)[0].console.is_none(), "lists go without");
        let found = history.find(JobId(1), "ci").await.unwrap();
        assert_eq!((found.console.as_deref(), found.steps.len()), (Some("row of 1\n"), 1));
        assert_eq!(history.runners(JobId(1)), ["ci".to_owned()].into());
        assert!(history.find(JobId(1), "other").await.is_none() && history.runners(JobId(9)).is_empty());
    }
    let mode = std::os::unix::fs::PermissionsExt::mode;
    assert_eq!(mode(&std::fs::metadata(dir.path().join("ended")).unwrap().permissions()) & 0o777, 0o700);
}

#[tokio::test]
async fn number_bytes_and_age_are_bounded_and_the_oldest_go_first() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let history = open(dir.path(), &clock, bounds()).await;
    keep(&history, &clock, 5).await;
    assert_eq!((ids(&history), files(dir.path())), (vec![5, 4, 3], 3));
    // Fewer after a reload, from the next end on.
    let one = std::fs::read_dir(dir.path().join("ended")).unwrap().next().unwrap().unwrap().metadata().unwrap().len();
    history.set_bounds(Bounds { bytes: one + one / 2, ..bounds() });
    history.prune().await;
    assert_eq!((ids(&history), files(dir.path())), (vec![5], 1), "each has {one} bytes");
    clock.jump(true, 8 * DAY);
    history.prune().await;
    assert_eq!((ids(&history).len(), files(dir.path())), (0, 0));
    // And of what another daemon has left.
    keep(&history, &clock, 3).await;
    clock.jump(true, 8 * DAY);
    assert!(ids(&open(dir.path(), &clock, bounds()).await).is_empty());
    assert_eq!(files(dir.path()), 0);
    let none = open(dir.path(), &clock, Bounds { jobs: 0, ..bounds() }).await;
    keep(&none, &clock, 2).await;
    assert_eq!((ids(&none).len(), files(dir.path())), (0, 0));
}

/// E15: a crash leaves no half of a file, and the same end once more changes nothing; what a disk has damaged is left
/// out, and what a newer dayfly has written is left alone.
#[tokio::test]
async fn damage_costs_one_end_and_a_newer_file_stays() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let history = open(dir.path(), &clock, bounds()).await;
    keep(&history, &clock, 2).await;
    let again = End { console: None, verdict: Outcome::Unknown, ..history.newest(1)[0].clone() };
    history.keep(again, "abc-2").await;
    assert_eq!(ids(&history), [2, 1]);
    assert!(history.find(JobId(2), "ci").await.unwrap().console.is_some(), "what is there tells more");
    let ended = dir.path().join("ended");
    std::fs::write(ended.join("9999999999999-torn.json"), "{\"version\":1,\"runner\":\"c").unwrap();
    std::fs::write(ended.join("9999999999999-newer.json"), format!("{{\"version\":{},\"x\":1}}", VERSION + 1)).unwrap();
    let roomy = Bounds { jobs: 10, ..bounds() };
    assert_eq!(ids(&open(dir.path(), &clock, roomy).await), [2, 1]);
    assert!(!ended.join("9999999999999-torn.json").exists() && ended.join("9999999999999-newer.json").exists());
}

/// A disk that takes nothing costs the job nothing.
#[tokio::test]
async fn an_end_that_is_not_taken_is_left_out() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    std::fs::write(dir.path().join("ended"), "no directory").unwrap();
    let history = open(dir.path(), &clock, bounds()).await;
    keep(&history, &clock, 2).await;
    assert!(ids(&history).is_empty());
}

#[test]
fn steps_are_bounded() {
    let mut steps = Vec::new();
    for _ in 0..100 {
        note(&mut steps, &"x".repeat(1000), Duration::from_secs(1));
    }
    assert_eq!((steps.len(), steps[0].what.len(), steps[0].at_ms), (STEPS_MAX, 200, 1000));
}

#[tokio::test]
async fn what_a_class_has_reached_is_read_from_what_is_kept_of_its_jobs() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let history = open(dir.path(), &clock, Bounds { keep: 30 * DAY, ..bounds() }).await;
    let to = |name: &str| Destination { name: Some(name.into()), port: 443, connections: 1, ..Destination::default() };
    for (id, class, name) in [(1, "small", "old.example"), (2, "small", "new.example"), (3, "other", "none.example")] {
        clock.jump(true, 5 * DAY);
        let end = End { class: class.into(), reached: vec![to(name)], ..end(id, &clock) };
        history.keep(end, &format!("abc-{id}")).await;
    }
    assert!(history.newest(1)[0].reached.is_empty(), "lists go without");
    assert_eq!(history.find(JobId(3), "ci").await.unwrap().reached.len(), 1);
    let found = |days| {
        let history = history.clone();
        async move { history.suggest("small", days).await.allow.into_iter().map(|row| row.pattern).collect::<Vec<_>>() }
    };
    assert_eq!(found(7).await, ["new.example:443"]);
    assert_eq!(found(14).await, ["new.example:443", "old.example:443"]);
    assert_eq!(history.suggest("nobody", 7).await.jobs, 0);
}
