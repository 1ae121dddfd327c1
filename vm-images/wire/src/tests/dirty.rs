//! Sessions that begin where another one was cut: nobody saw an end, and both ways hold what is left of it.

use super::ends::{door, download, nonce, pass, serve, soon, spawn, upload};
use crate::{GuestSession, Limits, SessionError, guest_handshake, host_handshake};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex};
use tokio::time::timeout;

/// One end of a cable that outlives who holds it: whoever comes next finds what was left.
#[derive(Clone)]
struct End(Arc<Mutex<DuplexStream>>);

impl End {
    fn with<T>(&self, what: impl FnOnce(Pin<&mut DuplexStream>) -> T) -> T {
        what(Pin::new(&mut *self.0.lock().unwrap()))
    }

    /// What a port does that is opened anew: what lay in it is gone.
    async fn reopen(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(Ok(1..)) = timeout(Duration::ZERO, self.read(&mut buffer)).await {}
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|end| end.poll_read(cx, into))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|end| end.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|end| end.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nobody at the other end sees it.
        Poll::Ready(Ok(()))
    }
}

fn cable(bytes: usize) -> (End, End) {
    let (one, other) = duplex(bytes);
    (End(Arc::new(Mutex::new(one))), End(Arc::new(Mutex::new(other))))
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// The relay's life: session after session, each on a port that was opened anew. Says when one has begun.
async fn relay(
    mut port: End,
    begun: tokio::sync::mpsc::UnboundedSender<crate::Opener>,
    ends: Arc<Mutex<Vec<&'static str>>>,
) {
    for n in 0.. {
        port.reopen().await;
        let pass = pass(1);
        let shaken = guest_handshake(port.clone(), &pass, nonce(n)).await.unwrap();
        let (opener, session) = shaken.connect(&Limits::default(), || {}).await.unwrap();
        begun.send(opener).unwrap();
        let ended = GuestSession::run(session).await;
        ends.lock().unwrap().push(ended.word());
    }
}

/// Sixty daemons, one after the other, each killed in the middle of traffic both ways; no guest ever sees an end of
/// file. Each next one has a session, and all that it is asked for.
#[tokio::test]
async fn each_daemon_gets_its_session_over_what_the_last_one_left() {
    for (seed, bytes) in [(1, 700), (2, 20_000), (3, 300_000)] {
        let mut dice = Dice(seed);
        let (host, guest) = cable(bytes);
        let (begun, mut sessions) = tokio::sync::mpsc::unbounded_channel();
        let ends = Arc::new(Mutex::new(Vec::new()));
        let relay = spawn(relay(guest, begun, Arc::clone(&ends)));
        for n in 0..20 {
            let (daemon, host) = (pass(1), host.clone());
            let daemon = spawn(async move {
                let limits = Limits::default();
                let shaken = host_handshake(host, &daemon, nonce(100 + n)).await.unwrap();
                serve(shaken.serve(&limits).await.unwrap(), door).await
            });
            // What was begun with the old daemon's last breath may come first.
            let opener = loop {
                let opener = soon(sessions.recv()).await.unwrap();
                if soon(async { works(&opener).await }).await {
                    break opener;
                }
            };
            let busy: Vec<_> = (0..2)
                .map(|_| {
                    let (up, down) = (opener.clone(), opener.clone());
                    spawn(async move { tokio::join!(flood(up, b'U'), flood(down, b'D')) })
                })
                .collect();
            tokio::time::sleep(Duration::from_micros(dice.below(20_000))).await;
            daemon.abort();
            assert!(daemon.await.unwrap_err().is_cancelled());
            drop(busy);
        }
        let ends = ends.lock().unwrap().clone();
        assert!(ends.len() >= 19 && ends.iter().all(|word| matches!(*word, "protocol" | "broken")), "{ends:?}");
        relay.abort();
    }
}

/// Is a request answered?
async fn works(opener: &crate::Opener) -> bool {
    let Ok(mut stream) = opener.open().await else { return false };
    if stream.accepted().await.is_err() || stream.write_all(b"Eping").await.is_err() {
        return false;
    }
    let mut came = [0; 4];
    stream.read_exact(&mut came).await.is_ok_and(|_| &came == b"ping")
}

/// Traffic one way until the session is over.
async fn flood(opener: crate::Opener, kind: u8) {
    let Ok(mut stream) = opener.open().await else { return };
    let _ = stream.write_all(&[kind]).await;
    if kind == b'D' {
        let _ = stream.write_u64(u64::MAX).await;
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    } else {
        let _ = tokio::io::copy(&mut tokio::io::repeat(b'u'), &mut stream).await;
    }
}

/// An end of the cable that notes what goes through it.
struct Tapped(DuplexStream, Arc<Mutex<Vec<u8>>>);

impl AsyncRead for Tapped {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Tapped {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.0).poll_write(cx, bytes))?;
        self.1.lock().unwrap().extend_from_slice(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// What each side wrote in one session with a handshake: host's, guest's.
async fn transcript() -> (Vec<u8>, Vec<u8>) {
    let (of_host, of_guest) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (host, guest) = duplex(64 * 1024);
    let ends =
        super::ends::Ends::start(Tapped(host, Arc::clone(&of_host)), Tapped(guest, Arc::clone(&of_guest)), door).await;
    soon(upload(&ends.opener, 40_000)).await;
    soon(download(&ends.opener, 40_000)).await;
    ends.host.abort();
    ends.guest.abort();
    let (host, guest) = (of_host.lock().unwrap().clone(), of_guest.lock().unwrap().clone());
    (host, guest)
}

/// Whatever pieces of another session lie in the pipe, on both sides, and wherever they were cut.
#[tokio::test]
async fn a_handshake_finds_its_way_through_what_was_left() {
    let (of_host, of_guest) = transcript().await;
    let mut dice = Dice(7);
    for round in 0..300 {
        let mut piece = |of: &[u8]| {
            let from = dice.below(of.len() as u64 + 1);
            let to = from + dice.below(of.len() as u64 + 1 - from);
            of[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()].to_vec()
        };
        let (to_guest, to_host) = (piece(&of_host), piece(&of_guest));
        let (mut host, mut guest) = duplex(1 << 20);
        host.write_all(&to_guest).await.unwrap();
        guest.write_all(&to_host).await.unwrap();
        let (door_pass, relay) = (pass(1), pass(1));
        let both = async {
            tokio::join!(host_handshake(host, &door_pass, nonce(20)), guest_handshake(guest, &relay, nonce(30)))
        };
        let (host, guest) = soon(both).await;
        let (host, guest) = (host.unwrap_or_else(|error| panic!("round {round}: {error}")), guest.unwrap());
        let limits = Limits::default();
        let (host, guest) = tokio::join!(host.serve(&limits), guest.connect(&limits, || {}));
        let (opener, guest) = guest.unwrap();
        let (host, guest) = (spawn(serve(host.unwrap(), door)), spawn(guest.run()));
        soon(upload(&opener, 100)).await;
        host.abort();
        guest.abort();
    }
}

/// A new hello in the middle of a session ends it at once, wherever in a frame the old one was cut, on both sides.
#[tokio::test]
async fn filler_ends_a_session_wherever_it_was_cut() {
    let (of_host, of_guest) = transcript().await;
    let filler = vec![0xff; crate::FILLER_BYTES];
    // Where the session's own bytes begin.
    let after = |bytes: &[u8], kind: u8, length: usize| {
        let magic = [&crate::message::MAGIC[..], &[kind]].concat();
        bytes.windows(magic.len()).position(|window| window == magic).unwrap() + length
    };
    let (of_host, of_guest) = (&of_host[after(&of_host, b'>', 49)..], &of_guest[after(&of_guest, b'.', 81)..]);
    let mut dice = Dice(11);
    for round in 0..100 {
        let mut cut =
            |bytes: &[u8], least: usize| least + usize::try_from(dice.below((bytes.len() - least) as u64)).unwrap();
        let (host, guest) = duplex(1 << 20);
        let (host, guest) = super::ends::shake(host, guest).await;
        if round % 2 == 0 {
            // A guest in the middle of a session; its streams are unknown to it, which would end it as well: so only
            // what comes before the first of them is replayed.
            let (mut host, _) = host.into_parts();
            let (_opener, session) = guest.connect(&Limits::default(), || {}).await.unwrap();
            host.write_all(&of_host[..cut(of_host, 0).min(9 + 30)]).await.unwrap();
            host.write_all(&filler).await.unwrap();
            let ended = timeout(Duration::from_secs(2), session.run()).await.unwrap();
            assert!(matches!(ended, SessionError::Protocol(_)), "{ended}");
        } else {
            let (mut guest, _) = guest.into_parts();
            guest.write_all(&of_guest[..cut(of_guest, 24 + 9 + 6)]).await.unwrap();
            guest.write_all(&filler).await.unwrap();
            let session = host.serve(&Limits::default()).await.unwrap();
            let ended = timeout(Duration::from_secs(2), serve(session, door)).await.unwrap();
            assert!(matches!(ended, Some(SessionError::Protocol(_))), "{ended:?}");
        }
    }
}
