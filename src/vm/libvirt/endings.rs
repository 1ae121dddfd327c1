//! How machines ended: QEMU's own events, for libvirt forgets a transient domain with its end.
//!
//! libvirt's states tell a panic and a pause, but a power-off, a reset and a process that was killed
//! all look alike afterwards: the domain is gone. QEMU tells them apart at once, in the reason of its
//! event `SHUTDOWN`, and libvirt passes such events on to who asks (`virsh qemu-monitor-event`, since
//! libvirt 1.2.4). The `virt` crate does not wrap that call, so `virsh` asks for us: one child while
//! machines are looked after, which dies with us (`--pdeathsig`), reads no guest's bytes and may fail:
//! then it is not known how a machine ended, and nothing is said of it.
//!
//! Seen with libvirt 9.0 and QEMU 7.2, in this order, the first of them decides:
//!
//! | what happens | events |
//! | --- | --- |
//! | the VM starts | `RESUME` |
//! | power-off in the guest | `SHUTDOWN {"guest":true,"reason":"guest-shutdown"}`, then `host-signal` from libvirt |
//! | reset in the guest, `on_reboot` is destroy | `SHUTDOWN {"guest":true,"reason":"guest-reset"}`, then likewise |
//! | panic, with the guest's `pvpanic` driver | `GUEST_PANICKED {"action":"pause"}` |
//! | `virsh destroy`, or a SIGTERM to QEMU | `SHUTDOWN {"guest":false,"reason":"host-signal"}` |
//! | QEMU is killed, or crashes | none |

use crate::process::{ProcessError, Program};
use crate::telemetry::chain;
use crate::vm::{Ending, VmName};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// How long a child is kept after somebody last asked for a machine: while there are any they are listed every 2 s.
const WANTED: Duration = Duration::from_secs(60);

/// A child's longest life; the next one follows at once.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// Pause before the next child after one that ended: a restart of libvirtd takes about a second.
const PAUSE: Duration = Duration::from_secs(1);

/// The same after one that could not be started: nothing but an installation helps.
const MISSING_PAUSE: Duration = Duration::from_secs(60);

/// For an event that is on its way when its domain is gone already. It comes before that, by another connection; under
/// load by less than usual.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// Between two looks for it.
const GLANCE: Duration = Duration::from_millis(20);

/// Machines remembered, running or ended; the oldest go first. More than a host has between two lists.
const MACHINES_MAX: usize = 4096;

/// One event, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
enum News {
    Runs(VmName),
    Ended(VmName, Ending),
}

/// Reads a line of `virsh qemu-monitor-event`:
/// `event SHUTDOWN at 1795929539.914862 for domain 'df-…': {"guest":true,"reason":"guest-reset"}`.
/// `None`: no event of ours.
fn parse(line: &str) -> Option<News> {
    let (event, rest) = line.strip_prefix("event ")?.split_once(' ')?;
    let (_when, rest) = rest.split_once("for domain '")?;
    let (name, details) = rest.split_once("': ")?;
    let name = VmName::parse(name)?;
    let reason = || {
        let details: serde_json::Value = serde_json::from_str(details).ok()?;
        Some(details.get("reason")?.as_str()?.to_owned())
    };
    let ending = match event {
        "RESUME" => return Some(News::Runs(name)),
        "GUEST_PANICKED" => Ending::Panicked,
        "SHUTDOWN" => match reason()?.as_str() {
            "guest-shutdown" => Ending::PoweredOff,
            "guest-reset" => Ending::Restarted,
            "guest-panic" => Ending::Panicked,
            reason if reason.starts_with("host-") => Ending::Destroyed,
            _ => return None,
        },
        _ => return None,
    };
    Some(News::Ended(name, ending))
}

#[derive(Debug, Default)]
struct Seen {
    /// VMs whose start the child at work has seen: it would have seen an event of their end, too.
    running: BTreeSet<VmName>,
    ended: BTreeMap<VmName, Ending>,
    /// Names in `ended`, oldest first.
    order: VecDeque<VmName>,
}

impl Seen {
    fn take(&mut self, news: News) {
        match news {
            News::Runs(name) => {
                if self.running.len() >= MACHINES_MAX {
                    self.running.pop_first();
                }
                self.running.insert(name);
            }
            News::Ended(name, ending) => {
                self.running.remove(&name);
                if self.ended.contains_key(&name) {
                    return;
                }
                if self.order.len() >= MACHINES_MAX
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.ended.remove(&oldest);
                }
                self.order.push_back(name.clone());
                self.ended.insert(name, ending);
            }
        }
    }
}

