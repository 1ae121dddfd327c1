//! How a process begins, what it may do then, and when it ends.

use crate::support::{Egress, FarEnd, LIMIT, audit_file, echoes, pass, policy, program, soon};
use dayfly_egress::policy::Policy;
use dayfly_egress::{HandOverError, Start, hand_over};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// Policies of these tests: the far end is on loopback, and so must be named.
fn allowing(port: u16) -> String {
    format!(r#"{{"allow":["127.0.0.1:{port}"]}}"#)
}

/// A process that its guest took over can open no file, start no program and listen nowhere: the kernel is asked, from outside.
#[tokio::test]
async fn a_running_process_is_confined() {
    let far = FarEnd::echo().await;
    let mut egress = Egress::start(&allowing(far.port), &[]).await;
    let status = egress.proc("status");
    assert!(status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"), "{status}");
    assert!(status.contains("\nThreads:\t1\n"), "{status}");
    // Nothing that was said is where others could read it.
    assert!(egress.proc("cmdline").ends_with("dayfly-egress\0"));
    assert!(!egress.proc("environ").contains(&pass().to_text()));
    // It serves all the same.
    let guest = egress.guest().await;
    let mut stream = guest.connect(format!("127.0.0.1:{}", far.port)).await.unwrap();
    echoes(&mut stream, b"hello").await;
}

/// A restart of the daemon is the end of nothing: neither its socket's end nor what a service manager sends.
#[tokio::test]
async fn a_process_outlives_who_started_it() {
    let far = FarEnd::echo().await;
    let mut egress = Egress::start(&allowing(far.port), &[]).await;
    let guest = egress.guest().await;
    let mut stream = guest.connect(format!("127.0.0.1:{}", far.port)).await.unwrap();
    let pid = Pid::from_raw(i32::try_from(egress.child.id()).unwrap()).unwrap();
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM] {
        kill_process(pid, signal).unwrap();
        echoes(&mut stream, b"still there").await;
    }
    // Its life is seen by who opens the file anew.
    let again = audit_file(&egress.audit);
    assert!(flock(&again, FlockOperation::NonBlockingLockExclusive).is_err());
    drop((stream, guest));
    let audit = egress.audit.clone();
    egress.port = None;
    soon(async {
        while flock(&again, FlockOperation::NonBlockingLockExclusive).is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(audit.exists());
    let (status, destinations) = egress.end().await;
    assert!(status.success());
    assert_eq!((destinations.len(), destinations[0].connections), (1, 1));
    assert_eq!((destinations[0].up, destinations[0].down), (44, 44));
}

/// A guest's program that begins anew finds the same port; one without the pass finds nothing.
#[tokio::test]
async fn one_session_follows_the_other() {
    let far = FarEnd::echo().await;
    let mut egress = Egress::start(&allowing(far.port), &[]).await;
    for _ in 0..5 {
        let guest = egress.guest().await;
        let mut stream = guest.connect(format!("127.0.0.1:{}", far.port)).await.unwrap();
        echoes(&mut stream, b"hello").await;
        drop((stream, guest));
    }
    let port = egress.port.as_ref().unwrap().try_clone().unwrap();
    port.set_nonblocking(true).unwrap();
    let port = tokio::net::UnixStream::from_std(port).unwrap();
    let stranger = dayfly_guest_config::Pass::new([1; 32]);
    let shaken = tokio::time::timeout(LIMIT, dayfly_wire::guest_handshake(port, &stranger, [9; 16])).await;
    assert!(shaken.unwrap().is_err());
    let guest = egress.guest().await;
    let mut stream = guest.connect(format!("127.0.0.1:{}", far.port)).await.unwrap();
    echoes(&mut stream, b"hello").await;
    drop((stream, guest));
    let (_, destinations) = egress.end().await;
    assert_eq!(destinations[0].connections, 6);
}

#[tokio::test]
async fn what_makes_no_sense_at_the_start_is_said_and_ends_the_process() {
    let says = |text: &str| {
        let (mut child, mut socket) = program();
        socket.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        // Its end may be a broken one, where not all was read.
        let _ = socket.read_to_string(&mut answer);
        assert_eq!(child.wait().unwrap().code(), Some(1), "{answer}");
        answer
    };
    let line = serde_json::to_string(&Start::new(&pass(), Policy::default(), vec![])).unwrap();
    assert!(says(&format!("{line}\n")).contains("hands over 0 descriptors"));
    assert!(says("nonsense\n").contains("makes no sense"));
    let endless = says(&"x".repeat(70_000));
    assert!(endless.contains("no end within 65536 bytes"), "{endless}");
    let error = says(&format!("{}\n", line.replace("\"allow\":[]", "\"allow\":[\"10.0.0.1/8\"]")));
    assert!(error.contains("write `10.0.0.0/8`"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let audit = || audit_file(&dir.path().join("audit"));
    let start = Start::new(&pass(), policy("{}"), vec![]);
    let (_kept, port) = UnixStream::pair().unwrap();
    let (mut first, socket) = program();
    soon(hand_over(socket, port.into(), audit().into(), &start)).await.unwrap();
    let (_kept, port) = UnixStream::pair().unwrap();
    let (mut second, socket) = program();
    let error = soon(hand_over(socket, port.into(), audit().into(), &start)).await.unwrap_err();
    assert!(matches!(&error, HandOverError::Refused(why) if why.contains("in use")), "{error}");
    assert!(!second.wait().unwrap().success());
    first.kill().unwrap();
    first.wait().unwrap();

    let newer = line.replace("\"version\":1", "\"version\":2");
    let (_kept, port) = UnixStream::pair().unwrap();
    let (mut child, socket) = program();
    let newer: Start = serde_json::from_str(&newer).unwrap();
    let error = soon(hand_over(socket, port.into(), audit().into(), &newer)).await.unwrap_err();
    assert!(error.to_string().contains("speaks version 2, this program 1"), "{error}");
    child.wait().unwrap();
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the program is what is tested")]
fn arguments_are_a_mistake_in_usage() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_dayfly-egress")).arg("--help").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("has no arguments"));
}

/// A process that died is followed by another one, which counts on in the same file.
#[tokio::test]
async fn the_next_process_of_a_vm_goes_on_counting() {
    let far = FarEnd::echo().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    for n in 1..=2u64 {
        let (port, guest) = UnixStream::pair().unwrap();
        let (mut child, socket) = program();
        let start = Start::new(&pass(), policy(&allowing(far.port)), vec![]);
        soon(hand_over(socket, port.into(), audit_file(&path).into(), &start)).await.unwrap();
        guest.set_nonblocking(true).unwrap();
        let guest = tokio::net::UnixStream::from_std(guest).unwrap();
        let proven = soon(dayfly_wire::guest_handshake(guest, &pass(), [7; 16])).await.unwrap();
        let (opener, session) = proven.connect(&dayfly_wire::Limits::egress(), || {}).await.unwrap();
        let session = crate::support::spawn(session.run());
        let mut stream = soon(opener.open_to(&format!("127.0.0.1:{}", far.port))).await.unwrap();
        echoes(&mut stream, b"hello").await;
        drop(stream);
        let read = || dayfly_egress::audit::read(&std::fs::read(&path).unwrap());
        soon(async {
            while read().first().is_none_or(|to| to.up < 5 * n) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
        assert_eq!((read().len(), read()[0].connections), (1, n));
        child.kill().unwrap();
        child.wait().unwrap();
        session.abort();
    }
}
