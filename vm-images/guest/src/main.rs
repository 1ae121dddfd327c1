//! `dayfly-guest`: the boot unit's program. Puts the parts of the library together and ends with
//! the machine powered off, whatever happens. See the library's map.
#![expect(clippy::disallowed_methods, reason = "no async runtime in the guest")]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dayfly_guest::apply::{self, ApplyError};
use dayfly_guest::channel::{self, Line, Reporter};
use dayfly_guest::clone;
use dayfly_guest::console::{chain, say};
use dayfly_guest::egress::{self, EgressError, Places};
use dayfly_guest::netfilter::rules::Rules;
use dayfly_guest::relay::port::{Device, RareDevice};
use dayfly_guest::relay::{Door, Limits, Relay, Target, forward};
use dayfly_guest::users::User;
use dayfly_guest::{hold, host_clock, machine, runner, shell, stay, users};
use dayfly_guest_config::{
    CONFIG_BYTES_MAX, CONTRACT, Can, ConfigError, DOOR_PORT_NAME, DOOR_WIRE, EGRESS_PORT_NAME, GuestConfig, PORT_NAME,
    Pass, RELAY_ADDRESS, Report, SHELL_PORT_NAME, Stay,
};
use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

/// Where systemd puts the SMBIOS string `io.systemd.credential:dayfly.config=…`, not decoded.
const CREDENTIAL: &str = "/run/credentials/@system/dayfly.config";

/// The port is there before we are, its name a few milliseconds later.
const PORT_DEADLINE: Duration = Duration::from_secs(5);

/// With a credential to fall back on, less patience for a port.
const PORT_DEADLINE_CREDENTIAL: Duration = Duration::from_secs(1);

/// A machine that is told nothing does not run for ever, even if its host has forgotten it. A
/// restored machine is paused while it waits, and its clock stands.
const CONFIG_DEADLINE: Duration = Duration::from_secs(30 * 60);

/// After a line that is no config, a host that means it writes a whole one.
const SECOND_LINE_DEADLINE: Duration = Duration::from_secs(10);

/// From a failure to the end of the machine: time for the host to read report and console.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long a machine that may stay waits for that word when its runner has ended: less than its host takes to end it.
const STAY_WORD_DEADLINE: Duration = Duration::from_secs(10);

/// From its start to the runner's first request, in a machine that is to be frozen: 3 s under TCG on an idle host.
const RUNNER_DEADLINE: Duration = Duration::from_secs(120);

/// How often the door's silence is measured; it is allowed minutes.
const WATCHDOG_PERIOD: Duration = Duration::from_secs(1);

/// Why this machine cannot do its part.
#[derive(Debug, thiserror::Error)]
enum GuestError {
    #[error("no virtio-serial port `{PORT_NAME}` and no credential `dayfly.config`")]
    NoSource,
    #[error("no virtio-serial port `{DOOR_PORT_NAME}`, behind which the door should be")]
    NoWire,
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    #[error("no guest config within {} min", CONFIG_DEADLINE.as_secs() / 60)]
    NoConfig,
    #[error("guest config is longer than {CONFIG_BYTES_MAX} bytes")]
    TooLong,
    #[error("read guest config")]
    Config(#[from] ConfigError),
    #[error("apply guest config")]
    Apply(#[from] ApplyError),
    #[error("no virtio-serial port `{EGRESS_PORT_NAME}`, by which a machine without a network card reaches the world")]
    NoEgress,
    #[error("do without a network card")]
    Egress(#[from] EgressError),
    #[error("listen on 192.0.2.1:{0} for what the host forwards there")]
    Forward(u16, #[source] io::Error),
    #[error("wait for a job without being anybody")]
    Hold(#[from] hold::HoldError),
    #[error("gitlab-runner ended with code {0} while the machine waited to be frozen")]
    RunnerGone(i32),
    #[error("gitlab-runner did not connect within {} s", RUNNER_DEADLINE.as_secs())]
    RunnerSilent,
    #[error("the door has not answered for {0} s")]
    DoorSilent(u64),
}

/// What the main thread waits for once the runner has been started.
enum Event {
    RunnerConnected,
    RunnerExited(i32),
    DoorSilent,
    Stay(Stay),
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "last-words") {
        last_words();
        return ExitCode::SUCCESS;
    }
    if let [word, rest @ ..] = arguments.as_slice() {
        let result = match word.to_str() {
            Some("run-as") => runner::run_as(rest),
            Some(shell::WORD) => shell::become_shell(rest),
            _ => Err(io::Error::other("unknown argument")),
        };
        let Err(error) = result;
        say(&format!("{}: {error}", word.display()));
        return ExitCode::from(127);
    }

    std::panic::set_hook(Box::new(|panic| say(&panic.to_string())));
    let reporter = open_reporter();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&reporter)));
    let failure = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(chain(&error)),
        Err(_) => Some("the guest program panicked".to_owned()),
    };
    if let Some(text) = failure {
        say(&text);
        reporter.report(Report::Failed(text));
        thread::sleep(LAST_WORDS);
    }
    let Err(error) = machine::power_off();
    say(&format!("power off: {error}"));
    ExitCode::FAILURE // the unit's FailureAction powers off
}

