//! All of it in a network namespace of the host, whose other end of the port is the test's: what a process of the machine
//! sees of it.
#![expect(clippy::disallowed_types, reason = "clients are threads, as programs of a job are")]

use super::*;
use crate::apply;
use crate::namespace;
use crate::netfilter::rules::{CONNECTED, REFUSED, install_without_queue};
use crate::relay::port::{Opening, Pipe};
use dayfly_guest_config::{GuestNetwork, PASS_BYTES};
use dayfly_wire::{Asked, DNS_AUTHORITY, HostSession, host_handshake};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

/// A port whose other end is whoever connects to this path.
struct Socket(UnixListener);

impl Port for Socket {
    fn open(&mut self) -> Opening<'_> {
        Box::pin(async { Ok(Box::new(self.0.accept().await?.0) as Box<dyn Pipe>) })
    }
}

fn pass() -> Pass {
    Pass::new([1; PASS_BYTES]).for_egress()
}

/// What the host learns.
#[derive(Debug, PartialEq, Eq)]
enum Learnt {
    Asked(String),
    /// How the guest's way of a stream ended.
    Ended(Result<usize, ErrorKind>),
}

/// A host with a session; it ends with its task.
#[expect(clippy::disallowed_methods, reason = "the host of a test")]
async fn host(port: &Path, nonce: u8, learnt: mpsc::UnboundedSender<Learnt>) -> JoinHandle<()> {
    let stream = UnixStream::connect(port).await.unwrap();
    let proven = timeout(LIMIT, host_handshake(stream, &pass(), [nonce; 16])).await.unwrap().unwrap();
    let session = proven.serve(&Limits::egress()).await.unwrap();
    tokio::spawn(serve(session, learnt))
}

async fn serve(mut session: HostSession<UnixStream>, learnt: mpsc::UnboundedSender<Learnt>) {
    let mut streams = tokio::task::JoinSet::new();
    while let Some(Ok(asked)) = session.request().await {
        let _ = learnt.send(Learnt::Asked(asked.authority().to_owned()));
        streams.spawn(answer(asked, learnt.clone()));
    }
}

async fn answer(asked: Asked, learnt: mpsc::UnboundedSender<Learnt>) {
    if asked.authority() == DNS_AUTHORITY {
        return names(asked).await;
    }
    let port = asked.authority().rsplit_once(':').unwrap().1.parse().unwrap();
    match port {
        // Takes its time, as far ends do; the other one so long that first packets are sent again meanwhile.
        80 | 83 => {
            sleep(Duration::from_millis(if port == 80 { 50 } else { 2500 })).await;
            let mut stream = asked.accept().unwrap();
            stream.write_all(b"open\n").await.unwrap();
            let mut came = Vec::new();
            let ended = stream.read_to_end(&mut came).await;
            let _ = learnt.send(Learnt::Ended(ended.map_err(|error| error.kind())));
            let _ = stream.write_all(&came).await;
            let _ = stream.shutdown().await;
        }
        81 => {
            sleep(Duration::from_millis(50)).await;
            asked.refuse(502);
        }
        84 => asked.refuse(504),
        82 => {
            let mut stream = asked.accept().unwrap();
            stream.write_all(b"cut").await.unwrap();
            sleep(Duration::from_millis(100)).await;
            stream.reset();
        }
        _ => asked.refuse(403),
    }
}

/// Answers each question with itself, and long ones for names that begin with `b`. None for those with `s`.
async fn names(asked: Asked) {
    let (mut from, mut to) = tokio::io::split(asked.accept().unwrap());
    while let Ok(length) = from.read_u16().await {
        let mut message = vec![0; length.into()];
        from.read_exact(&mut message).await.unwrap();
        message[2] |= 0x80;
        match message[13] {
            b's' => continue,
            b'b' => message.resize(3000, 7),
            _ => {}
        }
        let length = u16::try_from(message.len()).unwrap();
        to.write_all(&[&length.to_be_bytes()[..], &message].concat()).await.unwrap();
    }
}

fn question(id: u16, name: &str) -> Vec<u8> {
    let label = u8::try_from(name.len()).unwrap();
    [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0, label], name.as_bytes(), &[0, 0, 1, 0, 1]].concat()
}

/// Asks by UDP.
fn ask(server: &str, id: u16, name: &str) -> Vec<u8> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(server).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send(&question(id, name)).unwrap();
    let mut answer = vec![0; 5000];
    let length = socket.recv(&mut answer).unwrap();
    answer.truncate(length);
    answer
}

