//! A process of its own for a load, what it weighs, and a neighbour that keeps the time.

#![expect(clippy::print_stdout, reason = "figures, and what the process of its own has said")]

use crate::door::support::{Door, Guest, Setup, patch};
use crate::gitlab_server::until;
use dayfly::guest::Limits;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Names the test that a process was made for.
const ALONE: &str = "DAYFLY_TEST_ALONE";

/// A p99 below this is good enough in CI, whose machine does other things meanwhile.
const SHORT_P99: Duration = Duration::from_millis(500);
/// The same in the long form, on a machine of its own.
const LONG_P99: Duration = Duration::from_millis(20);

/// Whether the numbers are those of the tables, not CI's.
pub(crate) fn is_long() -> bool {
    std::env::var_os("DAYFLY_TEST_LONG").is_some_and(|value| value == "1")
}

/// One of CI and the long form.
pub(crate) fn sized<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// Runs the story of the test of this name in a process in which nothing else runs; `false` in the
/// other one, which has waited for it.
#[expect(clippy::disallowed_methods, reason = "this very program again; it ends with its test")]
pub(crate) fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some_and(|name| name == test) {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new(program);
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(ALONE, test);
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{text}");
    assert!(output.status.success() && text.contains("1 passed"), "{test} failed in its own process");
    false
}

/// Runs a load on a runtime as the daemon has it.
pub(crate) fn run(story: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(story);
}

/// Memory of this process, in KiB; a line of `/proc/self/status`.
fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let found = status.lines().find_map(|l| l.strip_prefix(line)).unwrap();
    found.split_whitespace().next().unwrap().parse().unwrap()
}

/// The most memory that a load takes beyond what there was before it.
pub(crate) struct Growth(u64);

impl Growth {
    pub(crate) fn begin() -> Self {
        // Sets the peak to what is resident now.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        Self(memory("VmRSS:"))
    }

    pub(crate) fn mib(&self) -> f64 {
        f64::from(u32::try_from(memory("VmHWM:").saturating_sub(self.0)).unwrap()) / 1024.0
    }
}

/// Open files of this process.
pub(crate) fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Another VM, whose guest goes on sending its trace.
pub(crate) struct Neighbour {
    door: Door,
    guest: Guest,
    sent: u64,
}

impl Neighbour {
    pub(crate) async fn new() -> Self {
        let limits = Limits { requests_per_second: 10_000, requests_burst: 10_000, ..Limits::default() };
        let door = Setup { limits, tcp: true, seed: 99, ..Setup::default() }.open().await;
        let guest = door.guest().await;
        Self { door, guest, sent: 0 }
    }

    async fn ping(&mut self) -> Duration {
        let begun = Instant::now();
        self.guest.send(patch(self.sent, b"x")).await;
        assert_eq!(self.guest.reply().await.status, 202);
        self.sent += 1;
        begun.elapsed()
    }

    /// Its p99 over so many calls, ten milliseconds apart.
    pub(crate) async fn p99(&mut self, calls: usize) -> Duration {
        let mut times = Vec::new();
        for _ in 0..calls {
            times.push(self.ping().await);
            sleep(Duration::from_millis(10)).await;
        }
        p99(times)
    }

    /// Its p99 while the load lasts, and what came of that.
    pub(crate) async fn p99_beside<T>(mut self, load: impl Future<Output = T>) -> (Self, Duration, T) {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let mut pings = JoinSet::new();
        pings.spawn(async move {
            let mut times = Vec::new();
            while stopped.is_empty() {
                times.push(self.ping().await);
                sleep(Duration::from_millis(10)).await;
            }
            (self, p99(times))
        });
        let done = load.await;
        // Received by nobody if the pings have failed, which the next line says.
        let _ = stop.send(());
        let (me, p99) = pings.join_next().await.unwrap().unwrap();
        (me, p99, done)
    }

    /// What it sent is there, every byte.
    pub(crate) async fn assert_whole(&self) {
        assert_eq!(self.door.guest_bytes().await.len() as u64, self.sent);
    }
}

fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[(times.len() * 99 / 100).min(times.len() - 1)]
}

/// Beside a load a neighbour's p99 is at most twice its own, or so small that nobody notices.
pub(crate) fn assert_unaffected(before: Duration, beside: Duration) {
    println!("figure load.neighbour_p99_ms {:.2} (before {:.2})", ms(beside), ms(before));
    assert!(
        beside <= (before * 2).max(sized(SHORT_P99, LONG_P99)),
        "p99 {before:?} before, {beside:?} beside the load"
    );
}

/// Beside a load that may take all CPUs there are, a neighbour still goes on: its p99 is below the
/// second that lies at least between two pieces of a runner's trace.
pub(crate) fn assert_not_starved(beside: Duration) {
    println!("figure load.neighbour_p99_ms {:.2}", ms(beside));
    assert!(beside <= Duration::from_secs(1), "p99 {beside:?} beside the load");
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Waits until the process has no more files open than before.
pub(crate) async fn until_files_are(before: usize) {
    until(|| open_files() <= before).await;
}
