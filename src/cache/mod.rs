//! What have jobs left for later ones (`cache:`), and who may have it?
//!
//! The guest's runner believes that there is an S3 store behind its relay; the door answers from the host's disk (decision
//! D28). Whose cache a request is about is known from the job that the door serves, never from its URL, and what may be
//! read and written is decided in [`access`]. Used by `guest` (requests), `daemon` (opening, cleaning).

pub mod access;
mod store;

pub use access::{Key, Tenant};
pub use store::{CacheError, Caches, JobCache, Save, Version};
