//! QEMU's monitor protocol, as far as we speak it: JSON, a line each, over a unix socket of its own per machine.
//!
//! Behind the socket is a program that a guest may have broken into. So a line has a bound, what is not understood is
//! passed over, and whoever waits here has a deadline of his own.

use serde::Deserialize;
use serde_json::{Value, json};
use std::io;
use std::path::Path;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Bytes of one line. Answers to our few questions have some hundred.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// What QEMU says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    /// The answer to the oldest command that has none.
    Answer(Result<Value, String>),
    /// Something happened; of a shutdown also why.
    Event { name: String, reason: String },
}

/// A line of QEMU's.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Failure>,
    event: Option<String>,
    data: Option<Value>,
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

/// `None`: nothing that matters to us.
fn parse(line: &[u8]) -> Option<Message> {
    let line: Line = serde_json::from_slice(line).ok()?;
    if let Some(name) = line.event {
        let reason = line.data.as_ref().and_then(|data| data.get("reason")?.as_str()).unwrap_or_default().to_owned();
        return Some(Message::Event { name, reason });
    }
    match (line.answer, line.error) {
        (Some(answer), _) => Some(Message::Answer(Ok(answer))),
        (None, Some(failure)) => Some(Message::Answer(Err(failure.desc))),
        (None, None) => None,
    }
}

/// A conversation with one QEMU.
pub(super) struct Qmp<R = OwnedReadHalf, W = OwnedWriteHalf> {
    reader: BufReader<R>,
    writer: W,
    /// The line so far.
    line: Vec<u8>,
}

impl Qmp {
    /// Connects, and begins the conversation with QEMU of this name.
    pub(super) async fn connect(socket: &Path, name: &str) -> io::Result<Self> {
        let (reader, writer) = UnixStream::connect(socket).await?.into_split();
        Self::begin(reader, writer, name).await
    }
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Qmp<R, W> {
    async fn begin(reader: R, writer: W, name: &str) -> io::Result<Self> {
        let mut qmp = Self { reader: BufReader::new(reader), writer, line: Vec::new() };
        let refused = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        qmp.ask("qmp_capabilities").await?.map_err(|error| refused(&error))?;
        let answer = qmp.ask("query-name").await?.map_err(|error| refused(&error))?;
        if answer.get("name").and_then(Value::as_str) != Some(name) {
            return Err(refused("the QEMU behind this socket has another name"));
        }
        Ok(qmp)
    }

    /// Sends a command without arguments.
    pub(super) async fn send(&mut self, command: &str) -> io::Result<()> {
        self.tell(&json!({ "execute": command })).await
    }

    /// Sends a command as QEMU reads it.
    pub(super) async fn tell(&mut self, command: &Value) -> io::Result<()> {
        self.writer.write_all(format!("{command}\n").as_bytes()).await
    }

    /// Sends a command and waits for its answer; events in between are passed over.
    pub(super) async fn ask(&mut self, command: &str) -> io::Result<Result<Value, String>> {
        self.send(command).await?;
        loop {
            if let Message::Answer(answer) = self.next().await? {
                return Ok(answer);
            }
        }
    }

    /// The next message. An error also for the end.
    ///
    /// # Cancel safety
    /// Safe: what was read of a line is kept.
    pub(super) async fn next(&mut self) -> io::Result<Message> {
        loop {
            let piece = self.reader.fill_buf().await?;
            if piece.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = piece.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(piece.len(), |end| end + 1);
            if self.line.len() + taken > LINE_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line of QEMU's is too long"));
            }
            self.line.extend_from_slice(&piece[..taken]);
            self.reader.consume(taken);
            if end.is_some() {
                let message = parse(&self.line);
                self.line.clear();
                if let Some(message) = message {
                    return Ok(message);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[test]
    fn answers_events_and_noise_are_told_apart() {
        let event = |name: &str, reason: &str| Some(Message::Event { name: name.into(), reason: reason.into() });
        let check = |line: &str, expected: Option<Message>| assert_eq!(parse(line.as_bytes()), expected, "{line}");
        check(
            r#"{"timestamp":{},"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"}}"#,
            event("SHUTDOWN", "guest-reset"),
        );
        check(r#"{"event":"STOP"}"#, event("STOP", ""));
        check(r#"{"event":"SHUTDOWN","data":{"reason":7}}"#, event("SHUTDOWN", ""));
        check(r#"{"return":{}}"#, Some(Message::Answer(Ok(serde_json::json!({})))));
        check(r#"{"error":{"class":"GenericError","desc":"no"}}"#, Some(Message::Answer(Err("no".into()))));
        for noise in ["", "{}", "{", "[1]", r#"{"QMP":{"version":{},"capabilities":["oob"]}}"#, "\u{0}"] {
            check(noise, None);
        }
    }

    async fn begin(says: &[u8]) -> io::Result<()> {
        let (ours, mut qemu) = tokio::io::duplex(256 * 1024);
        let (reader, writer) = tokio::io::split(ours);
        qemu.write_all(says).await.unwrap();
        let begun = Qmp::begin(reader, writer, "df-a").await.map(drop);
        let mut asked = Vec::new();
        let _ = qemu.read_to_end(&mut asked).await;
        begun
    }

    /// A QEMU that floods, or is another, is not talked to.
    #[tokio::test]
    async fn a_conversation_begins_with_the_right_qemu_or_not_at_all() {
        let hello = b"{\"QMP\":{}}\r\n{\"return\":{}}\r\n{\"event\":\"RESUME\"}\r\n".to_vec();
        begin(&[&hello[..], b"{\"return\":{\"name\":\"df-a\"}}\r\n"].concat()).await.unwrap();
        let error = begin(&[&hello[..], b"{\"return\":{\"name\":\"df-b\"}}\r\n"].concat()).await.unwrap_err();
        assert!(error.to_string().contains("another name"), "{error}");
        let error = begin(&vec![b'x'; LINE_BYTES_MAX + 1]).await.unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
        let error = begin(b"{\"QMP\":{}}\n{\"error\":{\"desc\":\"no capabilities\"}}\n").await.unwrap_err();
        assert!(error.to_string().contains("no capabilities"), "{error}");
    }
}
