//! Makes UTF-8 of a stream: bytes that are none become U+FFFD, characters cut between two reads are kept.

/// The end of the last read, if it may be the beginning of a character.
#[derive(Default)]
pub(crate) struct Utf8 {
    tail: Vec<u8>,
}

impl Utf8 {
    /// Takes bytes and gives back text.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut input = std::mem::take(&mut self.tail);
        input.extend_from_slice(bytes);
        let mut out = Vec::with_capacity(input.len());
        let mut chunks = input.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            out.extend_from_slice(chunk.valid().as_bytes());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let may_go_on = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if may_go_on && chunks.peek().is_none() {
                self.tail = invalid.to_vec();
            } else {
                out.extend_from_slice("\u{fffd}".as_bytes());
            }
        }
        out
    }

    /// The stream has ended: half a character is none.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        match std::mem::take(&mut self.tail).is_empty() {
            true => Vec::new(),
            false => "\u{fffd}".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reads: &[&[u8]], expected: &str) {
        let mut utf8 = Utf8::default();
        let mut out: Vec<u8> = reads.iter().flat_map(|read| utf8.push(read)).collect();
        out.extend(utf8.finish());
        assert_eq!(String::from_utf8(out).expect("UTF-8"), expected);
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced() {
        check(&[b"bad\xffutf8", b" \xe2\x28"], "bad\u{fffd}utf8 \u{fffd}(");
    }

    #[test]
    fn a_character_cut_between_two_reads_is_kept() {
        check(&[b"ok \xe2\x9c", b"\x93!"], "ok ✓!");
    }

    #[test]
    fn half_a_character_at_the_end_is_replaced() {
        check(&[b"cut \xe2\x9c"], "cut \u{fffd}");
    }
}
