//! The process of a machine, as the kernel tells of it.

use std::fs;

/// The QEMU that has this VM's overlay on its command line.
pub(crate) fn of_machine(vm: &str) -> Result<Option<u32>, String> {
    let overlay = format!("df-{vm}.qcow2");
    let processes = fs::read_dir("/proc").map_err(|error| format!("look for processes: {error}"))?;
    Ok(processes.flatten().find_map(|entry| {
        // One that has gone meanwhile is none.
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let has = |part: &[u8]| words.windows(part.len()).any(|word| word == part);
        let pid = entry.file_name().to_string_lossy().parse().ok()?;
        (has(b"qemu") && has(overlay.as_bytes())).then_some(pid)
    }))
}

/// Processor seconds of a process so far, all its threads together (proc(5), `stat`).
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64, String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| format!("read its times: {error}"))?;
    // The program's name, in parentheses, may hold anything.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
    let ticks: Option<Vec<f64>> = fields.map(|fields| fields.filter_map(|field| field.parse().ok()).collect());
    let ticks = ticks.filter(|ticks| ticks.len() == 2).ok_or("no times of a process")?;
    // Linux counts them in hundredths of a second for whoever reads them.
    Ok((ticks[0] + ticks[1]) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_nobody_runs_is_gone() {
        assert_eq!(of_machine("aaaaaaaaaaaaaaaa"), Ok(None));
    }

    #[test]
    fn a_process_takes_time() {
        let before = cpu_seconds(std::process::id()).unwrap();
        while cpu_seconds(std::process::id()).unwrap() < before + 0.03 {}
        assert!(cpu_seconds(u32::MAX).is_err());
    }
}
