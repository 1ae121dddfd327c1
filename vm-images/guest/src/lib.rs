//! What runs inside a VM: it takes the guest config, gives the machine its identity, runs one
//! `gitlab-runner run-single` behind a relay, and powers the machine off.
//!
//! ```text
//! channel ──config──► apply (seed, clock, names, network, files)
//!    ▲                  │
//!    └── reports ── main ──► relay (192.0.2.1:80) ◄── gitlab-runner
//!                          │        │ proofs, then bytes both ways
//!                          │        ▼
//!                          │      the door, on the host
//!                          ├──► shell, for a host that asks for one
//!                          ├──► egress (all else that leaves), where there is no network card
//!                          └──► power off: runner gone, door silent, or anything failed
//! ```
//!
//! A machine that is to be frozen starts its runner first and becomes somebody later ([`hold`]).
//!
//! Std threads, but for the wire to the door, the egress and the shell, which have a runtime on a thread each. Nothing here protects
//! itself from the job: a job may
//! be root, and the VM is the wall. `vm-images/README.md` has the contract in words.

pub mod apply;
pub mod channel;
pub mod clone;
pub mod console;
pub mod egress;
pub mod hold;
pub mod host_clock;
pub mod machine;
pub mod modules;
#[cfg(test)]
mod namespace;
pub mod netfilter;
pub mod netlink;
pub mod relay;
pub mod runner;
pub mod shell;
pub mod stay;
pub mod users;
