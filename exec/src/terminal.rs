//! A job's trace as a developer's terminal may see it.
//!
//! Each line of the trace begins with a header of 32 bytes (time, stream, whether it goes on with the
//! line before); headers and section marks go, colours stay. A runner may cut a line anywhere and go on behind the
//! next header: gitlab-runner 17.5 does so after every return, in the middle of its section marks; 19.3 after the
//! mark. So marks and returns are read in the line that the pieces make together. The job is a stranger to this terminal
//! (threats.md T21): of all control sequences only colours (SGR) and "erase to the end of the line"
//! pass, so nothing can move the cursor up, set a title, paste, or hide what stands there.
//! Where stdout is no terminal, no control sequence passes at all.

use std::borrow::Cow;

/// A header: 27 characters of time, a space, stream in two hex digits, `O` or `E`, and a space or `+`.
const HEADER_BYTES: usize = 32;
/// Bytes of one line held back; a longer one is passed on in pieces.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a section mark at most, its options included: they are looked for at every `section_`.
const MARK_BYTES_MAX: usize = 1024;
/// Parameters of a colour at most: `38;2;255;255;255;48;2;255;255;255` has 33 characters.
const SGR_BYTES_MAX: usize = 64;

/// Turns a trace, in pieces of any size, into text.
#[derive(Debug)]
pub(super) struct Terminal {
    colours: bool,
    /// An incomplete line of the trace.
    line: Vec<u8>,
    /// The first line decides whether lines have headers, as in GitLab's own viewer.
    has_headers: Option<bool>,
    /// A line has been shown without its end: the next may go on with it.
    open: bool,
    /// The line being read began in an earlier piece, its header is gone.
    in_line: bool,
    /// The end of what came of this line: a return, or what may become a section mark.
    held: Vec<u8>,
    /// A colour may be on.
    coloured: bool,
    state: State,
    /// The bytes of a character or sequence that is incomplete.
    pending: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ground,
    /// After ESC.
    Escape,
    /// After ESC `[`.
    Sequence,
    /// After ESC `]` and its like: to be swallowed until BEL or ESC `\`.
    Text,
}

impl Terminal {
    pub(super) fn new(colours: bool) -> Self {
        Self {
            colours,
            line: Vec::new(),
            has_headers: None,
            open: false,
            in_line: false,
            held: Vec::new(),
            coloured: false,
            state: State::Ground,
            pending: Vec::new(),
        }
    }

