//! Where does a chunked body end? A strict reader of RFC 9112 §7.1's framing, for [`super::wire`].
//!
//! It only follows the body to its end, so that the next head is found where hyper finds it; hyper
//! decodes. It refuses more than hyper does (bare line feeds, space after the size), never less.

use super::head::is_token;

/// Bytes of one chunk's extensions at most; nobody sends any.
const EXTENSION_BYTES_MAX: usize = 256;
/// Bytes of all trailers at most; they are dropped.
const TRAILER_BYTES_MAX: usize = 4 * 1024;
/// Lines of trailers at most, as of a head's fields: hyper counts them too.
const TRAILERS_MAX: usize = super::head::FIELDS_MAX;
/// Hex digits of a chunk's size at most: below 2^60, so that no sum of ours overflows.
const SIZE_DIGITS_MAX: u32 = 15;

/// The framing is broken; the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChunk;

/// Follows one body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks(State);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Size {
        size: u64,
        digits: u32,
    },
    Extension {
        size: u64,
        bytes: usize,
    },
    SizeEnd {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// At the start of a line behind the last chunk; `seen` stands before it.
    TrailerStart {
        seen: Trailers,
    },
    TrailerName {
        seen: Trailers,
    },
    TrailerValue {
        seen: Trailers,
    },
    TrailerLf {
        seen: Trailers,
    },
    LastLf,
    Done,
}

/// How much of trailers there was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Trailers {
    lines: usize,
    bytes: usize,
}

impl Trailers {
    fn one_more_byte(self) -> Result<Self, BadChunk> {
        if self.bytes < TRAILER_BYTES_MAX { Ok(Self { bytes: self.bytes + 1, ..self }) } else { Err(BadChunk) }
    }

    fn one_more_line(self) -> Result<Self, BadChunk> {
        if self.lines < TRAILERS_MAX { Ok(Self { lines: self.lines + 1, ..self }) } else { Err(BadChunk) }
    }
}

impl Default for Chunks {
    fn default() -> Self {
        Self::new()
    }
}

impl Chunks {
    /// At the start of a body.
    #[must_use]
    pub fn new() -> Self {
        Self(State::Size { size: 0, digits: 0 })
    }

    /// Whether the body's last byte was seen.
    pub fn is_done(&self) -> bool {
        self.0 == State::Done
    }

    /// Follows `bytes`; returns how many of them belong to the body.
    pub fn follow(&mut self, bytes: &[u8]) -> Result<usize, BadChunk> {
        let mut at = 0;
        while at < bytes.len() && !self.is_done() {
            if let State::Data { left } = &mut self.0 {
                let taken = usize::try_from(*left).map_or(bytes.len() - at, |left| left.min(bytes.len() - at));
                *left -= taken as u64;
                at += taken;
                if *left == 0 {
                    self.0 = State::DataCr;
                }
                continue;
            }
            self.0 = self.0.after(bytes[at])?;
            at += 1;
        }
        Ok(at)
    }
}

