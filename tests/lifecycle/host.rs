//! The host's own troubles: images, disks, what is stuck, and what a restart finds of that.

use crate::support::world::{World, paused};
use dayfly::files::Files as _;
use dayfly::image::manifest::MANIFEST_FILE;
use dayfly::image::store::ImageStore;
use dayfly::status::RunnerState;
use dayfly_doubles::fake::{Fault as VmFault, Op, Timing};
use dayfly_doubles::images;
use dayfly_exec::standin::{Fault, JobState, Matcher, Route};
use dayfly_guest_config::{CONTRACT, CONTRACT_OLDEST};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A qcow2 header as QEMU makes it, less what nobody reads here.
fn disk() -> Vec<u8> {
    let mut header = vec![0; 104];
    header[..4].copy_from_slice(b"QFI\xfb");
    (header[7], header[23], header[28]) = (3, 16, 1);
    header
}

/// An image on a real disk, which the world's daemon uses. Its digest is no digest: a file that has
/// been changed is never itself again.
fn image_on_disk(world: &mut World, dir: &Path, name: &str) -> PathBuf {
    let image = dir.join(name);
    std::fs::create_dir_all(&image).unwrap();
    let mut manifest = images::image().manifest;
    manifest.name = name.to_owned();
    manifest.disk.bytes = disk().len() as u64;
    std::fs::write(image.join("disk.qcow2"), disk()).unwrap();
    std::fs::write(image.join(MANIFEST_FILE), manifest.to_text()).unwrap();
    world.images = Arc::new(ImageStore::new(dir));
    image
}

/// H10: a job whose image is gone when it comes fails and names it; another image's jobs run, and so
/// do this one's once it is back.
#[tokio::test(start_paused = true)]
async fn a_job_without_its_image_fails_naming_it_and_others_run() {
    let mut world = World::new(1);
    world.expect_trouble(&["image cannot be used", "image cannot be used", "no job is asked for"]);
    let dir = tempfile::tempdir().unwrap();
    let image = image_on_disk(&mut world, dir.path(), "test");
    image_on_disk(&mut world, dir.path(), "spare");
    let mut spare = world.config.class[0].clone();
    (spare.name, spare.image) = ("spare".into(), "spare".into());
    world.config.class.push(spare);
    let (second, project) = world.second_gitlab("second");
    world.config.runner[1].class = "spare".into();
    world.standin.script(Matcher::on(Route::RequestJob), Fault::DelayAnswer(Duration::from_secs(5)));
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until(job, JobState::Running).await;
    let away = dir.path().join(".away");
    std::fs::rename(&image, &away).unwrap();
    world.until_failed(job, "runner_system_failure", "the image `test` of this runner's machines cannot be used").await;
    let other = second.enqueue(project, dayfly_exec::standin::JobSpec::script(["print hello"]));
    second.wait_for(|m| m.jobs[&other].state == JobState::Success, Duration::from_secs(60)).await.unwrap();
    let next = world.job(&["print again"]);
    world
        .until_status(
            |status| matches!(&status.runners[0].state, RunnerState::Blocked { reason } if reason.contains("test")),
        )
        .await;
    std::fs::rename(&away, &image).unwrap();
    world.until(next, JobState::Success).await;
    world.assert_clean().await;
}

/// U5: an image whose guest program speaks a contract older than the one before costs no job: its class's polls stop,
/// and say what to do, until it is rebuilt. An image of the contract before is as good as a new one.
#[test]
fn an_image_that_is_too_old_stops_polls_and_costs_no_job() {
    for wrong in [CONTRACT_OLDEST - 1, CONTRACT + 1] {
        paused(of_contract_first(wrong));
    }
}

async fn of_contract_first(wrong: u32) {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "was built before jobs could do without a network card"]);
    let dir = tempfile::tempdir().unwrap();
    let image = image_on_disk(&mut world, dir.path(), "test");
    let good = std::fs::read_to_string(image.join(MANIFEST_FILE)).unwrap();
    let of_contract = |contract: u32| {
        let line = format!("contract = {CONTRACT}\n");
        assert!(good.contains(&line), "{good}");
        std::fs::write(image.join(MANIFEST_FILE), good.replace(&line, &format!("contract = {contract}\n"))).unwrap();
    };
    of_contract(wrong);
    let job = world.job(&["print begun"]);
    world.start().await.unwrap();
    let says = |status: &RunnerState| {
        matches!(status, RunnerState::Blocked { reason } if reason.contains("`test`")
            && reason.contains("rebuild") && reason.contains("dayfly image build test"))
    };
    world.until_status(|status| says(&status.runners[0].state)).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!((world.found(job).state, world.requests(Route::RequestJob).len()), (JobState::Pending, 0));
    of_contract(CONTRACT_OLDEST);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// U5: the guest config of a job under way survives an upgrade: whatever members another version has added to it, or
