//! The partition table of a disk with a boot loader: GUID Partition Table, as UEFI 2.10 section 5 has it.
//!
//! Written here, because a disk that is made without root is a plain file; read, because it says what a disk is made for
//! before anything of it runs. Sectors have 512 bytes.

use std::io::{self, Seek as _, SeekFrom, Write as _};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Bytes of the table's head that are enough to read it: the protective MBR, the header, 128 entries.
pub const HEAD_BYTES: usize = 34 * 512;

/// Where the boot loader's second part lies, in sectors, and how much room it has: 1 MiB, from 1 MiB on.
pub const LOADER_START: u64 = 2048;
const LOADER_SECTORS: u64 = 2048;

/// Where the root file system begins, in sectors.
pub const ROOT_START: u64 = LOADER_START + LOADER_SECTORS;

/// Entries of the table, and bytes of each: the least that UEFI allows.
const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;

/// Sectors behind the last partition: the table's second copy.
const TAIL_SECTORS: u64 = 33;

/// Types, as they stand in an entry (the first three fields little-endian).
const BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";
const ROOT_X86_64: [u8; 16] = guid(0x4f68_bce3, 0xe8cd, 0x4db1, [0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09]);

/// Types of root file systems by their kind of machine: the Discoverable Partitions Specification.
const ROOTS: [([u8; 16], &str); 6] = [
    (ROOT_X86_64, "x86_64"),
    (guid(0xb921_b045, 0x1df0, 0x41c3, [0xaf, 0x44, 0x4c, 0x6f, 0x28, 0x0d, 0x3f, 0xae]), "aarch64"),
    (guid(0x69da_d710, 0x2ce4, 0x4e3c, [0xb1, 0x6c, 0x21, 0xa1, 0xd4, 0x9a, 0xbe, 0xd3]), "arm"),
    (guid(0x72ec_70a6, 0xcf74, 0x40e6, [0xbd, 0x49, 0x4b, 0xda, 0x08, 0xe8, 0xf2, 0x24]), "riscv64"),
    (guid(0xc31c_45e6, 0x3f39, 0x412e, [0x80, 0xfb, 0x48, 0x09, 0xc4, 0x98, 0x05, 0x99]), "powerpc64le"),
    (guid(0x5eea_d9a9, 0xfe09, 0x4a1e, [0xa1, 0xd7, 0x52, 0x0d, 0x00, 0x53, 0x13, 0x06]), "s390x"),
];

const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// One partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its type, as it stands in the table.
    kind: [u8; 16],
    /// Its first sector.
    pub first: u64,
    /// Its last.
    pub last: u64,
}

impl Partition {
    /// Bytes from the disk's first to its own.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.first.saturating_mul(SECTOR)
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.last.saturating_sub(self.first).saturating_add(1)).saturating_mul(SECTOR)
    }

    /// The kind of machine whose root file system it says to be.
    #[must_use]
    pub fn root_of(&self) -> Option<&'static str> {
        ROOTS.iter().find(|(kind, _)| *kind == self.kind).map(|(_, machine)| *machine)
    }

    /// Whether a boot loader of a PC's BIOS lies there.
    #[must_use]
    pub fn is_bios_boot(&self) -> bool {
        self.kind == BIOS_BOOT
    }
}

/// Sectors of the root file system on a disk of so many bytes, whole MiB of them; none: the disk is too small.
#[must_use]
pub fn root_sectors(disk_bytes: u64) -> Option<u64> {
    let end = (disk_bytes / SECTOR).checked_sub(TAIL_SECTORS)?;
    Some(end.checked_sub(ROOT_START)? / 2048 * 2048).filter(|sectors| *sectors > 0)
}

