//! One machine without a network card, and what it is connected to: its guest config, its door with GitLab's stand-in
//! behind, and `dayfly-egress`.

use crate::LIMIT;
use crate::world::World;
use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly_egress::{Start, audit, hand_over};
use dayfly_exec::standin::{JobSpec, JobState, ProjectId, Served, Standin, Variable, serve};
use dayfly_guest_config::{
    CONTRACT, DOOR_PORT_NAME, DOOR_WIRE, EGRESS_PORT_NAME, GuestConfig, GuestNetwork, GuestRunner, PASS_BYTES,
    PORT_NAME, Pass,
};
use dayfly_wire::{Limits, Stream, host_handshake};
use std::fmt::Write as _;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What each line of the guest's client begins with.
pub(crate) const OUTPUT: &str = "isolation: ";

/// Between two looks.
const GLANCE: Duration = Duration::from_millis(20);

/// The line of a script that writes the guest's client, which is told this, to `/tmp/client.py`. What it does is its
/// argument.
pub(crate) fn client(told: &str) -> String {
    let parts = [include_str!("client.py"), include_str!("site.py")].join("\n");
    format!("cat > /tmp/client.py <<'CLIENT'\n{told}{parts}\nglobals()[sys.argv[1]]()\nCLIENT")
}

/// The machine, which ends with this.
pub(crate) struct Machine {
    qemu: Child,
    egress: Option<Child>,
    dir: tempfile::TempDir,
    standin: Standin,
    project: ProjectId,
    resolver: SocketAddr,
    _served: Served,
    _tasks: JoinSet<()>,
}

pub(crate) fn required(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run `scripts/test isolation`, which prepares it"))
}

fn pass() -> Pass {
    Pass::new([7; PASS_BYTES])
}

