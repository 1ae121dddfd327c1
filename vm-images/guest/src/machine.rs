//! The machine as a whole: what time it is, how large its disk is, and its end.

use rustix::system::{RebootCommand, reboot};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::convert::Infallible;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// How far a config's clock may lie behind ours before we believe it is right all the same. The
/// config may have been written when the VM was created, minutes before we read it, while our own
/// clock comes from the (virtual) RTC and is right to a second by then; a restored machine is always behind.
const BEHIND_MAX_US: i64 = 15 * 60 * 1_000_000;

/// Microseconds of a clock that nobody sets and that goes while the machine lives.
#[must_use]
pub fn own_us() -> u64 {
    u64::try_from(microseconds(clock_gettime(ClockId::Monotonic))).unwrap_or(0)
}

/// Sets the wall clock, forward or back, to microseconds since 1970.
///
/// # Errors
/// The system's.
pub fn set_clock(host_us: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: host_us.div_euclid(1_000_000), tv_nsec: host_us.rem_euclid(1_000_000) * 1000 };
    clock_settime(ClockId::Realtime, time)?;
    Ok(())
}

/// Sets the wall clock to what the host's was some time ago, unless that is older news than what the clock says already.
///
/// # Errors
/// The system's.
pub fn set_clock_at_least(host_us: i64) -> io::Result<()> {
    if believes(microseconds(clock_gettime(ClockId::Realtime)), host_us) { set_clock(host_us) } else { Ok(()) }
}

fn microseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(1_000_000).saturating_add(time.tv_nsec / 1000)
}

fn believes(now_us: i64, host_us: i64) -> bool {
    host_us > now_us || now_us - host_us > BEHIND_MAX_US
}

/// Grows the root file system to its disk, if that is larger: the base image is small, and the
/// overlay has the size that the machine class says. On a disk with partitions its own, the last one, grows first. The file
/// system is in use meanwhile; 0.3 s.
///
/// # Errors
/// What the programs say that do it, or the system.
pub fn grow_root() -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let Root { device, kind } =
        root_of(&mounts).ok_or_else(|| io::Error::other("the root file system is on no device that has a name"))?;
    let block = Path::new("/sys/class/block").join(&device);
    let partition = partition_of(&block);
    let disk = partition.as_ref().map_or(&device, |(disk, _)| disk);
    let sectors = |name: &str| number(&Path::new("/sys/class/block").join(name).join("size"));
    let disk_bytes = sectors(disk)?.saturating_mul(512);
    let system = rustix::fs::statvfs("/")?;
    if !is_worth_growing(disk_bytes, system.f_blocks.saturating_mul(system.f_frsize)) {
        return Ok(());
    }
    if let Some((disk, number)) = &partition {
        // The kernel is told apart: it does not read a table of a disk in use anew.
        run(
            "sfdisk",
            &["--quiet", "--no-reread", "--no-tell-kernel", "--force", "-N", number, &format!("/dev/{disk}")],
            ", +\n",
        )?;
        run("partx", &["--update", "--nr", number, &format!("/dev/{disk}")], "")?;
    }
    let device = format!("/dev/{device}");
    match kind.as_str() {
        "xfs" => run("xfs_growfs", &["/"], ""),
        "btrfs" => run("btrfs", &["filesystem", "resize", "max", "/"], ""),
        _ => run("resize2fs", &[&device], ""),
    }
}

