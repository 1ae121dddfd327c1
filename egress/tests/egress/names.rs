//! What a guest is told of names, and what it reaches by them.

use crate::support::{Egress, FarEnd, Resolver, Says, addresses, echoes, query, soon};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::time::Instant;

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;
const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

fn always(address: Ipv4Addr) -> Says {
    Says::Addresses(60, vec![vec![address]])
}

/// A name whose answer changes to an address of the host, or of a private network, opens neither; one that the policy names does.
#[tokio::test]
async fn a_name_that_rebinds_opens_nothing() {
    let far = FarEnd::echo().await;
    let then = |address| Says::Addresses(0, vec![vec![PUBLIC], vec![address]]);
    let resolver = Resolver::start(&[
        ("rebind.example", then(LOOPBACK)),
        ("metadata.example", then(Ipv4Addr::new(169, 254, 169, 254))),
        ("private.example", Says::Addresses(0, vec![vec![Ipv4Addr::new(10, 0, 0, 1), PUBLIC]])),
        ("files.example", always(LOOPBACK)),
    ])
    .await;
    let policy = format!(r#"{{"allow":["files.example:{}"]}}"#, far.port);
    let mut egress = Egress::start(&policy, &[resolver.address]).await;
    let guest = egress.guest().await;
    for name in ["rebind.example", "metadata.example"] {
        assert_eq!(guest.lookup(name).await, (0, vec![PUBLIC]));
        assert_eq!(guest.lookup(name).await, (0, vec![]));
        assert_eq!(resolver.asked(name), 2, "each is asked anew, and each answer looked at");
    }
    assert_eq!(guest.lookup("private.example").await, (0, vec![PUBLIC]));
    let target = format!("127.0.0.1:{}", far.port);
    assert_eq!(guest.connect(&target).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(far.accepted(), 0);
    // The same address, by the name that it is allowed for.
    assert_eq!(guest.lookup("files.example").await, (0, vec![LOOPBACK]));
    echoes(&mut guest.connect(&target).await.unwrap(), b"hello").await;
    assert_eq!(far.accepted(), 1);
    // Another port of it is not.
    let other = FarEnd::echo().await;
    assert!(guest.connect(format!("127.0.0.1:{}", other.port)).await.is_err());
    assert_eq!(other.accepted(), 0);
    drop(guest);
    let (_, destinations) = egress.end().await;
    let of = |name: &str| destinations.iter().find(|to| to.name.as_deref() == Some(name) && to.port == 0).unwrap();
    assert_eq!(of("rebind.example").refused, 1);
    assert_eq!(serde_json::to_value(of("metadata.example")).unwrap()["reason"], "metadata");
    assert!(
        destinations.iter().any(|to| to.name.as_deref() == Some("files.example") && to.up == 5 && to.connections == 1)
    );
}

/// Whatever is not public is refused at once, and nothing is sent there.
#[tokio::test]
async fn what_is_not_public_is_refused_at_once() {
    let far = FarEnd::echo().await;
    for mode in ["observe", "enforce"] {
        let policy = format!(r#"{{"mode":"{mode}","allow":["127.0.0.1:{}"]}}"#, far.port);
        let mut egress = Egress::start(&policy, &[]).await;
        let guest = egress.guest().await;
        let start = Instant::now();
        for to in [
            "10.0.0.1:80",
            "172.16.0.1:80",
            "192.168.1.1:22",
            "100.64.0.1:80",
            "169.254.169.254:80",
            "169.254.1.1:80",
            "127.0.0.2:80",
            "0.0.0.0:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "240.0.0.1:80",
            "198.18.0.2:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[fe80::1]:80",
            "[fd00::1]:80",
            "[fd00:ec2::254]:80",
            "[ff02::1]:80",
            "[64:ff9b::a00:1]:80",
            "[2002:7f00:1::]:80",
            "[::]:80",
        ] {
            let error = guest.connect(to).await.expect_err(to);
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        // No targets.
        for to in ["example.com:80", "1.2.3.4", "1.2.3.4:0", "[fe80::1%1]:80", "localhost:80", "[::1]", "0x7f.1:80"] {
            if let Ok(mut stream) = guest.opener.open_to(to).await {
                assert!(soon(stream.accepted()).await.is_err(), "{to}");
            }
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert_eq!(far.accepted(), if mode == "observe" { 0 } else { 1 });
        echoes(&mut guest.connect(format!("127.0.0.1:{}", far.port)).await.unwrap(), b"hello").await;
        drop(guest);
        let (_, destinations) = egress.end().await;
        let refused: u64 = destinations.iter().map(|to| to.refused).sum();
        assert_eq!(refused, 21, "{destinations:?}");
    }
}

/// In `enforce`, an address that no allowed name was told for is refused, and a name that is not listed is not even asked for.
#[tokio::test]
async fn only_what_is_listed_is_reached_in_enforce() {
    let far = FarEnd::echo().await;
    let resolver = Resolver::start(&[
        ("listed.example", always(LOOPBACK)),
        ("alias.example", Says::Alias("elsewhere.example", LOOPBACK)),
        ("other.example", always(PUBLIC)),
    ])
    .await;
    let policy = format!(r#"{{"mode":"enforce","allow":["listed.example:{0}","alias.example:{0}"]}}"#, far.port);
    let mut egress = Egress::start(&policy, &[resolver.address]).await;
    let guest = egress.guest().await;
    let target = format!("127.0.0.1:{}", far.port);
    assert!(guest.connect(&target).await.is_err(), "no answer has named it");
    assert!(guest.connect("203.0.113.9:443").await.is_err());
    assert_eq!(guest.lookup("other.example").await, (3, vec![]));
    assert_eq!(resolver.asked("other.example"), 0);
    assert_eq!(guest.lookup("Alias.EXAMPLE").await, (0, vec![LOOPBACK]));
    echoes(&mut guest.connect(&target).await.unwrap(), b"by its alias").await;
    assert_eq!(guest.lookup("listed.example").await, (0, vec![LOOPBACK]));
    echoes(&mut guest.connect(&target).await.unwrap(), b"hello").await;
    drop(guest);
    let (_, destinations) = egress.end().await;
    let other = destinations.iter().find(|to| to.name.as_deref() == Some("other.example")).unwrap();
    assert_eq!(serde_json::to_value(other).unwrap()["reason"], "unlisted");
}

/// What a guest asks that is no question, and what a resolver says that is no answer.
#[tokio::test]
async fn malformed_messages_of_either_side_harm_nobody() {
    let loops =
        [&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0][..], b"\x03odd\x07example\x00\0\x01\0\x01", &[0xc0, 29, 0, 1, 0, 1]]
            .concat();
    let cut = [&[0x81, 0x80, 0, 1, 0xff, 0xff, 0, 0, 0, 0][..], b"\x03odd\x07example\x00\0\x01\0\x01\xc0"].concat();
    let resolver = Resolver::start(&[
        ("odd.example", Says::Raw(vec![vec![], vec![0x81], loops, cut], PUBLIC)),
        ("long.example", Says::Long(vec![PUBLIC; 60])),
        ("good.example", always(PUBLIC)),
    ])
    .await;
    let mut egress = Egress::start("{}", &[resolver.address]).await;
    let guest = egress.guest().await;
    let mut dns = guest.dns().await;
    for message in [&b""[..], b"\0", &[0; 11], &[0xff; 40], &[0; 12], &query(7, "a.example", 1)[..20]] {
        dns.say(message).await;
    }
    let mut answer = query(8, "good.example", 1);
    answer[2] |= 0x80;
    dns.say(&answer).await;
    dns.say(&vec![0; 65_535]).await;
    let mut many = query(9, "good.example", 1);
    many[5] = 2;
    dns.say(&many).await;
    let mut status = query(10, "good.example", 1);
    status[2] = 0x10;
    dns.say(&status).await;
    let mut pointer = query(11, "a", 1);
    pointer[12..14].copy_from_slice(&[0xc0, 12]);
    dns.say(&pointer).await;
    let mut codes = Vec::new();
    for _ in 0..6 {
        let answer = dns.hear().await;
        codes.push((u16::from_be_bytes([answer[0], answer[1]]), answer[3] & 0x0f));
    }
    codes.sort_unstable();
    assert_eq!(codes, [(0, 1), (0, 1), (7, 1), (9, 1), (10, 4), (11, 1)]);
    // A question that holds bytes of no host's name is nobody's.
    assert_eq!(addresses(&dns.ask("a b.example", 1).await).0, 3);
    assert_eq!(dns.lookup("odd.example").await, (0, vec![PUBLIC]), "only the answer to the question counts");
    assert_eq!(dns.lookup("long.example").await, (0, vec![PUBLIC; 60]), "over TCP");
    assert_eq!(dns.lookup("none.example").await, (3, vec![]));
    for kind in [28, 65, 255] {
        assert_eq!(addresses(&dns.ask("good.example", kind).await), (0, vec![]), "{kind}");
    }
    for kind in [252, 251, 41] {
        assert_eq!(addresses(&dns.ask("good.example", kind).await).0, 5, "{kind}");
    }
    assert_eq!(addresses(&dns.ask("1.0.0.10.in-addr.arpa", 12).await).0, 3);
    assert_eq!(resolver.asked("1.0.0.10.in-addr.arpa"), 0);
    assert_eq!(dns.lookup("good.example").await, (0, vec![PUBLIC]));
}

/// Resolvers that say nothing are a failure in time; the next one of the list is asked.
#[tokio::test]
async fn a_silent_resolver_is_not_waited_for() {
    let silent = Resolver::start(&[("a.example", Says::Silence), ("b.example", Says::Silence)]).await;
    let good = Resolver::start(&[("a.example", always(PUBLIC)), ("b.example", Says::Silence)]).await;
    let mut egress = Egress::start("{}", &[silent.address, good.address]).await;
    let guest = egress.guest().await;
    assert_eq!(guest.lookup("a.example").await, (0, vec![PUBLIC]));
    let start = Instant::now();
    assert_eq!(guest.lookup("b.example").await, (2, vec![]));
    assert!(start.elapsed() < Duration::from_secs(7), "{:?}", start.elapsed());
}

/// T9: a flood of questions waits for its turn; who connects meanwhile does not wait with it, and all are answered.
#[tokio::test]
async fn a_flood_of_questions_holds_up_no_connection() {
    let far = FarEnd::echo().await;
    let resolver = Resolver::start(&[("slow.example", Says::Silence), ("good.example", always(PUBLIC))]).await;
    let policy = format!(r#"{{"allow":["127.0.0.1:{}"]}}"#, far.port);
    let mut egress = Egress::start(&policy, &[resolver.address]).await;
    let guest = egress.guest().await;
    let mut dns = guest.dns().await;
    // As many as may be outstanding, and as many again, none of which is answered for seconds.
    for id in 0..512 {
        dns.say(&query(id, &format!("{id}.slow.example"), 1)).await;
    }
    for id in 512..1500 {
        dns.say(&query(id, "good.example", 1)).await;
    }
    let start = Instant::now();
    echoes(&mut guest.connect(format!("127.0.0.1:{}", far.port)).await.unwrap(), b"hello").await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..1500 {
        let answer = dns.hear().await;
        assert!(seen.insert(u16::from_be_bytes([answer[0], answer[1]])));
    }
    assert!(egress.child.try_wait().unwrap().is_none());
}
