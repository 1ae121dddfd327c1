//! HTTP/1.1 by hand: what a runner sends goes out byte for byte, and the answer is read.

use std::io;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// Bytes of an answer's head, or of its body, at most: payloads are below 16 KiB.
const BYTES_MAX: u64 = 16 << 20;

/// One connection to a relay, or to a door behind its greeting.
#[derive(Debug)]
pub struct Connection(BufReader<TcpStream>);

/// One answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: Vec<(String, String)>,
    /// Its body, whole.
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether the connection ends here.
    #[must_use]
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Connection {
    /// HTTP on this stream from now on.
    ///
    /// # Errors
    /// The stream's.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a whole request and reads its answer.
    ///
    /// # Errors
    /// The connection's, `InvalidData` for what is no HTTP/1.1, `UnexpectedEof`.
    pub async fn exchange(&mut self, message: &[u8]) -> io::Result<Answer> {
        self.0.write_all(message).await?;
        self.0.flush().await?;
        let first = self.line().await?;
        let status = first.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.filter(|_| first.starts_with("HTTP/1.1 ")).ok_or_else(|| bad("no status line"))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut answer = Answer { status, headers, body: Vec::new() };
        let chunked = answer.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        match answer.header("content-length").map(str::parse) {
            _ if matches!(status, 204 | 304) => {}
            _ if chunked => answer.body = self.chunked().await?,
            Some(length) => {
                let length = length.map_err(|_| bad("no number as length"))?;
                answer.body = self.exactly(length).await?;
            }
            None => {
                (&mut self.0).take(BYTES_MAX).read_to_end(&mut answer.body).await?;
            }
        }
        Ok(answer)
    }

    async fn chunked(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line().await?;
            let size = line.split(';').next().and_then(|size| u64::from_str_radix(size.trim(), 16).ok());
            let size = size.ok_or_else(|| bad("no size of a chunk"))?;
            body.extend(self.exactly(size).await?);
            // The end of the chunk, or of the trailers, of which there are none.
            if !self.line().await?.is_empty() {
                return Err(bad("bytes after a chunk"));
            }
            if size == 0 {
                return Ok(body);
            }
        }
    }

    async fn exactly(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        if bytes > BYTES_MAX {
            return Err(bad("an answer larger than any recorded one"));
        }
        let mut body = Vec::new();
        (&mut self.0).take(bytes).read_to_end(&mut body).await?;
        if body.len() as u64 == bytes { Ok(body) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    async fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        (&mut self.0).take(BYTES_MAX).read_line(&mut line).await?;
        line.strip_suffix("\r\n").map(str::to_owned).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
