//! Addresses, MAC and routes, by rtnetlink(7) over rustix's sockets.
//!
//! Messages are built by hand: four kinds with a handful of attributes, and no `ip` program to
//! start (each costs 30 ms under TCG). Each request asks for an acknowledgement and waits for it.

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netdevice, recv, send, socket_with,
};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

// linux/rtnetlink.h, linux/netlink.h, linux/if_link.h, linux/if_addr.h
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const IFLA_ADDRESS: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The kernel answers at once; this bounds a bug, not a wait.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Why the network could not be set.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("open a netlink socket")]
    Socket(#[source] Errno),
    /// The kernel refused.
    #[error("{0}")]
    Refused(String, #[source] Errno),
    /// The answer makes no sense.
    #[error("{0}: the kernel's answer cannot be read")]
    Answer(String),
}

/// A connection to the kernel's routing tables.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens it.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || {
            // Protocol 0, the default, is NETLINK_ROUTE.
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_DEADLINE))?;
            bind(&socket, &SocketAddrNetlink::new(0, 0))?;
            Ok(socket)
        };
        Ok(Self { socket: open().map_err(NetlinkError::Socket)?, sequence: 0 })
    }

    /// Index of a network device; `None`: there is none of this name (yet).
    #[must_use]
    pub fn index(&self, device: &str) -> Option<u32> {
        netdevice::name_to_index(&self.socket, device).ok()
    }

    /// Sets a device's MAC. The device may be up or down.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
        self.request(format!("set MAC {}", hex(&mac)), &Message::link(index, 0).attribute(IFLA_ADDRESS, &mac))
    }

    /// Brings a device up.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn set_up(&mut self, index: u32) -> Result<(), NetlinkError> {
        self.request(format!("bring device {index} up"), &Message::link(index, IFF_UP))
    }

    /// Gives a device an address; one that it has already is fine.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        self.request(format!("add address {address}/{prefix}"), &Message::address(index, address, prefix))
    }

    /// Sets the default route; an older one of the same kind is replaced.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn set_default_route(&mut self, index: u32, gateway: IpAddr) -> Result<(), NetlinkError> {
        self.request(format!("set default route by {gateway}"), &Message::default_route(index, gateway))
    }

    /// Sets the default route to a device itself, for packets from this address; an older one of the same kind is replaced.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn set_default_device(&mut self, index: u32, source: IpAddr) -> Result<(), NetlinkError> {
        self.request(format!("set default route from {source}"), &Message::default_device(index, source))
    }

    fn request(&mut self, what: String, message: &Message) -> Result<(), NetlinkError> {
        self.sequence += 1;
        let bytes = message.finish(self.sequence);
        if let Err(error) = send(&self.socket, &bytes, SendFlags::empty()) {
            return Err(NetlinkError::Refused(what, error));
        }
        let mut buffer = [0; 4096];
        loop {
            let (_, length) = match recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok(received) => received,
                Err(error) => return Err(NetlinkError::Refused(what, error)),
            };
            match answer(&buffer[..length.min(buffer.len())], self.sequence) {
                Some(Ok(())) => return Ok(()),
                Some(Err(errno)) => return Err(NetlinkError::Refused(what, errno)),
                None if length == 0 => return Err(NetlinkError::Answer(what)),
                None => {} // the answer to an earlier request that timed out
            }
        }
    }
}

/// Reads an acknowledgement: `nlmsghdr`, then the negative errno. `None`: not the answer to this one.
fn answer(bytes: &[u8], sequence: u32) -> Option<Result<(), Errno>> {
    let u16_at = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    if u16_at(4)? != NLMSG_ERROR || u32_at(8)? != sequence {
        return None;
    }
    match i32::from_ne_bytes(bytes.get(16..20)?.try_into().ok()?) {
        0 => Some(Ok(())),
        errno => Some(Err(Errno::from_raw_os_error(errno.saturating_neg()))),
    }
}

/// A request: header (filled in at the end), a fixed part, attributes.
struct Message(Vec<u8>);

