//! An image as one file: its files one after the other, as any `tar` packs and unpacks them (POSIX ustar, no more of it).
//!
//! What is read may come from anywhere: plain files with plain names alone, each with its length said before it comes.

use std::io::{self, Read, Write};

/// Bytes of a header, and what each file's content is filled up to.
const BLOCK: usize = 512;

/// Where a header's fields are.
const NAME: std::ops::Range<usize> = 0..100;
const MODE: std::ops::Range<usize> = 100..108;
const SIZE: std::ops::Range<usize> = 124..136;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const KIND: usize = 156;
const MAGIC: std::ops::Range<usize> = 257..265;
const PREFIX: std::ops::Range<usize> = 345..500;

/// The largest length that eleven octal digits hold, 8 GiB.
const BYTES_MAX: u64 = (1 << 33) - 1;

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Writes one file.
///
/// # Errors
/// The writer's or reader's; the content is not as long as was said; name or length do not fit.
pub(super) fn write_file(out: &mut impl Write, name: &str, bytes: u64, content: &mut impl Read) -> io::Result<()> {
    if name.len() > NAME.len() || bytes > BYTES_MAX {
        return Err(invalid(format!("`{name}`, of {bytes} bytes, does not fit into a tar file")));
    }
    let mut header = [0_u8; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[MODE].copy_from_slice(b"0000644\0");
    header[108..124].copy_from_slice(b"0000000\x000000000\0");
    header[SIZE].copy_from_slice(format!("{bytes:011o}\0").as_bytes());
    // The same image is the same file.
    header[136..148].copy_from_slice(b"00000000000\0");
    header[KIND] = b'0';
    header[MAGIC].copy_from_slice(b"ustar\x0000");
    let sum = checksum(&header);
    header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.write_all(&header)?;
    let written = io::copy(&mut content.take(bytes), out)?;
    if written != bytes {
        return Err(invalid(format!("`{name}` has {written} bytes instead of {bytes}")));
    }
    out.write_all(&[0; BLOCK][..filling(bytes)])
}

/// Ends a file of files.
///
/// # Errors
/// The writer's.
pub(super) fn write_end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

/// The files in one, in their order. The content of one is to be read before the next.
pub(super) struct Files<R> {
    from: R,
    /// What of the content before was not read, filling included.
    left: u64,
}

impl<R: Read> Files<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, left: 0 }
    }

    /// Name and length of the next file; `None`: there is none.
    ///
    /// # Errors
    /// The reader's; `InvalidData` for what is no tar file of plain files.
    pub(super) fn next(&mut self) -> io::Result<Option<(String, u64)>> {
        let skipped = io::copy(&mut (&mut self.from).take(self.left), &mut io::sink())?;
        if skipped != self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut header = [0_u8; BLOCK];
        self.from.read_exact(&mut header)?;
        if header == [0; BLOCK] {
            return Ok(None);
        }
        let (name, bytes) = parse(&header)?;
        self.left = bytes + filling(bytes) as u64;
        Ok(Some((name, bytes)))
    }

    /// What is left of the content of the file that [`Files::next`] has named.
    pub(super) fn content(&mut self, bytes: u64) -> Content<'_, R> {
        Content { files: self, bytes }
    }
}

/// Reads one file's content.
pub(super) struct Content<'a, R> {
    files: &'a mut Files<R>,
    bytes: u64,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.bytes).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = self.files.from.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes -= read as u64;
        self.files.left -= read as u64;
        Ok(read)
    }
}

/// Zeroes behind a content of this length.
fn filling(bytes: u64) -> usize {
    let over = bytes % BLOCK as u64;
    usize::try_from((BLOCK as u64 - over) % BLOCK as u64).unwrap_or(0)
}

fn parse(header: &[u8; BLOCK]) -> io::Result<(String, u64)> {
    if !header[MAGIC].starts_with(b"ustar") {
        return Err(invalid("it is no tar file"));
    }
    if octal(&header[CHECKSUM]) != Some(u64::from(checksum(header))) {
        return Err(invalid("a header in it is damaged"));
    }
    let text = |field: &[u8]| {
        let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
        std::str::from_utf8(&field[..end]).map(str::to_owned).map_err(|_| invalid("a name in it is no text"))
    };
    let name = text(&header[NAME])?;
    // `tar -c .` writes them so.
    let name = name.strip_prefix("./").unwrap_or(&name).to_owned();
    if !matches!(header[KIND], b'0' | 0) || !text(&header[PREFIX])?.is_empty() {
        return Err(invalid(format!("`{}` in it is no plain file", name.escape_debug())));
    }
    if name.is_empty() || name.starts_with('.') || name.contains('/') || name.chars().any(char::is_control) {
        return Err(invalid(format!("`{}` in it is no plain name", name.escape_debug())));
    }
    let bytes = octal(&header[SIZE]).ok_or_else(|| invalid("a length in it makes no sense"))?;
    Ok((name, bytes))
}

