//! What it costs to go through dayfly: artifacts up and down, and a trace.
//!
//! ```text
//!     this process                                         a process of its own, which is weighed
//!     GitLab ◄──── link ◄──── TLS ──────────────────────── the daemon: door, routes, forwarding,
//!       ▲                                                  spool, uploader, its own TLS
//!       └──────── TLS ─── runner ─── greeting, HTTP ─────► │
//! ```
//!
//! The same runner, in the same process and with the same code, sends directly (TLS) and through dayfly
//! (greeting and plain HTTP, as a guest does), in turn, and the median of the pairs counts. Through dayfly
//! is the product's own way: the daemon of `bench daemon` with its door, its routes, its `JobClient`, and
//! reqwest and rustls towards GitLab; only the hypervisor is a fake. Each time is from before the
//! connection is made to the end of the answer; what came must be what was sent, by length and CRC-32.
//!
//! For the ratios of artifacts the link carries 125 MB/s each way, as a 1 Gbit/s card does. CPU is counted
//! without a limit, where nobody waits. A trace counts from its first byte to the verdict that GitLab took,
//! which says that GitLab holds all of it; GitLab takes 20 ms for the answer to each PATCH.

mod content;
mod gitlab;
mod link;
mod runner;
pub(crate) mod weigh;

use crate::daemon;
use crate::figures::{Spread, figure, say};
use content::Content;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, ProjectId, Route};
use dayfly_guest_config::GuestConfig;
use gitlab::Gitlab;
use runner::{Runner, Way};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::ChildStdout;
use tokio::time::{Instant, timeout};
use weigh::Scales;

/// 1 Gbit/s.
const LINK_BYTES_PER_SECOND: u32 = 125_000_000;
const MIB: u64 = 1 << 20;

/// The trace of the bar, for 1 GiB of artifacts; shorter with those.
const TRACE_BYTES: u64 = 100_000_000;
/// How long GitLab takes for each PATCH.
const PATCH_ANSWER: Duration = Duration::from_millis(20);

/// How long one step may take: 1 GiB at 125 MB/s takes 9 s.
const STEP_LIMIT: Duration = Duration::from_secs(300);
/// Jobs at once: the one of the artifacts and those of traces that are being ended.
const VMS: u16 = 4;

/// Measures and prints.
pub(crate) async fn measure(mib: u16, pairs: u16) -> Result<(), String> {
    let rng = Rng::system();
    let content = Content::new(&rng);
    let bytes = u64::from(mib) * MIB;
    let gitlab = Gitlab::start(content.clone(), bytes).await.map_err(|error| format!("start GitLab: {error}"))?;
    gitlab.standin.script(Matcher::on(Route::AppendTrace).always(), Fault::DelayAnswer(PATCH_ANSWER));

    let dir = tempfile::tempdir().map_err(|error| format!("make a directory: {error}"))?;
    let (token_file, ca_file) = (dir.path().join("token"), dir.path().join("ca.pem"));
    let ours = Queue::new(&gitlab, "group/through-dayfly")?;
    let direct = Queue::new(&gitlab, "group/direct")?;
    let written = std::fs::write(&token_file, &ours.token).and_then(|()| std::fs::write(&ca_file, &gitlab.ca));
    written.map_err(|error| format!("write the daemon's files: {error}"))?;
    let ways = daemon::Ways { ca_file: Some(ca_file), ..daemon::Ways::default() };
    let (child, stdout) = daemon::spawn(&gitlab.url(), &token_file, VMS, &ways)?;
    let pid = child.id().ok_or("the daemon has ended")?;
    let tls = gitlab.client_config().map_err(|error| format!("set up TLS: {error}"))?;
    let mut bench = Bench {
        scales: Scales(pid),
        configs: BufReader::new(stdout),
        tls: Arc::new(tls),
        gitlab,
        content,
        bytes,
        rng,
        ours,
        direct,
    };
    let measured = bench.all(pairs, trace_bytes(bytes)).await;
    let ended = daemon::end(child).await;
    let figures = measured?;
    ended?;
    for (name, number, unit) in figures {
        figure(name, number, unit)?;
    }
    Ok(())
}