/// Runs a program of the image, which is wherever the image has it.
#[expect(clippy::disallowed_methods, reason = "no process.rs in the guest")]
fn run(program: &str, arguments: &[&str], input: &str) -> io::Result<()> {
    let failed = |error: io::Error| io::Error::other(format!("{program}: {error}"));
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

/// What is mounted as `/`.
#[derive(Debug, PartialEq, Eq)]
struct Root {
    /// The device's name: `vda2`.
    device: String,
    /// The file system's: `ext4`.
    kind: String,
}

/// Reads proc_pid_mountinfo(5): `ID PARENT MAJOR:MINOR ROOT / OPTIONS … - KIND SOURCE …`. The last one is on top.
fn root_of(mounts: &str) -> Option<Root> {
    let root = |line: &str| {
        let (before, behind) = line.split_once(" - ")?;
        let mut words = behind.split(' ');
        let (kind, source) = (words.next()?, words.next()?);
        let device = source.strip_prefix("/dev/").filter(|device| !device.is_empty() && !device.contains('/'))?;
        (before.split(' ').nth(4)? == "/").then(|| Root { device: device.to_owned(), kind: kind.to_owned() })
    };
    mounts.lines().filter_map(root).next_back()
}

/// Disk and number of a partition, by what the kernel shows of it: it lies below its disk.
fn partition_of(block: &Path) -> Option<(String, String)> {
    let number = number(&block.join("partition")).ok()?.to_string();
    let place = std::fs::canonicalize(block).ok()?;
    Some((place.parent()?.file_name()?.to_str()?.to_owned(), number))
}

fn number(path: &Path) -> io::Result<u64> {
    std::fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

/// A file system is smaller than its disk by its own tables, about 2 %.
fn is_worth_growing(disk_bytes: u64, system_bytes: u64) -> bool {
    disk_bytes / 10 * 9 > system_bytes
}

/// Ends the machine at once, without stopping anything and without writing anything back: its disk
/// is deleted next, so minutes of flushing would serve nobody.
///
/// # Errors
/// If the kernel refuses; on success it does not return.
pub fn power_off() -> io::Result<Infallible> {
    reboot(RebootCommand::PowerOff)?;
    Err(io::Error::other("the machine is still on"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_follows_the_host_forward_and_ignores_old_news() {
        let now = 1_800_000_000_000_000;
        for (host, expected) in [
            (now + 1, true), // restored: behind by the snapshot's age
            (now + 30 * 86_400 * 1_000_000, true),
            (now - 6_000_000, false),        // cold: config written before the boot
            (now - BEHIND_MAX_US - 1, true), // an RTC that is plainly wrong
            (now, false),
        ] {
            assert_eq!(believes(now, host), expected, "{}", host - now);
        }
    }

    #[test]
    fn only_a_disk_that_is_plainly_larger_is_grown_into() {
        let gib = 1 << 30;
        assert!(is_worth_growing(20 * gib, 4 * gib));
        assert!(!is_worth_growing(4 * gib, 4 * gib / 100 * 97), "what the tables take is no reason");
        assert!(!is_worth_growing(0, 4 * gib));
    }

    #[test]
    fn the_root_file_systems_disk_is_what_is_mounted() {
        let root = |text: &str| root_of(text).map(|root| format!("{} {}", root.device, root.kind));
        assert_eq!(root("22 1 254:0 / / rw,noatime - ext4 /dev/vda rw\n").as_deref(), Some("vda ext4"));
        let others = "1 0 0:2 / / rw - rootfs rootfs rw\n29 1 254:2 / / rw shared:1 - xfs /dev/vda2 rw\n\
                      30 29 0:5 / /dev rw - devtmpfs udev rw\n31 29 254:1 / /boot rw - ext4 /dev/vda1 rw\n";
        assert_eq!(root(others).as_deref(), Some("vda2 xfs"));
        assert_eq!(root("22 1 0:30 /root / rw - btrfs /dev/vda4 rw,subvol=/root\n").as_deref(), Some("vda4 btrfs"));
        for text in ["", "x", "22 1 0:1 / / rw - overlay overlay rw", "22 1 0:1 / / rw - ext4 /dev/mapper/root rw"] {
            assert_eq!(root(text), None, "{text}");
        }
    }

    #[test]
    fn a_partition_lies_below_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("devices/block/vda/vda2");
        std::fs::create_dir_all(&part).unwrap();
        let link = dir.path().join("vda2");
        std::os::unix::fs::symlink(&part, &link).unwrap();
        assert_eq!(partition_of(&link), None);
        std::fs::write(part.join("partition"), "2\n").unwrap();
        assert_eq!(partition_of(&link), Some(("vda".into(), "2".into())));
    }

    #[test]
    fn a_program_that_fails_says_why() {
        let error = run("cat", &["/no/such/file"], "").unwrap_err().to_string();
        assert!(error.starts_with("cat: ") && error.contains("/no/such/file"), "{error}");
        run("grep", &["-q", "^, +$"], ", +\n").unwrap();
        assert!(run("no-such-program", &[], "").is_err());
    }
}