/// Called by systemd when this program has ended: if a signal has ended it (`kill -9 -1` of somebody who is root), that
/// is the last that the host hears before the machine powers off.
fn last_words() {
    // 0 where it ended by itself, and was going to power off.
    let Ok(status) = std::env::var("EXIT_STATUS") else { return };
    if status.parse::<i32>().is_ok() {
        return;
    }
    open_reporter().report(Report::Failed(format!("the guest program was ended by SIG{status}")));
    thread::sleep(LAST_WORDS);
}

/// The port's reporter, or a silent one where there is no port.
fn open_reporter() -> Reporter {
    let patience = if Path::new(CREDENTIAL).exists() { PORT_DEADLINE_CREDENTIAL } else { PORT_DEADLINE };
    let Some(device) = apply::wait_for(patience, || find_port(PORT_NAME)) else { return Reporter::silent() };
    apply::wait_for(patience, || Reporter::open(&device).ok()).unwrap_or_else(Reporter::silent)
}

fn find_port(name: &str) -> Option<PathBuf> {
    channel::find(Path::new("/sys/class/virtio-ports"), Path::new("/dev"), name)
}

fn run(reporter: &Reporter) -> Result<(), GuestError> {
    let files = runner::OpenFiles::now();
    // A machine that is frozen before it is told anything has this behind it.
    let early = !apply::has_card() && egress::is_possible();
    let rules = if early { Some(egress::prepare()?) } else { None };
    let (config, lines) = read_config(reporter)?;
    let start = Start { reporter, files, rules };
    if config.hold {
        return start.held(&config, lines.ok_or(GuestError::NoSource)?);
    }
    start.at_once(&config, lines)
}

/// What a machine has when it reads its first config.
struct Start<'a> {
    reporter: &'a Reporter,
    files: runner::OpenFiles,
    rules: Option<Rules>,
}

/// A runner that was started, and the relay that it speaks to.
struct Running {
    relay: Relay,
    /// The runner's process id.
    runner: u32,
    events: SyncSender<Event>,
    inbox: Receiver<Event>,
}

