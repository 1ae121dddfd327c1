//! What a host says on the stream of a shell: how large its terminal is, and what is typed. What the guest says on it is
//! what the shell prints, byte for byte.
//!
//! ```text
//! kind  length (2 bytes, the higher first)  payload
//!  b     rows, columns (2 bytes each), TERM    once, first
//!  d     what is typed
//!  s     rows, columns                         the terminal has another size
//! ```

/// Bytes that are typed in one frame at most.
pub const TYPED_BYTES_MAX: usize = 4096;

/// Bytes of a payload at most.
const PAYLOAD_BYTES_MAX: usize = TYPED_BYTES_MAX;

/// Characters of `TERM` at most.
const TERM_CHARACTERS_MAX: usize = 64;

/// `TERM` of a terminal that says nothing that could stand in a variable.
const TERM_PLAIN: &str = "xterm";

/// How large a terminal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShellFrame {
    /// A shell is to begin.
    Begin {
        /// Its terminal's.
        size: TerminalSize,
        /// Its terminal's `TERM`.
        term: String,
    },
    /// Somebody types.
    Typed(Vec<u8>),
    /// The terminal has another size.
    Size(TerminalSize),
}

/// What came is no frame; nothing that follows can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what came on a shell's stream is no frame of it")]
pub struct BadFrame;

/// A `TERM` that can stand in a variable, whatever the terminal says.
#[must_use]
pub fn plain_term(term: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    let is_plain = !term.is_empty() && term.len() <= TERM_CHARACTERS_MAX && term.chars().all(plain);
    if is_plain { term } else { TERM_PLAIN }.to_owned()
}

impl ShellFrame {
    /// Its bytes; what is typed in one piece is cut at [`TYPED_BYTES_MAX`].
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let of_size = |size: &TerminalSize| [size.rows.to_be_bytes(), size.columns.to_be_bytes()].concat();
        let (kind, payload) = match self {
            Self::Begin { size, term } => (b'b', [of_size(size), plain_term(term).into_bytes()].concat()),
            Self::Typed(bytes) => (b'd', bytes[..bytes.len().min(TYPED_BYTES_MAX)].to_vec()),
            Self::Size(size) => (b's', of_size(size)),
        };
        let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
        [&[kind][..], &length.to_be_bytes(), &payload].concat()
    }

    fn of(kind: u8, payload: &[u8]) -> Result<Self, BadFrame> {
        let sized = || {
            let [a, b, c, d, rest @ ..] = payload else { return Err(BadFrame) };
            let size = TerminalSize { rows: u16::from_be_bytes([*a, *b]), columns: u16::from_be_bytes([*c, *d]) };
            Ok((size, rest))
        };
        match kind {
            b'b' => {
                let (size, term) = sized()?;
                Ok(Self::Begin { size, term: plain_term(std::str::from_utf8(term).unwrap_or_default()) })
            }
            b'd' => Ok(Self::Typed(payload.to_vec())),
            b's' => match sized()? {
                (size, []) => Ok(Self::Size(size)),
                _ => Err(BadFrame),
            },
            _ => Err(BadFrame),
        }
    }
}

/// Puts frames together that arrive in pieces.
#[derive(Debug, Default)]
pub struct ShellFrames(Vec<u8>);

impl ShellFrames {
    /// More has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole frame; `None`: more has to come.
    ///
    /// # Errors
    /// [`BadFrame`], and whatever follows is nonsense.
    pub fn next_frame(&mut self) -> Result<Option<ShellFrame>, BadFrame> {
        let [kind, high, low, rest @ ..] = self.0.as_slice() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length > PAYLOAD_BYTES_MAX || !matches!(kind, b'b' | b'd' | b's') {
            return Err(BadFrame);
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = ShellFrame::of(*kind, payload)?;
        self.0.drain(..3 + length);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: TerminalSize = TerminalSize { rows: 24, columns: 300 };

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let frames = [
            ShellFrame::Begin { size: SIZE, term: "xterm-256color".into() },
            ShellFrame::Typed(b"ls\r\x03".to_vec()),
            ShellFrame::Size(SIZE),
            ShellFrame::Typed(Vec::new()),
            ShellFrame::Typed(vec![0xff; TYPED_BYTES_MAX]),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(ShellFrame::to_bytes).collect();
        for piece in [1, 2, 7, bytes.len()] {
            let (mut came, mut read) = (ShellFrames::default(), Vec::new());
            for bytes in bytes.chunks(piece) {
                came.push(bytes);
                while let Some(frame) = came.next_frame().unwrap() {
                    read.push(frame);
                }
            }
            assert_eq!(read, frames, "in pieces of {piece}");
        }
    }

    #[test]
    fn nonsense_is_refused_before_it_is_waited_for() {
        for bytes in [&b"x\0\0"[..], b"d\xff\xff", b"s\0\x05\0\x01\0\x02\0", b"s\0\x01\0", b"b\0\x03\0\x01\0"] {
            let mut came = ShellFrames::default();
            came.push(bytes);
            assert_eq!(came.next_frame(), Err(BadFrame), "{bytes:?}");
        }
    }

    #[test]
    fn a_terminal_that_calls_itself_something_odd_is_a_plain_one() {
        for (term, plain) in [("screen.xterm-256color", "screen.xterm-256color"), ("", "xterm"), ("a b", "xterm")] {
            assert_eq!(plain_term(term), plain);
        }
        assert_eq!(plain_term(&"x".repeat(65)), "xterm");
    }
}
