//! How much of the host is promised?
//!
//! A job's room is reserved before GitLab is asked, because a 201 cannot be handed back (decision
//! D3). Waiters are served in the order in which they came, so no runner starves and with room for
//! one job the grants go round. One of the three shared things: a mutex around plain accounting,
//! held for a few lines, never across an await. Used by `poller`, `job` and `recovery`.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
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
}

impl Reservation {
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
            let promised = &mut self.capacity.lock().promised;
            promised.remove(&self.runner, self.resources);
            promised.add(&self.runner, less);
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

/// A class that no host state could ever satisfy.
#[derive(Debug, thiserror::Error)]
#[error(
    "a job needs {} CPUs, {} MiB memory and {} GiB disk; this host has {}, {} MiB and {} GiB for all jobs (section `capacity`)",
    needs.cpus, needs.memory_mib, needs.disk_gib, bounds.cpus, bounds.memory_mib, bounds.disk_gib
)]
pub struct NeverFits {
    needs: Resources,
    bounds: Bounds,
}

impl Capacity {
    /// Nothing promised yet.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self(Arc::new(Mutex::new(Accounts {
            bounds,
            promised: Promised::default(),
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
        Reservation { capacity: self.clone(), runner: runner.to_owned(), resources }
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

    /// What is promised now.
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
                let reservation =
                    Reservation { capacity: self.clone(), runner: waiter.runner, resources: waiter.resources };
                // The waiter may have gone in between; its reservation is dropped outside the lock.
                unclaimed.extend(waiter.grant.send(reservation).err());
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
        self.capacity.lock().promised.remove(&self.runner, self.resources);
        self.capacity.serve();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: Resources = Resources { cpus: 1, memory_mib: 100, disk_gib: 1 };

    fn capacity(jobs: u32) -> Capacity {
        Capacity::new(Bounds { jobs, cpus: 100, memory_mib: 1000, disk_gib: 50 })
    }

    #[tokio::test]
    async fn room_comes_back_when_the_reservation_is_dropped() {
        let capacity = capacity(1);
        let first = capacity.reserve("a", 9, ONE).await.unwrap();
        let mut second = Box::pin(capacity.reserve("b", 9, ONE));
        assert!(futures_poll(&mut second).is_none());
        drop(first);
        drop(second.await.unwrap());
        assert_eq!(capacity.promised(), Promised::default());
    }