fn trace_bytes(artifact_bytes: u64) -> u64 {
    (TRACE_BYTES * artifact_bytes / (1024 * MIB)).clamp(MIB, TRACE_BYTES)
}

type Figure = (&'static str, f64, &'static str);

/// A project with a runner of its own, so that each job goes where it is meant for.
struct Queue {
    project: ProjectId,
    token: String,
}

impl Queue {
    fn new(gitlab: &Gitlab, path: &str) -> Result<Self, String> {
        let project = gitlab.standin.add_project(path);
        let runner = gitlab.standin.add_runner(project);
        let token = gitlab.standin.runner_token(runner).ok_or("the runner has no token")?;
        Ok(Self { project, token: token.expose().to_owned() })
    }
}

/// Which way, of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Direct,
    Dayfly,
}

struct Bench {
    scales: Scales,
    configs: BufReader<ChildStdout>,
    tls: Arc<rustls::ClientConfig>,
    gitlab: Gitlab,
    content: Content,
    bytes: u64,
    rng: Rng,
    ours: Queue,
    direct: Queue,
}

impl Bench {
    async fn all(&mut self, pairs: u16, trace_bytes: u64) -> Result<Vec<Figure>, String> {
        let direct = self.begin(Side::Direct).await?;
        let dayfly = self.begin(Side::Dayfly).await?;
        self.scales.forget_peak()?;
        let before = self.scales.resident_mib()?;
        let (up_cpu, down_cpu) = self.cpu(&dayfly, pairs).await?;
        self.gitlab.link.limit(LINK_BYTES_PER_SECOND);
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for number in 0..pairs {
            up.push(self.pair(number, "upload", &direct, &dayfly).await?);
            down.push(self.pair(number, "download", &direct, &dayfly).await?);
        }
        let growth = self.scales.peak_mib()? - before;
        say(&format!("memory: {before:.1} MiB resident before the first transfer, {growth:.1} MiB more at most"))?;
        self.gitlab.link.limit(0);
        let mut trace = Vec::new();
        for number in 0..pairs {
            trace.push(self.trace_pair(number, trace_bytes).await?);
        }
        Ok(vec![
            ("proxy.upload_ratio", median("upload, dayfly's throughput over direct", up)?, ""),
            ("proxy.download_ratio", median("download, dayfly's throughput over direct", down)?, ""),
            ("proxy.cpu_seconds_per_gib", up_cpu.max(down_cpu), "s"),
            ("proxy.memory_growth_mib", growth, "MiB"),
            ("trace.time_ratio", median("trace, dayfly's time over direct", trace)?, ""),
        ])
    }

    /// A job for this side, begun by its runner.
    async fn begin(&mut self, side: Side) -> Result<Runner, String> {
        let queue = if side == Side::Direct { &self.direct } else { &self.ours };
        let job = self.gitlab.standin.enqueue(queue.project, JobSpec::script(["work"]));
        let way = match side {
            Side::Direct => {
                Way::Direct { address: self.gitlab.address, tls: Arc::clone(&self.tls), token: queue.token.clone() }
            }
            Side::Dayfly => {
                let mut line = Vec::new();
                within("a guest's config", self.configs.read_until(b'\n', &mut line)).await?;
                let config =
                    GuestConfig::from_line(&line).map_err(|error| format!("read a guest's config: {error}"))?;
                Way::Door(Box::new(config))
            }
        };
        let runner = within("beginning a job", Runner::begin(way, self.rng.clone())).await?;
        if runner.job() == job.0 { Ok(runner) } else { Err("another job than the one that was queued".into()) }
    }

