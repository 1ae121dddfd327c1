//! What else of the host a guest reaches by its wire: what its machine was granted, and nothing else.

use super::support::{Door, LIMIT, Setup};
use dayfly::network::Forward;
use dayfly::vm::VmSpec;
use dayfly::vm::paths::RealPaths;
use dayfly::vm::sockets::{DoorSocket, Sockets};
use dayfly_wire::{FORWARD_STREAMS, Limits, Opener, Stream, forward_authority, guest_handshake};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{sleep, timeout};

/// A guest in a session with its door, and what must live as long.
struct Machine {
    door: Door,
    opener: Opener,
    _directory: tempfile::TempDir,
}

impl Machine {
    #[expect(clippy::disallowed_methods, reason = "ends with the runtime")]
    async fn new(forwards: Vec<Forward>) -> Self {
        let directory = tempfile::Builder::new().prefix("df-").tempdir_in("/tmp").unwrap();
        let id = "abcdefghijklmnop".parse().unwrap();
        let listener = UnixListener::bind(VmSpec::door_socket(directory.path(), &id)).unwrap();
        let sockets = Sockets::new(Arc::new(RealPaths::default()), None);
        let socket = DoorSocket::new(sockets, directory.path().to_owned(), id);
        let door = Setup { wire: Some(socket), forwards, ..Setup::default() }.open().await;
        let (pipe, _) = soon(listener.accept()).await.unwrap();
        let proven = soon(guest_handshake(pipe, &door.pass, [7; 16])).await.unwrap();
        let (opener, session) = soon(proven.connect(&Limits::default().with_forwards(), || {})).await.unwrap();
        tokio::spawn(session.run());
        Self { door, opener, _directory: directory }
    }

    /// A stream to this port's forward, once the door has answered.
    async fn connect(&self, port: u16) -> std::io::Result<Stream> {
        let mut stream = soon(self.opener.open_to(&forward_authority(port))).await.unwrap();
        soon(stream.accepted()).await.map(|()| stream)
    }

    fn counted(&self, result: &'static str) -> u64 {
        self.door.metrics.guest().forwarded("proxy", result)
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it takes too long")
}

fn forward(address: SocketAddr, port: u16) -> Forward {
    Forward { name: "proxy".into(), address, port }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (far, address) = listener().await;
    let machine = Machine::new(vec![forward(address, 3142)]).await;
    let (up, down) = (vec![b'u'; 3_000_000], vec![b'd'; 5_000_000]);
    let serve = async {
        let (mut far, _) = far.accept().await.unwrap();
        let mut came = Vec::new();
        far.read_to_end(&mut came).await.unwrap();
        assert!(came == up, "what the guest sent comes whole, and its end with it");
        far.write_all(&down).await.unwrap();
        far.shutdown().await.unwrap();
    };
    let ask = async {
        let mut near = machine.connect(3142).await.unwrap();
        near.write_all(&up).await.unwrap();
        near.shutdown().await.unwrap();
        let mut came = Vec::new();
        near.read_to_end(&mut came).await.unwrap();
        assert!(came == down, "and so does the answer");
    };
    soon(async { tokio::join!(serve, ask) }).await;
    assert_eq!((machine.counted("made"), machine.counted("failed")), (1, 0));
}

/// A guest that makes its own streams reaches no port that its machine was not granted, and no address by any name.
#[tokio::test]
async fn nothing_but_what_was_granted_is_reached() {
    let (granted, address) = listener().await;
    let (other, beside) = listener().await;
    let machine = Machine::new(vec![forward(address, 3142)]).await;
    for target in [
        forward_authority(beside.port()),
        forward_authority(address.port()),
        forward_authority(80),
        beside.to_string(),
        format!("localhost:{}", beside.port()),
        format!("forward.dayfly.invalid.:{}", 3142),
        format!("x@forward.dayfly.invalid:{}", 3142),
        format!("FORWARD.DAYFLY.INVALID:{}", 3142),
    ] {
        let mut stream = soon(machine.opener.open_to(&target)).await.unwrap();
        assert!(soon(stream.accepted()).await.is_err(), "{target}");
    }
    // What was granted still is, and the session stands.
    let _near = machine.connect(3142).await.unwrap();
    soon(granted.accept()).await.unwrap();
    assert!(timeout(Duration::from_millis(100), other.accept()).await.is_err(), "nobody came there");
    assert_eq!(machine.door.metrics.guest().sessions.get(), 1);
}

#[tokio::test]
async fn a_forward_without_anybody_behind_it_is_refused_as_a_closed_port_is() {
    let (far, address) = listener().await;
    drop(far);
    let machine = Machine::new(vec![forward(address, 3142)]).await;
    assert_eq!(machine.connect(3142).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!((machine.counted("made"), machine.counted("failed")), (0, 1));
}

/// A break on one side is one on the other: what was cut must not look whole.
#[tokio::test]
async fn what_breaks_on_one_side_is_broken_on_the_other() {
    let (far, address) = listener().await;
    let machine = Machine::new(vec![forward(address, 3142)]).await;
    let mut near = machine.connect(3142).await.unwrap();
    let (cut, _) = soon(far.accept()).await.unwrap();
    cut.set_zero_linger().unwrap();
    drop(cut);
    assert!(soon(near.read(&mut [0; 8])).await.is_err(), "the far end's reset comes to the guest");
    let near = machine.connect(3142).await.unwrap();
    let (mut cut, _) = soon(far.accept()).await.unwrap();
    near.reset();
    assert!(soon(cut.read(&mut [0; 8])).await.is_err(), "and the guest's to the far end");
}

/// A machine holds no more of the daemon's descriptors than it may, and its runner's own connections are none of these.
#[tokio::test]
async fn connections_beyond_the_bound_are_refused_and_the_door_stays_open() {
    let (far, address) = listener().await;
    let machine = Machine::new(vec![forward(address, 3142)]).await;
    let mut held = Vec::new();
    for _ in 0..FORWARD_STREAMS {
        held.push((machine.connect(3142).await.unwrap(), soon(far.accept()).await.unwrap()));
    }
    assert!(machine.connect(3142).await.is_err());
    assert_eq!((machine.counted("made"), machine.counted("too_many")), (FORWARD_STREAMS.into(), 1));
    let mut door = soon(machine.opener.open()).await.unwrap();
    soon(door.accepted()).await.unwrap();
    drop(held.pop());
    soon(async {
        while machine.connect(3142).await.is_err() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Its machine's end is the end of all of them.
#[tokio::test]
async fn with_the_door_go_its_forwards() {
    let (far, address) = listener().await;
    let mut machine = Machine::new(vec![forward(address, 3142)]).await;
    let _near = machine.connect(3142).await.unwrap();
    let (mut far, _) = soon(far.accept()).await.unwrap();
    soon(machine.door.handle.take().unwrap().revoke()).await;
    assert!(matches!(soon(far.read(&mut [0; 8])).await, Ok(0) | Err(_)));
}
