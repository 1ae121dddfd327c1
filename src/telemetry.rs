//! Where do log lines go? To stderr, one event a line, whatever the event says; where that is systemd's journal, with
//! fields ([`journal`]).
//!
//! A thread of its own writes; everybody else only puts lines into a bounded queue. So a journal
//! that stands still, or a pipe that nobody reads, never stops the daemon: lines are dropped and
//! counted instead (threats.md E14). Text that came from a guest or from GitLab cannot forge lines
//! or drive a terminal: control characters are escaped and a line is capped (T21).

mod journal;

use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt::Write as _;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Section `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter of tracing-subscriber.
    pub level: String,
    /// `text` or `json`.
    pub format: Format,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: "info".into(), format: Format::Text }
    }
}

/// Bytes of one log line at most, its line break not counted.
pub const LINE_BYTES_MAX: usize = 8 * 1024;

/// Lines that wait for the writing thread: at most 8 MiB, seconds of the noisiest daemon.
const QUEUE_LINES: usize = 1024;

/// How long the end of the process waits for the last lines.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// Causes that [`chain`] prints; longer chains are circles.
const CHAIN_MAX: usize = 16;

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter makes no sense.
    #[error("`{0}` is no log filter like \"info\" or \"info,dayfly::guest=debug\"")]
    Filter(String),
    /// The writing thread.
    #[error("start the log thread")]
    Thread(#[source] std::io::Error),
    /// Somebody called [`init`] before.
    #[error("set the log up twice")]
    Twice,
}

impl Config {
    /// The filter that `level` stands for.
    ///
    /// # Errors
    /// [`TelemetryError::Filter`].
    pub fn filter(&self) -> Result<EnvFilter, TelemetryError> {
        // An empty text would be a valid filter that shows errors only: surely a slip.
        let bad = || TelemetryError::Filter(self.level.clone());
        if self.level.trim().is_empty() {
            return Err(bad());
        }
        // What h2 has to say a guest can make it say for ever. Who asks for it by name gets it.
        EnvFilter::builder().parse(format!("h2=off,{}", self.level)).map_err(|_| bad())
    }
}

/// Begins logging for this process. Hold the guard until the end: dropping it writes out what waits.
///
/// # Errors
/// [`TelemetryError`].
pub fn init(config: &Config) -> Result<Guard, TelemetryError> {
    let filter = config.filter()?;
    // JSON is for whoever collects stderr, and stays as it is.
    if config.format == Format::Text
        && journal::is_stderr()
        && let Ok(journal) = journal::Journal::connect()
    {
        let sink = Sink::start(journal, config.format).map_err(TelemetryError::Thread)?;
        let guard = Guard(sink.clone());
        let subscriber = tracing_subscriber::registry().with(filter).with(journal::Entries(sink));
        subscriber.try_init().map_err(|_| TelemetryError::Twice)?;
        return Ok(guard);
    }
    let sink = Sink::start(std::io::stderr(), config.format).map_err(TelemetryError::Thread)?;
    let guard = Guard(sink.clone());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(sink);
    match config.format {
        Format::Text => builder.try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_| TelemetryError::Twice)?;
    Ok(guard)
}

/// An error and its causes, `: ` between: the one place that prints chains.
///
/// No error of ours repeats its source, so no text shows twice.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    for _ in 0..CHAIN_MAX {
        let Some(error) = cause else { break };
        // Writing to a String cannot fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Bytes in the words of people: `640.0 KiB`, `1.5 GiB`.
#[must_use]
pub fn sized(bytes: u64) -> String {
    const UNITS: [(&str, u32); 3] = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = UNITS.iter().find(|(_, shift)| bytes >= 1 << shift);
    // Of a number beyond 2^53 a hundredth matters to nobody.
    #[expect(clippy::cast_precision_loss, reason = "rounded to a tenth anyway")]
    let shown = |shift: u32| bytes as f64 / (1_u64 << shift) as f64;
    unit.map_or_else(|| format!("{bytes} bytes"), |(name, shift)| format!("{:.1} {name}", shown(*shift)))
}

/// How long something has lasted, for people: `7 s`, `12 min`, `3 h 5 min`, `2 d 4 h`.
#[must_use]
pub fn lasting(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, ..) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// Writes out what waits when it is dropped, for a second at most.
#[derive(Debug)]
#[must_use = "the last log lines are lost without it"]
pub struct Guard(Sink);

impl Guard {
    /// Lines dropped so far because nobody took them.
    #[must_use]
    pub fn dropped_lines(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let (done, wait) = channel();
        // A full queue means that nobody reads: the last lines would not get out either.
        if self.0.queue.try_send(Message::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(FLUSH_DEADLINE);
        }
    }
}

enum Message {
    Line(Vec<u8>),
    Flush(std::sync::mpsc::Sender<()>),
}

/// The queue's end that everybody writes into.
#[derive(Clone, Debug)]
struct Sink {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
    format: Format,
}

impl Sink {
    fn start(out: impl Write + Send + 'static, format: Format) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel(QUEUE_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = dropped.clone();
        std::thread::Builder::new().name("log".into()).spawn(move || write_lines(out, &lines, &counter))?;
        Ok(Self { queue, dropped, format })
    }

    fn put(&self, raw: &[u8]) {
        self.put_raw(clean(raw, self.format));
    }

    /// The same, of what is as it should be.
    fn put_raw(&self, line: Vec<u8>) {
        match self.queue.try_send(Message::Line(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The thread: ends when the last [`Sink`] is gone. Rust ignores SIGPIPE, so a closed pipe is an
/// error like any other: the line is lost and counted.
fn write_lines(mut out: impl Write, lines: &Receiver<Message>, dropped: &AtomicU64) {
    while let Ok(message) = lines.recv() {
        match message {
            Message::Line(line) => {
                if out.write_all(&line).is_err() {
                    dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            Message::Flush(done) => {
                let _ = out.flush();
                let _ = done.send(());
            }
        }
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = EventWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        EventWriter(self)
    }
}

/// Takes one event: the formatter writes each in a single call.
struct EventWriter<'a>(&'a Sink);

impl Write for EventWriter<'_> {
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        self.0.put(event);
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One event as one line: control and bidi characters escaped, at most [`LINE_BYTES_MAX`] bytes.
fn clean(event: &[u8], format: Format) -> Vec<u8> {
    let text = String::from_utf8_lossy(event);
    let mut line = escape(text.trim_end_matches(['\n', '\r']), format);
    if line.len() > LINE_BYTES_MAX {
        line = match format {
            Format::Text => format!("{} [cut]", prefix(&line, LINE_BYTES_MAX - 6)),
            // What was cut is no JSON any more, so its beginning becomes a string. Escaping makes
            // a text of quotes and backslashes twice as long.
            Format::Json => serde_json::json!({ "cut": prefix(&line, LINE_BYTES_MAX / 2 - 16) }).to_string(),
        };
    }
    line.push('\n');
    line.into_bytes()
}

/// A text that may come from a guest or from GitLab, safe to print on a terminal: one line, control
/// and bidi characters escaped.
#[must_use]
pub fn printable(text: &str) -> String {
    escape(text, Format::Text)
}

fn escape(text: &str, format: Format) -> String {
    let mut line = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        let bidi = matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        // Writing to a String cannot fail.
        let _ = match format {
            _ if !c.is_control() && !bidi => line.write_char(c),
            Format::Text => write!(line, "{}", c.escape_default()),
            // Inside JSON such a character can only stand in a string.
            Format::Json => write!(line, "\\u{:04x}", u32::from(c)),
        };
    }
    line
}

fn prefix(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    #[test]
    fn a_chain_names_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("start VM `df-1`")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("disk is full"));
        assert_eq!(chain(&error), "start VM `df-1`: disk is full");
    }

    /// T21: escape sequences, line breaks, bidi marks.
    #[test]
    fn hostile_text_stays_one_line_of_printable_characters() {
        for format in [Format::Text, Format::Json] {
            let line = clean("job \u{1b}[2J\r\nERROR forged \u{202e}evil \u{9b}1m\0\n".as_bytes(), format);
            let (last, rest) = line.split_last().unwrap();
            assert_eq!(*last, b'\n');
            assert!(rest.iter().all(|b| *b >= 0x20 && *b != 0x7f), "{format:?}: {}", String::from_utf8_lossy(rest));
            assert!(!String::from_utf8_lossy(rest).contains(['\u{202e}', '\u{9b}']));
        }
    }

    /// T21: a megabyte of text.
    #[test]
    fn long_lines_are_cut_and_json_stays_json() {
        let text = clean("é\"".repeat(500_000).as_bytes(), Format::Text);
        assert!(text.len() <= LINE_BYTES_MAX + 1 && text.ends_with(b" [cut]\n"), "{}", text.len());
        let json = clean("\"\\".repeat(500_000).as_bytes(), Format::Json);
        assert!(json.len() <= LINE_BYTES_MAX + 1, "{}", json.len());
        assert!(serde_json::from_slice::<serde_json::Value>(&json).unwrap()["cut"].is_string());
    }

    /// Stands still in its first write until it is let go.
    struct Stuck {
        entered: Sender<()>,
        go: Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.entered.send(());
            // Ends at once when the other end is gone.
            let _ = self.go.recv();
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// E14: a journal that stands still.
    #[test]
    fn a_reader_that_stands_still_costs_lines_but_no_time() {
        let (entered, has_entered) = channel();
        let (let_go, go) = channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Sink::start(Stuck { entered, go, written: written.clone() }, Format::Text).unwrap();
        sink.put(b"first\n");
        has_entered.recv_timeout(Duration::from_secs(10)).unwrap();
        // The thread holds one line, the queue takes its bound, three are too many.
        for _ in 0..QUEUE_LINES + 3 {
            sink.put(b"more\n");
        }
        let guard = Guard(sink);
        assert_eq!(guard.dropped_lines(), 3);
        drop(let_go);
        let (done, wait) = channel();
        // The queue empties now; its flush comes after all lines.
        guard.0.queue.send(Message::Flush(done)).unwrap();
        wait.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(written.lock().unwrap().iter().filter(|b| **b == b'\n').count(), QUEUE_LINES + 1);
    }

    /// E14: a pipe that is closed: no signal kills us.
    #[test]
    fn a_closed_pipe_costs_lines_and_is_counted() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let sink = Sink::start(writer, Format::Text).unwrap();
        sink.put(b"nobody reads this\n");
        let (done, wait) = channel();
        sink.queue.send(Message::Flush(done)).unwrap();
        wait.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(Guard(sink).dropped_lines(), 1);
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_named() {
        for level in ["", " ", "loud=very", "info,dayfly=shout"] {
            assert!(Config { level: level.into(), ..Config::default() }.filter().is_err(), "{level}");
        }
        assert!(Config { level: "info,dayfly::guest=debug".into(), ..Config::default() }.filter().is_ok());
    }
}
