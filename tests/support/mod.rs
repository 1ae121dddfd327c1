//! The world that a daemon lives in, whole, in one thread, on paused time and without sockets:
//! GitLab's stand-in, a fake hypervisor with scripted guests, files in memory.

pub mod canary;
pub mod guest;
pub mod log;
pub mod mortal;
pub mod world;
