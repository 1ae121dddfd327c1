//! A host of its own in the ring's world, with a whole daemon: GitLab, a mirror of packages and a resolver are elsewhere, and
//! the host listens at each of its addresses.

use crate::lab::{Lab, Options, Place};
use crate::mirror::Mirror;
use crate::names::Names;
use crate::ssh::Ssh;
use crate::world::{FORBIDDEN, HOST as SOMEBODY, OPEN, PORTS, World};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::HashMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::task::JoinSet;

/// The host's namespace, which the script makes.
const NAMESPACE: &str = "/run/netns/host";

const GITLAB: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20)), 443);
const SSH: SocketAddr = SocketAddr::new(GITLAB.ip(), 22);
const MIRROR: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 30));
const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 53)), 53);

/// The host's public address.
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// All of its addresses: no job may come to one.
const OWN: [IpAddr; 6] = [
    IpAddr::V4(HOST),
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V4(Ipv4Addr::new(10, 88, 0, 1)),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 5, 0, 0, 0, 0, 0, 2)),
];

/// The one port of the host's that the rule `strict` lets its jobs reach.
pub(crate) const PLANTED: u16 = 20_007;

/// The world, a host in it, and its daemon.
pub(crate) struct Site {
    pub(crate) lab: Lab,
    pub(crate) mirror: Mirror,
    pub(crate) names: Names,
    pub(crate) ssh: Ssh,
    world: World,
    host: Arc<AtomicUsize>,
    _listening: JoinSet<()>,
}

/// What is done in the host's namespace.
fn in_host<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        let namespace = File::open(NAMESPACE).expect("the ring's script makes the host's namespace");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    };
    // The thread's, and it ends there.
    std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

/// Addresses beyond the host that no job may come to: a neighbour's, a router's, a metadata service's.
fn beyond() -> impl Iterator<Item = IpAddr> {
    FORBIDDEN.into_iter().filter(|address| !address.is_loopback() && *address != SOMEBODY).map(IpAddr::V4)
}

impl Site {
    /// `class`: lines for the class of its jobs, and for what stands behind it.
    pub(crate) async fn start(class: &'static str) -> Self {
        let world = World::new().await;
        let (host, listening) = listen();
        let names = Names::new(RESOLVER, names()).await;
        let image = PathBuf::from(crate::machine::required("DAYFLY_ISOLATION_IMAGE"));
        let lab = Lab::start(Options {
            image: image.file_name().unwrap().to_str().unwrap().to_owned(),
            image_directory: image.parent().unwrap().to_owned(),
            backend: "qemu",
            class,
            place: Place {
                gitlab: GITLAB,
                names: ["gitlab.example"; 2],
                aliases: &["mirror.example", "pypi.example", "npm.example"],
                namespace: Some(NAMESPACE),
            },
            // The default, which is meant here.
            network: "",
            ..Options::default()
        })
        .await;
        let mirror = Mirror::new(MIRROR, Arc::clone(&lab.tls), lab.dir.path()).await;
        let ssh = Ssh::new(SSH, lab.dir.path());
        let site = Self { lab, mirror, names, ssh, world, host, _listening: listening };
        site.has_positive_control().await;
        site
    }

    /// From the host all that no job may come to is reached.
    async fn has_positive_control(&self) {
        let own = OWN.iter().copied();
        in_host(|| own.chain(beyond()).for_each(|to| drop(TcpStream::connect((to, PORTS.start)).unwrap())));
        while self.host.load(Ordering::Relaxed) < OWN.len() || self.world.forbidden_connections() < beyond().count() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        self.host.store(0, Ordering::Relaxed);
        self.world.forget_connections();
    }

    /// Connections to where none may come.
    pub(crate) fn forbidden_connections(&self) -> usize {
        self.host.load(Ordering::Relaxed) + self.world.forbidden_connections()
    }

    /// The line of a script that writes the guest's client.
    pub(crate) fn client() -> String {
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = OWN.into_iter().chain(beyond()).partition(IpAddr::is_ipv4);
        let list = |addresses: &[IpAddr]| {
            addresses.iter().map(|address| format!("\"{address}\"")).collect::<Vec<_>>().join(", ")
        };
        let not_told = names().into_keys().filter(|name| name.starts_with("not-told-"));
        let mut not_told: Vec<String> = not_told.map(|name| format!("\"{name}\"")).collect();
        not_told.sort();
        let told = World::told();
        // The guest's own loopback is its own.
        let v4: Vec<IpAddr> = v4.into_iter().filter(|address| !address.is_loopback()).collect();
        let v6: Vec<IpAddr> = v6.into_iter().filter(|address| !address.is_loopback()).collect();
        let told = format!(
            "{told}FORBIDDEN = [{}]\nFORBIDDEN_V6 = [{}]\nHOST = \"{HOST}\"\nNOT_TOLD = [{}]\n",
            list(&v4),
            list(&v6),
            not_told.join(", ")
        );
        crate::machine::client(&told)
    }

    /// Processes that carry egress.
    pub(crate) fn egress() -> Vec<u32> {
        let program = std::fs::canonicalize(crate::machine::required("DAYFLY_ISOLATION_EGRESS")).unwrap();
        let of = |entry: std::fs::DirEntry| {
            let is_it = std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program);
            entry.file_name().to_str()?.parse().ok().filter(|_| is_it)
        };
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(of).collect()
    }
}

/// The host listens at each of its addresses.
fn listen() -> (Arc<AtomicUsize>, JoinSet<()>) {
    let (count, mut tasks) = (Arc::<AtomicUsize>::default(), JoinSet::new());
    let all = || OWN.iter().flat_map(|address| PORTS.map(move |port| SocketAddr::new(*address, port)));
    let listeners: Vec<TcpListener> =
        in_host(|| all().map(|at| TcpListener::bind(at).expect("addresses of the host's namespace")).collect());
    for listener in listeners {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let count = Arc::clone(&count);
        tasks.spawn(async move {
            while listener.accept().await.is_ok() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    (count, tasks)
}

/// What the world's names are. Those of `not-told-` no job may be told.
fn names() -> HashMap<&'static str, IpAddr> {
    let open = IpAddr::V4(*OPEN.ip());
    HashMap::from([
        ("gitlab.example", GITLAB.ip()),
        ("mirror.example", MIRROR),
        ("pypi.example", MIRROR),
        ("npm.example", MIRROR),
        ("deb.debian.org", MIRROR),
        ("open.example", open),
        ("other.example", open),
        ("www.rebind.example", OWN[2]),
        ("not-told-private.example", Ipv4Addr::new(192, 168, 1, 1).into()),
        ("not-told-slirp.example", Ipv4Addr::new(10, 0, 2, 2).into()),
        ("not-told-metadata.example", Ipv4Addr::new(169, 254, 169, 254).into()),
        ("not-told-loopback.example", Ipv4Addr::LOCALHOST.into()),
        ("not-told-host.example", HOST.into()),
        ("not-told-six.example", OWN[4]),
    ])
}
