//! The machine as a whole: what time it is, how large its disk is, and its end.

use rustix::system::{RebootCommand, reboot};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::convert::Infallible;
use std::io;

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
/// overlay has the size that the machine class says. The file system is in use meanwhile; 0.3 s.
///
/// # Errors
/// What `resize2fs` says, or the system.
#[expect(clippy::disallowed_methods, reason = "no process.rs in the guest")]
pub fn grow_root() -> io::Result<()> {
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let device = root_device(&cmdline).ok_or_else(|| io::Error::other("no root=/dev/… on the kernel command line"))?;
    let sectors = std::fs::read_to_string(format!("/sys/class/block/{device}/size"))?;
    let disk_bytes = sectors.trim().parse::<u64>().map_err(io::Error::other)?.saturating_mul(512);
    let system = rustix::fs::statvfs("/")?;
    if !is_worth_growing(disk_bytes, system.f_blocks.saturating_mul(system.f_frsize)) {
        return Ok(());
    }
    let output = std::process::Command::new("/sbin/resize2fs")
        .arg(format!("/dev/{device}"))
        .env_clear()
        .stdin(std::process::Stdio::null())
        .output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

fn root_device(cmdline: &str) -> Option<&str> {
    cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("root=/dev/")).next_back()
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
        assert_eq!(root_device("quiet root=/dev/vda rw"), Some("vda"));
        assert_eq!(root_device("root=LABEL=root"), None);
        let gib = 1 << 30;
        assert!(is_worth_growing(20 * gib, 4 * gib));
        assert!(!is_worth_growing(4 * gib, 4 * gib / 100 * 97), "what the tables take is no reason");
        assert!(!is_worth_growing(0, 4 * gib));
    }
}
