//! Three in the morning: what log, status and metrics say of each trouble, for an hour, and when it has gone.

use crate::metrics::value;
use crate::support::world::World;
use dayfly::daemon::lock;
use dayfly::image::store::ImageStore;
use dayfly::status::RunnerState;
use dayfly_doubles::images;
use dayfly_exec::standin::{Fault, JobState, Matcher, Route};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// Lines of the log in an hour of one trouble: that it comes, and the whole life of the one job that it costs.
const LINES_MAX: usize = 16;

/// One trouble.
struct Night {
    name: &'static str,
    begin: fn(&World),
    end: fn(&World),
    /// Part of the one problem that `dayfly status` names.
    problem: &'static str,
    /// Part of the line that tells that it has come.
    comes: &'static str,
    /// And gone.
    goes: &'static str,
    /// What the alert looks at, and what it must be more than.
    metric: (&'static str, f64),
    alert: &'static str,
}

fn of_gitlab(world: &World, fault: Fault) {
    world.standin.script(Matcher::any().always(), fault);
}

const AWAY: (&str, f64) = ("dayfly_gitlab_unanswered_seconds{runner=\"runner\"}", 300.0);

const NIGHTS: [Night; 8] = [
    Night {
        name: "libvirtd is away",
        begin: |world| world.hypervisor.set_reachable(false),
        end: |world| world.hypervisor.set_reachable(true),
        problem: "runner `runner`: ",
        comes: "no job is asked for",
        goes: "asks for jobs again, after",
        metric: ("dayfly_polls_blocked{runner=\"runner\",reason=\"hypervisor\"}", 0.5),
        alert: "DayflyRunnerBlocked",
    },
    Night {
        name: "the disk is full",
        begin: |world| world.files.set_free_bytes(100 << 20),
        end: |world| world.files.set_free_bytes(500 << 30),
        problem: "at `/state/overlays` 0 GiB are free",
        comes: "no job is asked for",
        goes: "asks for jobs again, after",
        metric: ("dayfly_polls_blocked{runner=\"runner\",reason=\"disk\"}", 0.5),
        alert: "DayflyRunnerBlocked",
    },
    Night {
        name: "the token is revoked",
        begin: |world| world.standin.script(Matcher::on(Route::RequestJob).always(), Fault::status(403)),
        end: |world| world.standin.behave(),
        problem: "GitLab refuses the runner token (status 403)",
        comes: "GitLab refuses this runner",
        goes: "asks for jobs again, after",
        metric: ("dayfly_polls_blocked{runner=\"runner\",reason=\"refused\"}", 0.5),
        alert: "DayflyRunnerRefused",
    },
    Night {
        name: "GitLab answers 502",
        begin: |world| of_gitlab(world, Fault::html(502)),
        end: |world| world.standin.behave(),
        problem: "GitLab at https://gitlab.example/ has not answered for ",
        comes: "GitLab has not answered for 1 min",
        goes: "GitLab answers again after 1 h",
        metric: AWAY,
        alert: "DayflyGitlabAway",
    },
    Night {
        name: "GitLab refuses connections",
        begin: |world| of_gitlab(world, Fault::DropBeforeApply),
        end: |world| world.standin.behave(),
        problem: "GitLab at https://gitlab.example/ has not answered for ",
        comes: "GitLab has not answered for 1 min",
        goes: "GitLab answers again after 1 h",
        metric: AWAY,
        alert: "DayflyGitlabAway",
    },
    Night {
        name: "GitLab limits requests",
        begin: |world| of_gitlab(world, Fault::status(429)),
        end: |world| world.standin.behave(),
        problem: "GitLab at https://gitlab.example/ has limited our requests for ",
        comes: "GitLab has limited our requests for 1 min",
        goes: "GitLab answers again after 1 h",
        metric: AWAY,
        alert: "DayflyGitlabAway",
    },
    Night {
        name: "a login page stands before GitLab",
        begin: |world| of_gitlab(world, Fault::html(200)),
        end: |world| world.standin.behave(),
        problem: "has answered with a page for people or a redirect for ",
        comes: "GitLab has answered with a page for people or a redirect for 1 min",
        goes: "GitLab answers again after 1 h",
        metric: AWAY,
        alert: "DayflyGitlabAway",
    },
    Night {
        name: "the disk is read-only",
        begin: |world| {
            world.files.fail_writes(Some(io::ErrorKind::ReadOnlyFilesystem));
            // What cannot be written is known from the first that is.
            world.job(&["print never"]);
        },
        end: |world| world.files.fail_writes(None),
        problem: "the journal cannot be written",
        comes: "no job is asked for",
        goes: "asks for jobs again, after",
        metric: ("dayfly_polls_blocked{runner=\"runner\",reason=\"journal\"}", 0.5),
        alert: "DayflyRunnerBlocked",
    },
];

/// Lines of INFO and above.
fn lines(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| ["INFO", "WARN", "ERROR"].iter().any(|level| line.trim_start().starts_with(level)))
        .collect()
}

