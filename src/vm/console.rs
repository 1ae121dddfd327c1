//! The serial console of a VM: always drained, never trusted, kept to its last 256 KiB.
//!
//! Draining is a duty: a guest whose console nobody reads stands still (threats.md T22). What it
//! printed is shown to people when a VM never came up (V2), so [`Ring::tail`] makes it safe for a
//! trace and a terminal. The job's task owns a [`Console`] and drains it in its own waits; there
//! is nothing shared here.

use super::Stream;
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
pub struct Ring(VecDeque<u8>);

impl Ring {
    /// Appends; the oldest bytes make room.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(RING_BYTES_MAX)..];
        let over = (self.0.len() + bytes.len()).saturating_sub(RING_BYTES_MAX);
        self.0.drain(..over);
        self.0.extend(bytes);
    }

    /// Bytes held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the console has said nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What was printed last, at most `bytes_max` bytes (and 4 KiB) of it, from a line's start
    /// where there is one. Line breaks stay, colours go; other control characters, and those that
    /// turn the direction of writing, are spelt `\u{..}`, bytes that are no UTF-8 `\xNN`.
    #[must_use]
    pub fn tail(&self, bytes_max: usize) -> String {
        let bytes_max = bytes_max.min(TAIL_BYTES_MAX);
        let skipped = self.0.len().saturating_sub(bytes_max);
        let bytes: Vec<u8> = self.0.iter().skip(skipped).copied().collect();
        let text = escaped(&bytes);
        let cut = text.len().saturating_sub(bytes_max);
        if skipped == 0 && cut == 0 {
            return text;
        }
        let cut = (cut..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
        let text = &text[cut..];
        // Half a line at the top would read as a whole one; a tail that is one long line stays.
        match text.split_once('\n') {
            Some((_, rest)) if !rest.is_empty() => rest.to_owned(),
            _ => text.to_owned(),
        }
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
        assert!(console.ring().0.capacity() <= 2 * RING_BYTES_MAX);
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
