//! The machine's packet filter, by nfnetlink over rustix's sockets: [`rules`] puts our one table into it, [`queue`] hands
//! us the first packets of connections.
//!
//! Messages are built by hand, as in [`crate::netlink`]: `nft` brings thirteen libraries and needs 100 ms under TCG.

mod message;
pub mod queue;
pub mod rules;

use message::Answer;
use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The kernel answers at once; this bounds a bug, not a wait.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Answers have some 40 bytes, or as many as the request that they are about.
const ANSWER_BYTES_MAX: usize = 8 * 1024;

/// Why the packet filter does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum NetfilterError {
    /// No socket.
    #[error("open a netfilter socket")]
    Socket(#[source] Errno),
    /// The kernel refused.
    #[error("{0}")]
    Refused(String, #[source] Errno),
}

/// A socket to the kernel's netfilter.
fn open() -> Result<OwnedFd, NetfilterError> {
    let open = || {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_DEADLINE))?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(socket)
    };
    open().map_err(NetfilterError::Socket)
}

/// Sends messages, `wanted` of which ask for an acknowledgement, and waits for those. Their sequence numbers tell them
/// apart: `what` names the one that was refused.
fn request(
    socket: &OwnedFd,
    bytes: &[u8],
    mut wanted: usize,
    what: impl Fn(u32) -> String,
) -> Result<(), NetfilterError> {
    let refused = |sequence, error| NetfilterError::Refused(what(sequence), error);
    send(socket, bytes, SendFlags::empty()).map_err(|error| refused(0, error))?;
    let mut buffer = [0; ANSWER_BYTES_MAX];
    while wanted > 0 {
        let (_, length) = recv(socket, &mut buffer[..], RecvFlags::empty()).map_err(|error| refused(0, error))?;
        for answer in Answer::all(&buffer[..length.min(ANSWER_BYTES_MAX)]) {
            if answer.errno != 0 {
                return Err(refused(answer.sequence, Errno::from_raw_os_error(answer.errno)));
            }
            wanted = wanted.saturating_sub(1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
