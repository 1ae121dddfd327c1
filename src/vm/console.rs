//! The serial console of a VM: always drained, never trusted, kept to its last 256 KiB.
//!
//! Draining is a duty: a guest whose console nobody reads stands still (threats.md T22). What it
//! printed is shown to people when a VM never came up (V2), so [`Ring::tail`] makes it safe for a
//! trace and a terminal. The job's task owns a [`Console`] and drains it in its own waits; there
//! is nothing shared here.

use super::Stream;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io;
use tokio::io::AsyncReadExt as _;

/// Bytes of console kept. A Debian boot with all its messages prints about 60 KiB.
pub const RING_BYTES_MAX: usize = 256 * 1024;

/// Bytes of tail shown at most, after escaping.
pub const TAIL_BYTES_MAX: usize = 4 * 1024;

/// The last bytes that a console printed.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    held: VecDeque<u8>,
    /// Bytes in all.
    printed: u64,
    /// Ends of rows in all.
    rows: u64,
}

/// Whole rows of a console, as they are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// Escaped as [`Ring::tail`] does.
    pub text: String,
    /// Bytes that the console has printed up to their end: where to go on.
    pub next: u64,
    /// Rows that it has ended up to there.
    pub rows: u64,
    /// Bytes before them that were asked for and are not held any more.
    pub lost: u64,
}

impl Ring {
    /// Appends; the oldest bytes make room.
    pub fn push(&mut self, bytes: &[u8]) {
        self.printed = self.printed.saturating_add(bytes.len() as u64);
        self.rows = self.rows.saturating_add(ends(bytes));
        let bytes = &bytes[bytes.len().saturating_sub(RING_BYTES_MAX)..];
        let over = (self.held.len() + bytes.len()).saturating_sub(RING_BYTES_MAX);
        self.held.drain(..over);
        self.held.extend(bytes);
    }

    /// Bytes held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether the console has said nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Rows that it has ended in all.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Whole rows from where `from` bytes were printed, at most `bytes_max` bytes of them before they are escaped; a row
    /// that is longer comes in pieces, and the last one if `to_the_end`. A `from` beyond what was printed is of another
    /// machine: it begins anew.
    #[must_use]
    pub fn rows_from(&self, from: u64, bytes_max: usize, to_the_end: bool) -> Rows {
        let first = self.printed - self.held.len() as u64;
        let from = if from > self.printed { 0 } else { from };
        let begin = from.max(first);
        let skipped = usize::try_from(begin - first).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = self.held.iter().skip(skipped).take(bytes_max).copied().collect();
        let is_last = skipped.saturating_add(bytes.len()) >= self.held.len();
        let whole = match bytes.iter().rposition(|byte| *byte == b'\n') {
            _ if is_last && to_the_end => bytes.len(),
            Some(at) => at + 1,
            None if is_last => 0,
            None => bytes.len(),
        };
        let after = self.held.iter().skip(skipped.saturating_add(whole)).filter(|byte| **byte == b'\n').count();
        Rows {
            text: escaped(&bytes[..whole]),
            next: begin.saturating_add(whole as u64),
            rows: self.rows.saturating_sub(after as u64),
            lost: begin - from,
        }
    }

    /// What was printed last, at most `bytes_max` bytes (and 4 KiB) of it, from a line's start
    /// where there is one. Line breaks stay, colours go; other control characters, and those that
    /// turn the direction of writing, are spelt `\u{..}`, bytes that are no UTF-8 `\xNN`.
    #[must_use]
    pub fn tail(&self, bytes_max: usize) -> String {
        let bytes_max = bytes_max.min(TAIL_BYTES_MAX);
        let skipped = self.held.len().saturating_sub(bytes_max);
        let bytes: Vec<u8> = self.held.iter().skip(skipped).copied().collect();
        let text = escaped(&bytes);
        if skipped == 0 { last_rows(&text, bytes_max).to_owned() } else { from_a_row(&text, bytes_max).to_owned() }
    }
}

fn ends(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The end of a text of rows, at most `bytes_max` bytes of it, from a row's start where there is one.
#[must_use]
pub fn last_rows(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max { text } else { from_a_row(text, bytes_max) }
}

/// The same of a text that begins in the middle of a row.
fn from_a_row(text: &str, bytes_max: usize) -> &str {
    let cut = text.len().saturating_sub(bytes_max);
    let cut = (cut..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
    let text = &text[cut..];
    // Half a row at the top would read as a whole one; a tail that is one long row stays.
    match text.split_once('\n') {
        Some((_, rest)) if !rest.is_empty() => rest,
        _ => text,
    }
}

fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        let mut rest = chunk.valid();
        while let Some(c) = rest.chars().next() {
            if let Some(after) = after_colour(rest) {
                rest = after;
                continue;
            }
            rest = &rest[c.len_utf8()..];
            match c {
                '\n' => text.push('\n'),
                '\r' if rest.starts_with('\n') => {}
                '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                    text.extend(c.escape_unicode())
                }
                c if c.is_control() => text.extend(c.escape_unicode()),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            write!(text, "\\x{byte:02x}").expect("a String takes all");
        }
    }
    text
}

/// What follows a change of colour, if the text begins with one.
fn after_colour(text: &str) -> Option<&str> {
    let parameters = text.strip_prefix("\x1b[")?;
    parameters.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').strip_prefix('m')
}

/// A console connection and what came through it.
pub struct Console {
    stream: Option<Box<dyn Stream>>,
    ring: Ring,
}

