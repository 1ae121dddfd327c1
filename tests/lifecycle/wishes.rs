//! A job chooses its image and size, within what its class allows; its author is told what came of that.

use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::config::{Class, UnknownImage};
use dayfly::gitlab::JobId;
use dayfly::image::store::Image;
use dayfly::status::RunnerState;
use dayfly_doubles::images::{self, TheseImages};
use dayfly_exec::standin::{JobSpec, JobState, Recorded, Route, Variable};
use serde_json::json;
use std::sync::Arc;

/// The reason that GitLab is told of a job whose author asks for too much.
pub(crate) const REASON: &str = "runner_configuration_error";

/// A class that lets its jobs choose.
pub(crate) fn generous() -> Class {
    Class {
        images: vec!["other".into()],
        max_cpus: Some(4),
        max_memory_mib: Some(4096),
        max_disk_gib: Some(40),
        cpus: 1,
        memory_mib: 512,
        disk_gib: 10,
        allow_standin_runner: true,
        ..Class::new("small", "test")
    }
}

/// An image like `test`, of another name.
pub(crate) fn image(name: &str) -> Image {
    let mut image = images::image();
    name.clone_into(&mut image.name);
    name.clone_into(&mut image.manifest.name);
    image
}

/// A world of this class and of the images `test`, `other`, `third`.
pub(crate) fn world(class: Class) -> World {
    let mut world = World::new(1);
    world.config.class = vec![class];
    world.images = Arc::new(TheseImages::new(vec![image("test"), image("other"), image("third")]));
    world
}

pub(crate) fn asking(wishes: &[(&str, &str)]) -> JobSpec {
    let spec = JobSpec::script(["print begun", "sleep 60", "print ended"]);
    wishes.iter().fold(spec, |spec, (name, value)| spec.with_variable(Variable::new(*name, *value)))
}

/// CPUs and memory of the machines that there are.
pub(crate) fn machines(world: &World) -> Vec<(u32, u64)> {
    world.hypervisor.vms().iter().map(|(vm, _)| (vm.cpus, vm.memory_mib)).collect()
}

fn promised(world: &World) -> (u32, u64, u64) {
    let capacity = world.status().capacity;
    (capacity.cpus, capacity.memory_mib, capacity.disk_gib)
}

/// U25: `image:` chooses among the images of a shell class, variables the size; what came of both stands in the log.
/// Room for the largest machine is reserved before GitLab is asked, and given back with the 201.
#[tokio::test(start_paused = true)]
async fn a_job_gets_the_image_and_the_size_that_it_asks_for() {
    let mut world = world(generous());
    world.config.concurrent = 1;
    // For one job as large as may be, with what its QEMU takes.
    world.config.capacity.memory_mib = Some(4096 + 406);
    let spec = asking(&[("DAYFLY_CPUS", "3"), ("DAYFLY_MEMORY", "2GiB"), ("DAYFLY_DISK", "20 GiB"), ("NAME", "oth")]);
    let services = Some(json!(["postgres:17"]));
    let job = world.job_of(JobSpec { image: Some(json!("${NAME}er")), services, ..spec });
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    assert_eq!(machines(&world), [(3, 2048)]);
    assert_eq!(promised(&world), (3, 2048 + 406, 20));
    let trace = world.trace(job);
    for line in [
        "  image other, 3 CPUs, 2048 MiB memory, 20 GiB disk\n",
        "  asked for: 3 CPUs, 2 GiB memory, 20 GiB disk\n",
        "  asked for by `image:`: image other\n",
        "  `services: postgres:17` has no effect here: this runner's jobs run in the virtual machine itself, not in a ",
    ] {
        assert!(trace.contains(line), "no {line:?}: {trace}");
    }
    assert!(!trace.contains("`image: "), "{trace}");
    world.until(job, JobState::Success).await;
    // Nothing to do: room for the ceiling is held by the poll.
    world.until_idle().await;
    world.until_status(|status| status.capacity.memory_mib == 0 || status.capacity.memory_mib == 4502).await;
    world.assert_clean().await;
}

/// The room that a small job gave back is there for the next one, at once.
#[tokio::test(start_paused = true)]
async fn what_a_small_job_gives_back_is_room_for_others() {
    let mut world = world(generous());
    // Room for the largest and one small machine.
    world.config.capacity.memory_mib = Some(4096 + 406 + 512 + 406);
    let jobs = [world.job_of(asking(&[])), world.job_of(asking(&[]))];
    let large = world.job_of(asking(&[("DAYFLY_MEMORY", "4096")]));
    world.start().await.unwrap();
    for job in jobs.into_iter().chain([large]) {
        world.until(job, JobState::Success).await;
    }
    assert_eq!(world.machines_at_once(), 2);
    world.assert_clean().await;
}

