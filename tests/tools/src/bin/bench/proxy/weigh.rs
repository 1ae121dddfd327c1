//! What a process has cost so far, by the kernel's word.

use crate::daemon::mib;

/// Ticks a second in `/proc/PID/stat`: 100 for every program, whatever the kernel counts in itself.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales(pub(crate) u32);

impl Scales {
    fn read(self, file: &str) -> Result<String, String> {
        let path = format!("/proc/{}/{file}", self.0);
        std::fs::read_to_string(&path).map_err(|error| format!("read {path}: {error}"))
    }

    /// Seconds of CPU so far, in user and kernel, of threads that have ended too.
    pub(crate) fn cpu_seconds(self) -> Result<f64, String> {
        cpu_seconds(&self.read("stat")?).ok_or_else(|| "the kernel tells no CPU times".to_owned())
    }

    /// Resident memory now, in MiB.
    pub(crate) fn resident_mib(self) -> Result<f64, String> {
        mib(&self.read("status")?, "VmRSS:")
    }

    /// The most that was resident since [`Scales::forget_peak`], in MiB.
    pub(crate) fn peak_mib(self) -> Result<f64, String> {
        mib(&self.read("status")?, "VmHWM:")
    }

    /// Sets the peak to what is resident now.
    pub(crate) fn forget_peak(self) -> Result<(), String> {
        let path = format!("/proc/{}/clear_refs", self.0);
        std::fs::write(&path, "5").map_err(|error| format!("write {path}: {error}"))
    }
}

fn cpu_seconds(stat: &str) -> Option<f64> {
    // The name in parentheses may hold anything; behind it the 12th and 13th fields are the times.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let kernel: u32 = fields.next()?.parse().ok()?;
    Some((f64::from(user) + f64::from(kernel)) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 9 0 0 0 150 50 3 4 20 0 1 0 5 6 7";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(cpu_seconds("7 (a"), None);
    }

    #[test]
    fn this_process_can_be_weighed() {
        let me = Scales(std::process::id());
        me.forget_peak().unwrap();
        assert!(me.resident_mib().unwrap() > 0.0 && me.peak_mib().unwrap() > 0.0 && me.cpu_seconds().unwrap() >= 0.0);
    }
}