/// has not.
#[test]
fn a_job_under_way_keeps_its_guest_config_over_an_upgrade() {
    paused(of_another_version(|config| config.replacen('{', "{\"of_another_version\":{\"more\":1},", 1)));
    let (now, before) = (format!("\"version\":{CONTRACT}"), format!("\"version\":{CONTRACT_OLDEST}"));
    paused(of_another_version(|config| config.replacen(&now, &before, 1)));
}

async fn of_another_version(edit: impl Fn(String) -> String) {
    let mut world = World::new(1);
    let job = world.job(&["print begun", "sleep 200", "print finished"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.kill();
    let kept = world.files.contents().into_iter().find(|(path, _)| path.ends_with("guest"));
    let (path, config) = kept.expect("the guest config is kept");
    let edited = edit(String::from_utf8(config.clone()).unwrap()).into_bytes();
    assert_ne!(edited, config);
    world.files.replace(&path, edited).await.unwrap();
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// H11: a file that is replaced in place while the overlay is made; no job is run on it.
#[tokio::test(start_paused = true)]
async fn an_image_replaced_while_an_overlay_is_made_runs_no_job() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "image cannot be used",
        "image cannot be used",
        "no job is asked for",
        "could not be made",
        "files of the image have changed",
    ]);
    let dir = tempfile::tempdir().unwrap();
    let image = image_on_disk(&mut world, dir.path(), "test");
    world.hypervisor.set_timing(Timing { overlay: Duration::from_secs(10), ..Timing::default() });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_word("booting").await;
    sleep(Duration::from_secs(5)).await;
    let mut other = disk();
    other[100] = 1;
    std::fs::write(image.join("disk.qcow2"), other).unwrap();
    world.until_failed(job, "runner_system_failure", "the image `test` of this runner's machines cannot be used").await;
    world.assert_clean().await;
    assert!(world.machines_started() <= 1 && !world.trace(job).contains("gitlab-runner asks"), "{}", world.trace(job));
}

/// H8: a disk that takes nothing more: no new job, those that run end and are reported, the status is red; then
/// all goes on.
#[tokio::test(start_paused = true)]
async fn a_disk_that_takes_nothing_more_costs_what_runs_and_nothing_is_taken() {
    let mut world = World::new(1);
    world.expect_trouble(&[""]);
    world.config.concurrent = 2;
    let job = world.job(&["print begun", "sleep 60", "print ended"]);
    world.start().await.unwrap();
    world.until_word("running").await;
    sleep(Duration::from_secs(5)).await;
    world.files.fail_writes(Some(io::ErrorKind::ReadOnlyFilesystem));
    // It is not known yet that nothing can be written: this one is refused, honestly.
    let refused = world.job(&["print never"]);
    world.until_failed(refused, "runner_system_failure", "could not write the job down").await;
    let waiting = world.job(&["print later"]);
    world.until_failed(job, "runner_system_failure", "the host's disk failed or is full").await;
    world.until_status(|status| status.daemon.problems.iter().any(|problem| problem.contains("journal"))).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.found(waiting).state, JobState::Pending);
    world.files.fail_writes(None);
    world.until(waiting, JobState::Success).await;
    world.assert_clean().await;
}

