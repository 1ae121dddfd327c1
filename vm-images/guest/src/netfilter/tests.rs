//! The rules as the kernel of the host takes them, in a network namespace of the test's own.

use super::message::{Answer, Message, attributes, messages};
use super::rules::{Rules, install_without_queue};
use super::*;
use crate::namespace;

#[test]
fn an_attribute_is_padded_and_read_back() {
    let bytes = Message::new(0x0a03, 4, 2, 7)
        .text(1, "abc")
        .nested(4, |m| m.be32(1, 5).nested(2, |m| m.bytes(3, &[9])))
        .be16(6, 0x0102)
        .finish(77);
    assert_eq!(bytes.len() % 4, 0);
    let (kind, whole) = messages(&bytes).next().unwrap();
    assert_eq!((kind, whole.len()), (0x0a03, bytes.len()));
    let inner = |value: &[u8]| attributes(value).map(|(kind, value)| (kind, value.to_vec())).collect::<Vec<_>>();
    let read = inner(&bytes[message::HEAD..]);
    assert_eq!(read[0], (1, b"abc\0".to_vec()));
    assert_eq!(read[2], (6, vec![1, 2]));
    let nested = inner(&read[1].1);
    assert_eq!(nested[0], (1, vec![0, 0, 0, 5]));
    assert_eq!(inner(&nested[1].1), [(3, vec![9])]);
}

#[test]
fn an_answer_names_the_message_that_it_is_about() {
    let mut refusal = vec![0; 36];
    refusal[0] = 36;
    refusal[4] = 2;
    refusal[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
    refusal[28..32].copy_from_slice(&9_u32.to_ne_bytes());
    let both = [refusal.clone(), Message::new(0x0300, 0, 0, 0).finish(1), refusal.clone()].concat();
    assert_eq!(Answer::all(&both).collect::<Vec<_>>(), [Answer { sequence: 9, errno: 17 }; 2]);
    for cut in 0..refusal.len() {
        assert_eq!(Answer::all(&refusal[..cut]).count(), 0, "{cut}");
    }
}

/// What `nft list ruleset` makes of the table.
const LISTED: &str = "\
table ip dayfly {
	flags owner

	chain hold_out {
		type filter hook output priority mangle; policy accept;
		oifname != \"lo\" return
		fib daddr type local return
		meta mark 0x64666c00 reject with tcp reset
		meta mark != 0x64666c01 tcp flags syn / syn,ack tcp dport != 53 queue flags bypass to 0
	}

	chain hold_pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname \"lo\" return
		fib daddr type local return
		fib daddr oifname != \"lo\" return
		meta mark 0x64666c00 reject with tcp reset
		meta mark != 0x64666c01 tcp flags syn / syn,ack tcp dport != 53 queue flags bypass to 0
	}

	chain carry_out {
		type nat hook output priority -100; policy accept;
		oifname != \"lo\" return
		fib daddr type local return
		udp dport 53 dnat to 192.0.2.1:53
		tcp dport 53 dnat to 192.0.2.1:53
		meta l4proto tcp redirect to :9999
	}

	chain carry_pre {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local return
		fib daddr oifname != \"lo\" return
		udp dport 53 dnat to 192.0.2.1:53
		tcp dport 53 dnat to 192.0.2.1:53
		meta l4proto tcp redirect to :9999
	}

	chain refuse_out {
		type filter hook postrouting priority filter; policy accept;
		oifname \"lo\" fib daddr type != local drop
	}

	chain refuse_fwd {
		type filter hook forward priority filter - 10; policy accept;
		oifname \"lo\" reject with icmp host-prohibited
	}
}
";

#[test]
fn the_kernel_takes_the_rules_and_lets_nobody_else_take_them_away() {
    namespace::run("netfilter::tests::in_a_namespace_the_rules_are_those_that_are_meant");
}

#[test]
#[ignore = "the test above runs it, in a network namespace"]
fn in_a_namespace_the_rules_are_those_that_are_meant() {
    let (rules, expected) = match Rules::install() {
        Ok(rules) => (rules, LISTED.to_owned()),
        // The name of the rule that the kernel does not know is right, too.
        Err(NetfilterError::Refused(what, Errno::NOENT)) => {
            assert_eq!(what, "make rule 4 of chain hold_out");
            let lines = LISTED.lines().filter(|line| !line.contains("queue"));
            (install_without_queue().unwrap(), lines.map(|line| format!("{line}\n")).collect())
        }
        Err(error) => panic!("{error:?}"),
    };
    let list = || {
        let listed = namespace::output("nft", &["list", "ruleset"])?;
        // Which program its owner is.
        Some(listed.lines().map(|line| format!("{}\n", line.split(" # ").next().unwrap_or(line))).collect::<String>())
    };
    let Some(listed) = list() else { return };
    assert_eq!(listed, expected);
    for attempt in [
        &["flush", "ruleset"][..],
        &["delete", "table", "ip", "dayfly"],
        &["flush", "chain", "ip", "dayfly", "carry_out"],
    ] {
        namespace::output("nft", attempt);
        assert_eq!(list().unwrap(), expected, "{attempt:?}");
    }
    // Others have their tables, and ours is gone with its owner.
    namespace::output("nft", &["add", "table", "ip", "docker"]);
    drop(rules);
    assert_eq!(list().unwrap(), "table ip docker {\n}\n");
}
