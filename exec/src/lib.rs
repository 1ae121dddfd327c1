//! What happens to one job without a GitLab? `dayfly exec JOB…`
//!
//! A program of its own, `dayfly-exec`, which `dayfly exec` finds: the daemon's holds neither it nor the
//! stand-in GitLab (decision D29).
//!
//! A job of a local `.gitlab-ci.yml` in a fresh VM, through exactly the daemon's path: the stand-in
//! GitLab listens on a loopback port, a daemon in this process polls it, and the VM's runner does
//! what it always does. The trace goes to stdout, our own words to stderr, artifacts into a folder.
//!
//! ```text
//! .gitlab-ci.yml ─ pipeline ─► Plan ─ payload ─► stand-in GitLab ◄─ polls ─ daemon ─► VM
//!          HEAD ─ repository ─► bare copy ──────────┘    │ trace, verdict, artifacts
//!                                      terminal, unpack ◄┘
//! ```
//!
//! Exit codes: 64 for a wrong command line; 0; the script's own (none: 1); 124 the job ran out of time; 125 it is not the job's
//! fault (the pipeline file, the machine, dayfly itself); 130 interrupted. A failure that
//! `allow_failure` allows gives 0 and a line.
//!
//! The jobs are strangers: what they upload is unpacked with care ([`unpack`]), what they print is
//! filtered (`terminal`). A run is an installation of its own ([`instance`]).

mod archive;
#[cfg(test)]
mod corpus;
mod given;
pub mod instance;
mod payload;
pub mod pipeline;
mod reports;
pub mod repository;
mod screen;
mod session;
pub mod standin;
mod terminal;
pub mod unpack;

pub use screen::Screen;
pub use session::{EXIT_INTERRUPTED, EXIT_OURS, EXIT_TIMEOUT, Session};

use clap::Parser as _;
use dayfly::config::{Class, Config, Runner, Span};
use dayfly::daemon::{Backends, DaemonError, socket_directory};
use dayfly::gitlab::{ProxyEnvironment, RealLimits, RealOpenTransport};
use dayfly::image::alike;
use dayfly::image::store::ImageError;
use dayfly::network::{Choice, EgressConfig, Pattern, PortRange};
use dayfly::telemetry::{self, chain};
use dayfly::vm::{AccelChoice, VmUsers};
use given::{Given, GivenError};
use instance::{Directories, Instance, InstanceError};
use pipeline::sources::Directory;
use pipeline::{Job, PipelineError};
use repository::{REPOSITORY_BYTES_MAX, Repository, RepositoryError};
use standin::{ArtifactKeep, ProjectId, Standin};
use std::ffi::OsString;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use unpack::{Folder, UnpackError};

/// `EX_USAGE` of sysexits.h, as `dayfly` has it.
const EXIT_USAGE: u8 = 64;
/// The disk of a VM where neither the command line nor what is free says otherwise, GiB.
const DISK_GIB: u64 = 20;
/// Less is not offered without being asked for: an image alone takes a gigabyte, and a job its own.
const DISK_GIB_MIN: u64 = 4;
/// Name of the runner in the job's log.
const RUNNER_NAME: &str = "dayfly-exec";
/// Doors of runs: not where a service has its own, whose ports must be free when it comes back.
const GUEST_PORTS: PortRange = PortRange { first: 22_000, last: 22_999 };
/// How the guest reaches the host's loopback (SLIRP).
const HOST_FROM_GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Host of the container registry, which there is none of: `.invalid` resolves nowhere (RFC 2606), so that
/// `CI_REGISTRY*` have their usual form and a login fails by name. `-e CI_REGISTRY=…` names another.
const REGISTRY: &str = "registry.invalid";
/// Largest artifact, as much as may be unpacked of one.
const ARTIFACT_MIB_MAX: u64 = 4096;