    /// Seconds of the daemon's CPU for 1 GiB up and down, without a limit.
    async fn cpu(&self, dayfly: &Runner, rounds: u16) -> Result<(f64, f64), String> {
        #[expect(clippy::cast_precision_loss, reason = "bytes far below 2^53")]
        let gib = self.bytes as f64 / (1024 * MIB) as f64;
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for (what, costs) in [("upload", &mut up), ("download", &mut down)] {
                let before = self.scales.cpu_seconds()?;
                let took = self.transfer(what, dayfly).await?.as_secs_f64();
                let cost = (self.scales.cpu_seconds()? - before) / gib;
                say(&format!("{what}, unlimited: {took:.2} s, {cost:.2} s of the daemon's CPU per GiB"))?;
                costs.push(cost);
            }
        }
        Ok((median("upload, CPU seconds per GiB", up)?, median("download, CPU seconds per GiB", down)?))
    }

    /// One transfer both ways of going; dayfly's throughput over direct's.
    async fn pair(&self, number: u16, what: &str, direct: &Runner, dayfly: &Runner) -> Result<f64, String> {
        let mut seconds = [0.0, 0.0];
        for side in order(number) {
            let runner = if side == Side::Direct { direct } else { dayfly };
            seconds[side as usize] = self.transfer(what, runner).await?.as_secs_f64();
        }
        let [direct, dayfly] = seconds;
        say(&format!("{what}: direct {direct:.3} s, through dayfly {dayfly:.3} s"))?;
        Ok(direct / dayfly)
    }

    /// One upload or download, checked.
    async fn transfer(&self, what: &str, runner: &Runner) -> Result<Duration, String> {
        let (took, expected, came) = if what == "upload" {
            let took = within(what, runner.upload(&self.content, self.bytes)).await?;
            (took, runner::upload_body(&self.content, self.bytes).digest(), self.gitlab.received())
        } else {
            let (took, came) = within(what, runner.download()).await?;
            (took, self.content.body("", self.bytes, "", 1 << 16).digest(), Some(came))
        };
        if came == Some(expected) { Ok(took) } else { Err(format!("{what}: {came:?} came, {expected:?} was sent")) }
    }

    /// One trace both ways; dayfly's time over direct's.
    async fn trace_pair(&mut self, number: u16, bytes: u64) -> Result<f64, String> {
        let mut seconds = [0.0, 0.0];
        for side in order(number) {
            let mut runner = self.begin(side).await?;
            let job = JobId(runner.job());
            let begun = Instant::now();
            let sent = async {
                within("a trace", runner.trace(&self.content, bytes)).await?;
                let over = self
                    .gitlab
                    .standin
                    .wait_for(|model| model.jobs.get(&job).is_some_and(|job| job.state.is_over()), STEP_LIMIT);
                over.await.map_err(|_| "GitLab has no verdict".to_owned())
            };
            sent.await?;
            seconds[side as usize] = begun.elapsed().as_secs_f64();
            self.check_trace(job, side, bytes)?;
        }
        let [direct, dayfly] = seconds;
        say(&format!("trace: direct {direct:.3} s, through dayfly {dayfly:.3} s"))?;
        Ok(dayfly / direct)
    }

    /// GitLab holds the runner's bytes, between dayfly's own lines if it came that way.
    fn check_trace(&self, job: JobId, side: Side, bytes: u64) -> Result<(), String> {
        let length = usize::try_from(bytes).map_err(|error| format!("a trace: {error}"))?;
        let sent = self.content.copy(0, length);
        self.gitlab.standin.edit(|model| {
            let job = model.jobs.get_mut(&job).ok_or("GitLab has lost a job")?;
            // A hundred megabytes for each job would be too many.
            let held = std::mem::take(&mut job.trace.bytes);
            let from = if side == Side::Direct { Some(0) } else { find(&held, &sent[..64]) };
            let same = from.and_then(|from| held.get(from..from + length)).is_some_and(|held| *held == sent);
            let verdict = job.state == JobState::Success;
            if same && verdict { Ok(()) } else { Err(format!("GitLab holds another trace, or {:?}", job.state)) }
        })
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// Who goes first changes from pair to pair.
fn order(number: u16) -> [Side; 2] {
    if number.is_multiple_of(2) { [Side::Direct, Side::Dayfly] } else { [Side::Dayfly, Side::Direct] }
}

fn median(what: &str, numbers: Vec<f64>) -> Result<f64, String> {
    let Spread { median, least, most } = Spread::of(numbers).ok_or("nothing was measured")?;
    say(&format!("{what}: {median:.3} ({least:.3} to {most:.3})"))?;
    Ok(median)
}

async fn within<T>(what: &str, work: impl Future<Output = io::Result<T>>) -> Result<T, String> {
    let done = timeout(STEP_LIMIT, work).await.map_err(|_| format!("{what} took too long"))?;
    done.map_err(|error| format!("{what}: {error}"))
}
