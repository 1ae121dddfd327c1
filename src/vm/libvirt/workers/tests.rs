//! The pool on libvirt's own test driver, with calls that hang as long as the test wants.

use super::*;
use crate::vm::VmError;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use tokio::time::Instant;

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(30);

fn workers() -> Workers {
    virt::error::clear_error_callback();
    Workers::new("test:///default")
}

/// A call that hangs until its sender is dropped, and tells that it has begun.
fn hanging() -> (mpsc::Sender<()>, mpsc::Receiver<()>, impl Fn(&mut Link) -> Result<(), CallError> + Send + 'static) {
    let (release, held) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    let call = move |_: &mut Link| {
        let _ = begun.send(());
        let _ = held.recv();
        Ok(())
    };
    (release, has_begun, call)
}

/// H4: on threads of their own, with deadlines.
#[tokio::test]
async fn h4_a_call_that_hangs_holds_up_no_other() {
    let workers = workers();
    let (release, _, hang) = hanging();
    let error = workers.call("destroy VM", "df-a".into(), SHORT, hang).await.unwrap_err();
    assert!(matches!(error, VmError::Deadline { what: "destroy VM", .. }) && error.is_transient(), "{error}");
    let version = workers.call("probe", "host".into(), LONG, Link::probe).await.unwrap().version;
    assert!(version.starts_with("TEST"), "{version}");
    drop(release);
}

/// V14: however often a stuck machine is to be destroyed, one thread waits for it.
#[tokio::test]
async fn v14_the_same_call_waits_for_the_one_that_hangs_and_takes_no_second_thread() {
    let workers = workers();
    let (release, has_begun, hang) = hanging();
    assert!(workers.call("destroy VM", "df-a".into(), SHORT, hang).await.is_err());
    has_begun.recv().unwrap();
    let begun = Arc::new(AtomicUsize::new(0));
    for _ in 0..2 * THREADS_MAX {
        let begun = Arc::clone(&begun);
        let again = workers.call("destroy VM", "df-a".into(), SHORT, move |_| {
            begun.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        assert!(timeout(Duration::from_millis(5), again).await.is_err(), "it is under way");
    }
    workers.call("destroy VM", "df-b".into(), LONG, |_| Ok(())).await.expect("another VM's is not");
    assert_eq!(begun.load(Ordering::Relaxed), 0, "none of them took a thread");
    drop(release);
    workers.call("destroy VM", "df-a".into(), LONG, |_| Ok(())).await.expect("its turn has come");
    assert!(workers.0.queue().jobs.is_empty(), "calls that nobody waits for are dropped");
}

#[tokio::test]
async fn threads_and_queue_are_bounded_and_the_full_queue_says_so() {
    let workers = workers();
    let (mut releases, mut errors) = (Vec::new(), Vec::new());
    for i in 0..THREADS_MAX + 4 {
        let (release, _, hang) = hanging();
        releases.push(release);
        let call = workers.call("read state of VM", format!("df-{i}"), LONG, hang);
        errors.push(timeout(Duration::from_millis(20), call).await.is_err());
    }
    assert!(errors.iter().all(|hung| *hung));
    assert_eq!(workers.0.queue().threads, THREADS_MAX);
    let calls: Vec<_> =
        (0..QUEUE_MAX + 8).map(|i| Box::pin(workers.call("list VMs of", i.to_string(), LONG, |_| Ok(())))).collect();
    let mut refused = 0;
    let mut waiting = Vec::new();
    for mut call in calls {
        match timeout(Duration::from_millis(1), &mut call).await {
            Ok(result) => {
                assert!(matches!(result, Err(VmError::Unreachable { .. })));
                refused += 1;
            }
            Err(_) => waiting.push(call),
        }
    }
    assert_eq!(refused, 8);
    drop(releases);
    for call in waiting {
        call.await.unwrap();
    }
}

#[tokio::test]
async fn a_panic_of_the_binding_is_an_error_and_costs_no_thread() {
    let workers = workers();
    for _ in 0..=THREADS_MAX {
        let panicking = |_: &mut Link| -> Result<(), CallError> { panic!("as `virt` does") };
        let error = workers.call("start VM", "df-a".into(), LONG, panicking).await;
        assert!(matches!(error, Err(VmError::Refused { .. })));
    }
    workers.call("start VM", "df-a".into(), LONG, |_| Ok(())).await.unwrap();
}

/// H3: no socket at the path, so nobody to call.
#[tokio::test]
async fn a_hypervisor_that_is_not_there_is_unreachable_at_once() {
    virt::error::clear_error_callback();
    let workers = Workers::new("qemu+unix:///session?socket=/nonexistent");
    let since = Instant::now();
    let error = workers.call("probe", "host".into(), LONG, Link::probe).await.unwrap_err();
    assert!(matches!(error, VmError::Unreachable { .. }) && error.is_transient());
    assert_eq!(error.to_string(), "connect to hypervisor `qemu+unix:///session?socket=/nonexistent`");
    assert!(since.elapsed() < CONNECT_DEADLINE);
}

#[tokio::test]
async fn dropping_the_pool_ends_its_threads() {
    let workers = workers();
    workers.call("probe", "host".into(), LONG, Link::probe).await.unwrap();
    let shared = Arc::clone(&workers.0);
    drop(workers);
    let deadline = Instant::now() + LONG;
    while shared.queue().threads > 0 {
        assert!(Instant::now() < deadline, "threads did not end");
        tokio::task::yield_now().await;
    }
}
