//! One connection of a guest: the relay's side of the greeting, bytes out, answers in.

use crate::http::{Answer, BYTES_MAX, Body, Chunks, bad, parse_head};
use bytes::BytesMut;
use dayfly_guest_config::{GREETING_LINE_MAX, Greeting, Nonce, Pass};
use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Join, ReadHalf, Sink, WriteHalf};
use tokio::time::{sleep, timeout};

/// The whole greeting, as the relay has it.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// Bytes that are read at once.
const READ_BYTES: usize = 8192;

/// Spoils what is about to be sent; told how many bytes were sent before.
pub type Spoil = Box<dyn FnMut(usize, &mut [u8]) + Send>;

/// One connection to a relay, or to a door, from the first byte on.
pub struct Connection<S> {
    stream: S,
    /// Read, and not yet asked for.
    read: BytesMut,
    sent: usize,
    spoil: Option<Spoil>,
}

impl<S> fmt::Debug for Connection<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("sent", &self.sent).field("read", &self.read.len()).finish_non_exhaustive()
    }
}

impl<S> Connection<S> {
    /// A connection on which nothing was said yet.
    pub fn new(stream: S) -> Self {
        Self { stream, read: BytesMut::new(), sent: 0, spoil: None }
    }

    /// Lets `spoil` change all bytes that are sent from now on.
    pub fn spoil(&mut self, spoil: impl FnMut(usize, &mut [u8]) + Send + 'static) {
        self.spoil = Some(Box::new(spoil));
    }

    /// What was read and not yet asked for.
    pub fn buffered(&mut self) -> Vec<u8> {
        self.read.split().to_vec()
    }

    /// The stream as it is now. What was read and not asked for is lost.
    pub fn into_stream(self) -> S {
        self.stream
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Sends these bytes.
    ///
    /// # Errors
    /// The stream's.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let before = self.sent;
        self.sent += bytes.len();
        match &mut self.spoil {
            None => self.stream.write_all(bytes).await?,
            Some(spoil) => {
                let mut spoilt = bytes.to_vec();
                spoil(before, &mut spoilt);
                self.stream.write_all(&spoilt).await?;
            }
        }
        self.stream.flush().await
    }

    /// Sends nothing more.
    ///
    /// # Errors
    /// The stream's.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    /// The relay's side of the greeting, `first` in one segment with its last line.
    ///
    /// # Errors
    /// The stream's, and `InvalidData` for a door that does not prove the pass: then it was told nothing more.
    pub async fn greet(&mut self, pass: &Pass, nonce: Nonce, first: &[u8]) -> io::Result<()> {
        self.send(format!("{}\r\n", Greeting::opening(&nonce)).as_bytes()).await?;
        let line = self.line(GREETING_LINE_MAX).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let greeting = Greeting::relay(pass, nonce, &line).map_err(|_| bad("the door does not prove the pass"))?;
        let mut last = format!("{}\r\n", greeting.relay_line()).into_bytes();
        last.extend_from_slice(first);
        self.send(&last).await
    }

    /// Reads more; 0: that was all.
    async fn fill(&mut self) -> io::Result<usize> {
        self.read.reserve(READ_BYTES);
        self.stream.read_buf(&mut self.read).await
    }

