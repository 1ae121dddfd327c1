//! What of a guest's bytes may reach an operator's terminal?
//!
//! | let through | why |
//! | --- | --- |
//! | text, line ends, tab, backspace, bell | it is what is looked at |
//! | colours (`m`), cursor, erasing, inserting, scrolling, margins, tab stops | what editors and pagers draw with |
//! | modes 4, and private 1, 6, 7, 12, 25, 47, 1047 to 1049, 2004 | keys, wrapping, the other screen, pasting |
//! | saving and restoring the cursor, keypad, line drawing | likewise |
//!
//! All else is left out: what sets titles, clipboards, links or colours of the palette (OSC), strings to the terminal
//! (DCS, APC, PM), questions whose answer the terminal types (reports, `ESC Z`), windows, printing, mouse and focus
//! reports, resets, 8-bit controls, counts of more than four digits. Marks that turn the direction of writing are spelt.
//! What a guest has changed is put back at the end.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Bytes of the parameters of one sequence at most.
const PARAMETERS_MAX: usize = 64;

/// Characters of a string that is left out, after which a guest that never ends it is text again.
const STRING_MAX: usize = 4096;

/// Private modes that may be set and reset.
const PRIVATE_MODES: [u16; 10] = [1, 6, 7, 12, 25, 47, 1047, 1048, 1049, 2004];

/// Private modes that are on in the beginning.
const ON_AT_FIRST: [u16; 2] = [7, 25];

/// The last characters of sequences without a mark in front that may pass.
const FINALS: &str = "@ABCDEFGHIJKLMPSTXZ`adefgmrsu";

/// Insert or replace.
const INSERT_MODE: &str = "4";

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// Behind an ESC.
    Escape,
    /// Behind ESC and `(` or `)`.
    Charset(char),
    /// Behind ESC and something else that one more character follows.
    LeftOut,
    /// Behind ESC `[`.
    Sequence(String),
    /// In a string that is left out; so many characters of it, and whether the last was an ESC.
    String(usize, bool),
}

/// A filter of one shell's bytes.
#[derive(Debug, Default)]
pub struct Screen {
    state: State,
    /// The beginning of a character.
    partial: Vec<u8>,
    /// What the guest has made other than it was: private modes.
    modes: BTreeSet<u16>,
    margins: bool,
    keypad: bool,
    insert: bool,
}

