//! A host that asks for a shell gets one on a terminal of its own, and nobody else does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use dayfly_guest::relay::port::{Opening, Pipe, Port};
use dayfly_guest::shell;
use dayfly_guest_config::{Nonce, PASS_BYTES, Pass, ShellFrame, TerminalSize};
use dayfly_wire::{HandshakeError, HostSession, Limits, Stream, host_handshake};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

/// Long enough for a busy machine; each wait ends by what it waits for.
const LIMIT: Duration = Duration::from_secs(30);

/// A port whose other end is whoever connects to this path.
struct Socket(PathBuf, Option<UnixListener>);

impl Port for Socket {
    fn open(&mut self) -> Opening<'_> {
        Box::pin(async {
            let listener = match &mut self.1 {
                Some(listener) => listener,
                none => none.insert(UnixListener::bind(&self.0)?),
            };
            Ok(Box::new(listener.accept().await?.0) as Box<dyn Pipe>)
        })
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it takes too long")
}

fn offered() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    let pass = Pass::new([1; PASS_BYTES]).for_shell();
    shell::offer(Box::new(Socket(path.clone(), None)), pass, env!("CARGO_BIN_EXE_dayfly-guest").into()).unwrap();
    (dir, path)
}

async fn session(path: &Path, pass: &Pass, nonce: Nonce) -> Result<HostSession<UnixStream>, HandshakeError> {
    let pipe = soon(async {
        loop {
            match UnixStream::connect(path).await {
                Ok(pipe) => return pipe,
                Err(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    })
    .await;
    let proven = soon(host_handshake(pipe, pass, nonce)).await?;
    Ok(soon(proven.serve(&Limits::default())).await.unwrap())
}

async fn begin(session: &mut HostSession<UnixStream>) -> Stream {
    let mut stream = soon(session.accept()).await.unwrap().unwrap();
    let size = TerminalSize { rows: 33, columns: 101 };
    let begin = ShellFrame::Begin { size, term: "vt100".into() };
    soon(stream.write_all(&begin.to_bytes())).await.unwrap();
    stream
}

/// Types this, and reads until it has seen that, or all.
async fn talk(session: &mut HostSession<UnixStream>, stream: &mut Stream, typed: &str, until: Option<&str>) -> String {
    let talking = async {
        stream.write_all(&ShellFrame::Typed(typed.as_bytes().to_vec()).to_bytes()).await.unwrap();
        let (mut all, mut buffer) = (Vec::new(), [0; 1024]);
        loop {
            let text = String::from_utf8_lossy(&all).into_owned();
            if until.is_some_and(|until| text.contains(until)) {
                return text;
            }
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return text,
                Ok(count) => all.extend_from_slice(&buffer[..count]),
            }
        }
    };
    soon(async {
        tokio::select! {
            biased;
            text = talking => text,
            more = session.accept() => panic!("{:?}", more.map(|more| more.map(drop))),
        }
    })
    .await
}

#[tokio::test]
async fn a_host_gets_a_shell_on_a_terminal_of_its_own_again_and_again() {
    let (_dir, path) = offered();
    let pass = Pass::new([1; PASS_BYTES]).for_shell();
    for nonce in [2, 3] {
        let mut session = session(&path, &pass, [nonce; 16]).await.unwrap();
        let mut stream = begin(&mut session).await;
        let seen = talk(&mut session, &mut stream, "stty size; echo $TERM-$((6*7)); tty\n", Some("/dev/pts/")).await;
        assert!(seen.contains("33 101") && seen.contains("vt100-42"), "{seen}");
        // What is printed last comes, and then the end.
        let rest = talk(&mut session, &mut stream, "sleep 1000 & echo l''ast; exit\n", None).await;
        assert!(rest.contains("last"), "{rest}");
    }
}

/// What a host leaves when it goes is ended: nothing of it holds the next one up.
#[tokio::test]
async fn a_shell_goes_with_its_host() {
    let (dir, path) = offered();
    let pass = Pass::new([1; PASS_BYTES]).for_shell();
    let mark = dir.path().join("mark");
    let mut first = session(&path, &pass, [2; 16]).await.unwrap();
    let mut stream = begin(&mut first).await;
    let typed = format!("echo $$ > {}.new; mv {0}.new {0}; echo r''eady; sleep 1000\n", mark.display());
    talk(&mut first, &mut stream, &typed, Some("ready")).await;
    let leader = std::fs::read_to_string(&mark).unwrap();
    drop((stream, first));
    let gone = || !Path::new("/proc").join(leader.trim()).exists();
    soon(async {
        while !gone() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let mut second = session(&path, &pass, [3; 16]).await.unwrap();
    let mut stream = begin(&mut second).await;
    assert!(talk(&mut second, &mut stream, "echo $((40+2))\n", Some("42")).await.contains("42"));
}

/// The pass of the door opens no shell, nor does one that was made up.
#[tokio::test]
async fn nobody_gets_a_shell_without_the_pass_for_it() {
    let (_dir, path) = offered();
    for (nonce, pass) in [(2, Pass::new([1; PASS_BYTES])), (3, Pass::new([9; PASS_BYTES]).for_shell())] {
        let refused = timeout(Duration::from_secs(3), session(&path, &pass, [nonce; 16])).await;
        assert!(!matches!(refused, Ok(Ok(_))), "a session began");
    }
    let mut right = session(&path, &Pass::new([1; PASS_BYTES]).for_shell(), [4; 16]).await.unwrap();
    begin(&mut right).await;
}
