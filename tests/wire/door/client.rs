//! The guest's end of a connection: the relay's greeting, requests as bytes, answers read by hand.
//!
//! It shares no code with the server under test, but for the greeting's lines.

use super::support::{JOB, JOB_TOKEN, LIMIT};
use bytes::BytesMut;
use dayfly::vm::Stream;
use dayfly_guest_config::{Greeting, Pass};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

/// The guest's end of a connection.
pub(crate) struct Guest {
    pub(crate) stream: Box<dyn Stream>,
    read: BytesMut,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Whether the body came whole, by its own framing.
    pub(crate) whole: bool,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

impl Guest {
    pub(crate) fn new(stream: impl Stream + 'static) -> Self {
        Self { stream: Box::new(stream), read: BytesMut::new() }
    }

    /// One half to send by, and a guest that only reads.
    pub(crate) fn split(self) -> (tokio::io::WriteHalf<Box<dyn Stream>>, Self) {
        let (reading, sending) = tokio::io::split(self.stream);
        let reading = tokio::io::join(reading, tokio::io::sink());
        (sending, Self { stream: Box::new(reading), read: self.read })
    }

    /// The relay's half of the greeting, `first` in one segment with its last line.
    pub(crate) async fn greet(&mut self, pass: &Pass, first: &[u8]) {
        let nonce = [7; 16];
        self.send(format!("{}\r\n", Greeting::opening(&nonce))).await;
        let line = self.line().await.expect("the door's line");
        let greeting = Greeting::relay(pass, nonce, &line).expect("the door holds the pass");
        let mut last = format!("{}\r\n", greeting.relay_line()).into_bytes();
        last.extend_from_slice(first);
        self.send(last).await;
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Sends what the door may not wait for.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        timeout(LIMIT, self.stream.write_all(bytes.as_ref())).await.is_ok_and(|sent| sent.is_ok())
    }

    async fn fill(&mut self) -> usize {
        let read = timeout(LIMIT, self.stream.read_buf(&mut self.read)).await.expect("something within the limit");
        // A reset is an end, too.
        read.unwrap_or_default()
    }

    /// A line without its CR LF; `None` at the end.
    pub(crate) async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = self.read.split_to(at + 1);
                return Some(String::from_utf8(line.strip_suffix(b"\r\n").unwrap().to_vec()).unwrap());
            }
            if self.fill().await == 0 {
                return None;
            }
        }
    }

    /// What was read and not yet asked for.
    pub(crate) fn buffered(&mut self) -> Vec<u8> {
        self.read.split().to_vec()
    }

    /// All bytes until the door closes.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        while self.fill().await > 0 {}
        self.read.split().to_vec()
    }

    pub(crate) async fn reply(&mut self) -> Reply {
        self.try_reply().await.expect("an answer")
    }

    /// The next answer; `None` if the door closed instead.
    pub(crate) async fn try_reply(&mut self) -> Option<Reply> {
        let line = self.line().await?;
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or_else(|| panic!("{line}"));
        let mut reply = Reply { status: status.parse().unwrap(), headers: Vec::new(), body: Vec::new(), whole: true };
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(": ") else { break };
            reply.headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        if let Some(length) = reply.header("content-length").map(|length| length.parse().unwrap()) {
            reply.whole = self.take(length, &mut reply.body).await;
        } else if reply.header("transfer-encoding").is_some() {
            loop {
                let Some(size) = self.line().await else {
                    reply.whole = false;
                    break;
                };
                let size = usize::from_str_radix(&size, 16).unwrap();
                if !self.take(size, &mut reply.body).await || self.line().await.is_none() {
                    reply.whole = false;
                    break;
                }
                if size == 0 {
                    break;
                }
            }
        }
        Some(reply)
    }

    async fn take(&mut self, length: usize, into: &mut Vec<u8>) -> bool {
        while self.read.len() < length {
            if self.fill().await == 0 {
                into.extend_from_slice(&self.read.split());
                return false;
            }
        }
        into.extend_from_slice(&self.read.split_to(length));
        true
    }
}

/// A request with a body and the usual headers.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() || matches!(method, "POST" | "PUT" | "PATCH") {
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    let mut bytes = (text + "\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// `jobs/request` as 19.3 sends it.
pub(crate) fn poll(token: &str) -> Vec<u8> {
    let body = format!(r#"{{"info":{{"name":"gitlab-runner"}},"token":"{token}","system_id":"s_0123456789ab"}}"#);
    request("POST", "/api/v4/jobs/request", &[("Content-Type", "application/json"), ("Runner-Token", token)], body)
}

/// A PATCH as 19.3 sends it.
pub(crate) fn patch(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let range = format!("{offset}-{}", offset + bytes.len() as u64 - 1);
    let headers = [("Content-Range", range.as_str()), ("Content-Type", "text/plain"), ("Job-Token", JOB_TOKEN)];
    request("PATCH", &format!("/api/v4/jobs/{JOB}/trace?debug_trace=false"), &headers, bytes)
}

/// A PUT as 19.3 sends it; `members` behind the token.
pub(crate) fn put(members: &str) -> Vec<u8> {
    let body = format!(r#"{{"info":{{}},"token":"{JOB_TOKEN}",{members}}}"#);
    request(
        "PUT",
        &format!("/api/v4/jobs/{JOB}"),
        &[("Content-Type", "application/json"), ("Job-Token", JOB_TOKEN)],
        body,
    )
}
