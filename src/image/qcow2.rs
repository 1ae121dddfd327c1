//! The header of a qcow2 file, read by ourselves: a disk that we hand to QEMU must not name another
//! file of the host (backing file, external data file), and must not be half written.
//!
//! Layout: QEMU's `docs/interop/qcow2.txt`; all numbers big-endian.

use crate::files::plain;
use std::ffi::OsString;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// Bytes of a version 3 header up to and including the feature bits.
const HEADER_BYTES: usize = 80;

/// Incompatible features that we know and accept: dirty refcounts (1), compression type (8),
/// extended L2 entries (16).
const FEATURES_ACCEPTED: u64 = 0b1_1001;
const FEATURE_CORRUPT: u64 = 0b10;
const FEATURE_EXTERNAL_DATA: u64 = 0b100;

/// Why a file is no disk for a guest.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It cannot be read.
    #[error("read its header")]
    Read(#[from] io::Error),
    /// It is something else, or a disk that must not be used.
    #[error("{0}")]
    Unfit(&'static str),
}

/// Checks the header and returns the virtual size in bytes.
///
/// # Errors
/// [`Qcow2Error`].
pub fn check(disk: &Path) -> Result<u64, Qcow2Error> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    plain::open_chosen(disk)?.take(HEADER_BYTES as u64).read_to_end(&mut header)?;
    parse(&header).map_err(Qcow2Error::Unfit)
}

/// Bytes of the name of a backing file at most.
const BACKING_BYTES_MAX: u32 = 1023;

/// The file that an overlay lies on; `None`: it lies on none, or is no qcow2 file.
///
/// # Errors
/// It cannot be read, or is cut short.
pub fn backing(overlay: &Path) -> io::Result<Option<PathBuf>> {
    let mut file = plain::open_chosen(overlay)?;
    let mut header = [0; 20];
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let offset = u64::from_be_bytes(header[8..16].try_into().map_err(io::Error::other)?);
    let length = u32::from_be_bytes(header[16..20].try_into().map_err(io::Error::other)?);
    if header[..4] != *b"QFI\xfb" || offset == 0 || length == 0 || length > BACKING_BYTES_MAX {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut name = vec![0; length as usize];
    file.read_exact(&mut name)?;
    Ok(Some(OsString::from_vec(name).into()))
}

/// Reads a header; why it is none of a guest's disk otherwise.
pub fn parse(header: &[u8]) -> Result<u64, &'static str> {
    let u32_at = |at: usize| Some(u32::from_be_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_be_bytes(header.get(at..at + 8)?.try_into().ok()?));
    if header.get(..4) != Some(b"QFI\xfb") {
        return Err("it is no qcow2 file");
    }
    let short = "its header is cut short";
    let features = match u32_at(4).ok_or(short)? {
        2 => 0,
        3 => u64_at(72).ok_or(short)?,
        _ => return Err("its qcow2 version is neither 2 nor 3"),
    };
    if u64_at(8).ok_or(short)? != 0 || u32_at(16).ok_or(short)? != 0 {
        return Err("it has a backing file");
    }
    if features & FEATURE_EXTERNAL_DATA != 0 {
        return Err("it keeps its data in another file");
    }
    if features & FEATURE_CORRUPT != 0 {
        return Err("it is marked as corrupt");
    }
    if features & !FEATURES_ACCEPTED != 0 {
        return Err("it uses unknown qcow2 features");
    }
    if u32_at(32).ok_or(short)? != 0 {
        return Err("it is encrypted");
    }
    match u64_at(24).ok_or(short)? {
        0 => Err("its size is 0"),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A header as `qemu-img create -f qcow2` makes it, less what nobody reads here.
    pub(crate) fn header(virtual_bytes: u64) -> Vec<u8> {
        let mut header = vec![0; 104];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[7] = 3;
        header[23] = 16;
        header[24..32].copy_from_slice(&virtual_bytes.to_be_bytes());
        header
    }

    #[test]
    fn a_plain_disk_tells_its_size() {
        assert_eq!(parse(&header(4 << 30)), Ok(4 << 30));
        let mut version_2 = header(1);
        version_2[7] = 2;
        version_2[72..80].fill(0xff); // no features there in version 2
        assert_eq!(parse(&version_2), Ok(1));
    }

    /// H12: corrupt, cut short, of another format, or with a chain of its own.
    #[test]
    fn what_names_another_file_or_is_no_disk_is_refused() {
        let with = |at: usize, byte: u8| {
            let mut header = header(1);
            header[at] = byte;
            parse(&header).unwrap_err()
        };
        assert_eq!(with(0, b'q'), "it is no qcow2 file");
        assert_eq!(with(7, 4), "its qcow2 version is neither 2 nor 3");
        assert_eq!(with(15, 1), "it has a backing file");
        assert_eq!(with(19, 1), "it has a backing file");
        assert_eq!(with(79, 0b100), "it keeps its data in another file");
        assert_eq!(with(79, 0b10), "it is marked as corrupt");
        assert_eq!(with(73, 1), "it uses unknown qcow2 features");
        assert_eq!(with(35, 1), "it is encrypted");
        assert_eq!(parse(&header(0)), Err("its size is 0"));
        assert_eq!(parse(b""), Err("it is no qcow2 file"));
        for length in 4..80 {
            assert_eq!(parse(&header(1)[..length]), Err("its header is cut short"), "{length}");
        }
    }
}