/// Run jobs of a local pipeline file, each in a fresh VM, without a GitLab
///
/// The job's log goes to stdout, its artifacts into a folder. Exit code: the job's own; 124 if it ran
/// out of time; 125 if it could not be run; 130 if interrupted.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "dayfly-exec", bin_name = "dayfly exec", version)]
struct Args {
    /// Jobs to run, in the order of stages and `needs`; one of several of a key by its name: 'test: [linux, 3.11]', 'test 1/4'
    #[arg(required_unless_present = "list", value_name = "JOB")]
    jobs: Vec<String>,
    /// List the file's jobs with their stages, and why one cannot run here; run none
    #[arg(long, conflicts_with = "jobs")]
    list: bool,
    /// Pipeline file
    #[arg(short, long, value_name = "FILE", default_value = ".gitlab-ci.yml")]
    file: PathBuf,
    /// Image of the VM, for jobs that choose none
    #[arg(long, value_name = "NAME", default_value = "debian-12-shell")]
    image: String,
    /// An image that a job may choose besides, by `image:` or DAYFLY_IMAGE; may be given several times
    #[arg(long, value_name = "NAME")]
    allow_image: Vec<String>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cpus: u32,
    /// Memory of the VM, MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(128..=16_777_216))]
    memory: u64,
    /// Disk of the VM, GiB [default: 20, or what is free where that is less]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    disk: Option<u64>,
    /// Virtual CPUs that a job may ask for by DAYFLY_CPUS [default: --cpus]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_cpus: Option<u32>,
    /// Memory that a job may ask for by DAYFLY_MEMORY, MiB [default: --memory]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(128..=16_777_216))]
    max_memory: Option<u64>,
    /// Disk that a job may ask for by DAYFLY_DISK, GiB [default: --disk]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    max_disk: Option<u64>,
    /// Run the job as root in the VM
    #[arg(long)]
    root: bool,
    /// Let the job's containers see the socket of the VM's Docker (images with the docker executor)
    #[arg(long)]
    docker_socket: bool,
    /// Virtualisation: auto (KVM, proven by a boot), kvm, or tcg (slow, and it isolates nothing)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    accel: AccelChoice,
    /// Folder for artifacts; what an earlier run of a job left there is replaced
    #[arg(long, value_name = "DIR", default_value = "dayfly-artifacts")]
    artifacts: PathBuf,
    /// Timeout of jobs that name none
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_timeout)]
    timeout: Duration,
    /// A variable for the jobs, wins over the file's; FILE:KEY=PATH: a file-type variable with the content of PATH
    #[arg(short = 'e', long = "variable", value_name = "[FILE:]KEY=VALUE", value_parser = given::parse)]
    variables: Vec<Given>,
    /// Directory with the images
    #[arg(long, value_name = "DIR", env = "DAYFLY_IMAGE_DIRECTORY")]
    image_directory: Option<PathBuf>,
    /// Directory for what a run needs while it lasts
    #[arg(long, value_name = "DIR")]
    work_directory: Option<PathBuf>,
    /// Network of the VM: user, or relay, by which a job reaches no repository of this host
    #[arg(long, value_name = "NETWORK", default_value = "user")]
    network: Choice,
    /// What a job reaches besides what is public, with `--network relay`: HOST:PORT; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    reach: Vec<Pattern>,
    /// libvirt's address, or `none`: QEMU without libvirt
    #[arg(long, value_name = "URI", default_value = "qemu:///session")]
    libvirt: String,
    /// Say more: -v what dayfly does, -vv each call
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// The command line's own definition, for pages about it.
pub fn command() -> clap::Command {
    <Args as clap::CommandFactory>::command()
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    pipeline::parse_timeout(text).ok_or_else(|| "write it like `1h 30m`, at most a month".into())
}

/// Why no job could be run. Exit code 125.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Artifacts(#[from] UnpackError),
    #[error(transparent)]
    Place(#[from] InstanceError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("use image `{0}`: nobody has seen it boot; run `dayfly image test {0}`")]
    Untested(String),
    #[error("use these images: {0}")]
    Unlike(String),
    #[error("use KVM: {0}; `--accel tcg` works without hardware virtualisation, slowly and without isolation")]
    NoKvm(String),
    #[error(transparent)]
    Daemon(DaemonError),
    #[error(transparent)]
    Variable(#[from] GivenError),
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl From<DaemonError> for ExecError {
    fn from(error: DaemonError) -> Self {
        match error {
            // The daemon's own remedy is a key of its configuration.
            DaemonError::NoKvm(reason) => Self::NoKvm(reason),
            other => Self::Daemon(other),
        }
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> ExecError {
    move |source| ExecError::System { what, source }
}

/// Runs the command line and returns the exit code.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    match Args::try_parse_from(args) {
        Ok(args) => run_jobs(&args),
        Err(error) => {
            // To stdout for --help and --version, else to stderr. Nobody can be told if that fails.
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS }
        }
    }
}

/// Runs the jobs and returns the exit code.
fn run_jobs(args: &Args) -> ExitCode {
    let mut screen = Screen::of_process();
    let log = telemetry::Config {
        level: match args.verbose {
            0 => "warn",
            1 => "info",
            _ => "debug",
        }
        .into(),
        ..telemetry::Config::default()
    };
    // Its last lines are written out when this is dropped, after all else.
    let _log = telemetry::init(&log);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            screen.say(&format!("start threads: {error}"));
            return ExitCode::from(EXIT_OURS);
        }
    };
    let code = runtime.block_on(async {
        match run(args, &mut screen).await {
            Ok(code) => code,
            Err(error) => {
                screen.say(&chain(&error));
                EXIT_OURS
            }
        }
    });
    // A call to a hypervisor that does not answer is not waited for.
    runtime.shutdown_background();
    ExitCode::from(code)
}

