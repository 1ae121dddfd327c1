//! Caches for operators: their text.

use super::{Clean, table};
use crate::cache::{CacheEntry, CacheList, TenantCaches};
use crate::telemetry::{lasting, sized};
use jiff::Timestamp;
use std::fmt;
use std::time::Duration;

/// All caches of a host.
pub struct CachesText<'a> {
    /// Them.
    pub list: &'a CacheList,
    /// When that is read.
    pub now: Timestamp,
}

/// The entries of one tenant.
pub struct EntriesText<'a> {
    /// Whose.
    pub tenant: &'a TenantCaches,
    /// Them.
    pub entries: &'a [CacheEntry],
    /// So many are left out.
    pub more: usize,
    /// When that is read.
    pub now: Timestamp,
}

fn ago(now: Timestamp, then: Timestamp) -> String {
    format!("{} ago", lasting(Duration::try_from(now.duration_since(then)).unwrap_or_default()))
}

impl fmt::Display for CachesText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { list, now } = self;
        if list.tenants.is_empty() {
            return writeln!(f, "no caches are kept yet");
        }
        let rows = list
            .tenants
            .iter()
            .map(|of| [of.id.clone(), of.entries.to_string(), sized(of.bytes), ago(*now, of.used), of.name.clone()]);
        table(f, ["ID", "ENTRIES", "SIZE", "USED", "PROJECT"], rows)?;
        if list.more > 0 {
            writeln!(f, "and {} more, smaller ones", list.more)?;
        }
        let (bytes, most, project) = (sized(list.bytes), sized(list.bytes_max), sized(list.project_bytes_max));
        writeln!(f, "{bytes} of {most}; {project} a project at most")
    }
}

impl fmt::Display for EntriesText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tenant, entries, more, now } = self;
        writeln!(f, "{} ({}): {}", Clean(&tenant.name), Clean(&tenant.id), sized(tenant.bytes))?;
        let rows = entries.iter().map(|entry| {
            [
                entry.space.word().to_owned(),
                sized(entry.bytes),
                ago(*now, entry.saved),
                ago(*now, entry.used),
                entry.job.to_string(),
                entry.key.clone(),
            ]
        });
        table(f, ["SPACE", "SIZE", "SAVED", "USED", "JOB", "KEY"], rows)?;
        if *more > 0 {
            writeln!(f, "and {more} more, longer not used")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::access::Space;

    /// What a guest has named drives no terminal.
    #[test]
    fn caches_are_a_table() {
        let now: Timestamp = "2026-01-02T12:00:00Z".parse().unwrap();
        let used: Timestamp = "2026-01-02T11:00:00Z".parse().unwrap();
        let tenant = TenantCaches { id: "ab-42".into(), name: "g/p".into(), bytes: 3 << 20, entries: 1, used };
        let list = CacheList {
            bytes: 4 << 20,
            bytes_max: 20 << 30,
            project_bytes_max: 5 << 30,
            tenants: vec![tenant.clone()],
            more: 2,
        };
        assert_eq!(
            CachesText { list: &list, now }.to_string(),
            "ID     ENTRIES  SIZE     USED           PROJECT\nab-42  1        3.0 MiB  1 h 0 min ago  g/p\nand 2 more, smaller ones\n4.0 MiB of 20.0 GiB; 5.0 GiB a project at most\n"
        );
        assert_eq!(CachesText { list: &CacheList::default(), now }.to_string(), "no caches are kept yet\n");
        let entry = CacheEntry {
            key: "deps\u{1b}[2J".into(),
            space: Space::Open,
            bytes: 3 << 20,
            sha256: "00".into(),
            saved: used,
            used: now,
            job: 7,
        };
        let text = EntriesText { tenant: &tenant, entries: &[entry], more: 0, now }.to_string();
        assert_eq!(
            text,
            "g/p (ab-42): 3.0 MiB\nSPACE  SIZE     SAVED          USED     JOB  KEY\nopen   3.0 MiB  1 h 0 min ago  0 s ago  7    deps\\u{1b}[2J\n"
        );
    }
}
