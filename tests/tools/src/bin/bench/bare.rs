//! A boot without dayfly: the same image, kernel and machine in a QEMU started by hand, to the same
//! request.
//!
//! The machine is the one that libvirt makes of dayfly's domain: chipset, CPU, PCI ports, devices and
//! sandbox. The guest gets a config like any other, written to its channel as soon as that is there; a
//! door that knows nothing but the greeting waits for its runner's first line. The overlay is there
//! before the clock starts.

use crate::byhand::Told;
use crate::watched::FIRST_REQUEST;
use dayfly::machine_spec::Executor;
use dayfly::network::Lease;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::vm::disks::Disks;
use dayfly::vm::{Accel, Boot, VmId, VmSpec};
use dayfly_guest_config::{Greeting, Pass};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};

/// Between two looks for the channel's socket.
const GLANCE: Duration = Duration::from_millis(2);

/// The port of this door, apart from those of the daemon beside it.
const PORT: u16 = 25_900;

/// Boots once; from the start of QEMU to the guest's first request.
pub(crate) async fn boot(
    disks: &Disks,
    dayflys: &VmSpec,
    executor: &Executor,
    limit: Duration,
) -> Result<Duration, String> {
    let dir = tempfile::Builder::new()
        .prefix("df-bare-")
        .tempdir_in("/tmp")
        .map_err(|error| format!("make a directory: {error}"))?;
    let rng = Rng::system();
    let spec = VmSpec {
        id: VmId::random(&rng),
        overlay: dir.path().join("overlay.qcow2"),
        socket_dir: dir.path().to_owned(),
        ..dayflys.clone()
    };
    // No larger than its base: the guest sees the same disk either way.
    disks.create(&spec.overlay, &spec.base, 1).await.map_err(|error| dayfly::telemetry::chain(&error))?;
    let lease = Lease::User { port: PORT };
    let listener = TcpListener::bind(("127.0.0.1", PORT)).await.map_err(|error| format!("listen: {error}"))?;
    let told = Told {
        clone_url: url::Url::parse("https://gitlab.example").map_err(|error| error.to_string())?,
        token: Secret::new("glrt-123456789abcdefghijk"),
        executor: executor.clone(),
    };
    let config = told.config(&spec, &lease, &rng);
    let pass = Pass::from_text(&config.pass).ok_or("a config without a pass")?;
    let channel = VmSpec::channel_socket(&spec.socket_dir, &spec.id);
    let console = VmSpec::console_socket(&spec.socket_dir, &spec.id);
    #[expect(clippy::disallowed_methods, reason = "the bare QEMU; killed when dropped")]
    let mut command = tokio::process::Command::new("qemu-system-x86_64");
    command.args(arguments(&spec, &channel, &console)?);
    command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);

    let start = Instant::now();
    let mut qemu = command.spawn().map_err(|error| format!("start QEMU: {error}"))?;
    let asked = async {
        let wires = async {
            let (mut channel, mut console) = (connect(&channel).await, connect(&console).await);
            channel.write_all(&config.to_line()).await?;
            // Both are drained, or the guest would stand still.
            let (mut reports, mut lines) = (Vec::new(), Vec::new());
            tokio::try_join!(channel.read_to_end(&mut reports), console.read_to_end(&mut lines))
        };
        tokio::select! {
            biased;
            // All only wait, and all end with the VM.
            asked = first_request(&listener, &pass, &rng) => asked.map_err(|error| format!("listen: {error}")),
            ended = wires => Err(format!("the guest's wires ended: {ended:?}")),
            ended = qemu.wait() => Err(format!("QEMU ended: {ended:?}")),
        }
    };
    let asked = timeout(limit, asked).await.map_err(|_| "the bare guest did not ask in time".to_owned());
    let took = start.elapsed();
    qemu.kill().await.map_err(|error| format!("end QEMU: {error}"))?;
    asked??;
    Ok(took)
}

async fn connect(socket: &Path) -> UnixStream {
    loop {
        if let Ok(stream) = UnixStream::connect(socket).await {
            return stream;
        }
        sleep(GLANCE).await;
    }
}

