//! What must hold for any bytes? One function per kind of input, for the fuzzer and for proptest alike.
//!
//! Each takes bytes as somebody hostile would send them, drives the code that reads them, and panics if what came
//! out breaks the property that stands above it. `fuzz/fuzz_targets` has three lines for each; `tests` below runs
//! the same functions on the committed corpus and on mutations of it, wherever cargo runs.
//!
//! Where bytes arrive in pieces, how they are cut follows from the bytes themselves ([`Cuts`](crate::pieces::Cuts)), so that an input is
//! a whole case and repeats itself.
#![expect(clippy::unwrap_used, reason = "a property fails by panicking")]

mod config;
mod egress;
mod gitlab;
mod guest;
mod guest_config;
mod image;
mod journal;
mod libvirt;
mod pipeline;
mod wire;
mod wishes;

pub use config::config;
pub use egress::{connect_target, dns_message, egress_policy, tls_hello};
pub use gitlab::{gitlab_answers, payload};
pub use guest::{
    artifact_upload, chunked_body, content_range, forwarded_headers, greeting_door, greeting_relay, proxy,
    request_head, requests, route, update_body,
};
pub use guest_config::guest_config;
pub use image::image;
pub use journal::journal;
pub use libvirt::{domain_xml, libvirt_answers};
pub use pipeline::pipeline;
pub use wire::{wire_handshake, wire_session};
pub use wishes::wishes;

/// One kind of input.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name: of the function, of the file in `fuzz/fuzz_targets`, and of its corpus.
    pub name: &'static str,
    /// Panics if the property does not hold for these bytes.
    pub check: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "artifact_upload", check: artifact_upload },
    Target { name: "chunked_body", check: chunked_body },
    Target { name: "config", check: config },
    Target { name: "connect_target", check: connect_target },
    Target { name: "content_range", check: content_range },
    Target { name: "dns_message", check: dns_message },
    Target { name: "domain_xml", check: domain_xml },
    Target { name: "egress_policy", check: egress_policy },
    Target { name: "forwarded_headers", check: forwarded_headers },
    Target { name: "gitlab_answers", check: gitlab_answers },
    Target { name: "greeting_door", check: greeting_door },
    Target { name: "greeting_relay", check: greeting_relay },
    Target { name: "guest_config", check: guest_config },
    Target { name: "image", check: image },
    Target { name: "journal", check: journal },
    Target { name: "libvirt_answers", check: libvirt_answers },
    Target { name: "payload", check: payload },
    Target { name: "pipeline", check: pipeline },
    Target { name: "proxy", check: proxy },
    Target { name: "request_head", check: request_head },
    Target { name: "requests", check: requests },
    Target { name: "route", check: route },
    Target { name: "tls_hello", check: tls_hello },
    Target { name: "update_body", check: update_body },
    Target { name: "wire_handshake", check: wire_handshake },
    Target { name: "wire_session", check: wire_session },
    Target { name: "wishes", check: wishes },
];

#[cfg(test)]
mod tests;
