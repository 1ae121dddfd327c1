//! What is asked of libvirt, as plain blocking calls on one connection. Runs on the threads of
//! [`super::workers`] only; `virt`'s types live and die here.
//!
//! Each call looks before it acts, so each may run twice. Only machines whose metadata is ours are
//! ever touched: the names of others, even if they look like ours, change nothing.

use crate::vm::domain_xml::{self, METADATA_NAMESPACE, Metadata, Ownership};
use crate::vm::{Ending, HostInfo, InstallationId, Pause, Usage, VmName, VmSpec, VmState, VmSummary};
use rustix::process::getegid;
use std::error::Error;
use std::time::Duration;
use virt::connect::Connect;
use virt::domain::{Domain, DomainCrashedReason, DomainPausedReason, DomainState, DomainStateReason};
use virt::enumutil::Enum;
use virt::sys;

type Source = Box<dyn Error + Send + Sync>;

/// Why a call failed, in nobody's types.
#[derive(Debug)]
pub(super) enum CallError {
    /// No connection.
    Unreachable(Source),
    /// libvirt answered, and refused.
    Refused(Source),
}

/// libvirt's own words.
#[derive(Debug, thiserror::Error)]
#[error("{message} (libvirt error {code})")]
struct LibvirtError {
    code: u32,
    message: String,
}

impl From<virt::error::Error> for LibvirtError {
    fn from(error: virt::error::Error) -> Self {
        Self { code: error.code().to_raw(), message: error.message().to_owned() }
    }
}

impl From<virt::error::Error> for CallError {
    fn from(error: virt::error::Error) -> Self {
        Self::Refused(LibvirtError::from(error).into())
    }
}

/// `Ok(None)` for "there is no such domain (any more)".
fn unless_gone<T>(result: Result<T, virt::error::Error>) -> Result<Option<T>, CallError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether libvirt refused a domain because it cannot hold it to limits, as in a container: there are no cgroups, or it may
/// not give QEMU the locked memory that goes with a limit.
fn is_of_limits(error: &virt::error::Error) -> bool {
    let said = error.message().to_lowercase();
    ["cgroup", "cannot limit locked memory", "tuning is not available"].iter().any(|words| said.contains(words))
}

/// A connection, and what is learnt once on it.
pub(super) struct Link {
    connect: Connect,
    ownership: Option<Option<Ownership>>,
}

impl Link {
    pub(super) fn open(uri: &str) -> Result<Self, CallError> {
        let connect =
            Connect::open(Some(uri)).map_err(|error| CallError::Unreachable(LibvirtError::from(error).into()))?;
        Ok(Self { connect, ownership: None })
    }

    pub(super) fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    /// How files get to QEMU's user: asked once per connection, for it takes a few milliseconds
    /// and changes with libvirtd's configuration, so with its restart.
    fn ownership(&mut self) -> Result<Option<Ownership>, CallError> {
        if let Some(known) = self.ownership {
            return Ok(known);
        }
        let qemu_uid = domain_xml::read_qemu_uid(&self.connect.capabilities()?);
        let ownership = qemu_uid.map(|qemu_uid| Ownership { qemu_uid, socket_gid: getegid().as_raw(), limits: true });
        Ok(*self.ownership.insert(ownership))
    }