/// Waits for the line of the guest's first request.
async fn first_request(listener: &TcpListener, pass: &Pass, rng: &Rng) -> std::io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        // One that breaks off or is not the relay: the next one.
        if let Ok(true) = greet_and_read(stream, pass, rng).await {
            return Ok(());
        }
    }
}

async fn greet_and_read(stream: TcpStream, pass: &Pass, rng: &Rng) -> std::io::Result<bool> {
    let Some(mut stream) = greet(stream, pass, rng).await? else { return Ok(false) };
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    Ok(line.starts_with(FIRST_REQUEST))
}

/// The greeting of a relay that reaches its door by TCP; `None` for anybody else.
pub(crate) async fn greet(stream: TcpStream, pass: &Pass, rng: &Rng) -> std::io::Result<Option<BufReader<TcpStream>>> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let Ok(greeting) = Greeting::door(pass, rng.bytes(), line.trim_end()) else { return Ok(None) };
    stream.write_all(format!("{}\r\n", greeting.door_line()).as_bytes()).await?;
    line.clear();
    stream.read_line(&mut line).await?;
    Ok(greeting.finish(line.trim_end()).is_ok().then_some(stream))
}

/// QEMU's command line for this machine.
fn arguments(spec: &VmSpec, channel: &Path, console: &Path) -> Result<Vec<String>, String> {
    let Boot::Direct { kernel, initrd, cmdline } = &spec.boot else {
        return Err("only images with a kernel of their own are measured".into());
    };
    let path = |path: &PathBuf| path.display().to_string();
    let (accel, cpu) = match spec.accel {
        Accel::Kvm => ("kvm".to_owned(), "host,migratable=on"),
        Accel::Tcg => ("tcg,tb-size=256".to_owned(), "qemu64"),
    };
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("-machine", "q35,usb=off,dump-guest-core=off".into());
    add("-accel", accel);
    add("-cpu", cpu.into());
    add("-m", spec.memory_mib.to_string());
    add("-smp", format!("{0},sockets={0},cores=1,threads=1", spec.cpus));
    add("-rtc", "base=utc".into());
    add("-boot", "strict=on".into());
    add("-kernel", path(kernel));
    add("-initrd", path(initrd));
    add("-append", cmdline.clone());
    // One PCI Express port for each device below, and one to spare.
    for port in 0..5 {
        let function = if port == 0 { "addr=0x1,multifunction=on".into() } else { format!("addr=0x1.0x{port}") };
        add(
            "-device",
            format!("pcie-root-port,port={},chassis={},id=pci.{},bus=pcie.0,{function}", 8 + port, port + 1, port + 1),
        );
    }
    add("-device", "virtio-serial-pci,id=virtio-serial0,bus=pci.2".into());
    add(
        "-drive",
        format!(
            "file={},format=qcow2,if=none,id=disk0,cache=unsafe,discard=unmap,werror=stop,rerror=stop",
            spec.overlay.display()
        ),
    );
    add("-device", "virtio-blk-pci,bus=pci.3,drive=disk0,bootindex=1".into());
    add("-netdev", "user,id=net0".into());
    add("-device", format!("virtio-net-pci,netdev=net0,mac={},bus=pci.1", spec.id.mac()));
    add("-chardev", format!("socket,id=serial0,path={},server=on,wait=off", console.display()));
    add("-device", "isa-serial,chardev=serial0".into());
    add("-chardev", format!("socket,id=channel0,path={},server=on,wait=off", channel.display()));
    add(
        "-device",
        format!("virtserialport,bus=virtio-serial0.0,nr=1,chardev=channel0,name={}", dayfly_guest_config::PORT_NAME),
    );
    add("-object", "rng-random,id=rng0,filename=/dev/urandom".into());
    add("-device", "virtio-rng-pci,rng=rng0,bus=pci.4".into());
    add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    add("-display", "none".into());
    arguments.extend(["-no-user-config", "-nodefaults", "-no-reboot"].map(str::to_owned));
    Ok(arguments)
}
