//! A guest's way to its door: greeting and HTTP by hand, so that each byte is ours to get wrong.

use crate::dice::Dice;
use crate::event::{Event, GuestDoes};
use crate::story::Story;
use dayfly::gitlab::JobId;
use dayfly::vm::Stream;
use dayfly::vm::fake::Doors;
use dayfly_guest_config::{Greeting, Pass};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};

/// How long a guest waits for an answer: the official runner's is longer, and the door's limits shorter.
const ANSWER: Duration = Duration::from_secs(90);

/// One HTTP answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// What a guest needs to reach its door.
pub(crate) struct Line {
    pub(crate) doors: Doors,
    pub(crate) port: u16,
    pub(crate) pass: String,
    pub(crate) patience: Duration,
    pub(crate) story: Story,
    pub(crate) vm: String,
    pub(crate) job: JobId,
    pub(crate) dice: Dice,
    /// The connection that is kept for the next call. A stream is not `Sync`, a mutex around it is.
    kept: Mutex<Option<Box<dyn Stream>>>,
}

impl Line {
    pub(crate) fn new(
        doors: Doors,
        port: u16,
        pass: &str,
        patience: Duration,
        who: (Story, String, JobId),
        dice: Dice,
    ) -> Self {
        let (story, vm, job) = who;
        Self { doors, port, pass: pass.to_owned(), patience, story, vm, job, dice, kept: Mutex::new(None) }
    }

    /// The same guest's other line, without a kept connection.
    pub(crate) fn another(&mut self) -> Self {
        let dice = Dice::new(self.dice.next(), 7);
        let who = (self.story.clone(), self.vm.clone(), self.job);
        Self::new(self.doors.clone(), self.port, &self.pass, self.patience, who, dice)
    }

    pub(crate) fn tell(&self, does: GuestDoes<'_>) {
        self.story.tell(&Event::Guest { vm: &self.vm, job: self.job, does });
    }

    /// A raw connection to the door, as long as it takes within the relay's patience.
    pub(crate) async fn knock(&self) -> Option<Box<dyn Stream>> {
        let door = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let until = Instant::now() + self.patience;
        loop {
            if let Ok(stream) = self.doors.connect(door) {
                return Some(stream);
            }
            if Instant::now() >= until {
                return None;
            }
            sleep(Duration::from_millis(400)).await;
        }
    }

    /// A connection after the greeting.
    pub(crate) async fn connect(&mut self) -> Option<Box<dyn Stream>> {
        let until = Instant::now() + self.patience;
        loop {
            let stream = self.knock().await?;
            let nonce = self.nonce();
            if let Ok(Some(stream)) = timeout(Duration::from_secs(5), greet(stream, &self.pass, nonce)).await {
                let first = !self.story.inner().ledger.vms.get(&self.vm).is_some_and(|vm| vm.greeted);
                if first {
                    self.tell(GuestDoes::Greeted);
                }
                return Some(stream);
            }
            if Instant::now() >= until {
                return None;
            }
            sleep(Duration::from_millis(400)).await;
        }
    }

    pub(crate) fn nonce(&mut self) -> [u8; 16] {
        let (a, b) = (self.dice.next().to_le_bytes(), self.dice.next().to_le_bytes());
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&a);
        nonce[8..].copy_from_slice(&b);
        nonce
    }

    /// One request on the kept connection, or a new one. `None`: no whole answer.
    pub(crate) async fn call(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Option<Reply> {
        let kept = self.keep();
        let fresh = kept.is_none();
        let stream = match kept {
            Some(stream) => stream,
            None => self.connect().await?,
        };
        let request = head(method, path, headers, body.len());
        match self.exchange(stream, &request, body).await {
            // A kept connection may have been closed meanwhile: asked again once, on a new one.
            None if !fresh => {
                if path.contains("/artifacts") {
                    self.tell(GuestDoes::Transfers { uploads: None });
                }
                let stream = self.connect().await?;
                self.exchange(stream, &request, body).await
            }
            reply => reply,
        }
    }

    async fn exchange(&mut self, mut stream: Box<dyn Stream>, head: &str, body: &[u8]) -> Option<Reply> {
        let work = async {
            stream.write_all(head.as_bytes()).await.ok()?;
            stream.write_all(body).await.ok()?;
            let (reply, raw) = read_reply(&mut stream).await?;
            Some((reply, raw, stream))
        };
        let (reply, raw, stream) = timeout(ANSWER, work).await.ok()??;
        self.tell(GuestDoes::Reads(&raw));
        if !reply.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")) {
            *self.kept.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        }
        Some(reply)
    }

    /// The connection that is kept, for somebody who holds on to it.
    pub(crate) fn keep(&mut self) -> Option<Box<dyn Stream>> {
        self.kept.get_mut().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The greeting of a relay that knows the pass.
pub(crate) async fn greet(mut stream: Box<dyn Stream>, pass: &str, nonce: [u8; 16]) -> Option<Box<dyn Stream>> {
    let pass = Pass::from_text(pass)?;
    stream.write_all(format!("{}\r\n", Greeting::opening(&nonce)).as_bytes()).await.ok()?;
    let line = read_line(&mut stream).await?;
    let greeting = Greeting::relay(&pass, nonce, line.trim_end()).ok()?;
    stream.write_all(format!("{}\r\n", greeting.relay_line()).as_bytes()).await.ok()?;
    Some(stream)
}

async fn read_line(stream: &mut Box<dyn Stream>) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await.ok()?);
        if line.len() > 300 {
            return None;
        }
    }
    String::from_utf8(line).ok()
}

/// A request's head.
pub(crate) fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        head.push_str(name);
        head.push_str(": ");
        head.push_str(value);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    head
}

/// Reads one answer: itself, and all its bytes.
pub(crate) async fn read_reply(stream: &mut Box<dyn Stream>) -> Option<(Reply, Vec<u8>)> {
    let mut raw = Vec::with_capacity(1024);
    let mut buffer = [0; 4096];
    let end = loop {
        if let Some(end) = raw.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(read) => raw.extend_from_slice(&buffer[..read]),
        }
    };
    let text = String::from_utf8_lossy(&raw[..end]).into_owned();
    let mut lines = text.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let pairs = lines.filter_map(|line| line.split_once(':'));
    let headers = pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
    let mut reply = Reply { status, headers, body: Vec::new() };
    let length: Option<usize> = reply.header("content-length").and_then(|n| n.parse().ok());
    let empty = matches!(status, 204 | 304);
    let chunked = reply.header("transfer-encoding").is_some();
    loop {
        let have = raw.len() - end;
        if empty || length.is_some_and(|length| have >= length) || chunked && raw.ends_with(b"0\r\n\r\n") {
            break;
        }
        match stream.read(&mut buffer).await {
            Ok(0) if length.is_none() && !chunked => break,
            Ok(0) | Err(_) => return None,
            Ok(read) => raw.extend_from_slice(&buffer[..read]),
        }
    }
    reply.body = if chunked { unchunk(&raw[end..]) } else { raw[end..].to_vec() };
    Some((reply, raw))
}

fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = raw.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&raw[..end]).ok().and_then(|text| usize::from_str_radix(text.trim(), 16).ok());
        let Some(size) = size.filter(|size| *size > 0 && end + 2 + size <= raw.len()) else { break };
        body.extend_from_slice(&raw[end + 2..end + 2 + size]);
        raw = raw.get(end + 4 + size..).unwrap_or_default();
    }
    body
}