/// Prints the jobs: stage, name, and why one cannot run. The exit code is 0 whatever they are.
async fn list(args: &Args, screen: &mut Screen) -> Result<u8, ExecError> {
    let variables = given::read_all(&args.variables)?;
    let directory = args.file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A repository that cannot be served has jobs all the same.
    let repository = Repository::find(directory).await.ok().flatten();
    let sources = Directory::around(&args.file, payload::known(repository.as_ref(), &variables));
    let (jobs, more) = pipeline::list(&args.file, &sources)?;
    let width = jobs.iter().filter_map(|job| job.stage.as_ref()).map(|stage| stage.chars().count()).max().unwrap_or(0);
    for job in &jobs {
        let stage = job.stage.as_deref().unwrap_or("-");
        screen.show(&format!("{stage:width$}  {}", job.name));
        if let Some(refused) = &job.refused {
            screen.show(&format!("{:width$}    cannot run: {refused}", ""));
        }
    }
    if more > 0 {
        screen.say(&format!("{more} more keys are not listed"));
    }
    Ok(0)
}

async fn run(args: &Args, screen: &mut Screen) -> Result<u8, ExecError> {
    if args.list {
        return list(args, screen).await;
    }
    let mut interrupts = interrupts().map_err(system("listen to signals"))?;
    let variables = given::read_all(&args.variables)?;
    let repository = find_repository(&args.file, screen).await?;
    let sources = Directory::around(&args.file, payload::known(repository.as_ref(), &variables));
    let plan = pipeline::read(&args.file, &args.jobs, &sources)?;
    for note in &plan.notes {
        let file = plan.files.get(note.line.file).unwrap_or(&args.file);
        screen.say(&format!("{}:{note}", file.display()));
    }
    let folder = match plan.jobs.iter().any(Job::uploads) {
        true => Some(Folder::open(&args.artifacts, unpack::Limits::default())?),
        false => None,
    };
    let mut config = config(args);
    let mut backends = Backends::real(&config)?;
    // The stand-in is on this host: whatever proxy the developer uses is not for it.
    backends.transport = Arc::new(RealOpenTransport::new(RealLimits::default(), ProxyEnvironment::default()));
    let mut images = Vec::new();
    for name in std::iter::once(&args.image).chain(&args.allow_image) {
        let image = backends.images.load(name).await?;
        if image.manifest.runner_info().is_none() {
            return Err(ExecError::Untested(name.clone()));
        }
        if image.manifest.is_standin() {
            screen.say(&format!("image `{name}` holds dayfly's stand-in runner, not the official gitlab-runner"));
        }
        images.push(image);
    }
    alike::told(&images).map_err(ExecError::Unlike)?;
    let directories = Directories::choose(args.work_directory.clone())?;
    let hypervisor = config.hypervisor.clone();
    let host = |runtime: &Path| hypervisor.host(&socket_directory(runtime));
    let machines = |runtime: &Path| host(runtime).hypervisor;
    let claim = directories.claim(&args.libvirt, &machines, &*backends.files, &backends.rng);
    let instance = tokio::select! {
        biased;
        // The interrupt first: nothing of this run exists yet.
        Some(()) = interrupts.recv() => return Ok(EXIT_INTERRUPTED),
        instance = claim => instance?,
    };
    backends.host = host(&instance.runtime);
    let hypervisor = backends.host.hypervisor.clone();
    let prepared = match fit_disk(args, &mut config, &instance, &backends, screen).await {
        Ok(()) => prepare(&mut config, &instance, repository.as_ref(), &backends).await,
        Err(error) => Err(error),
    };
    let code = match prepared {
        Ok((standin, project, served)) => {
            let session = Session {
                plan: &plan,
                repository: repository.as_ref(),
                file: &args.file,
                timeout: args.timeout,
                variables: &variables,
                folder,
                standin,
                project,
                config,
                backends,
            };
            let code = session.run(screen, &mut interrupts).await.map_err(ExecError::from);
            served.stop().await;
            code
        }
        Err(error) => Err(error),
    };
    // A developer who has interrupted twice does not wait for this either.
    tokio::select! {
        biased;
        Some(()) = interrupts.recv() => {}
        () = instance.close(&*hypervisor) => {}
    }
    code
}

