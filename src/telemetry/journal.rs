//! Log lines as entries of systemd's journal, with fields that can be asked for: `journalctl -u dayfly JOB=42`.
//!
//! Where stderr is the journal ([`is_stderr`]), each event goes there by the journal's own protocol: one datagram of
//! `KEY=value` lines. What is written is the thread's of the parent module, so a journal that stands still costs lines and
//! no time; the crate `tracing-journald` sends from the caller's thread, which it would stop.

use super::{LINE_BYTES_MAX, Sink, prefix, printable};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// Fields that get a key of their own. `key` is a job's of a runner entry: `ci/42`.
const KNOWN: [&str; 5] = ["job", "runner", "vm", "project", "key"];

/// Whether this process's stderr is the journal's, as systemd says it (`JOURNAL_STREAM`: device and inode).
pub(super) fn is_stderr() -> bool {
    let Ok(found) = rustix::fs::fstat(io::stderr()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", found.st_dev, found.st_ino))
}

/// The journal, as something that takes one entry at each write.
#[derive(Debug)]
pub(super) struct Journal(UnixDatagram);

impl Journal {
    pub(super) fn connect() -> io::Result<Self> {
        Self::at(Path::new(SOCKET))
    }

    fn at(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        Ok(Self(socket))
    }
}

impl io::Write for Journal {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        self.0.send(entry)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes an entry of each event, and gives it to the thread that writes.
pub(super) struct Entries(pub(super) Sink);

/// What a span or an event says.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    /// The others, as they stand in a plain line.
    text: String,
    known: BTreeMap<&'static str, String>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: &str, quoted: &dyn fmt::Debug) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
            return;
        }
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{}{}={quoted:?}", if self.text.is_empty() { "" } else { " " }, field.name());
        if let Some(known) = KNOWN.into_iter().find(|known| *known == field.name()) {
            self.known.insert(known, value.to_owned());
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format!("{value:?}"), value);
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Entries {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut known = BTreeMap::new();
        let mut line = String::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(fields) = span.extensions().get::<Fields>() {
                known.extend(fields.known.iter().map(|(key, value)| (*key, value.clone())));
                let _ = write!(line, "{}{{{}}}: ", span.name(), fields.text);
            }
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        known.extend(fields.known);
        let _ = write!(line, "{} {}", fields.message, fields.text);
        self.0.put_raw(entry(*event.metadata().level(), event.metadata().target(), line.trim_end(), &known));
    }
}

/// One entry. No value has a line break in it, so none needs the journal's form for bytes.
fn entry(level: Level, target: &str, line: &str, known: &BTreeMap<&'static str, String>) -> Vec<u8> {
    let priority = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    };
    let line = printable(line);
    let line = if line.len() > LINE_BYTES_MAX { format!("{} [cut]", prefix(&line, LINE_BYTES_MAX - 6)) } else { line };
    let mut entry = format!("PRIORITY={priority}\nSYSLOG_IDENTIFIER=dayfly\nTARGET={target}\nMESSAGE={line}\n");
    let mut put = |key: &str, value: &str| {
        let value = printable(value);
        let _ = writeln!(entry, "{key}={}", prefix(&value, LINE_BYTES_MAX));
    };
    for (key, value) in known {
        match (*key, value.rsplit_once('/')) {
            ("key", Some((runner, job))) => {
                put("RUNNER", runner);
                put("JOB", job);
            }
            ("job", _) => put("JOB", value),
            ("runner", _) => put("RUNNER", value),
            ("vm", _) => put("VM", value),
            ("project", _) => put("PROJECT", value),
            _ => {}
        }
    }
    entry.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Format, Guard};
    use std::time::Duration;
    use tracing_subscriber::layer::SubscriberExt as _;

    /// An event in a job's span has the job's fields, and what a guest has written forges none.
    #[test]
    fn an_entry_has_the_fields_of_its_job_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = UnixDatagram::bind(&path).unwrap();
        journal.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let sink = Sink::start(Journal::at(&path).unwrap(), Format::Text).unwrap();
        let guard = Guard(sink.clone());
        let subscriber = tracing_subscriber::registry().with(Entries(sink));
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("job", runner = "ci", job = %42, project = Some("group/app"));
            let _in_job = span.enter();
            tracing::warn!(vm = %"abc", text = "x\nJOB=1\n\u{1b}[2J", "the machine says\nPRIORITY=0");
            drop(_in_job);
            tracing::info!(key = %"other/runner/7", "GitLab assigned a job");
        });
        let entry = || {
            let mut bytes = [0; 4096];
            let length = journal.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..length].to_vec()).unwrap()
        };
        let first = entry();
        let lines: Vec<&str> = first.lines().collect();
        assert_eq!(lines[..2], ["PRIORITY=4", "SYSLOG_IDENTIFIER=dayfly"]);
        assert!(
            lines[3].starts_with(
                "MESSAGE=job{runner=\"ci\" job=42 project=\"group/app\"}: the machine says\\nPRIORITY=0 vm=abc"
            ),
            "{first}"
        );
        assert_eq!(lines[4..], ["JOB=42", "PROJECT=group/app", "RUNNER=ci", "VM=abc"]);
        let second = entry();
        assert!(second.starts_with("PRIORITY=6\n") && second.ends_with("\nRUNNER=other/runner\nJOB=7\n"), "{second}");
        assert_eq!(guard.dropped_lines(), 0);
    }
}
