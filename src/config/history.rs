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
    /// For how long the whole of each console is kept.
    pub console_keep: Span,
    /// MiB of all of those together at most; 0: none is kept.
    pub console_mib: u64,
    /// For how long the recording of each shell is kept.
    pub shell_keep: Span,
}

impl Default for History {
    fn default() -> Self {
        const DAY_S: u64 = 24 * 3600;
        Self {
            keep: Span::from_secs(7 * DAY_S),
            jobs: 1000,
            mib: 16,
            console_keep: Span::from_secs(7 * DAY_S),
            console_mib: 64,
            shell_keep: Span::from_secs(30 * DAY_S),
        }
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

    /// How much of consoles is kept.
    #[must_use]
    pub fn console_bounds(&self) -> crate::history::ConsoleBounds {
        crate::history::ConsoleBounds { keep: self.console_keep.get(), bytes: self.console_mib.saturating_mul(1 << 20) }
    }
}