/// SIGINT, SIGTERM and SIGHUP, each one message.
fn interrupts() -> io::Result<mpsc::Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut int = signal(SignalKind::interrupt())?;
    let mut term = signal(SignalKind::terminate())?;
    let mut hup = signal(SignalKind::hangup())?;
    // A third interrupt means no more than the second.
    let (sender, receiver) = mpsc::channel(2);
    #[expect(clippy::disallowed_methods, reason = "ends with the process")]
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                // All are cancel safe and mean the same.
                _ = int.recv() => {}
                _ = term.recv() => {}
                _ = hup.recv() => {}
            }
            let _ = sender.try_send(());
        }
    });
    Ok(receiver)
}

/// The repository around the pipeline file, and what the developer should know about it.
async fn find_repository(file: &Path, screen: &mut Screen) -> Result<Option<Repository>, ExecError> {
    let directory = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = Repository::find(directory).await?;
    match &found {
        None => {
            screen.say("there is no git repository here, so the job starts in an empty directory (GIT_STRATEGY=none)")
        }
        Some(Repository { changes: Some(0), .. }) => {}
        Some(repository) => {
            let count = repository.changes.map_or("many".to_owned(), |n| n.to_string());
            screen.say(&format!("{count} changed or new files are not committed: the job gets HEAD without them"));
        }
    }
    if let Some(Repository { relative_submodules, .. }) = &found
        && !relative_submodules.is_empty()
    {
        screen.say(&format!(
            "submodules with a relative URL are not served, and a job that fetches them fails: {}; only this repository is; \
             give them an absolute URL in .gitmodules, or set GIT_SUBMODULE_STRATEGY=none",
            relative_submodules.join(", ")
        ));
    }
    Ok(found)
}

/// What does not depend on the place of this run.
fn config(args: &Args) -> Config {
    let disk_gib = args.disk.unwrap_or(DISK_GIB);
    let image_directory = args.image_directory.clone().unwrap_or_else(default_image_directory);
    let mut config = Config {
        image_directory: std::path::absolute(&image_directory).unwrap_or(image_directory),
        class: vec![Class {
            images: args.allow_image.clone(),
            cpus: args.cpus,
            max_cpus: Some(args.cpus.max(args.max_cpus.unwrap_or(0))),
            memory_mib: args.memory,
            max_memory_mib: Some(args.memory.max(args.max_memory.unwrap_or(0))),
            disk_gib,
            max_disk_gib: Some(disk_gib.max(args.max_disk.unwrap_or(0))),
            run_as_root: args.root,
            // Said on the screen and in the job's log.
            allow_standin_runner: true,
            // The stand-in for GitLab listens on this host's loopback, which only `user` reaches.
            network: Some(args.network),
            egress: match args.network {
                Choice::Relay => EgressConfig { allow: args.reach.clone(), ..EgressConfig::default() },
                Choice::User | Choice::Bridge => EgressConfig::default(),
            },
            docker_socket: args.docker_socket,
            ..Class::new("exec", args.image.clone())
        }],
        ..Config::default()
    };
    config.hypervisor.choose(&args.libvirt);
    config.hypervisor.accel = args.accel;
    // A daemon on this host may have them.
    config.hypervisor.vm_users = Some(VmUsers::None);
    config.network.guest_ports = GUEST_PORTS;
    // It ends with its job: nothing would be restored from what it froze.
    config.goldens.disk_gib = 0;
    config
}

/// Without `--disk`: the class's disk is no larger than what is free beside the overlays.
async fn fit_disk(
    args: &Args,
    config: &mut Config,
    instance: &Instance,
    backends: &Backends,
    screen: &mut Screen,
) -> Result<(), ExecError> {
    if args.disk.is_some() {
        return Ok(());
    }
    let free = backends.files.free_bytes(&instance.root).await.map_err(system("look for free disk"))?;
    let Some(disk_gib) = default_disk_gib(free, config.capacity.disk_reserve_gib) else { return Ok(()) };
    if disk_gib < DISK_GIB {
        screen.say(&format!(
            "{} GiB of disk are free: the VM gets {disk_gib}, not {DISK_GIB}; --disk says it otherwise",
            free >> 30
        ));
    }
    for class in &mut config.class {
        class.disk_gib = disk_gib;
        class.max_disk_gib = Some(disk_gib.max(args.max_disk.unwrap_or(0)));
    }
    Ok(())
}

