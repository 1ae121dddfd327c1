//! What only plain QEMU can show: machines that outlive a daemon which is killed, and ends that nobody was there to see.

use crate::bench::{Bench, LIMIT, await_line, qemu};
use crate::contract::powers_off;
use dayfly::process::Program;
use dayfly::vm::{Ending, Pause, VmId, VmName, VmSpec, VmState, VmSummary};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

/// What the child of the first test is told: directory of the bench, installation, id of the machine.
const CHILD: &str = "DAYFLY_TEST_CHILD";

fn record(bench: &Bench, name: &VmName) -> PathBuf {
    bench.sockets().join(format!("{name}.vm"))
}

/// The processes whose input is this machine's record.
fn processes(bench: &Bench, name: &VmName) -> Vec<String> {
    let Ok(record) = std::fs::metadata(record(bench, name)) else { return Vec::new() };
    let is_its = |pid: &String| {
        let input = std::fs::metadata(Path::new("/proc").join(pid).join("fd/0"));
        input.is_ok_and(|input| (input.dev(), input.ino()) == (record.dev(), record.ino()))
    };
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    all.filter(|name| name.bytes().all(|b| b.is_ascii_digit())).filter(is_its).collect()
}

/// Sends a signal to a machine's QEMU.
async fn signal(bench: &Bench, name: &VmName, signal: &str) {
    let found = processes(bench, name);
    assert_eq!(found.len(), 1, "{found:?}");
    Program::new("kill", LIMIT).args([signal, &found[0]]).run().await.unwrap();
}

async fn await_no_process(bench: &Bench, name: &VmName) {
    let gone = async {
        while !processes(bench, name).is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, gone).await.expect("its QEMU goes");
}

/// Types a letter at the guest's console once it listens.
async fn press(bench: &Bench, spec: &VmSpec, letter: &[u8]) {
    let mut console = bench.console(spec).await;
    await_line(&mut console).await;
    console.write_all(letter).await.unwrap();
    // It takes the letter from the line before the connection goes.
    sleep(Duration::from_secs(1)).await;
}

/// Not a test: the daemon that the next one kills.
#[tokio::test]
async fn a_daemon_that_will_be_killed() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let told: Vec<&str> = told.split(' ').collect();
    let [dir, installation, id] = told[..] else { panic!("three words are told") };
    let dir = Path::new(dir);
    let host = qemu(&dir.join("sockets"));
    let id: VmId = id.parse().unwrap();
    let spec = VmSpec {
        installation: installation.parse().unwrap(),
        overlay: dir.join("disks").join(format!("df-{id}.qcow2")),
        base: dir.join("base.qcow2"),
        socket_dir: dir.join("sockets"),
        ..Bench::qemu("the child").unwrap().spec()
    };
    let spec = VmSpec { id, ..spec };
    host.disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
    host.hypervisor.start(&spec).await.unwrap();
    println!("\nSTARTED");
    std::future::pending::<()>().await;
}

/// E4: the daemon and its whole process group are killed; the machine runs on, the next one adopts it by name,
/// installation and process, talks to it and sees how it ends.
#[tokio::test]
async fn e4_a_machine_outlives_a_daemon_that_is_killed_and_is_adopted() {
    let Some(bench) = Bench::qemu("e4_a_machine_outlives_a_daemon_that_is_killed_and_is_adopted") else { return };
    let spec = bench.spec();
    let name: VmName = spec.id.clone().into();
    let dir = bench.base().parent().unwrap().to_owned();
    #[expect(clippy::disallowed_methods, reason = "a daemon's stand-in, which is killed")]
    let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "qemu::a_daemon_that_will_be_killed", "--nocapture"]).process_group(0);
    command.env(CHILD, format!("{} {} {}", dir.display(), bench.installation, spec.id));
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let started = async { while lines.next_line().await.unwrap().expect("it starts the machine") != "STARTED" {} };
    timeout(LIMIT, started).await.unwrap();
    let group = format!("-{}", child.id().unwrap());
    Program::new("kill", LIMIT).args(["-KILL", "--", &group]).run().await.unwrap();
    assert!(!child.wait().await.unwrap().success());

    assert_eq!(processes(&bench, &name).len(), 1, "it runs on");
    let there = [VmSummary { name: name.clone(), state: VmState::Running }];
    assert_eq!(bench.hypervisor.list(&bench.installation).await.unwrap(), there);
    assert_eq!(bench.hypervisor.list(&VmId::random(&bench.rng)).await.unwrap(), []);
    powers_off(&bench, &spec, &name).await;
    bench.assert_clean().await;
}

