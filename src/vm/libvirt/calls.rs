//! What is asked of libvirt, as plain blocking calls on one connection. Runs on the threads of
//! [`super::workers`] only; `virt`'s types live and die here.
//!
//! Each call looks before it acts, so each may run twice. Only machines whose metadata is ours are
//! ever touched: the names of others, even if they look like ours, change nothing.

use crate::planted::{self, Bug};
use crate::vm::domain_xml::{self, METADATA_NAMESPACE, Metadata, Ownership};
use crate::vm::{HostInfo, InstallationId, VmName, VmSpec, VmState, VmSummary};
use rustix::process::getegid;
use std::error::Error;
use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, DomainState, DomainStateReason};
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
        let ownership = qemu_uid.map(|qemu_uid| Ownership { qemu_uid, socket_gid: getegid().as_raw() });
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
            let running = ours && state(&domain)? != VmState::Gone;
            return if running {
                Ok(())
            } else {
                Err(CallError::Refused("a domain of this name is somebody else's".into()))
            };
        }
        let ownership = self.ownership()?;
        let xml = match domain_type {
            None => domain_xml::write(spec, ownership),
            Some(domain_type) => domain_xml::write_as(spec, ownership, domain_type),
        };
        let xml = xml.map_err(|error| CallError::Refused(error.into()))?;
        self.connect.create_domain_xml(&xml, sys::VIR_DOMAIN_NONE)?;
        Ok(())
    }

    pub(super) fn state(&mut self, name: &VmName) -> Result<VmState, CallError> {
        match self.lookup(name)? {
            Some(domain) => state(&domain),
            None => Ok(VmState::Gone),
        }
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
            let foreign = |m: &Metadata| m.installation != *installation && !planted::on(Bug::ForeignReaped);
            if metadata(&domain)?.is_none_or(|m| foreign(&m) || m.vm != *name.id()) {
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

/// The state of a domain. `info` tells a vanished one, which `state` does not; `state` tells the
/// reason of a pause, which `info` does not: libvirt shows a domain that it is starting as paused.
fn state(domain: &Domain) -> Result<VmState, CallError> {
    let Some(info) = unless_gone(domain.info())? else { return Ok(VmState::Gone) };
    Ok(match info.state {
        Enum::Known(DomainState::Shutoff | DomainState::Crashed) => VmState::Gone,
        Enum::Known(DomainState::Paused) => match domain.state()?.1 {
            Enum::Known(DomainStateReason::Paused(Enum::Known(DomainPausedReason::StartingUp))) => VmState::Running,
            _ => VmState::Paused,
        },
        Enum::Known(DomainState::PMSuspended) => VmState::Paused,
        _ => VmState::Running,
    })
}
