//! A GitLab behind TLS for artifacts of any size: it keeps none of them, and takes its time.

use crate::gitlab_tls_server::{Ca, server_config};
use dayfly::gitlab::{Endpoint, OpenTransport as _, ProxyEnvironment, RealLimits, RealOpenTransport, Transport};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// What is read from an upload, or made for a download, at once.
const PIECE_BYTES: usize = 32 * 1024;

/// Every artifact repeats itself after so many bytes, a prime: pieces of any usual size differ.
const PERIOD_BYTES: usize = 65_521;

/// What is in every artifact.
pub(crate) struct Pattern(Vec<u8>);

impl Pattern {
    pub(crate) fn new() -> Self {
        let mut bytes = vec![0; PERIOD_BYTES];
        dayfly::rng::Rng::seeded(5).fill(&mut bytes);
        bytes.extend_from_within(..);
        Self(bytes)
    }

    /// The bytes from `at` on, at most 64 KiB less 15 of them.
    pub(crate) fn at(&self, at: u64, bytes: usize) -> &[u8] {
        let from = usize::try_from(at % PERIOD_BYTES as u64).unwrap();
        &self.0[from..from + bytes.min(PERIOD_BYTES)]
    }
}

/// Bytes and their CRC-32.
pub(crate) type Sum = (u64, u32);

/// A server that runs until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    ca: tempfile::NamedTempFile,
    /// The sum of each upload that came whole.
    pub(crate) uploads: Arc<Mutex<Vec<Sum>>>,
    _tasks: JoinSet<()>,
}

impl Server {
    /// One that pauses so long for each 32 KiB of an upload.
    pub(crate) async fn new(pause: Duration) -> Self {
        let ca = Ca::new("loads");
        let acceptor = TlsAcceptor::from(Arc::new(server_config(&ca.good(), None)));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &ca.pem).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let uploads = Arc::new(Mutex::new(Vec::new()));
        let (mut tasks, noted) = (JoinSet::new(), Arc::clone(&uploads));
        let pattern = Arc::new(Pattern::new());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, noted, pattern) = (acceptor.clone(), Arc::clone(&noted), Arc::clone(&pattern));
                connections.spawn(async move {
                    let stream = acceptor.accept(stream).await.unwrap();
                    serve(BufReader::new(stream), pause, &noted, &pattern).await;
                });
            }
        });
        Self { address, ca: file, uploads, _tasks: tasks }
    }

    /// The product's way to it.
    pub(crate) fn transport(&self) -> Arc<dyn Transport> {
        let url = format!("https://localhost:{}", self.address.port()).parse().unwrap();
        let endpoint =
            Endpoint { url, tls_ca_file: Some(self.ca.path().into()), tls_client: None, allow_insecure_http: false };
        RealOpenTransport::new(RealLimits::default(), ProxyEnvironment::default()).open(&endpoint).unwrap()
    }
}

type Wire = BufReader<TlsStream<TcpStream>>;

/// The requests of one connection, until it ends.
async fn serve(mut wire: Wire, pause: Duration, uploads: &Mutex<Vec<Sum>>, pattern: &Pattern) {
    while let Some(first) = line(&mut wire).await {
        let mut range = None;
        while let Some(header) = line(&mut wire).await.filter(|line| !line.is_empty()) {
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (from, to) = value.split_once('-').unwrap();
                range = Some((from.parse::<u64>().unwrap(), to.parse::<u64>().unwrap()));
            }
        }
        if first.starts_with("POST ") {
            let Some(sum) = take(&mut wire, pause).await else { return };
            uploads.lock().unwrap().push(sum);
            wire.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 3\r\n\r\n201").await.unwrap();
            wire.flush().await.unwrap();
        } else {
            let (from, to) = range.expect("a download names its range");
            give(&mut wire, from, to + 1, pattern).await;
        }
    }
}

async fn line(wire: &mut Wire) -> Option<String> {
    let mut line = String::new();
    wire.read_line(&mut line).await.ok()?;
    line.strip_suffix("\r\n").map(str::to_owned)
}

/// A chunked body; `None` if it broke off.
async fn take(wire: &mut Wire, pause: Duration) -> Option<Sum> {
    let (mut bytes, mut crc, mut piece) = (0, crc32fast::Hasher::new(), vec![0; PIECE_BYTES]);
    let mut unpaused = 0;
    loop {
        let mut left = usize::from_str_radix(&line(wire).await?, 16).unwrap();
        if left == 0 {
            line(wire).await?;
            return Some((bytes, crc.finalize()));
        }
        while left > 0 {
            let some = left.min(PIECE_BYTES);
            wire.read_exact(&mut piece[..some]).await.ok()?;
            crc.update(&piece[..some]);
            (bytes, left, unpaused) = (bytes + some as u64, left - some, unpaused + some);
            if unpaused >= PIECE_BYTES {
                unpaused -= PIECE_BYTES;
                sleep(pause).await;
            }
        }
        line(wire).await?;
    }
}

async fn give(wire: &mut Wire, from: u64, end: u64, pattern: &Pattern) {
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Type: application/zip\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\r\n",
        end - from,
        end - 1,
        1_u64 << 40
    );
    wire.write_all(head.as_bytes()).await.unwrap();
    let mut at = from;
    while at < end {
        let piece = pattern.at(at, usize::try_from(end - at).unwrap().min(PIECE_BYTES));
        // A door that ends first is a failure of its test.
        if wire.write_all(piece).await.is_err() {
            return;
        }
        at += piece.len() as u64;
    }
    let _ = wire.flush().await;
}
