//! Where did a job's bytes go? One line of JSON for each destination, in a file that the daemon opens and reads.
//!
//! ```text
//! {"version":1}
//! {"name":"deb.debian.org","port":443,"address":"151.101.2.132","verdict":"allowed","connections":3,"up":812,"down":93211}
//! {"name":"db.corp","port":0,"verdict":"refused","reason":"private","refused":1}
//! ```
//!
//! A later line of the same name, port and address replaces an earlier one, so that a file is only appended to; when it
//! would grow beyond its bound it is written anew. What is beyond the bound of destinations is summed up in one without
//! name and address. Port 0: a name that was asked for, and whose answer was withheld.

use crate::policy::{Reason, host_name};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::IpAddr;

/// Bytes of the file at most.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Destinations with a line of their own at most; all of them fit into the file.
pub const DESTINATIONS_MAX: usize = 1000;

/// The version of the file, in its first line.
const VERSION: u32 = 1;

/// Whether something was refused of a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All of it was reached, or failed of itself.
    #[default]
    Allowed,
    /// By the policy.
    Refused,
}

/// What a job had to do with one name, port and address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// The name that the address counted for: of the TLS hello, or the last one that the VM was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// 0: only asked for.
    #[serde(default)]
    pub port: u16,
    /// `None`: only asked for, or many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Whether something of it was refused.
    #[serde(default)]
    pub verdict: Outcome,
    /// Why, the last time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// That were made.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub connections: u64,
    /// That the policy refused; questions, where the port is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub refused: u64,
    /// That the far end refused, or did not answer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed: u64,
    /// Bytes that the job sent.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub up: u64,
    /// Bytes that it received.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub down: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Destination {
    /// What is beyond [`DESTINATIONS_MAX`], summed up.
    #[must_use]
    pub fn is_rest(&self) -> bool {
        self.key() == Key::default()
    }

    fn key(&self) -> Key {
        Key { name: self.name.clone(), port: self.port, address: self.address }
    }

    /// Counts a refusal.
    pub(crate) fn refuse(&mut self, reason: Reason) {
        self.refused = self.refused.saturating_add(1);
        self.verdict = Outcome::Refused;
        self.reason = Some(reason);
    }
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Key {
    name: Option<String>,
    port: u16,
    address: Option<IpAddr>,
}

/// The destinations in such a file, in the order in which they came up. Lines that are none are left out, and a name that
/// is none: whoever faces a guest has written it.
#[must_use]
pub fn read(bytes: &[u8]) -> Vec<Destination> {
    let mut table = Table::default();
    for line in bytes.split(|byte| *byte == b'\n') {
        // The first one has no port, and says no more than its version.
        if line.is_empty() || line.starts_with(br#"{"version""#) {
            continue;
        }
        let Ok(mut destination) = serde_json::from_slice::<Destination>(line) else { continue };
        destination.name = destination.name.and_then(|name| host_name(&name));
        let at = table.place(destination.key());
        if let Some(known) = table.list.get_mut(at)
            && known.key() == destination.key()
        {
            *known = destination;
        }
    }
    table.list
}

/// Destinations by their keys.
#[derive(Default)]
struct Table {
    list: Vec<Destination>,
    places: HashMap<Key, usize>,
}

impl Table {
    /// Where this one stands; if there are too many, where the rest does.
    fn place(&mut self, key: Key) -> usize {
        if let Some(at) = self.places.get(&key) {
            return *at;
        }
        if self.list.len() >= DESTINATIONS_MAX && key != Key::default() {
            return self.place(Key::default());
        }
        let at = self.list.len();
        let Key { name, port, address } = key.clone();
        self.list.push(Destination { name, port, address, ..Destination::default() });
        self.places.insert(key, at);
        at
    }
}

/// Writes such a file.
pub struct Log {
    file: File,
    bytes: u64,
    table: Table,
    /// Which have changed since they were written; in order, each once.
    changed: Vec<usize>,
    states: Vec<State>,
}

