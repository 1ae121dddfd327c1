//! The machine of a hypervisor of processes: what QEMU, the guest program and gitlab-runner are to a real one, in one
//! process that outlives any daemon.
//!
//! ```text
//! kill-guest CHANNEL CONSOLE <its description on standard input>    DAYFLY_DOOR: path of its door's port
//!
//! channel ──config──► relay (the product's own) ──► door
//!    ▲                  ▲
//!    └── reports ── runner: asks, reports, moves artifacts, as gitlab-runner does
//! ```
//!
//! It binds its sockets as QEMU does, says so in its description, and waits for its config. Then it runs one job and
//! powers off: the process ends. What a job does, [`dayfly_test_tools::killing`] says.

mod runner;

use dayfly_guest::relay::port::{Pipe, Port};
use dayfly_guest::relay::{Door, Limits, Relay, Target};
use dayfly_guest_config::{DOOR_WIRE, GuestConfig, Pass, Report};
use dayfly_test_guest::boot::{config_line, door, guest_token, report};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// A machine that nobody tells anything does not stay for ever.
const CONFIG_LIMIT: Duration = Duration::from_secs(300);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [channel, console] = arguments.as_slice() else {
        eprintln!("usage: kill-guest CHANNEL CONSOLE, with its description as standard input");
        return ExitCode::from(64);
    };
    let port = std::env::var_os("DAYFLY_DOOR").unwrap_or_default();
    let bind = || Ok((UnixListener::bind(channel)?, UnixListener::bind(console)?, Socket::bind(port.as_ref())?));
    let listeners: io::Result<_> = bind();
    let booted = listeners.and_then(|listeners| {
        tell_description()?;
        Ok(listeners)
    });
    let (channel, console, port) = match booted {
        Ok(listeners) => listeners,
        Err(error) => {
            eprintln!("kill-guest {}: {error}", channel.display());
            return ExitCode::FAILURE;
        }
    };
    match machine(channel, console, port).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kill-guest {}: {error}", std::process::id());
            ExitCode::FAILURE
        }
    }
}

/// All sockets listen: whoever looks at the description sees a machine that has been started.
fn tell_description() -> io::Result<()> {
    let mut description = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    description.write_all(format!("up {}\n", std::process::id()).as_bytes())
}

async fn machine(channel: UnixListener, console: UnixListener, port: Socket) -> Result<(), String> {
    let reports = Reports::default();
    let mut wires = JoinSet::new();
    let (config_out, mut config_in) = mpsc::channel(4);
    wires.spawn(serve_channel(channel, reports.clone(), config_out));
    wires.spawn(serve_console(console));
    reports.tell(&Report::Ready).await;
    let config = timeout(CONFIG_LIMIT, config_in.recv()).await.ok().flatten().ok_or("no config came")?;
    reports.tell(&Report::Applied).await;

    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| format!("listen: {error}"))?;
    let address = listener.local_addr().map_err(|error| format!("listen: {error}"))?;
    let relay = Relay::start(listener, Limits::default(), || {}).map_err(|error| format!("start relay: {error}"))?;
    let door = if config.door == DOOR_WIRE {
        Door::Wire(Box::new(port))
    } else {
        Door::Address(door(&config).ok_or("the config names no door")?)
    };
    let target = Target {
        door,
        pass: Pass::from_text(&config.pass).ok_or("the config has no pass")?,
        patience: Duration::from_secs(config.door_patience_s),
        forwards: Vec::new(),
    };
    relay.hand_over(target).map_err(|error| format!("open the relay: {error}"))?;
    let token = guest_token(&config).ok_or("the config has no guest token")?;
    reports.tell(&Report::RunnerStarted).await;
    let silence_max = Duration::from_secs(config.power_off_after_s);
    let ended = tokio::select! {
        biased;
        // Both only wait, and the machine ends with either.
        ended = runner::run_single(address, &token, Duration::from_secs(config.runner.wait_timeout_s)) => ended,
        () = silence(&relay, silence_max) => Err(format!("the door was silent for {silence_max:?}")),
    };
    reports.tell(&Report::RunnerExited(0)).await;
    ended
}

/// The door's port, as QEMU serves it: one host after the other.
struct Socket(std::os::unix::net::UnixListener);

impl Socket {
    fn bind(path: &Path) -> io::Result<Self> {
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }
}

impl Port for Socket {
    fn open(&mut self) -> Pin<Box<dyn Future<Output = io::Result<Box<dyn Pipe>>> + Send + '_>> {
        Box::pin(async {
            // Of the runtime that asks, which is the relay's own.
            let (host, _) = UnixListener::from_std(self.0.try_clone()?)?.accept().await?;
            Ok(Box::new(host) as Box<dyn Pipe>)
        })
    }
}

async fn silence(relay: &Relay, longest: Duration) {
    while relay.silent_for() < longest {
        sleep(Duration::from_secs(1)).await;
    }
}

/// Where reports go: the connection that is served now.
#[derive(Clone, Default)]
struct Reports(Arc<Mutex<Option<OwnedWriteHalf>>>);

impl Reports {
    async fn tell(&self, what: &Report) {
        if let Some(host) = &mut *self.0.lock().await {
            report(host, what).await;
        }
    }
}

/// One connection at a time, as QEMU has it. A line that is cut by the host's end is no config.
async fn serve_channel(listener: UnixListener, reports: Reports, configs: mpsc::Sender<GuestConfig>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (reader, writer) = stream.into_split();
        *reports.0.lock().await = Some(writer);
        read_configs(reader, &configs).await;
        *reports.0.lock().await = None;
    }
}

async fn read_configs(reader: OwnedReadHalf, configs: &mpsc::Sender<GuestConfig>) {
    let mut reader = BufReader::new(reader);
    while let Ok(Some(line)) = config_line(&mut reader).await {
        if let Ok(config) = GuestConfig::from_line(&line) {
            // The same one again is fine; one is taken.
            let _ = configs.try_send(config);
        }
    }
}

async fn serve_console(listener: UnixListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let said = stream.write_all(b"a machine of the kill harness\n").await;
        if said.is_ok() {
            until_closed(stream).await;
        }
    }
}

async fn until_closed(mut stream: UnixStream) {
    let mut buffer = [0; 64];
    while let Ok(1..) = stream.read(&mut buffer).await {}
}
