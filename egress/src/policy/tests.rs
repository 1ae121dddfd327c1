//! Single decisions, then what must hold for all policies and destinations.

use super::*;
use proptest::prelude::*;

fn policy(mode: Mode, allow: &[&str], deny: &[&str]) -> Policy {
    let patterns = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
    Policy { mode, allow: patterns(allow), deny: patterns(deny), ..Policy::default() }
}

fn bad(text: &str, part: &str) {
    let error = text.parse::<Pattern>().unwrap_err().to_string();
    assert!(error.contains(part) && !error.ends_with('.'), "{text}: {error}");
}

#[test]
fn a_pattern_that_makes_no_sense_is_one_sentence_with_a_remedy() {
    bad("10.20.1.0/16", "write `10.20.0.0/16`");
    bad("fd00::1/8", "write `fd00::/8`");
    bad("a.*.example", "write `*.domain`");
    bad("*example.com", "write `*.domain`");
    bad("example.*", "write `*.domain`");
    bad("https://example.com", "write `host:port`");
    bad("example.com:0", "no port");
    bad("example.com:65536", "no port");
    bad("example.com:+1", "no port");
    bad("example.com:http", "no port");
    bad("10.0.0.0/33", "from 0 to 32");
    bad("10.0.0.0/+8", "from 0 to 32");
    bad("fd00::/129", "from 0 to 128");
    bad("10.0.1", "looks like an address");
    bad("10.0.0.256", "looks like an address");
    bad("*.10", "looks like an address");
    bad("host/24", "looks like an address");
    bad("::ffff:10.0.0.1", "IPv4 form");
    bad("[::ffff:10.0.0.0/104]:80", "IPv4 form");
    bad("", "names nothing");
    bad(&"a".repeat(400), "names nothing");
    bad("a..b", "no host's name");
    bad("a b", "no host's name");
    bad("exämple.com", "no host's name");
    bad(&format!("{}.com", "a".repeat(64)), "no host's name");
    bad("[fd00::1", "no host's name");
    bad("*.", "no host's name");
}