impl Machine {
    pub(crate) async fn start(world: &World) -> Self {
        let dir = tempfile::Builder::new().prefix("df-iso-").tempdir_in("/tmp").unwrap();
        let image = PathBuf::from(required("DAYFLY_ISOLATION_IMAGE"));
        let qemu = qemu(dir.path(), &image);
        let standin = Standin::new(Clock::system(), Rng::system());
        standin.configure(|settings| settings.trace_update_interval = Some(Duration::from_secs(1)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let served = serve(standin.clone(), listener, None).unwrap();
        let project = standin.add_project("group/isolation");
        let runner = standin.add_runner(project);
        let token = standin.runner_token(runner).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(hand_out(dir.path().join("guest"), config(token.expose())));
        tasks.spawn(door(dir.path().join("door"), served.address()));
        let resolver = world.resolver;
        let mut machine = Self { qemu, egress: None, dir, standin, project, resolver, _served: served, _tasks: tasks };
        machine.start_egress().await;
        machine
    }

    /// Lets `dayfly-egress` have the port.
    pub(crate) async fn start_egress(&mut self) {
        let (socket, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let child = Command::new(required("DAYFLY_ISOLATION_EGRESS")).stdin(OwnedFd::from(theirs)).spawn().unwrap();
        self.egress = Some(child);
        let port = connected(&self.dir.path().join("egress")).await.into_std().unwrap();
        let audit = File::options().read(true).append(true).create(true).open(self.audit()).unwrap();
        let policy = serde_json::from_str(&World::policy()).unwrap();
        let start = Start::new(&pass().for_egress(), policy, vec![self.resolver]);
        hand_over(socket, port.into(), audit.into(), &start).await.unwrap();
    }

    pub(crate) fn kill_egress(&mut self) {
        let mut egress = self.egress.take().unwrap();
        egress.kill().unwrap();
        egress.wait().unwrap();
    }

    fn audit(&self) -> PathBuf {
        self.dir.path().join("audit")
    }

    /// What was written down of where the job went.
    pub(crate) fn destinations(&self) -> Vec<String> {
        audit::read(&std::fs::read(self.audit()).unwrap())
            .iter()
            .map(|destination| format!("{destination:?}"))
            .collect()
    }

    /// Queues a job of this script, as root, with the client in `/tmp/client.py`.
    pub(crate) fn begin(&self, script: &[&str]) -> JobId {
        let client = client(&World::told());
        let script = std::iter::once(client.as_str()).chain(script.iter().copied());
        let spec = JobSpec::script(script).with_variable(Variable::new("GIT_STRATEGY", "none"));
        self.standin.enqueue(self.project, spec)
    }

    /// The log of such a job, which must succeed.
    pub(crate) async fn job(&mut self, script: &[&str], limit: Duration) -> String {
        let job = self.begin(script);
        self.end_of(&job, limit).await
    }

    pub(crate) async fn end_of(&self, job: &JobId, limit: Duration) -> String {
        let ended = self
            .standin
            .wait_for(
                |m| {
                    m.jobs.get(job).is_some_and(|job| {
                        matches!(job.state, JobState::Success | JobState::Failed | JobState::Canceled)
                    })
                },
                limit,
            )
            .await;
        let trace = self.trace(job);
        let found = self.standin.job(*job).unwrap();
        assert!(ended.is_ok() && trace.contains("Job succeeded"), "{:?}\n{trace}\n{}", found.state, self.console());
        trace
    }

    pub(crate) async fn until_trace(&self, job: &JobId, text: &str, limit: Duration) {
        let has = |trace: &[u8]| String::from_utf8_lossy(trace).contains(text);
        let came = self.standin.wait_for(|m| m.jobs.get(job).is_some_and(|job| has(&job.trace.bytes)), limit).await;
        assert!(came.is_ok(), "no {text:?}\n{}\n{}", self.trace(job), self.console());
    }

    fn trace(&self, job: &JobId) -> String {
        String::from_utf8_lossy(&self.standin.job(*job).unwrap().trace.bytes).into_owned()
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.path().join("console")).unwrap_or_default()).into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in self.egress.iter_mut().chain([&mut self.qemu]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The machine that libvirt and `vm::qemu` make, without a card and with one more port.
fn qemu(dir: &Path, image: &Path) -> Child {
    let manifest = std::fs::read_to_string(image.join("image.toml")).unwrap();
    let manifest = dayfly::image::manifest::Manifest::parse(&manifest).unwrap();
    assert!(manifest.can_relay(), "the boot test has learnt that the image can do without a network card");
    let disk = image.join("disk.qcow2").canonicalize().unwrap();
    let overlay = dir.join("overlay.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([disk.as_os_str(), overlay.as_os_str(), "8G".as_ref()])
        .status();
    assert!(made.unwrap().success());
    let mut command = Command::new("qemu-system-x86_64");
    command.args("-no-user-config -nodefaults -display none -machine q35 -no-reboot -nic none".split(' '));
    command.args("-accel tcg,tb-size=256 -m 512 -smp 1".split(' '));
    command.arg("-kernel").arg(image.join("vmlinuz")).arg("-initrd").arg(image.join("initrd"));
    command.args(["-append", manifest.cmdline.as_deref().unwrap()]);
    command.arg("-drive").arg(format!("file={},if=none,id=disk,cache=unsafe", overlay.display()));
    command.args("-device virtio-blk-pci,drive=disk -object rng-random,id=rng,filename=/dev/urandom".split(' '));
    command.args("-device virtio-rng-pci,rng=rng -device virtio-serial-pci".split(' '));
    command.args(["-serial", &format!("file:{}", dir.join("console").display())]);
    for (id, name) in [("guest", PORT_NAME), ("door", DOOR_PORT_NAME), ("egress", EGRESS_PORT_NAME)] {
        let path = dir.join(id);
        command.args(["-chardev", &format!("socket,id={id},path={},server=on,wait=off", path.display())]);
        command.args(["-device", &format!("virtserialport,chardev={id},name={name}")]);
    }
    command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 starts")
}

async fn connected(socket: &Path) -> UnixStream {
    timeout(LIMIT, async {
        loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => return stream,
                Err(_) => sleep(GLANCE).await,
            }
        }
    })
    .await
    .expect("the machine has its sockets")
}

fn config(token: &str) -> GuestConfig {
    let mut toml = String::from("concurrent = 1\ncheck_interval = 1\n[[runners]]\n");
    for (key, value) in [
        ("name", "isolation"),
        ("url", dayfly_guest_config::RELAY_URL),
        ("token", token),
        ("executor", "shell"),
        ("clone_url", "http://gitlab.invalid"),
        ("builds_dir", "/root/builds"),
        ("cache_dir", "/root/cache"),
    ] {
        writeln!(toml, "  {key} = {value:?}").unwrap();
    }
    GuestConfig {
        version: CONTRACT,
        vm: "isolationisolati".into(),
        door: DOOR_WIRE.into(),
        pass: pass().to_text(),
        hostname: "isolation".into(),
        machine_id: "1".repeat(32),
        runner_machine_id: "2".repeat(32),
        boot_id: "6a1c1b0e-0000-4000-8000-000000000000".into(),
        seed: "00ff".repeat(16),
        clock_us: now_us(),
        network: GuestNetwork {
            mac: None,
            address: "198.18.0.2/32".into(),
            gateway: [192, 0, 2, 1].into(),
            dns: vec![[192, 0, 2, 1].into()],
            relay: true,
        },
        forwards: Vec::new(),
        runner: GuestRunner {
            config_toml: toml,
            ca_pem: None,
            name: "isolation".into(),
            user: "root".into(),
            wait_timeout_s: LIMIT.as_secs(),
        },
        clone: None,
        door_patience_s: 60,
        power_off_after_s: LIMIT.as_secs(),
        may_stay: false,
        hold: false,
    }
}

/// By the host's wall clock.
fn now_us() -> i64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    i64::try_from(since.as_micros()).unwrap()
}

/// Says the config until the end, and hears what the guest says.
async fn hand_out(socket: PathBuf, config: GuestConfig) {
    let mut port = connected(&socket).await;
    let _ = port.write_all(&config.to_line()).await;
    let mut buffer = [0; 4096];
    while let Ok(1..) = port.read(&mut buffer).await {}
}

/// The door: each stream is a connection to GitLab's stand-in.
async fn door(socket: PathBuf, gitlab: SocketAddr) {
    let mut streams = JoinSet::new();
    loop {
        let Ok(proven) = host_handshake(connected(&socket).await, &pass(), Rng::system().bytes()).await else {
            continue;
        };
        let Ok(mut session) = proven.serve(&Limits::default()).await else { continue };
        while let Some(Ok(stream)) = session.accept().await {
            streams.spawn(carry(stream, gitlab));
        }
    }
}

async fn carry(mut stream: Stream, gitlab: SocketAddr) {
    if let Ok(mut far) = TcpStream::connect(gitlab).await {
        let _ = copy_bidirectional(&mut stream, &mut far).await;
    }
}
