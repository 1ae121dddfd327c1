//! A shell from an operator's connection to a guest's stream, over a real socket in between.

use super::*;
use crate::clock::Clock;
use crate::files::RealFiles;
use crate::rng::Rng;
use crate::vm::VmSpec;
use crate::vm::paths::RealPaths;
use crate::vm::sockets::Sockets;
use dayfly_guest_config::{PASS_BYTES, Pass, ShellFrame, ShellFrames, TerminalSize};
use dayfly_wire::{Limits, guest_handshake};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::UnixListener;

const SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };
const VM: &str = "abcdefghijklmnop";

fn pass() -> Pass {
    Pass::new([1; PASS_BYTES]).for_shell()
}

/// A guest program that answers what is typed: sizes and typed bytes in words, `q` by ending its shell.
async fn guest(listener: UnixListener) {
    let (pipe, _) = listener.accept().await.unwrap();
    let proven = guest_handshake(pipe, &pass(), [7; 16]).await.unwrap();
    let (opener, session) = proven.connect(&Limits::default(), || {}).await.unwrap();
    let serve = async {
        let mut stream = opener.open().await.unwrap();
        stream.accepted().await.unwrap();
        let (mut frames, mut buffer) = (ShellFrames::default(), [0; 1024]);
        loop {
            while let Some(frame) = frames.next_frame().unwrap() {
                let text = match frame {
                    ShellFrame::Begin { size, term } => {
                        format!("begun {}x{} {term}\x1b]0;title\x07\x1b[6n ", size.columns, size.rows)
                    }
                    ShellFrame::Size(size) => format!("sized {}x{} ", size.columns, size.rows),
                    ShellFrame::Typed(bytes) if bytes == b"q" => {
                        stream.shutdown().await.unwrap();
                        return std::future::pending::<()>().await;
                    }
                    ShellFrame::Typed(bytes) => format!("typed {} ", String::from_utf8_lossy(&bytes)),
                };
                stream.write_all(text.as_bytes()).await.unwrap();
            }
            let count = stream.read(&mut buffer).await.unwrap();
            frames.push(&buffer[..count]);
        }
    };
    tokio::select! {
        () = serve => {}
        _ = session.run() => {}
    }
}

async fn shell(dir: &Path, clock: &Clock, pass: Pass) -> Shell {
    let recordings = Recordings::new(Arc::new(RealFiles), clock.clone(), dir, Duration::from_secs(60));
    let whose = Whose { job: "ci/42".into(), file: "abc-42".into(), vm: format!("df-{VM}"), user: 0 };
    let inside = Inside {
        sockets: Sockets::new(Arc::new(RealPaths::default()), None),
        directory: dir.to_owned(),
        vm: VM.parse().unwrap(),
        pass,
        rng: Rng::seeded(1),
    };
    Shell { inside, recording: recordings.begin(&whose, SIZE).await.unwrap(), size: SIZE, term: "vt100".into() }
}

async fn until(operator: &mut DuplexStream, text: &str) -> String {
    let (mut all, mut buffer) = (String::new(), [0; 1024]);
    while !all.contains(text) {
        let count = operator.read(&mut buffer).await.unwrap();
        assert!(count > 0, "no {text:?} in {all:?}");
        all.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    all
}

#[tokio::test]
async fn what_is_typed_goes_in_and_what_may_be_shown_comes_out_and_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
    let listener = UnixListener::bind(VmSpec::shell_socket(dir.path(), &VM.parse().unwrap())).unwrap();
    let shell = shell(dir.path(), &clock, pass()).await;
    let recording = shell.recording.path().to_owned();
    let (mut operator, end) = tokio::io::duplex(64 * 1024);
    let story = async {
        assert_eq!(until(&mut operator, "vt100 ").await, "begun 80x24 vt100 ");
        operator.write_all(&ShellFrame::Typed(b"ls".to_vec()).to_bytes()).await.unwrap();
        until(&mut operator, "typed ls ").await;
        let size = ShellFrame::Size(TerminalSize { rows: 30, columns: 100 });
        operator.write_all(&size.to_bytes()).await.unwrap();
        until(&mut operator, "sized 100x30 ").await;
        operator.write_all(&ShellFrame::Typed(b"q".to_vec()).to_bytes()).await.unwrap();
        let mut rest = String::new();
        operator.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "\x1b[0m\x1b(B", "what the guest may have changed is put back");
    };
    let (why, (), ()) = tokio::join!(shell.run(end), story, async {
        tokio::select! {
            () = guest(listener) => {}
            // The guest goes on for as long as its host is there.
            () = tokio::time::sleep(Duration::from_secs(2)) => {}
        }
    });
    assert_eq!(why, "its shell has ended");
    let recorded = std::fs::read_to_string(recording).unwrap();
    assert!(recorded.contains("begun 80x24 vt100 ") && recorded.contains("100x30"), "{recorded}");
    assert!(!recorded.contains("0;title") && !recorded.contains("[6n"), "{recorded}");
}

/// Nobody behind the port, another pass, and an operator who goes: each ends the shell with its reason.
#[tokio::test]
async fn a_shell_that_cannot_be_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap());
    let (mut operator, end) = tokio::io::duplex(4096);
    let why = shell(dir.path(), &clock, pass()).await.run(end).await;
    assert!(why.contains("made by an older dayfly"), "{why}");
    let mut said = String::new();
    operator.read_to_string(&mut said).await.unwrap();
    assert!(said.contains("[dayfly: this machine was made by an older dayfly"), "{said}");

    let listener = UnixListener::bind(VmSpec::shell_socket(dir.path(), &VM.parse().unwrap())).unwrap();
    clock.jump(true, Duration::from_secs(1));
    let shell = shell(dir.path(), &clock, pass()).await;
    let (mut operator, end) = tokio::io::duplex(4096);
    let leave = async {
        until(&mut operator, "vt100 ").await;
        drop(operator);
    };
    let (why, (), ()) = tokio::join!(shell.run(end), leave, guest(listener));
    assert_eq!(why, "its operator has gone");
}