impl Screen {
    /// What of these bytes may be shown.
    #[must_use]
    pub fn show(&mut self, bytes: &[u8]) -> String {
        let mut shown = String::with_capacity(bytes.len());
        let mut all = std::mem::take(&mut self.partial);
        all.extend_from_slice(bytes);
        let mut chunks = all.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            chunk.valid().chars().for_each(|c| self.take(c, &mut shown));
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            if chunks.peek().is_none() && may_go_on(invalid) {
                self.partial = invalid.to_vec();
            } else {
                self.take(char::REPLACEMENT_CHARACTER, &mut shown);
            }
        }
        shown
    }

    fn take(&mut self, c: char, shown: &mut String) {
        match std::mem::take(&mut self.state) {
            State::Text => self.text(c, shown),
            State::Escape => self.escape(c, shown),
            State::Charset(which) => {
                if matches!(c, '0' | 'B' | 'A') {
                    shown.extend(['\x1b', which, c]);
                }
            }
            State::LeftOut => {}
            State::Sequence(mut so_far) => match c {
                ' '..='?' if so_far.len() < PARAMETERS_MAX => {
                    so_far.push(c);
                    self.state = State::Sequence(so_far);
                }
                '@'..='~' => self.sequence(&so_far, c, shown),
                // It breaks off; a control character counts all the same.
                c if c.is_control() => self.text(c, shown),
                _ => {}
            },
            State::String(count, escaped) => match c {
                '\x07' | '\x18' | '\x1a' | '\u{9c}' => {}
                '\\' if escaped => {}
                c if count >= STRING_MAX => self.text(c, shown),
                c => self.state = State::String(count + 1, c == '\x1b'),
            },
        }
    }

    fn text(&mut self, c: char, shown: &mut String) {
        match c {
            '\x1b' => self.state = State::Escape,
            '\n' | '\r' | '\t' | '\x08' | '\x07' => shown.push(c),
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                shown.extend(c.escape_unicode());
            }
            c if c.is_control() => {}
            c => shown.push(c),
        }
    }

    fn escape(&mut self, c: char, shown: &mut String) {
        match c {
            '[' => self.state = State::Sequence(String::new()),
            ']' | 'P' | 'X' | '^' | '_' => self.state = State::String(0, false),
            '(' | ')' => self.state = State::Charset(c),
            ' '..='/' => self.state = State::LeftOut,
            '\x1b' => self.state = State::Escape,
            '=' | '>' => {
                self.keypad = c == '=';
                shown.extend(['\x1b', c]);
            }
            '7' | '8' | 'D' | 'E' | 'M' => shown.extend(['\x1b', c]),
            _ => {}
        }
    }

    /// A whole sequence: shown, or left out.
    fn sequence(&mut self, parameters: &str, last: char, shown: &mut String) {
        let passes = match parameters.strip_prefix('?') {
            Some(modes) => matches!(last, 'h' | 'l') && self.private_modes(modes, last == 'h'),
            None => match last {
                'h' | 'l' if parameters == INSERT_MODE => {
                    self.insert = last == 'h';
                    true
                }
                'r' if are_numbers(parameters) => {
                    self.margins = !parameters.is_empty();
                    true
                }
                last => FINALS.contains(last) && are_numbers(parameters),
            },
        };
        if passes {
            write!(shown, "\x1b[{parameters}{last}").expect("a String takes all");
        }
    }

    /// Whether all of these modes may be set or reset, which is noted.
    fn private_modes(&mut self, modes: &str, on: bool) -> bool {
        let modes: Option<Vec<u16>> = modes.split(';').map(|mode| mode.parse().ok()).collect();
        let Some(modes) = modes.filter(|modes| modes.iter().all(|mode| PRIVATE_MODES.contains(mode))) else {
            return false;
        };
        for mode in modes {
            if on == ON_AT_FIRST.contains(&mode) {
                self.modes.remove(&mode);
            } else {
                self.modes.insert(mode);
            }
        }
        true
    }

    /// What puts back what the guest has changed.
    #[must_use]
    pub fn end(self) -> String {
        let mut text = String::from("\x1b[0m\x1b(B");
        for mode in &self.modes {
            let letter = if ON_AT_FIRST.contains(mode) { 'h' } else { 'l' };
            write!(text, "\x1b[?{mode}{letter}").expect("a String takes all");
        }
        if self.margins {
            // It moves the cursor.
            text.push_str("\x1b7\x1b[r\x1b8");
        }
        if self.keypad {
            text.push_str("\x1b>");
        }
        if self.insert {
            text.push_str("\x1b[4l");
        }
        text
    }
}

/// Whether these parameters are numbers, and none of them is one that keeps a terminal busy.
fn are_numbers(parameters: &str) -> bool {
    let is_number = |part: &str| part.len() <= 4 && part.bytes().all(|byte| byte.is_ascii_digit());
    parameters.split([';', ':']).all(is_number)
}

