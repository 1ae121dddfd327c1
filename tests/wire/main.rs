//! The wire ring: hyper, reqwest and the relay on loopback, with short limits.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

#[path = "../support/mod.rs"]
#[allow(
    unreachable_pub,
    missing_docs,
    dead_code,
    clippy::disallowed_methods,
    reason = "shared by several test binaries, each of which uses a part"
)]
mod support;

mod clones;
mod door;
mod gitlab_client;
mod gitlab_connections;
mod gitlab_mock;
mod gitlab_polls;
mod gitlab_server;
mod gitlab_tls;
mod gitlab_tls_server;
mod gitlab_uploads;
mod loads;
mod secrets;
mod process;
mod register;
mod runner_download;
