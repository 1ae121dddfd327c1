//! Plays one recording: GitLab is the stand-in, the runner is the recording, all between is real.
//!
//! ```text
//! recording ──TCP──► relay ──wire──► door ► job, spool, uploader ──► stand-in GitLab
//! ```
//!
//! The daemon takes the recorded job and "boots" a VM that is none; the guest config that this VM is
//! given leads the relay to the door. Then the recorded requests go out, one after the other, each on
//! the connection that it was recorded on.

use crate::compare;
use crate::gitlab::Gitlab;
use crate::message::message;
use crate::recording::{Class, Recording, Request};
use dayfly::files::RealFiles;
use dayfly::network::{PortRange, Tcp};
use dayfly::telemetry::chain;
use dayfly::vm::AccelChoice;
use dayfly_doubles::fake::{FakeHypervisor, GuestEnd, GuestMachine};
use dayfly_guest::relay::port::{Opening, Pipe, Port};
use dayfly_guest::relay::{Door, Relay, Target};
use dayfly_guest_config::{DOOR_WIRE, GuestConfig, Pass};
use dayfly_test_guest::boot::{boot, door, guest_token};
use dayfly_test_guest::{Answer, Connection};
use dayfly_test_tools::directories::RealDirectories;
use dayfly_test_tools::host::{AT_ONCE, Choice, Host, no_image};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

/// Longest wait for one thing. All of a recording takes well below a second on an idle machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// After this the host is looked at again.
const GLANCE: Duration = Duration::from_millis(5);

/// Ports of the doors: below the ephemeral ones, and apart from the product's default.
const PORTS: PortRange = PortRange { first: 23_000, last: 23_099 };

/// What all recordings share: one relay, which gets a new target for each.
pub(crate) struct Stage {
    pub(crate) relay: Relay,
    pub(crate) address: SocketAddr,
}

/// A daemon with one job to come, and a VM that takes its config and waits.
pub(crate) struct Scene {
    host: Host,
    hypervisor: FakeHypervisor,
    configs: mpsc::Receiver<Booted>,
    power: watch::Sender<bool>,
}

impl Scene {
    pub(crate) async fn open(gitlab: &Gitlab) -> Result<Self, String> {
        let hypervisor = FakeHypervisor::new();
        hypervisor.set_timing(AT_ONCE);
        let (configs_in, configs) = mpsc::channel(4);
        let power = watch::Sender::new(true);
        let button = power.subscribe();
        hypervisor.set_guest(move |machine| guest(machine, configs_in.clone(), button.clone()));
        let choice = Choice {
            host: RealDirectories(hypervisor.clone()).host(),
            listen: Arc::new(Tcp),
            accel: AccelChoice::Tcg,
            images: no_image(),
            transport: gitlab.standin.opener(),
            url: url::Url::parse("http://gitlab.example").map_err(|error| error.to_string())?,
            token: gitlab.runner_token.clone(),
            concurrent: 1,
            ports: PORTS,
            files: Arc::new(RealFiles),
            state_below: None,
        };
        let host = Host::start(choice).await.map_err(|error| chain(&error))?;
        Ok(Self { host, hypervisor, configs, power })
    }

    /// The VM of the job, once it has its config.
    pub(crate) async fn booted(&mut self) -> Result<Booted, String> {
        Ok(timeout(LIMIT, self.configs.recv()).await.ok().flatten().ok_or("no VM came to its config")?)
    }

    /// The runner has ended: so does its VM, and when GitLab has the verdict and nothing is left, the
    /// daemon. Hands on what went wrong before, else what goes wrong here.
    pub(crate) async fn close(self, gitlab: &Gitlab, played: Result<(), String>) -> Result<(), String> {
        let second = !self.configs.is_empty();
        self.power.send_replace(false);
        let played = match played {
            Ok(()) if second => Err("the job got a second VM".into()),
            Ok(()) => over(gitlab, &self.host, &self.hypervisor).await,
            wrong => wrong,
        };
        let ended = self.host.end().await;
        played?;
        if ended { Ok(()) } else { Err("the daemon did not end".into()) }
    }
}

/// Plays `recording` whole, or up to a request of it.
///
/// # Errors
/// What was not as the official runner needs it, or not as it was recorded.
pub(crate) async fn play(stage: &Stage, recording: &Recording, until: Option<usize>) -> Result<(), String> {
    let gitlab = Gitlab::new(recording)?;
    let mut scene = Scene::open(&gitlab).await?;
    let played = match scene.booted().await {
        Ok(booted) => run(stage, recording, until.unwrap_or(recording.requests.len()), booted).await,
        Err(why) => Err(why),
    };
    scene.close(&gitlab, played).await?;
    match until {
        None => compare::trace_and_verdict(&gitlab, recording),
        // Its runner is gone, and with it the verdict.
        Some(_) => Ok(()),
    }
}

/// A VM that has its config.
pub(crate) struct Booted {
    pub(crate) config: GuestConfig,
    /// The port behind which its door is.
    port: GuestEnd,
}

