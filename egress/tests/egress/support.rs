//! One VM's egress, from the daemon's side and from the guest's; a resolver that answers what it is told to; far ends.

use dayfly_egress::audit::{self, Destination};
use dayfly_egress::policy::Policy;
use dayfly_egress::{Start, hand_over};
use dayfly_guest_config::{PASS_BYTES, Pass};
use dayfly_wire::{DNS_AUTHORITY, Limits, Opener, Stream, guest_handshake};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// No wait of these tests is longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it takes too long")
}

#[expect(clippy::disallowed_methods, reason = "a test has no task set of its own")]
pub(crate) fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(work)
}

pub(crate) fn policy(json: &str) -> Policy {
    let policy: Policy = serde_json::from_str(json).unwrap();
    policy.validate().unwrap();
    policy
}

pub(crate) fn pass() -> Pass {
    Pass::new([1; PASS_BYTES]).for_egress()
}

/// The program, with its standard input at one end of a pair of sockets.
#[expect(clippy::disallowed_methods, reason = "the program is what is tested")]
pub(crate) fn program() -> (Child, StdUnixStream) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_dayfly-egress"))
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    (child, ours)
}

/// A file as the daemon opens it.
pub(crate) fn audit_file(path: &std::path::Path) -> File {
    File::options().read(true).append(true).create(true).open(path).unwrap()
}

pub(crate) struct Egress {
    pub(crate) child: Child,
    pub(crate) audit: PathBuf,
    _dir: tempfile::TempDir,
    /// The guest's end, while it has no session.
    pub(crate) port: Option<StdUnixStream>,
}

impl Drop for Egress {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Egress {
    pub(crate) async fn start(policy: &str, dns: &[SocketAddr]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let audit = dir.path().join("egress.audit");
        let (child, socket) = program();
        let (port, guest) = StdUnixStream::pair().unwrap();
        let start = Start::new(&pass(), self::policy(policy), dns.to_vec());
        soon(hand_over(socket, port.into(), audit_file(&audit).into(), &start)).await.unwrap();
        Self { child, audit, _dir: dir, port: Some(guest) }
    }

    /// A session of the guest; it ends when it is dropped.
    pub(crate) async fn guest(&mut self) -> Guest {
        let port = self.port.as_ref().unwrap().try_clone().unwrap();
        port.set_nonblocking(true).unwrap();
        let port = UnixStream::from_std(port).unwrap();
        let proven = soon(guest_handshake(port, &pass(), rand16())).await.unwrap();
        let (opener, session) = soon(proven.connect(&Limits::egress(), || {})).await.unwrap();
        Guest { opener, session: spawn(async move { drop(session.run().await) }) }
    }

    /// The VM's end: the program writes what is left, and ends.
    pub(crate) async fn end(mut self) -> (ExitStatus, Vec<Destination>) {
        self.port = None;
        let status = soon(async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        (status, self.destinations())
    }

    pub(crate) fn destinations(&self) -> Vec<Destination> {
        audit::read(&std::fs::read(&self.audit).unwrap())
    }

    pub(crate) fn proc(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.child.id())).unwrap()
    }
}

fn rand16() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

pub(crate) struct Guest {
    pub(crate) opener: Opener,
    pub(crate) session: JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.session.abort();
    }
}

impl Guest {
    /// A connection, once the far end has answered; else how it failed.
    pub(crate) async fn connect(&self, to: impl ToString) -> io::Result<Stream> {
        let mut stream = soon(self.opener.open_to(&to.to_string())).await.unwrap();
        soon(stream.accepted()).await?;
        Ok(stream)
    }

    pub(crate) async fn dns(&self) -> Dns {
        let stream = self.connect(DNS_AUTHORITY).await.unwrap();
        Dns { stream, id: 0 }
    }

    /// What a lookup of this name's addresses tells: the code and the addresses.
    pub(crate) async fn lookup(&self, name: &str) -> (u8, Vec<Ipv4Addr>) {
        let mut dns = self.dns().await;
        dns.lookup(name).await
    }
}

pub(crate) struct Dns {
    pub(crate) stream: Stream,
    pub(crate) id: u16,
}

