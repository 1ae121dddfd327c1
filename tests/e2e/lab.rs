//! A GitLab stand-in over TLS, a git repository behind it, and the real daemon as a process.

use crate::leaks;
use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly_exec::standin::{self, Job, JobSpec, JobState, ProjectId, Served, Standin};
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Longest wait for anything: a TCG boot on a busy host takes a minute.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Tests share this host's libvirtd; one that stops it runs alone.
static HOST: RwLock<()> = RwLock::const_new(());

/// A test's right to this host, until it is dropped.
#[expect(dead_code, reason = "held, never looked at")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// One test's world. Its folder is removed at the end of a test that passed.
pub struct Lab {
    pub standin: Standin,
    pub project: ProjectId,
    pub dir: tempfile::TempDir,
    /// GitLab's certificate.
    pub tls: Arc<rustls::ServerConfig>,
    _served: Served,
    port: u16,
    cache_mib: Option<u32>,
    daemon: Option<Child>,
    sha: String,
    namespace: Option<&'static str>,
    _turn: Turn,
}

/// What a test may want of its daemon.
pub struct Options {
    pub image: String,
    pub image_directory: PathBuf,
    pub concurrent: u32,
    /// `hypervisor.backend`.
    pub backend: &'static str,
    /// Lines for section `[limits]`.
    pub limits: &'static str,
    /// The caches are on a file system of their own, of so many MiB, which the daemon alone sees.
    pub cache_mib: Option<u32>,
    /// The class's network; none: the default.
    pub network: &'static str,
    /// Where its machines come from. A machine that is frozen beside a test takes its processor.
    pub start: &'static str,
    /// Lines for the class.
    pub class: &'static str,
    /// Whole sections.
    pub sections: String,
    /// No other test may run beside it.
    pub alone: bool,
    /// Where GitLab and daemon are.
    pub place: Place,
}

/// Where GitLab and daemon are, and what they call each other.
pub struct Place {
    /// Where GitLab listens; port 0: any.
    pub gitlab: SocketAddr,
    /// GitLab's host as the daemon knows it, and as guests do.
    pub names: [&'static str; 2],
    /// Other names that GitLab's certificate is good for.
    pub aliases: &'static [&'static str],
    /// A network namespace, by its file, in which daemon and machines are; none: where the test is.
    pub namespace: Option<&'static str>,
}

impl Default for Place {
    /// GitLab is on this host's loopback, at 10.0.2.2 for a guest.
    fn default() -> Self {
        Self { gitlab: ([127, 0, 0, 1], 0).into(), names: ["127.0.0.1", "10.0.2.2"], aliases: &[], namespace: None }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            image: "debian-12-shell".into(),
            image_directory: image_directory(),
            concurrent: 1,
            backend: "libvirt",
            limits: "",
            cache_mib: None,
            // GitLab is on this host's loopback, at 10.0.2.2 for a guest.
            network: "user",
            start: "cold",
            class: "",
            sections: String::new(),
            alone: false,
            place: Place::default(),
        }
    }
}

fn required(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run `scripts/test e2e`, which prepares what these tests need"))
}

pub fn image_directory() -> PathBuf {
    required("DAYFLY_E2E_IMAGES").into()
}

fn dayfly() -> String {
    required("DAYFLY_E2E_DAYFLY")
}

/// Ports of this test's doors, apart from those of tests that run beside it.
fn guest_ports() -> String {
    let slot = std::process::id() % 200 + SLOT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) * 200;
    let first = 21_000 + slot % 1000 * 10;
    format!("{first}-{}", first + 9)
}

static SLOT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

impl Lab {
    /// Starts GitLab and a daemon with one runner.
    pub async fn start(options: Options) -> Self {
        let mut lab = Self::stopped(options).await;
        lab.start_daemon().await;
        lab
    }