    /// The text of the next bytes of the trace.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> String {
        let mut out = String::new();
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.last() == Some(&b'\n') || self.line.len() >= LINE_BYTES_MAX {
                self.flush_line(&mut out);
            }
        }
        out
    }

    /// Ends the text: what is held back, the last line's end, colours off. The trace may go on after it.
    pub(super) fn finish(&mut self) -> String {
        let mut out = String::new();
        if !self.line.is_empty() {
            self.flush_line(&mut out);
        }
        self.end_line(&mut out);
        out
    }

    fn flush_line(&mut self, out: &mut String) {
        let line = std::mem::take(&mut self.line);
        let (text, ended) = match line.strip_suffix(b"\n") {
            Some(text) => (text, true),
            None => (line.as_slice(), false),
        };
        let text = if std::mem::replace(&mut self.in_line, !ended) {
            text
        } else {
            let header = header(text);
            let has_headers = *self.has_headers.get_or_insert(header.is_some());
            match header.filter(|_| has_headers) {
                Some(continues) => {
                    if !continues {
                        self.end_line(out);
                    }
                    text.get(HEADER_BYTES..).unwrap_or_default()
                }
                None => {
                    self.end_line(out);
                    text
                }
            }
        };
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(text);
        let Unmarked { shown, held, marks } = without_marks(&held);
        // A line of marks alone is none.
        self.open |= !shown.is_empty() || marks == 0 && held.is_empty();
        self.render(&shown, out);
        self.held = held.to_vec();
    }

    fn end_line(&mut self, out: &mut String) {
        let held = std::mem::take(&mut self.held);
        if !held.is_empty() {
            // A return at the very end is a line break of another system; a mark that never came is text.
            self.open = true;
            self.render(held.strip_suffix(b"\r").unwrap_or(&held), out);
        }
        self.finish_character(out);
        self.state = State::Ground;
        self.pending.clear();
        if std::mem::take(&mut self.open) {
            if std::mem::take(&mut self.coloured) {
                out.push_str("\u{1b}[0m");
            }
            out.push('\n');
        }
    }

    fn render(&mut self, text: &[u8], out: &mut String) {
        for byte in text {
            match (self.state, byte) {
                (State::Ground, 0x1b) => {
                    self.finish_character(out);
                    self.state = State::Escape;
                }
                (State::Ground, _) => self.character(*byte, out),
                (State::Escape, b'[') => self.state = State::Sequence,
                (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => self.state = State::Text,
                // Intermediate bytes come before the one that ends it: `ESC ( B`.
                (State::Escape, 0x20..=0x2f) => {}
                (State::Escape, _) => self.state = State::Ground,
                (State::Sequence, 0x20..=0x3f) => {
                    if self.pending.len() <= SGR_BYTES_MAX {
                        self.pending.push(*byte);
                    }
                }
                (State::Sequence, _) => {
                    let parameters = std::mem::take(&mut self.pending);
                    self.sequence(&parameters, *byte, out);
                    self.state = State::Ground;
                }
                (State::Text, 0x07) => self.state = State::Ground,
                (State::Text, 0x1b) => self.state = State::Escape,
                (State::Text, _) => {}
            }
        }
    }

    /// A complete `ESC [ parameters final`.
    fn sequence(&mut self, parameters: &[u8], last: u8, out: &mut String) {
        let plain =
            parameters.len() <= SGR_BYTES_MAX && parameters.iter().all(|b| matches!(b, b'0'..=b'9' | b';' | b':'));
        let erase = last == b'K' && matches!(parameters, b"" | b"0");
        if self.colours && plain && (last == b'm' || erase) {
            out.push_str("\u{1b}[");
            out.push_str(&String::from_utf8_lossy(parameters));
            out.push(char::from(last));
            self.coloured |= last == b'm';
        }
    }

    /// One byte of text. Characters of several bytes may come in pieces, so they are collected.
    fn character(&mut self, byte: u8, out: &mut String) {
        if byte.is_ascii() {
            self.finish_character(out);
            match byte {
                b'\t' | 0x20..=0x7e => out.push(char::from(byte)),
                b'\r' => out.push(if self.colours { '\r' } else { '\n' }),
                _ => {}
            }
            return;
        }
        if byte >= 0xc0 {
            self.finish_character(out);
        }
        self.pending.push(byte);
        if std::str::from_utf8(&self.pending).is_ok() || self.pending.len() >= 4 {
            self.finish_character(out);
        }
    }

    /// Shows the collected bytes: a character, or what stands for a broken one.
    fn finish_character(&mut self, out: &mut String) {
        if self.state != State::Ground || self.pending.is_empty() {
            return;
        }
        let bytes = std::mem::take(&mut self.pending);
        match std::str::from_utf8(&bytes) {
            Ok(text) => out.extend(text.chars().filter(|c| !is_unsafe(*c))),
            Err(_) => out.push(char::REPLACEMENT_CHARACTER),
        }
    }
}

/// Control characters beyond ASCII, and those that turn the direction of writing: text would read
/// as something else than it is.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

/// Whether the line has a header (docs/protocol.md, log line format), and whether it goes on with the
/// line before.
fn header(line: &[u8]) -> Option<bool> {
    let header = line.get(..HEADER_BYTES)?;
    let fits =
        header.iter().zip(b"0000-00-00T00:00:00.000000Z xxO ").enumerate().all(|(at, (byte, form))| match (at, form) {
            (30, _) => matches!(byte, b'O' | b'E'),
            (31, _) => matches!(byte, b' ' | b'+'),
            (_, b'0') => byte.is_ascii_digit(),
            (_, b'x') => byte.is_ascii_hexdigit(),
            (_, form) => byte == form,
        });
    fits.then(|| header.last() == Some(&b'+'))
}

/// A piece of a line without its section marks.
struct Unmarked<'a> {
    /// What is shown.
    shown: Cow<'a, [u8]>,
    /// The end of it, which only what comes next can decide.
    held: &'a [u8],
    /// Marks taken out.
    marks: usize,
}

/// What follows a mark: a return, and the erasing of what stood there.
const MARK_END: &[u8] = b"\r\x1b[0K";