/// The disk that a job gets where the command line says none, GiB, with `free` bytes where it will lie and `reserve_gib`
/// of them not for jobs. All of a disk is booked, though few jobs fill it: a developer's full disk is no reason not to
/// run a small job. None: what is free is too little to start one, which the poller says in its own words.
fn default_disk_gib(free: u64, reserve_gib: u64) -> Option<u64> {
    let free_gib = (free >> 30).saturating_sub(reserve_gib);
    (free_gib >= DISK_GIB_MIN).then_some(free_gib.min(DISK_GIB))
}

/// The user's own images if there are any, else the system's.
fn default_image_directory() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let data = variable("XDG_DATA_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/share")));
    let own = data.map(|data| data.join("dayfly/images")).filter(|path| path.is_dir());
    own.unwrap_or_else(|| Config::default().image_directory)
}

/// The stand-in GitLab with its project, runner and repository, and the configuration for them.
async fn prepare(
    config: &mut Config,
    instance: &Instance,
    repository: Option<&Repository>,
    backends: &Backends,
) -> Result<(Standin, ProjectId, standin::Served), ExecError> {
    let standin = Standin::new(backends.clock.clone(), backends.rng.clone());
    let project = standin.add_project(&match repository {
        Some(repository) => repository.project_path.clone(),
        None => repository::project_path(None, &std::env::current_dir().unwrap_or_default()),
    });
    let runner = standin.add_runner(project);
    let uploads = instance.state.join("artifacts");
    backends.files.create_dir(&uploads).await.map_err(system("make a directory for artifacts"))?;
    if let Some(repository) = repository {
        let copy = instance.state.join("repository.git");
        repository.serve_from(&copy, REPOSITORY_BYTES_MAX).await?;
        standin.edit(|model| {
            if let Some(project) = model.projects.get_mut(&project) {
                project.repository = Some(copy);
            }
        });
    }
    let listener =
        tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(system("listen on a loopback port"))?;
    let served = standin::serve(standin.clone(), listener, None).map_err(system("serve the stand-in GitLab"))?;
    let port = served.address().port();
    standin.edit(|model| {
        model.settings.external_url = format!("http://{HOST_FROM_GUEST}:{port}");
        // The trace is watched: a second is as live as a terminal needs.
        model.settings.trace_update_interval = Some(Duration::from_secs(1));
        model.settings.max_artifacts_size_mib = ARTIFACT_MIB_MAX;
        model.settings.registry = Some(REGISTRY.into());
        model.settings.artifact_keep = ArtifactKeep::Directory(uploads);
        if let Some(runner) = model.runners.get_mut(&runner) {
            RUNNER_NAME.clone_into(&mut runner.description);
        }
    });
    let token_file = instance.state.join("token");
    let token = standin.runner_token(runner).map(|t| t.expose().to_owned()).unwrap_or_default();
    write_private(&token_file, &token).map_err(system("write the runner token"))?;
    let url = |host: Ipv4Addr| format!("http://{host}:{port}").parse().expect("address and port make a URL");
    config.state_directory.clone_from(&instance.state);
    config.runtime_directory.clone_from(&instance.runtime);
    config.runner = vec![Runner {
        limit: Some(1),
        clone_url: Some(url(HOST_FROM_GUEST)),
        allow_insecure_http: true,
        poll_interval: Span::from_millis(500),
        ..Runner::new(RUNNER_NAME, url(Ipv4Addr::LOCALHOST), token_file, "exec")
    }];
    Ok((standin, project, served))
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_nobody_chose_is_no_larger_than_what_is_free() {
        for (free_gib, reserve_gib, disk_gib) in
            [(500, 2, Some(20)), (22, 2, Some(20)), (21, 2, Some(19)), (6, 2, Some(4)), (5, 2, None), (0, 2, None)]
        {
            assert_eq!(default_disk_gib(free_gib << 30, reserve_gib), disk_gib, "{free_gib} GiB free");
        }
        // What is over of a GiB is not counted.
        assert_eq!(default_disk_gib((8 << 30) - 1, 2), Some(5));
    }
}
