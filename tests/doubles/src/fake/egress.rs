//! The egress of this world's machines, without processes: it lives as long as its VM, unless a test says otherwise.

use super::FakeHypervisor;
use super::faults::Op;
use dayfly::BoxFuture;
use dayfly::network::{Egress, EgressError, EgressOf, Terms};
use dayfly::vm::{VmId, VmName};
use dayfly_egress::audit::Destination;
use dayfly_egress::policy::Policy;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How long one may take to begin.
const BEGIN_DEADLINE: Duration = Duration::from_secs(15);

/// How long a hung one is waited for before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// One process.
#[derive(Clone, Debug)]
pub(super) struct Carrier {
    policy: Policy,
    alive: bool,
    /// How often one was begun for this VM.
    begun: u32,
    /// It does not end with its VM.
    hung: bool,
    /// Nor can it be killed.
    stuck: bool,
    reached: Vec<Destination>,
    ended: Arc<Notify>,
}

impl Carrier {
    pub(super) fn is_alive(&self) -> bool {
        self.alive
    }

    /// Its VM's port hangs up.
    pub(super) fn hang_up(&mut self) {
        if !self.hung {
            self.die();
        }
    }

    fn die(&mut self) {
        self.alive = false;
        self.ended.notify_waiters();
    }
}

/// What a test does to them, and asks of them.
impl FakeHypervisor {
    /// The process of this VM dies.
    pub fn kill_egress(&self, id: &VmId) {
        if let Some(carrier) = self.world().carriers.get_mut(&VmName::from(id.clone())) {
            carrier.die();
        }
    }

    /// The process of this VM will not end with it. `stuck`: nor can it be killed.
    pub fn hang_egress(&self, id: &VmId, stuck: bool) {
        if let Some(carrier) = self.world().carriers.get_mut(&VmName::from(id.clone())) {
            (carrier.hung, carrier.stuck) = (true, stuck);
        }
    }

    /// The job in this VM has reached these.
    pub fn reach(&self, id: &VmId, reached: Vec<Destination>) {
        if let Some(carrier) = self.world().carriers.get_mut(&VmName::from(id.clone())) {
            carrier.reached = reached;
        }
    }

    /// Whether a process carries this VM's egress, and how often one was begun; `None`: there has been none.
    #[must_use]
    pub fn egress(&self, id: &VmId) -> Option<(bool, u32)> {
        self.world().carriers.get(&VmName::from(id.clone())).map(|carrier| (carrier.alive, carrier.begun))
    }

    /// The policy that the newest process of this VM was told.
    #[must_use]
    pub fn egress_policy(&self, id: &VmId) -> Option<Policy> {
        self.world().carriers.get(&VmName::from(id.clone())).map(|carrier| carrier.policy.clone())
    }
}

impl Egress for FakeHypervisor {
    fn ensure<'a>(&'a self, of: &'a EgressOf, terms: &'a Terms) -> BoxFuture<'a, Result<(), EgressError>> {
        Box::pin(async move {
            let name = VmName::from(of.vm.clone());
            let begun = self.wire(Op::BeginEgress, &name.to_string(), |world| {
                if !world.vms.contains_key(&name) {
                    return Ok(Err(io::Error::from(io::ErrorKind::ConnectionRefused)));
                }
                let carrier = world.carriers.entry(name.clone()).or_insert_with(|| Carrier {
                    policy: terms.policy.clone(),
                    alive: false,
                    begun: 0,
                    hung: false,
                    stuck: false,
                    reached: Vec::new(),
                    ended: Arc::default(),
                });
                if !carrier.alive {
                    (carrier.alive, carrier.policy) = (true, terms.policy.clone());
                    carrier.begun += 1;
                }
                Ok(Ok(()))
            });
            if matches!(&begun, Err(error) if error.kind() == io::ErrorKind::TimedOut) {
                tokio::time::sleep(BEGIN_DEADLINE).await;
            }
            begun.map_err(EgressError::Start)?.map_err(EgressError::Port)
        })
    }

    fn gone<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let name = VmName::from(of.vm.clone());
            let alive = || {
                let world = self.world();
                world.carriers.get(&name).filter(|carrier| carrier.alive).map(|carrier| carrier.ended.clone())
            };
            while let Some(ended) = alive() {
                let ended = ended.notified();
                // Looked at again, now that nothing can be missed.
                if alive().is_some() {
                    ended.await;
                }
            }
        })
    }

    fn audit<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<Vec<Destination>>> {
        Box::pin(async move {
            let name = VmName::from(of.vm.clone());
            self.wire(Op::ReadAudit, &name.to_string(), |world| {
                Ok(world.carriers.get(&name).map(|carrier| carrier.reached.clone()).unwrap_or_default())
            })
        })
    }

    fn end<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let name = VmName::from(of.vm.clone());
            let is_hung = || self.world().carriers.get(&name).is_some_and(|carrier| carrier.alive);
            if is_hung() {
                tokio::time::sleep(END_PATIENCE).await;
            }
            self.wire(Op::EndEgress, &name.to_string(), |world| {
                let Some(carrier) = world.carriers.get_mut(&name) else { return Ok(()) };
                if carrier.stuck {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                carrier.die();
                world.carriers.remove(&name);
                Ok(())
            })
        })
    }
}