impl Start<'_> {
    /// Becomes itself, and starts its runner.
    fn at_once(self, config: &GuestConfig, lines: Option<Receiver<Line>>) -> Result<(), GuestError> {
        let target = target(config, || apply::wait_for(PORT_DEADLINE, || find_port(DOOR_PORT_NAME)))?;
        let user = users::find(Path::new("/etc"), &config.runner.user).map_err(ApplyError::User)?;
        let clock = lines.as_ref().and_then(|lines| host_clock::ask(self.reporter, lines));
        apply::seed(config)?;
        apply::identity(config, clock)?;
        be_reached(config, self.rules)?;
        apply::names(Path::new("/"), config)?;
        write_files(config, &user)?;
        self.reporter.report(Report::Applied);

        let running = start_runner(config, self.files, self.reporter)?;
        let target = Target { forwards: forwards(config)?, ..target };
        running.be_minded(config, lines)?;
        in_background("disk", grow_root)?;
        running.supervise(config, self.reporter, Some(target))
    }

    /// Starts its runner as nobody, is frozen while that waits, perhaps, and goes on as whoever it is told to be.
    fn held(self, held: &GuestConfig, lines: Receiver<Line>) -> Result<(), GuestError> {
        let user = users::find(Path::new("/etc"), &held.runner.user).map_err(ApplyError::User)?;
        apply::loopback()?;
        apply::names(Path::new("/"), held)?;
        hold::warm_up(&user.name);
        grow_root();
        write_files(held, &user)?;
        let running = start_runner(held, self.files, self.reporter)?;
        match running.inbox.recv_timeout(RUNNER_DEADLINE) {
            Ok(Event::RunnerConnected) => {}
            Ok(Event::RunnerExited(code)) => return Err(GuestError::RunnerGone(code)),
            _ => return Err(GuestError::RunnerSilent),
        }
        self.reporter.report(Report::Held);

        let config = hold::config(&lines, held, CONFIG_DEADLINE)?;
        let target = target(&config, || find_port(DOOR_PORT_NAME))?;
        // Nothing random is read before this.
        apply::seed_anew(&config)?;
        apply::identity(&config, host_clock::ask(self.reporter, &lines))?;
        be_reached(&config, self.rules)?;
        apply::names(Path::new("/"), &config)?;
        self.reporter.report(Report::Applied);
        let target = Target { forwards: forwards(&config)?, ..target };
        running.be_minded(&config, Some(lines))?;
        running.become_own(&config, self.reporter, target)?;
        running.supervise(&config, self.reporter, None)
    }
}

/// The network of the machine, whatever carries it.
fn be_reached(config: &GuestConfig, rules: Option<Rules>) -> Result<(), GuestError> {
    apply::network(&config.network)?;
    if config.network.relay {
        let rules = rules.map_or_else(egress::prepare, Ok)?;
        carry(config, rules)?;
    }
    Ok(())
}

/// What the runner reads when it starts.
fn write_files(config: &GuestConfig, user: &User) -> Result<(), GuestError> {
    apply::files(Path::new("/"), config, user)?;
    apply::machine_id(Path::new("/"), &config.runner_machine_id)?;
    if let Some(disks) = &config.clone {
        clone::prepare(disks);
    }
    if let Err(error) = runner::make_room(user) {
        say(&format!("make room for the runner's temporary files: {error}"));
    }
    Ok(())
}

/// Starts relay and runner; the relay has no door yet.
fn start_runner(config: &GuestConfig, files: runner::OpenFiles, reporter: &Reporter) -> Result<Running, GuestError> {
    let (events, inbox) = sync_channel(4);
    let listener = TcpListener::bind(RELAY_ADDRESS).map_err(|error| GuestError::Io("listen on 192.0.2.1:80", error))?;
    let connected = events.clone();
    let relay = Relay::start(listener, Limits::default(), move || {
        // The main thread has gone on to power off if nobody listens.
        let _ = connected.try_send(Event::RunnerConnected);
    })
    .map_err(|error| GuestError::Io("start the relay", error))?;
    let mut child =
        runner::start(&config.runner, files).map_err(|error| GuestError::Io("start gitlab-runner", error))?;
    reporter.report(Report::RunnerStarted);
    let runner = child.id();
    let exited = events.clone();
    in_background("runner", move || {
        let code = child.wait().map_or(-1, runner::exit_code);
        let _ = exited.try_send(Event::RunnerExited(code));
    })?;
    Ok(Running { relay, runner, events, inbox })
}

/// Listens for what the host forwards to this machine.
fn forwards(config: &GuestConfig) -> Result<Vec<forward::Forward>, GuestError> {
    forward::listen(&config.forwards).map_err(|(port, error)| GuestError::Forward(port, error))
}

/// A job may do with the small disk; the host sees why if it does not.
fn grow_root() {
    if let Err(error) = machine::grow_root() {
        say(&format!("grow the root file system: {error}"));
    }
}

/// Hears what the host says besides config and time.
fn listen(lines: Receiver<Line>, events: SyncSender<Event>) -> Result<(), GuestError> {
    in_background("host", move || {
        for line in lines {
            let Line::Whole(line) = line else { continue };
            if let Some(stay) = Stay::parse(&line) {
                // The main thread has gone on to power off if nobody listens.
                let _ = events.try_send(Event::Stay(stay));
            }
        }
    })
}

