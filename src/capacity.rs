//! How much of the host is promised?
//!
//! A job's room is reserved before GitLab is asked, because a 201 cannot be handed back (decision
//! D3). Waiters are served in the order in which they came, so no runner starves and with room for
//! one job the grants go round. One of the three shared things: a mutex around plain accounting,
//! held for a few lines, never across an await. Used by `poller`, `job` and `recovery`.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Section `[capacity]`: what jobs may use of this host, all together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Virtual CPUs; none: no limit but `concurrent`.
    pub cpus: Option<u32>,
    /// Memory, MiB; none: the host's memory less 1 GiB.
    pub memory_mib: Option<u64>,
    /// Virtual disks in all, GiB; none: what is free at the start, less `disk_reserve_gib`.
    pub disk_gib: Option<u64>,
    /// Disk that must stay free where overlays and spools are, GiB. Below it no job is asked for.
    pub disk_reserve_gib: u64,
}

/// What one job takes of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, MiB, the hypervisor's own share included.
    pub memory_mib: u64,
    /// Virtual disk, GiB.
    pub disk_gib: u64,
}

/// The bounds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Jobs at once.
    pub jobs: u32,
    /// Virtual CPUs in all.
    pub cpus: u32,
    /// Memory in all, MiB.
    pub memory_mib: u64,
    /// Virtual disks in all, GiB.
    pub disk_gib: u64,
}

/// What is promised now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Promised {
    /// Jobs.
    pub jobs: u32,
    /// Resources, summed.
    pub resources: Resources,
    /// Jobs per runner entry; none is left out.
    pub by_runner: BTreeMap<String, u32>,
}

/// The accounting. Clones share it.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<Mutex<Accounts>>);

#[derive(Debug)]
struct Accounts {
    bounds: Bounds,
    promised: Promised,
    /// What of it is held by polls.
    asking: Promised,
    queue: VecDeque<Waiter>,
    askers: BTreeMap<String, Asker>,
}

/// A runner that asks for jobs here.
#[derive(Debug)]
struct Asker {
    limit: u32,
    resources: Resources,
    wants: Wants,
}

/// What a runner wants of the host's room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// Nothing now: it cannot ask.
    Nothing,
    /// Room, to ask with.
    Room,
    /// Nothing more: it has room, and asks.
    Answer,
}

#[derive(Debug)]
struct Waiter {
    runner: String,
    runner_limit: u32,
    resources: Resources,
    grant: oneshot::Sender<Reservation>,
}

/// Host resources promised to one job; dropping it gives them back.
#[derive(Debug)]
pub struct Reservation {
    capacity: Capacity,
    runner: String,
    resources: Resources,
    /// Nobody has a job for it yet: a poller asks GitLab with it.
    asks: bool,
}

impl Reservation {
    /// There is a job for it.
    pub fn is_for_a_job(&mut self) {
        if std::mem::take(&mut self.asks) {
            self.capacity.lock().asking.remove(&self.runner, self.resources);
        }
    }

    /// What is promised.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.resources
    }

    /// Gives back what the job needs less than was reserved before it was known. It never grows (decision D23).
    pub fn shrink(&mut self, needs: Resources) {
        let less = Resources {
            cpus: self.resources.cpus.min(needs.cpus),
            memory_mib: self.resources.memory_mib.min(needs.memory_mib),
            disk_gib: self.resources.disk_gib.min(needs.disk_gib),
        };
        if less == self.resources {
            return;
        }
        {
            let mut accounts = self.capacity.lock();
            let Accounts { promised, asking, .. } = &mut *accounts;
            for account in std::iter::once(promised).chain(self.asks.then_some(asking)) {
                account.remove(&self.runner, self.resources);
                account.add(&self.runner, less);
            }
        }
        self.resources = less;
        self.capacity.serve();
    }
}

/// A job's reservation: held by its task, which gives it back, and by `daemon`, so that a task that
/// dies does not give back what its machine still takes. By default there is none.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<Option<Reservation>>>);

impl Held {
    /// Gives it back; a second time does nothing.
    pub fn release(&self) {
        let reservation = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Outside the lock: it wakes whoever waits for the room.
        drop(reservation);
    }
}

impl From<Reservation> for Held {
    fn from(reservation: Reservation) -> Self {
        Self(Arc::new(Mutex::new(Some(reservation))))
    }
}

