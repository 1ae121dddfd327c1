//! A door behind a wire: a real unix socket, which serves one connection at a time, as QEMU's does.

use super::support::{Door, GUEST_TOKEN, LIMIT, PAYLOAD, Setup, patch, poll};
use dayfly::vm::VmSpec;
use dayfly::vm::paths::RealPaths;
use dayfly::vm::sockets::{DoorSocket, Sockets};
use dayfly_guest_config::Pass;
use dayfly_test_guest::{Connection, Relay, Sessions, relay};
use dayfly_wire::Stream;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// A VM's side, and where its door's socket is.
struct Machine {
    relay: Relay,
    sessions: Option<Sessions>,
    directory: tempfile::TempDir,
    socket: DoorSocket,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("df-").tempdir_in("/tmp").unwrap();
        let sockets = Sockets::new(Arc::new(RealPaths::default()), None);
        let socket = DoorSocket::new(sockets, directory.path().to_owned(), "abcdefghijklmnop".parse().unwrap());
        let (relay, sessions) = relay();
        Self { relay, sessions: Some(sessions), directory, socket }
    }

    fn bind(&self) -> UnixListener {
        let id = "abcdefghijklmnop".parse().unwrap();
        UnixListener::bind(VmSpec::door_socket(self.directory.path(), &id)).unwrap()
    }

    async fn door(&self) -> Door {
        Setup { wire: Some(self.socket.clone()), ..Setup::default() }.open().await
    }

    /// Serves one connection after the other.
    #[expect(clippy::disallowed_methods, reason = "ends with the runtime")]
    fn serve(&mut self, listener: UnixListener, pass: &Pass) -> JoinHandle<()> {
        self.relay.hand_over(pass.clone());
        let mut sessions = self.sessions.take().expect("served once");
        tokio::spawn(async move {
            let mut nonces = 0_u128;
            while let Ok((stream, _)) = listener.accept().await {
                let nonce = || {
                    nonces += 1;
                    nonces.to_be_bytes()
                };
                sessions.run(stream, nonce).await;
            }
        })
    }

    async fn connection(&self) -> Connection<Stream> {
        let stream = timeout(LIMIT, self.relay.enter(Duration::from_millis(20), || true)).await;
        Connection::new(stream.expect("a stream within the limit").expect("it waits for ever"))
    }

    async fn ask(&self, request: &[u8]) -> u16 {
        let mut connection = self.connection().await;
        timeout(LIMIT, connection.exchange(request)).await.expect("an answer within the limit").unwrap().status
    }
}

async fn until(met: impl Fn() -> bool) {
    let met = async {
        while !met() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, met).await.expect("it comes within the limit");
}

/// The VM is made after its door was opened; streams need no greeting of their own, and the job hears once of the pass.
#[tokio::test]
async fn a_wire_is_looked_for_until_its_machine_is_there() {
    let mut machine = Machine::new();
    let door = machine.door().await;
    door.job.lock().unwrap().payload = true;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(door.metrics.guest().sessions.get(), 0);
    machine.serve(machine.bind(), &door.pass);
    let mut connection = machine.connection().await;
    let answer = connection.exchange(&poll(GUEST_TOKEN)).await.unwrap();
    assert_eq!((answer.status, answer.body.as_slice()), (201, PAYLOAD));
    assert_eq!(machine.ask(&patch(0, b"hello")).await, 202);
    assert_eq!(door.guest_bytes().await, b"hello");
    let told = door.told();
    assert_eq!((told.first().map(String::as_str), door.job.lock().unwrap().count("greeted")), (Some("greeted"), 1));
    let guest = door.metrics.guest();
    assert_eq!((guest.sessions.get(), guest.greetings.get(), guest.sessions_failed.get("late")), (1, 0, 0));
}

/// E4: the session ends in mid-request, at either side; the next one is begun, and the guest asks again.
#[tokio::test]
async fn a_session_that_is_cut_in_mid_request_is_followed_by_another() {
    let mut machine = Machine::new();
    let door = machine.door().await;
    // Between the two: cuts what goes by.
    let inner = machine.bind_elsewhere();
    let outer = machine.bind();
    let cut = between(outer, machine.elsewhere());
    machine.serve(inner, &door.pass);
    for round in 0..5_u64 {
        let whole = patch(round * 5, b"hello");
        let mut half = machine.connection().await;
        half.send(&whole[..whole.len() - 2]).await.unwrap();
        cut.notify_one();
        until(|| door.metrics.guest().sessions.get() > round + 1).await;
        assert!(half.exchange(b"lo").await.is_err(), "what was under way is over");
        assert_eq!(machine.ask(&whole).await, 202);
    }
    assert_eq!(door.guest_bytes().await, b"hello".repeat(5));
    assert_eq!(door.job.lock().unwrap().count("greeted"), 1, "of the first session only");
}

/// E8: a daemon of before still holds the port: the next one's connection waits in its backlog, and gets its turn.
#[tokio::test]
async fn a_wire_that_another_process_holds_is_waited_for() {
    let mut machine = Machine::new();
    let listener = machine.bind();
    let path = VmSpec::door_socket(machine.directory.path(), &"abcdefghijklmnop".parse().unwrap());
    let mut before = UnixStream::connect(path).await.unwrap();
    before.write_all(&[0xff; 100]).await.unwrap();
    let door = machine.door().await;
    machine.serve(listener, &door.pass);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(door.metrics.guest().sessions.get(), 0, "it is not its turn");
    drop(before);
    assert_eq!(machine.ask(&poll(GUEST_TOKEN)).await, 204);
}

/// Invariant 13: with its pass revoked, nothing is left of a door's wire.
#[tokio::test]
async fn a_revoked_pass_ends_the_session_and_no_other_is_begun() {
    let mut machine = Machine::new();
    let mut door = machine.door().await;
    machine.serve(machine.bind(), &door.pass);
    let mut held = machine.connection().await;
    assert_eq!(held.exchange(&poll(GUEST_TOKEN)).await.unwrap().status, 204);
    door.handle.take().unwrap().revoke().await;
    assert!(timeout(LIMIT, held.rest()).await.expect("it ends").is_empty());
    until(|| machine.relay.is_without_session()).await;
    sleep(Duration::from_millis(300)).await;
    assert!(machine.relay.is_without_session(), "no other one is begun");
}

impl Machine {
    fn elsewhere(&self) -> std::path::PathBuf {
        self.directory.path().join("inner")
    }

    fn bind_elsewhere(&self) -> UnixListener {
        UnixListener::bind(self.elsewhere()).unwrap()
    }
}

/// Carries bytes between the two, and ends the connection under way whenever it is told so.
#[expect(clippy::disallowed_methods, reason = "ends with the runtime")]
fn between(outer: UnixListener, inner: std::path::PathBuf) -> Arc<tokio::sync::Notify> {
    let cut = Arc::new(tokio::sync::Notify::new());
    let told = cut.clone();
    tokio::spawn(async move {
        while let Ok((mut host, _)) = outer.accept().await {
            let mut guest = UnixStream::connect(&inner).await.unwrap();
            tokio::select! {
                biased;
                () = told.notified() => {}
                _ = tokio::io::copy_bidirectional(&mut host, &mut guest) => {}
            }
        }
    });
    cut
}