#[test]
fn a_pattern_is_read_and_written_the_same() {
    for (text, written) in [
        ("gitlab", "gitlab"),
        ("GitLab.", "gitlab"),
        ("*.gitlab", "*.gitlab"),
        ("*", "*"),
        ("*:443", "*:443"),
        ("Example.COM.", "example.com"),
        ("*.Debian.org:443", "*.debian.org:443"),
        ("10.20.0.0/16:5432", "10.20.0.0/16:5432"),
        ("10.20.0.1/32", "10.20.0.1"),
        ("fd00::/8", "fd00::/8"),
        ("[fd00::/8]:22", "[fd00::/8]:22"),
        ("[fd00::1]", "fd00::1"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("db", "db"),
    ] {
        let pattern: Pattern = text.parse().unwrap();
        assert_eq!(pattern.to_string(), written);
        assert_eq!(written.parse::<Pattern>().unwrap(), pattern);
    }
    let text = r#"{"mode":"enforce","allow":["gitlab","*.debian.org:443"],"always":["gitlab.example:443","[fd00::1]:22"],"own":["10.0.0.1"],"rate":{"bytes_a_second":1000000}}"#;
    let policy: Policy = serde_json::from_str(text).unwrap();
    let again: Policy = serde_json::from_str(&serde_json::to_string(&policy).unwrap()).unwrap();
    assert_eq!(again, policy);
    let error = serde_json::from_str::<Policy>(r#"{"allow":["10.0.0.1/8"]}"#).unwrap_err().to_string();
    assert!(error.contains("write `10.0.0.0/8`"), "{error}");
}

#[test]
fn a_policy_that_contradicts_itself_is_told_so() {
    let says = |policy: &Policy| policy.validate().unwrap_err().to_string();
    let twice = policy(Mode::Enforce, &["a.example:443"], &["*.example"]);
    assert_eq!(
        says(&twice),
        "`a.example:443` in `allow` has no effect, for `*.example` in `deny` covers it: remove one of them"
    );
    assert!(policy(Mode::Enforce, &["*.example"], &["a.example:443"]).validate().is_ok());
    assert!(says(&policy(Mode::Enforce, &["10.1.0.0/16"], &["10.0.0.0/8"])).contains("10.0.0.0/8"));
    let mut needed = policy(Mode::Observe, &[], &["*.example:443"]);
    assert!(needed.validate().is_ok());
    needed.always = vec!["gitlab.example:443".parse().unwrap()];
    assert!(says(&needed).contains("`gitlab.example:443`, without which no job runs"));
    needed.always = vec!["gitlab.example:22".parse().unwrap()];
    assert!(needed.validate().is_ok());
    for all in ["*", "gitlab"] {
        assert!(says(&policy(Mode::Observe, &[], &[all])).contains("enforce"));
    }
    assert!(policy(Mode::Observe, &[], &["*:25"]).validate().is_ok());
    let mut many = policy(Mode::Observe, &[], &[]);
    many.allow = vec!["a.example".parse().unwrap(); PATTERNS_MAX + 1];
    assert!(says(&many).contains("more than 500"));
    let rate = Some(Rate { bytes_a_second: Some(10), connections: None });
    assert!(says(&Policy { rate, ..Policy::default() }).contains("at least 1024"));
    let rate = Some(Rate { bytes_a_second: None, connections: Some(0) });
    assert!(says(&Policy { rate, ..Policy::default() }).contains("at least 1"));
}

fn check(policy: &Policy, address: &str, port: u16, names: &[&str], expected: Verdict) {
    assert_eq!(policy.check(address.parse().unwrap(), port, names), expected, "{address}:{port} {names:?}");
}

#[test]
fn what_is_public_is_reached_in_observe_and_must_be_listed_in_enforce() {
    let unlisted = Verdict::Refused(Reason::Unlisted);
    let observe = policy(Mode::Observe, &[], &["*:25", "evil.example", "192.0.2.0/24"]);
    check(&observe, "1.1.1.1", 443, &[], Verdict::Allowed);
    check(&observe, "1.1.1.1", 25, &[], Verdict::Refused(Reason::Denied));
    check(&observe, "1.1.1.1", 443, &["evil.example", "good.example"], Verdict::Refused(Reason::Denied));
    check(&observe, "192.0.2.7", 443, &["good.example"], Verdict::Refused(Reason::Denied));
    let enforce = policy(Mode::Enforce, &["*.debian.org:443", "one.example", "198.51.100.0/24:22"], &[]);
    check(&enforce, "1.1.1.1", 443, &["deb.debian.org"], Verdict::Allowed);
    check(&enforce, "1.1.1.1", 443, &["other.example", "a.b.debian.org"], Verdict::Allowed);
    check(&enforce, "1.1.1.1", 80, &["deb.debian.org"], unlisted);
    check(&enforce, "1.1.1.1", 443, &["debian.org"], unlisted);
    check(&enforce, "1.1.1.1", 443, &["evildebian.org"], unlisted);
    check(&enforce, "1.1.1.1", 443, &["deb.debian.org.evil.example"], unlisted);
    check(&enforce, "1.1.1.1", 443, &[], unlisted);
    check(&enforce, "1.1.1.1", 9, &["one.example"], Verdict::Allowed);
    check(&enforce, "198.51.100.9", 22, &[], Verdict::Allowed);
    check(&enforce, "::ffff:198.51.100.9", 22, &[], Verdict::Allowed);
    check(&enforce, "198.51.100.9", 23, &[], unlisted);
    check(&policy(Mode::Enforce, &["*:443"], &[]), "1.1.1.1", 443, &[], Verdict::Allowed);
}

#[test]
fn what_is_not_public_must_be_named() {
    let special = |special| Verdict::Refused(Reason::Special(special));
    for mode in [Mode::Observe, Mode::Enforce] {
        let mut by = policy(mode, &["db.example", "*.corp.example", "10.20.0.0/16:5432", "*"], &[]);
        by.own = vec!["10.20.0.7".parse().unwrap(), "203.0.113.7".parse().unwrap()];
        check(&by, "10.20.0.1", 5432, &[], Verdict::Allowed);
        check(&by, "10.20.0.1", 80, &[], special(Special::Private));
        check(&by, "10.9.0.1", 80, &["a.corp.example"], Verdict::Allowed);
        check(&by, "127.0.0.1", 80, &["a.corp.example"], special(Special::Loopback));
        check(&by, "169.254.169.254", 80, &["a.corp.example"], special(Special::Metadata));
        check(&by, "::ffff:169.254.169.254", 80, &[], special(Special::Metadata));
        check(&by, "127.0.0.1", 80, &["db.example"], Verdict::Allowed);
        check(&by, "0.0.0.0", 80, &["some.example"], special(Special::Loopback));
        check(&by, "10.20.0.7", 5432, &[], Verdict::Refused(Reason::Own));
        check(&by, "203.0.113.7", 80, &["some.example"], Verdict::Refused(Reason::Own));
        check(&by, "203.0.113.7", 80, &["db.example"], Verdict::Allowed);
        by.allow.push("203.0.113.7:80".parse().unwrap());
        check(&by, "203.0.113.7", 80, &[], Verdict::Allowed);
        // One that the host has got since.
        let own = Verdict::Refused(Reason::Own);
        assert_eq!(by.check_own("203.0.113.8".parse().unwrap(), 80, &["some.example"]), own);
        assert_eq!(by.check_own("10.20.0.8".parse().unwrap(), 5432, &[]), own);
    }
}

#[test]
fn what_a_job_cannot_do_without_is_reached_wherever_it_is() {
    let mut by = policy(Mode::Enforce, &[], &["10.0.0.0/8"]);
    by.always = vec!["gitlab.example:443".parse().unwrap(), "127.0.0.1:8080".parse().unwrap()];
    check(&by, "10.0.0.5", 443, &["gitlab.example"], Verdict::Allowed);
    check(&by, "10.0.0.5", 22, &["gitlab.example"], Verdict::Refused(Reason::Denied));
    check(&by, "10.0.0.5", 443, &["other.example"], Verdict::Refused(Reason::Denied));
    check(&by, "127.0.0.1", 8080, &[], Verdict::Allowed);
    check(&by, "127.0.0.1", 8081, &[], Verdict::Refused(Reason::Special(Special::Loopback)));
    assert_eq!(by.lookup("gitlab.example"), Verdict::Allowed);
    assert_eq!(by.lookup("other.example"), Verdict::Refused(Reason::Unlisted));
    assert_eq!(by.answer("gitlab.example", "10.0.0.5".parse().unwrap()), Verdict::Allowed);
}

#[test]
fn names_are_asked_for_and_told_by_the_policy() {
    let private: IpAddr = "10.0.0.1".parse().unwrap();
    let public: IpAddr = "1.1.1.1".parse().unwrap();
    let withheld = Verdict::Refused(Reason::Special(Special::Private));
    let observe = policy(Mode::Observe, &["db.example:5432"], &["evil.example", "odd.example:25"]);
    assert_eq!(observe.lookup("evil.example"), Verdict::Refused(Reason::Denied));
    assert_eq!(observe.lookup("odd.example"), Verdict::Allowed);
    assert_eq!(observe.answer("a.example", private), withheld);
    assert_eq!(observe.answer("a.example", public), Verdict::Allowed);
    assert_eq!(observe.answer("db.example", private), Verdict::Allowed);
    let enforce = policy(Mode::Enforce, &["a.example:443", "*.deb.example"], &[]);
    assert_eq!(enforce.lookup("a.example"), Verdict::Allowed);
    assert_eq!(enforce.lookup("x.deb.example"), Verdict::Allowed);
    assert_eq!(enforce.lookup("b.example"), Verdict::Refused(Reason::Unlisted));
    // A network is listed: only the address tells.
    let nets = policy(Mode::Enforce, &["198.51.100.0/24"], &[]);
    assert_eq!(nets.lookup("b.example"), Verdict::Allowed);
    assert_eq!(nets.answer("b.example", "198.51.100.1".parse().unwrap()), Verdict::Allowed);
    assert_eq!(nets.answer("b.example", public), Verdict::Refused(Reason::Unlisted));
}

#[test]
fn the_server_that_tls_asks_for_must_be_allowed_too() {
    let address: IpAddr = "198.51.100.1".parse().unwrap();
    let refused = Verdict::Refused(Reason::ServerName);
    let enforce = policy(Mode::Enforce, &["a.example:443", "203.0.113.0/24"], &[]);
    assert_eq!(enforce.server_name("A.example", address, 443), Verdict::Allowed);
    assert_eq!(enforce.server_name("hidden.example", address, 443), refused);
    assert_eq!(enforce.server_name("\0", address, 443), refused);
    assert_eq!(enforce.server_name("any.example", "203.0.113.1".parse().unwrap(), 443), Verdict::Allowed);
    let observe = policy(Mode::Observe, &[], &["evil.example"]);
    assert_eq!(observe.server_name("b.example", address, 443), Verdict::Allowed);
    assert_eq!(observe.server_name("evil.example", address, 443), refused);
}

const NAMES: [&str; 5] = ["a.example", "b.example", "x.a.example", "example", "other.test"];
const PATTERNS: [&str; 9] = [
    "gitlab",
    "*:443",
    "a.example",
    "*.example:443",
    "*.a.example",
    "10.0.0.0/8",
    "127.0.0.1:80",
    "0.0.0.0/0:22",
    "203.0.113.0/24",
];

fn any_policy() -> impl Strategy<Value = Policy> {
    let patterns = || prop::collection::vec(prop::sample::select(&PATTERNS[..]), 0..4);
    (any::<bool>(), patterns(), patterns())
        .prop_map(|(enforce, allow, deny)| policy(if enforce { Mode::Enforce } else { Mode::Observe }, &allow, &deny))
}

fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(bits.into())),
        any::<u128>().prop_map(|bits| IpAddr::V6(bits.into())),
        prop::sample::select(&["127.0.0.1", "10.1.2.3", "169.254.169.254", "203.0.113.9", "::1", "fe80::1"][..])
            .prop_map(|text| text.parse().unwrap()),
    ]
}

