//! The queue in which the first packets of connections wait: what comes out of it, and what becomes of it.
//!
//! linux/netfilter/nfnetlink_queue.h. While nobody has the queue the rules let packets pass it; when its owner is gone,
//! those that wait in it are dropped.

use super::message::{HEAD, Message, NLM_F_ACK, attributes, messages};
use super::{NetfilterError, open, request};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;

const NFNL_SUBSYS_QUEUE: u16 = 3;
const NFQNL_MSG_PACKET: u16 = NFNL_SUBSYS_QUEUE << 8;
const NFQNL_MSG_VERDICT: u16 = NFNL_SUBSYS_QUEUE << 8 | 1;
const NFQNL_MSG_CONFIG: u16 = NFNL_SUBSYS_QUEUE << 8 | 2;
const NFQA_CFG_CMD: u16 = 1;
const NFQA_CFG_PARAMS: u16 = 2;
const NFQA_CFG_QUEUE_MAXLEN: u16 = 3;
const NFQNL_CFG_CMD_BIND: u8 = 1;
const NFQNL_COPY_PACKET: u8 = 2;
const NFQA_PACKET_HDR: u16 = 1;
const NFQA_VERDICT_HDR: u16 = 2;
const NFQA_MARK: u16 = 3;
const NFQA_PAYLOAD: u16 = 10;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NF_REPEAT: u32 = 4;

/// Bytes of a packet that are of interest: the longest IPv4 header, and a TCP header's ports.
const COPIED_BYTES: u32 = 128;

/// Packets that wait in the kernel. Beyond that the kernel drops, and their senders send again in a second.
const WAITING_MAX: u32 = 4096;

/// Room for as many to be told of: the default overflows at some hundreds at once (seen at 1,500), and the kernel counts
/// some 800 bytes for each.
const RECEIVE_BYTES: usize = 4 * 1024 * 1024;

const IPPROTO_TCP: u8 = 6;

/// Both ends of a connection, as its first packet has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who connects.
    pub source: SocketAddrV4,
    /// To what.
    pub destination: SocketAddrV4,
}

impl Flow {
    /// Of an IPv4 packet with the beginning of a TCP segment.
    fn of(packet: &[u8]) -> Option<Self> {
        let first = *packet.first()?;
        let header = usize::from(first & 0x0f) * 4;
        let is_first_fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff == 0;
        if first >> 4 != 4 || header < 20 || *packet.get(9)? != IPPROTO_TCP || !is_first_fragment {
            return None;
        }
        let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
        let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
        Some(Self {
            source: SocketAddrV4::new(address(12)?, port(header)?),
            destination: SocketAddrV4::new(address(16)?, port(header + 2)?),
        })
    }
}

/// A packet that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its number in the queue.
    pub id: u32,
    /// Of which connection it is; `None`: of none that can be told.
    pub flow: Option<Flow>,
}

