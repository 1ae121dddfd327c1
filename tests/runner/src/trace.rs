//! The job's log: what GitLab gets, with its size and CRC-32. It is kept in a file among the temporary ones, as the
//! official runner keeps it; a write that fails there is the end of it: nothing more of the log is sent, and no verdict,
//! try after try (19.3 on a full disk).

use crate::lines::{Lines, Source};
use crate::masking::Mask;
use crate::utf8::Utf8;
use jiff::Timestamp;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

/// Bytes of a log at most where config.toml does not say.
const DEFAULT_LIMIT_KIB: u64 = 4096;

/// What every stream of a job passes before it is in the log.
#[derive(Clone)]
pub(crate) struct Filter {
    /// Values never to be shown.
    pub(crate) masked: Vec<String>,
    /// Prefixes of tokens never to be shown.
    pub(crate) token_prefixes: Vec<String>,
    /// Whether lines carry times.
    pub(crate) timestamps: bool,
}

/// The log of one job. Grows only.
pub(crate) struct Trace {
    inner: Mutex<Inner>,
}

struct Inner {
    bytes: Vec<u8>,
    file: Option<File>,
    /// The file could not take all of it.
    lost: bool,
    crc: crc32fast::Hasher,
    limit: usize,
    full: bool,
}

impl Trace {
    /// An empty log of at most `limit_kib` KiB; 0: the default.
    pub(crate) fn new(limit_kib: u64) -> Self {
        let limit_kib = if limit_kib == 0 { DEFAULT_LIMIT_KIB } else { limit_kib };
        let limit = usize::try_from(limit_kib.saturating_mul(1024)).unwrap_or(usize::MAX);
        // Without one to begin with it is as if there were no limit to the disk.
        let file = tempfile::tempfile().ok();
        let inner = Inner { bytes: Vec::new(), file, lost: false, crc: crc32fast::Hasher::new(), limit, full: false };
        Self { inner: Mutex::new(inner) }
    }

    /// Bytes in the log.
    pub(crate) fn size(&self) -> usize {
        crate::locked(&self.inner).bytes.len()
    }

    /// `crc32:` and eight hex digits over the whole log, and its size.
    pub(crate) fn checksum(&self) -> (String, usize) {
        let inner = crate::locked(&self.inner);
        (format!("crc32:{:08x}", inner.crc.clone().finalize()), inner.bytes.len())
    }

    /// At most `max` bytes from `offset` on; `None` if the log is shorter than `offset`, or cannot be read back.
    pub(crate) fn slice(&self, offset: usize, max: usize) -> Option<Vec<u8>> {
        let inner = crate::locked(&self.inner);
        if inner.lost {
            return None;
        }
        let rest = inner.bytes.get(offset..)?;
        Some(rest[..rest.len().min(max)].to_vec())
    }

    fn append(&self, bytes: &[u8]) {
        let mut inner = crate::locked(&self.inner);
        if inner.full {
            return;
        }
        let room = inner.limit - inner.bytes.len();
        if bytes.len() <= room {
            inner.write(bytes);
            return;
        }
        let limit = inner.limit;
        inner.write(&bytes[..room]);
        inner.full = true;
        // As recorded: without a time, and the last bytes of the log; the job goes on.
        inner.write(
            format!(
                "\n\x1b[33;1mJob's log exceeded limit of {limit} bytes.\n\
                 Job execution will continue but no more output will be collected.\x1b[0;m\n"
            )
            .as_bytes(),
        );
    }
}

impl Inner {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(bytes)
        {
            crate::log(&format!("ERROR: the log cannot be kept: {error}"));
            (self.file, self.lost) = (None, true);
        }
        self.crc.update(bytes);
        self.bytes.extend_from_slice(bytes);
    }
}

/// One stream into the log. Dropping it ends it, and what was held back goes out.
pub(crate) struct Stream {
    trace: Arc<Trace>,
    utf8: Utf8,
    mask: Mask,
    lines: Lines,
}

impl Stream {
    /// Opens a stream of `source`.
    pub(crate) fn new(trace: &Arc<Trace>, source: Source, filter: &Filter) -> Self {
        Self {
            trace: Arc::clone(trace),
            utf8: Utf8::default(),
            mask: Mask::new(&filter.masked, &filter.token_prefixes),
            lines: Lines::new(source, filter.timestamps),
        }
    }

    /// Adds one write.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let text = self.utf8.push(bytes);
        let shown = self.mask.push(&text);
        let stamped = self.lines.push(&shown, Timestamp::now());
        self.trace.append(&stamped);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let text = self.utf8.finish();
        let mut shown = self.mask.push(&text);
        shown.extend(self.mask.finish());
        let mut stamped = self.lines.push(&shown, Timestamp::now());
        stamped.extend(self.lines.finish());
        self.trace.append(&stamped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter() -> Filter {
        Filter { masked: vec!["s3cret".to_owned()], token_prefixes: Vec::new(), timestamps: false }
    }

    #[test]
    fn an_empty_log_has_the_recorded_checksum() {
        assert_eq!(Trace::new(0).checksum(), ("crc32:00000000".to_owned(), 0));
    }

    #[test]
    fn checksum_and_size_follow_the_bytes_after_masking() {
        let trace = Arc::new(Trace::new(0));
        let mut stream = Stream::new(&trace, Source::JobOut, &filter());
        stream.push(b"a s3c");
        stream.push(b"ret b");
        drop(stream);
        assert_eq!(trace.slice(0, 100).expect("in range"), b"a [MASKED] b");
        assert_eq!(trace.checksum(), (format!("crc32:{:08x}", crc32fast::hash(b"a [MASKED] b")), 12));
        assert_eq!(trace.slice(2, 3).expect("in range"), b"[MA");
        assert!(trace.slice(13, 1).is_none(), "beyond the end");
    }

    #[test]
    fn a_full_log_ends_with_one_notice() {
        let trace = Arc::new(Trace::new(1));
        let mut stream = Stream::new(&trace, Source::JobOut, &filter());
        for _ in 0..3 {
            stream.push(&[b'x'; 700]);
        }
        let bytes = trace.slice(0, usize::MAX).expect("in range");
        let (log, notice) = bytes.split_at(1024);
        assert!(log.iter().all(|&byte| byte == b'x'));
        assert!(notice.starts_with(b"\n\x1b[33;1mJob's log exceeded limit of 1024 bytes.\n"), "{notice:?}");
        assert_eq!(trace.checksum().1, bytes.len());
    }
}
