//! What the test tools share: a daemon on a host with real sockets, and what a guest does there.

pub mod directories;
pub mod host;
pub mod image;
pub mod killing;
