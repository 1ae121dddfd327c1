//! One virtio-serial port or serial line of a fake VM: what QEMU does with its socket, in memory.
//!
//! One host connection is served at a time, the next wait their turn; what the host wrote stays
//! for the guest to read even when the connection has gone; what the guest writes while nobody is
//! connected is lost; a host that is connected and does not read stops the guest's writes. (A real
//! guest sees end-of-file while no host is connected, and reads again: here its read just waits.)

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes under way in each direction of a connection.
const BUFFER_BYTES: usize = 64 * 1024;

/// Connections, the served one and those that wait: QEMU's socket has a backlog of 1, which Linux
/// takes as two.
const CONNECTIONS_MAX: usize = 3;

#[derive(Debug, Default)]
struct Connection {
    to_guest: VecDeque<u8>,
    to_host: VecDeque<u8>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    host_gone: bool,
}

#[derive(Debug, Default)]
struct State {
    vm_gone: bool,
    next: u64,
    connections: BTreeMap<u64, Connection>,
    guest_reader: Option<Waker>,
    guest_writer: Option<Waker>,
}

impl State {
    /// The connection that is served: the oldest that still has something to give or take.
    fn served(&mut self) -> Option<&mut Connection> {
        while let Some(entry) = self.connections.first_entry() {
            if entry.get().host_gone && entry.get().to_guest.is_empty() {
                entry.remove();
            } else {
                break;
            }
        }
        self.connections.values_mut().next()
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// Moves bytes into `buffer`; whether there were any.
fn take(from: &mut VecDeque<u8>, buffer: &mut ReadBuf<'_>) -> bool {
    let n = from.len().min(buffer.remaining());
    let (front, back) = from.as_slices();
    let in_front = n.min(front.len());
    buffer.put_slice(&front[..in_front]);
    buffer.put_slice(&back[..n - in_front]);
    from.drain(..n);
    n > 0
}

/// Moves bytes from `bytes`; how many.
fn give(to: &mut VecDeque<u8>, bytes: &[u8]) -> usize {
    let n = bytes.len().min(BUFFER_BYTES - to.len());
    to.extend(&bytes[..n]);
    n
}

/// The line itself; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Wire(Arc<Mutex<State>>);

impl Wire {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connect(&self) -> io::Result<HostEnd> {
        let mut state = self.state();
        if state.vm_gone {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if state.connections.values().filter(|c| !c.host_gone).count() >= CONNECTIONS_MAX {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let id = state.next;
        state.next += 1;
        state.connections.insert(id, Connection::default());
        wake(&mut state.guest_writer);
        Ok(HostEnd { wire: self.clone(), id })
    }

    /// The guest's end. One at a time, as in a guest.
    pub(super) fn guest_end(&self) -> GuestEnd {
        GuestEnd(self.clone())
    }

    /// The VM is gone: hosts read what is left, then end-of-file.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.vm_gone = true;
        wake(&mut state.guest_reader);
        wake(&mut state.guest_writer);
        for connection in state.connections.values_mut() {
            wake(&mut connection.reader);
            wake(&mut connection.writer);
        }
    }
}

/// A connection of the host.
#[derive(Debug)]
pub(super) struct HostEnd {
    wire: Wire,
    id: u64,
}

impl AsyncRead for HostEnd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.wire.state();
        let state = &mut *state;
        let Some(connection) = state.connections.get_mut(&self.id) else { return Poll::Ready(Ok(())) };
        if take(&mut connection.to_host, buffer) {
            wake(&mut state.guest_writer);
            return Poll::Ready(Ok(()));
        }
        if state.vm_gone {
            return Poll::Ready(Ok(()));
        }
        connection.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for HostEnd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.wire.state();
        let state = &mut *state;
        let Some(connection) = state.connections.get_mut(&self.id).filter(|_| !state.vm_gone) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let n = give(&mut connection.to_guest, bytes);
        if n == 0 && !bytes.is_empty() {
            connection.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        wake(&mut state.guest_reader);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for HostEnd {
    fn drop(&mut self) {
        let mut state = self.wire.state();
        if let Some(connection) = state.connections.get_mut(&self.id) {
            connection.host_gone = true;
            connection.to_host.clear();
        }
        wake(&mut state.guest_reader);
        wake(&mut state.guest_writer);
    }
}

/// The guest's side of a [`super::FakeHypervisor`]'s port or console. Clones are the same open file.
#[derive(Clone, Debug)]
pub struct GuestEnd(Wire);

impl AsyncRead for GuestEnd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.state();
        if state.vm_gone {
            return Poll::Ready(Ok(()));
        }
        if let Some(connection) = state.served()
            && take(&mut connection.to_guest, buffer)
        {
            wake(&mut connection.writer);
            return Poll::Ready(Ok(()));
        }
        state.guest_reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for GuestEnd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.0.state();
        if state.vm_gone {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let Some(connection) = state.served().filter(|c| !c.host_gone) else { return Poll::Ready(Ok(bytes.len())) };
        let n = give(&mut connection.to_host, bytes);
        if n == 0 && !bytes.is_empty() {
            state.guest_writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        wake(&mut connection.reader);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn a_config_written_before_the_guest_reads_survives_its_writer() {
        let wire = Wire::default();
        wire.connect().unwrap().write_all(b"config").await.unwrap();
        let mut second = wire.connect().unwrap();
        second.write_all(b" again").await.unwrap();
        let mut guest = wire.guest_end();
        let mut got = [0; 12];
        guest.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"config again");
        guest.write_all(b"ready").await.unwrap();
        let mut ready = [0; 5];
        second.read_exact(&mut ready).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_connection_waits_for_the_first_to_go() {
        let wire = Wire::default();
        let mut guest = wire.guest_end();
        guest.write_all(b"nobody hears this").await.unwrap();
        let (first, mut second) = (wire.connect().unwrap(), wire.connect().unwrap());
        second.write_all(b"x").await.unwrap();
        assert!(timeout(Duration::from_secs(1), guest.read_u8()).await.is_err());
        drop(first);
        assert_eq!(guest.read_u8().await.unwrap(), b'x');
        let _third = wire.connect().unwrap();
        let _fourth = wire.connect().unwrap();
        assert_eq!(wire.connect().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unread_console_stops_the_guest_and_the_end_wakes_everybody() {
        let wire = Wire::default();
        let (mut host, mut guest) = (wire.connect().unwrap(), wire.guest_end());
        let flood = vec![b'!'; 2 * BUFFER_BYTES];
        assert!(timeout(Duration::from_secs(1), guest.write_all(&flood)).await.is_err(), "nobody reads");
        let closer = async {
            tokio::task::yield_now().await;
            wire.close();
        };
        let mut read = Vec::new();
        let (all, ()) = tokio::join!(host.read_to_end(&mut read), closer);
        assert_eq!(all.unwrap(), BUFFER_BYTES);
        assert!(host.write_all(b"x").await.is_err());
        assert_eq!(guest.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(wire.connect().is_err());
    }
}
