//! A session with both of its ends, and what its doors do.

use crate::{GuestSession, HostSession, Limits, Opener, Proven, SessionError, Stream, guest_handshake, host_handshake};
use dayfly_guest_config::{Nonce, PASS_BYTES, Pass};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// No wait of these tests is longer.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

pub(super) trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}

pub(super) fn pass(n: u8) -> Pass {
    Pass::new([n; PASS_BYTES])
}

pub(super) fn nonce(n: u8) -> Nonce {
    [n; 16]
}

/// In time, or the test fails.
pub(super) async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it takes too long")
}

pub(super) async fn shake<H: Io, G: Io>(host: H, guest: G) -> (Proven<H>, Proven<G>) {
    let (door, relay) = (pass(1), pass(1));
    let (host, guest) =
        soon(async { tokio::join!(host_handshake(host, &door, nonce(2)), guest_handshake(guest, &relay, nonce(3))) })
            .await;
    (host.unwrap(), guest.unwrap())
}

#[expect(clippy::disallowed_methods, reason = "a test has no task set of its own")]
pub(super) fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(work)
}

/// A whole session whose host serves each stream as `door` does.
pub(super) struct Ends {
    pub(super) opener: Opener,
    pub(super) host: JoinHandle<Option<SessionError>>,
    pub(super) guest: JoinHandle<SessionError>,
}

impl Ends {
    pub(super) async fn start<H: Io, G: Io, F>(host: H, guest: G, door: impl Fn(Stream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (host, guest) = shake(host, guest).await;
        let limits = Limits::default();
        let (host, guest) = soon(async { tokio::join!(host.serve(&limits), guest.connect(&limits, || {})) }).await;
        let (opener, guest) = guest.unwrap();
        Self { opener, host: spawn(serve(host.unwrap(), door)), guest: spawn(GuestSession::run(guest)) }
    }
}

/// Why the session ended.
pub(super) async fn serve<H: Io, F>(mut host: HostSession<H>, door: impl Fn(Stream) -> F) -> Option<SessionError>
where
    F: Future<Output = ()> + Send + 'static,
{
    while let Some(stream) = host.accept().await {
        match stream {
            Ok(stream) => drop(spawn(door(stream))),
            Err(error) => return Some(error),
        }
    }
    None
}

/// A door that does what the first byte says: `E`choes, `S`tands still, takes an `U`pload and says how long it was, or
/// gives a `D`ownload of as many bytes as the next eight say.
pub(super) async fn door(mut stream: Stream) {
    let Ok(kind) = stream.read_u8().await else { return };
    let end = match kind {
        b'E' => {
            let (mut reading, mut writing) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut reading, &mut writing).await;
            writing.shutdown().await
        }
        b'U' => {
            let count = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap_or(0);
            let _ = stream.write_u64(count).await;
            stream.shutdown().await
        }
        b'D' => {
            let Ok(count) = stream.read_u64().await else { return };
            let _ = tokio::io::copy(&mut tokio::io::repeat(b'd').take(count), &mut stream).await;
            stream.shutdown().await
        }
        _ => std::future::pending().await,
    };
    // The other side may have gone.
    drop(end);
}

/// Uploads so many bytes, and checks what the door says of them.
pub(super) async fn upload(opener: &Opener, count: u64) {
    let mut stream = opener.open().await.unwrap();
    stream.write_all(b"U").await.unwrap();
    tokio::io::copy(&mut tokio::io::repeat(b'u').take(count), &mut stream).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read_u64().await.unwrap(), count);
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

pub(super) async fn download(opener: &Opener, count: u64) {
    let mut stream = opener.open().await.unwrap();
    stream.write_all(b"D").await.unwrap();
    stream.write_u64(count).await.unwrap();
    assert_eq!(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap(), count);
}
