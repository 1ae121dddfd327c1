//! What is here of repositories: in the machine before its job, never another project's, and never what a job waits for.

use crate::support::world::{SECOND_GITLAB, World, paused};
use dayfly::config::Span;
use dayfly::gitlab::JobId;
use dayfly::vm::VmSpec;
use dayfly_doubles::workshop::{Kept, Mood};
use dayfly_exec::standin::{JobSpec, JobState};
use std::path::{Path, PathBuf};
use std::time::Duration;

const URL: &str = "https://gitlab.example/group/project.git";
const MIB: u64 = 1 << 20;

fn sha(n: u8) -> String {
    format!("{n:02x}").repeat(20)
}

/// A world that keeps repositories, with the first commit at GitLab.
fn world() -> World {
    let mut world = World::new(1);
    world.config.clones.enabled = true;
    world.workshop.push(URL, &sha(1), 200 * MIB);
    world
}

fn job(world: &World, n: u8) -> JobId {
    world.job_of(JobSpec { sha: sha(n), ..JobSpec::script(["print hello"]) })
}

/// The machines that there are.
fn machines(world: &World) -> Vec<VmSpec> {
    world.hypervisor.vms().into_iter().map(|(spec, _)| spec).collect()
}

/// What a machine had: disks by their serial numbers.
async fn disks(world: &World, vm: &VmSpec) -> Vec<(String, Option<Kept>)> {
    let mut all = Vec::new();
    for disk in &vm.read_only {
        all.push((disk.serial.clone(), world.workshop.image(&disk.path).await));
    }
    all
}

fn below(world: &World, dir: &str) -> Vec<PathBuf> {
    world.files.paths_below(Path::new(dir))
}

/// Runs a job to its end, and looks at its machine's disks while it is there.
async fn run(world: &mut World, n: u8) -> (Vec<(String, Option<Kept>)>, String) {
    let job = world.job_of(JobSpec { sha: sha(n), ..JobSpec::script(["print hello", "sleep 60"]) });
    world.until_trace(job, "hello").await;
    let [vm] = machines(world).try_into().expect("one machine");
    let disks = disks(world, &vm).await;
    world.until(job, JobState::Success).await;
    (disks, world.trace(job))
}

#[test]
fn what_a_fetch_brings_while_the_machine_boots_is_in_it_and_in_the_next_ones() {
    paused(async {
        let mut world = world();
        world.workshop.set_takes(Duration::from_secs(1));
        world.start().await.unwrap();
        let (first, trace) = run(&mut world, 1).await;
        let [(serial, Some(kept))] = first.as_slice() else { panic!("{first:?}") };
        assert_eq!((serial.as_str(), kept.url.as_str()), ("dayfly-clone-slot", URL));
        assert_eq!(kept.tips, [sha(1)]);
        assert!(trace.contains("clone: 200 MiB were fetched while the machine booted, in 1.0 s"), "{trace}");
        // The same commit: all of it is here, and GitLab is not asked.
        let (second, trace) = run(&mut world, 1).await;
        assert!(trace.contains("clone: 200 MiB were here already") && !trace.contains("fetched"), "{trace}");
        assert!(second.iter().all(|(serial, _)| serial != "dayfly-clone-slot"), "{second:?}");
        assert_eq!(second[0].0, "dayfly-clone-0");
        assert_eq!(world.workshop.fetches().len(), 1);
        // One more commit: a small disk more, and the large one is not written again.
        let large: Vec<_> = below(&world, "/state/clones").into_iter().filter(|path| path.ends_with(".img")).collect();
        world.workshop.push(URL, &sha(2), 3 * MIB);
        let (third, trace) = run(&mut world, 2).await;
        assert!(trace.contains("clone: 200 MiB were here already; 3072 KiB were fetched"), "{trace}");
        let slot = third.iter().find(|(serial, _)| serial == "dayfly-clone-slot").unwrap().1.clone().unwrap();
        assert!(slot.tips.contains(&sha(2)) && slot.tips.contains(&sha(1)));
        assert!(slot.packs.iter().all(|(_, bytes)| *bytes <= 200 * MIB));
        assert_eq!(large, below(&world, "/state/clones").into_iter().filter(|p| large.contains(p)).collect::<Vec<_>>());
        // Each fetch was made with the token of its own job.
        let tokens = world.workshop.tokens();
        assert!(tokens.len() == 2 && tokens[0] != tokens[1]);
        world.until_idle().await;
        assert_eq!(below(&world, "/state/clones/slots"), Vec::<PathBuf>::new(), "gone with their machines");
        world.assert_clean().await;
    });
}

