//! What is in this zip? Its directory, read with bounds from the first byte.
//!
//! Artifacts come from a guest, which may send anything under the name of a zip. The `zip` crate
//! reserves memory by the number of files that the archive claims, and looks for another directory
//! if the first one is broken; so the directory is read here: the one at the very end, or none,
//! at most [`DIRECTORY_BYTES_MAX`]. Format: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5.
//! Not supported, as gitlab-runner writes none: several disks, encryption, data before the archive.

use flate2::read::DeflateDecoder;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

/// Bytes of a directory at most: 100,000 entries with names of 200 bytes take half of that.
const DIRECTORY_BYTES_MAX: u64 = 64 * 1024 * 1024;

const END: u32 = 0x0605_4b50;
const END_BYTES: u64 = 22;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
const LOCATOR64_BYTES: u64 = 20;
const ENTRY: u32 = 0x0201_4b50;
const ENTRY_BYTES: usize = 46;
const LOCAL: u32 = 0x0403_4b50;
const LOCAL_BYTES: u64 = 30;

/// Why a file is no archive that can be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It cannot be read.
    #[error("read the archive")]
    Read(#[source] io::Error),
    /// It is broken, or made to be misread.
    #[error("the archive is no sound zip: {0}")]
    Broken(&'static str),
    /// It has more entries than it may.
    #[error("the archive has {0} entries, more than {1}")]
    TooManyEntries(u64, u64),
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File {
        executable: bool,
    },
    Link,
    /// Device, socket, pipe.
    Special,
}

/// How an entry is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Stored,
    Deflated,
    Other(u16),
}

/// One entry of the directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// As it stands there: any bytes.
    pub(super) name: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) method: Method,
    pub(super) encrypted: bool,
    pub(super) crc32: u32,
    pub(super) packed_bytes: u64,
    pub(super) bytes: u64,
    local_header: u64,
}

/// A zip whose directory has been read.
pub(super) struct Archive {
    file: File,
    pub(super) entries: Vec<Entry>,
}

impl Archive {
    /// Reads the directory of `file`; at most `entries_max` entries.
    pub(super) fn open(file: File, entries_max: u64) -> Result<Self, ArchiveError> {
        let length = file.metadata().map_err(ArchiveError::Read)?.len();
        let end = find_end(&file, length)?;
        if end.entries > entries_max {
            return Err(ArchiveError::TooManyEntries(end.entries, entries_max));
        }
        let fits = end.directory_offset.checked_add(end.directory_bytes).is_some_and(|after| after <= end.position);
        if !fits || end.directory_bytes > DIRECTORY_BYTES_MAX {
            return Err(ArchiveError::Broken("its directory is not where it says"));
        }
        let directory = read_at(&file, end.directory_offset, end.directory_bytes)?;
        let mut rest = directory.as_slice();
        let mut entries = Vec::new();
        for _ in 0..end.entries {
            entries.push(read_entry(&mut rest)?);
        }
        Ok(Self { file, entries })
    }

    /// The unpacked bytes of an entry, as they come: neither length nor checksum is verified here.
    pub(super) fn content(&self, entry: &Entry) -> Result<Box<dyn Read + '_>, ArchiveError> {
        let header = read_at(&self.file, entry.local_header, LOCAL_BYTES)?;
        let mut fields = Fields(&header);
        if fields.u32()? != LOCAL {
            return Err(ArchiveError::Broken("an entry is not where the directory says"));
        }
        fields.skip(22)?;
        let skip = LOCAL_BYTES + u64::from(fields.u16()?) + u64::from(fields.u16()?);
        let start = entry.local_header.checked_add(skip).ok_or(ArchiveError::Broken("an offset is too large"))?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start)).map_err(ArchiveError::Read)?;
        let packed = file.take(entry.packed_bytes);
        match entry.method {
            Method::Stored => Ok(Box::new(packed)),
            Method::Deflated => Ok(Box::new(DeflateDecoder::new(packed))),
            Method::Other(_) => Err(ArchiveError::Broken("an entry is packed in an unknown way")),
        }
    }
}

/// The end record, in the form of either size.
struct End {
    /// Where it begins: nothing of the directory is behind.
    position: u64,
    entries: u64,
    directory_bytes: u64,
    directory_offset: u64,
}

/// Finds the record that ends exactly where the file does.
fn find_end(file: &File, length: u64) -> Result<End, ArchiveError> {
    let tail_bytes = length.min(END_BYTES + u64::from(u16::MAX));
    let tail = read_at(file, length - tail_bytes, tail_bytes)?;
    let last = tail.len().checked_sub(22).ok_or(ArchiveError::Broken("it is too short"))?;
    let ends_here = |at: &usize| {
        tail.get(*at..*at + 4) == Some(&END.to_le_bytes()[..])
            && tail.get(*at + 20..*at + 22).is_some_and(|c| usize::from(c[0]) + usize::from(c[1]) * 256 == last - at)
    };
    let at = (0..=last).rev().find(ends_here).ok_or(ArchiveError::Broken("it has no directory at its end"))?;
    let position = length - tail_bytes + at as u64;
    let mut fields = Fields(tail.get(at + 4..).unwrap_or_default());
    let disks = (fields.u16()?, fields.u16()?);
    let (entries_here, entries) = (fields.u16()?, fields.u16()?);
    let (directory_bytes, directory_offset) = (fields.u32()?, fields.u32()?);
    let is_full = entries == u16::MAX || directory_bytes == u32::MAX || directory_offset == u32::MAX;
    if is_full && let Some(end) = find_end64(file, position)? {
        return Ok(end);
    }
    if disks != (0, 0) || entries_here != entries {
        return Err(ArchiveError::Broken("it is one of several"));
    }
    Ok(End {
        position,
        entries: entries.into(),
        directory_bytes: directory_bytes.into(),
        directory_offset: directory_offset.into(),
    })
}

