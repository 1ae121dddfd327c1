//! HTTP/1.1 by hand: what a runner sends as bytes, and the answers' form.

use bytes::Bytes;
use std::io;

/// Bytes of an answer's head, or of its body, at most.
pub const BYTES_MAX: usize = 16 << 20;

/// How a request says where its body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// It has no body, and says nothing of one.
    None,
    /// By its length.
    Length(usize),
    /// In chunks.
    Chunked,
}

/// A request up to its body.
#[must_use]
pub fn head(method: &str, path: &str, headers: &[(&str, &str)], framing: Framing) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\n");
    for (name, value) in headers {
        for part in [name, ": ", value, "\r\n"] {
            head.push_str(part);
        }
    }
    match framing {
        Framing::None => {}
        Framing::Length(length) => head.push_str(&format!("Content-Length: {length}\r\n")),
        Framing::Chunked => head.push_str("Transfer-Encoding: chunked\r\n"),
    }
    head.push_str("\r\n");
    head
}

/// A whole request. As Go's client has it, one without a body says its length only where one is usual.
#[must_use]
pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let says = !body.is_empty() || matches!(method, "POST" | "PUT" | "PATCH");
    let framing = if says { Framing::Length(body.len()) } else { Framing::None };
    let mut bytes = head(method, path, headers, framing).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// A whole request with its body in chunks of so many bytes.
#[must_use]
pub fn request_in_chunks(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8], piece: usize) -> Vec<u8> {
    let mut bytes = head(method, path, headers, Framing::Chunked).into_bytes();
    for chunk in body.chunks(piece.max(1)) {
        bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
    /// Whether the body came whole, by its own framing.
    pub whole: bool,
    /// All of it as it came.
    pub raw: Bytes,
}

impl Answer {
    /// The first header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("an answer in UTF-8")
    }

    /// Whether the connection ends here.
    #[must_use]
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    /// An answer that broke off is none.
    ///
    /// # Errors
    /// `UnexpectedEof`.
    pub fn complete(self) -> io::Result<Self> {
        if self.whole { Ok(self) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// How an answer's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Length(usize),
    Chunked,
    /// With the connection.
    Rest,
}

/// The answer that a head with its empty line begins, and how its body ends.
pub(crate) fn parse_head(head: &[u8]) -> io::Result<(Answer, Body)> {
    let text = std::str::from_utf8(head).map_err(|_| bad("a head that is no text"))?;
    let mut lines = text.strip_suffix("\r\n\r\n").unwrap_or(text).split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| bad("no status line"))?;
    let mut headers = Vec::new();
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| bad("a header without a colon"))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let find = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let body = match (find("transfer-encoding"), find("content-length")) {
        _ if status < 200 || matches!(status, 204 | 304) => Body::Length(0),
        (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => Body::Chunked,
        (None, Some(length)) => Body::Length(length.parse().map_err(|_| bad("no number as length"))?),
        (None, None) => Body::Rest,
        _ => return Err(bad("two framings, or an unknown one")),
    };
    if matches!(body, Body::Length(BYTES_MAX..)) {
        return Err(bad("a body beyond the limit"));
    }
    Ok((Answer { status, headers, body: Vec::new(), whole: true, raw: Bytes::new() }, body))
}

/// A body in chunks, read from bytes of which more and more have come.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    pub(crate) body: Vec<u8>,
    /// How many of the bytes are read: whole chunks.
    pub(crate) at: usize,
}

impl Chunks {
    /// Reads on in `bytes`, all that have come so far; whether that was the last chunk.
    pub(crate) fn follow(&mut self, bytes: &[u8]) -> io::Result<bool> {
        while let Some((begin, size)) = self.size(bytes)? {
            let Some(piece) = bytes.get(begin..begin + size + 2) else { return Ok(false) };
            // The end of the chunk, or of the trailers, of which there are none.
            self.body.extend_from_slice(piece.strip_suffix(b"\r\n").ok_or_else(|| bad("bytes after a chunk"))?);
            self.at = begin + size + 2;
            if size == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The body of an answer that broke off here: what came of the last chunk is a part of it.
    pub(crate) fn broken_off(mut self, bytes: &[u8]) -> Vec<u8> {
        if let Ok(Some((begin, size))) = self.size(bytes) {
            self.body.extend(bytes[begin..].iter().take(size));
        }
        self.body
    }

    /// Where the next chunk's data begins, and how much of it there is; `None`: its first line has not come.
    fn size(&self, bytes: &[u8]) -> io::Result<Option<(usize, usize)>> {
        let bytes = bytes.get(self.at..).unwrap_or_default();
        let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
        let line = std::str::from_utf8(&bytes[..end]).ok().and_then(|line| line.split(';').next());
        let size = line.and_then(|size| usize::from_str_radix(size.trim(), 16).ok());
        let size = size.filter(|size| *size <= BYTES_MAX).ok_or_else(|| bad("no size of a chunk"))?;
        Ok(Some((self.at + end + 2, size)))
    }
}

pub(crate) fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_chunks_is_read_as_one_body() {
        let bytes = request_in_chunks("POST", "/x", &[("A", "b")], b"0123456789", 4);
        let text = String::from_utf8(bytes.clone()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert_eq!(head, "POST /x HTTP/1.1\r\nHost: 192.0.2.1\r\nA: b\r\nTransfer-Encoding: chunked");
        assert_eq!(body, "4\r\n0123\r\n4\r\n4567\r\n2\r\n89\r\n0\r\n\r\n");
        for cut in 0..=body.len() {
            let (first, mut chunks) = (&body.as_bytes()[..cut], Chunks::default());
            assert_eq!(chunks.follow(first).unwrap(), cut == body.len(), "{cut}");
            assert!(cut == body.len() || chunks.follow(format!("{body}more").as_bytes()).unwrap(), "{cut}");
            assert_eq!((chunks.body.as_slice(), chunks.at), (&b"0123456789"[..], body.len()), "{cut}");
        }
        for wrong in ["4\r\n01234\r\n", "x\r\n"] {
            assert!(Chunks::default().follow(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_get_says_nothing_of_a_body() {
        assert_eq!(request("GET", "/", &[], ""), b"GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n");
        assert!(request("PUT", "/", &[], "").ends_with(b"Content-Length: 0\r\n\r\n"));
    }

    #[test]
    fn an_answer_has_one_framing() {
        let framing =
            |lines: &str| parse_head(format!("HTTP/1.1 {lines}\r\n\r\n").as_bytes()).map(|(_, body)| body).ok();
        assert_eq!(framing("200 OK\r\nContent-Length: 7"), Some(Body::Length(7)));
        assert_eq!(framing("200 OK\r\nTransfer-Encoding: chunked"), Some(Body::Chunked));
        assert_eq!(framing("200 OK"), Some(Body::Rest));
        assert_eq!(framing("100 Continue"), Some(Body::Length(0)));
        assert_eq!(framing("204 No Content"), Some(Body::Length(0)));
        for wrong in [
            "200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked",
            "200 OK\r\nContent-Length: many",
            "200 OK\r\nContent-Length: 99999999",
            "200 OK\r\nno colon",
            "OK",
        ] {
            assert_eq!(framing(wrong), None, "{wrong}");
        }
    }
}
