//! What the developer sees: the job's trace on stdout, our own words on stderr.
//!
//! Writing blocks, on purpose: nobody but `exec`'s own main thread waits for a slow terminal, the
//! daemon's tasks are on others. A reader that is gone (`| head`) is no reason to end a job.

use super::terminal::Terminal;
use dayfly::telemetry::printable;
use std::io::{IsTerminal as _, Write};

/// The two streams.
pub struct Screen {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    colours: bool,
    terminal: Terminal,
}

impl Screen {
    /// The process's own. Colours if stdout is a terminal and nobody objects (<https://no-color.org>).
    #[must_use]
    pub fn of_process() -> Self {
        let out = std::io::stdout();
        let objected = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let colours = out.is_terminal() && !objected;
        Self::new(Box::new(out), Box::new(std::io::stderr()), colours)
    }

    /// These streams.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>, colours: bool) -> Self {
        Self { out, err, colours, terminal: Terminal::new(colours) }
    }

    /// The next job's trace begins.
    pub(super) fn begin_trace(&mut self) {
        self.end_line();
        self.terminal = Terminal::new(self.colours);
    }

    /// More of the trace.
    pub(super) fn trace(&mut self, bytes: &[u8]) {
        let text = self.terminal.feed(bytes);
        self.print(&text);
    }

    /// One line that was asked for, on stdout; it may hold words of others.
    pub(super) fn show(&mut self, line: &str) {
        self.end_line();
        self.print(&format!("{}\n", printable(line)));
    }

    /// One line of our own, which may hold words of others.
    pub(super) fn say(&mut self, line: &str) {
        self.end_line();
        // Nobody can be told that nobody can be told.
        let _ = writeln!(self.err, "dayfly: {}", printable(line));
    }

    /// The trace's last line ends, so that what follows stands on one of its own.
    pub(super) fn end_line(&mut self) {
        let text = self.terminal.finish();
        self.print(&text);
    }

    fn print(&mut self, text: &str) {
        if !text.is_empty() {
            // A reader that is gone: the job goes on, its artifacts and exit code are wanted.
            let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        }
    }
}