#[derive(Debug)]
struct Shared {
    uri: String,
    seen: Mutex<Seen>,
    /// Until when machines are looked after; and the task that has the child.
    wanted: Mutex<(Option<Instant>, Option<AbortHandle>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has been seen of machines' ends. Dropping it ends the child.
#[derive(Debug)]
pub(super) struct Endings(Arc<Shared>);

impl Drop for Endings {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.0.wanted).1.take() {
            task.abort();
        }
    }
}

impl Endings {
    pub(super) fn new(uri: &str) -> Self {
        Self(Arc::new(Shared { uri: uri.to_owned(), seen: Mutex::default(), wanted: Mutex::default() }))
    }

    /// Somebody looks after a machine: a child watches from now on, and for [`WANTED`].
    pub(super) fn watch(&self) {
        // libvirt's test driver has no QEMU, and other addresses are not libvirt's.
        if !self.0.uri.starts_with("qemu") {
            return;
        }
        let mut wanted = lock(&self.0.wanted);
        wanted.0 = Some(Instant::now() + WANTED);
        if wanted.1.as_ref().is_none_or(AbortHandle::is_finished) {
            let shared = self.0.clone();
            #[expect(clippy::disallowed_methods, reason = "ended by this type's drop; nobody waits for it")]
            let task = tokio::spawn(async move { shared.keep_watching().await });
            wanted.1 = Some(task.abort_handle());
        }
    }

    /// How a machine ended that is gone. `None`: nobody saw it.
    pub(super) async fn of(&self, name: &VmName) -> Option<Ending> {
        let since = Instant::now();
        loop {
            {
                let mut seen = lock(&self.0.seen);
                if let Some(ending) = seen.ended.get(name) {
                    return Some(*ending);
                }
                if !seen.running.contains(name) {
                    return None;
                }
                if since.elapsed() >= ON_ITS_WAY {
                    // It was seen to run, all that QEMU says would have been seen, and it is gone.
                    seen.take(News::Ended(name.clone(), Ending::Died));
                    return Some(Ending::Died);
                }
            }
            sleep(GLANCE).await;
        }
    }
}

impl Shared {
    async fn keep_watching(&self) {
        let mut said = false;
        loop {
            let ended = tokio::select! {
                biased;
                // Dropping the child kills it. Its end first: that is news.
                ended = self.one_child() => ended,
                () = self.unwanted() => break,
            };
            let pause = match ended {
                Err(error) if !std::mem::replace(&mut said, true) => {
                    tracing::warn!(error = chain(&error), "watch how machines end; until that works it is not known");
                    MISSING_PAUSE
                }
                Err(_) => MISSING_PAUSE,
                Ok(()) => {
                    said = false;
                    PAUSE
                }
            };
            // It has seen nothing since, so that a silence means nothing.
            lock(&self.seen).running.clear();
            sleep(pause).await;
            if self.wanted_until().is_none() {
                break;
            }
        }
        lock(&self.seen).running.clear();
    }

    async fn unwanted(&self) {
        while let Some(until) = self.wanted_until() {
            sleep_until(until).await;
        }
    }

    /// `None`: nobody looks after a machine any more.
    fn wanted_until(&self) -> Option<Instant> {
        lock(&self.wanted).0.filter(|until| *until > Instant::now())
    }

