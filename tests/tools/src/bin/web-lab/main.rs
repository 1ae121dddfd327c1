//! A daemon to be looked at by a browser: the real program, machines that are processes, a stand-in for GitLab, and jobs
//! that come and go while a program looks.
//!
//! ```text
//! web-lab DAYFLY GUEST PROGRAM ARGUMENTS...
//! ```
//!
//! The status page is where the daemon has it by default, on its unix socket; a port of this host's loopback leads there,
//! for browsers know no such sockets. The program learns by DAYFLY_WEB_URL and DAYFLY_WEB_TOKEN where, and its exit code
//! is ours.

use dayfly::gitlab::JobId;
use dayfly_exec::standin::{JobSpec, JobState, Standin, serve};
use dayfly_test_tools::image::empty_image;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;
use tokio::net::{TcpListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What a job works while it is looked at, in milliseconds.
const WORK_MS: u64 = 6000;

/// Pause between two jobs that work.
const NEXT_JOB: Duration = Duration::from_secs(3);

/// For a daemon to serve its page, on a busy host.
const START_LIMIT: Duration = Duration::from_secs(60);

/// For the jobs that have ended before anybody looks.
const PAST_LIMIT: Duration = Duration::from_secs(60);

/// For the program that looks.
const LOOK_LIMIT: Duration = Duration::from_secs(180);

/// The page's token; of a daemon that lives for some minutes.
const TOKEN: &str = "web-lab-web-lab-web-lab-web-lab-web-lab";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [dayfly, guest, program, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: web-lab DAYFLY GUEST PROGRAM ARGUMENTS...");
        return ExitCode::from(64);
    };
    match run(Path::new(dayfly), Path::new(guest), program, rest).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("web-lab: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(
    dayfly: &Path,
    guest: &Path,
    program: &std::ffi::OsStr,
    arguments: &[std::ffi::OsString],
) -> Result<u8, String> {
    // A short path: unix sockets end at 107 bytes.
    let dir = tempfile::Builder::new().prefix("df-web-").tempdir_in("/tmp").map_err(|error| error.to_string())?;
    let clock = dayfly::clock::Clock::system();
    let standin = Standin::new(clock, dayfly::rng::Rng::system());
    let project =
        standin.add_project("platform/a-rather-long-name-of-a-group/and-of-a-subgroup/service-for-everything");
    let runner = standin.add_runner(project);
    let token = standin.runner_token(runner).ok_or("the runner has no token")?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| format!("listen: {error}"))?;
    let served = serve(standin.clone(), listener, None).map_err(|error| format!("serve: {error}"))?;
    let gitlab = format!("http://{}", served.address());
    standin.configure(|settings| settings.external_url.clone_from(&gitlab));

    let config = lay_out(dir.path(), guest, &gitlab, token.expose()).map_err(|error| format!("lay out: {error}"))?;
    let mut daemon = start(dayfly, &config).map_err(|error| format!("start the daemon: {error}"))?;
    let socket = dir.path().join("run/status.sock");
    let story = || fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    until(START_LIMIT, || socket.exists()).await.ok_or_else(|| format!("the daemon serves no page\n{}", story()))?;

    let enqueue = |script: &[&str]| standin.enqueue(project, JobSpec::script(script.iter().copied()));
    let past = [enqueue(&["bytes 300"]), enqueue(&["bytes 300", "exit 3"])];
    let over = |job: &JobId| standin.read(|model| model.jobs.get(job).is_some_and(|job| is_over(job.state)));
    until(PAST_LIMIT, || past.iter().all(over))
        .await
        .ok_or_else(|| format!("the first jobs do not end\n{}", story()))?;

    let (proxy, address) = proxy(socket).await.map_err(|error| format!("open a port: {error}"))?;
    let feed = async {
        let work = format!("work {WORK_MS}");
        loop {
            let job = enqueue(&["bytes 200", &work, "bytes 200"]);
            let _ =
                standin.wait_for(|model| model.jobs.get(&job).is_some_and(|job| is_over(job.state)), LOOK_LIMIT).await;
            sleep(NEXT_JOB).await;
        }
    };
    #[expect(clippy::disallowed_methods, reason = "the program that looks; it has a limit")]
    let mut looks = Command::new(program);
    looks.args(arguments).env("DAYFLY_WEB_URL", format!("http://{address}")).env("DAYFLY_WEB_TOKEN", TOKEN);
    let mut looks =
        looks.kill_on_drop(true).spawn().map_err(|error| format!("start the program that looks: {error}"))?;
    let looked = tokio::select! {
        biased;
        looked = timeout(LOOK_LIMIT, looks.wait()) => looked,
        () = feed => return Err("no more jobs come".into()),
    };
    drop(proxy);
    let code = match looked {
        Ok(Ok(status)) => status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
        Ok(Err(error)) => return Err(format!("wait for the program that looks: {error}")),
        Err(_) => return Err(format!("the program that looks has not ended within {LOOK_LIMIT:?}")),
    };
    if let Ok(Some(status)) = daemon.try_wait() {
        return Err(format!("the daemon ended with {status}\n{}", story()));
    }
    end(&mut daemon, dayfly, &config).await;
    Ok(code)
}