/// Writes both copies of the table of a disk of so many bytes, with room for a boot loader and the root file system, and
/// the protective MBR around `boot_code` (its first 440 bytes). `id`: 48 random bytes, of the disk and its partitions.
///
/// # Errors
/// The file's; the disk is too small.
pub fn write(disk: &mut std::fs::File, disk_bytes: u64, boot_code: &[u8], id: &[u8; 48]) -> io::Result<()> {
    let too_small = || io::Error::other("the disk is too small for a partition table");
    let sectors = disk_bytes / SECTOR;
    let root = root_sectors(disk_bytes).ok_or_else(too_small)?;
    let part = |at: usize| -> [u8; 16] {
        let mut part: [u8; 16] = std::array::from_fn(|n| id[at * 16 + n]);
        // Version 4, as RFC 9562 has it, in the order of an entry.
        part[7] = part[7] & 0x0f | 0x40;
        part[8] = part[8] & 0x3f | 0x80;
        part
    };
    let mut entries = vec![0; ENTRIES * ENTRY_BYTES];
    let all =
        [(BIOS_BOOT, LOADER_START, ROOT_START - 1, "loader"), (ROOT_X86_64, ROOT_START, ROOT_START + root - 1, "root")];
    for (number, (kind, first, last, name)) in all.into_iter().enumerate() {
        let entry = &mut entries[number * ENTRY_BYTES..][..ENTRY_BYTES];
        entry[..16].copy_from_slice(&kind);
        entry[16..32].copy_from_slice(&part(number + 1));
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        for (at, unit) in name.encode_utf16().enumerate() {
            entry[56 + at * 2..58 + at * 2].copy_from_slice(&unit.to_le_bytes());
        }
    }
    let header = |own: u64, other: u64, table: u64| {
        let mut header = vec![0; 512];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x0001_0000_u32.to_le_bytes());
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        for (at, number) in
            [(24, own), (32, other), (40, 34), (48, sectors - 1 - TAIL_SECTORS), (72, table)].into_iter()
        {
            header[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
        }
        header[56..72].copy_from_slice(&part(0));
        for (at, number) in [(80, 128), (84, 128), (88, crc32fast::hash(&entries))] {
            header[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        let sum = crc32fast::hash(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    };
    let mut mbr = vec![0; 512];
    let code = boot_code.len().min(440);
    mbr[..code].copy_from_slice(&boot_code[..code]);
    let covered = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&covered.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);

    let (last, second) = (sectors - 1, sectors - TAIL_SECTORS);
    for (sector, bytes) in [
        (0, mbr),
        (1, header(1, last, 2)),
        (2, entries.clone()),
        (second, entries.clone()),
        (last, header(last, 1, second)),
    ] {
        disk.seek(SeekFrom::Start(sector * SECTOR))?;
        disk.write_all(&bytes)?;
    }
    Ok(())
}

/// The partitions that a disk's head names; `None`: it has no such table, or one that does not hold.
#[must_use]
pub fn read(head: &[u8]) -> Option<Vec<Partition>> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(head.get(at..at.checked_add(8)?)?.try_into().ok()?));
    if head.get(512..520)? != b"EFI PART" {
        return None;
    }
    let (count, size) = (u32_at(512 + 80)?, u32_at(512 + 84)?);
    let entries_at = usize::try_from(u64_at(512 + 72)?.checked_mul(SECTOR)?).ok()?;
    let (count, size) = (usize::try_from(count).ok()?.min(ENTRIES), usize::try_from(size).ok()?);
    if !(ENTRY_BYTES..=4096).contains(&size) {
        return None;
    }
    let mut found = Vec::new();
    for number in 0..count {
        let at = entries_at.checked_add(number.checked_mul(size)?)?;
        // What lies behind the head is not looked at.
        let Some(entry) = head.get(at..at.checked_add(48)?) else { break };
        let kind: [u8; 16] = entry[..16].try_into().ok()?;
        if kind != [0; 16] {
            found.push(Partition { kind, first: u64_at(at + 32)?, last: u64_at(at + 40)? });
        }
    }
    Some(found)
}

/// Whether the first sector has a program for a PC's BIOS.
#[must_use]
pub fn has_boot_code(head: &[u8]) -> bool {
    head.get(510..512) == Some(&[0x55, 0xaa]) && head.get(..440).is_some_and(|code| code.iter().any(|byte| *byte != 0))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Read as _;

    /// A disk's head with one partition of this type of ours, by its place in the list.
    pub(crate) fn head(root: usize, boot_code: bool) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let code = if boot_code { vec![0xeb; 440] } else { Vec::new() };
        write(&mut file, 64 << 20, &code, &[7; 48]).unwrap();
        let mut head = vec![0; HEAD_BYTES];
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_exact(&mut head).unwrap();
        head[2 * 512 + ENTRY_BYTES..][..16].copy_from_slice(&ROOTS[root].0);
        head
    }

    #[test]
    fn a_table_reads_back_and_says_what_it_is_for() {
        let found = read(&head(0, true)).unwrap();
        assert_eq!(found.len(), 2);
        assert!(found[0].is_bios_boot() && found[0].root_of().is_none() && found[0].offset() == 1 << 20);
        assert_eq!((found[1].offset(), found[1].root_of()), (2 << 20, Some("x86_64")));
        assert_eq!(found[1].bytes(), root_sectors(64 << 20).unwrap() * SECTOR);
        assert!(found[1].last < (64 << 20) / SECTOR - TAIL_SECTORS);
        assert_eq!(read(&head(1, true)).unwrap()[1].root_of(), Some("aarch64"));
        assert!(has_boot_code(&head(0, true)) && !has_boot_code(&head(0, false)));
    }

    #[test]
    fn any_bytes_are_a_table_or_none() {
        assert_eq!(read(b""), None);
        assert_eq!(read(&[0; HEAD_BYTES]), None);
        let whole = head(0, true);
        for length in 0..whole.len() {
            let _ = read(&whole[..length]);
        }
        for at in 512..1100 {
            let mut head = whole.clone();
            head[at] ^= 0xff;
            assert!(read(&head).is_none_or(|found| found.len() <= ENTRIES));
        }
        assert_eq!((root_sectors(0), root_sectors(2 << 20)), (None, None));
    }
}
