//! Asks the operator, on a terminal only: a line, or a secret that is not shown.

use crate::secret::Secret;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::{self, IsTerminal as _, Read, Write as _};

/// Bytes of an answer; a token has some sixty.
const ANSWER_BYTES_MAX: usize = 1024;

/// Whether there is somebody to ask.
pub(super) fn possible() -> bool {
    io::stdin().is_terminal()
}

/// Asks for a line; an empty answer is `default`, where there is one.
pub(super) fn line(question: &str, default: Option<&str>) -> io::Result<String> {
    let hint = default.map_or(String::new(), |default| format!(" [{default}]"));
    loop {
        ask(&format!("{question}{hint}: "))?;
        let mut answer = String::new();
        if io::stdin().read_line(&mut answer)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no answer"));
        }
        match (answer.trim(), default) {
            ("", Some(default)) => return Ok(default.to_owned()),
            ("", None) => {}
            (answer, _) => return Ok(answer.to_owned()),
        }
    }
}

/// Asks for a secret: what is typed is not shown.
pub(super) fn secret(question: &str) -> io::Result<Secret> {
    ask(&format!("{question} (not shown): "))?;
    let quiet = Quiet::begin()?;
    let answer = read_keys(&mut io::stdin().lock());
    drop(quiet);
    ask("\n")?;
    answer
}

fn ask(text: &str) -> io::Result<()> {
    let mut out = io::stderr();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The terminal shows nothing and hands over each key, Ctrl-C too, so that no way out of the prompt
/// leaves it mute. Dropping this restores it.
struct Quiet(Termios);

impl Quiet {
    fn begin() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // If this fails the terminal is gone, and nobody minds its modes.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

/// Keys up to Enter, with backspace and Ctrl-U doing what they do elsewhere.
fn read_keys(keys: &mut impl Read) -> io::Result<Secret> {
    const CTRL_C: u8 = 3;
    const CTRL_D: u8 = 4;
    const CTRL_U: u8 = 21;
    let mut answer: Vec<u8> = Vec::new();
    let mut key = [0];
    loop {
        match (keys.read(&mut key)?, key[0]) {
            (0, _) | (_, b'\n' | b'\r' | CTRL_D) => break,
            (_, CTRL_C) => return Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted")),
            (_, CTRL_U) => answer.clear(),
            (_, 8 | 127) => drop(answer.pop()),
            _ if answer.len() >= ANSWER_BYTES_MAX => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "answer is too long"));
            }
            (_, byte) => answer.push(byte),
        }
    }
    let answer =
        String::from_utf8(answer).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "answer is no text"))?;
    Ok(Secret::new(answer))
}

#[cfg(test)]
mod tests {
    use super::read_keys;

    #[test]
    fn keys_become_the_answer() {
        for (keys, answer) in
            [("glrt-abc\n", "glrt-abc"), ("x\x15glrt-b\x7fabc\rrest", "glrt-abc"), ("\x08a\x04", "a"), ("", "")]
        {
            assert_eq!(read_keys(&mut keys.as_bytes()).unwrap().expose(), answer);
        }
    }

    #[test]
    fn ctrl_c_and_floods_end_the_prompt() {
        assert!(read_keys(&mut "glrt\x03".as_bytes()).is_err());
        assert!(read_keys(&mut "a".repeat(2_000).as_bytes()).is_err());
    }
}