/// Digits up to a blank or zero byte.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    let digits = text.trim_start_matches(' ').trim_end_matches(['\0', ' ']);
    if digits.is_empty() { None } else { u64::from_str_radix(digits, 8).ok() }
}

/// The sum of all bytes, those of the sum itself as blanks.
fn checksum(header: &[u8; BLOCK]) -> u32 {
    let all: u32 = header.iter().map(|b| u32::from(*b)).sum();
    let own: u32 = header[CHECKSUM].iter().map(|b| u32::from(*b)).sum();
    all - own + 8 * u32::from(b' ')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    fn packed(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, content) in files {
            write_file(&mut out, name, content.len() as u64, &mut &content[..]).unwrap();
        }
        write_end(&mut out).unwrap();
        out
    }

    fn unpacked(bytes: &[u8]) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut files = Files::new(bytes);
        let mut found = Vec::new();
        while let Some((name, length)) = files.next()? {
            let mut content = Vec::new();
            files.content(length).read_to_end(&mut content)?;
            found.push((name, content));
        }
        Ok(found)
    }

    #[test]
    fn what_was_packed_comes_out_and_tar_reads_it() {
        let bytes = packed(&[("image.toml", b"text"), ("disk", &[7; 512]), ("empty", b"")]);
        assert_eq!(bytes.len() % BLOCK, 0);
        let found = unpacked(&bytes).unwrap();
        assert_eq!(
            found.iter().map(|(name, content)| (name.as_str(), content.len())).collect::<Vec<_>>(),
            [("image.toml", 4), ("disk", 512), ("empty", 0)]
        );
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.tar"), &bytes).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test: the other program's word is what counts")]
        let listed = Command::new("tar").args(["-tf", "a.tar"]).current_dir(&dir).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "image.toml\ndisk\nempty\n");
        #[expect(clippy::disallowed_methods, reason = "a test: the other program's word is what counts")]
        let made = Command::new("tar").args(["--format=ustar", "-cf", "b.tar", "./a.tar"]).current_dir(&dir).status();
        assert!(made.unwrap().success());
        let back = unpacked(&std::fs::read(dir.path().join("b.tar")).unwrap()).unwrap();
        assert_eq!(back, [("a.tar".to_owned(), bytes)]);
    }

    #[test]
    fn what_is_no_plain_file_is_refused() {
        let with = |change: fn(&mut [u8; BLOCK])| {
            let mut bytes = packed(&[("name", b"x")]);
            let mut header: [u8; BLOCK] = bytes[..BLOCK].try_into().unwrap();
            change(&mut header);
            let sum = checksum(&header);
            header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            bytes[..BLOCK].copy_from_slice(&header);
            unpacked(&bytes).unwrap_err().to_string()
        };
        assert!(with(|h| h[..9].copy_from_slice(b"../escape")).contains("no plain name"));
        assert!(with(|h| h[..4].copy_from_slice(b"/etc")).contains("no plain name"));
        assert!(with(|h| h[KIND] = b'2').contains("no plain file"));
        assert!(with(|h| h[PREFIX.start] = b'a').contains("no plain file"));
        assert!(with(|h| h[SIZE].fill(b'9')).contains("makes no sense"));
        assert!(with(|h| h[MAGIC].fill(0)).contains("no tar file"));
        let whole = packed(&[("name", &[1; 600])]);
        for cut in 0..whole.len() - 2 * BLOCK {
            assert!(unpacked(&whole[..cut]).is_err(), "{cut}");
        }
        assert!(write_file(&mut Vec::new(), "n", 5, &mut &b"1234"[..]).is_err());
    }

    proptest! {
        /// Any bytes: files or an error, and never more content than there is.
        #[test]
        fn any_bytes_are_files_or_an_error(noise in proptest::collection::vec(any::<(u16, u8)>(), 0..6)) {
            let mut bytes = packed(&[("a", &[1; 700]), ("b", b"x")]);
            for (at, byte) in noise {
                let at = usize::from(at) % bytes.len();
                bytes[at] = byte;
            }
            if let Ok(found) = unpacked(&bytes) {
                prop_assert!(found.iter().map(|(_, content)| content.len()).sum::<usize>() <= bytes.len());
            }
        }
    }
}