proptest! {
    #[test]
    fn nothing_that_is_not_public_is_reached_unnamed(
        enforce: bool, address in any_address(), port: u16, names in prop::collection::vec(prop::sample::select(&NAMES[..]), 0..4)
    ) {
        let mode = if enforce { Mode::Enforce } else { Mode::Observe };
        for allow in [&[][..], &["*"], &["gitlab"]] {
            let verdict = policy(mode, allow, &[]).check(address, port, &names);
            prop_assert!(special(address).is_none() || !verdict.is_allowed());
        }
    }

    #[test]
    fn enforce_allows_no_more_than_observe_and_deny_takes_away(
        by in any_policy(), address in any_address(), port in prop::sample::select(&[22u16, 80, 443, 9][..]),
        names in prop::collection::vec(prop::sample::select(&NAMES[..]), 0..4)
    ) {
        let with = |mode, deny: bool| {
            let deny = if deny { by.deny.clone() } else { Vec::new() };
            Policy { mode, deny, ..by.clone() }.check(address, port, &names).is_allowed()
        };
        prop_assert!(!with(Mode::Enforce, true) || with(Mode::Observe, true));
        prop_assert!(!with(by.mode, true) || with(by.mode, false));
        // No address is reached by a name that would not have been told.
        if let [name] = names[..]
            && by.check(address, port, &names).is_allowed()
        {
            prop_assert!(by.answer(name, address).is_allowed());
            prop_assert!(by.lookup(name).is_allowed());
        }
    }

    #[test]
    fn a_network_holds_what_shares_its_bits(net: u32, prefix in 0u8..=32, address: u32) {
        let mask = if prefix == 0 { 0 } else { u32::MAX << (32 - prefix) };
        let text = format!("{}/{prefix}", std::net::Ipv4Addr::from(net & mask));
        let Pattern { to: To::Net(cidr), .. } = text.parse().unwrap() else { panic!("{text}") };
        prop_assert_eq!(cidr.contains(IpAddr::V4(address.into())), address & mask == net & mask);
    }

    #[test]
    fn any_text_is_read_or_refused_and_what_is_read_is_written_alike(text in "\\PC{0,40}|[a-z*.0-9:/\\[\\]]{0,30}") {
        match text.parse::<Pattern>() {
            Ok(pattern) => prop_assert_eq!(pattern.to_string().parse::<Pattern>().unwrap(), pattern),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
