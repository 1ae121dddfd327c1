//! What of this host's network does the guest reach by its wire? What the job's own machine has been granted, by port.
//!
//! A stream names a port and nothing else, so there is no way from here to any other address. Beyond
//! [`FORWARD_STREAMS`] connections of one machine at once there are none; each holds two buffers and the stream's window,
//! and ends with the door, as the machine does.

use crate::metrics::GuestMetrics;
use crate::network::Forward;
use crate::repeats::Repeats;
use crate::vm::VmId;
use dayfly_wire::{Asked, FORWARD_STREAMS};
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// For the far end to answer: it is near.
const CONNECT: Duration = Duration::from_secs(10);

/// Bytes a read, each way.
const BUFFER_BYTES: usize = 64 * 1024;

/// What a guest is answered: see `dayfly_wire::Stream::accepted`.
const NOT_GRANTED: u16 = 403;
const UNREACHABLE: u16 = 502;
const TOO_MANY: u16 = 503;
const LATE: u16 = 504;

/// The forwards of one machine.
pub(super) struct Forwards {
    vm: VmId,
    by_port: BTreeMap<u16, Forward>,
    places: Semaphore,
    metrics: GuestMetrics,
    unreachable: Repeats,
}

impl Forwards {
    pub(super) fn new(vm: VmId, forwards: Vec<Forward>, metrics: GuestMetrics) -> Self {
        Self {
            vm,
            by_port: forwards.into_iter().map(|forward| (forward.port, forward)).collect(),
            places: Semaphore::new(FORWARD_STREAMS as usize),
            metrics,
            unreachable: Repeats::new("nobody answers behind a forward"),
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.by_port.is_empty()
    }

    /// One connection, from the guest's wish to its end.
    pub(super) async fn serve(&self, mut asked: Asked, port: u16) {
        let Some(forward) = self.by_port.get(&port) else { return asked.refuse(NOT_GRANTED) };
        let Ok(_place) = self.places.try_acquire() else {
            self.metrics.forward(&forward.name, "too_many");
            return asked.refuse(TOO_MANY);
        };
        let connected = tokio::select! {
            // Whoever gave up needs no answer.
            biased;
            () = asked.given_up() => return,
            connected = timeout(CONNECT, TcpStream::connect(forward.address)) => connected,
        };
        let failed = match connected {
            Ok(Ok(far)) => {
                self.metrics.forward(&forward.name, "made");
                if let Some(near) = asked.accept() {
                    copy(near, far).await;
                }
                return;
            }
            Ok(Err(error)) => (error, UNREACHABLE),
            Err(_) => (io::ErrorKind::TimedOut.into(), LATE),
        };
        let (error, status) = failed;
        self.metrics.forward(&forward.name, "failed");
        self.unreachable.log(|line| {
            tracing::warn!(vm = %self.vm, forward = forward.name, address = %forward.address, error = %error, "{line}");
        });
        asked.refuse(status);
    }
}

/// Bytes both ways, an end of one way as an end, a break as a break.
async fn copy(mut near: dayfly_wire::Stream, mut far: TcpStream) {
    // Failing to set it costs 40 ms here and there, no more.
    let _ = far.set_nodelay(true);
    if copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER_BYTES, BUFFER_BYTES).await.is_err() {
        // The far end learns that something is missing, too. If this fails, it takes it for an end.
        let _ = far.set_zero_linger();
        near.reset();
    }
}