/// Late, refused, broken, full: the job runs as ever, and its log says so.
#[test]
fn a_fetch_that_comes_to_nothing_costs_a_job_nothing() {
    for (mood, takes, says) in [
        (Mood::Well, 30, "what is new there was not fetched in time"),
        (Mood::Well, 3600, "what is new there was not fetched in time"),
        (Mood::Refused, 1, "GitLab did not let this host fetch what is new there"),
        (Mood::Broken, 1, "what is new there could not be fetched"),
        (Mood::Full, 1, "what is new there could not be fetched"),
        (Mood::NoDisk, 1, "what is new there could not be fetched"),
    ] {
        paused(async move {
            let mut world = world();
            world.workshop.set_takes(Duration::from_secs(takes));
            world.workshop.set_mood(mood);
            world.start().await.unwrap();
            let (disks, trace) = run(&mut world, 1).await;
            assert!(trace.contains(says), "{mood:?}: {trace}");
            let slot = disks.iter().find(|(serial, _)| serial == "dayfly-clone-slot").unwrap();
            assert_eq!(slot.1, None, "nothing is written once the job is handed out");
            world.until_idle().await;
            world.assert_clean().await;
        });
    }
}

/// A fetch that a job did not wait for is there for the next one.
#[test]
fn a_late_fetch_is_the_next_jobs() {
    paused(async {
        let mut world = world();
        world.workshop.set_takes(Duration::from_secs(30));
        world.start().await.unwrap();
        let (_, trace) = run(&mut world, 1).await;
        assert!(trace.contains("not fetched in time"), "{trace}");
        world.workshop.set_takes(Duration::from_secs(1));
        let (_, trace) = run(&mut world, 1).await;
        assert!(trace.contains("clone: 200 MiB were here already"), "{trace}");
        assert_eq!(world.workshop.fetches().len(), 1);
        world.assert_clean().await;
    });
}

/// T40: no project has anything of another's: neither of the same GitLab nor of the same id elsewhere.
#[test]
fn no_machine_is_given_another_projects_objects() {
    paused(async {
        let mut world = world();
        let other = "https://second.example/other/project.git";
        world.workshop.push(other, &sha(1), 5 * MIB);
        world.workshop.push(other, &sha(9), MIB);
        let (second, project) = world.second_gitlab("second");
        assert_eq!(SECOND_GITLAB, "https://second.example/");
        world.start().await.unwrap();
        run(&mut world, 1).await;
        let theirs = second.enqueue(project, JobSpec { sha: sha(9), ..JobSpec::script(["print hello", "sleep 60"]) });
        while machines(&world).is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_secs(30)).await;
        let [vm] = machines(&world).try_into().expect("one machine");
        for (serial, kept) in disks(&world, &vm).await {
            assert_eq!(kept.unwrap().url, other, "{serial}");
        }
        while !second.read(|model| model.jobs[&theirs].state == JobState::Success) {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let (ours, _) = run(&mut world, 1).await;
        assert!(!ours.is_empty());
        for (serial, kept) in ours {
            assert_eq!(kept.unwrap().url, URL, "{serial}");
        }
        world.assert_clean().await;
    });
}

