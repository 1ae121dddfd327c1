//! What a daemon weighs while its disk hangs and its guests will not wait (docs/field.md, U6).
//!
//! The process of `bench daemon` with its state directory on a file system of its own, which is frozen as an operator
//! would (`fsfreeze`): whatever changes it waits in the kernel. Where no such file system is given, the file layer
//! waits in its stead. Meanwhile each guest sends the largest piece of trace that there may be and hangs up after
//! 0.3 s, on a new connection each time. Then the disk goes on, and each job must end with an exact trace.

use crate::daemon::{FREEZE, GitLab, START_LIMIT, THAW, Ways, end};
use crate::figures::{figure, say};
use crate::guest::{self, Begun};
use crate::proxy::weigh::Scales;
use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly_exec::standin::{JobSpec, JobState, Model, Standin};
use dayfly_guest_config::GuestConfig;
use dayfly_test_guest::job;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

/// Guests that send and hang up.
const VMS: u16 = 4;
/// The most that the door takes at once.
const PIECE_BYTES: usize = 2 << 20;
/// How long a guest waits for an answer.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long it may take to get a place at the door.
const CONNECT: Duration = Duration::from_secs(2);
/// How long all may take to end once the disk goes on.
const GO_ON: Duration = Duration::from_secs(120);
/// Before the weighing: what was written is being sent on, and then is not.
const REST: Duration = Duration::from_secs(2);

/// What guests are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Storm,
    GoOn,
}

/// Measures and prints.
pub(crate) async fn measure(seconds: u16, mount: Option<PathBuf>) -> Result<(), String> {
    let standin = Standin::new(Clock::system(), Rng::system());
    let gitlab = GitLab::serve(&standin).await?;
    let ways = Ways { state_below: mount.clone(), ..Ways::default() };
    let (mut child, stdout) = gitlab.daemon(VMS, &ways)?;
    let jobs: Vec<JobId> = (0..VMS).map(|_| standin.enqueue(gitlab.project, JobSpec::script(["work"]))).collect();
    let measured = storm(&standin, &jobs, &mut child, stdout, Duration::from_secs(seconds.into()), mount).await;
    let ended = end(child).await;
    let (growth, requests) = measured?;
    ended?;
    figure("frozen.growth_mib", growth, "MiB")?;
    say(&format!("figure frozen.requests {requests}"))
}

async fn storm(
    standin: &Standin,
    jobs: &[JobId],
    child: &mut Child,
    stdout: ChildStdout,
    lasting: Duration,
    mount: Option<PathBuf>,
) -> Result<(f64, u64), String> {
    let scales = Scales(child.id().ok_or("the daemon has ended")?);
    let (phase, phases) = watch::channel(Phase::WarmUp);
    let requests = Arc::new(AtomicU64::new(0));
    let mut guests = guests(stdout, &phases, &requests);
    let warm = |model: &Model| jobs.iter().all(|job| model.jobs[job].trace.bytes.len() >= PIECE_BYTES);
    standin.wait_for(warm, START_LIMIT).await.map_err(|_| "not all jobs came to run")?;
    sleep(REST).await;

    let disk = Disk::of(mount)?;
    scales.forget_peak()?;
    let before = scales.resident_mib()?;
    disk.freeze(child).await?;
    phase.send_replace(Phase::Storm);
    let until = Instant::now() + lasting;
    tokio::select! {
        biased;
        // Only a guest in trouble ends now.
        Some(ended) = guests.join_next() => return Err(format!("a guest ended too early: {ended:?}")),
        () = sleep_until(until) => {}
    }
    let growth = scales.peak_mib()? - before;
    disk.thaw(child).await?;
    phase.send_replace(Phase::GoOn);

    let mut expected = Vec::new();
    while let Some(ended) = timeout(GO_ON, guests.join_next()).await.map_err(|_| "the guests did not end")? {
        expected.extend(ended.map_err(|error| error.to_string())?.map_err(|error| format!("a guest: {error}"))?);
    }
    let over = |model: &Model| jobs.iter().all(|job| model.jobs[job].state == JobState::Success);
    standin.wait_for(over, GO_ON).await.map_err(|_| "not all jobs succeeded")?;
    for (job, trace) in &expected {
        let exact =
            standin.read(|model| model.jobs.get(&JobId(*job)).is_some_and(|job| job.trace.bytes.ends_with(trace)));
        if !exact {
            return Err(format!("the trace of job {job} is not the guest's"));
        }
    }
    if expected.len() != jobs.len() || standin.read(|model| model.metrics.trace_invalid) != 0 {
        return Err("not all traces are exact".into());
    }
    say(&format!("{} jobs ended with exact traces", expected.len()))?;
    Ok((growth, requests.load(Ordering::Relaxed)))
}

/// What a guest has sent, by its job.
type Sent = Vec<(u64, Vec<u8>)>;

