//! Which classes can never run on this host, however long a job waits? For `check` and `doctor`.
//!
//! By the same sums as the daemon's: what a VM takes with its hypervisor, and what is for jobs, configured or found.

use crate::config::Config;
use crate::daemon::{bounds, needs, overhead_mib};
use crate::vm::{AccelChoice, own_memory_mib};
use std::path::{Path, PathBuf};

/// How large this host is.
#[derive(Clone, Debug)]
pub(super) struct Size {
    /// Its memory.
    pub(super) memory_mib: u64,
    /// Free disk where overlays go, less the reserve.
    pub(super) disk_gib: u64,
    /// Where that was looked for.
    pub(super) place: PathBuf,
}

/// A class that is too large.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TooLarge {
    pub(super) class: String,
    /// What it wants and what there is.
    pub(super) what: String,
    /// What to change.
    pub(super) remedy: String,
}

impl Size {
    /// This host's.
    ///
    /// # Errors
    /// The disk cannot be looked at.
    pub(super) fn of_host(config: &Config) -> std::io::Result<Self> {
        let place = config.state_directory.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
        let stat = rustix::fs::statvfs(place)?;
        let free_gib = stat.f_bavail.saturating_mul(stat.f_frsize) >> 30;
        let disk_gib = free_gib.saturating_sub(config.capacity.disk_reserve_gib);
        Ok(Self { memory_mib: own_memory_mib(), disk_gib, place: place.to_owned() })
    }

    /// The classes that are larger than what jobs may use.
    pub(super) fn too_large(&self, config: &Config) -> Vec<TooLarge> {
        let room = bounds(config, self.memory_mib, self.disk_gib);
        let overhead = overhead_mib(config.hypervisor.accel == AccelChoice::Tcg);
        let mut found = Vec::new();
        for class in &config.class {
            let needs = needs(class, overhead);
            let mut add = |what: String, remedy: String| {
                found.push(TooLarge {
                    class: class.name.clone(),
                    what: format!("class `{}` {what}", class.name),
                    remedy,
                });
            };
            if needs.memory_mib > room.memory_mib {
                let source = match config.capacity.memory_mib {
                    Some(_) => "`capacity.memory_mib`",
                    None => "the host's, less 1 GiB",
                };
                add(
                    format!(
                        "takes {} MiB memory with its QEMU, {} MiB are for jobs ({source})",
                        needs.memory_mib, room.memory_mib
                    ),
                    "lower the class's `memory_mib` or `max_memory_mib`, or give jobs more by `capacity.memory_mib`, if the host has it"
                        .into(),
                );
            }
            if needs.cpus > room.cpus {
                add(
                    format!("has {} CPUs, {} are for jobs (`capacity.cpus`)", needs.cpus, room.cpus),
                    "lower the class's `cpus` or `max_cpus`, or raise `capacity.cpus`".into(),
                );
            }
            if needs.disk_gib > room.disk_gib {
                let source = match config.capacity.disk_gib {
                    Some(_) => "`capacity.disk_gib`".to_owned(),
                    None => format!("free at {}, less `capacity.disk_reserve_gib`", self.place.display()),
                };
                add(
                    format!("wants {} GiB disk, {} GiB are for jobs ({source})", needs.disk_gib, room.disk_gib),
                    "lower the class's `disk_gib` or `max_disk_gib`, or `capacity.disk_reserve_gib`, or free disk"
                        .into(),
                );
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EXAMPLE;

    fn example() -> Config {
        Config::assemble(Some(("/etc/dayfly/config.toml".into(), EXAMPLE.into())), []).unwrap().config
    }

    fn found(config: &Config) -> Vec<String> {
        let host = Size { memory_mib: 8192, disk_gib: 100, place: "/var/lib".into() };
        host.too_large(config).into_iter().map(|found| found.what).collect()
    }

    /// U22: a class that is larger than the host, or than what jobs may use of it, is told with both numbers.
    #[test]
    fn a_class_that_can_never_run_is_told_with_its_numbers() {
        let mut config = example();
        assert_eq!(found(&config), [""; 0]);
        config.class[0].memory_mib = 7100;
        let text = found(&config);
        assert_eq!(
            text,
            ["class `default` takes 7250 MiB memory with its QEMU, 7168 MiB are for jobs (the host's, less 1 GiB)"]
        );
        config.capacity.memory_mib = Some(7250);
        assert_eq!(found(&config), [""; 0]);
        (config.class[0].cpus, config.capacity.cpus) = (9, Some(8));
        (config.class[0].disk_gib, config.capacity.disk_gib) = (101, None);
        let text = found(&config);
        assert_eq!(text.len(), 2);
        assert!(text[0].contains("has 9 CPUs, 8 are for jobs"), "{text:?}");
        assert!(text[1].contains("wants 101 GiB disk, 100 GiB are for jobs (free at /var/lib"), "{text:?}");
        // Without a bound of one's own there is none, and no number stands for it.
        config.capacity.cpus = None;
        assert_eq!(found(&config).len(), 1);
    }
}