/// Waits for a host that asks for a shell. A machine without the port, or that cannot, does its job all the same.
fn offer_shell(config: &GuestConfig) {
    let (Some(port), Some(pass)) = (find_port(SHELL_PORT_NAME), Pass::from_text(&config.pass)) else { return };
    if let Err(error) = shell::offer(Box::new(RareDevice(port)), pass.for_shell(), "/proc/self/exe".into()) {
        say(&format!("offer a shell: {error}"));
    }
}

/// Begins to carry what the machine sends out, before anything of the job runs.
fn carry(config: &GuestConfig, rules: Rules) -> Result<(), GuestError> {
    let pass = Pass::from_text(&config.pass).ok_or(ApplyError::Member("pass", "pass"))?;
    let port = apply::wait_for(PORT_DEADLINE, || find_port(EGRESS_PORT_NAME)).ok_or(GuestError::NoEgress)?;
    Ok(egress::start(rules, Places::default(), Box::new(Device(port)), pass.for_egress())?)
}

impl Running {
    /// Sees to it that a machine ends whose door is silent for longer than it may be, hears what the host says besides
    /// config and time, and offers it a shell.
    fn be_minded(&self, config: &GuestConfig, lines: Option<Receiver<Line>>) -> Result<(), GuestError> {
        let (relay, events) = (self.relay.clone(), self.events.clone());
        let silence_max = Duration::from_secs(config.power_off_after_s);
        in_background("watchdog", move || {
            while relay.silent_for() < silence_max {
                thread::sleep(WATCHDOG_PERIOD);
            }
            let _ = events.try_send(Event::DoorSilent);
        })?;
        if let Some(lines) = lines {
            listen(lines, self.events.clone())?;
        }
        offer_shell(config);
        Ok(())
    }

    /// The runner has connected: it has read its files and made its system id. Now the machine becomes itself, and last
    /// of all the relay opens (`vm-images/README.md`).
    fn become_own(&self, config: &GuestConfig, reporter: &Reporter, target: Target) -> Result<(), GuestError> {
        apply::machine_id(Path::new("/"), &config.machine_id)?;
        self.relay.hand_over(target).map_err(|error| GuestError::Io("open the relay", error))?;
        reporter.report(Report::RunnerConnected);
        Ok(())
    }

    /// Until it ends. `target`: of a machine that becomes itself when its runner has connected.
    fn supervise(
        &self,
        config: &GuestConfig,
        reporter: &Reporter,
        mut target: Option<Target>,
    ) -> Result<(), GuestError> {
        // Each kind comes once, and watchdog and runner between them always send one: this ends.
        loop {
            match self.inbox.recv() {
                Ok(Event::RunnerConnected) => {
                    if let Some(target) = target.take() {
                        self.become_own(config, reporter, target)?;
                    }
                }
                Ok(Event::RunnerExited(code)) => {
                    say(&format!("gitlab-runner ended with code {code}"));
                    reporter.report(Report::RunnerExited(code));
                    // Its host may want it looked at.
                    let word = || stay::word(&self.inbox, STAY_WORD_DEADLINE, of_stay);
                    if let Some(first) = config.may_stay.then(word).flatten() {
                        stay::stay(first, &self.inbox, of_stay);
                    }
                    return Ok(());
                }
                Ok(Event::Stay(first)) => {
                    runner::end(self.runner);
                    stay::stay(first, &self.inbox, of_stay);
                    return Ok(());
                }
                Ok(Event::DoorSilent) | Err(_) => return Err(GuestError::DoorSilent(config.power_off_after_s)),
            }
        }
    }
}

/// The word to stay, if it is one: what else happens is of no interest any more.
fn of_stay(event: Event) -> Option<Stay> {
    if let Event::Stay(stay) = event { Some(stay) } else { None }
}

fn in_background(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), GuestError> {
    thread::Builder::new().name(name.into()).spawn(work).map_err(|error| GuestError::Io("start a thread", error))?;
    Ok(())
}