    /// U4: room that a job does not need goes to the next one at once; what it holds never grows.
    #[tokio::test]
    async fn a_reservation_shrinks_and_never_grows() {
        let capacity = Capacity::new(Bounds { jobs: 9, cpus: 4, memory_mib: 1000, disk_gib: 50 });
        let ceiling = Resources { cpus: 4, memory_mib: 1000, disk_gib: 50 };
        let mut first = capacity.reserve("a", 9, ceiling).await.unwrap();
        let mut second = Box::pin(capacity.reserve("b", 9, ONE));
        assert!(futures_poll(&mut second).is_none());
        first.shrink(Resources { cpus: 1, memory_mib: 900, disk_gib: 60 });
        assert_eq!(first.resources(), Resources { cpus: 1, memory_mib: 900, disk_gib: 50 });
        assert!(futures_poll(&mut second).is_none(), "its disk is still all of it");
        first.shrink(Resources { cpus: 4, memory_mib: 900, disk_gib: 49 });
        let second = second.await.unwrap();
        assert_eq!(capacity.promised().resources, Resources { cpus: 2, memory_mib: 1000, disk_gib: 50 });
        drop((first, second));
        assert_eq!(capacity.promised(), Promised::default());
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_blocks_nobody() {
        let capacity = capacity(1);
        let first = capacity.reserve("a", 9, ONE).await.unwrap();
        let mut gone = Box::pin(capacity.reserve("b", 9, ONE));
        assert!(futures_poll(&mut gone).is_none());
        drop(gone);
        drop(first);
        drop(capacity.reserve("c", 9, ONE).await.unwrap());
        assert_eq!(capacity.promised(), Promised::default());
    }

    #[tokio::test]
    async fn a_class_larger_than_the_host_is_refused_at_once() {
        let error = capacity(1).reserve("a", 9, Resources { cpus: 101, memory_mib: 1, disk_gib: 1 }).await.unwrap_err();
        assert!(error.to_string().contains("needs 101 CPUs"));
    }

    #[tokio::test]
    async fn a_runner_at_its_limit_holds_nobody_up() {
        let capacity = capacity(2);
        let first = capacity.reserve("a", 1, ONE).await.unwrap();
        let mut same = Box::pin(capacity.reserve("a", 1, ONE));
        assert!(futures_poll(&mut same).is_none());
        drop(capacity.reserve("b", 1, ONE).await.unwrap());
        drop(first);
        drop(same.await.unwrap());
    }

    #[tokio::test]
    async fn with_room_for_one_the_grants_go_round() {
        let capacity = capacity(1);
        // All seven stand in the queue before the first grant.
        let taken = capacity.reserve("before", 1, ONE).await.unwrap();
        let (grants, mut granted) = tokio::sync::mpsc::channel(1);
        let mut runners = tokio::task::JoinSet::new();
        for runner in 0..7_usize {
            let (capacity, grants) = (capacity.clone(), grants.clone());
            runners.spawn(async move {
                loop {
                    let room = capacity.reserve(&runner.to_string(), 1, ONE).await.unwrap();
                    if grants.send(runner).await.is_err() {
                        break;
                    }
                    drop(room);
                }
            });
        }
        tokio::task::yield_now().await;
        assert_eq!(capacity.lock().queue.len(), 7);
        drop(taken);
        let mut counts = [0_i32; 7];
        for _ in 0..1000 {
            counts[granted.recv().await.unwrap()] += 1;
        }
        assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
    }

    #[tokio::test]
    async fn a_question_may_be_held_only_while_there_is_room_for_the_other_runners() {
        let capacity = capacity(2);
        for runner in ["a", "b"] {
            capacity.want(runner, 9, ONE, Wants::Room);
        }
        let first = capacity.reserve("a", 9, ONE).await.unwrap();
        capacity.want("a", 9, ONE, Wants::Answer);
        assert!(capacity.leaves_room("a"));
        let second = capacity.reserve("b", 9, ONE).await.unwrap();
        capacity.want("b", 9, ONE, Wants::Answer);
        assert!(capacity.leaves_room("a") && capacity.leaves_room("b"), "both have their room");
        // a's question was answered by a job, and a wants to ask for another.
        capacity.want("a", 9, ONE, Wants::Room);
        assert!(!capacity.leaves_room("b"));
        capacity.want("a", 1, ONE, Wants::Room);
        assert!(capacity.leaves_room("b"), "a has as many jobs as it may");
        drop((first, second));
    }

    #[tokio::test]
    async fn disk_that_is_freed_is_promised() {
        let capacity = Capacity::new(Bounds { jobs: 9, cpus: 9, memory_mib: 1000, disk_gib: 1 });
        let first = capacity.reserve("a", 9, ONE).await.unwrap();
        let mut second = Box::pin(capacity.reserve("a", 9, ONE));
        assert!(futures_poll(&mut second).is_none());
        capacity.set_disk_gib(2);
        drop((second.await.unwrap(), first));
    }

    fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }

    proptest! {
        #[test]
        fn never_more_is_promised_than_the_bounds_say(steps in prop::collection::vec((0..3_u8, 1..4_u32, 1..5_u64), 1..60)) {
            let bounds = Bounds { jobs: 3, cpus: 6, memory_mib: 8, disk_gib: 9 };
            let capacity = Capacity::new(bounds);
            let mut waiting = Vec::new();
            let mut held = Vec::new();
            for (what, cpus, memory_mib) in steps {
                match what {
                    0 => {
                        let capacity = capacity.clone();
                        waiting.push(Box::pin(async move { capacity.reserve("r", 9, Resources { cpus, memory_mib, disk_gib: 4 }).await }));
                    }
                    1 => drop(held.pop()),
                    _ => drop(waiting.pop()),
                }
                waiting.retain_mut(|w| match futures_poll(w) {
                    Some(granted) => { held.extend(granted.ok()); false }
                    None => true,
                });
                let promised = capacity.promised();
                prop_assert!(promised.jobs <= bounds.jobs && promised.resources.cpus <= bounds.cpus && promised.resources.memory_mib <= bounds.memory_mib);
                prop_assert_eq!(promised.jobs as usize, held.len());
            }
            drop((waiting, held));
            prop_assert_eq!(capacity.promised(), Promised::default());
        }
    }
}
