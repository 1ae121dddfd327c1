//! A connection inside and its stream to the host: bytes both ways, an end of one way as an end, a break as a break.

use dayfly_wire::Stream;
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::TcpStream;

/// Copies both ways until both are at their ends, `buffer` bytes at once each. What breaks on one side is broken on the
/// other: `near` is one that is reset when it is dropped (`set_zero_linger`).
pub(crate) async fn shuttle(mut near: TcpStream, stream: Stream, buffer: usize) {
    // Failing to set it costs 40 ms here and there, no more.
    let _ = near.set_nodelay(true);
    let (mut from_far, mut to_far) = split(stream);
    let (mut from_near, mut to_near) = near.split();
    let whole = tokio::try_join!(copy(&mut from_near, &mut to_far, buffer), copy(&mut from_far, &mut to_near, buffer));
    if whole.is_ok() {
        // What the kernel has still to send of it goes on. If this fails it is cut, which is said.
        let _ = set_socket_linger(&near, None);
    } else {
        // `near` is reset as it is dropped.
        from_far.unsplit(to_far).reset();
    }
}

/// Which side of a copy failed.
pub(crate) enum Broken {
    Reading,
    Writing,
}

/// Copies one way, `buffer` bytes at once, and says that it has ended.
pub(crate) async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    buffer: usize,
) -> Result<(), Broken> {
    let mut buffer = vec![0; buffer];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_| Broken::Reading)?;
        if count == 0 {
            return to.shutdown().await.map_err(|_| Broken::Writing);
        }
        to.write_all(&buffer[..count]).await.map_err(|_| Broken::Writing)?;
    }
}
