//! What this host is and how it resolves names, read when an egress begins: its own addresses, which no job reaches unless
//! the policy names them, and its resolvers, which it asks.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where the kernel lists IPv4 addresses, with all routes.
const FIB: &str = "/proc/net/fib_trie";
/// And IPv6 addresses.
const INET6: &str = "/proc/net/if_inet6";
/// resolv.conf(5).
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Resolvers asked at most: as the C library does.
const RESOLVERS_MAX: usize = 3;
/// Addresses told at most: a message holds them.
const ADDRESSES_MAX: usize = 256;

/// This host's own addresses, loopback left out: that is refused in any case. What cannot be read is left out, too; the
/// process looks again at each connection.
pub(super) fn own_addresses() -> Vec<IpAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    addresses(&read(FIB), &read(INET6))
}

/// The resolvers of this host, the stub on its loopback among them.
pub(super) fn resolvers() -> Vec<SocketAddr> {
    servers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
}

fn addresses(fib: &str, inet6: &str) -> Vec<IpAddr> {
    let mut found = BTreeSet::new();
    let mut last: Option<Ipv4Addr> = None;
    for line in fib.lines() {
        // `|-- 192.0.2.7`, and below it `/32 host LOCAL`.
        if let Some(address) = line.trim_start().strip_prefix("|-- ") {
            last = address.trim().parse().ok();
        } else if line.trim_end().ends_with("host LOCAL") {
            found.extend(last.map(IpAddr::V4));
        }
    }
    for line in inet6.lines() {
        // 32 hex digits, then index, prefix, scope, flags and name.
        let bits = line.split_whitespace().next().filter(|digits| digits.len() == 32);
        found.extend(
            bits.and_then(|bits| u128::from_str_radix(bits, 16).ok()).map(|bits| IpAddr::V6(Ipv6Addr::from(bits))),
        );
    }
    found.into_iter().filter(|address| !address.is_loopback()).take(ADDRESSES_MAX).collect()
}

fn servers(text: &str) -> Vec<SocketAddr> {
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        // One with a zone (`fe80::1%eth0`) is no address that could be handed over.
        if words.next() == Some("nameserver") { words.next()?.parse::<IpAddr>().ok() } else { None }
    };
    let mut found: Vec<SocketAddr> =
        text.lines().filter_map(of).map(|address| SocketAddr::new(address, 53)).take(RESOLVERS_MAX).collect();
    if found.is_empty() {
        // As the C library does without a word of it.
        found.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_addresses_are_read_from_the_kernels_tables() {
        let fib = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 192.0.2.0/24 2 0 2\n        \
                   |-- 192.0.2.0\n           /24 link UNICAST\n        |-- 192.0.2.7\n           /32 host LOCAL\n        \
                   |-- 192.0.2.255\n           /32 link BROADCAST\nLocal:\n        |-- 127.0.0.1\n           /32 host LOCAL\n        \
                   |-- 192.0.2.7\n           /32 host LOCAL\n";
        let inet6 = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fe800000000000000000000000000001 02 40 20 80     eth0\nnonsense\n";
        let found: Vec<String> = addresses(fib, inet6).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.7", "fe80::1"]);
        assert!(own_addresses().iter().all(|address| !address.is_loopback()));
    }

    #[test]
    fn resolvers_are_those_of_the_host_the_stub_included() {
        let of = |text: &str| servers(text).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            of(
                "# x\nsearch a.example\nnameserver 127.0.0.53\noptions edns0\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\n"
            ),
            ["127.0.0.53:53", "[2001:db8::1]:53"]
        );
        assert_eq!(of("nameserver 192.0.2.1\n".repeat(9).as_str()).len(), 3);
        assert_eq!(of(""), ["127.0.0.1:53"]);
    }
}