pub(crate) fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = vec![];
    for part in [id, 0x0100, 1, 0, 0, 0] {
        bytes.extend(part.to_be_bytes());
    }
    bytes.extend(wire_name(name));
    bytes.extend([kind.to_be_bytes(), 1u16.to_be_bytes()].concat());
    bytes
}

pub(crate) fn wire_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

/// Its code, and the addresses of its answers: those that a guest would use.
pub(crate) fn addresses(message: &[u8]) -> (u8, Vec<Ipv4Addr>) {
    let count = u16::from_be_bytes([message[6], message[7]]);
    let mut at = 12;
    while message[at] != 0 {
        at += 1 + usize::from(message[at]);
    }
    at += 5;
    let mut found = Vec::new();
    for _ in 0..count {
        if message[at] & 0xc0 == 0xc0 {
            at += 2;
        } else {
            while message[at] != 0 {
                at += 1 + usize::from(message[at]);
            }
            at += 1;
        }
        let kind = u16::from_be_bytes([message[at], message[at + 1]]);
        let length = usize::from(u16::from_be_bytes([message[at + 8], message[at + 9]]));
        let data = &message[at + 10..at + 10 + length];
        if kind == 1 {
            found.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).unwrap()));
        }
        at += 10 + length;
    }
    assert_eq!(at, message.len(), "nothing follows the answers");
    (message[3] & 0x0f, found)
}

impl Dns {
    pub(crate) async fn say(&mut self, message: &[u8]) {
        let length = u16::try_from(message.len()).unwrap().to_be_bytes();
        soon(self.stream.write_all(&[&length[..], message].concat())).await.unwrap();
    }

    pub(crate) async fn hear(&mut self) -> Vec<u8> {
        soon(async {
            let length = self.stream.read_u16().await.unwrap();
            let mut message = vec![0; length.into()];
            self.stream.read_exact(&mut message).await.unwrap();
            message
        })
        .await
    }

    pub(crate) async fn ask(&mut self, name: &str, kind: u16) -> Vec<u8> {
        self.id += 1;
        self.say(&query(self.id, name, kind)).await;
        let answer = self.hear().await;
        assert_eq!(answer[..2], self.id.to_be_bytes());
        answer
    }

    pub(crate) async fn lookup(&mut self, name: &str) -> (u8, Vec<Ipv4Addr>) {
        addresses(&self.ask(name, 1).await)
    }
}

/// What a resolver does about a name.
#[derive(Clone)]
pub(crate) enum Says {
    /// These addresses, one answer after the other and the last one for ever; with this time to live.
    Addresses(u32, Vec<Vec<Ipv4Addr>>),
    /// This name, and its address.
    Alias(&'static str, Ipv4Addr),
    /// Nothing.
    Silence,
    /// Over UDP that it is too long, over TCP these.
    Long(Vec<Ipv4Addr>),
    /// These bytes behind the id, and then the address.
    Raw(Vec<Vec<u8>>, Ipv4Addr),
}

/// A resolver on loopback. What it does not know, does not exist.
pub(crate) struct Resolver {
    pub(crate) address: SocketAddr,
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn record(owner: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).unwrap();
    [owner, &kind.to_be_bytes(), &[0, 1], &ttl.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn response(question: &[u8], flags: u16, records: &[Vec<u8>]) -> Vec<u8> {
    let mut message = question[..2].to_vec();
    for part in [flags, 1, u16::try_from(records.len()).unwrap(), 0, 0] {
        message.extend(part.to_be_bytes());
    }
    message.extend(&question[12..]);
    message.extend(records.concat());
    message
}

impl Resolver {
    pub(crate) async fn start(names: &[(&str, Says)]) -> Self {
        let names: HashMap<String, Says> =
            names.iter().map(|(name, says)| ((*name).to_owned(), says.clone())).collect();
        let names = Arc::new(Mutex::new(names));
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let answers = {
            let asked = Arc::clone(&asked);
            Arc::new(move |message: &[u8], tcp: bool| -> Vec<Vec<u8>> { answers(&names, &asked, message, tcp) })
        };
        let over_tcp = Arc::clone(&answers);
        let udp = spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                let (count, from) = udp.recv_from(&mut buffer).await.unwrap();
                for answer in answers(&buffer[..count], false) {
                    let _ = udp.send_to(&answer, from).await;
                }
            }
        });
        let tcp = spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let Ok(length) = stream.read_u16().await else { continue };
                let mut message = vec![0; length.into()];
                let _ = stream.read_exact(&mut message).await;
                for answer in over_tcp(&message, true) {
                    let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                    let _ = stream.write_all(&[&length[..], &answer].concat()).await;
                }
            }
        });
        Self { address, asked, tasks: [udp, tcp] }
    }

    pub(crate) fn asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == name).count()
    }
}