fn is_over(state: JobState) -> bool {
    matches!(state, JobState::Success | JobState::Failed | JobState::Canceled)
}

/// The daemon's files; its configuration.
fn lay_out(dir: &Path, guest: &Path, gitlab: &str, token: &str) -> io::Result<PathBuf> {
    fs::create_dir_all(dir.join("vms"))?;
    symlink(fs::canonicalize(guest)?, dir.join("vms/guest"))?;
    empty_image(&dir.join("images/test"), &[])?;
    for (name, text) in [("token", token), ("page-token", TOKEN)] {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(name))?;
        file.write_all(text.as_bytes())?;
    }
    let config = dir.join("config.toml");
    let text = format!(
        "state_directory = \"state\"\nruntime_directory = \"run\"\nimage_directory = \"images\"\nconcurrent = 2\n\
         [status]\ntoken_file = \"page-token\"\n\
         [hypervisor]\nuri = \"processes://{}\"\naccel = \"kvm\"\n\
         [capacity]\nmemory_mib = 100000\ndisk_gib = 100000\n\
         [limits]\nkeepalive = \"2s\"\nguest_power_off = \"3m\"\n\
         [[class]]\nname = \"small\"\nimage = \"test\"\ncpus = 1\nmemory_mib = 512\ndisk_gib = 1\n\
         [[runner]]\nname = \"web lab\"\nurl = \"{gitlab}\"\ntoken_file = \"token\"\nclass = \"small\"\n\
         allow_insecure_http = true\npoll_interval = \"200ms\"\n",
        dir.join("vms").display()
    );
    fs::write(&config, text)?;
    Ok(config)
}

fn start(dayfly: &Path, config: &Path) -> io::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(config.with_file_name("log"))?;
    #[expect(clippy::disallowed_methods, reason = "the daemon under test; it ends with us")]
    let mut command = Command::new(dayfly);
    command.arg("--config").arg(config).arg("run").env_clear();
    // For qemu-img.
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true).spawn()
}

/// Ends jobs and daemon, so that no machine is left.
async fn end(daemon: &mut Child, dayfly: &Path, config: &Path) {
    for _ in 0..2 {
        #[expect(clippy::disallowed_methods, reason = "the operator's command; it ends within milliseconds")]
        let mut drain = Command::new(dayfly);
        drain.arg("--config").arg(config).arg("drain").env_clear().stdout(Stdio::null());
        // The second one may find that it has gone.
        let _ = drain.stderr(Stdio::null()).status().await;
    }
    // Machines that are left end when their daemon has been away for long.
    let _ = timeout(Duration::from_secs(20), daemon.wait()).await;
}

/// A port of the loopback that leads to the socket, for as long as the task lives.
async fn proxy(socket: PathBuf) -> io::Result<(JoinSet<()>, std::net::SocketAddr)> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            let socket = socket.clone();
            connections.spawn(async move {
                if let Ok(mut far) = UnixStream::connect(socket).await {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
            while connections.try_join_next().is_some() {}
        }
    });
    Ok((tasks, address))
}

/// Waits until this holds; `None`: not within `limit`.
async fn until(limit: Duration, holds: impl Fn() -> bool) -> Option<()> {
    let wait = async {
        while !holds() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(limit, wait).await.ok()
}
