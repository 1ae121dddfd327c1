//! What every hypervisor promises. `contract!` makes one test per promise and bench.

use crate::bench::{Bench, LIMIT, await_bytes, await_end, await_line};
use dayfly::vm::proof::{Places, Subject, prove, prove_kvm};
use dayfly::vm::{Accel, Ending, Frozen, VmError, VmId, VmName, VmSpec, VmState, VmSummary};
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, timeout};

macro_rules! contract {
    (everywhere: $($promise:ident)* ; with guests: $($guests:ident)* ; with QEMU: $($real:ident)*) => {
        mod fake {
            use super::*;
            $(#[tokio::test(start_paused = true)]
            async fn $promise() {
                super::$promise(&Bench::fake()).await;
            })*
            $(#[tokio::test(start_paused = true)]
            async fn $guests() {
                super::$guests(&Bench::fake()).await;
            })*
        }
        mod test_driver {
            use super::*;
            $(#[tokio::test]
            async fn $promise() {
                super::$promise(&Bench::test_driver()).await;
            })*
        }
        mod real {
            use super::*;
            contract! { @real $($promise)* $($guests)* $($real)* }
        }
        mod qemu {
            use super::*;
            contract! { @qemu $($promise)* $($guests)* $($real)* }
        }
    };
    (@qemu $($promise:ident)*) => {
        $(#[tokio::test]
        async fn $promise() {
            if let Some(bench) = Bench::qemu(stringify!($promise)) {
                super::$promise(&bench).await;
            }
        })*
    };
    (@real $($promise:ident)*) => {
        $(#[tokio::test]
        async fn $promise() {
            let _shared = crate::real::shared().await;
            if let Some(bench) = Bench::real(stringify!($promise)) {
                super::$promise(&bench).await;
            }
        })*
    };
}

contract! {
    everywhere:
        a_vm_is_made_found_and_ended
        what_is_done_already_counts_as_done
        the_vms_of_another_installation_are_left_alone
        overlays_are_listed_by_their_names
        a_host_says_what_it_can_do;
    with guests:
        a_guest_is_talked_to_until_its_end
        two_guests_at_once_do_not_touch_each_other
        a_guest_that_powers_off_is_gone
        a_guest_that_restarts_has_ended
        a_guest_that_panics_or_sleeps_has_ended_and_is_kept_until_it_is_destroyed
        a_new_daemon_finds_each_wire_again
        a_door_that_nobody_reads_holds_up_no_guest_and_no_other_wire
        a_vm_without_a_disk_is_refused_by_name
        what_was_frozen_goes_on_in_others_and_nothing_else_does;
    with QEMU:
        a_socket_path_that_linux_cannot_hold_is_refused_in_words
        a_vm_leaves_its_base_image_as_it_was
        a_vm_runs_in_the_directories_that_were_prepared
        a_guest_under_tcg_proves_itself
        kvm_is_proven_or_refuted_in_time_and_leaves_nothing
}

async fn a_vm_is_made_found_and_ended(bench: &Bench) {
    let (a, name) = bench.started().await;
    let (b, _) = bench.started().await;
    let mut both = [&a, &b].map(|spec| VmSummary { name: spec.id.clone().into(), state: VmState::Running });
    both.sort_by_key(|vm| vm.name.clone());
    assert_eq!(bench.hypervisor.list(&bench.installation).await.unwrap(), both);
    assert_eq!(bench.hypervisor.state(&name).await.unwrap(), VmState::Running);
    bench.end(&a).await;
    assert!(bench.hypervisor.state(&name).await.unwrap().ending().is_some());
    assert_eq!(bench.listed().await, [b.id.clone().into()]);
    bench.end(&b).await;
    bench.assert_clean().await;
}

async fn a_guest_is_talked_to_until_its_end(bench: &Bench) {
    let (spec, name) = bench.started().await;
    let mut channel = bench.channel(&spec).await;
    channel.write_all(b"a config may be written before the kernel runs").await.unwrap();
    let mut door = bench.door(&spec).await;
    door.write_all(b"so may what is said to its door").await.unwrap();
    let mut console = bench.console(&spec).await;
    await_line(&mut console).await;
    console.write_all(b"x").await.unwrap();
    await_bytes(&mut console, b"x").await;
    bench.hypervisor.destroy(&name).await.unwrap();
    await_end(&mut channel).await;
    await_end(&mut door).await;
    await_end(&mut console).await;
    bench.end(&spec).await;
    bench.assert_clean().await;
}