/// Whether these are the first bytes of a character.
fn may_go_on(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(bytes: &[u8]) -> String {
        Screen::default().show(bytes)
    }

    #[test]
    fn what_draws_a_screen_passes() {
        for text in [
            "plain grüße €\r\n\ttab\x08\x07",
            "\x1b[1;31mred\x1b[m \x1b[38;2;1;2;3mtrue\x1b[0m \x1b[4:3mcurly",
            "\x1b[2J\x1b[H\x1b[10;20H\x1b[K\x1b[3A\x1b[5;20r\x1b[2L\x1b[4P\x1b[s\x1b[u",
            "\x1b[?1049h\x1b[?25l\x1b[?1;2004h\x1b[?7l\x1b[4h\x1b[4l",
            "\x1b7\x1b8\x1bM\x1bD\x1bE\x1b=\x1b>\x1b(0lqk\x1b(B",
        ] {
            assert_eq!(shown(text.as_bytes()), text);
        }
    }

    #[test]
    fn what_does_more_than_draw_is_left_out() {
        let check = |bytes: &str, expected: &str| assert_eq!(shown(bytes.as_bytes()), expected, "{bytes:?}");
        check("a\x1b]0;title\x07b\x1b]52;c;cm0gLXJm\x1b\\c", "abc");
        check("a\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\b", "alinkb");
        check("a\x1bP$qm\x1b\\b\x1b_x\x1b\\c\x1b^x\x1b\\d\x1bXx\x1b\\e", "abcde");
        check("a\x1b[6n\x1b[c\x1b[>c\x1b[0c\x1bZ\x1b[5n\x1b[21t\x1b[?6n\x1b[x\x1b[=c\x1b[>q\x1b[?$p\x1b[1$r", "a");
        check("a\x1b[5i\x1b[4i\x1bc\x1b[!p\x1b[8;1;1t\x1b[1 q\x1b#8\x1b[20h\x1b[2h\x1b[1b", "a");
        check("a\x1b[?1000h\x1b[?1006h\x1b[?1004h\x1b[?1;1000h\x1b[?2026h\x1b[>4;2m\x1b[<u", "a");
        check("a\x1b[99999X\x1b[1;100000Hb", "ab");
        check("\u{9b}31m\u{9d}0;x\u{9c}\u{90}\x00\x0e\x0f\x18\x7fb", "31m0;xb");
        check("\u{202e}gnp \u{2066}", "\\u{202e}gnp \\u{2066}");
        check("a\x1b[3\nb\x1b[\x1b[1mc", "a\nb\x1b[1mc");
        assert_eq!(shown(b"\xff\xfe ok \xe2\x82"), "\u{fffd}\u{fffd} ok ");
        assert_eq!(shown(&[b"a\x1b[".as_slice(), &[b'1'; 5000], b"mb"].concat()).len(), 5000 - PARAMETERS_MAX - 1 + 3);
        let endless = [b"a\x1b]0;".as_slice(), &[b'x'; 2 * STRING_MAX]].concat();
        assert!(shown(&endless).len() > STRING_MAX / 2, "one that is never ended hides not all that follows");
    }

    #[test]
    fn what_was_changed_is_put_back() {
        let mut screen = Screen::default();
        let _ = screen.show(b"\x1b[?1049h\x1b[?25l\x1b[?2004h\x1b[?2004l\x1b[2;9r\x1b=\x1b[4h");
        assert_eq!(screen.end(), "\x1b[0m\x1b(B\x1b[?25h\x1b[?1049l\x1b7\x1b[r\x1b8\x1b>\x1b[4l");
        assert_eq!(Screen::default().end(), "\x1b[0m\x1b(B");
    }

    proptest! {
        /// However it is cut the same is shown, and nothing of it asks, sets or hides anything.
        #[test]
        fn any_bytes_in_any_pieces_show_the_same_and_only_what_may(
            bytes in prop::collection::vec(
                prop_oneof![Just(0x1b_u8), Just(b'['), Just(b']'), Just(b'?'), Just(b';'), b'0'..=b'9', any::<u8>()],
                0..300,
            ),
            piece in 1_usize..20,
        ) {
            let whole = shown(&bytes);
            let mut screen = Screen::default();
            let pieces: String = bytes.chunks(piece).map(|piece| screen.show(piece)).collect();
            prop_assert_eq!(&whole, &pieces);
            // It is a fixed point: what passed passes.
            prop_assert_eq!(shown(whole.as_bytes()), whole.clone());
            for bad in ["\x1b]", "\x1bP", "\x1b_", "\x1bc", "\x1bZ", "\u{9b}"] {
                prop_assert!(!whole.contains(bad));
            }
        }
    }
}
