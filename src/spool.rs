//! What is the job's trace? An append-only file that holds every byte GitLab gets.
//!
//! Our lines stand before the first and after the last byte of the guest, never between, so
//! offset, CRC-32 and size of the trace are functions of this one file (decision D4). Two writers in
//! turn: the job for our lines, the door ([`SpoolWriter`]) for the guest's; one reader, the
//! uploader ([`Spool::reader`]). The lock is held across one write, so writes are serialised.

use crate::files::Files;
use crate::retry;
use crate::telemetry::chain;
use bytes::Bytes;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

/// What the uploader sees: how much there is, and its CRC-32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolView {
    /// Bytes written.
    pub length: u64,
    /// CRC-32 (IEEE) over them.
    pub crc: u32,
    /// Where the guest's bytes begin; `None`: not handed out yet.
    pub guest_base: Option<u64>,
    /// When the last of them came; `None`: before a restart.
    pub grown_at: Option<Instant>,
    /// No more of them come.
    pub guest_closed: bool,
    /// It is all of the job's trace. Else GitLab may have something that stands before it.
    pub whole: bool,
}

/// The spool of one job. Clones share it.
#[derive(Clone)]
pub struct Spool(Arc<Shared>);

struct Shared {
    file: Option<File>,
    /// Where this begins in the file of its job: all of it, or what of it is in memory only.
    begins: u64,
    bytes_max: u64,
    state: Mutex<State>,
    view: watch::Sender<SpoolView>,
    /// Since when the disk takes nothing of the guest's.
    failing_since: watch::Sender<Option<Instant>>,
}

/// Where a spool is on disk.
struct File {
    files: Arc<dyn Files>,
    path: PathBuf,
}

struct State {
    length: u64,
    crc: crc32fast::Hasher,
    /// Where the guest's bytes begin; `None`: not handed out yet.
    guest_base: Option<u64>,
    /// Bytes that the guest has sent, those beyond the bound included.
    guest_length: u64,
    /// The guest writes no more.
    guest_closed: bool,
    /// The bound was met and its notice written.
    full: bool,
    /// The bound was met before a restart: how much the guest has sent is not known any more, and
    /// whatever offset it names is right.
    uncounted: bool,
    /// Whether the last byte is a line break (or there is none).
    line_ended: bool,
    /// Last bytes of the trace that the disk did not take; they follow those of the file.
    unwritten: Bytes,
}

/// What became of a guest's piece of trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// Written; the guest's next offset.
    Taken(u64),
    /// Its offset is not where the guest's bytes end: 416 with this size.
    WrongOffset(u64),
    /// The guest may write no more, or not yet: 403.
    Closed,
}

/// Room that is kept beyond the bound for the notice and our last lines.
const OWN_LINES_BYTES: u64 = 64 * 1024;

/// How many of a spool's bytes are its guest's, if they begin there.
fn guest_bytes(length: u64, guest_base: Option<u64>) -> u64 {
    guest_base.map_or(0, |base| length.saturating_sub(base))
}

impl Spool {
    /// Opens the spool of a new job, or of one that lived before a restart; then `guest_base` is
    /// from its record, and length and CRC are those of the file.
    ///
    /// # Errors
    /// The file layer's.
    pub async fn open(files: Arc<dyn Files>, path: &Path, bytes_max: u64, guest_base: Option<u64>) -> io::Result<Self> {
        let mut crc = crc32fast::Hasher::new();
        let mut length = 0;
        let mut line_ended = true;
        if files.length(path).await?.is_none() {
            files.write_at(path, 0, Bytes::new()).await?;
        }
        loop {
            let piece = files.read_at(path, length, 1024 * 1024).await?;
            let Some(last) = piece.last() else { break };
            line_ended = *last == b'\n';
            crc.update(&piece);
            length += piece.len() as u64;
        }
        let (view, _) = watch::channel(SpoolView {
            length,
            crc: crc.clone().finalize(),
            guest_base,
            grown_at: None,
            guest_closed: false,
            whole: true,
        });
        let guest_length = guest_bytes(length, guest_base);
        let full = guest_base.is_some() && length >= bytes_max;
        let state = State {
            length,
            crc,
            guest_base,
            guest_length,
            guest_closed: false,
            full,
            uncounted: full,
            line_ended,
            unwritten: Bytes::new(),
        };
        Ok(Self(Arc::new(Shared {
            file: Some(File { files, path: path.to_owned() }),
            begins: 0,
            bytes_max,
            state: Mutex::new(state),
            view,
            failing_since: watch::Sender::new(None),
        })))
    }