fn find_end64(file: &File, end: u64) -> Result<Option<End>, ArchiveError> {
    let Some(at) = end.checked_sub(LOCATOR64_BYTES) else { return Ok(None) };
    let locator = read_at(file, at, LOCATOR64_BYTES)?;
    let mut fields = Fields(&locator);
    if fields.u32()? != LOCATOR64 {
        return Ok(None);
    }
    fields.skip(4)?;
    let position = fields.u64()?;
    let record = read_at(file, position, 56)?;
    let mut fields = Fields(&record);
    if fields.u32()? != END64 || position >= at {
        return Err(ArchiveError::Broken("its large end record is not where it says"));
    }
    fields.skip(12)?;
    let disks = (fields.u32()?, fields.u32()?);
    let (entries_here, entries) = (fields.u64()?, fields.u64()?);
    if disks != (0, 0) || entries_here != entries {
        return Err(ArchiveError::Broken("it is one of several"));
    }
    Ok(Some(End { position, entries, directory_bytes: fields.u64()?, directory_offset: fields.u64()? }))
}

fn read_entry(rest: &mut &[u8]) -> Result<Entry, ArchiveError> {
    let mut fields = Fields(rest.get(..ENTRY_BYTES).ok_or(CUT)?);
    if fields.u32()? != ENTRY {
        return Err(ArchiveError::Broken("its directory holds something else"));
    }
    fields.skip(4)?;
    let flags = fields.u16()?;
    let method = match fields.u16()? {
        0 => Method::Stored,
        8 => Method::Deflated,
        other => Method::Other(other),
    };
    fields.skip(4)?;
    let crc32 = fields.u32()?;
    let (mut packed_bytes, mut bytes) = (u64::from(fields.u32()?), u64::from(fields.u32()?));
    let (name, extra, comment) = (usize::from(fields.u16()?), usize::from(fields.u16()?), usize::from(fields.u16()?));
    fields.skip(4)?;
    let attributes = fields.u32()?;
    let mut local_header = u64::from(fields.u32()?);

    let mut variable = Fields(rest.get(ENTRY_BYTES..).unwrap_or_default());
    let name = variable.bytes(name)?.to_vec();
    let extra = variable.bytes(extra)?;
    variable.skip(comment)?;
    *rest = variable.0;

    // Sizes that do not fit stand in field 1, in this order, only those that do not fit.
    let mut large = Fields(extra_field(extra, 1));
    for value in [&mut bytes, &mut packed_bytes, &mut local_header] {
        if *value == u64::from(u32::MAX) {
            *value = large.u64()?;
        }
    }
    // The upper half is st_mode where a Unix made the archive, and zero elsewhere.
    let mode = attributes >> 16;
    let kind = match mode & 0o170_000 {
        0o120_000 => Kind::Link,
        0o040_000 => Kind::Directory,
        0 | 0o100_000 if name.ends_with(b"/") => Kind::Directory,
        0 | 0o100_000 => Kind::File { executable: mode & 0o111 != 0 },
        _ => Kind::Special,
    };
    Ok(Entry { name, kind, method, encrypted: flags & 1 != 0, crc32, packed_bytes, bytes, local_header })
}

fn extra_field(mut extra: &[u8], id: u16) -> &[u8] {
    while let [a, b, c, d, rest @ ..] = extra {
        let length = usize::from(u16::from_le_bytes([*c, *d])).min(rest.len());
        let (field, others) = rest.split_at(length);
        if u16::from_le_bytes([*a, *b]) == id {
            return field;
        }
        extra = others;
    }
    &[]
}

const CUT: ArchiveError = ArchiveError::Broken("its directory is cut short");

/// `bytes` bytes from `offset`, all of them.
fn read_at(file: &File, offset: u64, bytes: u64) -> Result<Vec<u8>, ArchiveError> {
    let mut buffer = vec![0; usize::try_from(bytes).map_err(|_| CUT)?];
    match file.read_exact_at(&mut buffer, offset) {
        Ok(()) => Ok(buffer),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(CUT),
        Err(error) => Err(ArchiveError::Read(error)),
    }
}

/// Little-endian fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], ArchiveError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(CUT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn skip(&mut self, count: usize) -> Result<(), ArchiveError> {
        self.bytes(count).map(|_| ())
    }

    fn u16(&mut self) -> Result<u16, ArchiveError> {
        self.bytes(2)?.try_into().map(u16::from_le_bytes).map_err(|_| CUT)
    }

    fn u32(&mut self) -> Result<u32, ArchiveError> {
        self.bytes(4)?.try_into().map(u32::from_le_bytes).map_err(|_| CUT)
    }

    fn u64(&mut self) -> Result<u64, ArchiveError> {
        self.bytes(8)?.try_into().map(u64::from_le_bytes).map_err(|_| CUT)
    }
}
