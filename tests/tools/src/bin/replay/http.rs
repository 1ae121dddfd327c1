//! HTTP by hand: a recorded request byte for byte, and what came back.

use crate::recording::{Body, Request};
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// Bytes of an answer's head, or of its body, at most: the payloads of the recordings are below 16 KiB.
const BYTES_MAX: u64 = 16 << 20;

/// One connection to the relay.
#[derive(Debug)]
pub(crate) struct Connection(BufReader<TcpStream>);

/// One answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether the connection ends here.
    pub(crate) fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Connection {
    pub(crate) async fn open(relay: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(relay).await?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a request and reads its answer.
    pub(crate) async fn exchange(&mut self, message: &[u8]) -> io::Result<Answer> {
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

/// The recorded request as bytes, with `from` replaced by `to` (a token that this run does not know by
/// the one it does) and the length of the body set right after that. The content of an upload is made up.
pub(crate) fn message(request: &Request, from: &str, to: &str) -> io::Result<Vec<u8>> {
    let body = match &request.body {
        Body::Empty => Vec::new(),
        Body::Json(text) => text.replace(from, to).into_bytes(),
        Body::Text(text) => text.clone().into_bytes(),
        Body::Form { part_headers, content_bytes, bytes } => {
            form(request.header("content-type").unwrap_or_default(), part_headers, *content_bytes, *bytes)?
        }
        Body::Lost => return Err(bad("a body that was not kept")),
    };
    let mut message = format!("{} {} HTTP/1.1\r\n", request.method, request.target);
    for (name, value) in &request.headers {
        let value =
            if name.eq_ignore_ascii_case("content-length") { body.len().to_string() } else { value.replace(from, to) };
        message.push_str(&format!("{name}: {value}\r\n"));
    }
    message.push_str("\r\n");
    let mut message = message.into_bytes();
    match request.chunks {
        Some(chunks) => {
            for piece in pieces(&body, chunks) {
                message.extend(format!("{:x}\r\n", piece.len()).into_bytes());
                message.extend(piece);
                message.extend(b"\r\n");
            }
            message.extend(b"0\r\n\r\n");
        }
        None => message.extend(body),
    }
    Ok(message)
}

/// Content of an upload: any bytes will do, but not all the same.
pub(crate) fn content(bytes: usize) -> Vec<u8> {
    (0..=250).cycle().take(bytes).collect()
}

/// A form of one part, as long as the recorded one.
fn form(content_type: &str, part_headers: &[String], content_bytes: usize, bytes: usize) -> io::Result<Vec<u8>> {
    let boundary = content_type.split_once("boundary=").ok_or_else(|| bad("a form without a boundary"))?.1;
    let mut form = format!("--{boundary}\r\n{}\r\n\r\n", part_headers.join("\r\n")).into_bytes();
    form.extend(content(content_bytes));
    form.extend(format!("\r\n--{boundary}--\r\n").into_bytes());
    if form.len() == bytes { Ok(form) } else { Err(bad("a form of another length than recorded")) }
}

/// `body` in this many pieces of about one size, none of them empty, for that would end it.
fn pieces(body: &[u8], number: usize) -> impl Iterator<Item = &[u8]> {
    let number = number.clamp(1, body.len().max(1));
    (0..number).map(move |i| &body[body.len() * i / number..body.len() * (i + 1) / number]).filter(|p| !p.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_cut_into_as_many_pieces_as_recorded() {
        let body = content(602);
        let cut: Vec<&[u8]> = pieces(&body, 9).collect();
        assert_eq!((cut.len(), cut.concat()), (9, body));
        assert_eq!(pieces(b"ab", 9).count(), 2);
        assert_eq!(pieces(b"", 3).count(), 0);
    }

    #[test]
    fn a_form_has_the_recorded_length_or_none() {
        let headers = ["Content-Disposition: form-data; name=\"file\"".to_owned()];
        let made = form("multipart/form-data; boundary=B", &headers, 10, 71).unwrap();
        assert!(made.starts_with(b"--B\r\nContent-Disposition") && made.ends_with(b"\r\n--B--\r\n"));
        assert!(form("multipart/form-data; boundary=B", &headers, 10, 72).is_err());
    }
}
