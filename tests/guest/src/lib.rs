//! The guest of all tests: how one speaks to its host and to its door, over any stream of bytes, on any clock.
//!
//! ```text
//! boot ── reports, config ── channel
//! relay ── sessions of the wire, streams in them ── door
//! connection ── greeting where there is no wire, then bytes, a byte of them spoilt where a test wants that ── door
//! http ── what a request is as bytes, what an answer is
//! job ── the runner's calls for its job, and what it makes of the answers
//! ```
//!
//! What a guest does, its script, is its test's own: the scripted guest of the lifecycle ring, the plans of exactness,
//! the simulation's good and bad ones, the process of the kill harness. It shares no code with the door that it speaks
//! to, but for the lines of `dayfly_guest_config`.

pub mod boot;
mod connection;
pub mod http;
pub mod job;
mod relay;

pub use connection::{Connection, Kept, Spoil, enter};
pub use http::Answer;
pub use job::{Job, Word};
pub use relay::{Relay, Sessions, relay};