/// A disk that is not what it was is given to nobody, and the mirror is made anew.
#[test]
fn a_damaged_disk_is_given_to_nobody() {
    paused(async {
        let mut world = world();
        world.start().await.unwrap();
        run(&mut world, 1).await;
        world.until_idle().await;
        world.hand_over().await;
        let image =
            below(&world, "/state/clones").into_iter().find(|path| path.extension().is_some_and(|e| e == "img"));
        let image = image.expect("a disk");
        let length = world.files.look(&image, |bytes| bytes.unwrap().len());
        world.files.meddle(&image, Some(vec![b'x'; length]));
        world.workshop.forget();
        world.expect_trouble(&["is damaged; the mirror is made anew"]);
        world.start().await.unwrap();
        let (disks, trace) = run(&mut world, 1).await;
        assert!(!trace.contains("were here already"), "{trace}");
        for (serial, kept) in disks {
            assert!(serial == "dayfly-clone-slot" && kept.is_none_or(|kept| kept.url == URL));
        }
        assert!(!below(&world, "/state/clones").contains(&image));
        // And once more, whole.
        let (_, trace) = run(&mut world, 1).await;
        assert!(trace.contains("were here already"), "{trace}");
        world.assert_clean().await;
    });
}

/// After a restart the disks are looked at once, then used again; what nobody names is removed.
#[test]
fn a_restart_keeps_what_is_whole_and_removes_what_came_to_no_end() {
    paused(async {
        let mut world = world();
        world.start().await.unwrap();
        run(&mut world, 1).await;
        world.until_idle().await;
        world.hand_over().await;
        let json = below(&world, "/state/clones").into_iter().find(|path| path.ends_with("mirror.json")).unwrap();
        let stray = json.with_file_name("00ff.img");
        world.files.meddle(&stray, Some(b"half".to_vec()));
        let slot = Path::new("/state/clones/slots/df-abcdefghijklmnop.img");
        world.files.meddle(slot, Some(Vec::new()));
        world.workshop.forget();
        world.start().await.unwrap();
        let (_, trace) = run(&mut world, 1).await;
        assert!(trace.contains("clone:") || trace.contains("hello"), "{trace}");
        let (_, trace) = run(&mut world, 1).await;
        assert!(trace.contains("clone: 200 MiB were here already"), "{trace}");
        assert_eq!(world.workshop.fetches().len(), 1, "nothing is fetched twice");
        tokio::time::sleep(Duration::from_secs(120)).await;
        let left = below(&world, "/state/clones");
        assert!(!left.contains(&stray) && !left.iter().any(|path| path == slot), "{left:?}");
        world.assert_clean().await;
    });
}

/// K20: killed at any moment, the job comes to its end, and nothing of it is left.
#[test]
fn a_daemon_that_dies_leaves_no_disk_behind() {
    for wait_ms in [100_u64, 500, 900, 1_000, 1_100, 2_000, 4_900, 5_200, 20_000] {
        paused(async move {
            let mut world = world();
            world.workshop.set_takes(Duration::from_secs(1));
            let job = world.job_of(JobSpec { sha: sha(1), ..JobSpec::script(["print hello", "sleep 60"]) });
            world.start().await.unwrap();
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            world.kill();
            world.workshop.forget();
            world.start().await.unwrap();
            world.until(job, JobState::Success).await;
            assert_eq!(world.machines_at_once(), 1);
            // One sweep. The dead daemon's timers run on, and the longest of a boot's is over in five minutes.
            tokio::time::sleep(Duration::from_secs(65)).await;
            world.until_idle().await;
            assert_eq!(below(&world, "/state/clones/slots"), Vec::<PathBuf>::new());
            // Whatever is left of the mirror is whole, and the next job has it.
            run(&mut world, 1).await;
            let (_, trace) = run(&mut world, 1).await;
            assert!(trace.contains("were here already"), "{wait_ms}: {trace}");
            world.assert_clean().await;
        });
    }
}

/// Quota and threshold hold after each fetch, by what was longest not used; what is too large is left alone.
#[test]
fn mirrors_take_no_more_than_they_may() {
    paused(async {
        let mut world = world();
        world.config.clones.project_gib = 1;
        world.config.clones.size_gib = 1;
        world.start().await.unwrap();
        for n in 2..12 {
            world.workshop.push(URL, &sha(n), 150 * MIB);
            run(&mut world, n).await;
            world.until_idle().await;
            let taken = metric(&world, "dayfly_clones_bytes");
            assert!(taken <= 1 << 30, "{n}: {taken}");
        }
        let metrics = world.metrics();
        assert!(metrics.contains("dayfly_clones_wiped_total{reason=\"threshold\"}"), "{metrics}");
        world.assert_clean().await;
    });
}