/// V14: an orphan that cannot be destroyed delays neither the first poll nor the jobs of before,
/// and holds its room.
#[tokio::test(start_paused = true)]
async fn a_stuck_orphan_delays_nobody_and_holds_its_room() {
    let mut world = World::new(1);
    world.expect_trouble(&["belongs to no job", "could not take a VM down"]);
    world.config.concurrent = 3;
    let orphan = world.job(&["print orphan", "sleep 600"]);
    world.start().await.unwrap();
    world.until_trace(orphan, "orphan").await;
    let vm = world.hypervisor.vms()[0].0.id.clone();
    let adopted = world.job(&["print adopted", "sleep 100", "print ended"]);
    world.until_trace(adopted, "adopted").await;
    world.kill();
    // The orphan's record is lost, and its machine will not go.
    let record = world.files.paths_below(Path::new("/state/jobs")).into_iter();
    let record = record.filter(|path| path.to_string_lossy().contains(&format!("-{orphan}/"))).collect::<Vec<_>>();
    for path in record {
        dayfly::files::Files::remove(&world.files, path.parent().unwrap()).await.unwrap();
    }
    world.standin.edit(|model| model.jobs.remove(&orphan));
    world.hypervisor.fail_always_for(Op::Destroy, &vm, VmFault::Hangs);
    let since = Instant::now();
    world.start().await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    let new = world.job(&["print new"]);
    world.until(new, JobState::Success).await;
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    // The orphan's own room and the adopted job's are taken, once each.
    world.until_status(|status| status.capacity.jobs == 2).await;
    world.until_status(|status| status.daemon.problems.iter().any(|problem| problem.contains("taken down"))).await;
    world.until(adopted, JobState::Success).await;
    world.until_status(|status| status.capacity.jobs == 1 && status.jobs.is_empty()).await;
    assert_eq!(world.hypervisor.vms().len(), 1);
    world.hypervisor.heal();
    world.until_status(|status| status.capacity.jobs == 0 && status.daemon.problems.is_empty()).await;
    world.assert_clean().await;
}

/// V14: a machine that cannot be destroyed costs one reservation, never two, whoever serves it.
#[tokio::test(start_paused = true)]
async fn a_stuck_machine_holds_one_reservation_before_and_after_a_restart() {
    let mut world = World::new(1);
    world.expect_trouble(&["could not take a VM down"]);
    // A guest that does not hear that its job is over.
    let job = world.job(&["deaf", "print hello", "sleep 36000"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    let vm = world.hypervisor.vms()[0].0.id.clone();
    world.hypervisor.fail_always_for(Op::Destroy, &vm, VmFault::Hangs);
    assert!(matches!(world.kill_job(job), dayfly::control::KillOutcome::Told { .. }));
    world.expect_trouble(&["the operator ended the job"]);
    world.until(job, JobState::Failed).await;
    for _ in 0..2 {
        sleep(Duration::from_secs(300)).await;
        let capacity = world.status().capacity;
        assert_eq!((capacity.jobs, capacity.cpus, capacity.disk_gib), (1, 1, 10));
        let since = Instant::now();
        world.hand_over().await;
        assert!(since.elapsed() <= Duration::from_secs(5), "{:?}", since.elapsed());
        world.start().await.unwrap();
    }
    world.hypervisor.heal();
    world.assert_clean().await;
}

/// A verdict that waits for GitLab holds no room of the host, after a restart either.
#[tokio::test(start_paused = true)]
async fn a_job_whose_machine_is_gone_holds_no_room() {
    let mut world = World::new(1);
    world.expect_trouble(&["it will be sent again"]);
    let (waits, runs) = (world.job(&["print hello"]), world.job(&["print begun", "sleep 3000"]));
    world.standin.script(Matcher::on(Route::UpdateJob).of_job(waits).after(1).always(), Fault::html(502));
    world.start().await.unwrap();
    for _ in 0..2 {
        world.until_status(|status| status.jobs.len() == 2 && status.capacity.jobs == 1).await;
        let capacity = world.status().capacity;
        assert_eq!((capacity.cpus, capacity.disk_gib), (1, 10));
        world.hand_over().await;
        world.start().await.unwrap();
    }
    world.standin.behave();
    for job in [waits, runs] {
        world.until(job, JobState::Success).await;
    }
    world.assert_clean().await;
}

/// U21: what is lacking is named with its path and what is free there; disk that others free is used again.
#[tokio::test(start_paused = true)]
async fn the_disk_that_may_be_promised_grows_again() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for"]);
    world.files.set_free_bytes(9 << 30);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until_status(|status| status.daemon.problems.len() == 1).await;
    let problem = world.status().daemon.problems.remove(0);
    let sentence = "a job needs 10 GiB disk, and 9 are there for all jobs (`capacity.disk_gib`); at `/state/overlays` 9 GiB are free";
    assert_eq!(problem, format!("runner `runner`: {sentence}"));
    sleep(Duration::from_secs(300)).await;
    assert_eq!((world.found(job).state, world.status().capacity.disk_gib_max), (JobState::Pending, 9));
    world.files.set_free_bytes(100 << 30);
    world.until(job, JobState::Success).await;
    assert_eq!(world.status().capacity.disk_gib_max, 100);
    world.assert_clean().await;
}