async fn what_is_done_already_counts_as_done(bench: &Bench) {
    let (spec, name) = bench.started().await;
    bench.hypervisor.start(&spec).await.expect("it runs");
    assert_eq!(bench.listed().await, [name]);
    bench.end(&spec).await;
    bench.end(&spec).await;
    let never: VmName = VmId::random(&bench.rng).into();
    bench.hypervisor.destroy(&never).await.expect("what never was is gone");
    assert_eq!(bench.hypervisor.state(&never).await.unwrap(), VmState::Gone);
    bench.assert_clean().await;
}

async fn two_guests_at_once_do_not_touch_each_other(bench: &Bench) {
    let ((a, _), (b, b_name)) = tokio::join!(bench.started(), bench.started());
    let (mut a_console, mut b_console) = (bench.console(&a).await, bench.console(&b).await);
    tokio::join!(await_line(&mut a_console), await_line(&mut b_console));
    a_console.write_all(b"A").await.unwrap();
    await_bytes(&mut a_console, b"A").await;
    bench.end(&a).await;
    await_line(&mut b_console).await;
    assert_eq!(bench.hypervisor.state(&b_name).await.unwrap(), VmState::Running);
    bench.end(&b).await;
    bench.assert_clean().await;
}

/// It is told from one that restarts, by QEMU's own event.
async fn a_guest_that_powers_off_is_gone(bench: &Bench) {
    let (spec, name) = bench.started().await;
    powers_off(bench, &spec, &name).await;
    bench.assert_clean().await;
}

/// A guest that is there powers itself off, and is seen to have.
pub(crate) async fn powers_off(bench: &Bench, spec: &VmSpec, name: &VmName) {
    let mut channel = bench.channel(spec).await;
    let mut console = bench.console(spec).await;
    await_line(&mut console).await;
    console.write_all(b"q").await.unwrap();
    await_end(&mut channel).await;
    assert_eq!(bench.await_ending(name).await, Ending::PoweredOff);
    assert_eq!(bench.listed().await, []);
    bench.end(spec).await;
}

/// A reset is the machine's end, and no second boot.
async fn a_guest_that_restarts_has_ended(bench: &Bench) {
    let (spec, name) = bench.started().await;
    let mut console = bench.console(&spec).await;
    await_line(&mut console).await;
    console.write_all(b"r").await.unwrap();
    assert_eq!(bench.await_ending(&name).await, Ending::Restarted);
    assert_eq!(bench.listed().await, []);
    bench.end(&spec).await;
    bench.assert_clean().await;
}

/// Both are the guest's own doing, told as such, and never a pause. The suspend is by the register of a machine
/// that offers none.
async fn a_guest_that_panics_or_sleeps_has_ended_and_is_kept_until_it_is_destroyed(bench: &Bench) {
    for (letter, ending) in [(b"p", Ending::Panicked), (b"s", Ending::Slept)] {
        let (spec, name) = bench.started().await;
        let mut console = bench.console(&spec).await;
        await_line(&mut console).await;
        console.write_all(letter).await.unwrap();
        assert_eq!(bench.await_ending(&name).await, ending);
        let left = [VmSummary { name: name.clone(), state: VmState::Ended(ending) }];
        assert_eq!(bench.hypervisor.list(&bench.installation).await.unwrap(), left);
        bench.end(&spec).await;
        bench.assert_clean().await;
    }
}

async fn the_vms_of_another_installation_are_left_alone(bench: &Bench) {
    let (ours, name) = bench.started().await;
    let mut theirs = bench.spec();
    theirs.installation = VmId::random(&bench.rng);
    bench.host.disks.create(&theirs.overlay, &theirs.base, 1).await.unwrap();
    bench.hypervisor.start(&theirs).await.unwrap();
    assert_eq!(bench.listed().await, [name]);
    let mut same_id = theirs.clone();
    same_id.installation = bench.installation.clone();
    let error = bench.hypervisor.start(&same_id).await.unwrap_err();
    assert!(matches!(error, VmError::Refused { .. }) && error.to_string().contains(same_id.id.as_str()), "{error}");
    bench.end(&theirs).await;
    bench.end(&ours).await;
    bench.assert_clean().await;
}

