//! A disk that starts by itself: GRUB for a PC's BIOS and a partition table around a root file system that is there.
//!
//! ```text
//! sector 0      boot.img, 440 bytes: loads core.img          (protective MBR)
//! 1 to 33       partition table                              the same once more at the end
//! 2048          core.img, in a partition of its own: reads /boot/grub/grub.cfg
//! 4096          ext4, made before
//! ```
//!
//! What `grub-bios-setup` does to a disk it does as root, and to one that the kernel knows. It is four numbers in two files
//! (GRUB 2.06 and 2.12: `include/grub/i386/pc/boot.h`, `util/setup.c`): which sectors of the disk the next part is in.

use super::rootfs::Loader;
use super::{BuildError, file_error};
use crate::image::gpt;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

/// Bytes of the room that a core.img has.
const CORE_BYTES_MAX: usize = 1024 * 1024;

/// In boot.img: the first sector of core.img (8 bytes), and the jump that floppy disks need (2 bytes).
const KERNEL_SECTOR: usize = 0x5c;
const DRIVE_CHECK: usize = 0x66;

/// In the first sector of core.img: the sector that the rest begins with (8 bytes); how many those are it knows.
const REST_SECTOR: usize = 512 - 12;

/// Puts table and boot loader around the root file system of `disk`.
///
/// # Errors
/// [`BuildError`].
pub(super) fn make_bootable(disk: &Path, loader: &Loader) -> Result<(), BuildError> {
    let read = |path: &Path| fs::read(path).map_err(file_error("read", path));
    let (boot, core) = set(read(&loader.boot)?, read(&loader.core)?).map_err(BuildError::Loader)?;
    let mut id = [0; 48];
    let random = Path::new("/dev/urandom");
    fs::File::open(random).and_then(|mut file| file.read_exact(&mut id)).map_err(file_error("read", random))?;
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).open(disk)?;
        let bytes = file.metadata()?.len();
        gpt::write(&mut file, bytes, &boot, &id)?;
        file.seek(SeekFrom::Start(gpt::LOADER_START * gpt::SECTOR))?;
        file.write_all(&core)
    };
    write().map_err(file_error("write", disk))
}

/// Tells both parts where the next one is.
fn set(mut boot: Vec<u8>, mut core: Vec<u8>) -> Result<(Vec<u8>, Vec<u8>), &'static str> {
    if boot.len() != 512 || boot[510..] != [0x55, 0xaa] {
        return Err("boot.img is no boot sector");
    }
    if core.len() < 1024 || core.len() > CORE_BYTES_MAX {
        return Err("core.img has less than two sectors, or more than 1 MiB");
    }
    boot[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&gpt::LOADER_START.to_le_bytes());
    // No floppy: what looks for one makes some BIOSes choose another disk.
    boot[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&[0x90, 0x90]);
    core[REST_SECTOR..REST_SECTOR + 8].copy_from_slice(&(gpt::LOADER_START + 1).to_le_bytes());
    Ok((boot, core))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_leads_from_its_first_sector_to_its_loader() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut boot = vec![0xaa; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        fs::write(path("boot.img"), &boot).unwrap();
        fs::write(path("core.img"), vec![0xcc; 3000]).unwrap();
        fs::File::create(path("disk")).unwrap().set_len(8 << 20).unwrap();
        let loader = Loader { boot: path("boot.img"), core: path("core.img") };
        make_bootable(&path("disk"), &loader).unwrap();
        let disk = fs::read(path("disk")).unwrap();
        let u64_at = |at: usize| u64::from_le_bytes(disk[at..at + 8].try_into().unwrap());
        assert_eq!((u64_at(KERNEL_SECTOR), disk[DRIVE_CHECK], disk[DRIVE_CHECK - 1]), (2048, 0x90, 0xaa));
        assert_eq!((u64_at((1 << 20) + REST_SECTOR), disk[(1 << 20) + 2999], disk[(1 << 20) + 3000]), (2049, 0xcc, 0));
        assert!(gpt::has_boot_code(&disk) && gpt::read(&disk).unwrap()[0].is_bios_boot());
        assert_eq!(gpt::read(&disk).unwrap()[1].offset(), gpt::ROOT_START * gpt::SECTOR);

        fs::write(path("core.img"), vec![0; 512]).unwrap();
        let error = make_bootable(&path("disk"), &loader).unwrap_err().to_string();
        assert!(error.starts_with("put the boot loader on the disk: core.img has less"), "{error}");
        fs::write(path("boot.img"), "").unwrap();
        assert!(matches!(make_bootable(&path("disk"), &loader), Err(BuildError::Loader(_))));
    }
}
