//! The program as the daemon starts it, with a guest at the other end of its port that does as the test says, resolvers and
//! far ends on loopback.
#![allow(clippy::unwrap_used, reason = "tests: a panic is a failed one")]

mod begin;
mod limits;
mod names;
mod public;
mod streams;
mod support;