    pub(super) fn probe(&mut self) -> Result<HostInfo, CallError> {
        let release = |version: u32| format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000);
        let (kind, hypervisor) = (self.connect.driver_type()?, release(self.connect.hyp_version()?));
        let node = self.connect.node_info()?;
        Ok(HostInfo {
            version: format!("{kind} {hypervisor}, libvirt {}", release(self.connect.lib_version()?)),
            cpus: node.cpus,
            memory_mib: node.memory / 1024,
            kvm_offered: domain_xml::offers_kvm(&self.connect.capabilities()?),
        })
    }

    /// Creates a transient domain. Nothing is defined, so nothing survives its end.
    pub(super) fn start(&mut self, spec: &VmSpec, domain_type: Option<&str>) -> Result<(), CallError> {
        let name = VmName::from(spec.id.clone());
        if let Some(domain) = self.lookup(&name)? {
            let ours = metadata(&domain)?.is_some_and(|m| m.installation == spec.installation && m.vm == spec.id);
            let running = ours && matches!(state(&domain)?, VmState::Running | VmState::Paused(_));
            return if running {
                Ok(())
            } else {
                Err(CallError::Refused("a domain of this name is somebody else's".into()))
            };
        }
        let ownership = self.ownership()?;
        match self.create(spec, ownership, domain_type)? {
            Err(error) if ownership.is_some_and(|its| its.limits) && is_of_limits(&error) => {
                tracing::warn!(
                    error = error.message(),
                    "libvirt can hold no machine to limits of memory and CPUs here"
                );
                // For as long as this connection lasts.
                let without = ownership.map(|its| Ownership { limits: false, ..its });
                self.ownership = Some(without);
                self.create(spec, without, domain_type)??;
            }
            created => created?,
        }
        Ok(())
    }

    fn create(
        &self,
        spec: &VmSpec,
        ownership: Option<Ownership>,
        domain_type: Option<&str>,
    ) -> Result<Result<(), virt::error::Error>, CallError> {
        let xml = match domain_type {
            None => domain_xml::write(spec, ownership),
            Some(domain_type) => domain_xml::write_as(spec, ownership, domain_type),
        };
        let xml = xml.map_err(|error| CallError::Refused(error.into()))?;
        Ok(self.connect.create_domain_xml(&xml, sys::VIR_DOMAIN_NONE).map(drop))
    }

    pub(super) fn state(&mut self, name: &VmName) -> Result<VmState, CallError> {
        match self.lookup(name)? {
            Some(domain) => state(&domain),
            None => Ok(VmState::Gone),
        }
    }

    /// What libvirt knows of a domain's use; what it does not tell of one kind is left out.
    pub(super) fn usage(&mut self, name: &VmName) -> Result<Usage, CallError> {
        let Some(domain) = self.lookup(name)? else { return Ok(Usage::default()) };
        let cpu = unless_gone(domain.info())?.map(|info| Duration::from_nanos(info.cpu_time));
        let resident = domain.memory_stats(0).ok().and_then(|stats| {
            let rss = stats.into_iter().find(|stat| stat.tag == sys::VIR_DOMAIN_MEMORY_STAT_RSS)?;
            rss.val.checked_mul(1024)
        });
        let written = domain.block_stats(domain_xml::DISK).ok().and_then(|stats| u64::try_from(stats.wr_bytes).ok());
        Ok(Usage { memory_bytes: resident, cpu, disk_written_bytes: written, ..Usage::default() })
    }

    pub(super) fn destroy(&mut self, name: &VmName) -> Result<(), CallError> {
        let Some(domain) = self.lookup(name)? else { return Ok(()) };
        match metadata(&domain)? {
            Some(ours) if ours.vm == *name.id() => {}
            // It went between the two calls.
            None if state(&domain)? == VmState::Gone => return Ok(()),
            _ => return Err(CallError::Refused("its metadata is not ours: left alone".into())),
        }
        match unless_gone(domain.destroy()) {
            Ok(_) => Ok(()),
            Err(_) if state(&domain)? == VmState::Gone => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn list(&mut self, installation: &InstallationId) -> Result<Vec<VmSummary>, CallError> {
        let mut ours = Vec::new();
        for domain in self.connect.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)? {
            let Some(name) = VmName::parse(&domain.name()?) else { continue };
            if metadata(&domain)?.is_none_or(|m| m.installation != *installation || m.vm != *name.id()) {
                continue;
            }
            match state(&domain)? {
                VmState::Gone => {}
                state => ours.push(VmSummary { name, state }),
            }
        }
        ours.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(ours)
    }

    fn lookup(&self, name: &VmName) -> Result<Option<Domain>, CallError> {
        unless_gone(self.connect.lookup_domain_by_name(&name.to_string()))
    }
}

/// Our metadata on a domain; `None` if it has none, or is gone.
fn metadata(domain: &Domain) -> Result<Option<Metadata>, CallError> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or_default();
    match domain.metadata(kind, Some(METADATA_NAMESPACE), 0) {
        Ok(xml) => Ok(domain_xml::read_metadata(&xml)),
        Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN_METADATA => Ok(None),
        Err(error) => unless_gone(Err(error)),
    }
}

/// The state of a domain. `info` tells a vanished one, which `state` does not; `state` tells the reason, which `info`
/// does not.
fn state(domain: &Domain) -> Result<VmState, CallError> {
    if unless_gone(domain.info())?.is_none() {
        return Ok(VmState::Gone);
    }
    let (state, reason) = domain.state()?;
    Ok(match (state, reason) {
        (Enum::Known(state), Enum::Known(reason)) => translate(state, reason),
        // What the binding says of a domain that has gone since, too.
        _ if unless_gone(domain.info())?.is_none() => VmState::Gone,
        _ => VmState::Running,
    })
}