    /// The same before its daemon starts.
    pub async fn stopped(options: Options) -> Self {
        let turn = if options.alone { Turn::Alone(HOST.write().await) } else { Turn::Shared(HOST.read().await) };
        // A short path: unix sockets end at 107 bytes.
        let dir = tempfile::Builder::new().prefix("df-e2e-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let (repository, sha) = repository(dir.path());
        let listener = TcpListener::bind(options.place.gitlab).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let standin = Standin::new(Clock::system(), Rng::system());
        let [_, guests] = options.place.names;
        standin.configure(|settings| {
            settings.external_url = format!("https://{guests}:{port}");
            settings.trace_update_interval = Some(Duration::from_secs(1));
        });
        let project = standin.add_project("group/project");
        standin.edit(|model| model.projects.get_mut(&project).unwrap().repository = Some(repository));
        let runner = standin.add_runner(project);
        let tls = tls(dir.path(), &[&options.place.names, options.place.aliases].concat());
        let served = standin::serve(standin.clone(), listener, Some(Arc::clone(&tls))).unwrap();
        let token = dir.path().join("token");
        let known = crate::canary::runner_token(runner.0);
        standin.edit(|model| model.runners.get_mut(&runner).unwrap().token = Secret::new(known.clone()));
        fs::write(&token, known).unwrap();
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
        let (cache_mib, namespace) = (options.cache_mib, options.place.namespace);
        let lab = Self {
            standin,
            project,
            dir,
            tls,
            _served: served,
            port,
            cache_mib,
            daemon: None,
            sha,
            namespace,
            _turn: turn,
        };
        lab.write_config(&options, port);
        lab
    }

    /// GitLab's address, as the daemon's configuration has it.
    pub fn gitlab(&self) -> url::Url {
        format!("https://127.0.0.1:{}", self.port).parse().unwrap()
    }

    fn write_config(&self, options: &Options, port: u16) {
        let dir = self.dir.path().display();
        let mut text = String::new();
        writeln!(text, "state_directory = \"{dir}/state\"\nruntime_directory = \"{dir}/run\"").unwrap();
        writeln!(
            text,
            "image_directory = \"{}\"\nconcurrent = {}",
            options.image_directory.display(),
            options.concurrent
        )
        .unwrap();
        writeln!(text, "[log]\nlevel = \"debug\"\n[hypervisor]\nbackend = \"{}\"", options.backend).unwrap();
        writeln!(text, "uri = \"qemu:///session\"\naccel = \"{}\"", accel()).unwrap();
        writeln!(
            text,
            "[network]\nguest_ports = \"{}\"\n[limits]\nkeepalive = \"3s\"\n{}",
            guest_ports(),
            options.limits
        )
        .unwrap();
        writeln!(
            text,
            "[[class]]\nname = \"small\"\nimage = \"{}\"\ncpus = 1\nmemory_mib = 512\ndisk_gib = 8",
            options.image
        )
        .unwrap();
        let Place { names: [gitlab, guests], .. } = options.place;
        writeln!(text, "allow_standin_runner = true\nstart = \"{}\"", options.start).unwrap();
        if !options.network.is_empty() {
            writeln!(text, "network = \"{}\"", options.network).unwrap();
        }
        // It may end with sections of its own.
        writeln!(text, "{}", options.class).unwrap();
        writeln!(
            text,
            "[[runner]]\nname = \"e2e runner\"\nurl = \"https://{gitlab}:{port}\"\ntoken_file = \"{dir}/token\""
        )
        .unwrap();
        writeln!(text, "class = \"small\"\ntls_ca_file = \"{dir}/ca.pem\"\nclone_url = \"https://{guests}:{port}\"")
            .unwrap();
        writeln!(text, "poll_interval = \"1s\"\n{}", options.sections).unwrap();
        fs::write(self.dir.path().join("config.toml"), text).unwrap();
    }

    /// Lets the next daemon find another configuration: `from` with `to` in its place.
    pub fn change_config(&self, from: &str, to: &str) {
        let path = self.dir.path().join("config.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "`{from}` is not in {text}");
        fs::write(&path, text.replace(from, to)).unwrap();
    }

    pub async fn start_daemon(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = self.command();
        if let Some(mib) = self.cache_mib {
            // In a mount namespace of its own, as the user that it is anyway.
            let cache = self.dir.path().join("state/cache");
            // As private as the daemon would make them.
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&cache).unwrap();
            let mount = format!("mount -t tmpfs -o size={mib}m,mode=700 tmpfs \"$0\" && exec \"$@\"");
            let inner = command;
            command = Command::new("unshare");
            command.args(["--map-current-user", "--keep-caps", "--mount", "sh", "-ec", &mount]).arg(cache);
            command.arg(inner.get_program()).args(inner.get_args());
        }
        command.arg("run");
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.daemon = Some(child.expect("dayfly starts"));
    }

    /// Ports of those for doors at which somebody listens. The daemon's own descriptors nobody may look at.
    pub fn doors_at_ports(&self) -> Vec<u16> {
        let config = fs::read_to_string(self.dir.path().join("config.toml")).unwrap();
        let range = config.split("guest_ports = \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let range = first.parse::<u16>().unwrap()..=last.parse().unwrap();
        let tables = ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default());
        let listens = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Local address, and the state: 0A listens.
            let [_, local, _, "0A", ..] = words[..] else { return None };
            u16::from_str_radix(local.rsplit(':').next()?, 16).ok()
        };
        let ports = tables.iter().flat_map(|table| table.lines()).filter_map(listens);
        ports.filter(|port| range.contains(port)).collect()
    }