    /// A line of at most so many bytes, without its CR LF; `None`: the end.
    ///
    /// # Errors
    /// The stream's, and `InvalidData` for what is no such line.
    pub async fn line(&mut self, bytes_max: usize) -> io::Result<Option<String>> {
        let mut seen = 0;
        loop {
            if let Some(at) = self.read[seen..].iter().position(|byte| *byte == b'\n') {
                let line = self.read.split_to(seen + at + 1);
                let line = line.strip_suffix(b"\r\n").and_then(|line| std::str::from_utf8(line).ok());
                return line.map(|line| Some(line.to_owned())).ok_or_else(|| bad("no line of text"));
            }
            seen = self.read.len();
            if seen > bytes_max {
                return Err(bad("a line beyond the limit"));
            }
            if self.fill().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// What comes next, as it comes; empty: the end.
    ///
    /// # Errors
    /// The stream's.
    pub async fn some(&mut self) -> io::Result<BytesMut> {
        if self.read.is_empty() {
            self.fill().await?;
        }
        Ok(self.read.split())
    }

    /// One half to send by, and a connection that only reads.
    pub fn split(self) -> (WriteHalf<S>, Connection<Join<ReadHalf<S>, Sink>>) {
        let (reading, sending) = tokio::io::split(self.stream);
        let stream = tokio::io::join(reading, tokio::io::sink());
        (sending, Connection { stream, read: self.read, sent: 0, spoil: None })
    }

    /// All bytes until the end. A reset is an end, too.
    pub async fn rest(&mut self) -> Vec<u8> {
        while self.fill().await.is_ok_and(|read| read > 0) {}
        self.buffered()
    }

    /// The next answer, perhaps with a body that broke off; `None`: the connection ended instead.
    ///
    /// # Errors
    /// The stream's, and `InvalidData` for what is no answer.
    pub async fn answer(&mut self) -> io::Result<Option<Answer>> {
        let mut seen = 0;
        let head = loop {
            if let Some(at) = self.read[seen..].windows(4).position(|four| four == b"\r\n\r\n") {
                break seen + at + 4;
            }
            seen = self.read.len().saturating_sub(3);
            if seen > BYTES_MAX {
                return Err(bad("a head beyond the limit"));
            }
            if self.fill().await? == 0 {
                return Ok(None);
            }
        };
        let (mut answer, framing) = parse_head(&self.read[..head])?;
        let mut chunks = Chunks::default();
        let end = loop {
            let here = &self.read[head..];
            match framing {
                Body::Length(length) if here.len() >= length => {
                    answer.body = here[..length].to_vec();
                    break head + length;
                }
                Body::Chunked if chunks.follow(here)? => {
                    answer.body = chunks.body;
                    break head + chunks.at;
                }
                Body::Chunked | Body::Rest if here.len() > BYTES_MAX => return Err(bad("a body beyond the limit")),
                _ => {}
            }
            // A reset ends a body as well.
            if self.fill().await.unwrap_or(0) == 0 {
                let here = &self.read[head..];
                answer.whole = framing == Body::Rest;
                answer.body = if framing == Body::Chunked { chunks.broken_off(here) } else { here.to_vec() };
                break self.read.len();
            }
        };
        answer.raw = self.read.split_to(end).freeze();
        Ok(Some(answer))
    }

    /// Sends a whole request and reads its whole answer.
    ///
    /// # Errors
    /// As [`Connection::answer`]; `UnexpectedEof` without a whole answer.
    pub async fn exchange(&mut self, request: &[u8]) -> io::Result<Answer> {
        self.send(request).await?;
        self.answer().await?.ok_or(io::ErrorKind::UnexpectedEof)?.complete()
    }
}

/// Connects and greets, again and again while that fails and `waits` says so, as the relay does. `nonce` is asked for
/// each greeting.
pub async fn enter<S: AsyncRead + AsyncWrite + Unpin>(
    pass: &Pass,
    mut open: impl FnMut() -> io::Result<S>,
    mut nonce: impl FnMut() -> Nonce,
    pause: Duration,
    waits: impl Fn() -> bool,
) -> Option<Connection<S>> {
    loop {
        if let Ok(stream) = open() {
            let mut connection = Connection::new(stream);
            if let Ok(Ok(())) = timeout(GREETING_LIMIT, connection.greet(pass, nonce(), b"")).await {
                return Some(connection);
            }
        }
        if !waits() {
            return None;
        }
        sleep(pause).await;
    }
}

/// The connection that a runner keeps for its next call. A stream is not `Sync`; who holds one is.
#[derive(Debug)]
pub struct Kept<S>(Mutex<Option<Connection<S>>>);

impl<S> Default for Kept<S> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<S> Kept<S> {
    /// The connection that is kept, if there is one: it may have been closed meanwhile.
    pub fn take(&mut self) -> Option<Connection<S>> {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Kept<S> {
    /// One request on this connection, which is kept unless its answer says otherwise, or does not come in time.
    ///
    /// # Errors
    /// As [`Connection::exchange`], and `TimedOut`.
    pub async fn exchange(
        &mut self,
        mut connection: Connection<S>,
        request: &[u8],
        patience: Duration,
    ) -> io::Result<Answer> {
        let answer = timeout(patience, connection.exchange(request)).await??;
        if !answer.closes() {
            *self.0.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};

    /// A guest that reads what `pieces` say, then the end.
    async fn hears(pieces: &[&[u8]]) -> Connection<DuplexStream> {
        let (ours, mut theirs) = duplex(1 << 16);
        for piece in pieces {
            theirs.write_all(piece).await.unwrap();
        }
        Connection::new(ours)
    }

    #[tokio::test]
    async fn answers_are_read_one_after_the_other_by_their_framing() {
        let mut guest = hears(&[
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nA: 1\r\n\r\nHTTP/1.1 200 OK\r\nContent-Le",
            b"ngth: 3\r\n\r\nabcHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r",
            b"\n1;x=y\r\nf\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\nghi",
        ])
        .await;
        let mut heard = Vec::new();
        while let Some(answer) = guest.answer().await.unwrap() {
            assert!(answer.whole && answer.raw.starts_with(b"HTTP/1.1 "));
            heard.push((answer.status, answer.text().to_owned(), answer.closes()));
        }
        let heard: Vec<_> = heard.iter().map(|(status, text, closes)| (*status, text.as_str(), *closes)).collect();
        assert_eq!(
            heard,
            [(100, "", false), (204, "", false), (200, "abc", false), (200, "def", false), (200, "ghi", true)]
        );
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_not_whole() {
        for (bytes, body) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "abc"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\nd", "abcd"),
        ] {
            let answer = hears(&[bytes.as_bytes()]).await.answer().await.unwrap().unwrap();
            assert_eq!((answer.whole, answer.text()), (false, body));
            assert!(answer.complete().is_err());
        }
        for nothing in ["", "HTTP/1.1 200 OK\r\nA: b\r\n"] {
            assert!(hears(&[nothing.as_bytes()]).await.answer().await.unwrap().is_none());
        }
        for wrong in ["220 smtp\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"] {
            assert!(hears(&[wrong.as_bytes()]).await.answer().await.is_err(), "{wrong}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_door_is_greeted_until_it_proves_the_pass() {
        let pass = Pass::new([1; 32]);
        let (mut tries, doors) = (0, std::sync::Arc::new(Mutex::new(Vec::new())));
        let listening = doors.clone();
        let open = move || {
            tries += 1;
            let (ours, theirs) = duplex(1 << 12);
            listening.lock().unwrap().push((tries, theirs));
            if tries == 1 { Err(io::ErrorKind::ConnectionRefused.into()) } else { Ok(ours) }
        };
        let door = async {
            let mut entered = 0;
            while entered == 0 {
                let next = doors.lock().unwrap().pop();
                let Some((number, theirs)) = next else {
                    sleep(Duration::from_millis(1)).await;
                    continue;
                };
                let holds = Pass::new([if number == 3 { 1 } else { 9 }; 32]);
                let mut theirs = Connection::new(theirs);
                let Ok(Some(opening)) = theirs.line(99).await else { continue };
                let greeting = Greeting::door(&holds, [2; 16], &opening).unwrap();
                theirs.send(format!("{}\r\n", greeting.door_line()).as_bytes()).await.unwrap();
                // A door that did not prove itself hears nothing.
                if let Ok(Some(line)) = theirs.line(99).await {
                    greeting.finish(&line).unwrap();
                    entered = number;
                }
            }
            entered
        };
        let entering = enter(&pass, open, || [7; 16], Duration::from_millis(200), || true);
        let (entered, guest) = tokio::join!(door, entering);
        assert_eq!((entered, guest.is_some()), (3, true));
    }

    #[tokio::test]
    async fn a_spoilt_byte_is_sent_in_place_of_the_right_one() {
        let (ours, mut theirs) = duplex(64);
        let mut guest = Connection::new(ours);
        guest.send(b"abc").await.unwrap();
        guest.spoil(|before, bytes| {
            if let Some(byte) = 4_usize.checked_sub(before).and_then(|at| bytes.get_mut(at)) {
                *byte ^= 0x20;
            }
        });
        guest.send(b"def").await.unwrap();
        guest.send(b"ghi").await.unwrap();
        guest.finish().await.unwrap();
        let mut read = Vec::new();
        theirs.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"abcdEfghi");
    }
}
