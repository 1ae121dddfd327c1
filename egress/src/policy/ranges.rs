//! Which addresses are not the public Internet's? Those, a job reaches only if the policy names them.
//!
//! IANA's registries of special-purpose addresses (RFC 6890), where a host may answer. Those for documentation are
//! nobody's, and count as public.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What an address is that is not public.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Special {
    /// The host itself: 127/8, 0/8 (which Linux takes for it), `::1`, `::`.
    Loopback,
    /// A cloud's metadata service, which gives out the host's credentials.
    Metadata,
    /// 169.254/16, fe80::/10.
    LinkLocal,
    /// RFC 1918, shared (100.64/10), benchmarks (198.18/15), ULA, site-local.
    Private,
    /// 224/4, ff00::/8, and broadcast.
    Multicast,
    /// Of no use yet, or no more.
    Reserved,
}

/// Where clouds answer for metadata, besides 169.254.169.254: AWS over IPv6, Alibaba, Oracle.
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// The same address in the form in which it is judged: IPv4 within IPv6 is IPv4.
#[must_use]
pub fn canonical(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

/// What is special about this address; `None`: it is public.
#[must_use]
pub fn special(address: IpAddr) -> Option<Special> {
    match canonical(address) {
        IpAddr::V4(v4) => special_v4(v4),
        IpAddr::V6(v6) => special_v6(v6),
    }
}

fn special_v4(address: Ipv4Addr) -> Option<Special> {
    if METADATA_V4.contains(&address) {
        return Some(Special::Metadata);
    }
    Some(match address.octets() {
        [0 | 127, ..] => Special::Loopback,
        [169, 254, ..] => Special::LinkLocal,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] | [198, 18 | 19, ..] => Special::Private,
        [224..=239, ..] | [255, 255, 255, 255] => Special::Multicast,
        [192, 0, 0, _] | [240..=255, ..] => Special::Reserved,
        _ => return None,
    })
}

fn special_v6(address: Ipv6Addr) -> Option<Special> {
    if address == METADATA_V6 {
        return Some(Special::Metadata);
    }
    if address.is_loopback() || address.is_unspecified() {
        return Some(Special::Loopback);
    }
    let v4 = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    Some(match address.segments() {
        [0xfe80..=0xfebf, ..] => Special::LinkLocal,
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] | [0x64, 0xff9b, 1, ..] => Special::Private,
        [0xff00..=0xffff, ..] => Special::Multicast,
        // What a translator (RFC 6052) or a 6to4 router (RFC 3056) makes of it is the IPv4 address within.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => return special_v4(v4(high, low)),
        // IPv4-compatible, discard-only, Teredo.
        [0, 0, 0, 0, 0, 0, ..] | [0x100, 0, 0, 0, ..] | [0x2001, 0, ..] => Special::Reserved,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<Special>) {
        assert_eq!(special(text.parse().unwrap()), expected, "{text}");
    }

    #[test]
    fn what_is_special_is_known_and_what_is_beside_it_is_not() {
        use Special::{LinkLocal, Loopback, Metadata, Multicast, Private, Reserved};
        for text in ["127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "::1", "::", "::ffff:127.0.0.1"] {
            check(text, Some(Loopback));
        }
        for text in ["64:ff9b::7f00:1", "2002:7f00:1::"] {
            check(text, Some(Loopback));
        }
        for text in ["169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "100.100.100.200", "192.0.0.192"] {
            check(text, Some(Metadata));
        }
        for text in ["169.254.0.1", "fe80::1", "febf::1"] {
            check(text, Some(LinkLocal));
        }
        for text in ["10.0.0.0", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1"] {
            check(text, Some(Private));
        }
        for text in ["100.127.255.255", "198.18.0.2", "198.19.255.255", "fc00::", "fdff::1", "fec0::2", "64:ff9b:1::1"]
        {
            check(text, Some(Private));
        }
        for text in ["224.0.0.251", "239.255.255.255", "255.255.255.255", "ff02::1"] {
            check(text, Some(Multicast));
        }
        for text in ["240.0.0.1", "192.0.0.8", "::10.0.0.1", "100::1", "2001::1"] {
            check(text, Some(Reserved));
        }
        for text in ["1.1.1.1", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "192.167.255.255"] {
            check(text, None);
        }
        for text in ["100.63.255.255", "100.128.0.0", "198.17.0.0", "198.20.0.0", "223.255.255.255", "169.253.0.0"] {
            check(text, None);
        }
        for text in ["2606:4700::1111", "64:ff9b::101:101", "2002:101:101::", "fbff::", "2001:db8::1", "2001:1::1"] {
            check(text, None);
        }
    }
}
