//! The lifecycle ring: the whole daemon, one thread, paused time, no sockets.

#[path = "../support/mod.rs"]
mod support;

mod ends;