/// What is said to a guest without a program behind its port is taken up to a bound, and the writer waits.
async fn a_door_that_nobody_reads_holds_up_no_guest_and_no_other_wire(bench: &Bench) {
    let (spec, _) = bench.started().await;
    let mut door = bench.door(&spec).await;
    let flood = async {
        loop {
            door.write_all(&[0xff; 16 * 1024]).await.unwrap();
        }
    };
    let stands = timeout(Duration::from_secs(2), flood).await;
    assert!(stands.is_err(), "it ends by waiting only");
    // The next one's connection is taken, and waits for the end of this one.
    let second = bench.door(&spec).await;
    let mut console = bench.console(&spec).await;
    await_line(&mut console).await;
    console.write_all(b"x").await.unwrap();
    await_bytes(&mut console, b"x").await;
    drop((door, second));
    bench.end(&spec).await;
    bench.assert_clean().await;
}

async fn a_new_daemon_finds_each_wire_again(bench: &Bench) {
    let (spec, _) = bench.started().await;
    for _ in 0..3 {
        let mut door = bench.door(&spec).await;
        door.write_all(b"a hello").await.unwrap();
        let mut channel = bench.channel(&spec).await;
        channel.write_all(b"the same config again").await.unwrap();
        let mut console = bench.console(&spec).await;
        await_line(&mut console).await;
    }
    let nowhere = bench.disks();
    let error = bench.host.sockets.channel(&nowhere, &spec.id).await.err().expect("no socket lies there");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(bench.host.sockets.door(&nowhere, &spec.id).await.err().unwrap().kind(), ErrorKind::NotFound);
    bench.end(&spec).await;
    assert!(bench.host.sockets.door(&spec.socket_dir, &spec.id).await.is_err());
    assert!(bench.host.sockets.channel(&spec.socket_dir, &spec.id).await.is_err());
    assert!(bench.host.sockets.console(&spec.socket_dir, &spec.id).await.is_err());
    bench.assert_clean().await;
}

async fn overlays_are_listed_by_their_names(bench: &Bench) {
    let mut overlays: Vec<_> = (0..3).map(|_| bench.overlay(&VmId::random(&bench.rng))).collect();
    overlays.sort();
    let foreign = bench.disks().join("df-somebody-elses.qcow2");
    for overlay in overlays.iter().chain([&foreign]) {
        bench.host.disks.create(overlay, &bench.base(), 1).await.unwrap();
    }
    assert_eq!(bench.host.disks.list(&bench.disks()).await.unwrap(), overlays);
    assert_eq!(
        bench.host.disks.list(&bench.disks().join("nowhere")).await.unwrap(),
        [""; 0].map(std::path::PathBuf::from)
    );
    for overlay in overlays.iter().chain([&foreign]) {
        bench.host.disks.remove(overlay).await.unwrap();
        bench.host.disks.remove(overlay).await.expect("gone counts as removed");
    }
    bench.assert_clean().await;
}

async fn a_vm_without_a_disk_is_refused_by_name(bench: &Bench) {
    let spec = bench.spec();
    let error = bench.hypervisor.start(&spec).await.unwrap_err();
    assert!(matches!(error, VmError::Refused { what: "start VM", .. }), "{error}");
    assert!(error.to_string().contains(spec.id.as_str()) && !error.is_transient());
    bench.end(&spec).await;
    bench.assert_clean().await;
}

/// Several come of one, each by its own name; what was frozen is not what it was: nothing comes of that.
async fn what_was_frozen_goes_on_in_others_and_nothing_else_does(bench: &Bench) {
    if !bench.hypervisor.can_freeze() {
        crate::bench::skipped("what_was_frozen_goes_on_in_others_and_nothing_else_does", "this back end cannot freeze");
        return;
    }
    let (golden, name) = bench.started().await;
    await_line(&mut bench.console(&golden).await).await;
    let state = bench.frozen_state();
    let sha256 = bench.hypervisor.freeze(&name, &state).await.unwrap();
    assert!(matches!(bench.hypervisor.state(&name).await.unwrap(), VmState::Paused(_)), "it is there, and stands");
    let disk = bench.keep_disk(&golden).await;
    bench.end(&golden).await;

    let of = |sha256| Frozen { state: state.clone(), sha256, disk: disk.clone() };
    let mut restored = Vec::new();
    for _ in 0..2 {
        let spec = VmSpec { frozen: Some(of(sha256)), ..bench.spec() };
        bench.host.disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
        bench.hypervisor.start(&spec).await.unwrap();
        restored.push(spec);
    }
    for spec in &restored {
        let name = spec.id.clone().into();
        let mut console = bench.console(spec).await;
        assert!(matches!(bench.hypervisor.state(&name).await.unwrap(), VmState::Paused(_)), "it stands still");
        for _ in 0..2 {
            bench.hypervisor.go_on(&name).await.unwrap();
        }
        await_line(&mut console).await;
        console.write_all(b"x").await.unwrap();
        await_bytes(&mut console, b"x").await;
    }
    for spec in &restored {
        bench.end(spec).await;
    }

    bench.damage(&state).await;
    let spec = VmSpec { frozen: Some(of(sha256)), ..bench.spec() };
    bench.host.disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
    let error = bench.hypervisor.start(&spec).await.unwrap_err();
    assert!(matches!(error, VmError::Damaged { .. }), "{}", chain(&error));
    bench.end(&spec).await;
    assert!(bench.hypervisor.go_on(&spec.id.clone().into()).await.is_err(), "it is gone");
    bench.host.disks.remove(&disk).await.unwrap();
    bench.assert_clean().await;
}

