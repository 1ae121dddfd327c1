//! What the ends say to each other before a session, and how it is found in whatever the pipe holds.
//!
//! ```text
//! host  → guest   hello   door's nonce                          repeated until `begin`
//! guest → host    answer  door's nonce, relay's nonce           to each hello
//! host  → guest   proof   both nonces, the door's proof         the door proves itself first
//! guest → host    begin   both nonces, the relay's proof
//! host  → guest   start   both nonces; a session's bytes follow
//! ```
//!
//! Each begins with [`MAGIC`] and its kind, and has the length of its kind. All carry the nonces, so that one of an
//! earlier session is never taken for one of this.

use bytes::{Buf as _, BytesMut};
use dayfly_guest_config::{Nonce, PROOF_BYTES};

/// No text and no head of a frame: a session's bytes seldom look like it, and nothing follows if they do.
pub(crate) const MAGIC: [u8; 16] = *b"\xfbdayfly-wire-1\r\xfb";

/// The longest message.
const MESSAGE_BYTES_MAX: usize = MAGIC.len() + 1 + 2 * size_of::<Nonce>() + PROOF_BYTES;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A host is here, with this nonce.
    Hello { door: Nonce },
    /// A guest is here, and has heard that hello.
    Answer { door: Nonce, relay: Nonce },
    /// The door holds the pass.
    Proof { door: Nonce, relay: Nonce, proof: [u8; PROOF_BYTES] },
    /// So does the relay.
    Begin { door: Nonce, relay: Nonce, proof: [u8; PROOF_BYTES] },
    /// The session's first byte is the next.
    Start { door: Nonce, relay: Nonce },
}

impl Message {
    /// Its bytes.
    pub(crate) fn write(&self, into: &mut BytesMut) {
        into.extend_from_slice(&MAGIC);
        let (kind, parts): (u8, [&[u8]; 3]) = match self {
            Self::Hello { door } => (b'?', [door, &[], &[]]),
            Self::Answer { door, relay } => (b'=', [door, relay, &[]]),
            Self::Proof { door, relay, proof } => (b'!', [door, relay, proof]),
            Self::Begin { door, relay, proof } => (b'.', [door, relay, proof]),
            Self::Start { door, relay } => (b'>', [door, relay, &[]]),
        };
        into.extend_from_slice(&[kind]);
        for part in parts {
            into.extend_from_slice(part);
        }
    }

    /// The message at the beginning of these bytes, and its length.
    fn read(bytes: &[u8]) -> Read {
        let all = MAGIC.len().min(bytes.len());
        if bytes[..all] != MAGIC[..all] {
            return Read::No;
        }
        let Some((kind, body)) = bytes.get(MAGIC.len()..).and_then(<[u8]>::split_first) else { return Read::NotYet };
        let read = match kind {
            b'?' => take(body).map(|(door, rest)| (Self::Hello { door }, rest)),
            b'=' => two(body).map(|(door, relay, rest)| (Self::Answer { door, relay }, rest)),
            b'>' => two(body).map(|(door, relay, rest)| (Self::Start { door, relay }, rest)),
            b'!' => three(body).map(|(door, relay, proof, rest)| (Self::Proof { door, relay, proof }, rest)),
            b'.' => three(body).map(|(door, relay, proof, rest)| (Self::Begin { door, relay, proof }, rest)),
            _ => return Read::No,
        };
        read.map_or(Read::NotYet, |(message, rest)| Read::Yes(message, bytes.len() - rest.len()))
    }
}

/// What stands at a place.
enum Read {
    /// No message.
    No,
    /// Perhaps one, if more bytes come.
    NotYet,
    /// This one, of this length.
    Yes(Message, usize),
}

fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    bytes.split_first_chunk::<N>().map(|(part, rest)| (*part, rest))
}

fn two(bytes: &[u8]) -> Option<(Nonce, Nonce, &[u8])> {
    let (door, rest) = take(bytes)?;
    let (relay, rest) = take(rest)?;
    Some((door, relay, rest))
}

fn three(bytes: &[u8]) -> Option<(Nonce, Nonce, [u8; PROOF_BYTES], &[u8])> {
    let (door, relay, rest) = two(bytes)?;
    let (proof, rest) = take(rest)?;
    Some((door, relay, proof, rest))
}

/// Finds messages in bytes that arrive in pieces, wherever they stand.
#[derive(Default)]
pub(crate) struct Scanner {
    /// What may still be part of a message; in front of it is nothing that could be.
    kept: BytesMut,
}

