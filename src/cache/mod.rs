//! What have jobs left for later ones (`cache:`), and who may have it?
//!
//! The guest's runner believes that there is an S3 store behind its relay; the door answers from the host's disk (decision
//! D28). Whose cache a request is about is known from the job that the door serves, never from its URL, and what may be
//! read and written is decided in [`access`]. Used by `job` (who gives each door its view), `guest` (requests), `daemon`
//! (opening, cleaning, operators).

pub mod access;
mod job; // as one job may use them
mod notes; // what has it had?
mod pins; // which version does it read?
mod report; // what is kept?
mod save; // whole or not at all
mod sigv4; // pure: a signature
mod store;
mod upstream; // an operator's own store

pub use access::{CacheTenant, Key, Tenant};
pub use job::JobCache;
pub use notes::{Note, What};
pub use report::{CacheEntry, CacheList, CachesFound, TenantCaches};
pub use save::Save;
pub use store::{CacheError, Caches, Settings, Version};
pub use upstream::{Upstream, UpstreamError, UpstreamParts};
