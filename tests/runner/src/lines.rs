//! Puts the runner's time stamps in front of lines: `2026-01-31T12:34:56.123456Z 01O text`.
//!
//! As recorded from 19.3: a line is held back until its line break, and carries the time at which it began; a write that
//! has a carriage return but no line break goes out whole, and what follows it is marked `+`, a continuation; a line
//! longer than 8 KiB goes out in pieces marked likewise.

use jiff::Timestamp;

/// Bytes of one line held back at most.
const HELD_BYTES_MAX: usize = 8 * 1024;

/// Which program wrote: the runner itself, or the job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// `00O`.
    Runner,
    /// `01O`.
    JobOut,
    /// `01E`.
    JobErr,
}

/// One stream on its way into the log.
pub(crate) struct Lines {
    source: Source,
    timestamps: bool,
    held: Vec<u8>,
    began: Timestamp,
    continued: bool,
}

impl Lines {
    /// A stream at its beginning. Without `timestamps`, bytes pass as they come.
    pub(crate) fn new(source: Source, timestamps: bool) -> Self {
        Self { source, timestamps, held: Vec::new(), began: Timestamp::UNIX_EPOCH, continued: false }
    }

    /// Takes one write of the stream, at time `now`, and gives back what belongs into the log.
    pub(crate) fn push(&mut self, bytes: &[u8], now: Timestamp) -> Vec<u8> {
        if !self.timestamps {
            return bytes.to_vec();
        }
        let mut out = Vec::with_capacity(bytes.len() + 64);
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.hold(&rest[..end], now);
            self.emit(&mut out);
            self.continued = false;
            rest = &rest[end + 1..];
        }
        if rest.is_empty() {
            return out;
        }
        self.hold(rest, now);
        if rest.contains(&b'\r') || self.held.len() > HELD_BYTES_MAX {
            self.emit(&mut out);
            self.continued = true;
        }
        out
    }

    /// The stream has ended: gives back what was held.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        if !self.held.is_empty() {
            self.emit(&mut out);
        }
        out
    }

    fn hold(&mut self, bytes: &[u8], now: Timestamp) {
        if self.held.is_empty() {
            self.began = now;
        }
        self.held.extend_from_slice(bytes);
    }

    fn emit(&mut self, out: &mut Vec<u8>) {
        let stream = match self.source {
            Source::Runner => "00O",
            Source::JobOut => "01O",
            Source::JobErr => "01E",
        };
        let mark = if self.continued { '+' } else { ' ' };
        let header = format!("{} {stream}{mark}", self.began.strftime("%Y-%m-%dT%H:%M:%S.%6fZ"));
        out.extend_from_slice(header.as_bytes());
        out.append(&mut self.held);
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T1: &str = "2026-01-31T12:34:56.000123Z";

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn check(source: Source, writes: &[&[u8]], expected: &str) {
        let mut lines = Lines::new(source, true);
        let mut out = Vec::new();
        for write in writes {
            out.extend(lines.push(write, time(T1)));
        }
        out.extend(lines.finish());
        let expected = expected.replace("T1", T1);
        assert_eq!(String::from_utf8(out).expect("UTF-8"), expected);
    }

    #[test]
    fn a_line_waits_for_its_end() {
        check(Source::JobOut, &[b"ab", b"c\nd"], "T1 01O abc\nT1 01O d\n");
    }

    #[test]
    fn a_line_carries_the_time_of_its_beginning() {
        let mut lines = Lines::new(Source::JobErr, true);
        assert!(lines.push(b"dots", time(T1)).is_empty());
        let out = lines.push(b"...\n", time("2026-01-31T12:40:00Z"));
        assert_eq!(String::from_utf8(out).expect("UTF-8"), format!("{T1} 01E dots...\n"));
    }

    #[test]
    fn a_section_marker_is_a_line_and_what_follows_continues_it() {
        check(
            Source::Runner,
            &[b"section_start:1:x\r\x1b[0K", b"Title\n", b"more\n"],
            "T1 00O section_start:1:x\r\x1b[0K\nT1 00O+Title\nT1 00O more\n",
        );
    }

    #[test]
    fn carriage_returns_inside_a_whole_line_change_nothing() {
        check(Source::JobOut, &[b"progress 1\rprogress 2\r\nnext\n"], "T1 01O progress 1\rprogress 2\r\nT1 01O next\n");
    }

    #[test]
    fn a_long_line_goes_out_in_pieces() {
        let long = vec![b'x'; HELD_BYTES_MAX + 1];
        let text = String::from_utf8(long.clone()).expect("ASCII");
        check(Source::JobOut, &[&long, b"end\n"], &format!("T1 01O {text}\nT1 01O+end\n"));
    }

    #[test]
    fn without_timestamps_bytes_pass_as_they_come() {
        let mut lines = Lines::new(Source::JobOut, false);
        assert_eq!(lines.push(b"a\rb", time(T1)), b"a\rb");
        assert_eq!(lines.push(b"c\n", time(T1)), b"c\n");
    }
}
