//! Whether the host's kernel has ended processes for want of memory: QEMU may have been one of them.

use crate::files::Files;
use std::path::Path;

/// What the kernel counts; everybody may read it.
const VMSTAT: &str = "/proc/vmstat";

/// More than that file ever has.
const VMSTAT_BYTES_MAX: u64 = 64 * 1024;

/// Processes that the kernel's OOM killer has ended since the host's boot, for want of the host's memory or of a
/// cgroup's: `oom_kill` in `/proc/vmstat`, since Linux 4.13. `None`: this host does not say.
pub(super) async fn oom_kills(files: &dyn Files) -> Option<u64> {
    let text = files.read(Path::new(VMSTAT), VMSTAT_BYTES_MAX).await.ok()?;
    count(std::str::from_utf8(&text).ok()?)
}

fn count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::RealFiles;

    #[tokio::test]
    async fn the_count_is_that_of_the_kernel_or_none() {
        assert!(oom_kills(&RealFiles).await.is_some(), "this host's kernel counts");
        for (text, expected) in
            [("drop_slab 0\noom_kill 17\n", Some(17)), ("oom_kill_x 3\n", None), ("oom_kill many\n", None), ("", None)]
        {
            assert_eq!(count(text), expected, "{text}");
        }
    }
}
