//! The fake's own promises. What it shares with libvirt is in `tests/backend`.

use super::*;
use dayfly::network::Listen as _;
use dayfly::rng::Rng;
use dayfly::vm::paths::Paths as _;
use dayfly::vm::{Accel, Attachment, Boot, Confinement, Hypervisor as _, VmError, VmSummary};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

const DIRECTORY: &str = "/run/d";

fn spec(id: &str) -> VmSpec {
    VmSpec {
        id: id.parse().unwrap(),
        installation: "installationaaaa".parse().unwrap(),
        bound: None,
        cpus: 1,
        memory_mib: 512,
        accel: Accel::Tcg,
        boot: Boot::Disk,
        overlay: PathBuf::from(format!("/o/df-{id}.qcow2")),
        base: "/b.qcow2".into(),
        frozen: None,
        attachment: Attachment::User,
        read_only: Vec::new(),
        nested: false,
        confine: Confinement::default(),
        socket_dir: DIRECTORY.into(),
    }
}

const A: &str = "aaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbb";

async fn started(fake: &FakeHypervisor, id: &str) -> (VmSpec, VmName) {
    let spec = spec(id);
    fake.make_overlay(&spec.overlay, &spec.base, 1).await.unwrap();
    fake.start(&spec).await.unwrap();
    let name = spec.id.clone().into();
    (spec, name)
}

