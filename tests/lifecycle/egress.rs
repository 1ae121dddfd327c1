//! The egress of machines without a network card: begun before the job, again when it dies, ended with the machine; and
//! what of it is told when a job ends.

use crate::support::world::{World, paused};
use dayfly::network::{EgressChange, EgressConfig};
use dayfly::rules::Rule;
use dayfly::vm::VmId;
use dayfly_doubles::fake::{Fault, Op};
use dayfly_egress::audit::Destination;
use dayfly_egress::policy::{Mode, Pattern, Reason};
use dayfly_exec::standin::{JobSpec, JobState};
use std::time::Duration;

/// The one machine that there is.
fn machine(world: &World) -> VmId {
    let vms = world.hypervisor.vms();
    assert_eq!(vms.len(), 1);
    vms[0].0.id.clone()
}

/// Waits until the egress of this machine is alive and was begun so often.
async fn until_begun(world: &World, id: &VmId, begun: u32) {
    let wait = async {
        while world.hypervisor.egress(id) != Some((true, begun)) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(60), wait).await;
    assert!(found.is_ok(), "{:?}\n{}", world.hypervisor.egress(id), world.histories());
}

/// Who carries it is there before the job is handed out, and goes by the class's policy and the entry's GitLab.
#[test]
fn a_machines_egress_is_begun_before_its_job_by_the_policy_of_its_class() {
    paused(async {
        let mut world = World::new(1);
        world.config.class[0].egress = EgressConfig {
            mode: Mode::Enforce,
            allow: vec!["*.debian.org:443".parse().unwrap()],
            ..EgressConfig::default()
        };
        let job = world.job(&["print begun", "sleep 60"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        let id = machine(&world);
        assert_eq!(world.hypervisor.egress(&id), Some((true, 1)));
        let policy = world.hypervisor.egress_policy(&id).unwrap();
        let always: Vec<String> = policy.always.iter().map(ToString::to_string).collect();
        assert_eq!(
            (policy.mode, policy.allow.len(), always),
            (Mode::Enforce, 1, vec!["gitlab.example:443".to_owned()])
        );
        let history = world.hypervisor.history();
        let at = |op| history.iter().position(|entry| entry.op == Some(op)).unwrap();
        assert!(at(Op::Start) < at(Op::BeginEgress));
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
        assert_eq!(world.hypervisor.egress(&id), None, "it has ended with its machine");
    });
}

/// What a rule changes is in the record of the jobs that it fits, and of no others; a later configuration changes neither.
#[test]
fn a_rule_narrows_and_widens_what_its_jobs_reach() {
    paused(async {
        let mut world = World::new(2);
        let list = |of: &[&str]| of.iter().map(|text| text.parse().unwrap()).collect::<Vec<Pattern>>();
        world.config.class[0].egress =
            EgressConfig { allow: list(&["pypi.org:443", "*.debian.org"]), ..EgressConfig::default() };
        let egress = EgressChange {
            mode: Some(Mode::Enforce),
            allow: list(&["deploy.example:22"]),
            deny: list(&["*.debian.org"]),
        };
        world.config.rule = vec![Rule {
            name: "protected".into(),
            protected: Some(true),
            allow: true,
            egress: Some(egress),
            ..Rule::default()
        }];
        let script = ["print begun", "sleep 60"];
        let protected = world.job_of(JobSpec { protected: true, ..JobSpec::script(script) });
        let other = world.job(&script);
        world.start().await.unwrap();
        for (job, mode, allow, deny) in [
            (protected, Mode::Enforce, list(&["pypi.org:443", "deploy.example:22"]), list(&["*.debian.org"])),
            (other, Mode::Observe, list(&["pypi.org:443", "*.debian.org"]), list(&[])),
        ] {
            world.until_trace(job, "begun").await;
            let policies: Vec<_> =
                world.hypervisor.vms().iter().map(|(vm, _)| world.hypervisor.egress_policy(&vm.id).unwrap()).collect();
            let found = policies.iter().find(|policy| policy.mode == mode).expect("one of each");
            assert_eq!((&found.allow, &found.deny), (&allow, &deny));
        }
        for job in [protected, other] {
            world.until(job, JobState::Success).await;
        }
        world.assert_clean().await;
    });
}

/// It lives on when the daemon does not, and is no other's; one that died meanwhile is begun again, by the record.
#[test]
fn a_restart_of_the_daemon_leaves_it_alone_and_begins_one_that_has_died() {
    for dies in [false, true] {
        paused(async move {
            let mut world = World::new(1);
            world.config.class[0].egress.mode = Mode::Enforce;
            let job = world.job(&["print begun", "sleep 60"]);
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            let id = machine(&world);
            world.kill();
            if dies {
                world.hypervisor.kill_egress(&id);
            }
            world.config.class[0].egress = EgressConfig::default();
            world.start().await.unwrap();
            until_begun(&world, &id, if dies { 2 } else { 1 }).await;
            world.until(job, JobState::Success).await;
            assert_eq!(world.machines_started(), 1);
            world.assert_clean().await;
        });
    }
    paused(async {
        let mut world = World::new(1);
        world.config.class[0].egress.mode = Mode::Enforce;
        let job = world.job(&["print begun", "sleep 60"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        let id = machine(&world);
        world.hand_over().await;
        world.hypervisor.kill_egress(&id);
        world.config.class[0].egress = EgressConfig::default();
        world.start().await.unwrap();
        until_begun(&world, &id, 2).await;
        let policy = world.hypervisor.egress_policy(&id).unwrap();
        assert_eq!(policy.mode, Mode::Enforce, "what the job was accepted for");
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
    });
}

/// One that dies is begun again while its machine lives, again and again, and not without a pause.
#[test]
fn one_that_dies_is_begun_again() {
    paused(async {
        let mut world = World::new(1);
        world.expect_trouble(&["the egress of a machine had ended"]);
        let job = world.job(&["print begun", "sleep 120"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        let id = machine(&world);
        for begun in 1..8 {
            until_begun(&world, &id, begun).await;
            world.hypervisor.kill_egress(&id);
        }
        let since = tokio::time::Instant::now();
        until_begun(&world, &id, 8).await;
        assert!(since.elapsed() >= Duration::from_secs(2), "a guest that kills it is not followed at its own speed");
        assert!(world.metrics().contains("dayfly_egress_restarted_total 7"), "{}", world.metrics());
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
    });
}

/// One that does not end with its machine is ended before room and names are given back; one that cannot be is said.
#[test]
fn one_that_hangs_ends_with_its_machine_all_the_same() {
    for stuck in [false, true] {
        paused(async move {
            let mut world = World::new(1);
            world.expect_trouble(&["could not take a VM down"]);
            let job = world.job(&["print begun", "sleep 10"]);
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            let id = machine(&world);
            world.hypervisor.hang_egress(&id, stuck);
            world.until(job, JobState::Success).await;
            if stuck {
                world
                    .until_status(|status| status.daemon.problems.iter().any(|p| p.contains("cannot be taken down")))
                    .await;
                assert_eq!(world.status().capacity.jobs, 1, "its room is not given away");
                world.hypervisor.hang_egress(&id, false);
            }
            world.assert_clean().await;
        });
    }
}

/// Without anybody who carries it a machine is of no use: its job fails with our fault, and none is handed out to it.
#[test]
fn a_machine_whose_egress_cannot_be_begun_gets_no_job() {
    paused(async {
        let mut world = World::new(1);
        world.config.concurrent = 1;
        world.expect_trouble(&["no machine could be made", "no job is asked for", "machine"]);
        world.hypervisor.fail_always(Op::BeginEgress, Fault::Refused("no such program"));
        let jobs = [world.job(&["print never"]), world.job(&["print hello"])];
        world.start().await.unwrap();
        world.until_failed(jobs[0], "runner_system_failure", "no virtual machine could be started").await;
        assert!(!world.trace(jobs[0]).contains("never"));
        world.hypervisor.heal();
        world.until(jobs[1], JobState::Success).await;
        world.assert_clean().await;
    });
}

/// G14: what is to go does not wait for who would carry its egress, however long that takes to begin.
#[test]
fn a_canceled_job_does_not_wait_for_an_egress_that_hangs() {
    paused(async {
        let mut world = World::new(1);
        world.hypervisor.fail_always(Op::BeginEgress, Fault::Hangs);
        let job = world.job(&["print never"]);
        world.start().await.unwrap();
        let until = async |there: bool| {
            while world.hypervisor.vms().is_empty() == there {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let limit = Duration::from_secs(15);
        assert!(tokio::time::timeout(limit, until(true)).await.is_ok(), "{}", world.histories());
        world.standin.cancel(job, false);
        let gone = tokio::time::timeout(limit, until(false)).await;
        assert!(gone.is_ok(), "one keepalive, and the end of the machine\n{}", world.histories());
        world.hypervisor.heal();
        world.until(job, JobState::Canceled).await;
        world.assert_clean().await;
    });
}

fn reached() -> Vec<Destination> {
    let to = |name: &str| Destination { name: Some(name.into()), port: 443, ..Destination::default() };
    vec![
        Destination { connections: 3, up: 812, down: 93_211, ..to("deb.debian.org") },
        Destination { refused: 1, reason: Some(Reason::Denied), ..to("evil.example") },
    ]
}

const SECTION: [&str; 3] = [
    "dayfly: what this job reached",
    "evil.example:443  refused 1 times: the egress policy denies it",
    "deb.debian.org:443  3 connections, 812 B sent, 91 KiB received",
];

/// Where a job's bytes went stands at the end of its log, however it ends, and is counted by class.
#[test]
fn what_a_job_has_reached_stands_at_the_end_of_its_log() {
    for script in [["print begun", "sleep 10", "print finished"], ["print begun", "sleep 10", "crash"]] {
        paused(async move {
            let mut world = World::new(1);
            world.expect_trouble(&["the job ends without a verdict of its guest", "the guest went silent"]);
            let job = world.job(&script);
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            let id = machine(&world);
            world.hypervisor.reach(&id, reached());
            if script[2] == "crash" {
                world.hypervisor.crash(&id);
                world.until(job, JobState::Failed).await;
            } else {
                world.until(job, JobState::Success).await;
            }
            let trace = world.trace(job);
            let mut from = 0;
            for part in SECTION {
                from += trace[from..].find(part).unwrap_or_else(|| panic!("{part}: {trace}")) + part.len();
            }
            if script[2] == "crash" {
                assert!(trace[from..].contains("dayfly: for your operators"), "before the reason of its end: {trace}");
            } else {
                assert!(trace.find("finished").unwrap() < trace.find(SECTION[0]).unwrap());
            }
            let metrics = world.metrics();
            for line in [
                "dayfly_egress_connections_total{class=\"small\"} 3",
                "dayfly_egress_refused_total{class=\"small\"} 1",
                "dayfly_egress_bytes_total{class=\"small\",direction=\"down\"} 93211",
            ] {
                assert!(metrics.contains(line), "{line}: {metrics}");
            }
            world.assert_clean().await;
        });
    }
}

/// An audit that cannot be read costs a job nothing: its log goes without.
#[test]
fn a_job_ends_in_time_although_its_audit_cannot_be_read() {
    paused(async {
        let mut world = World::new(1);
        world.expect_trouble(&["its log goes without"]);
        world.hypervisor.fail_always(Op::ReadAudit, Fault::Refused("input/output error"));
        let job = world.job(&["print begun", "sleep 10"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        world.hypervisor.reach(&machine(&world), reached());
        world.until(job, JobState::Success).await;
        assert!(!world.trace(job).contains(SECTION[0]));
        world.assert_clean().await;
    });
}