/// A class that no host state could ever satisfy. Only what is too small is named.
#[derive(Debug, thiserror::Error)]
pub struct NeverFits {
    needs: Resources,
    bounds: Bounds,
}

impl NeverFits {
    /// Whether disk is what is lacking.
    #[must_use]
    pub fn lacks_disk(&self) -> bool {
        self.needs.disk_gib > self.bounds.disk_gib
    }
}

impl fmt::Display for NeverFits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needs, bounds } = self;
        if bounds.jobs == 0 {
            f.write_str("no job may run here (`concurrent`)")?;
        }
        let lacking = [
            (u64::from(needs.cpus), u64::from(bounds.cpus), "CPUs", "cpus"),
            (needs.memory_mib, bounds.memory_mib, "MiB memory", "memory_mib"),
            (needs.disk_gib, bounds.disk_gib, "GiB disk", "disk_gib"),
        ];
        for (i, (needs, bound, of, key)) in lacking.into_iter().filter(|(needs, bound, ..)| needs > bound).enumerate() {
            let and = if i == 0 { "" } else { "; " };
            write!(f, "{and}a job needs {needs} {of}, and {bound} are there for all jobs (`capacity.{key}`)")?;
        }
        Ok(())
    }
}

impl Capacity {
    /// Nothing promised yet.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self(Arc::new(Mutex::new(Accounts {
            bounds,
            promised: Promised::default(),
            asking: Promised::default(),
            queue: VecDeque::new(),
            askers: BTreeMap::new(),
        })))
    }

    /// Waits for room for one job of `runner`, which may have `runner_limit` jobs at once.
    ///
    /// # Errors
    /// [`NeverFits`] at once, if even an empty host has no such room.
    ///
    /// # Cancel safety
    /// Safe: a grant that nobody takes goes back.
    pub async fn reserve(
        &self,
        runner: &str,
        runner_limit: u32,
        resources: Resources,
    ) -> Result<Reservation, NeverFits> {
        let granted = {
            let mut accounts = self.lock();
            let bounds = accounts.bounds;
            let empty = Promised::default();
            if !empty.has_room(&bounds, resources) {
                return Err(NeverFits { needs: resources, bounds });
            }
            let (grant, granted) = oneshot::channel();
            accounts.queue.push_back(Waiter { runner: runner.to_owned(), runner_limit, resources, grant });
            granted
        };
        self.serve();
        Ok(granted.await.expect("waiters leave the queue by a grant only, and the queue lives as long as self"))
    }

    /// Counts a job that exists already, whatever the bounds: adoption after a restart.
    #[must_use]
    pub fn adopt(&self, runner: &str, resources: Resources) -> Reservation {
        self.lock().promised.add(runner, resources);
        Reservation { capacity: self.clone(), runner: runner.to_owned(), resources, asks: false }
    }

    /// Says what a runner wants, with `limit` jobs at once, each of these resources.
    pub fn want(&self, runner: &str, limit: u32, resources: Resources, wants: Wants) {
        self.lock().askers.insert(runner.to_owned(), Asker { limit, resources, wants });
    }

    /// Whether there is room for a job of each other runner that wants some. Else a question of
    /// `runner` that GitLab holds would keep the others from asking: it must want an answer at once.
    #[must_use]
    pub fn leaves_room(&self, runner: &str) -> bool {
        let accounts = self.lock();
        let mut then = accounts.promised.clone();
        accounts.askers.iter().all(|(name, asker)| {
            let of_runner = accounts.promised.by_runner.get(name).copied().unwrap_or(0);
            if name == runner || asker.wants != Wants::Room || of_runner >= asker.limit {
                return true;
            }
            let fits = then.has_room(&accounts.bounds, asker.resources);
            then.add(name, asker.resources);
            fits
        })
    }

    /// Sets how much virtual disk there is in all: some was freed, or taken by others.
    pub fn set_disk_gib(&self, disk_gib: u64) {
        self.lock().bounds.disk_gib = disk_gib;
        self.serve();
    }

    /// What of the promised room polls hold, which have no job for it yet.
    #[must_use]
    pub fn asking(&self) -> Promised {
        self.lock().asking.clone()
    }

    /// What keeps one more job of `runner` waiting, which may have `limit` at once and takes `needs`, in words for
    /// operators; `None`: only those who came before it.
    #[must_use]
    pub fn missing(&self, runner: &str, limit: u32, needs: Resources) -> Option<String> {
        let accounts = self.lock();
        let (bounds, promised) = (&accounts.bounds, &accounts.promised);
        let of_runner = promised.by_runner.get(runner).copied().unwrap_or(0);
        let mut missing = Vec::new();
        if of_runner >= limit {
            missing.push(format!("the runner's `limit` of {limit} jobs"));
        }
        if promised.jobs >= bounds.jobs {
            missing.push(format!("`concurrent`, {} jobs at once", bounds.jobs));
        }
        let now = &promised.resources;
        for (needs, promised, bound, of) in [
            (u64::from(needs.cpus), u64::from(now.cpus), u64::from(bounds.cpus), "CPUs"),
            (needs.memory_mib, now.memory_mib, bounds.memory_mib, "MiB memory"),
            (needs.disk_gib, now.disk_gib, bounds.disk_gib, "GiB disk"),
        ] {
            if promised.saturating_add(needs) > bound {
                missing.push(format!("{needs} {of}, {} of {bound} are free", bound.saturating_sub(promised)));
            }
        }
        (!missing.is_empty()).then(|| missing.join("; "))
    }

    /// What is promised now, to jobs and to polls.
    #[must_use]
    pub fn promised(&self) -> Promised {
        self.lock().promised.clone()
    }

    /// Other bounds from now on. What is promised beyond them stays promised.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.lock().bounds = bounds;
        self.serve();
    }

    /// The bounds.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.lock().bounds
    }

    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Grants what fits, first come first served. A runner at its own limit holds nobody up; one
    /// that waits for host resources holds up all behind it, or big jobs would starve.
    fn serve(&self) {
        let mut unclaimed = Vec::new();
        {
            let mut accounts = self.lock();
            let mut index = 0;
            while let Some(waiter) = accounts.queue.get(index) {
                if waiter.grant.is_closed() {
                    accounts.queue.remove(index);
                    continue;
                }
                let of_runner = accounts.promised.by_runner.get(&waiter.runner).copied().unwrap_or(0);
                if of_runner >= waiter.runner_limit {
                    index += 1;
                    continue;
                }
                if !accounts.promised.has_room(&accounts.bounds, waiter.resources) {
                    break;
                }
                let Some(waiter) = accounts.queue.remove(index) else { break };
                accounts.promised.add(&waiter.runner, waiter.resources);
                accounts.asking.add(&waiter.runner, waiter.resources);
                let Waiter { runner, resources, grant, .. } = waiter;
                let reservation = Reservation { capacity: self.clone(), runner, resources, asks: true };
                // The waiter may have gone in between; its reservation is dropped outside the lock.
                unclaimed.extend(grant.send(reservation).err());
            }
        }
        drop(unclaimed);
    }
}

