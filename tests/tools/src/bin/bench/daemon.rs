//! What a daemon weighs, idle and with many running jobs.
//!
//! ```text
//!     this process                          a process of its own, which is weighed
//!     stand-in GitLab ◄──────── HTTP ────── the daemon: pollers, jobs, spools, uploaders, doors
//!     guests ──────── greeting, HTTP ─────► │
//!        ▲                                  fake VMs: a config is taken, then nothing
//!        └───── guest configs, by a pipe ───┘
//! ```
//!
//! Counted is `VmRSS` of that process, the largest of some samples: program text and libraries too, as
//! far as they are touched. The daemon is the product's, with the real transport, real files and TCP
//! doors, but for the hypervisor: a fake VM weighs a few KiB in this process, a real one a connection to
//! each of its two sockets. QEMU's own memory is no part of the daemon. Towards GitLab it is HTTP
//! without TLS, so a handful of kept-alive connections less their TLS state are counted.

use crate::figures::{figure, say};
use crate::guest;
use dayfly::clock::Clock;
use dayfly::files::RealFiles;
use dayfly::gitlab::transport::OpenError;
use dayfly::gitlab::{Endpoint, OpenTransport, RealOpenTransport, Transport};
use dayfly::network::{PortRange, Tcp};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::telemetry::chain;
use dayfly::vm::AccelChoice;
use dayfly_doubles::fake::{FakeHypervisor, GuestMachine};
use dayfly_doubles::frozen::FreezableFiles;
use dayfly_exec::standin::{JobSpec, Model, ProjectId, RunnerId, Served, Standin, serve};
use dayfly_guest_config::GuestConfig;
use dayfly_test_guest::boot::boot;
use dayfly_test_tools::directories::RealDirectories;
use dayfly_test_tools::host::{AT_ONCE, Choice, Host, no_image};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long all jobs may take to start: 100 in some seconds, on a busy machine in a minute.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(300);

/// How long the daemon may take to end all jobs.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Samples, one a second: several polls, and several rounds of trace.
const SAMPLES: u32 = 15;

/// How often GitLab wants each trace.
const TRACE_INTERVAL: Duration = Duration::from_secs(3);

/// First port of the doors.
const PORT: u16 = 24_000;

/// Measures and prints.
pub(crate) async fn measure(vms: u16) -> Result<(), String> {
    let standin = Standin::new(Clock::system(), Rng::system());
    // As for a job that somebody watches: the uploaders have more to do than otherwise.
    standin.configure(|settings| settings.trace_update_interval = Some(TRACE_INTERVAL));
    let gitlab = GitLab::serve(&standin).await?;
    let (child, stdout) = gitlab.daemon(vms, &Ways::default())?;
    let weighed = weigh(&standin, (gitlab.project, gitlab.runner), &child, stdout, vms).await;
    // However the weighing went: its files go with it.
    let ended = end(child).await;
    let (idle, busy) = weighed?;
    ended?;
    figure("daemon.idle_mib", idle.rss_mib, "MiB")?;
    figure("daemon.per_vm_mib", (busy.rss_mib - idle.rss_mib) / f64::from(vms), "MiB")
}

/// How that process differs from an ordinary one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ways {
    /// One more CA to trust.
    pub(crate) ca_file: Option<PathBuf>,
    /// Below which the state directory is.
    pub(crate) state_below: Option<PathBuf>,
}

/// A line to the process: what changes files waits from now on.
pub(crate) const FREEZE: &str = "freeze";
/// A line to the process: it goes on.
pub(crate) const THAW: &str = "thaw";

/// The stand-in behind a socket, with one project and one runner, whose token is in a file.
pub(crate) struct GitLab {
    pub(crate) project: ProjectId,
    pub(crate) runner: RunnerId,
    served: Served,
    dir: TempDir,
}