/// U47: how a machine ended while no daemon was there.
#[tokio::test]
async fn u47_an_end_that_nobody_was_there_to_see_is_told_all_the_same() {
    let Some(mut bench) = Bench::qemu("u47_an_end_that_nobody_was_there_to_see_is_told_all_the_same") else { return };
    for (letter, ending) in
        [(b"q", Ending::PoweredOff), (b"r", Ending::Restarted), (b"p", Ending::Panicked), (b"s", Ending::Slept)]
    {
        let (spec, name) = bench.started().await;
        // The daemon goes, and with it whoever listened to QEMU.
        bench.next_daemon();
        press(&bench, &spec, letter).await;
        assert_eq!(processes(&bench, &name).len(), 1, "QEMU waits to be asked");
        bench.next_daemon();
        assert_eq!(bench.await_ending(&name).await, ending);
        bench.end(&spec).await;
        assert_eq!(processes(&bench, &name).len(), 0);
        bench.assert_clean().await;
    }
}

/// U47: what the host does to a machine is told from what it does itself, seen or not.
#[tokio::test]
async fn u47_a_qemu_that_the_host_ended_is_told_from_one_that_died() {
    let Some(mut bench) = Bench::qemu("u47_a_qemu_that_the_host_ended_is_told_from_one_that_died") else { return };
    for (how, ending) in [("-TERM", Ending::Destroyed), ("-KILL", Ending::Died)] {
        for seen in [true, false] {
            let (spec, name) = bench.started().await;
            if !seen {
                bench.next_daemon();
            }
            await_line(&mut bench.console(&spec).await).await;
            signal(&bench, &name, how).await;
            await_no_process(&bench, &name).await;
            if !seen {
                bench.next_daemon();
            }
            assert_eq!(bench.await_ending(&name).await, ending, "{how}, seen: {seen}");
            assert_eq!(bench.listed().await, []);
            bench.end(&spec).await;
            bench.assert_clean().await;
        }
    }
}

/// V11: somebody at the host pauses a machine; it is told as that, and goes on, or is destroyed.
#[tokio::test]
async fn v11_a_machine_that_somebody_paused_is_told_as_that() {
    let Some(mut bench) = Bench::qemu("v11_a_machine_that_somebody_paused_is_told_as_that") else { return };
    let (spec, name) = bench.started().await;
    for (command, state) in [
        ("stop", VmState::Paused(Pause::Operator)),
        ("cont", VmState::Running),
        ("stop", VmState::Paused(Pause::Operator)),
    ] {
        // QEMU serves one at a time: the daemon is away.
        bench.next_daemon();
        let mut monitor = UnixStream::connect(bench.sockets().join(format!("{name}.qmp"))).await.unwrap();
        let said = format!("{{\"execute\":\"qmp_capabilities\"}}\n{{\"execute\":\"{command}\"}}\n");
        monitor.write_all(said.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(monitor).lines();
        let mut answers = 0;
        while answers < 2 {
            answers += usize::from(lines.next_line().await.unwrap().unwrap().contains("\"return\""));
        }
        drop(lines);
        assert_eq!(bench.hypervisor.state(&name).await.unwrap(), state);
        assert_eq!(
            bench.hypervisor.list(&bench.installation).await.unwrap(),
            [VmSummary { name: name.clone(), state }]
        );
    }
    bench.end(&spec).await;
    bench.assert_clean().await;
}

/// H4, V14: a QEMU that stands still times out, holds up no other, and is ended.
#[tokio::test]
async fn h4_a_qemu_that_stands_still_times_out_holds_up_no_other_and_is_ended() {
    let Some(bench) = Bench::qemu("h4_a_qemu_that_stands_still_times_out_holds_up_no_other_and_is_ended") else {
        return;
    };
    let (spec, name) = bench.started().await;
    let (other, other_name) = bench.started().await;
    signal(&bench, &name, "-STOP").await;
    let error = bench.hypervisor.state(&name).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(bench.hypervisor.state(&other_name).await.unwrap(), VmState::Running);
    assert_eq!(bench.listed().await.len(), 2, "both are there");
    bench.end(&spec).await;
    assert_eq!(processes(&bench, &name).len(), 0);
    bench.end(&other).await;
    bench.assert_clean().await;
}

/// H16: a file that looks like a machine's record, and a process of another's, are left alone.
#[tokio::test]
async fn h16_a_record_of_nobody_is_no_machine() {
    let Some(bench) = Bench::qemu("h16_a_record_of_nobody_is_no_machine") else { return };
    let (ours, name) = bench.started().await;
    let never: VmName = VmId::random(&bench.rng).into();
    std::fs::write(record(&bench, &never), "{\"installation\":\"").unwrap();
    assert_eq!(bench.listed().await, [name]);
    assert!(!record(&bench, &never).exists(), "what a cut start has left is cleaned");
    bench.end(&ours).await;
    bench.assert_clean().await;
}