impl Booted {
    /// Leads the relay to the door.
    pub(crate) fn hand_over(self, relay: &Relay) -> Result<(), String> {
        let pass = Pass::from_text(&self.config.pass).ok_or("the guest config holds no pass")?;
        let door = match door(&self.config) {
            Some(address) => Door::Address(address),
            None if self.config.door == DOOR_WIRE => Door::Wire(Box::new(GuestPort(self.port))),
            None => return Err("the guest config names no door".into()),
        };
        let target = Target { door, pass, patience: LIMIT, forwards: Vec::new() };
        relay.hand_over(target).map_err(|error| format!("open the relay: {error}"))
    }
}

/// The port of a VM in memory.
struct GuestPort(GuestEnd);

impl Port for GuestPort {
    fn open(&mut self) -> Opening<'_> {
        Box::pin(async {
            // When its VM has gone it ends at once, each time.
            sleep(GLANCE).await;
            Ok(Box::new(self.0.clone()) as Box<dyn Pipe>)
        })
    }
}

/// A VM: it takes its config, and is there until the runner in it has ended.
async fn guest(mut machine: GuestMachine, configs: mpsc::Sender<Booted>, mut power: watch::Receiver<bool>) {
    let Some(config) = boot(&mut machine.channel).await else { return };
    // Full: nobody plays this VM, and the job fails with its boot deadline.
    let _ = configs.try_send(Booted { config, port: machine.door.clone() });
    let _ = power.wait_for(|on| !on).await;
}

async fn run(stage: &Stage, recording: &Recording, until: usize, booted: Booted) -> Result<(), String> {
    let mut runner = Runner::new(stage, recording, booted)?;
    let requests = &recording.requests[..until];
    for (number, request) in requests.iter().enumerate() {
        let sent = runner.send(number, request).await;
        sent.map_err(|why| format!("request {} ({} {}): {why}", number + 1, request.method, request.target))?;
        // The runner's helpers have one each, and end.
        if !requests[number + 1..].iter().any(|later| later.connection == request.connection) {
            runner.connections.remove(request.connection.as_str());
        }
    }
    Ok(())
}

/// Waits until GitLab has the verdict and nothing is left on the host.
async fn over(gitlab: &Gitlab, host: &Host, hypervisor: &FakeHypervisor) -> Result<(), String> {
    let at_gitlab =
        gitlab.standin.wait_for(|model| model.jobs.get(&gitlab.job).is_some_and(|job| job.state.is_over()), LIMIT);
    at_gitlab.await.map_err(|_| "GitLab got no verdict")?;
    let clean = async {
        while !(host.jobs().views().is_empty() && hypervisor.counts().is_clean()) {
            sleep(GLANCE).await;
        }
    };
    let left = || format!("something is left: {:?} {:?}", host.jobs().views(), hypervisor.counts());
    timeout(LIMIT, clean).await.map_err(|_| left())
}

/// The recorded runner.
struct Runner<'a> {
    relay: SocketAddr,
    recording: &'a Recording,
    /// The guest token of this run; the recorded one is another.
    token: String,
    connections: BTreeMap<&'a str, Connection<TcpStream>>,
    /// The number of the request that got the job.
    hand_out: usize,
    /// Bytes of trace that were sent.
    sent: u64,
}

impl<'a> Runner<'a> {
    fn new(stage: &Stage, recording: &'a Recording, booted: Booted) -> Result<Self, String> {
        let token = guest_token(&booted.config).ok_or("the guest config holds no guest token")?;
        booted.hand_over(&stage.relay)?;
        let hand_out = recording.requests.iter().position(|r| r.class == Class::Ask && r.answer.status == Some(201));
        Ok(Self {
            relay: stage.address,
            recording,
            token,
            connections: BTreeMap::new(),
            hand_out: hand_out.ok_or("no request got the job")?,
            sent: 0,
        })
    }

    /// Sends one request, and holds its answer to what the runner needs.
    async fn send(&mut self, number: usize, request: &'a Request) -> Result<(), String> {
        match request.class {
            // From guest to GitLab directly.
            Class::Git | Class::Other => return Ok(()),
            // dayfly has a job before it has a guest, so no guest's first ask is ever in vain.
            Class::Ask if number < self.hand_out => return Ok(()),
            _ => {}
        }
        let bytes = message(request, &self.recording.runner_token, &self.token).map_err(|error| error.to_string())?;
        let exchange = async {
            if !self.connections.contains_key(request.connection.as_str()) {
                let stream = TcpStream::connect(self.relay).await?;
                stream.set_nodelay(true)?;
                self.connections.insert(&request.connection, Connection::new(stream));
            }
            let Some(connection) = self.connections.get_mut(request.connection.as_str()) else {
                return Err(std::io::ErrorKind::NotConnected.into());
            };
            connection.exchange(&bytes).await
        };
        let answer = timeout(LIMIT, exchange).await.map_err(|_| "no answer in time")?;
        let answer: Answer = answer.map_err(|error| format!("no answer: {error}"))?;
        if answer.closes() {
            self.connections.remove(request.connection.as_str());
        }
        compare::answer(request, &answer, &mut self.sent)
    }
}