impl GitLab {
    /// Serves it until this is dropped.
    pub(crate) async fn serve(standin: &Standin) -> Result<Self, String> {
        let project = standin.add_project("group/project");
        let runner = standin.add_runner(project);
        let token = standin.runner_token(runner).ok_or("the runner has no token")?;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| format!("listen: {error}"))?;
        let served = serve(standin.clone(), listener, None).map_err(|error| format!("serve: {error}"))?;
        let dir = tempfile::tempdir().map_err(|error| format!("make a directory: {error}"))?;
        let gitlab = Self { project, runner, served, dir };
        std::fs::write(gitlab.token_file(), token.expose()).map_err(|error| format!("write the token: {error}"))?;
        Ok(gitlab)
    }

    fn token_file(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    /// Starts the process that is weighed, with this as its GitLab.
    pub(crate) fn daemon(&self, vms: u16, ways: &Ways) -> Result<(Child, ChildStdout), String> {
        spawn(&format!("http://{}", self.served.address()), &self.token_file(), vms, ways)
    }
}

/// Starts the process that is weighed. It prints a line for each guest, its config.
pub(crate) fn spawn(url: &str, token_file: &Path, vms: u16, ways: &Ways) -> Result<(Child, ChildStdout), String> {
    let program = std::env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    #[expect(clippy::disallowed_methods, reason = "the process that is weighed; ended by `end`, or with us")]
    let mut command = tokio::process::Command::new(program);
    command.args(["daemon-process", url]).arg(token_file).arg(vms.to_string());
    for (name, path) in [("--ca", &ways.ca_file), ("--state", &ways.state_below)] {
        if let Some(path) = path {
            command.arg(name).arg(path);
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("start the daemon: {error}"))?;
    let stdout = child.stdout.take().ok_or("the daemon has no output")?;
    Ok((child, stdout))
}

/// Ends it; an error if it did not end well.
pub(crate) async fn end(mut child: Child) -> Result<(), String> {
    // End of input is the sign.
    drop(child.stdin.take());
    let ended = timeout(END_LIMIT, child.wait()).await.map_err(|_| "the daemon did not end")?;
    let ended = ended.map_err(|error| format!("wait for the daemon: {error}"))?;
    if ended.success() { Ok(()) } else { Err(format!("the daemon ended with {ended}")) }
}

/// The daemon idle, and with so many jobs.
async fn weigh(
    standin: &Standin,
    (project, runner): (ProjectId, RunnerId),
    child: &Child,
    stdout: ChildStdout,
    vms: u16,
) -> Result<(Memory, Memory), String> {
    let asked = |model: &Model| model.runners.get(&runner).is_some_and(|runner| runner.contacted_at.is_some());
    standin.wait_for(asked, START_LIMIT).await.map_err(|_| "the daemon does not poll")?;
    let idle = largest(child).await?;
    say(&format!("idle: {idle}"))?;

    for _ in 0..vms {
        let _ = standin.enqueue(project, JobSpec::script(["work"]));
    }
    // Dropped at the end, and all guests with it.
    let (_guests, mut failed) = guests(stdout);
    let all_speak = |model: &Model| model.jobs.values().all(|job| job.trace.bytes.len() > 8 << 10);
    let started = standin.wait_for(all_speak, START_LIMIT);
    tokio::select! {
        biased;
        // Both only wait. A guest in trouble ends it first: the rest would wait in vain.
        Some(error) = failed.recv() => return Err(error),
        started = started => started.map_err(|_| "not all jobs came to run")?,
    }
    let before = traces(standin);
    let busy = largest(child).await?;
    let after = traces(standin);
    if let Ok(error) = failed.try_recv() {
        return Err(error);
    }
    if before.len() != usize::from(vms) || before.iter().any(|(job, bytes)| after.get(job) <= Some(bytes)) {
        return Err("not all jobs ran all the time".into());
    }
    say(&format!("{vms} jobs run: {busy}"))?;
    Ok((idle, busy))
}

fn traces(standin: &Standin) -> BTreeMap<u64, usize> {
    standin.read(|model| model.jobs.iter().map(|(id, job)| (id.0, job.trace.bytes.len())).collect())
}

/// One guest for each config that the daemon's process prints; their troubles.
fn guests(stdout: ChildStdout) -> (JoinSet<()>, mpsc::Receiver<String>) {
    let (failed, failures) = mpsc::channel(8);
    let mut tasks = JoinSet::new();
    let mut lines = BufReader::new(stdout);
    tasks.spawn(async move {
        let mut guests = JoinSet::new();
        let rng = Rng::system();
        let mut line = Vec::new();
        while let Ok(1..) = lines.read_until(b'\n', &mut line).await {
            let Ok(config) = GuestConfig::from_line(&line) else { break };
            line.clear();
            let (rng, failed) = (rng.clone(), failed.clone());
            guests.spawn(async move {
                if let Err(error) = guest::run(&config, &rng).await {
                    // The first ones tell enough.
                    let _ = failed.try_send(format!("a guest: {error}"));
                }
            });
        }
        guests.join_all().await;
    });
    (tasks, failures)
}

/// Memory of a process.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    rss_mib: f64,
    anonymous_mib: f64,
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} MiB resident, {:.1} of it anonymous", self.rss_mib, self.anonymous_mib)
    }
}