/// libvirt's state and reason in our words.
fn translate(state: DomainState, reason: DomainStateReason) -> VmState {
    use DomainPausedReason as P;
    match (state, reason) {
        (DomainState::Paused, DomainStateReason::Paused(Enum::Known(paused))) => match paused {
            // libvirt shows a domain that it is starting, or ending, as paused.
            P::StartingUp | P::ShuttingDown => VmState::Running,
            P::IOError => VmState::Paused(Pause::Disk),
            P::User | P::Migration | P::Save | P::Dump | P::FromSnapshot | P::Snapshot => {
                VmState::Paused(Pause::Operator)
            }
            P::Watchdog => VmState::Ended(Ending::Hung),
            P::Crashed => VmState::Ended(Ending::Panicked),
            // An internal error of QEMU's or KVM's has no reason of its own there.
            P::Unknown | P::PostCopy | P::PostCopyFailed | P::APIError => VmState::Paused(Pause::Itself),
        },
        (DomainState::Paused, _) => VmState::Paused(Pause::Itself),
        (DomainState::Crashed, DomainStateReason::Crashed(Enum::Known(DomainCrashedReason::Panicked))) => {
            VmState::Ended(Ending::Panicked)
        }
        (DomainState::Crashed, _) => VmState::Ended(Ending::Died),
        (DomainState::PMSuspended, _) => VmState::Ended(Ending::Slept),
        (DomainState::Shutoff, _) => VmState::Gone,
        // Its guest has shut it down; libvirt has yet to end QEMU, and how it was is told by then.
        _ => VmState::Running,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt::domain::{DomainPMSuspendedReason, DomainRunningReason, DomainShutdownReason, DomainShutoffReason};

    fn paused(reason: DomainPausedReason) -> VmState {
        translate(DomainState::Paused, DomainStateReason::Paused(Enum::Known(reason)))
    }

    /// U50: each reason for which QEMU or libvirt stops a VM has its own name, and only an I/O error is a disk.
    #[test]
    fn each_reason_of_a_pause_has_its_own_name_and_only_an_io_error_is_a_disk() {
        use DomainPausedReason as P;
        let all = [
            (P::Unknown, VmState::Paused(Pause::Itself)),
            (P::User, VmState::Paused(Pause::Operator)),
            (P::Migration, VmState::Paused(Pause::Operator)),
            (P::Save, VmState::Paused(Pause::Operator)),
            (P::Dump, VmState::Paused(Pause::Operator)),
            (P::IOError, VmState::Paused(Pause::Disk)),
            (P::Watchdog, VmState::Ended(Ending::Hung)),
            (P::FromSnapshot, VmState::Paused(Pause::Operator)),
            (P::ShuttingDown, VmState::Running),
            (P::Snapshot, VmState::Paused(Pause::Operator)),
            (P::Crashed, VmState::Ended(Ending::Panicked)),
            (P::StartingUp, VmState::Running),
            (P::PostCopy, VmState::Paused(Pause::Itself)),
            (P::PostCopyFailed, VmState::Paused(Pause::Itself)),
            (P::APIError, VmState::Paused(Pause::Itself)),
        ];
        for (reason, expected) in all {
            assert_eq!(paused(reason), expected, "{reason:?}");
            assert_eq!(paused(reason) == VmState::Paused(Pause::Disk), reason == P::IOError, "{reason:?}");
        }
        let newer = DomainStateReason::Paused(Enum::Unknown(99));
        assert_eq!(translate(DomainState::Paused, newer), VmState::Paused(Pause::Itself), "a reason of tomorrow");
    }

    /// U8: what a guest does to itself is its end, never a pause.
    #[test]
    fn a_guest_that_sleeps_or_panics_has_ended() {
        let slept = DomainStateReason::PMSuspended(Enum::Known(DomainPMSuspendedReason::Unknown));
        assert_eq!(translate(DomainState::PMSuspended, slept), VmState::Ended(Ending::Slept));
        for (reason, ending) in
            [(DomainCrashedReason::Panicked, Ending::Panicked), (DomainCrashedReason::Unknown, Ending::Died)]
        {
            let reason = DomainStateReason::Crashed(Enum::Known(reason));
            assert_eq!(translate(DomainState::Crashed, reason), VmState::Ended(ending));
        }
        let off = DomainStateReason::Shutoff(Enum::Known(DomainShutoffReason::Shutdown));
        assert_eq!(translate(DomainState::Shutoff, off), VmState::Gone);
        let going = DomainStateReason::Shutdown(Enum::Known(DomainShutdownReason::User));
        assert_eq!(translate(DomainState::Shutdown, going), VmState::Running);
        let runs = DomainStateReason::Running(Enum::Known(DomainRunningReason::Booted));
        assert_eq!(translate(DomainState::Running, runs), VmState::Running);
    }
}
