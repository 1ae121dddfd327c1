//! Doors behind a port, which is a socket here: who listens is the guest, and each connection a host.

use super::super::forward::Forward;
use super::super::port::{Opening, Pipe, Port};
use super::super::{Door, Limits, Relay, Target};
use super::{LIMIT, limits, pass, relay, wait_idle};
use dayfly_wire::{Asked, HostSession, Stream, forward_authority, host_handshake};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

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

struct Guest {
    relay: Relay,
    front: SocketAddr,
    _dir: tempfile::TempDir,
    port: PathBuf,
}

impl Guest {
    fn new(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (relay, front) = relay(limits);
        Self { relay, front, port: dir.path().join("port"), _dir: dir }
    }

    fn hand_over(&self, patience: Duration) {
        self.hand_over_with(patience, Vec::new());
    }

    fn hand_over_with(&self, patience: Duration, forwards: Vec<Forward>) {
        let door = Door::Wire(Box::new(Socket(self.port.clone(), None)));
        self.relay.hand_over(Target { door, pass: pass(1), patience, forwards }).unwrap();
    }

    async fn runner(&self) -> TcpStream {
        soon(TcpStream::connect(self.front)).await.unwrap()
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it takes too long")
}

/// A host that connects to the port, once it is there.
async fn host(port: &Path) -> UnixStream {
    soon(async {
        loop {
            match UnixStream::connect(port).await {
                Ok(stream) => return stream,
                Err(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    })
    .await
}

/// A daemon with a session.
async fn daemon(port: &Path, nonce: u8) -> HostSession<UnixStream> {
    let host = host(port).await;
    let door = pass(1);
    let proven = soon(host_handshake(host, &door, [nonce; 16])).await.unwrap();
    soon(proven.serve(&dayfly_wire::Limits::default())).await.unwrap()
}

/// The next stream, while the session goes on behind it.
async fn stream(session: &mut HostSession<UnixStream>) -> Stream {
    soon(session.accept()).await.unwrap().unwrap()
}

/// Does this while the session moves.
async fn beside<T>(session: &mut HostSession<UnixStream>, what: impl Future<Output = T>) -> T {
    soon(async {
        tokio::select! {
            biased;
            done = what => done,
            more = session.accept() => panic!("{:?}", more.map(|more| more.map(|_| "another stream"))),
        }
    })
    .await
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let guest = Guest::new(limits());
    guest.hand_over(LIMIT);
    let mut session = daemon(&guest.port, 2).await;
    let mut runner = guest.runner().await;
    let mut door = stream(&mut session).await;
    let talk = async {
        let (request, answer) = (vec![b'q'; 300_000], vec![b'a'; 500_000]);
        let ask = async {
            runner.write_all(&request).await.unwrap();
            runner.shutdown().await.unwrap();
            let mut came = Vec::new();
            runner.read_to_end(&mut came).await.unwrap();
            assert!(came == answer, "the answer must come whole");
        };
        let serve = async {
            // The runner's end arrives while the answer has not begun.
            let mut came = Vec::new();
            door.read_to_end(&mut came).await.unwrap();
            assert!(came == request);
            door.write_all(&answer).await.unwrap();
            door.shutdown().await.unwrap();
        };
        tokio::join!(ask, serve);
    };
    beside(&mut session, talk).await;
    wait_idle(&guest.relay);
}

#[tokio::test]
async fn a_connection_is_held_until_there_is_a_target_and_a_host() {
    let guest = Guest::new(limits());
    let mut early = guest.runner().await;
    early.write_all(b"POST /poll").await.unwrap();
    sleep(Duration::from_millis(50)).await;
    assert!(!guest.port.exists(), "no target, no port");
    guest.hand_over(LIMIT);
    sleep(Duration::from_millis(50)).await;
    let mut session = daemon(&guest.port, 2).await;
    let mut door = stream(&mut session).await;
    let mut came = [0; 10];
    beside(&mut session, async { door.read_exact(&mut came).await.unwrap() }).await;
    assert_eq!(&came, b"POST /poll");
}

/// Until the door has proven itself, nothing of the runner's and no proof of ours; and somebody who is there and is no
/// door keeps nobody out for long.
#[tokio::test]
async fn somebody_else_at_the_port_learns_nothing() {
    let guest = Guest::new(limits());
    guest.hand_over(LIMIT);
    let mut runner = guest.runner().await;
    runner.write_all(b"PRIVATE-TOKEN: secret").await.unwrap();
    for other in [None, Some(pass(2))] {
        let mut stranger = host(&guest.port).await;
        match other {
            None => {
                let mut heard = Vec::new();
                let _ = soon(stranger.read_to_end(&mut heard)).await;
                assert!(heard.iter().all(|byte| *byte == 0xff), "only filler, before anything was said");
            }
            Some(other) => drop(soon(host_handshake(stranger, &other, [9; 16])).await.unwrap_err()),
        }
    }
    let mut session = daemon(&guest.port, 2).await;
    let mut door = stream(&mut session).await;
    let mut came = [0; 21];
    beside(&mut session, async { door.read_exact(&mut came).await.unwrap() }).await;
    assert_eq!(&came, b"PRIVATE-TOKEN: secret");
}

/// E1: a restart of the daemon is a pause: what was accepted ends, what was not is accepted by the next one.
#[tokio::test]
async fn a_daemon_that_restarts_is_waited_for() {
    let guest = Guest::new(limits());
    guest.hand_over(LIMIT);
    let mut first = daemon(&guest.port, 2).await;
    let mut bound = guest.runner().await;
    bound.write_all(b"GET").await.unwrap();
    let _accepted = stream(&mut first).await;
    beside(&mut first, sleep(Duration::from_millis(50))).await;
    // The next connection comes while the daemon does not look, and then is killed.
    let mut waiting = guest.runner().await;
    waiting.write_all(b"upload").await.unwrap();
    waiting.shutdown().await.unwrap();
    sleep(Duration::from_millis(50)).await;
    drop(first);
    let mut came = Vec::new();
    let _ = soon(bound.read_to_end(&mut came)).await;
    assert_eq!(came, b"", "its runner must not wait for an answer");
    let mut second = daemon(&guest.port, 3).await;
    let mut door = stream(&mut second).await;
    let talk = async {
        let mut came = Vec::new();
        door.read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"upload");
        door.write_all(b"201").await.unwrap();
        door.shutdown().await.unwrap();
        let mut answer = Vec::new();
        waiting.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"201");
    };
    beside(&mut second, talk).await;
    wait_idle(&guest.relay);
}

#[tokio::test]
async fn patience_ends() {
    let guest = Guest::new(limits());
    guest.hand_over(Duration::from_millis(100));
    let mut came = Vec::new();
    let _ = soon(guest.runner().await.read_to_end(&mut came)).await;
    assert_eq!(came, b"");
    wait_idle(&guest.relay);
}

#[tokio::test]
async fn a_connection_cut_on_one_side_is_cut_on_the_other() {
    let guest = Guest::new(limits());
    guest.hand_over(LIMIT);
    let mut session = daemon(&guest.port, 2).await;
    // The door goes away: the runner must not wait for an answer.
    let mut runner = guest.runner().await;
    runner.write_all(b"GET").await.unwrap();
    drop(stream(&mut session).await);
    let mut came = Vec::new();
    beside(&mut session, async {
        let _ = runner.read_to_end(&mut came).await;
    })
    .await;
    assert_eq!(came, b"");
    // The runner goes away: the door must see an end.
    let runner = guest.runner().await;
    let mut door = stream(&mut session).await;
    drop(runner);
    beside(&mut session, async { assert_eq!(door.read(&mut [0]).await.unwrap(), 0) }).await;
    drop(door);
    beside(&mut session, async {
        while guest.relay.open_connections() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// E4: by this a guest knows when to power off; with nothing to carry, its host's answers are signs of life, too.
#[tokio::test]
async fn silence_is_measured_from_the_last_byte_of_a_proven_door() {
    let guest = Guest::new(limits());
    guest.hand_over(LIMIT);
    sleep(Duration::from_millis(300)).await;
    let before = guest.relay.silent_for();
    assert!(before >= Duration::from_millis(250), "nobody has said anything: {before:?}");
    let mut session = daemon(&guest.port, 2).await;
    beside(&mut session, sleep(Duration::from_millis(100))).await;
    assert!(guest.relay.silent_for() < before);
    // The guest's own question, after five seconds.
    beside(&mut session, sleep(Duration::from_millis(5300))).await;
    assert!(guest.relay.silent_for() < Duration::from_secs(2), "{:?}", guest.relay.silent_for());
}

/// A forward inside, known to the host as `port`, and where it is.
fn forward(port: u16) -> (Forward, SocketAddr) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (Forward { port, listener }, address)
}

/// The next stream that is asked for, whatever for.
async fn asked(session: &mut HostSession<UnixStream>) -> Asked {
    soon(session.request()).await.unwrap().unwrap()
}

/// Each forward is a stream of the door's wire that names its port: taken or refused by the host, ended or broken as the
/// connection is.
#[tokio::test]
async fn what_connects_to_a_forward_is_a_stream_of_its_own() {
    let guest = Guest::new(limits());
    let ((one, at_one), (two, at_two)) = (forward(3142), forward(5000));
    guest.hand_over_with(LIMIT, vec![one, two]);
    let mut session = daemon(&guest.port, 2).await;

    let mut job = soon(TcpStream::connect(at_one)).await.unwrap();
    let wish = asked(&mut session).await;
    assert_eq!(wish.authority(), forward_authority(3142));
    let mut far = wish.accept().unwrap();
    let talk = async {
        job.write_all(b"ask").await.unwrap();
        job.shutdown().await.unwrap();
        let mut came = Vec::new();
        far.read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"ask");
        far.write_all(b"answer").await.unwrap();
        far.shutdown().await.unwrap();
        let mut came = Vec::new();
        job.read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"answer");
    };
    beside(&mut session, talk).await;

    // Refused: as by a port at which nobody listens any more.
    let mut job = soon(TcpStream::connect(at_two)).await.unwrap();
    let wish = asked(&mut session).await;
    assert_eq!(wish.authority(), forward_authority(5000));
    wish.refuse(502);
    beside(&mut session, async { assert!(job.read(&mut [0; 8]).await.is_err()) }).await;

    // Broken: as it is on the host.
    let mut job = soon(TcpStream::connect(at_two)).await.unwrap();
    let mut far = asked(&mut session).await.accept().unwrap();
    // Not before the answer is there: a reset takes with it what is still unsent.
    let answered = async {
        far.write_all(b"x").await.unwrap();
        job.read_exact(&mut [0]).await.unwrap();
    };
    beside(&mut session, answered).await;
    far.reset();
    beside(&mut session, async { assert!(job.read(&mut [0; 8]).await.is_err()) }).await;

    // The runner's own way is as it was.
    let _runner = guest.runner().await;
    assert!(asked(&mut session).await.is_for_door());
}

/// E1: a forward waits for the next daemon, as the runner does.
#[tokio::test]
async fn a_forward_waits_for_a_daemon() {
    let guest = Guest::new(limits());
    let (one, at_one) = forward(3142);
    guest.hand_over_with(LIMIT, vec![one]);
    let mut job = soon(TcpStream::connect(at_one)).await.unwrap();
    job.write_all(b"early").await.unwrap();
    sleep(Duration::from_millis(50)).await;
    let mut session = daemon(&guest.port, 2).await;
    let mut far = asked(&mut session).await.accept().unwrap();
    let mut came = [0; 5];
    beside(&mut session, async { far.read_exact(&mut came).await.unwrap() }).await;
    assert_eq!(&came, b"early");
}
