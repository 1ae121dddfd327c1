//! What is outside of the machine: a namespace in which public addresses are the test's, with far ends behind them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy, repeat, sink};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// A far end that greets and echoes.
pub(crate) const OPEN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 10), 8080);
/// A port of its at which nobody is.
const CLOSED: u16 = 8081;
/// Sends ten million bytes, takes ten million and counts them, and cuts after three.
const SOURCE: u16 = 8082;
const SINK: u16 = 8083;
const CUT: u16 = 8084;

/// An address of the host's own that is public.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// Addresses at which the host listens on each port of [`PORTS`], and no job may come to it.
pub(crate) const FORBIDDEN: [Ipv4Addr; 5] = [
    HOST,
    Ipv4Addr::new(127, 0, 0, 1),
    Ipv4Addr::new(10, 0, 2, 2),
    Ipv4Addr::new(192, 168, 1, 1),
    Ipv4Addr::new(169, 254, 169, 254),
];
pub(crate) const PORTS: std::ops::Range<u16> = 20_000..20_100;

const BYTES: u64 = 10_000_000;

/// The world, as long as this lives.
pub(crate) struct World {
    pub(crate) resolver: SocketAddr,
    forbidden: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl World {
    pub(crate) async fn new() -> Self {
        let forbidden = Arc::<AtomicUsize>::default();
        let mut tasks = JoinSet::new();
        for port in [OPEN.port(), SOURCE, SINK, CUT] {
            let listener = TcpListener::bind((*OPEN.ip(), port)).await.expect("addresses of the ring's namespace");
            tasks.spawn(async move {
                let mut streams = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    streams.spawn(far_end(port, stream));
                }
            });
        }
        for address in FORBIDDEN {
            for port in PORTS {
                let listener = TcpListener::bind((address, port)).await.expect("addresses of the ring's namespace");
                let forbidden = Arc::clone(&forbidden);
                tasks.spawn(async move {
                    while listener.accept().await.is_ok() {
                        forbidden.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let resolver = udp.local_addr().unwrap();
        tasks.spawn(resolve(udp));
        let world = Self { resolver, forbidden, _tasks: tasks };
        world.has_positive_control().await;
        world
    }

    /// That the host is there is known; from here it is reached.
    async fn has_positive_control(&self) {
        for address in FORBIDDEN {
            TcpStream::connect((address, PORTS.start)).await.unwrap();
        }
        while self.forbidden.load(Ordering::Relaxed) < FORBIDDEN.len() {
            tokio::task::yield_now().await;
        }
        self.forget_connections();
    }

    pub(crate) fn forbidden_connections(&self) -> usize {
        self.forbidden.load(Ordering::Relaxed)
    }

    pub(crate) fn forget_connections(&self) {
        self.forbidden.store(0, Ordering::Relaxed);
    }

    /// The policy of a job: what is public is reached, and written down. The far end is an address of this namespace, thus
    /// the host's own, and so it is named.
    pub(crate) fn policy() -> String {
        let own: Vec<IpAddr> = FORBIDDEN.map(IpAddr::V4).into();
        serde_json::json!({ "mode": "observe", "allow": [format!("{}/32", OPEN.ip())], "own": own }).to_string()
    }

    /// What the guest's client must know.
    pub(crate) fn told() -> String {
        let forbidden = FORBIDDEN.map(|address| format!("\"{address}\"")).join(", ");
        format!(
            "OPEN = (\"{}\", {})\nCLOSED = (\"{}\", {CLOSED})\nSOURCE = {SOURCE}\nSINK = {SINK}\nCUT = {CUT}\nBYTES = {BYTES}\n\
             FORBIDDEN = [{forbidden}]\nPORTS = range({}, {})\n",
            OPEN.ip(),
            OPEN.port(),
            OPEN.ip(),
            PORTS.start,
            PORTS.end
        )
    }
}

async fn far_end(port: u16, mut stream: TcpStream) {
    let done = async {
        match port {
            SOURCE => {
                copy(&mut repeat(b'd').take(BYTES), &mut stream).await?;
                stream.shutdown().await?;
            }
            SINK => {
                let (mut from, mut to) = stream.split();
                let count = copy(&mut from, &mut sink()).await?;
                to.write_all(count.to_string().as_bytes()).await?;
                to.shutdown().await?;
            }
            CUT => {
                stream.write_all(b"cut").await?;
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                stream.set_zero_linger()?;
            }
            _ => {
                stream.write_all(b"open\n").await?;
                let (mut from, mut to) = stream.split();
                copy(&mut from, &mut to).await?;
                to.shutdown().await?;
            }
        }
        Ok::<_, std::io::Error>(())
    };
    // A guest that has gone is none of ours.
    let _ = done.await;
}

/// Answers for a few names; others are unknown.
async fn resolve(udp: UdpSocket) {
    let names = HashMap::from([("open.example", *OPEN.ip()), ("private.example", Ipv4Addr::new(10, 0, 2, 2))]);
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
        let _ = udp.send_to(&answer(&names, &buffer[..length]), from).await;
    }
}

fn answer(names: &HashMap<&str, Ipv4Addr>, question: &[u8]) -> Vec<u8> {
    let mut labels = Vec::new();
    let mut at = 12;
    while question[at] != 0 {
        let end = at + 1 + usize::from(question[at]);
        labels.push(String::from_utf8_lossy(&question[at + 1..end]).to_lowercase());
        at = end;
    }
    let is_address = question[at + 1..at + 3] == [0, 1];
    let known = names.get(labels.join(".").as_str());
    let found = known.filter(|_| is_address);
    let code = if known.is_some() { 0x80 } else { 0x83 };
    let mut message = question[..2].to_vec();
    message.extend([0x81, code, 0, 1, 0, u8::from(found.is_some()), 0, 0, 0, 0]);
    message.extend(&question[12..at + 5]);
    if let Some(address) = found {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        message.extend(address.octets());
    }
    message
}