impl Scanner {
    /// Looks for messages in what was kept and in `bytes`, and hands each to `wanted` until that takes one: then what
    /// stands behind it is [`Scanner::rest`]. One that is not wanted hides none that begins inside of it, for a torn
    /// message of an earlier session swallows the beginning of the next.
    pub(crate) fn find<T>(&mut self, bytes: &[u8], mut wanted: impl FnMut(Message) -> Option<T>) -> Option<T> {
        self.kept.extend_from_slice(bytes);
        let mut at = 0;
        let mut keep_from = None;
        while let Some(next) = self.kept[at..].iter().position(|byte| *byte == MAGIC[0]) {
            at += next;
            match Message::read(&self.kept[at..]) {
                Read::No => {}
                Read::NotYet => {
                    keep_from.get_or_insert(at);
                }
                Read::Yes(message, length) => {
                    if let Some(taken) = wanted(message) {
                        self.kept.advance(at + length);
                        return Some(taken);
                    }
                }
            }
            at += 1;
        }
        // The first message that is not whole yet is nearer to the end than the longest one.
        let keep_from = keep_from.unwrap_or(self.kept.len());
        debug_assert!(self.kept.len() - keep_from < MESSAGE_BYTES_MAX, "only the end of the bytes can be unfinished");
        self.kept.advance(keep_from);
        None
    }

    /// Once a message has been taken: the bytes behind it.
    pub(crate) fn rest(self) -> BytesMut {
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Message; 5] = [
        Message::Hello { door: [1; 16] },
        Message::Answer { door: [1; 16], relay: [2; 16] },
        Message::Proof { door: [1; 16], relay: [2; 16], proof: [3; 32] },
        Message::Begin { door: [4; 16], relay: [2; 16], proof: [3; 32] },
        Message::Start { door: [1; 16], relay: [0xfb; 16] },
    ];

    fn bytes(message: &Message) -> BytesMut {
        let mut bytes = BytesMut::new();
        message.write(&mut bytes);
        bytes
    }

    /// All messages of these pieces.
    fn scan<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Message> {
        let (mut scanner, mut all) = (Scanner::default(), Vec::new());
        for piece in pieces {
            let mut piece = piece;
            while let Some(message) = scanner.find(piece, Some) {
                all.push(message);
                piece = &[];
            }
        }
        all
    }

    #[test]
    fn a_message_is_found_however_it_is_cut() {
        for message in ALL {
            let bytes = [b"\xfb\xfbdayfly".as_slice(), &bytes(&message), &MAGIC].concat();
            assert!(bytes.len() <= MESSAGE_BYTES_MAX + 24);
            for cut in 0..bytes.len() {
                assert_eq!(scan([&bytes[..cut], &bytes[cut..]]), [message], "cut at {cut}");
            }
            assert_eq!(scan(bytes.chunks(1)), [message]);
        }
    }

    #[test]
    fn a_torn_message_swallows_none() {
        for torn in ALL {
            for whole in ALL {
                let torn = bytes(&torn);
                for cut in 0..torn.len() {
                    let two = [&torn[..cut], &bytes(&whole)].concat();
                    let mut found = Vec::new();
                    let mut scanner = Scanner::default();
                    for piece in two.chunks(7).chain([[0u8; 81].as_slice()]) {
                        assert_eq!(
                            scanner.find(piece, |message| {
                                found.push(message);
                                None::<()>
                            }),
                            None
                        );
                    }
                    assert!(found.contains(&whole), "{torn:?} cut at {cut} hides {whole:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_kept_of_other_bytes_is_bounded() {
        let mut scanner = Scanner::default();
        for piece in [&[0xfb; 5000][..], &MAGIC.repeat(300), &[0xff; 20_000]] {
            assert_eq!(scanner.find(piece, |_| None::<()>), None);
            assert!(scanner.kept.len() <= MESSAGE_BYTES_MAX);
        }
    }

    #[test]
    fn what_stands_behind_a_message_is_the_sessions() {
        let mut scanner = Scanner::default();
        let stream = [b"before".as_slice(), &bytes(&ALL[4]), b"PRI * HTTP/2.0"].concat();
        assert_eq!(scanner.find(&stream, |message| (message == ALL[4]).then_some(())), Some(()));
        assert_eq!(scanner.rest(), b"PRI * HTTP/2.0".as_slice());
    }
}
