//! A piece of a disk image's file: compressed and back, zstd, with the digests of both forms; zeros stay holes.
//!
//! A crate of its own, so that it is optimised in builds that are not: hundreds of megabytes pass through it.
//!
//! By `ruzstd`, which is Rust all through: what comes from a registry is read by no C code of ours. Its compressor is the
//! quick kind, so each piece is read back before it is sent: what it made is what is kept, or it is kept as it is.

use ruzstd::decoding::StreamingDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;

/// What a decompressor may look back at; that of `zstd -19` is 8 MiB.
const WINDOW_BYTES_MAX: u64 = 16 << 20;

/// Zeros of this length, at a multiple of it, are not written.
const BLOCK: usize = 4096;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of these bytes, hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// `sha256:` of these bytes.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

/// Whether there is nothing but zeros.
#[must_use]
pub fn is_hole(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// The compressed form.
#[must_use]
pub fn pack(content: &[u8]) -> Vec<u8> {
    let packed = compress_to_vec(content, CompressionLevel::Fastest);
    let comes_back = packed.len() < content.len()
        && open(&packed[..]).is_ok_and(|decoder| {
            let mut back = Vec::with_capacity(content.len());
            decoder.take(content.len() as u64 + 1).read_to_end(&mut back).is_ok() && back == content
        });
    if comes_back { packed } else { compress_to_vec(content, CompressionLevel::Uncompressed) }
}

fn open<R: Read>(packed: R) -> io::Result<impl Read> {
    StreamingDecoder::new_with_max_window_size(packed, WINDOW_BYTES_MAX)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

/// Writes the content of a compressed piece into `file` from `offset` on, and no more than `bytes`: what would be more is
/// not made.
///
/// # Errors
/// `InvalidData`: it is not this content; else the disk's.
pub fn unpack(packed: impl Read, file: &File, offset: u64, bytes: u64, sha256: &str) -> io::Result<()> {
    let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut content = open(packed)?.take(bytes.saturating_add(1));
    let (mut hasher, mut done) = (Sha256::new(), 0_u64);
    let mut buffer = vec![0; 64 * BLOCK];
    loop {
        let count = match fill(&mut content, &mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => return Err(wrong(format!("it does not decompress: {error}"))),
        };
        if done + count as u64 > bytes {
            return Err(wrong(format!("it holds more than {bytes} bytes")));
        }
        hasher.update(&buffer[..count]);
        for (at, block) in buffer[..count].chunks(BLOCK).enumerate() {
            if !is_hole(block) {
                file.write_all_at(block, offset + done + (at * BLOCK) as u64)?;
            }
        }
        done += count as u64;
    }
    if done != bytes {
        return Err(wrong(format!("it holds {done} bytes instead of {bytes}")));
    }
    if hex(&hasher.finalize()) != sha256 {
        return Err(wrong("the SHA-256 of its content differs".into()));
    }
    Ok(())
}

/// Reads until the buffer is full or there is no more.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt as _;

    fn unpacked(packed: &[u8], content: &[u8], bytes: u64) -> Result<Vec<u8>, String> {
        let mut file = tempfile::tempfile().unwrap();
        unpack(packed, &file, 3, bytes, &super::sha256(content)).map_err(|error| error.to_string())?;
        file.set_len(3 + bytes).unwrap();
        let mut back = Vec::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut back).unwrap();
        Ok(back.split_off(3))
    }

    #[test]
    fn a_piece_comes_back_as_it_was() {
        let noise: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
        let texts = b"the same line again\n".repeat(50_000);
        let mixed = [&noise[..100_001], &vec![0; 300_000], &texts].concat();
        for content in [&b"x"[..], &noise, &texts, &mixed, &vec![0; 1 << 20]] {
            let packed = pack(content);
            assert_eq!(unpacked(&packed, content, content.len() as u64).unwrap(), content);
        }
        assert!(pack(&texts).len() < texts.len() / 10);
        assert!(pack(&noise).len() < noise.len() + 1024, "what does not compress is kept");
        assert_eq!(pack(&mixed), pack(&mixed), "the same is the same");
    }

    #[test]
    fn what_is_not_the_piece_is_refused_before_it_is_written_whole() {
        let content = b"content ".repeat(1000);
        let packed = pack(&content);
        let bytes = content.len() as u64;
        assert!(unpacked(&packed, b"other", bytes).unwrap_err().contains("SHA-256"));
        assert!(unpacked(&packed, &content, bytes + 1).unwrap_err().contains("8000 bytes instead of 8001"));
        assert!(unpacked(&packed, &content, bytes - 1).unwrap_err().contains("more than 7999"));
        for cut in [0, 1, 5, packed.len() - 1] {
            assert!(unpacked(&packed[..cut], &content, bytes).is_err(), "{cut}");
        }
        // A gigabyte of zeros in some kilobytes: no more of it is made than was said.
        let bomb = pack(&vec![0; 64 << 20]);
        assert!(bomb.len() < 1 << 20, "{}", bomb.len());
        assert!(unpacked(&bomb, b"", 4096).unwrap_err().contains("more than 4096"));
    }

    #[test]
    fn zeros_take_no_room() {
        let mut content = vec![0; 8 << 20];
        content[5 << 20] = 1;
        let file = tempfile::tempfile().unwrap();
        unpack(&pack(&content)[..], &file, 0, content.len() as u64, &super::sha256(&content)).unwrap();
        file.set_len(content.len() as u64).unwrap();
        let found = file.metadata().unwrap();
        assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
        assert!(is_hole(&content[..BLOCK]) && !is_hole(&content));
    }

    proptest! {
        /// Any bytes of a registry: an error, and no more written than was said.
        #[test]
        fn any_bytes_are_an_error(mut noise in proptest::collection::vec(any::<u8>(), 0..300), whole in any::<bool>()) {
            if whole {
                noise.splice(0..0, [0x28, 0xb5, 0x2f, 0xfd]);
            }
            prop_assert!(unpacked(&noise, b"never", 5).is_err());
        }
    }
}