/// The largest of some samples.
async fn largest(child: &Child) -> Result<Memory, String> {
    let mut largest = Memory::default();
    for _ in 0..SAMPLES {
        sleep(Duration::from_secs(1)).await;
        let pid = child.id().ok_or("the daemon has ended")?;
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|error| format!("weigh: {error}"))?;
        let memory = Memory { rss_mib: mib(&status, "VmRSS:")?, anonymous_mib: mib(&status, "RssAnon:")? };
        if memory.rss_mib > largest.rss_mib {
            largest = memory;
        }
    }
    Ok(largest)
}

/// A line of `/proc/PID/status`, in kB there.
pub(crate) fn mib(status: &str, name: &str) -> Result<f64, String> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib: Option<f64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.map(|kib| kib / 1024.0).ok_or_else(|| format!("the kernel tells no {name}"))
}

/// The product's own transport, with one more CA to trust.
struct Trusting(Option<PathBuf>);

impl OpenTransport for Trusting {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        RealOpenTransport::default().open(&Endpoint { tls_ca_file: self.0.clone(), ..endpoint.clone() })
    }
}

/// The process that is weighed: a daemon, until its input ends.
pub(crate) async fn process(url: &str, token_file: &str, vms: u16, ways: Ways) -> Result<(), String> {
    let hypervisor = FakeHypervisor::new();
    hypervisor.set_timing(AT_ONCE);
    let (configs, mut taken) = mpsc::channel(usize::from(vms));
    hypervisor.set_guest(move |mut machine: GuestMachine| {
        let configs = configs.clone();
        async move {
            if let Some(config) = boot(&mut machine.channel).await {
                let _ = configs.send(config.to_line()).await;
            }
            std::future::pending().await
        }
    });
    let token = std::fs::read_to_string(token_file).map_err(|error| format!("read the token: {error}"))?;
    let files = FreezableFiles::new(Arc::new(RealFiles));
    let choice = Choice {
        host: RealDirectories(hypervisor).host(),
        listen: Arc::new(Tcp),
        accel: AccelChoice::Tcg,
        images: no_image(),
        transport: Arc::new(Trusting(ways.ca_file)),
        url: url.parse().map_err(|error| format!("the URL: {error}"))?,
        token: Secret::new(token),
        concurrent: vms.into(),
        ports: PortRange { first: PORT, last: PORT.saturating_add(vms).saturating_add(100) },
        files: Arc::new(files.clone()),
        state_below: ways.state_below,
    };
    let host = Host::start(choice).await.map_err(|error| chain(&error))?;
    let mut out = tokio::io::stdout();
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            biased;
            // Cancel safe. The end of the pipe is the sign to end.
            line = input.next_line() => match line {
                Ok(Some(line)) => match line.as_str() {
                    FREEZE => files.freeze(true),
                    THAW => files.freeze(false),
                    _ => return Err("a line that means nothing".into()),
                },
                Ok(None) | Err(_) => break,
            },
            // Cancel safe; the write is no branch, so a line goes out whole.
            Some(line) = taken.recv() => {
                let written = async { out.write_all(&line).await?; out.flush().await };
                written.await.map_err(|error| format!("hand a config out: {error}"))?;
            }
        }
    }
    files.freeze(false);
    if host.end().await { Ok(()) } else { Err("the daemon did not end".into()) }
}