fn answers(
    names: &Mutex<HashMap<String, Says>>,
    asked: &Mutex<Vec<String>>,
    message: &[u8],
    tcp: bool,
) -> Vec<Vec<u8>> {
    let mut labels = Vec::new();
    let mut at = 12;
    while message[at] != 0 {
        let end = at + 1 + usize::from(message[at]);
        labels.push(String::from_utf8_lossy(&message[at + 1..end]).into_owned());
        at = end;
    }
    let name = labels.join(".").to_lowercase();
    asked.lock().unwrap().push(name.clone());
    let owner: &[u8] = &[0xc0, 12];
    let a = |ttl, list: &[Ipv4Addr]| -> Vec<Vec<u8>> {
        list.iter().map(|address| record(owner, 1, ttl, &address.octets())).collect()
    };
    match names.lock().unwrap().get_mut(&name) {
        None => vec![response(message, 0x8183, &[])],
        Some(Says::Silence) => vec![],
        Some(Says::Addresses(ttl, lists)) => {
            let list = if lists.len() > 1 { lists.remove(0) } else { lists[0].clone() };
            vec![response(message, 0x8180, &a(*ttl, &list))]
        }
        Some(Says::Alias(other, address)) => {
            let other = wire_name(other);
            let records = [record(owner, 5, 60, &other), record(&other, 1, 60, &address.octets())];
            vec![response(message, 0x8180, &records)]
        }
        Some(Says::Long(list)) if tcp => vec![response(message, 0x8180, &a(60, list))],
        Some(Says::Long(_)) => vec![response(message, 0x8380, &[])],
        Some(Says::Raw(raw, address)) => {
            let mut all: Vec<Vec<u8>> = raw.iter().map(|bytes| [&message[..2], bytes].concat()).collect();
            // An id that was guessed wrong.
            let mut other = response(message, 0x8180, &a(60, &[Ipv4Addr::new(6, 6, 6, 6)]));
            other[0] ^= 0xff;
            all.push(other);
            all.push(response(message, 0x8180, &a(60, &[*address])));
            all
        }
    }
}

/// A far end on loopback that says hello, and echoes.
pub(crate) struct FarEnd {
    pub(crate) port: u16,
    pub(crate) accepted: Arc<Mutex<usize>>,
    task: JoinHandle<()>,
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FarEnd {
    pub(crate) async fn serve<F>(serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepted: Arc<Mutex<usize>> = Arc::default();
        let counted = Arc::clone(&accepted);
        let task = spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                *counted.lock().unwrap() += 1;
                drop(spawn(serve(stream)));
            }
        });
        Self { port, accepted, task }
    }

    pub(crate) async fn echo() -> Self {
        Self::serve(|mut stream| async move {
            let (mut reading, mut writing) = stream.split();
            let _ = tokio::io::copy(&mut reading, &mut writing).await;
            let _ = writing.shutdown().await;
        })
        .await
    }

    /// Sends for as long as it is read.
    pub(crate) async fn source() -> Self {
        Self::serve(|mut stream| async move {
            let _ = tokio::io::copy(&mut tokio::io::repeat(b'd'), &mut stream).await;
        })
        .await
    }

    /// Never reads.
    pub(crate) async fn stalled() -> Self {
        Self::serve(|stream| async move {
            std::future::pending::<()>().await;
            drop(stream);
        })
        .await
    }

    pub(crate) fn accepted(&self) -> usize {
        *self.accepted.lock().unwrap()
    }
}

/// What is said comes back.
pub(crate) async fn echoes(stream: &mut Stream, text: &[u8]) {
    soon(stream.write_all(text)).await.unwrap();
    let mut came = vec![0; text.len()];
    soon(stream.read_exact(&mut came)).await.unwrap();
    assert_eq!(came, text);
}
