//! The lifecycle ring: the whole daemon, one thread, paused time, no sockets.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests: a panic is a failed one, and its tasks end with its runtime"
)]

#[path = "../support/mod.rs"]
#[allow(
    unreachable_pub,
    missing_docs,
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]
mod support;

mod canary;
mod cancels;
mod clocks;
mod clones;
mod crashes;
mod determinism;
mod egress;
mod ended;
mod endings;
mod ends;
mod exactness;
mod exec;
mod faults;
mod forwards;
mod found_by_sim;
mod gitlab;
mod handover;
mod host;
mod hypervisor;
mod identity;
mod kept;
mod kill_points;
mod machine_spec;
mod machines;
mod metrics;
mod moods;
mod networks;
mod night;
mod panics;
mod proof;
mod refusals;
mod reload;
mod restored;
mod room;
mod rules;
mod storage;
mod tokens;
mod trace_waits;
mod twice;
mod unassigned;
mod used;
mod wire;
mod wishes;