/// Says hello, then answers each byte on the console until the VM ends.
async fn echo(mut machine: GuestMachine) {
    machine.console.write_all(b"hello\n").await.unwrap();
    loop {
        let byte = machine.console.read_u8().await.unwrap();
        machine.console.write_u8(byte).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn things_take_the_time_they_are_given() {
    let fake = FakeHypervisor::new();
    fake.set_guest(echo);
    fake.set_timing(Timing { boot: Duration::from_secs(20), destroy: Duration::from_secs(3), ..Timing::default() });
    let (spec, name) = started(&fake, A).await;
    let mut console = fake.host().sockets.console(&spec.socket_dir, &spec.id).await.unwrap();
    let since = Instant::now();
    console.read_exact(&mut [0; 6]).await.unwrap();
    assert_eq!(since.elapsed().as_secs(), 20);
    fake.destroy(&name).await.unwrap();
    assert_eq!(since.elapsed().as_secs(), 23);
    assert_eq!(console.read(&mut [0; 8]).await.unwrap(), 0, "end of stream tells the VM's end");
    assert_eq!(fake.counts(), Counts { overlays: 1, sockets: 1, ..Counts::default() });
    fake.unlink(&spec.overlay).await.unwrap();
    fake.host().sockets.remove(&spec.socket_dir, &spec.id).await.unwrap();
    assert!(fake.counts().is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_dies_in_a_call_leaves_its_effect_behind() {
    let fake = FakeHypervisor::new();
    fake.set_guest(echo);
    let spec = spec(A);
    fake.make_overlay(&spec.overlay, &spec.base, 1).await.unwrap();
    assert!(timeout(Duration::from_millis(1), fake.start(&spec)).await.is_err(), "the daemon is gone");
    assert_eq!(fake.counts().vms, 0);
    let next = fake.clone();
    sleep(Duration::from_secs(10)).await;
    let ours = VmSummary { name: spec.id.clone().into(), state: VmState::Running };
    assert_eq!(next.list(&spec.installation).await.unwrap(), [ours]);
    let mut channel = next.host().sockets.channel(&spec.socket_dir, &spec.id).await.unwrap();
    channel.write_all(b"config").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn calls_fail_where_they_are_told_to() {
    let fake = FakeHypervisor::new();
    let (spec, name) = started(&fake, A).await;
    let since = Instant::now();

    fake.fail_call(2);
    fake.state(&name).await.unwrap();
    assert!(matches!(fake.state(&name).await, Err(VmError::Unreachable { .. })));
    fake.state(&name).await.unwrap();

    fake.fail_nth(Op::Destroy, 2, Fault::AnswerLost);
    fake.fail_nth(Op::Destroy, 1, Fault::Hangs);
    assert!(matches!(fake.destroy(&name).await, Err(VmError::Deadline { seconds: 30, .. })));
    assert_eq!((since.elapsed().as_secs(), fake.counts().vms), (30, 1));
    assert!(fake.destroy(&name).await.is_err());
    assert_eq!(fake.counts().vms, 0, "only the answer was lost");

    fake.fail_nth(Op::Start, 1, Fault::HangsAfterEffect);
    assert!(matches!(fake.start(&spec).await, Err(VmError::Deadline { seconds: 60, .. })));
    fake.start(&spec).await.expect("it runs already");

    fake.fail_always_for(Op::Destroy, &spec.id, Fault::Refused("device or resource busy"));
    fake.judge_calls(|op, subject| {
        (op == Op::List && subject.starts_with("installation")).then_some(Fault::Unreachable)
    });
    let error = fake.destroy(&name).await.unwrap_err();
    assert_eq!(error.to_string(), format!("destroy VM `df-{A}`"));
    fake.destroy(&B.parse::<VmId>().unwrap().into()).await.expect("another VM's destroy works");
    assert!(fake.list(&spec.installation).await.is_err());
    fake.heal();
    fake.list(&spec.installation).await.unwrap();

    fake.set_reachable(false);
    assert!(fake.probe().await.is_err());
    fake.host().sockets.channel(&spec.socket_dir, &spec.id).await.expect("QEMU does not need libvirtd");
    fake.unlink(&spec.overlay).await.expect("nor does the disk");
    let errors = fake.history().iter().filter(|entry| entry.op.is_some() && entry.outcome != "ok").count();
    assert_eq!(errors, 7, "{:#?}", fake.history());
}

#[tokio::test(start_paused = true)]
async fn a_vm_can_stop_crash_pause_and_time_out_by_itself() {
    let fake = FakeHypervisor::new();
    let end = |fake: FakeHypervisor| async move { fake.history().last().unwrap().outcome.clone() };

    fake.set_guest(|machine: GuestMachine| async move { machine.power.crash() });
    let (_, name) = started(&fake, A).await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!(
        (fake.state(&name).await.unwrap(), end(fake.clone()).await),
        (VmState::Ended(Ending::Died), "ok".into())
    );
    assert!(fake.history().iter().any(|entry| entry.outcome == "crashed"));
    fake.set_endings_seen(false);
    assert_eq!(fake.state(&VmId::random(&Rng::seeded(9)).into()).await.unwrap(), VmState::Gone);

    fake.set_guest(|_| std::future::pending());
    fake.set_timing(Timing { lifetime: Some(Duration::from_secs(60)), ..Timing::default() });
    started(&fake, A).await;
    sleep(Duration::from_secs(61)).await;
    assert_eq!(end(fake.clone()).await, "powered off");

    fake.set_timing(Timing::default());
    fake.set_guest(|mut machine: GuestMachine| async move {
        machine.console.write_all(b"1").await.unwrap();
        machine.power.pause(Pause::Disk);
        machine.console.write_all(b"2").await.unwrap();
        std::future::pending().await
    });
    let (spec, name) = started(&fake, B).await;
    let mut console = fake.host().sockets.console(&spec.socket_dir, &spec.id).await.unwrap();
    assert_eq!(console.read_u8().await.unwrap(), b'1');
    assert_eq!(console.read_u8().await.unwrap(), b'2', "this poll goes on; the next waits");
    assert_eq!(fake.state(&name).await.unwrap(), VmState::Paused(Pause::Disk));
    fake.resume(&spec.id);
    fake.reboot_host();
    assert_eq!(fake.counts(), Counts { overlays: 2, ..Counts::default() });
}

#[tokio::test(start_paused = true)]
async fn a_paused_guest_stands_still() {
    let fake = FakeHypervisor::new();
    fake.set_guest(|mut machine: GuestMachine| async move {
        loop {
            sleep(Duration::from_secs(1)).await;
            machine.console.write_all(b".").await.unwrap();
        }
    });
    let (spec, _) = started(&fake, A).await;
    let mut console = fake.host().sockets.console(&spec.socket_dir, &spec.id).await.unwrap();
    console.read_u8().await.unwrap();
    fake.pause(&spec.id, Pause::Operator);
    assert!(timeout(Duration::from_secs(60), console.read_u8()).await.is_err());
    fake.resume(&spec.id);
    console.read_u8().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn doors_are_taken_refused_and_closed() {
    let fake = FakeHypervisor::new();
    let address: SocketAddr = "127.0.0.1:4000".parse().unwrap();
    fake.set_guest(move |machine: GuestMachine| async move {
        let mut door = machine.doors.connect(address).expect("the daemon listens");
        door.write_all(b"from inside").await.unwrap();
        std::future::pending().await
    });
    assert!(fake.connect(address).is_err());
    let mut door = fake.listen(address).await.unwrap();
    assert_eq!(fake.listen(address).await.err().unwrap().kind(), io::ErrorKind::AddrInUse);
    let (_, name) = started(&fake, A).await;
    let mut guest = door.accept().await.unwrap();
    let mut got = [0; 11];
    guest.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"from inside");
    fake.destroy(&name).await.unwrap();
    assert_eq!(guest.read(&mut got).await.unwrap(), 0, "a guest's connections end with it");
    drop(door);
    assert!(fake.connect(address).is_err());
    assert_eq!(fake.counts().listeners, 0);
}

#[tokio::test(start_paused = true)]
async fn steps_are_taken_one_at_a_time() {
    let fake = FakeHypervisor::new();
    fake.set_guest(echo);
    fake.hold();
    let spec = spec(A);
    assert!(timeout(Duration::from_secs(1), fake.make_overlay(&spec.overlay, &spec.base, 1)).await.is_err());
    fake.step();
    sleep(Duration::from_millis(1)).await;
    assert_eq!(fake.counts().overlays, 1);
    let start = fake.start(&spec);
    fake.step();
    start.await.unwrap();
    let mut console = fake.host().sockets.console(&spec.socket_dir, &spec.id).await.unwrap();
    assert!(timeout(Duration::from_secs(100), console.read_u8()).await.is_err(), "started, not booted");
    fake.step();
    assert_eq!(console.read_u8().await.unwrap(), b'h');
    fake.let_go();
    fake.destroy(&spec.id.clone().into()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn two_runs_of_the_same_story_have_the_same_history() {
    let mut stories = Vec::new();
    for _ in 0..2 {
        let fake = FakeHypervisor::new();
        fake.set_guest(echo);
        fake.fail_nth(Op::State, 1, Fault::Hangs);
        let ((_, a), (_, b)) = tokio::join!(started(&fake, A), started(&fake, B));
        let _ = tokio::join!(fake.state(&a), fake.destroy(&b), fake.list(a.id()));
        stories.push(fake.history().iter().map(ToString::to_string).collect::<Vec<_>>());
    }
    assert!(stories[0].len() > 8);
    assert_eq!(stories[0], stories[1]);
}
