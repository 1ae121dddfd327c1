//! What have we of a job's repository already? Mirrors on the host, and disks of them that machines read (decision D31).
//!
//! ```text
//! 201 ─► begin ─► the disks of before go into the machine, and one that is empty
//!          └────► fetch, with the job's own token ─► a new disk ─► the empty one, if the job is not handed out yet
//! ```
//!
//! One mirror per project of one GitLab. A job gets copies that are only read, never the mirror. Whatever is stale, late,
//! refused, damaged or missing costs the job time and nothing else: what git does not find there it fetches by itself.
//! Used by `job`; [`workshop`] is the seam to git and to the disk.

mod git;
mod image;
mod job;
mod meta;
mod repository;
mod slots;
mod store;
pub mod workshop;

pub use git::RealWorkshop;
pub use job::{JobClone, Told};
pub use repository::Repository;
pub use store::{Access, Clones};

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Programs that it takes, and the Debian packages that they are in.
pub const PROGRAMS: [(&str, &str); 3] = [("git", "git"), ("mke2fs", "e2fsprogs"), ("prlimit", "util-linux")];

/// The disks of one machine: plain data, for its owner's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attached {
    /// Those with what was here when it was planned, the one that lists them all first.
    pub disks: Vec<PathBuf>,
    /// The one that may be written until its job is handed out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<PathBuf>,
}

impl Attached {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty() && self.slot.is_none()
    }
}
