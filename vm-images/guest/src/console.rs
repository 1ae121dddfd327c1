//! Words for the serial console, whose last lines the host shows when a machine fails.

use std::error::Error;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

/// The console of the machine, for a child to write to.
///
/// # Errors
/// If there is none.
pub fn open() -> io::Result<File> {
    // Without NOCTTY the console would become the controlling terminal of a session leader.
    let flags = i32::try_from(rustix::fs::OFlags::NOCTTY.bits()).map_err(io::Error::other)?;
    OpenOptions::new().write(true).custom_flags(flags).open("/dev/console")
}

/// One line on the console. Without a console there is nobody to tell.
pub fn say(text: &str) {
    if let Ok(mut console) = open() {
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let _ = console.write_all(format!("dayfly-guest: {line}\r\n").as_bytes());
    }
}

/// An error with all its causes, `what: why: why`.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, ": {error}").expect("a String takes all");
        cause = error.source();
    }
    text
}
