//! What is behind a measured guest's door: orders for its client and bytes both ways; all else is for the stand-in GitLab.
//!
//! HTTP/1.1 with one request a connection, written here, so that no library of a server's is measured.

use bytes::Bytes;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

/// Bytes of one head.
const HEAD_BYTES_MAX: usize = 8192;

/// Bytes of one body that is read whole: the client's times.
const TIMES_BYTES_MAX: usize = 64 * 1024;

/// What is written at once.
static BLOCK: [u8; 64 * 1024] = [0; 64 * 1024];

/// What a client is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Down,
    Up,
    /// A connection of its own for a request without a body.
    Small,
}

impl What {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Up => "up",
            Self::Small => "new_stream",
        }
    }
}

/// The guest's side of one measurement. Clones are the same.
#[derive(Clone)]
pub(super) struct Service {
    gitlab: SocketAddr,
    client: Bytes,
    orders: Arc<Mutex<mpsc::Receiver<String>>>,
    times: mpsc::Sender<Vec<f64>>,
}

/// Who gives a guest its orders.
pub(super) struct Orders {
    orders: mpsc::Sender<String>,
    times: mpsc::Receiver<Vec<f64>>,
}

impl Orders {
    /// Has it done so often; seconds of each.
    pub(super) async fn give(
        &mut self,
        what: What,
        times: usize,
        bytes: u64,
        limit: Duration,
    ) -> Result<Vec<f64>, String> {
        let gone = || "the guest's client is gone".to_owned();
        self.orders.send(format!("{} {times} {bytes}", what.word())).await.map_err(|_| gone())?;
        let took = timeout(limit, self.times.recv()).await.map_err(|_| "the guest did not do it in time".to_owned())?;
        took.filter(|took| took.len() == times).ok_or_else(gone)
    }

    /// The client's job ends.
    pub(super) async fn end(&self) -> Result<(), String> {
        self.orders.send("end 0 0".into()).await.map_err(|_| "the guest's client is gone".into())
    }
}

impl Service {
    /// One guest's, before the stand-in GitLab at `gitlab`; `client` is its program.
    pub(super) fn new(gitlab: SocketAddr, client: Bytes) -> (Self, Orders) {
        let (orders, taken) = mpsc::channel(1);
        let (sender, times) = mpsc::channel(1);
        (Self { gitlab, client, orders: Arc::new(Mutex::new(taken)), times: sender }, Orders { orders, times })
    }

    /// One connection of the guest's.
    pub(super) async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
        let mut stream = BufReader::with_capacity(BLOCK.len(), stream);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let before = head.len();
            (&mut stream).take((HEAD_BYTES_MAX - before) as u64).read_until(b'\n', &mut head).await?;
            if head.len() == before {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        let Some(request) = Request::parse(&head) else {
            let mut gitlab = TcpStream::connect(self.gitlab).await?;
            gitlab.set_nodelay(true)?;
            gitlab.write_all(&head).await?;
            return tokio::io::copy_bidirectional(&mut stream, &mut gitlab).await.map(drop);
        };
        match request.path {
            "client" => answer(&mut stream, &self.client).await,
            "next" => {
                // Whoever gives orders has gone: so has the measurement.
                let order = self.orders.lock().await.recv().await.unwrap_or_else(|| "end 0 0".into());
                answer(&mut stream, order.as_bytes()).await
            }
            "took" => {
                let mut body = Vec::new();
                (&mut stream).take(request.length.min(TIMES_BYTES_MAX as u64)).read_to_end(&mut body).await?;
                let text = String::from_utf8_lossy(&body);
                let took = text.split_whitespace().map(str::parse).collect::<Result<_, _>>();
                let took = took.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
                answer(&mut stream, b"").await?;
                self.times.send(took).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
            }
            "up" => {
                let mut left = request.length;
                while left > 0 {
                    let count = stream.fill_buf().await?.len() as u64;
                    if count == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let taken = count.min(left);
                    stream.consume(usize::try_from(taken).unwrap_or(usize::MAX));
                    left -= taken;
                }
                answer(&mut stream, b"").await
            }
            path => {
                let bytes = path.strip_prefix("down/").and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
                begin(&mut stream, bytes).await?;
                let mut left = bytes;
                while left > 0 {
                    let count = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK.len());
                    stream.write_all(&BLOCK[..count]).await?;
                    left -= count as u64;
                }
                stream.shutdown().await
            }
        }
    }
}

async fn begin(stream: &mut (impl AsyncWrite + Unpin), bytes: u64) -> io::Result<()> {
    stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n").as_bytes()).await
}

async fn answer(stream: &mut (impl AsyncWrite + Unpin), body: &[u8]) -> io::Result<()> {
    begin(stream, body.len() as u64).await?;
    stream.write_all(body).await?;
    stream.shutdown().await
}

/// A request of the client's.
struct Request<'a> {
    path: &'a str,
    length: u64,
}

impl<'a> Request<'a> {
    /// `None`: it is for GitLab.
    fn parse(head: &'a [u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(head).ok()?.lines();
        let path = lines.next()?.split(' ').nth(1)?.strip_prefix("/bench/")?;
        let length = lines.find_map(|line| line.strip_prefix("Content-Length: ")).and_then(|l| l.parse().ok());
        Some(Self { path, length: length.unwrap_or(0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    async fn asked(service: &Service, request: &str) -> String {
        let (ours, theirs) = duplex(1024);
        let (mut from, mut to) = tokio::io::split(theirs);
        let mut came = String::new();
        let client = async {
            to.write_all(request.as_bytes()).await.unwrap();
            from.read_to_string(&mut came).await.unwrap();
        };
        let (served, ()) = tokio::join!(service.serve(ours), client);
        served.unwrap();
        came
    }

    #[tokio::test]
    async fn a_client_gets_its_orders_and_says_how_long_it_took() {
        let (service, mut orders) = Service::new(([127, 0, 0, 1], 1).into(), Bytes::from_static(b"program"));
        let limit = Duration::from_secs(10);
        let client = async {
            assert!(asked(&service, "GET /bench/client HTTP/1.1\r\n\r\n").await.ends_with("\r\n\r\nprogram"));
            assert!(asked(&service, "GET /bench/next HTTP/1.1\r\n\r\n").await.ends_with("\r\n\r\ndown 2 5"));
            let bytes = asked(&service, "GET /bench/down/5 HTTP/1.1\r\n\r\n").await;
            assert!(bytes.ends_with("Content-Length: 5\r\n\r\n\0\0\0\0\0"));
            let up = asked(&service, "POST /bench/up HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc").await;
            assert!(up.ends_with("Content-Length: 0\r\n\r\n"));
            asked(&service, "POST /bench/took HTTP/1.1\r\nContent-Length: 7\r\n\r\n0.5 1e0").await;
        };
        let (took, ()) = tokio::join!(orders.give(What::Down, 2, 5, limit), client);
        assert_eq!(took, Ok(vec![0.5, 1.0]));
    }
}