/// A wish out of bounds, or one that is none, ends its job at once: one line says what is allowed, and nothing is made.
#[tokio::test(start_paused = true)]
async fn a_wish_that_cannot_be_met_ends_the_job_with_one_line() {
    let mut world = world(generous());
    let cases = [
        ("DAYFLY_MEMORY", "64GiB", "`DAYFLY_MEMORY` asks for 64 GiB; here jobs may have from 256 MiB to 4 GiB. "),
        ("DAYFLY_MEMORY", "8 parsecs", "`DAYFLY_MEMORY` is `8 parsecs`, which is no size: write a whole number with "),
        ("DAYFLY_CPUS", "1e99", "`DAYFLY_CPUS` is `1e99`, which is no number of CPUs: write a whole number like 4. "),
        ("DAYFLY_CPUS", "-1", "`DAYFLY_CPUS` is `-1`, which is no number of CPUs"),
        ("DAYFLY_DISK", "41", "`DAYFLY_DISK` asks for 41 GiB; here jobs may have from 1 GiB to 40 GiB. "),
        ("DAYFLY_IMAGE", "third", "`DAYFLY_IMAGE` asks for `third`; here jobs may have `test`, `other`. "),
        ("DAYFLY_IMAGE", "../../etc", "`DAYFLY_IMAGE` asks for `../../etc`; here jobs may have `test`, `other`. "),
    ];
    let jobs: Vec<JobId> = cases.iter().map(|(name, value, _)| world.job_of(asking(&[(name, value)]))).collect();
    world.start().await.unwrap();
    for (job, (.., line)) in jobs.into_iter().zip(cases) {
        world
            .until_failed(job, REASON, &format!("this runner cannot give the job the machine that it asks for: {line}"))
            .await;
        let trace = world.trace(job);
        assert_eq!(trace.matches("dayfly: for your operators").count(), 1, "{trace}");
        assert!(trace.contains("a retry alone does not help"), "{trace}");
    }
    assert_eq!(world.machines_started(), 0);
    world.assert_clean().await;
}

/// A masked value that is no wish is not shown to whoever reads the log.
#[tokio::test(start_paused = true)]
async fn a_masked_wish_is_not_quoted() {
    let mut world = world(generous());
    let secret = Variable { masked: true, ..Variable::new("DAYFLY_IMAGE", "hunter2") };
    let job = world.job_of(asking(&[]).with_variable(secret));
    world.start().await.unwrap();
    world.until_failed(job, REASON, "asks for `[MASKED]`; here jobs may have").await;
    assert!(!world.trace(job).contains("hunter2"));
    world.assert_clean().await;
}

/// A disk must take its image.
#[tokio::test(start_paused = true)]
async fn a_disk_smaller_than_the_image_is_refused() {
    let mut world = world(generous());
    let mut other = image("other");
    other.disk_bytes = (4 << 30) + 1;
    world.images = Arc::new(TheseImages::new(vec![image("test"), other]));
    let small = world.job_of(asking(&[("DAYFLY_DISK", "4"), ("DAYFLY_IMAGE", "other")]));
    let enough = world.job_of(asking(&[("DAYFLY_DISK", "5"), ("DAYFLY_IMAGE", "other")]));
    world.start().await.unwrap();
    world.until_failed(small, REASON, "`DAYFLY_DISK` asks for 4 GiB; the image `other` takes 5 GiB").await;
    world.until(enough, JobState::Success).await;
    world.assert_clean().await;
}

/// U25: an `image:` that is none of ours is a line in the log, or the end of the job where its class says so.
#[tokio::test(start_paused = true)]
async fn an_unknown_image_is_a_line_or_an_error_as_its_class_says() {
    for (unknown_image, runs) in [(UnknownImage::Warn, true), (UnknownImage::Fail, false)] {
        let mut world = world(Class { unknown_image, ..generous() });
        let foreign = world.job_of(JobSpec { image: Some(json!("node:22")), ..asking(&[]) });
        let chosen = world.job_of(JobSpec { image: Some(json!("node:22")), ..asking(&[("DAYFLY_IMAGE", "other")]) });
        let plain = world.job_of(asking(&[]));
        world.start().await.unwrap();
        if runs {
            world.until(foreign, JobState::Success).await;
            let line = "`image: node:22` has no effect here: this runner's jobs run in the virtual machine itself, not in a \
                        container; its images are `test`, `other`\n";
            assert!(world.trace(foreign).contains(line), "{}", world.trace(foreign));
        } else {
            let line = "`image: node:22` names no image of this runner; here jobs may have `test`, `other`. ";
            world.until_failed(foreign, REASON, line).await;
        }
        for job in [chosen, plain] {
            world.until(job, JobState::Success).await;
        }
        assert!(world.trace(chosen).contains("  asked for: image other\n"), "{}", world.trace(chosen));
        world.assert_clean().await;
    }
}