/// A mirror of which no disk can be made: once more, then anew; one that is damaged, anew at once.
#[test]
fn a_mirror_of_which_no_disk_can_be_made_is_made_anew() {
    for (mood, jobs) in [(Mood::NoDisk, 2), (Mood::Damaged, 1)] {
        paused(async move {
            let mut world = world();
            world.start().await.unwrap();
            run(&mut world, 1).await;
            for n in 2..2 + jobs {
                world.workshop.push(URL, &sha(n), MIB);
                world.workshop.set_mood(mood);
                let (_, trace) = run(&mut world, n).await;
                assert!(trace.contains("here already; what is new there could not be fetched"), "{mood:?}: {trace}");
            }
            world.until_idle().await;
            assert_eq!(metric(&world, "dayfly_clones_mirrors"), 0);
            world.workshop.set_mood(Mood::Well);
            let (_, trace) = run(&mut world, 1 + jobs).await;
            assert!(!trace.contains("were here already"), "{mood:?}: {trace}");
            let (_, trace) = run(&mut world, 1 + jobs).await;
            assert!(trace.contains("were here already"), "{mood:?}: {trace}");
            world.assert_clean().await;
        });
    }
}

/// Who has switched it off keeps nothing of it.
#[test]
fn what_is_kept_goes_when_it_is_switched_off() {
    paused(async {
        let mut world = world();
        world.start().await.unwrap();
        run(&mut world, 1).await;
        world.until_idle().await;
        world.hand_over().await;
        assert!(!below(&world, "/state/clones").is_empty());
        world.config.clones.enabled = false;
        world.start().await.unwrap();
        assert_eq!(below(&world, "/state/clones"), Vec::<PathBuf>::new());
        world.assert_clean().await;
    });
}

fn metric(world: &World, name: &str) -> u64 {
    let text = world.metrics();
    let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Too old: what was deleted at GitLab since is not kept for ever.
#[test]
fn an_old_mirror_is_made_anew() {
    paused(async {
        let mut world = world();
        world.config.clones.max_age = Span::from_secs(3600);
        world.start().await.unwrap();
        run(&mut world, 1).await;
        world.until_idle().await;
        tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
        assert_eq!(metric(&world, "dayfly_clones_mirrors"), 0);
        let (_, trace) = run(&mut world, 1).await;
        assert!(!trace.contains("were here already"), "{trace}");
        assert_eq!(world.workshop.fetches().len(), 2);
        world.assert_clean().await;
    });
}

/// Whoever wants nothing of it has nothing: the operator, the job, a job without sources, an image of before.
#[test]
fn nobody_has_it_who_does_not_want_it() {
    for which in 0..4 {
        paused(async move {
            let mut world = world();
            let mut spec = JobSpec { sha: sha(1), ..JobSpec::script(["print hello", "sleep 60"]) };
            match which {
                0 => world.config.clones.enabled = false,
                1 => spec = spec.with_variable(dayfly_exec::standin::Variable::new("DAYFLY_CLONE", "off")),
                2 => spec = spec.with_variable(dayfly_exec::standin::Variable::new("GIT_STRATEGY", "none")),
                _ => world.by_port(),
            }
            let job = world.job_of(spec);
            world.start().await.unwrap();
            world.until_trace(job, "hello").await;
            assert!(machines(&world)[0].read_only.is_empty());
            world.until(job, JobState::Success).await;
            assert!(world.workshop.fetches().is_empty() && !world.trace(job).contains("clone:"));
            world.assert_clean().await;
        });
    }
}

#[test]
fn jobs_of_one_project_at_once_fetch_it_once() {
    paused(async {
        let mut world = world();
        world.workshop.set_takes(Duration::from_secs(1));
        let jobs: Vec<JobId> = (0..4).map(|_| job(&world, 1)).collect();
        world.start().await.unwrap();
        for job in jobs {
            world.until(job, JobState::Success).await;
        }
        assert_eq!(world.workshop.fetches().len(), 1);
        world.assert_clean().await;
    });
}
