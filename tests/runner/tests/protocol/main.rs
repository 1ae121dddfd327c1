//! The stand-in against a scripted GitLab, over a socket.
//!
//! With `DAYFLY_GITLAB_RUNNER=/path/to/gitlab-runner` the same tests run the official program (19.3): what they
//! expect is its behaviour, not an opinion about it.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a blocking test of a blocking program: it starts processes and has no Tokio"
)]

mod reports;
mod stops;
mod support;
mod transfers;