/// An image that cannot be used is named, not the one that the class would have given.
#[tokio::test(start_paused = true)]
async fn the_image_that_cannot_be_used_is_the_one_that_was_asked_for() {
    let mut world = world(generous());
    world.expect_trouble(&["the job's image cannot be used", "without a verdict of its guest", "no job is asked for"]);
    let all = TheseImages::new(vec![image("test"), image("other")]);
    world.images = Arc::new(all.clone());
    // The poller has seen it, and the job does not.
    all.forget_after(1, "other");
    let job = world.job_of(asking(&[("DAYFLY_IMAGE", "other")]));
    world.start().await.unwrap();
    world
        .until_failed(job, "runner_system_failure", "the image `other` of this runner's machines cannot be used")
        .await;
    all.put(image("other"));
    world.assert_clean().await;
}

/// Decision D10: GitLab is told the features that all images in reach share, and the oldest version; where they differ it
/// is not asked at all, and both are named.
#[tokio::test(start_paused = true)]
async fn images_that_differ_stop_their_runner_and_are_named() {
    let with = |name: &str, info: &str| {
        let mut image = image(name);
        image.manifest.info = Some(info.to_owned());
        image
    };
    let mut world = world(generous());
    world.expect_trouble(&["no job is asked for"]);
    let old = r#"{"name":"gitlab-runner","version":"18.6.0","features":{"cancel_gracefully":true}}"#;
    let odd = r#"{"name":"gitlab-runner","version":"19.3.0","features":{"cancel_gracefully":true,"proxy":true}}"#;
    let images = TheseImages::new(vec![image("test"), with("other", odd)]);
    world.images = Arc::new(images.clone());
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    let named = |state: &RunnerState| matches!(state, RunnerState::Blocked { reason } if reason.contains("images `test` and `other`") && reason.contains("`proxy`"));
    world.until_status(|status| named(&status.runners[0].state)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), 0);
    images.put(with("other", old));
    world.until(job, JobState::Success).await;
    let asked = world.requests(Route::RequestJob);
    let info = |request: &Recorded| {
        let body: serde_json::Value = serde_json::from_slice(request.body.as_deref().unwrap()).unwrap();
        body["info"].clone()
    };
    let told: serde_json::Value = serde_json::from_str(old).unwrap();
    for request in &asked {
        let info = info(request);
        assert_eq!((&info["version"], &info["features"]), (&told["version"], &told["features"]));
    }
    world.assert_clean().await;
}

/// What was asked for and given stands in the record: a restart with a class that allows none of it changes nothing.
#[test]
fn a_restart_with_another_configuration_changes_no_machine() {
    // The write that takes the job into the journal, and the ones behind it.
    for call in 1..12 {
        let mut done = false;
        paused(async {
            let mut world = world(generous());
            world.config.concurrent = 1;
            world.expect_trouble(&["belongs to no job"]);
            let spec = asking(&[("DAYFLY_CPUS", "3"), ("DAYFLY_MEMORY", "2GiB")]);
            let job = world.job_of(JobSpec { image: Some(json!("other")), ..spec });
            let end = End { seam: Seam::Files, call, when: When::After };
            world.live(Some(end)).await.unwrap();
            world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
            done = !world.is_dead();
            let accepted = world
                .files
                .history()
                .iter()
                .any(|line| line.starts_with("replace ") && line.ends_with("record.json ok"));
            if done || !accepted {
                return;
            }
            let narrow =
                Class { images: Vec::new(), max_cpus: None, max_memory_mib: None, max_disk_gib: None, ..generous() };
            world.config.class = vec![narrow];
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            assert_eq!(machines(&world), [(3, 2048)], "call {call}");
            let trace = world.trace(job);
            assert!(trace.contains("  image other, 3 CPUs, 2048 MiB memory, 10 GiB disk\n"), "call {call}: {trace}");
            assert_eq!(trace.matches("  asked for: 3 CPUs, 2 GiB memory\n").count(), 1, "call {call}: {trace}");
            world.until(job, JobState::Success).await;
            world.assert_clean().await;
        });
        if done {
            break;
        }
    }
}

/// A refusal is reported once, whatever call the daemon is killed at that writes it down.
#[test]
fn a_refusal_is_reported_once_wherever_the_daemon_is_killed() {
    let mut reported = 0;
    for call in 1..60 {
        let mut died = false;
        paused(async {
            let mut world = world(generous());
            let job = world.job_of(asking(&[("DAYFLY_CPUS", "99")]));
            let _ = world.live(Some(End { seam: Seam::Files, call, when: When::After })).await;
            world.until_dead_or(job, &[JobState::Failed]).await;
            if !world.is_dead() {
                world.settle().await;
            }
            died = world.is_dead();
            let written = world
                .files
                .history()
                .iter()
                .any(|line| line.starts_with("replace ") && line.ends_with("record.json ok"));
            if died {
                world.start().await.unwrap();
            }
            if written {
                world.until_failed(job, REASON, "`DAYFLY_CPUS` asks for 99 CPUs").await;
                assert_eq!(world.trace(job).matches("dayfly: for your operators").count(), 1, "call {call}");
                reported += 1;
            } else {
                // Documented (K1): GitLab gives it up.
                world.until(job, JobState::Failed).await;
            }
            world.settle().await;
            world.assert_clean().await;
        });
        if !died {
            break;
        }
    }
    assert!(reported > 2, "{reported}");
}