impl Message {
    const HEADER: usize = 16;

    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; Self::HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// `ifinfomsg`: family, pad, type, index, flags, mask of the flags to change.
    fn link(index: u32, flags: u32) -> Self {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
        fixed[12..16].copy_from_slice(&flags.to_ne_bytes());
        Self::new(RTM_NEWLINK, 0, &fixed)
    }

    /// `ifaddrmsg`: family, prefix, flags, scope (0: global), index.
    fn address(index: u32, address: IpAddr, prefix: u8) -> Self {
        let mut fixed = [family(address), prefix, 0, 0, 0, 0, 0, 0];
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        let address = octets(address);
        Self::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(IFA_LOCAL, &address)
            .attribute(IFA_ADDRESS, &address)
    }

    fn default_route(index: u32, gateway: IpAddr) -> Self {
        Self::route(family(gateway), RT_SCOPE_UNIVERSE)
            .attribute(RTA_GATEWAY, &octets(gateway))
            .attribute(RTA_OIF, &index.to_ne_bytes())
    }

    fn default_device(index: u32, source: IpAddr) -> Self {
        Self::route(family(source), RT_SCOPE_LINK)
            .attribute(RTA_PREFSRC, &octets(source))
            .attribute(RTA_OIF, &index.to_ne_bytes())
    }

    /// `rtmsg`: family, lengths of destination and source (0: default), tos, table, protocol, scope, type, flags.
    fn route(family: u8, scope: u8) -> Self {
        let fixed = [family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0, 0, 0, 0];
        Self::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("no attribute of ours is longer than an address");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = self.0.clone();
        let length = u32::try_from(bytes.len()).expect("a few attributes");
        bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes
    }
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn hex(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    #[test]
    fn messages_are_what_the_kernel_documents() {
        let address = Message::address(2, "10.0.2.15".parse().unwrap(), 24).finish(7);
        #[rustfmt::skip]
        assert_eq!(address, [
            40, 0, 0, 0, 20, 0, 5, 5, 7, 0, 0, 0, 0, 0, 0, 0, // header: length, type, flags, sequence, port
            2, 24, 0, 0, 2, 0, 0, 0,                          // IPv4, /24, device 2
            8, 0, 2, 0, 10, 0, 2, 15,                         // local
            8, 0, 1, 0, 10, 0, 2, 15,                         // address
        ]);
        let mac = Message::link(3, 0).attribute(IFLA_ADDRESS, &[0x52, 0x54, 0, 1, 2, 3]).finish(1);
        assert_eq!(mac.len(), 44, "six bytes are padded to eight");
        assert_eq!(mac[32..], [10, 0, 1, 0, 0x52, 0x54, 0, 1, 2, 3, 0, 0]);
    }

    #[test]
    fn only_the_right_acknowledgement_counts() {
        let mut bytes = [0; 36];
        bytes[4] = 2;
        bytes[8] = 9;
        assert_eq!(answer(&bytes, 9), Some(Ok(())));
        assert_eq!(answer(&bytes, 8), None);
        bytes[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(answer(&bytes, 9), Some(Err(Errno::EXIST)));
        assert_eq!(answer(&bytes[..10], 9), None);
    }

    #[test]
    fn the_kernel_reads_our_requests() {
        // Of a device that cannot exist, so that the test changes nothing wherever it runs.
        const NO_DEVICE: u32 = 0x7fff_ffff;
        let mut netlink = Netlink::open().unwrap();
        let results = [
            netlink.set_up(NO_DEVICE),
            netlink.set_mac(NO_DEVICE, [2, 0, 0, 0, 0, 1]),
            netlink.add_address(NO_DEVICE, "192.0.2.1".parse().unwrap(), 32),
            netlink.set_default_route(NO_DEVICE, "192.0.2.1".parse().unwrap()),
            netlink.set_default_device(NO_DEVICE, "127.0.0.1".parse().unwrap()),
        ];
        for result in results {
            let Err(NetlinkError::Refused(what, errno)) = result else { panic!("{result:?}") };
            // PERM: the test does not run as root. INVAL would mean that the form is wrong.
            assert!([Errno::NODEV, Errno::NETUNREACH, Errno::PERM].contains(&errno), "{what}: {errno}");
        }
        assert!(netlink.index("lo").is_some());
        assert_eq!(netlink.index("no-such-device"), None);
    }
}
