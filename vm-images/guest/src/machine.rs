//! The machine as a whole: what time it is, and its end.

use rustix::system::{RebootCommand, reboot};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::convert::Infallible;
use std::io;

/// How far a host's clock may lie behind ours before we believe it is right all the same. The
/// config may have been written when the VM was created, minutes before we read it, while our own
/// clock comes from the (virtual) RTC and is right by then; a restored machine is always behind.
const BEHIND_MAX_US: i64 = 15 * 60 * 1_000_000;

/// Sets the wall clock to the host's, given in microseconds since 1970, unless that is older news
/// than what the clock says already.
///
/// # Errors
/// The system's.
pub fn set_clock(host_us: i64) -> io::Result<()> {
    let now = clock_gettime(ClockId::Realtime);
    if believes(now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000), host_us) {
        let time = Timespec { tv_sec: host_us.div_euclid(1_000_000), tv_nsec: host_us.rem_euclid(1_000_000) * 1000 };
        clock_settime(ClockId::Realtime, time)?;
    }
    Ok(())
}

fn believes(now_us: i64, host_us: i64) -> bool {
    host_us > now_us || now_us - host_us > BEHIND_MAX_US
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
}
