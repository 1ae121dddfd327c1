//! What a job notices of a neighbour that does its worst.
//!
//! The lines of one job are timed as ever, alone and beside another job's machine, by turns. That one floods whatever it
//! reaches at once: its relay with connections that say a byte and no more (T9), its trace (T10), its network, its disk,
//! and itself with processes. Nothing is held against it but what holds it anyway: the limits of its door and machine.

use super::script::{HOST, Pauses, Stamps};
use super::{LIMIT, Side, begin};
use crate::figures::{Spread, figure, say};
use crate::start::Wanted;
use dayfly::rng::Rng;
use dayfly_exec::standin::{JobSpec, Variable};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The stamp of an abuser whose loads have begun.
const ABUSING: &str = "abusing";

/// Slow connections to the relay.
const CONNECTIONS: usize = 1000;

/// Processes that do nothing but turn.
const PROCESSES: usize = 200;

/// Bytes that an abuser must have got rid of, over its network and into its trace, for the figure to mean anything.
const LEAST_BYTES: u64 = 1 << 20;

/// Measures and prints.
pub(crate) async fn measure(wanted: &Wanted) -> Result<(), String> {
    let begun = begin(wanted).await?;
    let bench = begun.bench();
    let rng = Rng::system();
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let (mut sent, mut traced) = (0, 0);
    for run in 1..=wanted.runs {
        let pauses = &Pauses::random(&rng);
        let stamps = || async { Stamps::listen().await.map_err(|error| format!("listen: {error}")) };
        alone.extend(bench.run(Side::Dayfly, &stamps().await?, pauses).await?.later);
        let sink = Sink::open().await.map_err(|error| format!("listen: {error}"))?;
        let begins = stamps().await?;
        let abuser = bench.standin.enqueue(bench.ours, job(&begins, sink.port));
        let abusing = timeout(LIMIT, begins.until(ABUSING, &bench.standin)).await;
        abusing.map_err(|_| "the abuser did not begin")?.map_err(|error| format!("the abuser: {error}"))?;
        let measured = bench.run(Side::Dayfly, &stamps().await?, pauses).await;
        let found = bench.standin.job(abuser).ok_or("the abuser is gone")?;
        let (its_bytes, its_trace) = (sink.bytes(), u64::try_from(found.trace.bytes.len()).unwrap_or(u64::MAX));
        let over = found.state.is_over();
        bench.standin.cancel(abuser, false);
        bench.no_machines().await?;
        beside.extend(measured?.later);
        if over {
            return Err(format!("the abuser had ended; its log:\n{}", tail(&found.trace.bytes)));
        }
        if its_bytes < LEAST_BYTES || its_trace < LEAST_BYTES {
            return Err(format!("the abuser did little: {its_bytes} bytes sent, {its_trace} in its trace"));
        }
        say(&format!("run {run}: the abuser sent {its_bytes} bytes, and has {its_trace} in its trace"))?;
        (sent, traced) = (sent + its_bytes, traced + its_trace);
    }
    drop(bench);
    if !begun.host.end().await {
        return Err("the daemon did not end".into());
    }
    report(alone, beside)?;
    figure("abuse.sent_mib", mib(sent), "MiB")?;
    figure("abuse.traced_mib", mib(traced), "MiB")
}

fn report(alone: Vec<f64>, beside: Vec<f64>) -> Result<(), String> {
    let (p99_alone, p99_beside) = (p99(&alone), p99(&beside));
    for (what, lines, p99) in [("alone", alone, p99_alone), ("beside", beside, p99_beside)] {
        let Spread { median, least, most } = Spread::of(lines).ok_or("no lines")?;
        say(&format!("line: {what}: median {median:.0} ms, {least:.0} to {most:.0} ms"))?;
        figure(&format!("abuse.line_{what}"), p99.ok_or("no lines")?, "ms")?;
    }
    figure("abuse.p99_ratio", p99_beside.zip(p99_alone).map(|(beside, alone)| beside / alone).ok_or("no lines")?, "")
}

/// The least that 99 of 100 are no more than.
fn p99(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * 99).div_ceil(100).checked_sub(1)?).copied()
}

fn mib(bytes: u64) -> f64 {
    u32::try_from(bytes >> 10).map_or(f64::INFINITY, f64::from) / 1024.0
}

fn tail(trace: &[u8]) -> String {
    String::from_utf8_lossy(&trace[trace.len().saturating_sub(4096)..]).into_owned()
}

/// The job that does its worst until it is canceled.
fn job(begins: &Stamps, sink: u16) -> JobSpec {
    let mut script = begins.prologue();
    let mut add = |line: String| writeln!(script, "{line}").expect("a String takes all");
    add("ulimit -n $(ulimit -Hn)".into());
    add(format!(
        "(for i in $(seq {CONNECTIONS}); do exec {{f}}<>/dev/tcp/192.0.2.1/80 && printf P >&$f; done; sleep 3000) 2>/dev/null &"
    ));
    add(format!("(while :; do cat /dev/zero >/dev/tcp/{HOST}/{sink}; done) 2>/dev/null &"));
    add("(while :; do dd if=/dev/zero of=flood bs=1M count=256 conv=fdatasync; done) >/dev/null 2>&1 &".into());
    add(format!("for i in $(seq {PROCESSES}); do (while :; do :; done) & done 2>/dev/null"));
    add(format!("echo {ABUSING} $EPOCHREALTIME >&9"));
    add("yes 'nobody reads this line, and there are many'".into());
    JobSpec::script([script]).with_variable(Variable::new("GIT_STRATEGY", "none"))
}

/// Where the abuser's network leads: all is taken, and counted.
struct Sink {
    port: u16,
    bytes: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Sink {
    async fn open() -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let bytes = Arc::<AtomicU64>::default();
        let counted = bytes.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut taken = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let counted = counted.clone();
                taken.spawn(async move {
                    let mut piece = vec![0; 64 * 1024];
                    while let Ok(read @ 1..) = stream.read(&mut piece).await {
                        counted.fetch_add(u64::try_from(read).unwrap_or(0), Ordering::Relaxed);
                    }
                });
            }
        });
        Ok(Self { port, bytes, _tasks: tasks })
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_p99_is_one_of_the_numbers_and_nearly_the_largest() {
        let numbers: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(p99(&numbers), Some(198.0));
        assert_eq!(p99(&[7.0]), Some(7.0));
        assert_eq!(p99(&[]), None);
        assert_eq!(mib(3 << 19), 1.5);
    }
}