async fn spend(night: &Night) {
    let mut world = World::new(1);
    world.expect_trouble(&[""]);
    world.start().await.unwrap();
    let first = world.job(&["print hello"]);
    world.until(first, JobState::Success).await;
    world.until_idle().await;
    let quiet = world.log.text().len();
    (night.begin)(&world);
    sleep(Duration::from_secs(3600)).await;
    let text = world.log.text();
    let of_the_hour = lines(&text[quiet..]);
    let name = night.name;
    assert!(of_the_hour.len() <= LINES_MAX, "{name}: {} lines:\n{}", of_the_hour.len(), of_the_hour.join("\n"));
    let comes = of_the_hour.iter().filter(|line| line.contains(night.comes)).count();
    assert_eq!(comes, 1, "{name}: {}", of_the_hour.join("\n"));
    let status = world.status();
    assert_eq!(status.daemon.problems.len(), 1, "{name}: {:?}", status.daemon.problems);
    assert!(status.daemon.problems[0].contains(night.problem), "{name}: {:?}", status.daemon.problems);
    // At any instant: what lasts does not flicker.
    for _ in 0..300 {
        assert!(!world.status().daemon.problems.is_empty(), "{name}: {:?}", world.status().runners);
        sleep(Duration::from_millis(97)).await;
    }
    let metrics = world.metrics();
    let (sample, more) = night.metric;
    assert!(value(&metrics, sample).is_some_and(|value| value > more), "{name}: {sample} in\n{metrics}");
    let rules = include_str!("../../packaging/prometheus/dayfly.rules.yml");
    let rule = rules.split("- alert: ").find(|rule| rule.starts_with(night.alert)).unwrap();
    assert!(rule.contains(sample.split('{').next().unwrap()), "{name}: {rule}");
    (night.end)(&world);
    // A refused token is tried again after five minutes.
    sleep(Duration::from_secs(600)).await;
    assert!(world.status().daemon.problems.is_empty(), "{name}: {:?}", world.status().daemon.problems);
    let text = world.log.text();
    assert_eq!(text.matches(night.goes).count(), 1, "{name}: {}", lines(&text[quiet..]).join("\n"));
    assert!(value(&world.metrics(), sample).is_some_and(|value| value <= more), "{name}: {sample}");
    let last = world.job(&["print hello"]);
    world.until(last, JobState::Success).await;
    world.assert_clean().await;
}

/// U19: for each trouble the log has few lines in an hour, the status one problem, and the metric of an alert its value;
/// when it is over the log says so, and the status is clean.
#[test]
fn a_trouble_is_told_when_it_comes_and_when_it_goes() {
    for night in &NIGHTS {
        crate::support::world::paused(spend(night));
    }
}

/// U19: the image goes, and comes back.
#[tokio::test(start_paused = true)]
async fn an_image_that_is_gone_is_told_once() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for"]);
    let there = world.images.clone();
    let dir = tempfile::tempdir().unwrap();
    world.images = Arc::new(ImageStore::new(dir.path()));
    world.start().await.unwrap();
    let quiet = world.log.text().len();
    sleep(Duration::from_secs(3600)).await;
    let text = world.log.text();
    assert!(lines(&text[quiet..]).len() <= 1, "{}", lines(&text[quiet..]).join("\n"));
    assert_eq!(text.matches("no job is asked for").count(), 1);
    let problems = world.status().daemon.problems;
    assert!(problems.len() == 1 && problems[0].contains("dayfly image build test"), "{problems:?}");
    let sample = "dayfly_polls_blocked{runner=\"runner\",reason=\"image\"}";
    assert_eq!(value(&world.metrics(), sample), Some(1.0));
    drop((there, images::image()));
    world.assert_clean().await;
}

