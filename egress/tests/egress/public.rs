//! What is public, in a network namespace of the test's own, where 203.0.113.0/24 is at hand and 198.51.100.1 is the host.

use crate::support::{Egress, Resolver, Says, echoes, soon, spawn};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use tokio::net::TcpListener;

const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// Makes the namespace, and runs in it the test that its second argument names.
const NAMESPACE: &str = "ip link set lo up && ip address add 198.51.100.1/32 dev lo &&
    ip route add local 203.0.113.0/24 dev lo src 198.51.100.1 && exec \"$0\" --exact --ignored \"$1\"";

/// Whether this user may make network namespaces, and has what it takes.
#[expect(clippy::disallowed_methods, reason = "a test may ask the host")]
fn has_namespaces() -> bool {
    let made = std::process::Command::new("unshare").args(["-Urn", "ip", "link", "set", "lo", "up"]).status();
    made.is_ok_and(|status| status.success())
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the tests of the namespace are started in one")]
fn what_is_public_is_reached_and_the_host_is_not() {
    if !has_namespaces() {
        eprintln!("skipped: no network namespaces here");
        return;
    }
    let us = std::env::current_exe().unwrap();
    for test in ["public::in_observe", "public::in_enforce"] {
        let mut command = std::process::Command::new("unshare");
        let output = command.args(["-Urn", "sh", "-c", NAMESPACE]).arg(&us).arg(test).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{test}: {output:?}");
    }
}

/// On all addresses; its port.
async fn echo() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            drop(spawn(async move {
                let (mut reading, mut writing) = stream.split();
                let _ = tokio::io::copy(&mut reading, &mut writing).await;
            }));
        }
    }));
    port
}

/// A public address is reached, by a name and without; the host is not by any of its addresses, and a name that changes
/// to one of them changes nothing.
#[tokio::test]
#[ignore = "started in a namespace by the test above"]
async fn in_observe() {
    let port = echo().await;
    let host = Ipv4Addr::new(198, 51, 100, 1);
    let resolver = Resolver::start(&[
        ("public.example", Says::Addresses(60, vec![vec![PUBLIC]])),
        ("rebind.example", Says::Addresses(0, vec![vec![PUBLIC], vec![Ipv4Addr::LOCALHOST, host]])),
    ])
    .await;
    let mut egress = Egress::start("{}", &[resolver.address]).await;
    let guest = egress.guest().await;
    echoes(&mut guest.connect(format!("203.0.113.7:{port}")).await.unwrap(), b"by its address").await;
    assert_eq!(guest.lookup("public.example").await, (0, vec![PUBLIC]));
    echoes(&mut guest.connect(format!("{PUBLIC}:{port}")).await.unwrap(), b"by its name").await;
    assert_eq!(guest.lookup("rebind.example").await, (0, vec![PUBLIC]));
    let (_, second) = guest.lookup("rebind.example").await;
    assert!(!second.contains(&Ipv4Addr::LOCALHOST));
    for own in ["198.51.100.1", "127.0.0.1", "0.0.0.0", "[::ffff:198.51.100.1]", "[::1]"] {
        let error = guest.connect(format!("{own}:{port}")).await.expect_err(own);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{own}");
    }
    drop(guest);
    let (_, destinations) = egress.end().await;
    let named = destinations.iter().find(|to| to.address == Some(PUBLIC.into())).unwrap();
    assert_eq!((named.name.as_deref(), named.connections, named.up, named.down), (Some("public.example"), 1, 11, 11));
    let own = destinations.iter().find(|to| to.address == Some(host.into())).unwrap();
    // Nobody has told the process that this is the host.
    assert_eq!(serde_json::to_value(own).unwrap()["reason"], "own");
    assert_eq!(own.refused, 2);
}

/// A public address is reached once an answer for a listed name held it, on the listed port.
#[tokio::test]
#[ignore = "started in a namespace by the test above"]
async fn in_enforce() {
    let (listed, other) = (echo().await, echo().await);
    let resolver = Resolver::start(&[("a.listed.example", Says::Addresses(60, vec![vec![PUBLIC]]))]).await;
    let policy = format!(r#"{{"mode":"enforce","allow":["*.listed.example:{listed}","203.0.113.128/25:{other}"]}}"#);
    let mut egress = Egress::start(&policy, &[resolver.address]).await;
    let guest = egress.guest().await;
    let refused = async |to: String| {
        let error = soon(guest.connect(&to)).await.expect_err(&to);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
    };
    refused(format!("{PUBLIC}:{listed}")).await;
    assert_eq!(guest.lookup("a.listed.example").await, (0, vec![PUBLIC]));
    echoes(&mut guest.connect(format!("{PUBLIC}:{listed}")).await.unwrap(), b"hello").await;
    refused(format!("{PUBLIC}:{other}")).await;
    refused(format!("203.0.113.10:{listed}")).await;
    echoes(&mut guest.connect(format!("203.0.113.200:{other}")).await.unwrap(), b"hello").await;
    refused(format!("203.0.113.200:{listed}")).await;
}
