//! Does this connection come from our guest's relay? The three lines before any HTTP, on a stream.
//!
//! The lines themselves are `dayfly_guest_config::Greeting`'s; here they are read, with bounds, and
//! answered. Until the relay has proven the pass nothing is sent but our one line, and that only
//! after a well-formed first one (decision D22). The caller holds the deadline.

use crate::vm::Stream;
use bytes::{Buf as _, BytesMut};
use dayfly_guest_config::{GREETING_LINE_MAX, Greeting, GreetingError, Nonce, Pass};
use std::io;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Why a connection is closed before any HTTP. Each is a word of the metric's `reason`.
#[derive(Debug)]
pub enum Failure {
    /// A line is not of its form, or too long.
    Malformed,
    /// Bytes behind the first line, before our answer to it.
    Hasty,
    /// The relay does not hold the pass.
    WrongProof,
    /// The other side ended it.
    Closed,
}

impl Failure {
    /// The label of this failure in the metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Hasty => "hasty",
            Self::WrongProof => "wrong_proof",
            Self::Closed => "closed",
        }
    }
}

impl From<GreetingError> for Failure {
    fn from(error: GreetingError) -> Self {
        match error {
            GreetingError::Malformed => Self::Malformed,
            GreetingError::WrongProof => Self::WrongProof,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        // The cause is the other side's, or its network's, and changes nothing for us.
        Self::Closed
    }
}

/// Greets. Returns the bytes that were read beyond the greeting: HTTP already.
///
/// Not cancel safe: a connection whose greeting was dropped can only be closed.
pub async fn greet(stream: &mut dyn Stream, pass: &Pass, nonce: Nonce) -> Result<BytesMut, Failure> {
    let mut read = BytesMut::with_capacity(2 * GREETING_LINE_MAX);
    let opening = line(stream, &mut read).await?;
    if !read.is_empty() {
        return Err(Failure::Hasty);
    }
    let greeting = Greeting::door(pass, nonce, &opening)?;
    let answer = format!("{}\r\n", greeting.door_line());
    stream.write_all(answer.as_bytes()).await?;
    stream.flush().await?;
    greeting.finish(&line(stream, &mut read).await?)?;
    Ok(read)
}

/// One line of printable ASCII without its CR LF; what follows stays in `read`.
async fn line(stream: &mut dyn Stream, read: &mut BytesMut) -> Result<String, Failure> {
    let mut checked = 0;
    loop {
        for at in checked..read.len() {
            match read[at] {
                // Garbage, a TLS hello: no need to wait for a line break.
                b' '..=b'~' if at < GREETING_LINE_MAX => {}
                b'\r' if at <= GREETING_LINE_MAX => {}
                b'\n' if at > 0 && read[at - 1] == b'\r' => {
                    let line = read.split_to(at - 1);
                    read.advance(2);
                    return String::from_utf8(line.into()).map_err(|_| Failure::Malformed);
                }
                _ => return Err(Failure::Malformed),
            }
            if at > 0 && read[at - 1] == b'\r' {
                return Err(Failure::Malformed);
            }
        }
        checked = read.len();
        if stream.read_buf(read).await? == 0 {
            return Err(Failure::Closed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};

    async fn door_says(pieces: &[&[u8]]) -> (Result<BytesMut, Failure>, Vec<u8>) {
        let (mut relay, mut door) = duplex(4096);
        for piece in pieces {
            relay.write_all(piece).await.unwrap();
        }
        relay.shutdown().await.unwrap();
        let result = greet(&mut door, &Pass::new([1; 32]), [2; 16]).await;
        drop(door);
        let mut said = Vec::new();
        relay.read_to_end(&mut said).await.unwrap();
        (result, said)
    }

    async fn read_line(relay: &mut DuplexStream) -> String {
        let mut text = Vec::new();
        while !text.ends_with(b"\r\n") {
            text.push(relay.read_u8().await.unwrap());
        }
        String::from_utf8(text).unwrap().trim_end().to_owned()
    }

    #[tokio::test]
    async fn bytes_behind_the_greeting_are_kept_for_http() {
        let (mut relay, mut door) = duplex(4096);
        let pass = Pass::new([1; 32]);
        let relay_side = async {
            relay.write_all(format!("{}\r\n", Greeting::opening(&[3; 16])).as_bytes()).await.unwrap();
            let greeting = Greeting::relay(&pass, [3; 16], &read_line(&mut relay).await).unwrap();
            relay.write_all(format!("{}\r\nGET / HT", greeting.relay_line()).as_bytes()).await.unwrap();
        };
        let (read, ()) = tokio::join!(greet(&mut door, &pass, [2; 16]), relay_side);
        assert_eq!(&read.unwrap()[..], b"GET / HT");
    }

    /// P10: HTTP or a TLS hello at once, a line of 161 bytes, a bare line feed, bytes before our answer.
    #[tokio::test]
    async fn nothing_is_said_to_a_connection_whose_first_line_is_wrong() {
        let opening = Greeting::opening(&[3; 16]);
        let (long, hasty) = (format!("{}\r\n", "D".repeat(161)), format!("{opening}\r\nG"));
        let (bare, zero) = (format!("{opening}\n"), format!("{opening}\r\r\n"));
        for piece in ["GET / HTTP/1.1\r\n", "\x16\x03\x01\x02", &long, &hasty, &bare, &zero, "", "DAYFLY 1 "] {
            let (result, said) = door_says(&[piece.as_bytes()]).await;
            assert!(result.is_err() && said.is_empty(), "{piece:?}: {result:?} {said:?}");
        }
    }

    #[tokio::test]
    async fn a_line_of_160_bytes_is_read_and_one_of_161_is_not() {
        for (length, word) in [(160, "malformed"), (161, "malformed")] {
            let (mut relay, mut door) = duplex(4096);
            relay.write_all(&vec![b'D'; length]).await.unwrap();
            // Without a line break the longer one is refused at once, the shorter one waits for more.
            let (mut read, waited) = (BytesMut::new(), std::time::Duration::from_millis(1));
            let line = tokio::time::timeout(waited, line(&mut door, &mut read)).await;
            assert_eq!(line.is_ok(), length == 161);
            if let Ok(result) = line {
                assert_eq!(result.unwrap_err().word(), word);
            }
        }
    }

    #[tokio::test]
    async fn a_wrong_proof_is_told_nothing_more() {
        let opening = format!("{}\r\n", Greeting::opening(&[3; 16]));
        let (mut relay, mut door) = duplex(4096);
        let relay_side = async {
            relay.write_all(opening.as_bytes()).await.unwrap();
            let _ = read_line(&mut relay).await;
            relay.write_all(format!("{}\r\n", "0".repeat(64)).as_bytes()).await.unwrap();
        };
        let pass = Pass::new([1; 32]);
        let (result, ()) = tokio::join!(greet(&mut door, &pass, [2; 16]), relay_side);
        assert!(matches!(result, Err(Failure::WrongProof)));
        drop(door);
        assert_eq!(relay.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