    /// A spool in memory, for the last lines of a job that is not run, or not any more: they stand in its record, and
    /// its file is written by whoever begins with that. `begins`: bytes that the file has, if there is one.
    #[must_use]
    pub fn of_last_lines(begins: u64) -> Self {
        let state = State {
            length: 0,
            crc: crc32fast::Hasher::new(),
            guest_base: None,
            guest_length: 0,
            guest_closed: true,
            full: false,
            uncounted: false,
            line_ended: true,
            unwritten: Bytes::new(),
        };
        let view = SpoolView { guest_closed: true, whole: false, ..SpoolView::default() };
        Self(Arc::new(Shared {
            file: None,
            begins,
            bytes_max: 0,
            state: Mutex::new(state),
            view: watch::Sender::new(view),
            failing_since: watch::Sender::new(None),
        }))
    }

    /// Appends lines of ours, whole (`text` ends with a line break). A partial last line is ended
    /// first. Not durable by itself.
    ///
    /// # Errors
    /// The file layer's; nothing counts as written then.
    pub async fn append_own(&self, text: &str) -> io::Result<()> {
        let mut state = self.0.state.lock().await;
        let text = if state.line_ended { text.to_owned() } else { format!("\n{text}") };
        if state.length + text.len() as u64 > self.0.bytes_max + OWN_LINES_BYTES {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "spool is at its bound"));
        }
        self.0.write(&mut state, Bytes::from(text)).await
    }

    /// From here on the bytes are the guest's. Returns where they begin, for the record.
    pub async fn begin_guest(&self) -> u64 {
        let mut state = self.0.state.lock().await;
        let length = state.length;
        let base = *state.guest_base.get_or_insert(length);
        self.0.view.send_modify(|view| view.guest_base = Some(base));
        base
    }

    /// The guest writes no more; our last lines may follow.
    pub async fn close_guest(&self) {
        self.0.close(&mut *self.0.state.lock().await, true);
    }

    /// The guest may write again: its verdict could not be kept, and it will send it again.
    pub async fn reopen_guest(&self) {
        self.0.close(&mut *self.0.state.lock().await, false);
    }

    /// The guest writes no more. Returns where the trace ends, and whether its last line does.
    pub async fn end(&self) -> (u64, bool) {
        let mut state = self.0.state.lock().await;
        self.0.close(&mut state, true);
        (self.0.begins + state.length, state.line_ended)
    }

    /// Lets the trace end with `text` from `offset` on, which [`Spool::end`] told before `text` was
    /// made: what of it is there already, from before a crash, is not written again. Where the disk
    /// takes no more, it stands in memory only, so that the author learns why.
    pub async fn end_with(&self, offset: u64, text: &str) {
        let mut state = self.0.state.lock().await;
        self.0.close(&mut state, true);
        let there = usize::try_from((self.0.begins + state.length).saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(rest) = text.as_bytes().get(there..).filter(|rest| !rest.is_empty()) else { return };
        let rest = Bytes::copy_from_slice(rest);
        let written = match &self.0.file {
            None => false,
            Some(File { files, path }) => {
                let write = || files.write_at(path, state.length, rest.clone());
                let written = retry::few(write, |_| true).await;
                if let Err(error) = &written {
                    tracing::error!(error = chain(error), "write the last lines of a trace; they are sent from memory");
                }
                written.is_ok()
            }
        };
        if !written {
            state.unwritten = rest.clone();
        }
        self.0.grow(&mut state, &rest);
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The file layer's.
    pub async fn sync(&self) -> io::Result<()> {
        match &self.0.file {
            Some(File { files, path }) => files.sync(path).await,
            None => Ok(()),
        }
    }

    /// The door's half.
    #[must_use]
    pub fn writer(&self) -> SpoolWriter {
        SpoolWriter(self.clone())
    }

    /// The uploader's half.
    #[must_use]
    pub fn reader(&self) -> SpoolReader {
        SpoolReader { spool: self.clone(), view: self.0.view.subscribe() }
    }

    /// How much there is now.
    #[must_use]
    pub fn view(&self) -> SpoolView {
        *self.0.view.borrow()
    }

    /// Since when the disk takes nothing of what the guest sends; `None`: it does.
    #[must_use]
    pub fn failing_since(&self) -> Option<Instant> {
        *self.0.failing_since.borrow()
    }
}

impl Shared {
    async fn write(&self, state: &mut State, bytes: Bytes) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        // A write that failed half-way leaves bytes beyond `length`; the next write cuts them off.
        let written = match &self.file {
            Some(File { files, path }) => files.write_at(path, state.length, bytes.clone()).await,
            None => Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "spool has last lines only")),
        };
        let failed = written.is_err();
        self.failing_since.send_modify(|since| *since = failed.then(|| since.unwrap_or_else(Instant::now)));
        written?;
        self.grow(state, &bytes);
        Ok(())
    }

    fn close(&self, state: &mut State, closed: bool) {
        state.guest_closed = closed;
        self.view.send_modify(|view| view.guest_closed = closed);
    }

    fn grow(&self, state: &mut State, bytes: &Bytes) {
        state.length += bytes.len() as u64;
        state.crc.update(bytes);
        state.line_ended = bytes.ends_with(b"\n");
        self.view.send_modify(|view| {
            (view.length, view.crc) = (state.length, state.crc.clone().finalize());
            view.grown_at = Some(Instant::now());
        });
    }
}

