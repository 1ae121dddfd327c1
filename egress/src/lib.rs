//! dayfly's egress: how does what a job sends out leave a VM that has no network card (decision D27)?
//!
//! One small process for each VM, outside of it and apart from the daemon. It takes the guest's streams from the VM's port,
//! resolves names, decides, connects, copies and writes down where it went:
//!
//! ```text
//! policy ── what a job may reach: pure, and the daemon's too
//! start ── what the process is told, over its standard input; the daemon's side of it
//! run ── the process, from its first call to its end
//! confine ── what it can no longer do once it is ready
//! serve, port ── the sessions on the port, one after the other, and their streams
//! dns ── names that the guest asks for: what it is told, and what an address counts for
//! stream, hello, rate ── one connection: the decision, both ways in constant memory, at the pace that is allowed
//! audit, notes ── where it went, for the daemon to read
//! ```
//!
//! The guest is hostile: each count, size and duration that it can influence has a bound. The process holds no secret of
//! GitLab, and what it knows of its VM is worth nothing elsewhere. It outlives the daemon as the VM does, and ends with
//! the VM.

pub mod audit;
mod confine;
pub mod dns;
pub mod hello;
mod notes;
pub mod policy;
mod port;
mod rate;
mod run;
mod serve;
mod start;
mod stream;

pub use confine::ConfineError;
pub use run::run;
pub use start::{HandOverError, START_BYTES_MAX, Start, StartError, VERSION, hand_over};
pub use stream::target;

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
