//! What has a VM used of its host? By the hypervisor's word and the kernel's, never the guest's; what is not known is left
//! out.

use std::time::Duration;

/// What a VM has used since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Most memory that its process has held at one time, bytes.
    pub memory_peak_bytes: Option<u64>,
    /// Memory that its process holds now, bytes; where the most is not known.
    pub memory_bytes: Option<u64>,
    /// Time of processors, its devices' included.
    pub cpu: Option<Duration>,
    /// Bytes written to its disk.
    pub disk_written_bytes: Option<u64>,
    /// Bytes that its network card has got.
    pub network_received_bytes: Option<u64>,
    /// Bytes that its network card has sent.
    pub network_sent_bytes: Option<u64>,
}

/// Jiffies of a second in `/proc`, as the kernel has it on every architecture of ours (`USER_HZ`).
const TICKS_PER_SECOND: u64 = 100;

impl Usage {
    /// What the kernel knows of a process, by the texts of its `/proc/PID/status` and `/proc/PID/stat` (proc(5)).
    #[must_use]
    pub fn of_process(status: &str, stat: &str) -> Self {
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
        };
        // Behind the name, which is in brackets and may hold anything, `state` is field 3; `utime` is 14, `stime` 15.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let ticks = |field: usize| fields.split_whitespace().nth(field - 3)?.parse::<u64>().ok();
        let cpu = ticks(14).zip(ticks(15)).map(|(user, system)| {
            Duration::from_millis(user.saturating_add(system).saturating_mul(1000 / TICKS_PER_SECOND))
        });
        Self { memory_peak_bytes: kib("VmHWM:"), memory_bytes: kib("VmRSS:"), cpu, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processs_use_is_read_whatever_its_name() {
        let status = "Name:\tqemu\nVmPeak:\t 9000 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let stat = "7 (a ) S 1 2 (x) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 1 0 100 1 2";
        let usage = Usage::of_process(status, stat);
        assert_eq!((usage.memory_peak_bytes, usage.memory_bytes), (Some(2 << 20), Some(1 << 20)));
        assert_eq!(usage.cpu, Some(Duration::from_secs(2)));
        assert_eq!(Usage::of_process("", "7 (x) S 1"), Usage::default());
        assert_eq!(Usage::of_process("VmHWM: x kB\n", "nonsense"), Usage::default());
    }

    #[test]
    fn this_process_uses_something() {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap();
        let usage = Usage::of_process(&read("status"), &read("stat"));
        assert!(usage.memory_peak_bytes >= usage.memory_bytes && usage.memory_bytes > Some(1 << 20), "{usage:?}");
        assert!(usage.cpu.is_some());
    }
}
