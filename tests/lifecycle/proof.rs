//! `accel = "auto"`: what a daemon believes of KVM, and for how long.

use crate::support::guest::Guest;
use crate::support::world::World;
use dayfly::daemon::DaemonError;
use dayfly::vm::AccelChoice;
use dayfly::vm::proof::sector;
use dayfly::vm::{Accel, HostInfo, Hypervisor as _};
use dayfly_doubles::fake::GuestMachine;
use dayfly_exec::standin::JobState;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;

/// Memory of a VM that only proves something.
const PROOF_MEMORY_MIB: u64 = 64;

/// The KVM of a world.
#[derive(Clone, Default)]
struct Kvm {
    broken: Arc<AtomicBool>,
    /// Guests that it was tried with.
    tried: Arc<AtomicUsize>,
}

/// A world whose daemon is told `auto`, in a directory that exists, for a proof writes its disk there.
fn world() -> (tempfile::TempDir, World, Kvm) {
    let mut world = World::new(1);
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("overlays")).unwrap();
    world.config.state_directory = dir.path().to_owned();
    world.config.hypervisor.accel = AccelChoice::Auto;
    let kvm = Kvm::default();
    let (of_world, memory) = (kvm.clone(), world.memory.clone());
    world.hypervisor.set_guest(move |mut machine: GuestMachine| {
        let (kvm, memory) = (of_world.clone(), memory.clone());
        async move {
            if machine.spec.memory_mib != PROOF_MEMORY_MIB {
                return Guest::run(machine, memory).await;
            }
            assert_eq!(machine.spec.accel, Accel::Kvm);
            machine.console.write_all(sector::BEGINS.as_bytes()).await.unwrap();
            kvm.tried.fetch_add(1, Ordering::Relaxed);
            if kvm.broken.load(Ordering::Relaxed) {
                machine.power.pause(dayfly::vm::Pause::Itself);
            } else {
                machine.console.write_all(sector::LINE.as_bytes()).await.unwrap();
            }
            std::future::pending().await
        }
    });
    (dir, world, kvm)
}

/// U1: a host on which QEMU stops each guest is refused with its evidence, and nothing is left of the try.
#[tokio::test(start_paused = true)]
async fn kvm_that_stops_each_guest_is_refused_with_its_evidence() {
    let (_dir, mut world, kvm) = world();
    kvm.broken.store(true, Ordering::Relaxed);
    let error = world.start().await.unwrap_err();
    let DaemonError::NoKvm(why) = &error else { panic!("{error}") };
    assert!(why.contains("a VM of one boot sector was stopped by QEMU") && why.contains("the VM is paused"), "{why}");
    assert!(error.to_string().contains("hypervisor.accel = \"tcg\""), "{error}");
    assert!(world.hypervisor.counts().is_clean(), "{}", world.histories());
}

/// U1: a proof is believed again while nothing that it rests on has changed, and not a start longer.
#[tokio::test(start_paused = true)]
async fn a_proof_is_remembered_until_what_it_rests_on_changes() {
    let (_dir, mut world, kvm) = world();
    // The second start believes the first.
    for expected in [1, 1] {
        world.start().await.unwrap();
        world.hand_over().await;
        assert_eq!(kvm.tried.load(Ordering::Relaxed), expected);
    }
    let host = HostInfo { version: "fake 2".into(), cpus: 64, memory_mib: 256 * 1024, kvm_offered: true };
    world.hypervisor.set_host(host);
    world.start().await.unwrap();
    assert_eq!(kvm.tried.load(Ordering::Relaxed), 2, "another version of the hypervisor");
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    world.until_idle().await;
    world.hand_over().await;
    assert!(world.hypervisor.counts().is_clean(), "{}", world.histories());
}

/// U1: a hypervisor that offers no KVM any more is not believed for what was proven of it.
#[tokio::test(start_paused = true)]
async fn a_host_that_offers_no_kvm_any_more_is_tried_again() {
    let (_dir, mut world, kvm) = world();
    world.start().await.unwrap();
    world.hand_over().await;
    kvm.broken.store(true, Ordering::Relaxed);
    let before = world.hypervisor.probe().await.unwrap();
    world.hypervisor.set_host(HostInfo { kvm_offered: false, ..before });
    let error = world.start().await.unwrap_err();
    assert!(matches!(error, DaemonError::NoKvm(_)), "{error}");
    assert_eq!(kvm.tried.load(Ordering::Relaxed), 2);
}

/// U1: while libvirt does not answer nothing is proven and nothing refuted: a restart with jobs goes on, without a word
/// about KVM.
#[tokio::test(start_paused = true)]
async fn a_hypervisor_that_does_not_answer_refutes_no_proof() {
    let (_dir, mut world, kvm) = world();
    world.expect_trouble(&["the hypervisor does not answer"]);
    let job = world.job(&["print begun", "sleep 200", "print ended"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.kill();
    world.hypervisor.set_reachable(false);
    world.start().await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    world.hypervisor.set_reachable(true);
    world.until(job, JobState::Success).await;
    world.hand_over().await;
    assert_eq!(kvm.tried.load(Ordering::Relaxed), 1);
}

/// U1: jobs under way go on, even if their host's KVM is not what it was; the operator is told.
#[tokio::test(start_paused = true)]
async fn a_proof_that_fails_after_a_restart_costs_no_job_under_way() {
    let (_dir, mut world, kvm) = world();
    world.expect_trouble(&["KVM was proven before, and is not now"]);
    let job = world.job(&["print begun", "sleep 200", "print ended"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.kill();
    kvm.broken.store(true, Ordering::Relaxed);
    let host = HostInfo { version: "fake 2".into(), cpus: 64, memory_mib: 256 * 1024, kvm_offered: true };
    world.hypervisor.set_host(host);
    world.start().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.until(job, JobState::Success).await;
    world.hand_over().await;
}