impl State {
    fn after(self, byte: u8) -> Result<Self, BadChunk> {
        let text = matches!(byte, b'\t' | b' '..=b'~');
        Ok(match (self, byte) {
            (Self::Size { size, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < SIZE_DIGITS_MAX => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Self::Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Self::Size { size, digits: 1.. }, b'\r') => Self::SizeEnd { size },
            (Self::Size { size, digits: 1.. }, b';') => Self::Extension { size, bytes: 1 },
            (Self::Extension { size, .. }, b'\r') => Self::SizeEnd { size },
            (Self::Extension { size, bytes }, _) if text && bytes < EXTENSION_BYTES_MAX => {
                Self::Extension { size, bytes: bytes + 1 }
            }
            (Self::SizeEnd { size: 0 }, b'\n') => Self::TrailerStart { seen: Trailers::default() },
            (Self::SizeEnd { size }, b'\n') => Self::Data { left: size },
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { size: 0, digits: 0 },
            (Self::TrailerStart { .. }, b'\r') => Self::LastLf,
            // hyper reads them as fields of a head, and so do we: a line that is none breaks the body.
            (Self::TrailerStart { seen }, _) if is_token(byte) => {
                Self::TrailerName { seen: seen.one_more_line()?.one_more_byte()? }
            }
            (Self::TrailerName { seen }, b':') => Self::TrailerValue { seen: seen.one_more_byte()? },
            (Self::TrailerName { seen }, _) if is_token(byte) => Self::TrailerName { seen: seen.one_more_byte()? },
            (Self::TrailerValue { seen }, b'\r') => Self::TrailerLf { seen },
            (Self::TrailerValue { seen }, _) if text => Self::TrailerValue { seen: seen.one_more_byte()? },
            (Self::TrailerLf { seen }, b'\n') => Self::TrailerStart { seen },
            (Self::LastLf, b'\n') => Self::Done,
            _ => return Err(BadChunk),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows `text` whole and byte by byte; both must agree.
    fn check(text: &str, expected: Result<usize, BadChunk>) {
        let mut whole = Chunks::new();
        let once = whole.follow(text.as_bytes());
        let mut slow = Chunks::new();
        let mut sum = Ok(0);
        for byte in text.as_bytes() {
            sum = sum.and_then(|sum| slow.follow(&[*byte]).map(|taken| sum + taken));
        }
        assert_eq!(once, sum, "{text:?}");
        match expected {
            Ok(end) => assert!(once == Ok(end) && whole.is_done() && slow.is_done(), "{text:?}: {once:?}"),
            Err(bad) => assert_eq!(once, Err(bad), "{text:?}"),
        }
    }

    #[test]
    fn a_body_ends_where_its_last_chunk_says() {
        check("0\r\n\r\n", Ok(5));
        check("3\r\nabc\r\n0\r\n\r\nGET /", Ok(13));
        check("0a;x=y\r\n0123456789\r\n00\r\nT: v\r\n\r\n!", Ok(32));
    }

    proptest::proptest! {
        /// B13: a body of any chunks, with anything behind it, ends where its last chunk says,
        /// however it is cut.
        #[test]
        fn how_a_body_is_cut_into_pieces_does_not_matter(
            chunks in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 1..40), 0..6),
            behind in proptest::collection::vec(proptest::num::u8::ANY, 0..20),
            cuts in proptest::collection::vec(1_usize..30, 0..40),
        ) {
            let mut bytes = Vec::new();
            for chunk in &chunks {
                bytes.extend(format!("{:X}\r\n", chunk.len()).into_bytes());
                bytes.extend(chunk);
                bytes.extend(b"\r\n");
            }
            bytes.extend(b"0\r\n\r\n");
            let end = bytes.len();
            bytes.extend(behind);
            let (mut body, mut taken, mut at) = (Chunks::new(), 0, 0);
            for cut in cuts.into_iter().chain([bytes.len()]) {
                let until = bytes.len().min(at + cut);
                taken += body.follow(&bytes[at..until]).unwrap();
                at = until;
                if body.is_done() {
                    break;
                }
            }
            proptest::prop_assert!(body.is_done());
            proptest::prop_assert_eq!(taken, end);
        }

        /// B13: any bytes: no panic, and an end is only seen behind a last chunk.
        #[test]
        fn no_bytes_confuse_it(bytes in "[0-9a-f;x\\r\\n]{0,60}") {
            let mut body = Chunks::new();
            if let Ok(taken) = body.follow(bytes.as_bytes()) && body.is_done() {
                proptest::prop_assert!(bytes.as_bytes()[..taken].ends_with(b"\r\n"));
            }
        }
    }

    #[test]
    fn broken_framing_is_refused() {
        for text in [
            "\r\n",
            "x",
            "0x2\r\n",
            "3 \r\n",
            "3\nabc",
            "3\r\nabcd",
            "3\r\nabc\n",
            "-1\r\n",
            "1000000000000000\r\n",
            "0\r\n\n",
            "0\r\nT: v\n",
            ";\r\n",
            "0\r\nno colon\r\n",
            "0\r\n: no name\r\n",
            "0\r\nA : b\r\n",
            "0\r\n folded: x\r\n",
        ] {
            check(text, Err(BadChunk));
        }
        check(&format!("1;{}", "x".repeat(EXTENSION_BYTES_MAX + 1)), Err(BadChunk));
        check(&format!("0\r\n{}", "x".repeat(TRAILER_BYTES_MAX + 1)), Err(BadChunk));
        check(&format!("0\r\n{}", "a:\r\n".repeat(TRAILERS_MAX + 1)), Err(BadChunk));
        let most = format!("0\r\n{}\r\n", "a:\r\n".repeat(TRAILERS_MAX));
        check(&most, Ok(most.len()));
    }
}
