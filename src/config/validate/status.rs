//! May others reach the status listener, and by what are they known?

use super::Report;
use crate::config::Config;
use crate::network::Choice;
use crate::web::Address;

/// Bytes of a socket's path at most, less the end of the text.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Other daemons of a fleet at most: the page asks them all.
const FLEET_MAX: usize = 100;

/// No guest may reach it without the token, and nobody in the clear.
pub(super) fn judge(config: &Config, report: &mut Report<'_>) {
    let (key, status) = ("status.listen", &config.status);
    match &status.listen {
        Some(Address::Tcp(address)) if !address.ip().is_loopback() => {
            let missing: Vec<&str> = [
                ("token_file", status.token_file.is_none()),
                ("tls_cert_file", status.tls_cert_file.is_none()),
                ("tls_key_file", status.tls_key_file.is_none()),
            ]
            .into_iter()
            .filter_map(|(name, missing)| missing.then_some(name))
            .collect();
            if !missing.is_empty() {
                report.error(
                    key,
                    format!("is `{address}`: others could read what runs here, in the clear"),
                    format!("set `status.{}` too, or use a unix socket", missing.join("`, `status.")),
                );
            }
        }
        Some(Address::Tcp(address)) if guests_reach_loopback(config) => report.error(
            key,
            format!("is `{address}`, on the host's loopback, which a job's machine reaches in the network `user`"),
            "use the path of a unix socket (a Prometheus reads it through a proxy, or `dayfly metrics` and node_exporter's textfile collector), or set `network = \"relay\"` in every [[class]]",
        ),
        Some(Address::Unix(path)) if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX => {
            let what = format!("is longer than {SOCKET_PATH_BYTES_MAX} bytes, too long for a socket");
            report.error(key, what, "choose a shorter path");
        }
        _ => {}
    }
    match (&status.tls_cert_file, &status.tls_key_file) {
        (Some(_), None) => report.error("status.tls_cert_file", "has no key", "set `status.tls_key_file` too"),
        (None, Some(_)) => report.error("status.tls_key_file", "has no certificate", "set `status.tls_cert_file` too"),
        _ => {}
    }
    for (i, url) in status.fleet.iter().enumerate() {
        if url.scheme() != "https" || url.host_str().is_none() {
            let what = format!("is `{url}`: a token goes there");
            report.error(&format!("status.fleet.{i}"), what, "write it like `https://ci-2.example.com:9480`");
        }
    }
    if status.fleet.len() > FLEET_MAX {
        report.error(
            "status.fleet",
            format!("has {} addresses", status.fleet.len()),
            format!("name up to {FLEET_MAX}"),
        );
    }
    if !status.fleet.is_empty() && status.token_file.is_none() {
        report.error(
            "status.fleet",
            "has no token to show there",
            "set `status.token_file`; all of a fleet have the same",
        );
    }
}

/// Whether what listens on the host's loopback may be open to guests of a class: one that says nothing has the network
/// `user` as long as its image knows no other.
fn guests_reach_loopback(config: &Config) -> bool {
    config.class.iter().any(|class| class.network.or(config.network.mode) != Some(Choice::Relay))
}
