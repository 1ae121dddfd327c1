//! Leases and what records hold of them.

use super::*;
use crate::BoxFuture;
use std::net::IpAddr;

/// A host on which some ports are others'.
#[derive(Default)]
struct Busy {
    others: Mutex<BTreeSet<u16>>,
    broken: std::sync::atomic::AtomicBool,
}

struct Silent;

impl DoorListener for Silent {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn crate::vm::Stream>>> {
        Box::pin(std::future::pending())
    }
}

impl Listen for Busy {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        let result = if self.broken.load(std::sync::atomic::Ordering::Relaxed) {
            Err(io::ErrorKind::PermissionDenied.into())
        } else if self.others.lock().unwrap().contains(&address.port()) {
            Err(io::ErrorKind::AddrInUse.into())
        } else {
            Ok(Box::new(Silent) as Box<dyn DoorListener>)
        };
        Box::pin(std::future::ready(result))
    }
}

fn network(range: &str) -> (Network, Arc<Busy>) {
    let host = Arc::new(Busy::default());
    let config = Config { guest_ports: range.parse().unwrap(), ..Config::default() };
    (Network::new(&config, host.clone(), Arc::new(EgressProcesses::new(None))), host)
}

async fn port(network: &Network) -> Option<u16> {
    match network.acquire(Mode::User, DoorKind::Port).await.ok()? {
        Lease::User { port } => Some(port),
        Lease::Wire | Lease::Relay => panic!("a port was asked for"),
    }
}

#[tokio::test]
async fn ports_are_given_out_once_and_come_back() {
    let (network, _) = network("2000-2001");
    assert_eq!(port(&network).await, Some(2000));
    assert_eq!(port(&network).await, Some(2001));
    assert_eq!(port(&network).await, None);
    network.release(&Lease::User { port: 2000 }).await.unwrap();
    assert_eq!(port(&network).await, Some(2000));
    network.adopt(&Lease::User { port: 2001 });
    network.release(&Lease::User { port: 2001 }).await.unwrap();
    network.adopt(&Lease::User { port: 2001 });
    assert_eq!(port(&network).await, None, "a record of before names it");
}

/// H15: another port is tried at once, and that of others again when there is no other.
#[tokio::test]
async fn a_port_of_somebody_elses_is_passed_over() {
    let (network, host) = network("2000-2001");
    host.others.lock().unwrap().insert(2000);
    assert_eq!(port(&network).await, Some(2001));
    assert_eq!(port(&network).await, None);
    host.others.lock().unwrap().clear();
    assert_eq!(port(&network).await, Some(2000), "its holder has gone");
}

#[tokio::test]
async fn a_host_that_lets_nobody_listen_costs_no_port() {
    let (network, host) = network("2000-2000");
    host.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = network.acquire(Mode::User, DoorKind::Port).await.unwrap_err();
    assert!(matches!(error, LeaseError::Listen { .. }), "{error}");
    host.broken.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(port(&network).await, Some(2000));
    assert!(network.ports().taken[&2000].is_some(), "its door is bound");
    drop(network.listen(&Lease::User { port: 2000 }, socket()).await.unwrap());
    assert!(network.ports().taken[&2000].is_none());
    network.listen(&Lease::User { port: 2000 }, socket()).await.expect("anew");
}

fn socket() -> DoorSocket {
    let host = crate::vm::sockets::Sockets::new(Arc::new(crate::vm::paths::RealPaths::default()), None);
    DoorSocket::new(host, "/run/dayfly".into(), "abcdefghijklmnop".parse().unwrap())
}

/// No port of the host is taken for it, and none need be free.
#[tokio::test]
async fn a_wire_is_leased_without_the_hosts_network() {
    let (network, host) = network("2000-2000");
    host.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    for _ in 0..3 {
        let lease = network.acquire(Mode::User, DoorKind::Wire).await.unwrap();
        assert_eq!((lease.guest_door().as_str(), lease.attachment()), ("wire", Attachment::User));
        assert!(matches!(network.listen(&lease, socket()).await.unwrap(), Entrance::Wire(_)));
        network.adopt(&lease);
        network.release(&lease).await.unwrap();
    }
    assert!(network.ports().taken.is_empty());
}

/// Neither a port nor a card, and addresses that are the same in every guest.
#[tokio::test]
async fn a_machine_that_relays_takes_nothing_of_the_host_and_has_no_card() {
    let (network, host) = network("2000-2000");
    host.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    let lease = network.acquire(Mode::Relay, DoorKind::Wire).await.unwrap();
    assert_eq!((lease.guest_door().as_str(), lease.attachment()), ("wire", Attachment::Egress));
    assert!(matches!(network.listen(&lease, socket()).await.unwrap(), Entrance::Wire(_)));
    let guest = lease.guest_network();
    let dns: IpAddr = "192.0.2.1".parse().unwrap();
    assert_eq!((guest.relay, guest.address.as_str(), guest.gateway), (true, "198.18.0.2/32", dns));
    assert_eq!(guest.dns, [dns]);
    network.adopt(&lease);
    network.release(&lease).await.unwrap();
}

/// What records hold, since version 1 and since version 4.
#[test]
fn a_lease_is_written_as_it_always_was() {
    let lease = Lease::User { port: 20_000 };
    assert_eq!(serde_json::to_string(&lease).unwrap(), r#"{"port":20000}"#);
    assert_eq!(serde_json::from_str::<Lease>(r#"{"port":20000}"#).unwrap(), lease);
    assert_eq!(serde_json::to_string(&Lease::Wire).unwrap(), r#""wire""#);
    assert_eq!(serde_json::from_str::<Lease>(r#""wire""#).unwrap(), Lease::Wire);
    assert_eq!(serde_json::to_string(&Lease::Relay).unwrap(), r#""relay""#);
    assert_eq!(serde_json::from_str::<Lease>(r#""relay""#).unwrap(), Lease::Relay);
    for other in [r#"{"port":20000,"tap":"df0"}"#, r#"{"tap":"df0"}"#, "{}", "20000", r#""port""#, "null"] {
        assert!(serde_json::from_str::<Lease>(other).is_err(), "{other}");
    }
}

#[test]
fn bad_ranges_are_refused() {
    for text in ["", "80-90", "3000", "3000-2000", "a-b", "70000-70001"] {
        assert!(text.parse::<PortRange>().is_err(), "{text}");
    }
}