/// From the channel, whose further lines come with it, or, in images without one, from SMBIOS.
fn read_config(reporter: &Reporter) -> Result<(GuestConfig, Option<Receiver<Line>>), GuestError> {
    let (lines, inbox) = sync_channel(4);
    match channel::read_lines(reporter, lines) {
        Ok(()) => {
            reporter.report(Report::Ready);
            reporter.report(Report::Contract {
                contract: CONTRACT,
                can: Can { relay: egress::is_possible(), stay: true, shell: true, clone: true, hold: true },
            });
            let config = config_of(&inbox, CONFIG_DEADLINE, SECOND_LINE_DEADLINE)?;
            Ok((config, Some(inbox)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = std::fs::read_to_string(CREDENTIAL).map_err(|_| GuestError::NoSource)?;
            let line = STANDARD
                .decode(text.trim())
                .map_err(|error| GuestError::Io("decode the credential", io::Error::other(error)))?;
            Ok((GuestConfig::from_line(&line)?, None))
        }
        Err(error) => Err(GuestError::Io("read the channel", error)),
    }
}

/// The first line that is a config. A torn one (a host that died in the middle of it) is passed
/// over, if a whole one follows soon.
fn config_of(inbox: &Receiver<Line>, first: Duration, second: Duration) -> Result<GuestConfig, GuestError> {
    let mut patience = first;
    let mut failure = GuestError::NoConfig;
    loop {
        failure = match inbox.recv_timeout(patience) {
            Ok(Line::Whole(line)) => match GuestConfig::from_line(&line) {
                Ok(config) => return Ok(config),
                Err(error) => error.into(),
            },
            Ok(Line::TooLong) => GuestError::TooLong,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(failure),
        };
        patience = second;
    }
}

/// `wire` finds the port's device.
fn target(config: &GuestConfig, wire: impl FnOnce() -> Option<PathBuf>) -> Result<Target, GuestError> {
    let door = if config.door == DOOR_WIRE {
        Door::Wire(Box::new(Device(wire().ok_or(GuestError::NoWire)?)))
    } else {
        Door::Address(config.door.parse().map_err(|_| ApplyError::Member("door", "address:port, or `wire`"))?)
    };
    let pass = Pass::from_text(&config.pass).ok_or(ApplyError::Member("pass", "pass"))?;
    Ok(Target { door, pass, patience: Duration::from_secs(config.door_patience_s), forwards: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_torn_line_before_the_config_is_passed_over() {
        let (lines, inbox) = sync_channel(4);
        lines.send(Line::Whole(b"{\"version\":2,\"vm\":\"ab{\"version\":2}".into())).unwrap();
        lines.send(Line::TooLong).unwrap();
        let whole = include_bytes!("../tests/config.json").to_vec();
        lines.send(Line::Whole(whole)).unwrap();
        let config = config_of(&inbox, SHORT, Duration::from_secs(20)).unwrap();
        assert_eq!(config.vm, "abcdefghijklmnop");
        let at = |config: &GuestConfig, wire| target(config, || wire).map(|target| format!("{:?}", target.door));
        assert_eq!(at(&config, None).unwrap(), "10.0.2.2:40000");
        // U5: both contracts are served, each with the door that it names.
        let wire = GuestConfig { door: DOOR_WIRE.into(), ..config.clone() };
        assert_eq!(at(&wire, Some("/dev/vport0p2".into())).unwrap(), "wire");
        assert!(matches!(at(&wire, None), Err(GuestError::NoWire)));
        assert!(at(&GuestConfig { door: "wires".into(), ..config }, None).is_err());
    }

    #[test]
    fn nothing_else_is_taken_for_a_config_and_the_reason_is_kept() {
        let (lines, inbox) = sync_channel(4);
        assert_eq!(config_of(&inbox, SHORT, SHORT).unwrap_err().to_string(), "no guest config within 30 min");
        lines.send(Line::Whole(b"{\"version\":1}".into())).unwrap();
        let error = config_of(&inbox, SHORT, SHORT).unwrap_err();
        assert_eq!(chain(&error), "read guest config: guest config has version 1, this program reads 2 to 3");
        lines.send(Line::TooLong).unwrap();
        assert!(matches!(config_of(&inbox, SHORT, SHORT), Err(GuestError::TooLong)));
    }
}
