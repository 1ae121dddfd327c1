//! The wire ring: hyper, reqwest and the relay on loopback, with short limits.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod door;
mod gitlab_client;
mod gitlab_connections;
mod gitlab_polls;
mod gitlab_server;
mod gitlab_tls;
mod gitlab_tls_server;
mod gitlab_uploads;
mod loads;
mod process;