    /// What `dayfly doctor` says with this lab's configuration.
    pub fn doctor(&self) -> String {
        self.says(&["doctor"])
    }

    /// What `dayfly` prints for these arguments, with this as standard input, and whether it did it.
    pub async fn dayfly(&self, arguments: &[&str], input: &str) -> (bool, String) {
        let mut command = self.command();
        command.args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = input.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            use std::io::Write as _;
            let mut child = command.spawn().expect("dayfly starts");
            // It may have said no before it read.
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
            child.wait_with_output().unwrap()
        });
        let output = tokio::time::timeout(LIMIT, done).await.expect("dayfly ends").unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// What `dayfly` prints with these arguments and this lab's configuration.
    pub fn says(&self, arguments: &[&str]) -> String {
        let output = self.command().args(arguments).stdin(Stdio::null()).output().expect("dayfly starts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `dayfly`, where it belongs, with this lab's configuration.
    fn command(&self) -> Command {
        let mut command = match self.namespace {
            // It becomes what it starts.
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={namespace}")).arg(dayfly());
                command
            }
            None => Command::new(dayfly()),
        };
        command.arg("--config").arg(self.dir.path().join("config.toml"));
        command
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: &str) {
        let child = self.daemon.as_ref().expect("a daemon runs");
        run("kill", &[&format!("-{signal}"), &child.id().to_string()]);
    }

    /// Sends the daemon a signal and waits for its exit code.
    pub async fn stop_daemon(&mut self, signal: &str) -> Option<i32> {
        self.signal(signal);
        let mut child = self.daemon.take().expect("a daemon runs");
        let ended = tokio::task::spawn_blocking(move || child.wait().unwrap().code());
        tokio::time::timeout(LIMIT, ended).await.expect("the daemon ends").unwrap()
    }

    /// A job that clones the repository and runs this script.
    pub fn spec(&self, script: &[&str]) -> JobSpec {
        JobSpec {
            sha: self.sha.clone(),
            depth: Some(0),
            refspecs: Some(vec!["+refs/heads/main:refs/remotes/origin/main".into()]),
            ..JobSpec::script(script.iter().copied())
        }
    }

    pub fn job(&self, script: &[&str]) -> JobId {
        self.enqueue(self.spec(script))
    }

    pub fn enqueue(&self, spec: JobSpec) -> JobId {
        self.standin.enqueue(self.project, spec)
    }

    pub async fn until(&self, job: JobId, state: JobState) -> Job {
        let reached = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| j.state == state), LIMIT).await;
        let found = self.standin.job(job).unwrap();
        assert!(reached.is_ok(), "job {job} is {:?}, not {state:?}\n{}", found.state, self.story(job));
        found
    }

    pub async fn until_trace(&self, job: JobId, text: &str) {
        let holds = |trace: &[u8]| trace.windows(text.len()).any(|w| w == text.as_bytes());
        let reached = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| holds(&j.trace.bytes)), LIMIT).await;
        assert!(reached.is_ok(), "no {text:?} in the trace\n{}", self.story(job));
        // In the middle of a job there is most to look at.
        self.assert_no_leak();
    }

    pub fn trace(&self, job: JobId) -> String {
        String::from_utf8_lossy(&self.standin.job(job).unwrap().trace.bytes).into_owned()
    }

    /// Trace and log, for a failing test.
    pub fn story(&self, job: JobId) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(120).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        format!("--- trace\n{}\n--- log\n{}", self.trace(job), tail.join("\n"))
    }

    /// Waits until nothing of any job is left on this host, then stops the daemon and looks again.
    pub async fn assert_clean(&mut self) {
        self.until_released().await;
        self.assert_no_leak();
        assert_eq!(self.stop_daemon("TERM").await, Some(0));
        self.assert_no_leak();
        let log = fs::read_to_string(self.log_path()).unwrap();
        let errors: Vec<&str> = log.lines().filter(|l| l.contains(" ERROR ") || l.contains(" panicked at ")).collect();
        assert!(errors.is_empty(), "the log has errors: {errors:#?}");
        assert_eq!(self.standin.read(|m| m.metrics.trace_invalid), 0, "a verdict's checksum did not match the trace");
    }

    /// Waits until nothing is left of any job but what is kept.
    pub async fn until_released(&self) {
        let clean = async {
            while !self.leftovers().is_empty() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(30), clean).await;
        assert!(
            in_time.is_ok(),
            "left behind: {:?}\n{}",
            self.leftovers(),
            fs::read_to_string(self.log_path()).unwrap()
        );
    }

    /// No part of the runner token but its public one is in a file of the daemon's, in arguments or
    /// environment of it and what it started, or in a trace.
    fn assert_no_leak(&self) {
        let mut leaks = leaks::in_files(self.dir.path(), &["token"]);
        leaks.extend(leaks::in_processes(self.daemon.as_ref().map(Child::id), self.dir.path()));
        let traces =
            self.standin.read(|model| model.jobs.values().map(|job| job.trace.bytes.clone()).collect::<Vec<_>>());
        leaks.extend(traces.iter().flat_map(|trace| leaks::in_bytes("a trace", trace)));
        assert!(leaks.is_empty(), "secrets of the runner got out: {leaks:?}");
    }

    /// Files and domains of this lab's jobs that exist.
    pub fn leftovers(&self) -> Vec<String> {
        let dir = self.dir.path();
        let mut left = Vec::new();
        for sub in ["state/jobs", "state/overlays", "run/jobs", "run/vm"] {
            for entry in fs::read_dir(dir.join(sub)).into_iter().flatten().flatten() {
                left.push(entry.path().display().to_string());
            }
        }
        left
    }

    /// VMs of this lab, by their emulator processes' command lines.
    pub fn vms(&self) -> usize {
        let marker = format!("{}/state/overlays/", self.dir.path().display());
        let mut vms = 0;
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            // By its path, or by its name.
            let is_qemu = [&b"/usr/bin/qemu-system"[..], b"qemu-system"].iter().any(|with| cmdline.starts_with(with));
            vms += usize::from(is_qemu && String::from_utf8_lossy(&cmdline).contains(&marker));
        }
        vms
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            if std::thread::panicking() {
                // Drain without patience, so that a failed test leaves no VM behind.
                for _ in 0..2 {
                    run("kill", &["-QUIT", &child.id().to_string()]);
                    std::thread::sleep(Duration::from_millis(300));
                }
            } else {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
}

