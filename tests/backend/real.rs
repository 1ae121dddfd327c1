//! What only a real libvirtd, and a real QEMU, can show.

use crate::bench::{Bench, LIMIT, await_line, skipped};
use dayfly::process::Program;
use dayfly::vm::confine::measure::Place;
use dayfly::vm::{Confinement, Ending, Limits, Pause, VmError, VmId, VmName, VmSpec, VmState, VmSummary, VmUsers};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::time::Instant;

/// Tests that stop libvirtd have it to themselves.
static LIBVIRTD: RwLock<()> = RwLock::const_new(());

pub(crate) async fn shared() -> RwLockReadGuard<'static, ()> {
    LIBVIRTD.read().await
}

async fn alone() -> RwLockWriteGuard<'static, ()> {
    LIBVIRTD.write().await
}

/// A domain of somebody else's, with this name, at the libvirtd of the environment.
async fn foreign_domain(name: &VmName, metadata: &str) {
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><metadata>{metadata}</metadata><memory unit='MiB'>32</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><controller type='usb' model='none'/>\
         <memballoon model='none'/></devices></domain>"
    );
    virsh(&["create", "/dev/stdin"], &xml).await;
}

async fn virsh(arguments: &[&str], stdin: &str) -> String {
    let uri = std::env::var("DAYFLY_TEST_LIBVIRT_URI").unwrap();
    let mut virsh = Program::new("virsh", LIMIT).args(["-q", "-c", &uri]).args(arguments).stdin(stdin);
    for name in ["HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"] {
        if let Some(value) = std::env::var_os(name) {
            virsh = virsh.env(name, value);
        }
    }
    virsh.run().await.unwrap().text()
}

/// H16: names alone prove nothing.
#[tokio::test]
async fn h16_domains_that_only_look_like_ours_are_left_alone() {
    let _shared = shared().await;
    let Some(bench) = Bench::real("h16_domains_that_only_look_like_ours_are_left_alone") else { return };
    let ours = &bench.installation;
    let other = VmId::random(&bench.rng);
    for metadata in [
        "<other xmlns='urn:example:other'/>".to_owned(),
        // Our installation, but another VM's id: somebody has copied a domain of ours.
        format!("<d:vm xmlns:d='urn:dayfly:vm:1' installation='{ours}' vm='{other}'/>"),
        format!("<d:vm xmlns:d='urn:dayfly:vm:1' installation='{ours}'/>"),
    ] {
        let spec = bench.spec();
        let name: VmName = spec.id.clone().into();
        foreign_domain(&name, &metadata).await;
        assert_eq!(bench.listed().await, []);
        let destroyed = bench.hypervisor.destroy(&name).await;
        let started = bench.hypervisor.start(&spec).await;
        assert!(matches!(destroyed, Err(VmError::Refused { what: "destroy VM", .. })), "{destroyed:?}");
        assert!(matches!(started, Err(VmError::Refused { what: "start VM", .. })), "{started:?}");
        assert_eq!(bench.hypervisor.state(&name).await.unwrap(), VmState::Running);
        virsh(&["destroy", &name.to_string()], "").await;
        bench.hypervisor.destroy(&name).await.expect("it is gone");
    }
    bench.assert_clean().await;
}

/// V11, U50: as QEMU pauses it when the disk fails, but somebody at the host did it, and that is told.
#[tokio::test]
async fn v11_a_vm_that_was_paused_is_seen_and_can_be_destroyed() {
    let _shared = shared().await;
    let Some(bench) = Bench::real("v11_a_vm_that_was_paused_is_seen_and_can_be_destroyed") else { return };
    let (spec, name) = bench.started().await;
    virsh(&["suspend", &name.to_string()], "").await;
    assert_eq!(bench.hypervisor.state(&name).await.unwrap(), VmState::Paused(Pause::Operator));
    let listed = bench.hypervisor.list(&bench.installation).await.unwrap();
    assert_eq!(listed, [VmSummary { name: name.clone(), state: VmState::Paused(Pause::Operator) }]);
    virsh(&["resume", &name.to_string()], "").await;
    assert_eq!(bench.hypervisor.state(&name).await.unwrap(), VmState::Running);
    virsh(&["suspend", &name.to_string()], "").await;
    bench.end(&spec).await;
    assert!(bench.hypervisor.state(&name).await.unwrap().ending().is_some());
    bench.assert_clean().await;
}

/// U47: whoever ended the machine at the host is told from its guest, and a QEMU that was killed from both.
#[tokio::test]
async fn u47_a_machine_that_the_host_ended_is_told_from_one_that_ended_itself() {
    let _shared = shared().await;
    let Some(bench) = Bench::real("u47_a_machine_that_the_host_ended_is_told_from_one_that_ended_itself") else {
        return;
    };
    let (spec, name) = bench.started().await;
    await_line(&mut bench.console(&spec).await).await;
    virsh(&["destroy", &name.to_string()], "").await;
    assert_eq!(bench.await_ending(&name).await, Ending::Destroyed);
    bench.end(&spec).await;
    // Where QEMU runs as ourselves it is ours to kill.
    let pid = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| Path::new(&dir).join("libvirt/qemu/run"));
    let (spec, name) = bench.started().await;
    await_line(&mut bench.console(&spec).await).await;
    if let Some(pid) = pid.and_then(|dir| std::fs::read_to_string(dir.join(format!("{name}.pid"))).ok()) {
        signal("-KILL", pid.trim()).await;
        assert_eq!(bench.await_ending(&name).await, Ending::Died);
    }
    bench.end(&spec).await;
    bench.assert_clean().await;
}