/// One guest for each config that the daemon's process prints.
fn guests(
    stdout: ChildStdout,
    phases: &watch::Receiver<Phase>,
    requests: &Arc<AtomicU64>,
) -> JoinSet<io::Result<Sent>> {
    let (phases, requests) = (phases.clone(), Arc::clone(requests));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let (mut lines, mut line) = (BufReader::new(stdout), Vec::new());
        let mut guests = JoinSet::new();
        while guests.len() < usize::from(VMS) && lines.read_until(b'\n', &mut line).await? > 0 {
            let config = GuestConfig::from_line(&line).map_err(io::Error::other)?;
            line.clear();
            guests.spawn(run(config, phases.clone(), Arc::clone(&requests)));
        }
        let mut sent = Sent::new();
        while let Some(ended) = guests.join_next().await {
            sent.push(ended.map_err(io::Error::other)??);
        }
        Ok(sent)
    });
    tasks
}

/// One guest's life; its job, and the whole of its trace.
async fn run(
    config: GuestConfig,
    mut phases: watch::Receiver<Phase>,
    requests: Arc<AtomicU64>,
) -> io::Result<(u64, Vec<u8>)> {
    let rng = Rng::system();
    let Begun { runner, job } = guest::begin(&config, &rng).await?;
    drop(runner);
    let patch = |offset: usize, piece: &[u8]| job::patch(job.id, &job.token, offset, piece);
    let mut bytes = vec![0; PIECE_BYTES * 2];
    rng.fill(&mut bytes);
    let mut runner = guest::connect(&config, &rng).await?;
    let answer = runner.exchange(&patch(0, &bytes[..PIECE_BYTES])).await?;
    if answer.status != 202 {
        return Err(io::Error::other(format!("the first piece was answered {}", answer.status)));
    }
    // The phases outlive the guests.
    let _ = phases.wait_for(|phase| *phase != Phase::WarmUp).await;
    let piece = patch(PIECE_BYTES, &bytes[PIECE_BYTES..]);
    while *phases.borrow() == Phase::Storm {
        if let Ok(Ok(mut connection)) = timeout(CONNECT, guest::connect(&config, &rng)).await {
            requests.fetch_add(1, Ordering::Relaxed);
            let hung_up = Instant::now() + PATIENCE;
            // However far it came.
            let _ = timeout_at(hung_up, connection.send(&piece)).await;
            sleep_until(hung_up).await;
        }
    }
    bytes.extend_from_slice(b"\nthe end\n");
    let mut taken = PIECE_BYTES;
    while taken < bytes.len() {
        // A place at the door, or a turn, may have to be waited for.
        match piece_by_piece(&config, &rng, &patch, &bytes, taken).await {
            Ok(next) => taken = next,
            Err(_) => sleep(PATIENCE).await,
        }
    }
    let verdict = job.update(serde_json::json!({"state": "success", "output": {}}));
    guest::call(&mut guest::connect(&config, &rng).await?, &verdict, 200).await?;
    Ok((job.id, bytes))
}

/// Sends what follows, as a runner whose last answer was lost; where it stands then.
async fn piece_by_piece(
    config: &GuestConfig,
    rng: &Rng,
    patch: &impl Fn(usize, &[u8]) -> Vec<u8>,
    bytes: &[u8],
    taken: usize,
) -> io::Result<usize> {
    let mut runner = guest::connect(config, rng).await?;
    let piece = &bytes[taken..(taken + PIECE_BYTES).min(bytes.len())];
    let answer = runner.exchange(&patch(taken, piece)).await?;
    match (answer.status, job::size(&answer)) {
        (202 | 416, Some(next)) => Ok(next),
        (status, _) => Err(io::Error::other(format!("a piece was answered {status}"))),
    }
}

/// What hangs.
enum Disk {
    /// A file system of its own.
    Mounted(PathBuf),
    /// The daemon's file layer.
    Layer,
}

impl Disk {
    fn of(mount: Option<PathBuf>) -> Result<Self, String> {
        match mount {
            Some(mount) => {
                say(&format!("the state directory is on {}, under fsfreeze", mount.display()))?;
                Ok(Self::Mounted(mount))
            }
            None => {
                say("the file layer hangs in the disk's stead")?;
                Ok(Self::Layer)
            }
        }
    }

    async fn freeze(&self, child: &mut Child) -> Result<(), String> {
        match self {
            Self::Mounted(mount) => fsfreeze("--freeze", mount).await,
            Self::Layer => tell(child, FREEZE).await,
        }
    }

    async fn thaw(&self, child: &mut Child) -> Result<(), String> {
        match self {
            Self::Mounted(mount) => fsfreeze("--unfreeze", mount).await,
            Self::Layer => tell(child, THAW).await,
        }
    }
}

async fn tell(child: &mut Child, word: &str) -> Result<(), String> {
    let input = child.stdin.as_mut().ok_or("the daemon has no input")?;
    input.write_all(format!("{word}\n").as_bytes()).await.map_err(|error| format!("tell the daemon: {error}"))
}

/// Whoever started us thaws it again, should we die.
async fn fsfreeze(how: &str, mount: &Path) -> Result<(), String> {
    #[expect(clippy::disallowed_methods, reason = "util-linux's program, of root; it ends at once")]
    let mut command = tokio::process::Command::new("fsfreeze");
    let status = command.arg(how).arg(mount).status().await.map_err(|error| format!("start fsfreeze: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("fsfreeze {how} ended with {status}")) }
}