/// Takes out `section_start:TIME:NAME[OPTIONS]` and `section_end:TIME:NAME`, each with the return
/// and the erasing that follow.
fn without_marks(text: &[u8]) -> Unmarked<'_> {
    const BEGIN: &[u8] = b"section_";
    let mut kept: Option<Vec<u8>> = None;
    let (mut rest, mut from, mut marks) = (text, 0, 0);
    let held = loop {
        let Some(at) = find(rest.get(from..).unwrap_or_default(), BEGIN).map(|at| at + from) else {
            // The beginning of a mark's first word, or a return.
            let tail = (1..BEGIN.len()).rev().find(|n| rest.ends_with(BEGIN.get(..*n).unwrap_or_default()));
            break tail.unwrap_or(usize::from(rest.ends_with(b"\r")));
        };
        let mark = rest.get(at..).unwrap_or_default();
        match read_mark(mark.get(..MARK_BYTES_MAX).unwrap_or(mark)) {
            Mark::Whole(length) => {
                kept.get_or_insert_default().extend_from_slice(rest.get(..at).unwrap_or_default());
                rest = mark.get(length..).unwrap_or_default();
                (from, marks) = (0, marks + 1);
            }
            Mark::Begun if mark.len() < MARK_BYTES_MAX => break mark.len(),
            Mark::Begun | Mark::None => from = at + 1,
        }
    };
    let (last, held) = rest.split_at(rest.len().saturating_sub(held));
    let shown = match kept {
        Some(mut kept) => {
            kept.extend_from_slice(last);
            Cow::Owned(kept)
        }
        None => Cow::Borrowed(last),
    };
    Unmarked { shown, held, marks }
}

/// What a text begins with.
#[derive(Debug, PartialEq, Eq)]
enum Mark {
    /// A mark of so many bytes, its end included.
    Whole(usize),
    /// The beginning of one.
    Begun,
    None,
}

