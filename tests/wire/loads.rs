//! Heavy loads on doors: how much memory, how many sockets, how long, and what the neighbours notice.
//!
//! Each test runs in a process of its own, which is weighed whole: door, guests and GitLab together, so
//! the daemon's share is smaller than what counts here. CI takes a short form; with
//! `DAYFLY_TEST_LONG=1` the numbers and limits are those of the tables. What single connections get
//! is in [`crate::door`].

mod connections;
mod flood;
mod frozen;
mod scales;
mod server;
mod transfers;
