//! What the test tools share: a fake host whose doors are real sockets, and a daemon on it.

pub mod doors;
pub mod host;
