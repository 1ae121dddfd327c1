//! How a guest comes to its door: by a wire of its own, or to a port that is listened at, which is a seam.

use crate::BoxFuture;
use crate::vm::Stream;
use crate::vm::sockets::DoorSocket;
use std::io;
use std::net::SocketAddr;
use tokio::net::TcpListener;

/// Where the connections of one guest to its door come from.
pub enum Entrance {
    /// Its wire, which no other guest reaches (decision D26).
    Wire(DoorSocket),
    /// A port, which others reach as well: each connection has to show the pass.
    Port(Box<dyn DoorListener>),
}

/// Accepts the connections of one guest to its door. Dropping it closes the address.
pub trait DoorListener: Send {
    /// The next connection. Cancel safe.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>>;
}

/// Where doors are opened: the host's loopback, or what a test has in its place.
pub trait Listen: Send + Sync + 'static {
    /// Listens at an address. `AddrInUse`: somebody does already.
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>>;
}

/// The host's own TCP.
#[derive(Clone, Copy, Debug)]
pub struct Tcp;

impl Listen for Tcp {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move { Ok(Box::new(TcpDoor(TcpListener::bind(address).await?)) as Box<dyn DoorListener>) })
    }
}

struct TcpDoor(TcpListener);

impl DoorListener for TcpDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            // Small answers are on the way to a runner that waits for them.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_door_is_taken_once_and_dropping_it_closes_it() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let door = Tcp.listen(free).await.unwrap();
        let again = Tcp.listen(free).await.err().expect("it is taken");
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        drop(door);
        Tcp.listen(free).await.expect("dropping a door closes it");
    }
}
