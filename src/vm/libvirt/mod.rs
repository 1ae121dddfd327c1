//! The real hypervisor: QEMU by libvirt. Only this directory says `virt::`, and no type of it leaves.
//!
//! ## Who owns what
//!
//! At a **session** libvirtd (`qemu:///session`) QEMU runs as ourselves, and there is nothing to
//! arrange. At the **system** one (`qemu:///system`) libvirtd is root, QEMU runs as another user
//! (Debian: `libvirt-qemu`, 64055), and we are an unprivileged member of group `libvirt`, which
//! may call it. Tried on Debian 12, libvirt 9.0, with a `dayfly` user in no other group:
//!
//! | Thing | Needs | Why |
//! | --- | --- | --- |
//! | overlay | directory `0711`, and every one above it passable to others | we make it `0600`; libvirtd gives it to QEMU's user for the VM's life (`dynamic_ownership`) and back at its end; QEMU opens it by path. We unlink it, as the directory is ours |
//! | base image, kernel, initrd | readable to others (`0644` in `0755`) | the base stays ours: its label says `relabel='no'`, or else QEMU's user could rewrite it for all VMs to come. libvirtd does give kernel and initrd to QEMU's user while a VM runs, and has no switch for it; AppArmor or SELinux, where it is on, lets QEMU read them only. A VM with a user of its own has copies of both, for two owners of one file are refused by libvirtd |
//! | sockets | directory ours, `0700` will do | libvirtd binds them as root and passes them to QEMU, mode `0775`, owner QEMU's user, group **our own**: the label in the XML asks for it. Without it the group would be QEMU's and we could not connect. libvirtd unlinks them with the VM |
//!
//! With a **user for each VM** ([`Confinement`](super::Confinement)) the domain has a label of its own: QEMU runs as that user and the
//! group of its name, overlay and sockets are its, and QEMUs of different VMs are strangers to the kernel. It needs the groups
//! `kvm`, and `libvirt-qemu` (or it cannot pass `/var/lib/libvirt/qemu` to its own directory); neither as its own group, or
//! all VMs' directories would be open to it.
//!
//! A file that QEMU cannot open makes [`Hypervisor::start`] fail with QEMU's own "Permission denied".
//! The domain's description (paths, installation, runner, job) can be read by every user of the
//! host at libvirtd's read-only socket; it holds no secret.

mod calls;
mod endings;
mod log;
mod workers;

use super::paths::RealPaths;
use super::sockets::{Sockets, check_path};
use super::{Config, Host, HostInfo, Hypervisor, InstallationId, Usage, VmError, VmName, VmSpec, VmState, VmSummary};
use crate::BoxFuture;
use endings::Endings;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use workers::Workers;

/// A libvirtd that has just been started asks each QEMU what it can: seconds, once.
const PROBE_DEADLINE: Duration = Duration::from_secs(30);

/// Takes 0.35 s on an idle host.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Takes 0.2 s; libvirt itself gives QEMU 15 s from SIGTERM over SIGKILL to giving up.
const DESTROY_DEADLINE: Duration = Duration::from_secs(30);

/// Takes milliseconds.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// libvirt at one URI. Connects when first asked, and again whenever the connection is lost.
pub struct Libvirt {
    workers: Workers,
    endings: Endings,
    domain_type: Option<String>,
    /// See [`session_logs`].
    session_logs: Option<PathBuf>,
}

impl fmt::Debug for Libvirt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Libvirt")
    }
}

impl Libvirt {
    /// Nothing is connected to yet.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        // Else libvirt prints its errors itself, past our log.
        virt::error::clear_error_callback();
        Self {
            workers: Workers::new(&config.uri),
            endings: Endings::new(&config.uri),
            domain_type: None,
            session_logs: session_logs(&config.uri, |name| std::env::var_os(name)),
        }
    }

    /// The host whose machines these are.
    #[must_use]
    pub fn host(self) -> Host {
        let paths = Arc::new(RealPaths::default());
        let sockets = Sockets::new(paths.clone(), self.session_logs.clone());
        Host { sockets, ..Host::new(Arc::new(self), paths) }
    }

    /// For `test:///default`, whose driver knows domains of type `test` only.
    #[must_use]
    pub fn with_domain_type(mut self, domain_type: &str) -> Self {
        self.domain_type = Some(domain_type.to_owned());
        self
    }
}

/// Where a libvirtd of our own session keeps one log per domain, for ever: as libvirt's
/// `virGetUserCacheDirectory` and `qemuStateInitialize` have it. The system's are root's, and rotated.
fn session_logs(uri: &str, variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let of = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = of("XDG_CACHE_HOME").or_else(|| of("HOME").map(|home| home.join(".cache")))?;
    uri.starts_with("qemu:///session").then(|| cache.join("libvirt/qemu/log"))
}

/// Where the system's libvirtd keeps such logs. They are root's.
const SYSTEM_LOGS: &str = "/var/log/libvirt/qemu";

impl Hypervisor for Libvirt {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(self.workers.call("probe", "host".into(), PROBE_DEADLINE, |link| link.probe()))
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move {
            let name = VmName::from(spec.id.clone()).to_string();
            for path in spec.sockets() {
                check_path(&path).map_err(|error| VmError::refused("start VM", &name, error))?;
            }
            self.endings.watch();
            let (spec, domain_type) = (spec.clone(), self.domain_type.clone());
            let start = move |link: &mut calls::Link| link.start(&spec, domain_type.as_deref());
            self.workers.call("start VM", name, START_DEADLINE, start).await
        })
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        let wanted = name.clone();
        let look = move |link: &mut calls::Link| link.state(&wanted);
        Box::pin(async move {
            self.endings.watch();
            let state = self.workers.call("read state of VM", name.to_string(), LOOK_DEADLINE, look).await?;
            Ok(match state {
                VmState::Gone => self.endings.of(name).await.map_or(VmState::Gone, VmState::Ended),
                state => state,
            })
        })
    }

    fn last_words<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Option<String>> {
        let logs = self.session_logs.clone().unwrap_or_else(|| SYSTEM_LOGS.into());
        let path = logs.join(format!("{name}.log"));
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || log::head(&path));
            timeout(LOOK_DEADLINE, read).await.ok()?.ok()?
        })
    }

    fn usage<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Usage> {
        let wanted = name.clone();
        Box::pin(async move {
            let look = move |link: &mut calls::Link| link.usage(&wanted);
            self.workers.call("look at the use of VM", name.to_string(), LOOK_DEADLINE, look).await.unwrap_or_default()
        })
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        let wanted = name.clone();
        Box::pin(self.workers.call("destroy VM", name.to_string(), DESTROY_DEADLINE, move |link| link.destroy(&wanted)))
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        let wanted = installation.clone();
        self.endings.watch();
        Box::pin(
            self.workers.call("list VMs of", installation.to_string(), LOOK_DEADLINE, move |link| link.list(&wanted)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_of_domains_are_ours_to_remove_in_our_own_session_only() {
        let of = |uri: &str, set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|(k, v)| ((*k).to_owned(), v.into())).collect();
            session_logs(uri, |name| set.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        };
        let home = [("HOME", "/home/ci")];
        assert_eq!(of("qemu:///session", &home), Some("/home/ci/.cache/libvirt/qemu/log".into()));
        let both = [("HOME", "/home/ci"), ("XDG_CACHE_HOME", "/cache")];
        assert_eq!(of("qemu:///session", &both), Some("/cache/libvirt/qemu/log".into()));
        assert_eq!(of("qemu:///session", &[("HOME", "relative")]), None);
        assert_eq!(of("qemu:///system", &home), None);
    }
}