    /// Reads one child's events until it ends or loses libvirtd. An error: there is no such child.
    async fn one_child(&self) -> Result<(), ProcessError> {
        let lost = Notify::new();
        let mut heard = |line: &str| match parse(line) {
            Some(news) => lock(&self.seen).take(news),
            // It stays when libvirtd goes, deaf. All that it says besides events is such trouble.
            None if line.starts_with("error:") => lost.notify_one(),
            None => {}
        };
        let mut virsh = Program::new("setpriv", LIFE)
            .args(["--pdeathsig", "TERM", "stdbuf", "--output=L", "virsh", "--quiet", "--connect", &self.uri])
            .args(["qemu-monitor-event", "--loop", "--regex", "--event", "^(RESUME|SHUTDOWN|GUEST_PANICKED)$"]);
        for name in ["HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"] {
            if let Some(value) = std::env::var_os(name) {
                virsh = virsh.env(name, value);
            }
        }
        tokio::select! {
            biased;
            // Dropping the child kills it.
            ended = virsh.run_lines(&mut heard) => match ended {
                Err(error @ ProcessError::Start { .. }) => Err(error),
                // 126 and 127: `setpriv` or `stdbuf` did not find the next program.
                Err(error @ ProcessError::Failed { status, .. }) if matches!(status.code(), Some(126 | 127)) => Err(error),
                _ => Ok(()),
            },
            () = lost.notified() => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    fn name() -> VmName {
        VmName::parse("df-abcdefghijklmnop").unwrap()
    }

    fn check(line: &str, expected: Option<News>) {
        assert_eq!(parse(line), expected, "{line}");
    }

    /// U47: QEMU's own reasons, as `virsh` prints them, each by its own name.
    #[test]
    fn qemus_own_events_tell_a_power_off_from_a_restart_and_a_panic() {
        let of = |event: &str, details: &str| {
            format!("event {event} at 1795929534.251308 for domain 'df-abcdefghijklmnop': {details}")
        };
        let ended = |ending| Some(News::Ended(name(), ending));
        check(&of("RESUME", "<null>"), Some(News::Runs(name())));
        for (reason, ending) in [
            ("guest-shutdown", Ending::PoweredOff),
            ("guest-reset", Ending::Restarted),
            ("guest-panic", Ending::Panicked),
            ("host-signal", Ending::Destroyed),
            ("host-qmp-quit", Ending::Destroyed),
        ] {
            check(&of("SHUTDOWN", &format!(r#"{{"guest":true,"reason":"{reason}"}}"#)), ended(ending));
        }
        check(&of("GUEST_PANICKED", r#"{"action":"pause"}"#), ended(Ending::Panicked));
        for line in [
            of("SHUTDOWN", r#"{"guest":true,"reason":"snapshot-load"}"#),
            of("SHUTDOWN", "<null>"),
            of("STOP", "<null>"),
            "event SHUTDOWN at 1.2 for domain 'somebody-elses': {\"guest\":true,\"reason\":\"guest-reset\"}".into(),
            "error: Disconnected from qemu:///session due to end of file".into(),
            String::new(),
        ] {
            check(&line, None);
        }
    }

    /// U47: the first word decides; a silence tells something only of a machine that was watched from its start.
    #[tokio::test(start_paused = true)]
    async fn a_machine_that_was_watched_and_ends_without_a_word_has_died() {
        let endings = Endings::new("test:///default");
        endings.watch();
        assert_eq!(endings.of(&name()).await, None, "nobody has seen it");
        lock(&endings.0.seen).take(News::Runs(name()));
        let first = name();
        let (of, late) = tokio::join!(endings.of(&first), async {
            sleep(Duration::from_millis(500)).await;
            lock(&endings.0.seen).take(News::Ended(name(), Ending::Restarted));
            lock(&endings.0.seen).take(News::Ended(name(), Ending::Destroyed));
        });
        assert_eq!((of, late), (Some(Ending::Restarted), ()), "it was on its way");
        let other = VmName::parse("df-ponmlkjihgfedcba").unwrap();
        lock(&endings.0.seen).take(News::Runs(other.clone()));
        let took = timeout(Duration::from_secs(2), endings.of(&other)).await;
        assert_eq!(took, Ok(Some(Ending::Died)));
        let third = VmName::parse("df-aaaaaaaaaaaaaaaa").unwrap();
        lock(&endings.0.seen).take(News::Runs(third.clone()));
        lock(&endings.0.seen).running.clear();
        assert_eq!(endings.of(&third).await, None, "the child was away meanwhile");
    }

    #[test]
    fn no_more_machines_are_remembered_than_the_bound() {
        let mut seen = Seen::default();
        let rng = crate::rng::Rng::seeded(1);
        for _ in 0..MACHINES_MAX + 10 {
            let name = VmName::from(crate::vm::VmId::random(&rng));
            seen.take(News::Runs(name.clone()));
            seen.take(News::Runs(VmName::from(crate::vm::VmId::random(&rng))));
            seen.take(News::Ended(name, Ending::Died));
        }
        assert!(seen.running.len() <= MACHINES_MAX);
        assert_eq!((seen.order.len(), seen.ended.len()), (MACHINES_MAX, MACHINES_MAX));
    }
}
