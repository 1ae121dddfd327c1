//! The door, from the guest's side: what it answers, what it never lets through, when it closes.
//!
//! Each connection begins with a right greeting, unless the test is about the greeting. The ids in
//! the doc lines are those of the threat and fault tables.

mod artifacts;
mod caches;
mod calls;
mod client;
mod forwards;
mod greeting;
mod hygiene;
mod limits;
mod malformed;
mod matrix;
mod sessions;
mod store;
pub(crate) mod support;
