//! Forwards: is each of them one that a machine can have, and is it nothing that a job must not reach?

use super::{Report, name_of, unique};
use crate::config::Config;
use crate::config::origin::nearest_name;
use crate::network::ForwardConfig;
use crate::web::Address;
use dayfly_guest_config::PORTS_TAKEN;
use std::net::SocketAddr;

/// Forwards at most: a machine listens for each of those of its class.
const FORWARDS_MAX: usize = 32;

pub(super) fn judge(config: &Config, report: &mut Report<'_>) {
    for (i, forward) in config.forward.iter().enumerate() {
        one(i, forward, config, report);
    }
    unique("forward", config.forward.iter().map(|forward| forward.name.as_str()), report);
    if config.forward.len() > FORWARDS_MAX {
        report.error("forward", format!("has more than {FORWARDS_MAX} forwards"), "leave some out");
    }
}

fn one(i: usize, forward: &ForwardConfig, config: &Config, report: &mut Report<'_>) {
    let key = |name: &str| format!("forward.{i}.{name}");
    name_of(&key("name"), &forward.name, report);
    let address = forward.address;
    if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() {
        let what = format!("is `{address}`, to which nobody can connect");
        report.error(&key("address"), what, "name an address of this host or its network, like 127.0.0.1:3142");
    }
    if is_status(config, address) {
        let what = format!("is `{address}`, where this daemon's own status page listens");
        report.error(&key("address"), what, "jobs must not reach that; forward another address");
    }
    if forward.port == 0 || PORTS_TAKEN.contains(&forward.port) {
        let what = format!("is {}, at which the guest program listens itself", forward.port);
        report.error(&key("port"), what, "choose another one");
    }
    if forward.classes.is_empty() {
        report.error(&key("classes"), "is empty", "name the classes whose jobs are to reach it");
    }
    for (n, name) in forward.classes.iter().enumerate() {
        if !config.class.iter().any(|class| class.name == *name) {
            let known = config.class.iter().map(|class| class.name.as_str());
            let remedy = nearest_name(name, known)
                .map_or_else(|| "add a [[class]] of this name".into(), |meant| format!("did you mean `{meant}`?"));
            report.error(&key(&format!("classes.{n}")), format!("is no class: `{}`", name.escape_debug()), remedy);
        }
    }
    let shares = |other: &&ForwardConfig| other.classes.iter().any(|class| forward.classes.contains(class));
    let before = config.forward[..i].iter().filter(shares).find(|other| other.port == forward.port);
    if let Some(before) = before {
        let what = format!("is {}, as that of forward `{}` of the same class", forward.port, before.name);
        report.error(&key("port"), what, "choose another one");
    }
}

/// Whether the status page listens there.
fn is_status(config: &Config, address: SocketAddr) -> bool {
    let Some(Address::Tcp(status)) = &config.status.listen else { return false };
    status.port() == address.port()
        && (status.ip() == address.ip() || status.ip().is_unspecified() && address.ip().is_loopback())
}