impl Packet {
    fn of(message: &[u8]) -> Option<Self> {
        let (mut id, mut flow) = (None, None);
        for (kind, value) in attributes(message.get(HEAD..)?) {
            match kind {
                NFQA_PACKET_HDR => id = value.get(..4).and_then(|id| id.try_into().ok()).map(u32::from_be_bytes),
                NFQA_PAYLOAD => flow = Flow::of(value),
                _ => {}
            }
        }
        Some(Self { id: id?, flow })
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Accept,
    /// It is lost; its sender sends it again.
    Drop,
    /// It goes through the same rules again, with this mark.
    Repeat(u32),
}

/// The queue, ours as long as this lives. At most as many packets wait in it as its rules send there, and no more than
/// 4,096.
pub struct Queue(AsyncFd<OwnedFd>);

impl Queue {
    /// Takes the queue of this number.
    ///
    /// # Errors
    /// [`NetfilterError`]; somebody else may have it.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn bind(number: u16) -> Result<Self, NetfilterError> {
        let socket = open()?;
        let configure = |message: Message| {
            let bytes = message.finish(1);
            request(&socket, &bytes, 1, |_| format!("take packets from queue {number}"))
        };
        let message = || Message::new(NFQNL_MSG_CONFIG, NLM_F_ACK, 0, number);
        // Command, a byte of padding, and a protocol family, which this command does not look at.
        configure(message().bytes(NFQA_CFG_CMD, &[NFQNL_CFG_CMD_BIND, 0, 0, 0]))?;
        let copy = [&COPIED_BYTES.to_be_bytes()[..], &[NFQNL_COPY_PACKET]].concat();
        configure(message().bytes(NFQA_CFG_PARAMS, &copy).be32(NFQA_CFG_QUEUE_MAXLEN, WAITING_MAX))?;
        let set = || {
            // By force only where we are the machine's root; a smaller one costs a second where many connect at once.
            set_socket_recv_buffer_size_force(&socket, RECEIVE_BYTES)
                .or_else(|_| set_socket_recv_buffer_size(&socket, RECEIVE_BYTES))?;
            fcntl_setfl(&socket, fcntl_getfl(&socket)? | OFlags::NONBLOCK)
        };
        set().map_err(NetfilterError::Socket)?;
        #[expect(
            deprecated,
            reason = "its successor is `unsafe`; an `OwnedFd` keeps its descriptor, which is all that it asks"
        )]
        let registered = AsyncFd::new(socket);
        Ok(Self(registered.map_err(|error| NetfilterError::Socket(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?))
    }

    /// The packets that came to wait, one at least.
    ///
    /// # Errors
    /// The system's. Where the kernel had more to tell than fitted, those packets are lost, and are sent again.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost.
    pub async fn next(&self) -> io::Result<Vec<Packet>> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut buffer = [0; 4096];
            let received = ready.try_io(|socket| Ok(recv(socket.get_ref(), &mut buffer[..], RecvFlags::empty())?));
            match received {
                Ok(Ok((_, length))) => {
                    let packets = packets(&buffer[..length.min(buffer.len())]);
                    if !packets.is_empty() {
                        return Ok(packets);
                    }
                }
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Lets a packet go on, or not. One that is not there any more is none.
    pub fn decide(&self, id: u32, verdict: Verdict, number: u16) {
        let (code, mark) = match verdict {
            Verdict::Accept => (NF_ACCEPT, None),
            Verdict::Drop => (NF_DROP, None),
            Verdict::Repeat(mark) => (NF_REPEAT, Some(mark)),
        };
        let head = [code.to_be_bytes(), id.to_be_bytes()].concat();
        let message = Message::new(NFQNL_MSG_VERDICT, 0, 0, number).bytes(NFQA_VERDICT_HDR, &head);
        let message = if let Some(mark) = mark { message.be32(NFQA_MARK, mark) } else { message };
        // The kernel takes it while we send it; what it could refuse is a packet that is gone.
        let _ = send(self.0.get_ref(), &message.finish(0), SendFlags::empty());
    }
}

fn packets(bytes: &[u8]) -> Vec<Packet> {
    messages(bytes)
        .filter(|(kind, _)| *kind == NFQNL_MSG_PACKET)
        .filter_map(|(_, message)| Packet::of(message))
        .collect()
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    /// A SYN of 198.18.0.2:40000 to 1.2.3.4:443.
    fn syn() -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 198, 18, 0, 2, 1, 2, 3, 4];
        packet.extend([0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
        packet
    }

    #[test]
    fn a_packet_says_of_which_connection_it_is() {
        let flow = Flow {
            source: SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 40_000),
            destination: SocketAddrV4::new(Ipv4Addr::new(1, 2, 3, 4), 443),
        };
        assert_eq!(Flow::of(&syn()), Some(flow));
        // With options before the ports.
        let mut long = syn();
        long[0] = 0x46;
        long.splice(20..20, [1, 1, 1, 1]);
        assert_eq!(Flow::of(&long), Some(flow));
        for (at, byte) in [(0, 0x65), (0, 0x44), (9, 17), (7, 1)] {
            let mut other = syn();
            other[at] = byte;
            assert_eq!(Flow::of(&other), None, "byte {at}");
        }
        for length in 0..24 {
            assert_eq!(Flow::of(&syn()[..length]), None, "{length}");
        }
    }

    #[test]
    fn what_the_kernel_tells_is_read_whatever_stands_around_it() {
        let packet = |id: u32, payload: &[u8]| {
            Message::new(NFQNL_MSG_PACKET, 0, 2, 0)
                .bytes(NFQA_PACKET_HDR, &[&id.to_be_bytes()[..], &[8, 0, 3]].concat())
                .be32(NFQA_MARK, 7)
                .bytes(NFQA_PAYLOAD, payload)
                .finish(0)
        };
        let whole = [packet(1, &syn()), packet(2, b"not IP"), packet(0x0102_0304, &syn())].concat();
        let flow = Flow::of(&syn());
        assert_eq!(
            packets(&whole),
            [Packet { id: 1, flow }, Packet { id: 2, flow: None }, Packet { id: 0x0102_0304, flow }]
        );
        // Cut anywhere, it is what came whole before the cut.
        for cut in 0..whole.len() {
            assert!(packets(&whole[..cut]).len() <= 2);
        }
        let other = Message::new(NFQNL_MSG_CONFIG, 0, 0, 0).finish(0);
        assert_eq!(packets(&other), []);
    }
}