impl Console {
    /// Takes over a connection, see [`super::sockets::Sockets::console`].
    #[must_use]
    pub fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream: Some(stream), ring: Ring::default() }
    }

    /// What it has said.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Reads for as long as the console is open: until the VM is gone (then `Ok`, at once also
    /// when called again) or the connection fails.
    ///
    /// # Errors
    /// Whatever the connection reports.
    ///
    /// # Cancel safety
    /// Safe: what was read is in the ring; drop it and call again.
    pub async fn drain(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        while let Some(stream) = &mut self.stream {
            match stream.read(&mut chunk).await {
                Ok(0) => self.stream = None,
                Ok(n) => self.ring.push(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.stream = None;
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt as _;

    fn ring(bytes: &[u8]) -> Ring {
        let mut ring = Ring::default();
        ring.push(bytes);
        ring
    }

    #[test]
    fn the_tail_is_safe_for_a_terminal() {
        let check = |bytes: &[u8], expected: &str| assert_eq!(ring(bytes).tail(4096), expected);
        check(b"", "");
        check(b"one\r\ntwo\r\n", "one\ntwo\n");
        check(b"a\rb\x1b[2Jred\x07\x00", "a\\u{d}b\\u{1b}[2Jred\\u{7}\\u{0}");
        check(b"\x1b[0;33mred\x1b[m \x1b[3", "red \\u{1b}[3");
        check("\u{202e}gnp.exe \u{2067}\u{85}".as_bytes(), "\\u{202e}gnp.exe \\u{2067}\\u{85}");
        check(b"\xff\xfe ok \xe2\x82", "\\xff\\xfe ok \\xe2\\x82");
        check("grüße €\n".as_bytes(), "grüße €\n");
    }

    #[test]
    fn a_long_console_is_cut_at_a_line() {
        let lines: String = (0..10_000).map(|i| format!("line {i}\n")).collect();
        let tail = ring(lines.as_bytes()).tail(100);
        assert!(tail.len() <= 100 && tail.starts_with("line 99") && tail.ends_with("line 9999\n"), "{tail}");
        assert_eq!(ring(&[b'x'; 5000]).tail(usize::MAX).len(), TAIL_BYTES_MAX);
    }

    /// Who follows a console gets each row once, also where it printed more than is held.
    #[test]
    fn rows_are_read_piece_by_piece() {
        let mut ring = ring(b"one\ntwo\nthr");
        let piece = ring.rows_from(0, 100, false);
        assert_eq!((piece.text.as_str(), piece.next, piece.rows, piece.lost), ("one\ntwo\n", 8, 2, 0));
        ring.push(b"ee\n\x1b[31mfour");
        let piece = ring.rows_from(piece.next, 100, false);
        assert_eq!((piece.text.as_str(), piece.next, piece.rows), ("three\n", 14, 3));
        assert_eq!(ring.rows_from(piece.next, 100, false).text, "");
        assert_eq!(ring.rows_from(piece.next, 100, true).text, "four");
        assert_eq!(ring.rows_from(0, 6, false).text, "one\n", "whole rows, as far as they go");
        assert_eq!(ring.rows_from(0, 2, false).text, "on", "a long row in pieces");
        assert_eq!(ring.rows_from(4000, 6, false).text, "one\n", "another machine's");
        ring.push(&[b'x'; RING_BYTES_MAX]);
        ring.push(b"\nend\n");
        let piece = ring.rows_from(14, 2 * RING_BYTES_MAX, false);
        assert!(piece.text.ends_with("x\nend\n") && piece.lost > 0 && piece.rows == ring.rows(), "{}", piece.lost);
        assert_eq!(piece.next, 14 + 9 + RING_BYTES_MAX as u64 + 5);
    }

    /// T22: a gibibyte, and a ring that stays as it is.
    #[tokio::test]
    async fn t22_a_gibibyte_of_console_is_drained_into_a_bounded_ring() {
        let (mut guest, host) = tokio::io::duplex(64 * 1024);
        let mut console = Console::new(Box::new(host));
        let flood = async move {
            for _ in 0..16 * 1024 {
                guest.write_all(&[b'!'; 64 * 1024]).await.unwrap();
            }
            guest.write_all(b"\nlast words").await.unwrap();
        };
        let ((), drained) = tokio::join!(flood, console.drain());
        drained.unwrap();
        assert_eq!(console.ring().len(), RING_BYTES_MAX);
        assert!(console.ring().held.capacity() <= 2 * RING_BYTES_MAX);
        assert_eq!(console.ring().tail(4096), "last words");
    }

    #[tokio::test]
    async fn a_drain_that_is_dropped_loses_nothing() {
        let (mut guest, host) = tokio::io::duplex(64);
        let mut console = Console::new(Box::new(host));
        for word in ["one ", "two ", "three"] {
            guest.write_all(word.as_bytes()).await.unwrap();
            tokio::select! {
                biased; // the drain first, so that it reads; both are cancel safe
                _ = console.drain() => unreachable!("the guest is there"),
                () = tokio::task::yield_now() => {}
            }
        }
        drop(guest);
        console.drain().await.unwrap();
        console.drain().await.unwrap();
        assert_eq!(console.ring().tail(4096), "one two three");
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_bounded_clean_tail(bytes: Vec<u8>, repeat in 1_usize..200, bytes_max in 0_usize..10_000) {
            let mut ring = Ring::default();
            for _ in 0..repeat {
                ring.push(&bytes);
            }
            let tail = ring.tail(bytes_max);
            prop_assert!(tail.len() <= bytes_max.min(TAIL_BYTES_MAX));
            prop_assert!(tail.chars().all(|c| c == '\n' || !c.is_control()));
            prop_assert!(ring.len() <= RING_BYTES_MAX);
        }
    }
}