/// U19: both of GitLab and libvirtd are away while the only place is taken by a job: both are seen, and the job ends well.
#[tokio::test(start_paused = true)]
async fn two_outages_are_seen_behind_a_runner_that_waits_for_room() {
    let mut world = World::new(1);
    world.expect_trouble(&[""]);
    world.config.concurrent = 1;
    let job = world.job(&["print begun", "sleep 3000", "print ended"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.until_status(|status| matches!(status.runners[0].state, RunnerState::WaitingForRoom { .. })).await;
    world.standin.script(Matcher::any().always(), Fault::html(502));
    world.hypervisor.set_reachable(false);
    sleep(Duration::from_secs(180)).await;
    let status = world.status();
    assert!(matches!(status.runners[0].state, RunnerState::WaitingForRoom { .. }), "{:?}", status.runners);
    let named = |text: &str| status.daemon.problems.iter().any(|problem| problem.contains(text));
    assert!(named("GitLab at https://gitlab.example/ has not answered for"), "{:?}", status.daemon.problems);
    assert!(named("the hypervisor has not answered for"), "{:?}", status.daemon.problems);
    assert!(status.runners[0].outage.as_deref().is_some_and(|outage| outage.contains("502")), "{:?}", status.runners);
    let before = world.log.text().len();
    sleep(Duration::from_secs(1800)).await;
    let text = world.log.text();
    assert!(lines(&text[before..]).len() <= LINES_MAX, "{}", lines(&text[before..]).join("\n"));
    world.standin.behave();
    world.hypervisor.set_reachable(true);
    world.until(job, JobState::Success).await;
    world.until_status(|status| status.daemon.problems.is_empty()).await;
    assert!(
        world.log.text().contains("the hypervisor answers again after 3"),
        "{}",
        lines(&world.log.text()).join("\n")
    );
    world.assert_clean().await;
}

/// U19: what keeps several runners from jobs is one problem, and names them.
#[tokio::test(start_paused = true)]
async fn what_keeps_several_runners_is_one_problem() {
    let mut world = World::new(1);
    world.expect_trouble(&["GitLab has not answered for 1 min", "no job is asked for"]);
    world.add_runner("second");
    world.start().await.unwrap();
    sleep(Duration::from_secs(30)).await;
    world.standin.script(Matcher::any().always(), Fault::html(502));
    sleep(Duration::from_secs(180)).await;
    let problems = world.status().daemon.problems;
    assert!(problems.len() == 1 && problems[0].ends_with(" (runners `runner`, `second`)"), "{problems:?}");
    world.standin.behave();
    world.until_status(|status| status.daemon.problems.is_empty()).await;
    world.files.set_free_bytes(100 << 20);
    world.until_status(|status| status.runners.iter().all(|r| matches!(r.state, RunnerState::Blocked { .. }))).await;
    let problems = world.status().daemon.problems;
    assert!(problems.len() == 1 && problems[0].starts_with("runners `runner`, `second`: "), "{problems:?}");
    world.files.set_free_bytes(500 << 30);
    world.until_status(|status| status.daemon.problems.is_empty()).await;
    world.assert_clean().await;
}

/// U19: a second daemon is refused in one sentence that names the first, which is none the worse for it.
#[tokio::test(start_paused = true)]
async fn a_second_daemon_costs_the_first_nothing() {
    let mut world = World::new(1);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let _first = lock(dir.path()).unwrap();
    let error = lock(dir.path()).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().starts_with("another dayfly (process "), "{error}");
    world.until(job, JobState::Success).await;
    assert_eq!(world.status().daemon.problems, Vec::<String>::new());
    world.assert_clean().await;
}