fn read_mark(text: &[u8]) -> Mark {
    /// `rest` after `wanted`; or `Begun` if it ends within, `None` if it is something else.
    fn after<'a>(rest: &'a [u8], wanted: &[u8]) -> Result<&'a [u8], Mark> {
        match rest.strip_prefix(wanted) {
            Some(rest) => Ok(rest),
            None if wanted.starts_with(rest) => Err(Mark::Begun),
            None => Err(Mark::None),
        }
    }
    /// `rest` after one byte or more for which `fits` holds.
    fn some(rest: &[u8], fits: impl Fn(&u8) -> bool) -> Result<&[u8], Mark> {
        let count = rest.iter().take_while(|b| fits(b)).count();
        let rest = rest.get(count..).unwrap_or_default();
        match (count, rest) {
            (_, []) => Err(Mark::Begun),
            (0, _) => Err(Mark::None),
            _ => Ok(rest),
        }
    }
    let read = || -> Result<usize, Mark> {
        let rest = match after(text, b"section_start:") {
            Err(Mark::None) => after(text, b"section_end:")?,
            other => other?,
        };
        let rest = some(rest, u8::is_ascii_digit)?;
        let rest = after(rest, b":")?;
        let rest = some(rest, |b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))?;
        let rest = if rest.starts_with(b"[") {
            match find(rest, b"]\r\x1b[0K") {
                Some(at) => rest.get(at + 1..).unwrap_or_default(),
                None => return Err(Mark::Begun),
            }
        } else {
            rest
        };
        after(rest, MARK_END).map(|rest| text.len() - rest.len())
    };
    read().map_or_else(|none| none, Mark::Whole)
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|w| w == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2026-01-31T12:34:56.123456Z";

    /// The trace comes out as expected, whole and byte by byte.
    fn check(colours: bool, trace: &str, expected: &str) {
        check_bytes(colours, trace.as_bytes(), expected);
    }

    fn check_bytes(colours: bool, trace: &[u8], expected: &str) {
        for size in [trace.len().max(1), 1, 7] {
            let mut terminal = Terminal::new(colours);
            let mut shown: String = trace.chunks(size).map(|piece| terminal.feed(piece)).collect();
            shown.push_str(&terminal.finish());
            assert_eq!(shown, expected, "{size} bytes at once of {:?}", String::from_utf8_lossy(trace));
        }
    }

    #[test]
    fn headers_go_and_continued_lines_are_joined() {
        check(
            true,
            &format!("{TIME} 00O one\n{TIME} 01E two \n{TIME} 01O+and a half\n{TIME} 00O Job succeeded\n"),
            "one\ntwo and a half\nJob succeeded\n",
        );
        check(true, &format!("{TIME} 00O \n{TIME} 0fO x"), "\nx\n");
        check(true, "no header\n\nlast", "no header\n\nlast\n");
        check(true, &format!("no header\n{TIME} 00O kept\n"), &format!("no header\n{TIME} 00O kept\n"));
        check(true, &format!("{TIME} 00O one\nodd\n{TIME} 00X odd\n"), &format!("one\nodd\n{TIME} 00X odd\n"));
        check(true, "", "");
    }

    #[test]
    fn a_line_is_shown_when_it_is_complete_and_its_end_when_the_next_begins() {
        let mut terminal = Terminal::new(true);
        assert_eq!(terminal.feed(format!("{TIME} 01O wait").as_bytes()), "");
        assert_eq!(terminal.feed(b"ing...\n"), "waiting...");
        assert_eq!(terminal.feed(format!("{TIME} 01O+ done\n").as_bytes()), " done");
        assert_eq!(terminal.finish(), "\n");
        assert_eq!(terminal.finish(), "");
    }

    /// U46: marks go wherever a runner has cut the line, with the pieces of 17.5 and of 19.3 as they were recorded
    #[test]
    fn marks_are_read_across_the_headers_of_both_generations() {
        // gitlab-runner 17.5 (recording i8_timestamps_on): cut after the return, before the erasing.
        check(
            false,
            &format!(
                "{TIME} 00O \u{1b}[0KRunning with gitlab-runner 17.5.0 (HEAD)\u{1b}[0;m\n\
                 {TIME} 00O section_start:1795253220:prepare_executor\r\n\
                 {TIME} 00O+\u{1b}[0K\u{1b}[0K\u{1b}[36;1mPreparing the \"shell\" executor\u{1b}[0;m\u{1b}[0;m\n\
                 {TIME} 00O \u{1b}[0KUsing Shell (bash) executor...\u{1b}[0;m\n\
                 {TIME} 00O section_end:1795253220:prepare_executor\r\n\
                 {TIME} 00O+\u{1b}[0Ksection_start:1795253220:prepare_script\r\n\
                 {TIME} 00O+\u{1b}[0K\u{1b}[0K\u{1b}[36;1mPreparing environment\u{1b}[0;m\u{1b}[0;m\n\
                 {TIME} 01O Running on vm...\n\
                 {TIME} 00O section_end:1795253226:step_script\r\n\
                 {TIME} 00O+\u{1b}[0K\n\
                 {TIME} 00O \u{1b}[32;1mJob succeeded\u{1b}[0;m\n"
            ),
            "Running with gitlab-runner 17.5.0 (HEAD)\nPreparing the \"shell\" executor\nUsing Shell (bash) executor...\n\
             Preparing environment\nRunning on vm...\nJob succeeded\n",
        );
        // 19.3: cut after the erasing.
        check(
            false,
            &format!(
                "{TIME} 00O section_start:1795253221:prepare_executor\r\u{1b}[0K\n\
                 {TIME} 00O+\u{1b}[0K\u{1b}[36;1mPreparing the \"shell\" executor\u{1b}[0;m\u{1b}[0;m\n\
                 {TIME} 00O section_end:1795253221:prepare_executor\r\u{1b}[0K\n\
                 {TIME} 00O+section_start:1795253221:prepare_script\r\u{1b}[0K\n\
                 {TIME} 00O+\u{1b}[0K\u{1b}[36;1mPreparing environment\u{1b}[0;m\u{1b}[0;m\n\
                 {TIME} 00O section_end:1795253226:cleanup_file_variables\r\u{1b}[0K\n\
                 {TIME} 00O \u{1b}[32;1mJob succeeded\u{1b}[0;m\n"
            ),
            "Preparing the \"shell\" executor\nPreparing environment\nJob succeeded\n",
        );
        // A long line is cut after 8 KiB, wherever that is.
        let mark = "section_start:17:my-part.1[collapsed=true,hide_duration=true]\r\u{1b}[0K";
        for at in 1..mark.len() {
            let (one, two) = mark.split_at(at);
            check(false, &format!("{TIME} 01O a{one}\n{TIME} 01O+{two}b\n{TIME} 01O c\n"), "ab\nc\n");
        }
        // Whatever only looks like one stays, and waits for no more than its own line.
        check(
            false,
            &format!("{TIME} 01O section_start:1:a\r\n{TIME} 01O b section_\n{TIME} 01O+end\n{TIME} 01O sec"),
            "section_start:1:a\nb section_end\nsec\n",
        );
        let long = format!("section_start:1:a[{}", "x".repeat(2 * MARK_BYTES_MAX));
        check(false, &long, &format!("{long}\n"));
    }

    /// U46: a progress bar's returns are kept where a runner cuts the line after each
    #[test]
    fn returns_are_read_across_headers_too() {
        let bar = format!("{TIME} 01O 10%\r\n{TIME} 01O+20%\r\n{TIME} 01O+30%\r\n{TIME} 01O done\r\n");
        check(true, &bar, "10%\r20%\r30%\ndone\n");
        check(false, &bar, "10%\n20%\n30%\ndone\n");
    }

    #[test]
    fn section_marks_go() {
        check(
            true,
            "section_start:1560896352:get_sources[collapsed=true]\r\u{1b}[0K\u{1b}[36;1mGetting source\u{1b}[0;m\nsection_end:1560896353:get_sources\r\u{1b}[0Ksection_start:1:x\r\u{1b}[0Kx\n",
            "\u{1b}[36;1mGetting source\u{1b}[0;m\u{1b}[0m\nx\n",
        );
        for text in ["section_start:", "section_start:1:a b", "section_middle:1:a", "my section_end:x:a"] {
            check(false, &format!("{text}\r\u{1b}[0Kx"), &format!("{text}\nx\n"));
        }
    }

    #[test]
    fn colours_pass_to_a_terminal_and_nothing_else() {
        check(true, "\u{1b}[31;1mred\u{1b}[0m", "\u{1b}[31;1mred\u{1b}[0m\u{1b}[0m\n");
        check(true, "10%\r20%\u{1b}[K\r30%\u{1b}[0K", "10%\r20%\u{1b}[K\r30%\u{1b}[0K\n");
        check(false, "\u{1b}[31mred\u{1b}[0m \u{1b}[K10%\r20%\r\n", "red 10%\n20%\n");
        for hostile in [
            "\u{1b}[2J",
            "\u{1b}[1;1H",
            "\u{1b}[5A",
            "\u{1b}[1K",
            "\u{1b}[?1049h",
            "\u{1b}[>4;2m",
            "\u{1b}c",
            "\u{1b}(0",
            "\u{1b}]0;title\u{7}",
            "\u{1b}]52;c;ZXZpbA==\u{1b}\\",
            "\u{1b}P+q\u{1b}\\",
            "\u{1b}_x\u{1b}\\",
            "\u{7}",
            "\u{8}",
            "\u{e}",
            "\u{7f}",
            "\u{9b}",
            "\u{85}",
            "\u{202e}",
            "\u{b}",
            "\u{c}",
            "\u{0}",
            "\u{1b}[6n",
            "\u{1b}[\u{1b}",
            "\u{1b}\u{1b}",
        ] {
            check(true, &format!("a{hostile}b"), "ab\n");
            check(false, &format!("a{hostile}b"), "ab\n");
        }
        check(true, &format!("a\u{1b}[{}mb", "1;".repeat(40)), "ab\n");
    }

    #[test]
    fn an_open_sequence_ends_with_its_line() {
        check(true, "a\u{1b}]0;never ended\nb\n", "a\nb\n");
        check(true, "a\u{1b}[31\nmb", "a\nmb\n");
        check(true, "\u{1b}[8mhidden\nnot hidden", "\u{1b}[8mhidden\u{1b}[0m\nnot hidden\n");
    }

    #[test]
    fn characters_in_pieces_are_put_together() {
        check(true, &format!("{TIME} 01O grün 火🔥\n"), "grün 火🔥\n");
        let mut split = format!("{TIME} 01O gr").into_bytes();
        split.extend_from_slice(&[0xc3, b'\n']);
        split.extend_from_slice(format!("{TIME} 01O+").as_bytes());
        split.extend_from_slice(&[0xbc, b'n', b'\n']);
        check_bytes(true, &split, "grün\n");
        check_bytes(true, b"a\xffb\xc3\n\xe2\x82c", "a\u{fffd}b\u{fffd}\n\u{fffd}c\n");
    }

    #[test]
    fn a_line_without_end_is_passed_on() {
        let mut terminal = Terminal::new(true);
        let shown = terminal.feed(&vec![b'x'; 3 * LINE_BYTES_MAX + 5]);
        assert!(shown.len() >= LINE_BYTES_MAX && terminal.line.len() < 2 * LINE_BYTES_MAX, "{}", shown.len());
        let rest = terminal.finish();
        assert_eq!(shown.len() + rest.len(), 3 * LINE_BYTES_MAX + 6);
    }
}