/// Of what is written of a destination.
#[derive(Clone, Copy, Default)]
struct State {
    /// It stands in [`Log::changed`].
    changed: bool,
    /// It was counted there, and is to be written now and then.
    counted: bool,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

impl Log {
    /// Goes on with this file, which is open for reading and appending: an earlier process of the same VM may have begun it.
    ///
    /// # Errors
    /// The system's.
    pub fn open(mut file: File) -> io::Result<Self> {
        let mut bytes = Vec::new();
        // Who opened it may have read it.
        file.rewind()?;
        (&mut file).take(2 * FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        let mut table = Table::default();
        for destination in read(&bytes) {
            let at = table.place(destination.key());
            table.list[at] = destination;
        }
        let first = match bytes.last() {
            None => format!("{{\"version\":{VERSION}}}\n"),
            // Cut in the middle of a line.
            Some(last) if *last != b'\n' => "\n".to_owned(),
            Some(_) => String::new(),
        };
        file.write_all(first.as_bytes())?;
        let bytes = (bytes.len() + first.len()) as u64;
        let states = vec![State::default(); table.list.len()];
        Ok(Self { file, bytes, table, changed: Vec::new(), states })
    }

    /// Where this destination stands. The name must be a host's, in lower case.
    pub(crate) fn place(&mut self, name: Option<&str>, port: u16, address: Option<IpAddr>) -> usize {
        let at = self.table.place(Key { name: name.map(str::to_owned), port, address });
        self.states.resize(self.table.list.len(), State::default());
        at
    }

    /// Changes the destination at this place, to be written with the next [`Log::flush`].
    pub(crate) fn note(&mut self, at: usize, change: impl FnOnce(&mut Destination)) {
        self.count(at, change);
        self.mark(at);
    }

    /// As [`Log::note`], but to be written whenever something else of it changes, or after [`Log::mark_counted`].
    pub(crate) fn count(&mut self, at: usize, change: impl FnOnce(&mut Destination)) {
        if let (Some(destination), Some(state)) = (self.table.list.get_mut(at), self.states.get_mut(at)) {
            change(destination);
            state.counted = true;
        }
    }

    /// To be written with the next [`Log::flush`].
    pub(crate) fn mark(&mut self, at: usize) {
        if let Some(state) = self.states.get_mut(at)
            && !state.changed
        {
            state.changed = true;
            self.changed.push(at);
        }
    }

    /// All that was counted since it was last written is to be written with the next [`Log::flush`].
    pub(crate) fn mark_counted(&mut self) {
        for at in 0..self.states.len() {
            if self.states[at].counted {
                self.mark(at);
            }
        }
    }

    /// Writes what has changed. What could not be written stays changed.
    ///
    /// # Errors
    /// The system's, as of a full disk.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.changed.is_empty() {
            return Ok(());
        }
        let mut lines = Vec::new();
        for at in &self.changed {
            write_line(&mut lines, &self.table.list[*at]);
        }
        if self.bytes + lines.len() as u64 > FILE_BYTES_MAX {
            lines = format!("{{\"version\":{VERSION}}}\n").into_bytes();
            for destination in &self.table.list {
                write_line(&mut lines, destination);
            }
            self.file.set_len(0)?;
            self.bytes = 0;
        }
        let written = self.file.write_all(&lines);
        if written.is_err() {
            // How much of it is there, nobody knows: the next time begins with a line of its own, or all anew.
            self.bytes = FILE_BYTES_MAX;
            return written;
        }
        self.bytes += lines.len() as u64;
        for at in self.changed.drain(..) {
            self.states[at] = State::default();
        }
        Ok(())
    }
}

fn write_line(into: &mut Vec<u8>, destination: &Destination) {
    // Plain data: it cannot fail.
    if serde_json::to_writer(&mut *into, destination).is_ok() {
        into.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Special;

    fn file() -> (tempfile::NamedTempFile, File) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = File::options().read(true).append(true).open(named.path()).unwrap();
        (named, file)
    }

    fn content(named: &tempfile::NamedTempFile) -> Vec<u8> {
        std::fs::read(named.path()).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let (named, file) = file();
        let mut log = Log::open(file).unwrap();
        let address = Some("151.101.2.132".parse().unwrap());
        let debian = log.place(Some("deb.debian.org"), 443, address);
        log.note(debian, |to| to.connections += 1);
        let db = log.place(Some("db.corp"), 0, None);
        log.note(db, |to| to.refuse(Reason::Special(Special::Private)));
        log.flush().unwrap();
        log.count(debian, |to| to.down += 93_211);
        log.flush().unwrap();
        assert_eq!(read(&content(&named))[0].down, 0, "nothing has been marked");
        log.mark_counted();
        log.mark(debian);
        log.flush().unwrap();
        let lines = String::from_utf8(content(&named)).unwrap();
        assert_eq!(
            lines,
            r#"{"version":1}
{"name":"deb.debian.org","port":443,"address":"151.101.2.132","verdict":"allowed","connections":1}
{"name":"db.corp","port":0,"verdict":"refused","reason":"private","refused":1}
{"name":"deb.debian.org","port":443,"address":"151.101.2.132","verdict":"allowed","connections":1,"down":93211}
"#
        );
        let destinations = read(lines.as_bytes());
        assert_eq!(destinations.len(), 2);
        assert_eq!(destinations[0].down, 93_211);
        assert_eq!(destinations[1].reason, Some(Reason::Special(Special::Private)));
        // The next process of the same VM goes on counting, also behind a line that was cut.
        std::fs::write(named.path(), &lines[..lines.len() - 5]).unwrap();
        let mut log = Log::open(File::options().read(true).append(true).open(named.path()).unwrap()).unwrap();
        let again = log.place(Some("deb.debian.org"), 443, address);
        log.note(again, |to| to.connections += 1);
        log.flush().unwrap();
        let destinations = read(&content(&named));
        assert_eq!((destinations.len(), destinations[0].connections), (2, 2));
    }

    /// However much a job reaches, file and memory have their bounds, and nothing is lost of the sums.
    #[test]
    fn more_destinations_than_there_may_be_are_summed_up() {
        let (named, file) = file();
        let mut log = Log::open(file).unwrap();
        for round in 0..20u32 {
            for n in 0..5000u32 {
                let address = IpAddr::V4((n + 0x0101_0101).into());
                let name = format!("{}.{}.example", "n".repeat(63), n);
                let at = log.place(Some(&name), 443, Some(address));
                log.note(at, |to| to.up += u64::from(n % 7));
            }
            log.flush().unwrap();
            let bytes = content(&named);
            assert!(bytes.len() as u64 <= FILE_BYTES_MAX, "{}", bytes.len());
            let destinations = read(&bytes);
            assert_eq!(destinations.len(), DESTINATIONS_MAX + 1);
            assert!(destinations[DESTINATIONS_MAX].is_rest());
            let sum: u64 = destinations.iter().map(|to| to.up).sum();
            assert_eq!(sum, u64::from(round + 1) * (0..5000).map(|n| n % 7).sum::<u64>());
        }
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        let text = b"{\"version\":1}\nnonsense\n{\"port\":\"x\"}\n\xff\xff\n{\"name\":\"a b\\u001b[2J\",\"port\":80,\"address\":\"1.1.1.1\",\"new\":1}\n{\"name\":\"a\",\"port\":1";
        let destinations = read(text);
        assert_eq!(destinations.len(), 1);
        assert_eq!((destinations[0].name.as_deref(), destinations[0].port), (None, 80));
    }
}
