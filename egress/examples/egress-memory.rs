//! How much memory does one process hold, idle and with a thousand connections that stand still both ways?
//!
//! `egress-memory PROGRAM` starts that program as the daemon does, with a guest and far ends of its own; the last lines are
//! figures: its proportional share of memory (PSS) in MiB, after a session has begun and a connection has moved, and
//! with all streams that a guest opens full to the brim. What the kernel holds for its sockets is not in it.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a measurement prints, and a failed one is a panic")]

use dayfly_egress::{Start, hand_over};
use dayfly_guest_config::{PASS_BYTES, Pass};
use dayfly_wire::{Limits, Opener, Stream, guest_handshake};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// As many as a guest opens.
const CONNECTIONS: usize = 1000;

/// No wait is longer.
const LIMIT: Duration = Duration::from_secs(120);

/// Of the far ends: small, so that a connection stands still soon.
const BUFFER: usize = 4096;

fn main() {
    let program = std::env::args_os().nth(1).expect("usage: egress-memory PROGRAM");
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(LIMIT, measure(program)).await.expect("it takes too long") });
}

fn pss_mib(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

#[expect(clippy::disallowed_methods, reason = "the program is what is measured")]
async fn measure(program: std::ffi::OsString) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    set_socket_recv_buffer_size(&listener, BUFFER).unwrap();
    set_socket_send_buffer_size(&listener, BUFFER).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    // Bytes that far ends sent and that guests sent: they stand still when these do.
    let moved = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&moved);
    tasks.spawn(async move {
        let mut far = JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let counted = Arc::clone(&counted);
            far.spawn(async move {
                while let Ok(count) = stream.write(&[b'd'; BUFFER]).await {
                    counted.fetch_add(count as u64, Ordering::Relaxed);
                }
            });
        }
    });

    let (socket, theirs) = StdUnixStream::pair().unwrap();
    let mut child = Command::new(&program).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
    let (theirs, guest) = StdUnixStream::pair().unwrap();
    let audit = tempfile::tempfile().unwrap();
    let pass = Pass::new([1; PASS_BYTES]).for_egress();
    let policy = serde_json::from_str(&format!(r#"{{"allow":["127.0.0.1:{port}"]}}"#)).unwrap();
    hand_over(socket, theirs.into(), audit.into(), &Start::new(&pass, policy, vec![])).await.unwrap();
    guest.set_nonblocking(true).unwrap();
    let proven = guest_handshake(UnixStream::from_std(guest).unwrap(), &pass, [7; 16]).await.unwrap();
    let (opener, session) = proven.connect(&Limits::egress(), || {}).await.unwrap();
    tasks.spawn(async move { drop(session.run().await) });

    let to = format!("127.0.0.1:{port}");
    let mut first = connect(&opener, &to).await;
    first.read_exact(&mut [0; 1000]).await.unwrap();
    first.reset();
    sleep(Duration::from_millis(500)).await;
    let idle = pss_mib(child.id());

    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        streams.push(connect(&opener, &to).await);
    }
    let open = pss_mib(child.id());
    for mut stream in streams {
        let counted = Arc::clone(&moved);
        // Nothing is read of it.
        tasks.spawn(async move {
            while let Ok(count) = stream.write(&[b'u'; 16 * 1024]).await {
                counted.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
    }
    let mut before = 0;
    while before != moved.load(Ordering::Relaxed) {
        before = moved.load(Ordering::Relaxed);
        sleep(Duration::from_secs(2)).await;
    }
    let loaded = pss_mib(child.id());
    println!("{CONNECTIONS} connections: open {open:.2} MiB; {} MiB moved until all stood still", before / 1024 / 1024);
    // It is alive, and ends with its VM.
    assert!(child.try_wait().unwrap().is_none());
    tasks.shutdown().await;
    while child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(10)).await;
    }
    println!("figure wire.egress_mib {idle:.2}");
    println!("figure wire.egress_loaded_mib {loaded:.2}");
}

async fn connect(opener: &Opener, to: &str) -> Stream {
    let mut stream = opener.open_to(to).await.unwrap();
    stream.accepted().await.unwrap();
    stream
}
