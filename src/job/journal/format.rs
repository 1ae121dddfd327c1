//! A record as bytes: one JSON object, its checksum first.

use super::{RECORD_VERSION, Record};
use serde::Deserialize;

/// Why bytes are no record for this daemon.
#[derive(Debug)]
pub enum Unreadable {
    /// Of this version, which is newer than ours.
    Newer(u32),
    /// Damaged, and how.
    Broken(String),
}

/// How a sealed record begins; eight hex digits follow, and [`SEAL_ENDS`].
const SEAL_BEGINS: &[u8] = b"{\"crc32\":\"";
const SEAL_ENDS: &[u8] = b"\",";

/// Puts the checksum of a JSON object into it, as its first member: a bit that a disk has turned must not become
/// another token, another state, another machine (E13).
///
/// # Panics
/// If it is no object: not even a brace.
pub fn seal(object: &[u8]) -> Vec<u8> {
    let digits = format!("{:08x}", crc32fast::hash(object));
    [SEAL_BEGINS, digits.as_bytes(), SEAL_ENDS, &object[1..]].concat()
}

/// The object without its checksum, and whether that is right. An object without one is as it is.
pub fn unseal(bytes: &[u8]) -> (Vec<u8>, bool) {
    let parts = bytes.strip_prefix(SEAL_BEGINS).and_then(|rest| rest.split_at_checked(8));
    let parts = parts.and_then(|(digits, rest)| Some((digits, rest.strip_prefix(SEAL_ENDS)?)));
    let Some((digits, rest)) = parts else { return (bytes.to_vec(), true) };
    let object = [b"{", rest].concat();
    let right = format!("{:08x}", crc32fast::hash(&object)).as_bytes() == digits;
    (object, right)
}

/// Reads a record of this version or one before.
///
/// # Errors
/// [`Unreadable`].
pub fn parse(bytes: &[u8]) -> Result<Record, Unreadable> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let broken = |error: serde_json::Error| Unreadable::Broken(error.to_string());
    let (object, right) = unseal(bytes);
    let versioned: Versioned = serde_json::from_slice(&object).map_err(broken)?;
    // Before anything else, the checksum too: to stop costs a look of the operator, to set a whole record aside a job.
    if versioned.version > RECORD_VERSION {
        return Err(Unreadable::Newer(versioned.version));
    }
    if !right {
        return Err(Unreadable::Broken("its checksum is of another content".to_owned()));
    }
    // Written again, it is a record of ours.
    serde_json::from_slice(&object).map(|record: Record| Record { version: RECORD_VERSION, ..record }).map_err(broken)
}
