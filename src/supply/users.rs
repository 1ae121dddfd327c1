//! As whom does the QEMU of this VM run? Users of the host's, each of one VM at a time.
//!
//! A user is chosen with the claim, so it stands in the owner's record before anything is made, and is given back with the
//! lease, when no record names it any more. A daemon that is killed leaves it in the record, and the next one adopts it.

use crate::network::LeaseError;
use crate::vm::VmUser;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// The users for VMs. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Users(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kind: Kind,
    /// Held for a line.
    taken: Mutex<BTreeSet<VmUser>>,
}

#[derive(Debug, Default)]
enum Kind {
    /// There are none: all QEMUs run as one user.
    #[default]
    None,
    /// One for each VM.
    Each(Vec<VmUser>),
    /// One for all VMs that belong to no job.
    Common(VmUser),
}

impl Users {
    /// One of these for each VM; of an empty list none.
    #[must_use]
    pub fn each(users: Vec<VmUser>) -> Self {
        let kind = if users.is_empty() { Kind::None } else { Kind::Each(users) };
        Self(Arc::new(Shared { kind, ..Shared::default() }))
    }

    /// The same for all VMs, none of which has a job in it.
    #[must_use]
    pub fn common(user: Option<VmUser>) -> Self {
        let kind = user.map_or(Kind::None, Kind::Common);
        Self(Arc::new(Shared { kind, ..Shared::default() }))
    }

    /// A user for a new VM, if VMs have such.
    ///
    /// # Errors
    /// All are taken.
    pub(super) fn take(&self) -> Result<Option<VmUser>, LeaseError> {
        match &self.0.kind {
            Kind::None => Ok(None),
            Kind::Common(user) => Ok(Some(user.clone())),
            Kind::Each(all) => {
                let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
                let free = all.iter().find(|user| !taken.contains(user));
                let free = free.ok_or(LeaseError::NoFreeUser(all.len()))?.clone();
                taken.insert(free.clone());
                Ok(Some(free))
            }
        }
    }

    /// One that a record of before names is taken, by that one.
    pub(super) fn adopt(&self, user: &VmUser) {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(user.clone());
    }

    /// Gives one back. Nothing runs as it any more, and no record names it.
    pub(super) fn release(&self, user: &VmUser) {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(user);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::VmUsers;

    fn names(text: &str) -> Vec<VmUser> {
        text.parse::<VmUsers>().unwrap().all()
    }

    /// U40: two VMs never have one user, whoever chose it, and a user that was given back is the next one's.
    #[test]
    fn each_vm_has_a_user_of_its_own_from_the_claim_to_the_release() {
        let all = names("dayfly-vm-0..2");
        let users = Users::each(all.clone());
        // One of a daemon before.
        users.adopt(&all[1]);
        let (a, b) = (users.take().unwrap().unwrap(), users.take().unwrap().unwrap());
        assert_eq!((&a, &b), (&all[0], &all[2]));
        assert!(matches!(users.take(), Err(LeaseError::NoFreeUser(3))));
        users.release(&all[1]);
        assert_eq!(users.clone().take().unwrap().as_ref(), Some(&all[1]));
        // One that is no longer configured is adopted and given back like any.
        let former = names("former-7..7").remove(0);
        users.adopt(&former);
        users.release(&former);
        assert!(matches!(users.take(), Err(LeaseError::NoFreeUser(3))));
    }

    #[test]
    fn vms_without_a_job_may_share_one_and_without_users_there_is_none() {
        let one = names("dayfly-vm-64..64").remove(0);
        let common = Users::common(Some(one.clone()));
        for _ in 0..2 {
            assert_eq!(common.take().unwrap().as_ref(), Some(&one));
        }
        for none in [Users::default(), Users::each(Vec::new()), Users::common(None)] {
            assert_eq!(none.take().unwrap(), None);
        }
    }
}
