//! Disks that fill, fail and lie: of machines, of the journal, of one job among others.

use crate::support::world::{World, paused};
use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{JobState, Route};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// H7: the disk under one machine fails in mid-job; its neighbour keeps its own.
#[tokio::test(start_paused = true)]
async fn a_disk_that_fills_under_one_machine_costs_its_neighbour_nothing() {
    let mut world = World::new(1);
    world.expect_trouble(&["the host's disk failed or is full", "a machine was stopped"]);
    let (full, other) = (world.job(&["print begun", "sleep 20", "pause"]), world.job(&["print begun", "sleep 200"]));
    world.start().await.unwrap();
    world.until_failed(full, "runner_system_failure", "the host's disk failed or is full").await;
    world.until(other, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 2);
}

/// The number of the call of the file layer that first writes a job down, learnt from a life without trouble.
fn first_record(seed: u64) -> u64 {
    let mut number = 0;
    paused(async {
        let mut world = World::new(seed);
        let job = world.job(&["print hello"]);
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        let written = |line: &String| line.starts_with("replace ") && line.ends_with("record.json ok");
        number = world.files.history().iter().position(written).unwrap() as u64 + 1;
        world.assert_clean().await;
    });
    number
}

/// H9: the fsync of a job's record fails: no machine is started for it, and GitLab is told.
/// H6: likewise where there is no room for it, and nothing is left of it.
#[test]
fn a_job_that_cannot_be_written_down_starts_no_machine() {
    let number = first_record(3);
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
        paused(async {
            let mut world = World::new(3);
            world.expect_trouble(&["write an assigned job down"]);
            let job = world.job(&["print hello"]);
            world.files.fail_call(number, kind);
            world.start().await.unwrap();
            world.until_failed(job, "runner_system_failure", "could not write the job down").await;
            assert_eq!(world.machines_started(), 0);
            let found = world.found(job);
            assert!(found.finished_at.unwrap().duration_since(found.started_at.unwrap()).as_secs() <= 10);
            let next = world.job(&["print next"]);
            world.until(next, JobState::Success).await;
            world.assert_clean().await;
        });
    }
}

/// The record of this job.
fn record_of(world: &World, job: JobId) -> PathBuf {
    let ends = format!("-{job}/record.json");
    let all = world.files.paths_below(Path::new("/state"));
    all.into_iter().find(|path| path.to_string_lossy().ends_with(&ends)).unwrap()
}

/// E13: a damaged record is set aside, its machine is an orphan and reaped, and the other job goes on.
#[test]
fn a_damaged_record_costs_its_own_job_and_no_other() {
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let damages: [(&str, Damage); 5] = [
        ("truncated", |bytes| bytes[..bytes.len() / 2].to_vec()),
        ("empty", |_| Vec::new()),
        ("zeros", |bytes| vec![0; bytes.len()]),
        ("a bit flipped", |mut bytes| {
            bytes[0] ^= 0x10;
            bytes
        }),
        ("another file", |_| b"\x7fELF and so on".to_vec()),
    ];
    for (kind, damage) in damages {
        paused(async {
            let mut world = World::new(1);
            // The dead daemon's tasks cannot be killed: they may say that they hear nothing, and do nothing.
            world.expect_trouble(&["a damaged record was set aside", "belongs to no job", "the guest went silent"]);
            let (damaged, other) =
                (world.job(&["print begun", "sleep 100"]), world.job(&["print begun", "sleep 100", "print ended"]));
            world.start().await.unwrap();
            for job in [damaged, other] {
                world.until_trace(job, "begun").await;
            }
            world.kill();
            let path = record_of(&world, damaged);
            let bytes = world.files.read(&path, 1 << 20).await.unwrap();
            world.files.replace(&path, damage(bytes)).await.unwrap();
            world.start().await.unwrap();
            assert_eq!(world.hypervisor.vms().len(), 1, "{kind}: its machine is gone");
            world.until(other, JobState::Success).await;
            assert!(world.trace(other).ends_with("begun\nended\nJob succeeded\n"), "{}", world.trace(other));
            // Nobody knows the job's token any more: GitLab gives it up.
            world.until(damaged, JobState::Failed).await;
            let aside = world.files.paths_below(Path::new("/state/set-aside"));
            let name = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
            assert!(aside.iter().any(|kept| kept.to_str().unwrap().contains(name)), "{kind}: {aside:?}");
            assert!(world.log.text().contains("/state/set-aside/"), "{kind}: named in the log");
            world.files.remove(Path::new("/state/set-aside")).await.unwrap();
            world.assert_clean().await;
        });
    }
}

/// H10: the jobs of one image wait while it is missing; those of another go on, and it is looked for again.
#[tokio::test(start_paused = true)]
async fn a_missing_image_costs_its_own_runner_only() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for"]);
    let mut other = world.config.class[0].clone();
    (other.name, other.image) = ("other".into(), "missing".into());
    world.config.class.push(other);
    world.add_runner("second");
    world.config.runner[1].class = "other".into();
    let jobs = [world.job(&["print one"]), world.job(&["print two"])];
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    let asked = world.requests(Route::RequestJob);
    let token = |request: &dayfly_exec::standin::Recorded| request.headers.get("runner-token").cloned();
    assert!(asked.iter().all(|request| token(request) == token(&asked[0])), "only one runner asks");
    assert_eq!(world.status().daemon.problems.len(), 1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.status().daemon.problems.len(), 1);
    world.assert_clean().await;
}

/// U27: a guest complains for ever, and says a verdict again and again that no disk takes: the log has ten lines of
/// each, and their number when the job is over.
#[tokio::test(start_paused = true)]
async fn the_log_tells_ten_times_what_a_guest_says_to_its_job() {
    let mut world = World::new(1);
    let kinds = ["guest could not do its part", "keep the guest's verdict"];
    world.expect_trouble(&kinds);
    world.expect_trouble(&[
        "no job is asked for",
        "of these lines the log has",
        "the host's disk failed or is full",
        "write the job's record",
        "not on disk",
    ]);
    let complaints = ["report failed too little room"; 15];
    let script = [&["print begun"][..], &complaints, &["sleep 2"], &complaints, &["print ended", "sleep 100"]].concat();
    let job = world.job(&script);
    world.start().await.unwrap();
    world.until_trace(job, "ended").await;
    world.files.fail_replaces(Some(io::ErrorKind::StorageFull));
    tokio::time::sleep(Duration::from_secs(200)).await;
    world.files.fail_replaces(None);
    world.until(job, JobState::Failed).await;
    for kind in kinds {
        let text = world.log.text();
        let lines = text.lines().filter(|line| line.contains(kind) && !line.contains("of these lines")).count();
        assert_eq!(lines, 10, "{kind}: {text}");
    }
    world.assert_clean().await;
    let text = world.log.text();
    for (kind, times) in kinds.into_iter().zip([30, 20]) {
        let total = |line: &&str| line.contains("of these lines") && line.contains(kind);
        let total = text.lines().find(total).unwrap_or_else(|| panic!("no total of {kind}: {text}"));
        assert!(total.ends_with(&format!("times={times}")) && total.contains(&format!("job={job}")), "{total}");
    }
}