async fn a_host_says_what_it_can_do(bench: &Bench) {
    let host = bench.hypervisor.probe().await.unwrap();
    assert!(host.cpus > 0 && host.memory_mib > 0 && !host.version.is_empty(), "{host:?}");
}

async fn a_socket_path_that_linux_cannot_hold_is_refused_in_words(bench: &Bench) {
    let mut spec = bench.spec();
    spec.socket_dir = bench.sockets().join("x".repeat(100));
    let error = bench.hypervisor.start(&spec).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("of 107 that Linux allows: choose a shorter runtime directory"), "{cause}");
    let error = bench.host.sockets.channel(&spec.socket_dir, &spec.id).await.err().unwrap();
    assert!(error.to_string().contains("107"), "{error}");
}

/// Bytes, owner, mode and times of it.
async fn a_vm_leaves_its_base_image_as_it_was(bench: &Bench) {
    let facts = || {
        use std::os::unix::fs::MetadataExt as _;
        let file = std::fs::metadata(bench.base()).unwrap();
        (std::fs::read(bench.base()).unwrap(), file.uid(), file.gid(), file.mode(), file.mtime(), file.mtime_nsec())
    };
    let before = facts();
    let (spec, _) = bench.started().await;
    let mut console = bench.console(&spec).await;
    await_line(&mut console).await;
    assert_eq!(facts(), before, "also its owner, while a VM runs on it");
    bench.end(&spec).await;
    assert_eq!(facts(), before);
}

async fn a_vm_runs_in_the_directories_that_were_prepared(bench: &Bench) {
    let (disks, sockets) = (bench.disks().join("above/overlays"), bench.sockets().join("made"));
    for _ in 0..2 {
        bench.host.prepare(&disks, &sockets).await.unwrap();
    }
    let mut spec = bench.spec();
    (spec.overlay, spec.socket_dir) = (disks.join(format!("df-{}.qcow2", spec.id)), sockets.clone());
    bench.host.disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
    bench.hypervisor.start(&spec).await.unwrap();
    await_line(&mut bench.console(&spec).await).await;
    bench.end(&spec).await;
    for dir in [&disks, &sockets] {
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
    }
}

async fn a_guest_under_tcg_proves_itself(bench: &Bench) {
    let (disks, sockets) = (bench.disks(), bench.sockets());
    let places = Places { disks: &disks, sockets: &sockets };
    prove(&bench.host, Accel::Tcg, &Subject::Sector, places, &bench.installation, &bench.rng).await.unwrap();
    bench.assert_clean().await;
}

async fn kvm_is_proven_or_refuted_in_time_and_leaves_nothing(bench: &Bench) {
    let (disks, sockets) = (bench.disks(), bench.sockets());
    let places = Places { disks: &disks, sockets: &sockets };
    let offered = bench.hypervisor.probe().await.unwrap().kvm_offered;
    let since = Instant::now();
    let proof = prove_kvm(&bench.host, &Subject::Sector, places, &bench.installation, &bench.rng).await;
    let verdict = match &proof {
        Ok(proof) => format!("a guest spoke after {:?}", proof.took),
        Err(error) => chain(error),
    };
    println!("KVM offered: {offered}; verdict after {:?}: {verdict}", since.elapsed());
    assert!(since.elapsed() < LIMIT);
    assert!(offered || proof.is_err(), "what is not offered cannot be proven");
    assert!(Path::new("/dev/kvm").exists() || proof.is_err());
    bench.assert_clean().await;
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {}", chain(source)))
}
