//! With a program that stands for `dayfly-egress` as far as its life goes: it takes the descriptors that it is handed and
//! ends with the port, or does not.

use super::*;
use crate::vm::VmId;
use dayfly_guest_config::Pass;
use std::os::unix::net::UnixListener;

fn of(dir: &Path) -> EgressOf {
    EgressOf { socket_dir: dir.to_owned(), vm: "abcdefghijklmnop".parse::<VmId>().unwrap() }
}

fn terms() -> Terms {
    Terms { pass: Pass::new([7; 32]), policy: Policy::default() }
}

/// The lock is the process, whoever asks; and it is taken before anybody is started.
#[tokio::test]
async fn one_that_holds_the_audit_is_at_work_whoever_asks() {
    let dir = tempfile::tempdir().unwrap();
    let (of, egress) = (of(dir.path()), EgressProcesses::new(None));
    assert!(egress.audit(&of).await.unwrap().is_empty(), "there has been none");
    egress.gone(&of).await;
    egress.end(&of).await.unwrap();
    let held = open_locked(&of.audit()).unwrap().expect("nobody holds it");
    assert!(open_locked(&of.audit()).unwrap().is_none());
    egress.ensure(&of, &terms()).await.expect("one is at work, so that neither port nor program is looked for");
    let free = tokio::time::timeout(Duration::from_millis(50), egress.gone(&of)).await;
    assert!(free.is_err(), "it is at work");
    drop(held);
    egress.gone(&of).await;
}

/// A machine that is gone has no port: nobody is started for it, and the audit is free again.
#[tokio::test]
async fn nobody_is_started_for_a_machine_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (of, egress) = (of(dir.path()), EgressProcesses::new(None));
    let error = egress.ensure(&of, &terms()).await.unwrap_err();
    assert!(error.is_of_vm(), "{error}");
    assert!(!is_held(&of.audit()).unwrap());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(of.audit()).unwrap().permissions()) & 0o777;
    assert_eq!(mode, 0o600, "what a job has reached is nobody else's");
}

/// Whoever listens at the service's socket is told, and one that says no is quoted.
#[tokio::test]
async fn a_service_that_starts_them_is_asked_first_and_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let of = of(dir.path());
    let service = dir.path().join("service.sock");
    let (_port, listener) = (UnixListener::bind(of.port()).unwrap(), UnixListener::bind(&service).unwrap());
    let other = std::thread::spawn(move || {
        use std::io::{BufRead as _, Write as _};
        let (mut socket, _) = listener.accept().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(&socket).read_line(&mut line).unwrap();
        socket.write_all(b"{\"error\":\"no room\"}\n").unwrap();
        line
    });
    let error = EgressProcesses::new(Some(&service)).ensure(&of, &terms()).await.unwrap_err();
    assert!(crate::telemetry::chain(&error).ends_with("dayfly-egress: no room"), "{error}");
    let line = other.join().unwrap();
    let door = Pass::new([7; 32]);
    assert!(
        line.contains(&door.for_egress().to_text()) && !line.contains(&door.to_text()),
        "the door's pass stays here"
    );
    assert!(!is_held(&of.audit()).unwrap());
}

/// One that does not end with its machine is killed, found by what it holds; who else has the file open is left alone, as
/// this very test is.
#[tokio::test]
async fn one_that_hangs_is_killed_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let (of, egress) = (of(dir.path()), EgressProcesses::new(None));
    // A script, which the kernel calls by its own name. Nobody ever writes where it waits.
    let (program, fifo) = (dir.path().join(PROGRAM), dir.path().join("fifo"));
    plain::tests::fifo(&fifo);
    std::fs::write(&program, format!("#!/bin/sh\nread -r never <{}\n", fifo.display())).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let held = open_locked(&of.audit()).unwrap().expect("nobody holds it");
    let _reader = plain::open(&of.audit()).unwrap();
    start_outliving(program.as_os_str(), &[] as &[&str], &[], held, Stdio::null()).unwrap();
    assert!(is_held(&of.audit()).unwrap());
    tokio::time::timeout(Duration::from_secs(20), egress.end(&of)).await.unwrap().unwrap();
    assert!(!is_held(&of.audit()).unwrap());
}
