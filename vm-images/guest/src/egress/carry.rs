//! Redirected connections, each with its stream: bytes both ways, an end of one way as an end, a break as a break.

use super::hold::Hold;
use crate::netfilter::queue::Flow;
use crate::relay::shuttle::shuttle;
use rustix::net::sockopt::ip_original_dst;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Bytes a read, for each way of each connection: of a frame's size, for a thousand of them have twice as much.
const BUFFER_BYTES: usize = 16 * 1024;

/// Connections at once: more than there are streams. Beyond that the kernel's backlog waits.
const CONNECTIONS_MAX: usize = 2048;

/// Connections that came without having waited, and wait now: there are some only where a rule of the job's let its first
/// packet pass the queue. Beyond that they are cut.
const LATE_MAX: usize = 256;

/// Before accepting is tried again, out of descriptors.
const RETRY: Duration = Duration::from_millis(200);

/// Accepts for ever.
pub(super) async fn run(listener: TcpListener, hold: Arc<Hold>) {
    let late = Arc::new(Semaphore::new(LATE_MAX));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // Both are cancel safe.
            biased;
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => {
                let Ok((near, source)) = accepted else {
                    sleep(RETRY).await;
                    continue;
                };
                let (hold, late) = (Arc::clone(&hold), Arc::clone(&late));
                connections.spawn(async move {
                    // Whoever is cut here learns it by a reset.
                    let _ = near.set_zero_linger();
                    let Some(flow) = flow(&near, source) else { return };
                    let stream = match hold.take(flow) {
                        Some(stream) => Some(stream),
                        None => match late.try_acquire() {
                            Ok(_place) => hold.open(flow).await.ok(),
                            Err(_) => None,
                        },
                    };
                    if let Some(stream) = stream {
                        shuttle(near, stream, BUFFER_BYTES).await;
                    }
                });
            }
        }
    }
}

/// Of which connection this is the other end. `None`: of one to ourselves, which leads nowhere.
fn flow(near: &TcpStream, source: SocketAddr) -> Option<Flow> {
    let SocketAddr::V4(source) = source else { return None };
    let destination = ip_original_dst(near).ok()?;
    (near.local_addr().ok()? != SocketAddr::V4(destination)).then_some(Flow { source, destination })
}