fn connect(to: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to.parse().unwrap(), LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// What a connection to an open port is told, and gets back of what it says.
fn talk(to: &str) -> String {
    let mut stream = connect(to).unwrap();
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"open\n");
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The rule that queues first packets, where the kernel has no `nft_queue`: iptables has one, at the same place.
fn queue_by_iptables() -> bool {
    let (refused, connected) = (format!("{REFUSED:#x}"), format!("{CONNECTED:#x}"));
    ["OUTPUT", "PREROUTING"].iter().all(|chain| {
        let add = |rule: &str| {
            let words = format!("-t mangle -A {chain} {rule}");
            namespace::output("iptables-legacy", &words.split(' ').collect::<Vec<_>>())
        };
        add("-i lo -j RETURN");
        add(&format!("-m mark --mark {refused} -j RETURN"));
        add("-p tcp --dport 53 -j RETURN");
        add("-m addrtype --dst-type LOCAL -j RETURN");
        add(&format!("-p tcp --syn -m mark ! --mark {connected} -j NFQUEUE --queue-num 0 --queue-bypass")).is_some()
    })
}

#[test]
fn a_machine_without_a_card_reaches_what_the_host_lets_it_and_nothing_else() {
    namespace::run("egress::tests::in_a_namespace_all_goes_over_the_port");
}

#[tokio::test]
#[ignore = "the test above runs it, in a network namespace"]
async fn in_a_namespace_all_goes_over_the_port() {
    let address = "198.18.0.2/32".to_owned();
    let (gateway, dns) = (RESOLVER.into(), vec![RESOLVER.into()]);
    apply::network(&GuestNetwork { mac: None, address, gateway, dns, relay: true }).unwrap();
    let rules = match Rules::install() {
        Ok(rules) => rules,
        Err(_) => {
            let rules = install_without_queue().unwrap();
            if !queue_by_iptables() {
                return;
            }
            rules
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let port: PathBuf = dir.path().join("port");
    start(rules, Places::default(), Box::new(Socket(UnixListener::bind(&port).unwrap())), pass()).unwrap();
    let (sender, mut learnt) = mpsc::unbounded_channel();
    let first = host(&port, 1, sender.clone()).await;

    // A far end that is open, and one that is not: the truth, and after the far end's time.
    let since = Instant::now();
    assert_eq!(soon(|| talk("1.2.3.4:80")).await, "hello");
    assert!(since.elapsed() >= Duration::from_millis(50), "connected before the far end was");
    let refused = soon(|| connect("1.2.3.4:81").unwrap_err().kind()).await;
    assert_eq!(refused, ErrorKind::ConnectionRefused);
    assert_eq!(soon(|| connect("169.254.169.254:22").unwrap_err().kind()).await, ErrorKind::ConnectionRefused);
    let mut asked = Vec::new();
    while let Ok(learnt) = learnt.try_recv() {
        asked.push(learnt);
    }
    for to in ["1.2.3.4:80", "1.2.3.4:81", "169.254.169.254:22"] {
        let times = asked.iter().filter(|learnt| **learnt == Learnt::Asked(to.into())).count();
        assert_eq!(times, 1, "{to} in {asked:?}");
    }
    assert!(asked.contains(&Learnt::Ended(Ok(5))));

    // What breaks on one side is broken on the other, and no end.
    let cut = soon(|| {
        let mut stream = connect("1.2.3.4:82").unwrap();
        let mut came = Vec::new();
        (stream.read_to_end(&mut came).map_err(|error| error.kind()), came)
    });
    assert_eq!(cut.await, (Err(ErrorKind::ConnectionReset), b"cut".to_vec()));
    soon(|| {
        let mut stream = connect("1.2.3.4:80").unwrap();
        stream.write_all(b"half").unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    })
    .await;
    let broken = timeout(LIMIT, async {
        loop {
            if let Some(Learnt::Ended(ended)) = learnt.recv().await {
                return ended;
            }
        }
    });
    assert_eq!(broken.await.unwrap(), Err(ErrorKind::ConnectionReset));

    // A far end for which first packets are sent again and again is asked once.
    assert_eq!(soon(|| talk("1.2.3.4:83")).await, "hello");
    let mut asked = 0;
    while let Ok(learnt) = learnt.try_recv() {
        asked += usize::from(learnt == Learnt::Asked("1.2.3.4:83".into()));
    }
    assert_eq!(asked, 1);

    // One that does not answer is no one that refuses: who connects sends again, and gives up by itself.
    let silent = soon(|| TcpStream::connect_timeout(&"1.2.3.4:84".parse().unwrap(), Duration::from_millis(2500)));
    assert_eq!(silent.await.unwrap_err().kind(), ErrorKind::TimedOut);
    let mut asked = 0;
    while let Ok(learnt) = learnt.try_recv() {
        asked += usize::from(learnt == Learnt::Asked("1.2.3.4:84".into()));
    }
    assert!((2..=3).contains(&asked), "asked {asked} times in 2.5 s");

    // Many at once, half of them to a closed port.
    let all = (0..200).map(|n| {
        spawn_blocking(move || {
            let closed = n % 2 == 1;
            let connected = connect(if closed { "1.2.3.4:81" } else { "5.6.7.8:80" });
            assert_eq!(connected.err().map(|error| error.kind()), closed.then_some(ErrorKind::ConnectionRefused));
        })
    });
    for one in all.collect::<Vec<_>>() {
        timeout(LIMIT, one).await.unwrap().unwrap();
    }

    // To itself there is no way out.
    soon(|| {
        let mut stream = connect("127.0.0.1:9999").unwrap();
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
        assert_eq!(connect("127.0.0.1:1").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    })
    .await;

    // All that is no TCP, but for questions.
    for to in ["1.2.3.4:443", "224.0.0.251:5353", "255.255.255.255:67"] {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        let since = Instant::now();
        assert_eq!(socket.send_to(b"q", to).unwrap_err().kind(), ErrorKind::PermissionDenied, "{to}");
        assert!(since.elapsed() < Duration::from_secs(1));
    }
    let answer = soon(|| ask("192.0.2.1:53", 7, "name")).await;
    assert_eq!(answer[..4], [0, 7, 0x81, 0]);
    assert_eq!(soon(|| ask("8.8.8.8:53", 8, "name")).await[..4], [0, 8, 0x81, 0], "whatever server is asked");
    let cut = soon(|| ask("192.0.2.1:53", 9, "big")).await;
    assert_eq!((cut.len(), cut[2] & 2), (question(9, "big").len(), 2), "too long for UDP");
    for server in ["192.0.2.1:53", "8.8.8.8:53"] {
        soon(move || {
            let mut stream = connect(server).unwrap();
            let question = question(10, "big");
            stream.write_all(&[&[0, 21][..], &question].concat()).unwrap();
            let mut answer = vec![0; 3002];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer[..4], [0x0b, 0xb8, 0, 10]);
        })
        .await;
    }
    let since = Instant::now();
    let failed = soon(|| ask("192.0.2.1:53", 11, "silence")).await;
    assert_eq!((failed[1], failed[3] & 15), (11, 2));
    assert!(since.elapsed() >= DEADLINE && since.elapsed() < DEADLINE * 2, "{:?}", since.elapsed());

    containers().await;

    // A host that dies: what it carried is broken, what waits and what is asked waits for the next one.
    let bound = soon(|| connect("1.2.3.4:80").unwrap()).await;
    first.abort();
    let broken = soon(move || {
        let mut bound = bound;
        bound.read_to_end(&mut Vec::new()).unwrap_err().kind()
    });
    assert_eq!(broken.await, ErrorKind::ConnectionReset);
    let waits = spawn_blocking(|| talk("1.2.3.4:80"));
    let asks = spawn_blocking(|| ask("192.0.2.1:53", 12, "name"));
    sleep(Duration::from_millis(500)).await;
    assert!(!waits.is_finished() && !asks.is_finished());
    let _second = host(&port, 2, sender).await;
    assert_eq!(timeout(LIMIT, waits).await.unwrap().unwrap(), "hello");
    assert_eq!(timeout(LIMIT, asks).await.unwrap().unwrap()[..4], [0, 12, 0x81, 0]);
}

/// A container of the machine, as Docker makes them: its own namespace, a bridge address of the machine's as its gateway.
async fn containers() {
    let container = namespace::Nested::new();
    let inside = "ip link set lo up; ip addr add 172.17.0.2/16 dev eth1; ip link set eth1 up; ip route add default via 172.17.0.1";
    let script = format!(
        "set -e; ip link add docker0 type veth peer name eth1; ip link set eth1 netns {0}; ip addr add 172.17.0.1/16 dev docker0
        ip link set docker0 up; echo 1 > /proc/sys/net/ipv4/ip_forward; nsenter --target {0} --net sh -ec '{inside}'; echo done",
        container.id()
    );
    assert_eq!(namespace::output("sh", &["-c", &script]).as_deref(), Some("done\n"));

    container
        .run(|| {
            assert_eq!(talk("1.2.3.4:80"), "hello");
            assert_eq!(connect("1.2.3.4:81").unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert_eq!(ask("8.8.8.8:53", 21, "name")[..4], [0, 21, 0x81, 0]);
            assert_eq!(ask("192.0.2.1:53", 22, "name")[..4], [0, 22, 0x81, 0]);
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("1.2.3.4:443").unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            socket.send(b"q").unwrap();
            assert_eq!(socket.recv(&mut [0]).unwrap_err().kind(), ErrorKind::HostUnreachable);
        })
        .await;

    // What goes between a machine and its containers is none of ours.
    let serve = container.run(|| {
        let listener = std::net::TcpListener::bind("172.17.0.2:7777").unwrap();
        move || listener.accept().unwrap().1.ip()
    });
    let accept = serve.await;
    soon(|| connect("172.17.0.2:7777").unwrap()).await;
    assert_eq!(soon(accept).await, Ipv4Addr::new(172, 17, 0, 1));
    let listener = std::net::TcpListener::bind("172.17.0.1:7778").unwrap();
    soon(|| connect("172.17.0.1:7778").unwrap()).await;
    container.run(|| connect("172.17.0.1:7778").unwrap()).await;
    assert_eq!(
        soon(move || [(), ()].map(|()| listener.accept().unwrap().1.ip())).await,
        [Ipv4Addr::new(172, 17, 0, 1), Ipv4Addr::new(172, 17, 0, 2)]
    );
}

const DEADLINE: Duration = Duration::from_secs(7);

/// What a program of the job does, while the host's tasks go on.
async fn soon<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    timeout(LIMIT, spawn_blocking(what)).await.expect("it takes too long").unwrap()
}
