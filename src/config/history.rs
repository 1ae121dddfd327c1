//! How much of the jobs that have ended is kept.

use super::Span;
use serde::{Deserialize, Serialize};

/// Section `[history]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct History {
    /// For how long.
    pub keep: Span,
    /// Jobs at most; 0: none.
    pub jobs: u32,
    /// MiB of all of them together at most.
    pub mib: u64,
}

impl Default for History {
    fn default() -> Self {
        Self { keep: Span::from_secs(7 * 24 * 3600), jobs: 1000, mib: 16 }
    }
}

impl History {
    /// The same, as the store goes by it.
    #[must_use]
    pub fn bounds(&self) -> crate::history::Bounds {
        crate::history::Bounds {
            keep: self.keep.get(),
            jobs: usize::try_from(self.jobs).unwrap_or(usize::MAX),
            bytes: self.mib.saturating_mul(1 << 20),
        }
    }
}