impl Promised {
    fn has_room(&self, bounds: &Bounds, more: Resources) -> bool {
        let now = &self.resources;
        self.jobs < bounds.jobs
            && now.cpus.saturating_add(more.cpus) <= bounds.cpus
            && now.memory_mib.saturating_add(more.memory_mib) <= bounds.memory_mib
            && now.disk_gib.saturating_add(more.disk_gib) <= bounds.disk_gib
    }

    fn add(&mut self, runner: &str, resources: Resources) {
        self.jobs += 1;
        self.resources.cpus += resources.cpus;
        self.resources.memory_mib += resources.memory_mib;
        self.resources.disk_gib += resources.disk_gib;
        *self.by_runner.entry(runner.to_owned()).or_default() += 1;
    }

    fn remove(&mut self, runner: &str, resources: Resources) {
        self.jobs -= 1;
        self.resources.cpus -= resources.cpus;
        self.resources.memory_mib -= resources.memory_mib;
        self.resources.disk_gib -= resources.disk_gib;
        if let Some(count) = self.by_runner.get_mut(runner) {
            *count -= 1;
            if *count == 0 {
                self.by_runner.remove(runner);
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        {
            let mut accounts = self.capacity.lock();
            accounts.promised.remove(&self.runner, self.resources);
            if self.asks {
                accounts.asking.remove(&self.runner, self.resources);
            }
        }
        self.capacity.serve();
    }
}

#[cfg(test)]
mod tests;