/// TCG where KVM runs no guests: this is a test of dayfly, not of the host.
fn accel() -> String {
    std::env::var("DAYFLY_E2E_ACCEL").unwrap_or_else(|_| "tcg".into())
}

pub fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// What a program has printed that must have done it.
pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A bare repository with one commit, ready for dumb HTTP, and the commit.
fn repository(dir: &Path) -> (PathBuf, String) {
    let script = "set -e; cd \"$1\"; git init -q -b main work; cd work; echo content > file.txt; git add .; \
        git -c user.name=t -c user.email=t@t.invalid commit -q -m first; cd ..; git clone -q --bare work repository.git; \
        git -C repository.git update-server-info; git -C repository.git rev-parse HEAD";
    let printed = succeeded(&run("sh", &["-c", script, "sh", &dir.display().to_string()]));
    (dir.join("repository.git"), printed.trim().to_owned())
}

/// A CA of our own in `ca.pem`, and a server certificate for both names of this GitLab.
fn tls(dir: &Path, names: &[&str]) -> Arc<rustls::ServerConfig> {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "dayfly e2e CA");
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    fs::write(dir.join("ca.pem"), ca.pem()).unwrap();
    let issuer = rcgen::Issuer::from_params(&params, &ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Arc::new(config.with_no_client_auth().with_single_cert(vec![server.der().clone()], key).unwrap())
}
