//! What is promised, to whom, and what comes back.

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

/// U20: what is waited for is named, with the bound that is met.
#[tokio::test]
async fn what_is_missing_is_named() {
    let capacity = Capacity::new(Bounds { jobs: 2, cpus: u32::MAX, memory_mib: 350, disk_gib: 50 });
    assert_eq!(capacity.missing("a", 9, ONE), None);
    let first = capacity.reserve("a", 1, ONE).await.unwrap();
    assert_eq!(capacity.missing("a", 1, ONE).as_deref(), Some("the runner's `limit` of 1 jobs"));
    let large = Resources { memory_mib: 300, ..ONE };
    assert_eq!(capacity.missing("b", 9, large).as_deref(), Some("300 MiB memory, 250 of 350 are free"));
    let second = capacity.reserve("b", 9, ONE).await.unwrap();
    assert_eq!(capacity.missing("b", 9, ONE).as_deref(), Some("`concurrent`, 2 jobs at once"));
    drop((first, second));
}

/// U20: what a poll holds is told from what jobs hold.
#[tokio::test]
async fn room_of_a_poll_becomes_that_of_a_job() {
    let capacity = capacity(3);
    let mut first = capacity.reserve("a", 9, ONE).await.unwrap();
    let second = capacity.reserve("a", 9, ONE).await.unwrap();
    assert_eq!((capacity.promised().jobs, capacity.asking().jobs), (2, 2));
    first.is_for_a_job();
    first.is_for_a_job();
    assert_eq!((capacity.promised().jobs, capacity.asking().jobs), (2, 1));
    drop((first, second));
    assert_eq!((capacity.promised(), capacity.asking()), (Promised::default(), Promised::default()));
}

/// U21: no number stands for "no bound" in a sentence.
#[tokio::test]
async fn what_has_no_bound_is_not_named() {
    let capacity = Capacity::new(Bounds { jobs: 9, cpus: u32::MAX, memory_mib: 1000, disk_gib: 3 });
    let error = capacity.reserve("a", 9, Resources { disk_gib: 20, ..ONE }).await.unwrap_err();
    let expected = "a job needs 20 GiB disk, and 3 are there for all jobs (`capacity.disk_gib`)";
    assert_eq!((error.to_string().as_str(), error.lacks_disk()), (expected, true));
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