/// U50: QEMU stops the CPUs of its own accord, as at an internal error of KVM, and no disk is blamed.
#[tokio::test]
async fn u50_a_vm_that_qemu_stopped_is_told_apart_from_a_disk_and_an_operator() {
    let _shared = shared().await;
    let Some(bench) = Bench::real("u50_a_vm_that_qemu_stopped_is_told_apart_from_a_disk_and_an_operator") else {
        return;
    };
    let (spec, name) = bench.started().await;
    virsh(&["qemu-monitor-command", &name.to_string(), r#"{"execute":"stop"}"#], "").await;
    bench.await_state(&name, VmState::Paused(Pause::Itself)).await;
    bench.end(&spec).await;
    bench.assert_clean().await;
}

/// What one VM's QEMU finds when it is told to open something: it is taken over, as far as that goes.
async fn opens(name: &VmName, path: &str) -> Result<(), String> {
    static NODE: AtomicUsize = AtomicUsize::new(0);
    let node = format!("taken-{}", NODE.fetch_add(1, Ordering::Relaxed));
    let add = format!(
        r#"{{"execute":"blockdev-add","arguments":{{"driver":"file","node-name":"{node}","filename":"{path}","read-only":true,"locking":"off"}}}}"#
    );
    told(name, &add).await
}

/// The same, of a unix socket.
async fn connects(name: &VmName, path: &str) -> Result<(), String> {
    static CHARDEV: AtomicUsize = AtomicUsize::new(0);
    let id = format!("taken-{}", CHARDEV.fetch_add(1, Ordering::Relaxed));
    let add = format!(
        r#"{{"execute":"chardev-add","arguments":{{"id":"{id}","backend":{{"type":"socket","data":{{"addr":{{"type":"unix","data":{{"path":"{path}"}}}},"server":false}}}}}}}}"#
    );
    told(name, &add).await
}

async fn told(name: &VmName, command: &str) -> Result<(), String> {
    let said = virsh(&["qemu-monitor-command", &name.to_string(), command], "").await;
    if said.contains(r#""return""#) { Ok(()) } else { Err(said) }
}

/// A kernel that stands still.
fn standing_kernel() -> Vec<u8> {
    let mut kernel = vec![0; 8192];
    // Sectors of set-up code; `jmp` to itself where that begins; the protocol's mark, 2.06, loaded high; where an initrd
    // may be.
    kernel[0x1f1] = 4;
    kernel[0x200..0x202].copy_from_slice(&[0xeb, 0xfe]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&[0x06, 0x02]);
    kernel[0x211] = 1;
    kernel[0x22c..0x230].copy_from_slice(&0x37ff_ffff_u32.to_le_bytes());
    kernel
}

/// U40, T15: two machines of one image at once, each with a user of its own: the QEMU of one, told to, opens its own
/// disk, and neither disk nor monitor of the other; no file of the image changes hands; what is lent goes with the
/// machine.
#[tokio::test]
async fn u40_the_qemu_of_one_machine_opens_nothing_of_anothers() {
    const TEST: &str = "u40_the_qemu_of_one_machine_opens_nothing_of_anothers";
    let _shared = shared().await;
    let Some(bench) = Bench::real(TEST) else { return };
    let Ok(users) = std::env::var("DAYFLY_TEST_VM_USERS") else {
        skipped(TEST, "DAYFLY_TEST_VM_USERS is not set: QEMU has one user");
        return;
    };
    let users = users.parse::<VmUsers>().unwrap().all();
    assert_eq!(users.len(), 2);
    let boot = bench.direct_boot(&standing_kernel());
    let mut machines = Vec::new();
    for user in &users {
        let spec = bench.spec();
        let confine = Confinement { user: Some(user.clone()), limits: Some(Limits::default()) };
        bench.host.disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
        let boot = bench.host.disks.lend(&boot, &spec.overlay).await.unwrap();
        let spec = VmSpec { confine, boot, ..spec };
        bench.hypervisor.start(&spec).await.unwrap();
        let name: VmName = spec.id.clone().into();
        let measured = Place::default().measure(&name).expect("its process is there");
        let its = virsh(&["domid", &name.to_string()], "").await;
        let monitor = format!("/var/lib/libvirt/qemu/domain-{}-{name}/monitor.sock", its.trim());
        machines.push((spec, name, measured, monitor));
    }
    let [(a, a_name, a_is, a_monitor), (b, b_name, b_is, b_monitor)] = &machines[..] else { panic!("two") };
    println!("{a_name}: {a_is:?}");
    let public = tempfile::tempdir_in("/var/tmp").unwrap();
    let open = public.path().join("open");
    let _listener = tokio::net::UnixListener::bind(&open).unwrap();
    for (path, mode) in [(public.path(), 0o755), (open.as_path(), 0o777)] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
    let open = open.display().to_string();
    assert_ne!(a_is.uid, b_is.uid);
    for is in [a_is, b_is] {
        assert!(is.seccomp && is.capabilities == 0 && is.uid != 0, "{is:?}");
    }
    for (name, own, own_monitor, other, other_monitor) in
        [(a_name, a, a_monitor, b, b_monitor), (b_name, b, b_monitor, a, a_monitor)]
    {
        // What would open for anybody shows nothing.
        opens(name, &own.overlay.display().to_string()).await.expect("its own disk");
        opens(name, &bench.base().display().to_string()).await.expect("the image");
        let refused = opens(name, &other.overlay.display().to_string()).await.unwrap_err();
        assert!(refused.contains("Permission denied"), "{refused}");
        connects(name, &open).await.expect("a socket that is open to all");
        // libvirt made it before QEMU became its user: not even its own.
        for monitor in [own_monitor, other_monitor] {
            let refused = connects(name, monitor).await.unwrap_err();
            assert!(refused.contains("Permission denied"), "{refused}");
        }
        // Where the daemon's sockets are, nobody passes.
        let door = VmSpec::door_socket(&other.socket_dir, &other.id);
        let refused = connects(name, &door.display().to_string()).await.unwrap_err();
        assert!(refused.contains("Permission denied"), "{refused}");
    }
    bench.assert_image_is_ours(&boot);
    for (spec, ..) in &machines {
        bench.end(spec).await;
    }
    bench.assert_image_is_ours(&boot);
    bench.assert_clean().await;
}

/// The pid of the libvirtd that belongs to the tests, which a call starts if it does not run.
async fn libvirtd(test: &str) -> Option<String> {
    let Some(file) = std::env::var_os("DAYFLY_TEST_LIBVIRTD_PID") else {
        skipped(test, "DAYFLY_TEST_LIBVIRTD_PID is not set: no libvirtd is ours to stop");
        return None;
    };
    virsh(&["version"], "").await;
    Some(std::fs::read_to_string(file).unwrap().trim().to_owned())
}

async fn signal(signal: &str, pid: &str) {
    Program::new("kill", LIMIT).args([signal, pid]).run().await.unwrap();
}

/// H1: connected again, and listed anew.
#[tokio::test]
async fn h1_libvirtd_killed_and_started_again_finds_the_vm_alive() {
    const TEST: &str = "h1_libvirtd_killed_and_started_again_finds_the_vm_alive";
    let _alone = alone().await;
    let Some(bench) = Bench::real(TEST) else { return };
    let Some(pid) = libvirtd(TEST).await else { return };
    let (spec, name) = bench.started().await;
    let (gone, _) = bench.started().await;
    let mut console = bench.console(&spec).await;
    await_line(&mut console).await;
    signal("-KILL", &pid).await;
    await_line(&mut console).await;
    // In session mode the next call starts another one, once the old one is quite dead.
    assert_eq!(bench.first_state(&name).await, VmState::Running, "never anything else on the way");
    let mut both = [name.clone(), gone.id.clone().into()];
    both.sort();
    assert_eq!(bench.listed().await, both);
    let after = libvirtd(TEST).await.unwrap();
    assert_ne!(after, pid, "this is the new one's answer");

    // A VM that dies while nobody looks is just not there afterwards.
    let mut last_words = bench.console(&gone).await;
    await_line(&mut last_words).await;
    signal("-KILL", &after).await;
    tokio::io::AsyncWriteExt::write_all(&mut last_words, b"q").await.unwrap();
    bench.await_state(&gone.id.clone().into(), VmState::Gone).await;
    await_line(&mut console).await;
    assert_eq!(bench.listed().await, [name]);
    bench.end(&gone).await;
    bench.end(&spec).await;
    bench.assert_clean().await;
}

/// H4: a real libvirtd that is stopped.
#[tokio::test]
async fn h4_a_libvirtd_that_stands_still_times_out_and_holds_up_no_guest() {
    const TEST: &str = "h4_a_libvirtd_that_stands_still_times_out_and_holds_up_no_guest";
    let _alone = alone().await;
    let Some(bench) = Bench::real(TEST) else { return };
    let Some(pid) = libvirtd(TEST).await else { return };
    let (spec, name) = bench.started().await;
    signal("-STOP", &pid).await;
    let since = Instant::now();
    let (state, list) = tokio::join!(bench.hypervisor.state(&name), bench.hypervisor.list(&bench.installation));
    let waited = since.elapsed();
    let mut console = bench.console(&spec).await;
    await_line(&mut console).await;
    signal("-CONT", &pid).await;
    let error = state.unwrap_err();
    assert!(error.is_transient() && list.is_err(), "{error}");
    assert!((Duration::from_secs(9)..Duration::from_secs(25)).contains(&waited), "{waited:?}");
    assert_eq!(bench.first_state(&name).await, VmState::Running, "it answers again");
    bench.end(&spec).await;
    bench.assert_clean().await;
}