/// Writes the guest's bytes. Clones share the spool.
#[derive(Clone)]
pub struct SpoolWriter(Spool);

impl SpoolWriter {
    /// Takes a guest's piece at `offset` (its own count, from 0). Beyond the spool's bound one
    /// notice is written and further bytes are counted and dropped; the job goes on.
    ///
    /// # Errors
    /// The file layer's; nothing counts as taken then.
    pub async fn append(&self, offset: u64, bytes: Bytes) -> io::Result<Appended> {
        let shared = &self.0.0;
        let mut state = shared.state.lock().await;
        if state.guest_base.is_none() || state.guest_closed {
            return Ok(Appended::Closed);
        }
        if std::mem::take(&mut state.uncounted) {
            if state.length > shared.bytes_max {
                state.guest_length = offset;
            } else {
                // Full to the byte: nothing was dropped, so the count is known, and the notice is due.
                state.full = false;
            }
        }
        if offset != state.guest_length {
            // Exactly the last piece again (its answer was lost) is a success, as at GitLab.
            if offset.checked_add(bytes.len() as u64) == Some(state.guest_length) {
                return Ok(Appended::Taken(state.guest_length));
            }
            return Ok(Appended::WrongOffset(state.guest_length));
        }
        let sent = bytes.len() as u64;
        if !state.full {
            let room = shared.bytes_max.saturating_sub(state.length);
            let fits = usize::try_from(room).map_or(bytes.len(), |room| room.min(bytes.len()));
            if fits == bytes.len() {
                shared.write(&mut state, bytes).await?;
            } else {
                // In one write: a crash between two would leave a log that ends without a word.
                let notice = "\n\x1b[33;1mdayfly: this log reached the limit that this runner keeps. The job goes on, the rest of its log is dropped.\x1b[0;m\n";
                let last = [&bytes[..fits], notice.as_bytes()].concat();
                shared.write(&mut state, Bytes::from(last)).await?;
                state.full = true;
            }
        }
        state.guest_length += sent;
        Ok(Appended::Taken(state.guest_length))
    }

    /// Bytes that the guest has sent.
    pub async fn guest_length(&self) -> u64 {
        self.0.0.state.lock().await.guest_length
    }
}

/// Reads the spool for the uploader.
pub struct SpoolReader {
    spool: Spool,
    view: watch::Receiver<SpoolView>,
}

impl SpoolReader {
    /// How much there is now.
    #[must_use]
    pub fn view(&self) -> SpoolView {
        *self.view.borrow()
    }

    /// Waits until there is more than in `seen`, or that was all of the guest's. Cancel safe.
    pub async fn news_since(&mut self, seen: SpoolView) {
        // The sender lives in `spool`, which we hold, so this ends with the condition only.
        let news = |view: &SpoolView| view.length > seen.length || view.guest_closed && !seen.guest_closed;
        let _ = self.view.wait_for(news).await;
    }

    /// Up to `bytes` bytes from `offset`.
    ///
    /// # Errors
    /// The file layer's.
    pub async fn read(&self, offset: u64, bytes: usize) -> io::Result<Bytes> {
        let shared = &self.spool.0;
        let (in_file, unwritten) = {
            let state = shared.state.lock().await;
            (state.length - state.unwritten.len() as u64, state.unwritten.clone())
        };
        if let Some(File { files, path }) = &shared.file
            && (offset < in_file || unwritten.is_empty())
        {
            let wanted = usize::try_from(in_file.saturating_sub(offset)).map_or(bytes, |n| n.min(bytes));
            return Ok(Bytes::from(files.read_at(path, offset, wanted).await?));
        }
        let begin = usize::try_from(offset - in_file).unwrap_or(usize::MAX).min(unwritten.len());
        Ok(unwritten.slice(begin..begin.saturating_add(bytes).min(unwritten.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H6: lines that no file takes are read from memory, and stand in the file of before where that ends.
    #[tokio::test]
    async fn last_lines_in_memory_are_read_like_any_others() {
        let spool = Spool::of_last_lines(100);
        let mut reader = spool.reader();
        let (offset, line_ended) = spool.end().await;
        assert_eq!((offset, line_ended, reader.view().whole), (100, true, false));
        assert!(spool.append_own("no\n").await.is_err(), "nothing but last lines");
        let seen = reader.view();
        spool.end_with(offset, "first\nsecond\n").await;
        reader.news_since(seen).await;
        // Once, however often they are said.
        spool.end_with(offset, "first\nsecond\n").await;
        spool.sync().await.unwrap();
        let view = reader.view();
        assert_eq!((view.length, view.crc), (13, crc32fast::hash(b"first\nsecond\n")));
        assert_eq!(reader.read(6, 100).await.unwrap(), "second\n");
        assert_eq!(reader.read(0, 5).await.unwrap(), "first");
        assert!(matches!(spool.writer().append(0, Bytes::from("guest")).await, Ok(Appended::Closed)));
    }
}
