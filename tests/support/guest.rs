//! A guest that a test scripts: relay and runner in one, over the fake's wires.
//!
//! The job's own script tells it what to do, one step a line, so a test reads like the job it is:
//!
//! | line | does |
//! | --- | --- |
//! | `print TEXT` | writes a line into the trace |
//! | `sleep SECONDS` | works on, sending its trace as the runner does |
//! | `exit CODE` | ends with this exit code |
//! | `crash`, `off`, `restart`, `panic`, `suspend` | the VM dies, or ends by its guest's doing, without a verdict |
//! | `pause`, `stop` | the VM is paused by a disk error of its host, or by QEMU of its own accord |
//! | `report LINE`, `console LINE` | says so to its host, on its console |
//! | `hang` | says nothing more, for ever |
//! | `upload BYTES` | uploads an artifact of this size, as 19.3 does; it fails the job if that fails |
//! | `deaf` | neither timeout nor cancel ends this script |

mod upload; // as 19.3's uploader

use dayfly::vm::{Pause, Stream};
use dayfly_doubles::fake::GuestMachine;
use dayfly_guest_config::{DOOR_WIRE, GuestConfig, Pass, Report};
use dayfly_test_guest::boot::{self, report};
use dayfly_test_guest::{Answer, Connection, Job, Word, enter, job};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep, timeout};

/// Before a door that did not let it in is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// What guests know of their jobs, by job token: the truth that GitLab's copy is held to.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<BTreeMap<String, Told>>>);

/// One job as its guest knows it.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// How many guests were given it.
    pub runs: u32,
    /// All that it printed.
    pub printed: Vec<u8>,
    /// How much of that the door has taken.
    pub taken: usize,
    /// The verdict that the door has taken: its state.
    pub verdict: Option<String>,
}

impl Memory {
    fn note(&self, token: &str, change: impl FnOnce(&mut Told)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(token.to_owned()).or_default());
    }

    /// What is known of the job with this token.
    pub fn of(&self, token: &str) -> Told {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(token).cloned().unwrap_or_default()
    }
}

/// A guest that has its config.
pub struct Guest {
    pub machine: GuestMachine,
    pub config: GuestConfig,
    pub memory: Memory,
    token: String,
}

impl Guest {
    /// Boots: reports, waits for its config, applies it.
    pub async fn boot(mut machine: GuestMachine) -> Option<Self> {
        let config = boot::boot(&mut machine.channel).await?;
        let token = boot::guest_token(&config)?;
        Some(Self { machine, config, memory: Memory::default(), token })
    }

    /// A connection to the door after the greeting. A door that refuses is waited for, as the relay does.
    pub async fn connect(&self) -> Option<Connection<Box<dyn Stream>>> {
        let pass = Pass::from_text(&self.config.pass)?;
        let patience = Instant::now() + Duration::from_secs(self.config.door_patience_s);
        let waits = || Instant::now() < patience;
        if self.config.door == DOOR_WIRE {
            self.machine.relay.hand_over(pass);
            let stream = self.machine.relay.enter(RETRY, waits).await?;
            return Some(Connection::new(Box::new(stream)));
        }
        let door = boot::door(&self.config)?;
        enter(&pass, || self.machine.doors.connect(door), || [7; 16], RETRY, waits).await
    }

    /// One request on a connection of its own. `None`: no answer came.
    pub async fn exchange(&self, request: &[u8]) -> Option<Answer> {
        self.connect().await?.exchange(request).await.ok()
    }

    /// Asks once for a job.
    pub async fn ask_once(&self) -> Option<Answer> {
        self.exchange(&job::ask(&self.token)).await
    }

    /// Asks until there is a job, as `run-single` does.
    pub async fn ask(&self) -> Option<Value> {
        let deadline = Instant::now() + Duration::from_secs(self.config.runner.wait_timeout_s);
        while Instant::now() < deadline {
            if let Some(answer) = self.ask_once().await.filter(|answer| answer.status == 201) {
                return serde_json::from_slice(&answer.body).ok();
            }
            sleep(Duration::from_secs(3)).await;
        }
        None
    }

    /// Runs one job as the official runner would, then powers off.
    pub async fn run(machine: GuestMachine, memory: Memory) {
        let Some(mut guest) = Self::boot(machine).await else { return };
        guest.memory = memory;
        if let Some(payload) = guest.ask().await {
            guest.work(&payload).await;
        }
        guest.power_off().await;
    }

    /// Says that the job runs, as the runner does before it does anything else.
    pub async fn begin(&self, payload: &Value) {
        let job = Job::new(payload).expect("a payload names a job");
        self.exchange(&job.begin()).await;
    }

    /// Runs the job that it was given.
    pub async fn work(&mut self, payload: &Value) {
        let mut job = JobRun::new(payload, self.memory.clone());
        job.run(self, payload).await;
    }

    /// Ends, as the guest program does when its runner has ended.
    pub async fn power_off(self) {
        let mut guest = self;
        report(&mut guest.machine.channel, &Report::RunnerExited(0)).await;
        if guest.config.may_stay {
            boot::stay(&mut guest.machine.channel).await;
        }
        guest.machine.power.off();
        std::future::pending::<()>().await;
    }
}

/// One job in a guest.
pub struct JobRun {
    memory: Memory,
    job: Job,
    next_tick: Instant,
    /// Canceled, and on its way out.
    after_script: bool,
    /// Ignores timeout and cancel.
    deaf: bool,
}

/// How a script ended.
enum End {
    Exit(i64),
    Aborted,
    Canceled,
}

impl JobRun {
    /// # Panics
    /// If the payload names no job.
    pub fn new(payload: &Value, memory: Memory) -> Self {
        let job = Job::new(payload).expect("a payload names a job");
        memory.note(&job.token, |told| told.runs += 1);
        let next_tick = Instant::now() + job.interval;
        Self { memory, job, next_tick, after_script: false, deaf: false }
    }

    fn print(&mut self, text: &str) {
        self.job.trace.extend_from_slice(text.as_bytes());
        self.job.trace.push(b'\n');
        self.memory.note(&self.job.token, |told| told.printed.clone_from(&self.job.trace));
    }

    async fn run(&mut self, guest: &mut Guest, payload: &Value) {
        self.put(guest, json!({"state": "running", "output": {}})).await;
        if self.job.word == Word::Over {
            return;
        }
        self.print("Running with gitlab-runner 19.3.0");
        let script = payload["steps"][0]["script"].as_array().cloned().unwrap_or_default();
        self.deaf = script.iter().any(|line| line == "deaf");
        let timeout_s = payload["runner_info"]["timeout"].as_u64().filter(|t| *t > 0).unwrap_or(7200);
        let timeout_s = if self.deaf { u64::from(u32::MAX) } else { timeout_s };
        let ended = timeout(Duration::from_secs(timeout_s), self.script(guest, &script)).await;
        let (state, reason, code) = match ended {
            Err(_) => ("failed", Some("job_execution_timeout"), 0),
            Ok(End::Exit(0)) => ("success", None, 0),
            Ok(End::Exit(code)) => ("failed", Some("script_failure"), code),
            Ok(End::Aborted) => {
                self.patch(guest).await;
                self.put(guest, self.job.verdict("failed", Some("unknown_failure"), 0)).await;
                return;
            }
            Ok(End::Canceled) => {
                let after = payload["steps"][1]["script"].as_array().cloned().unwrap_or_default();
                self.print("after_script");
                self.script(guest, &after).await;
                ("failed", Some("unknown_failure"), 0)
            }
        };
        if state == "success" {
            self.print("Job succeeded");
        }
        for _ in 0..20 {
            while self.job.sent < self.job.trace.len() {
                let before = self.job.sent;
                self.patch(guest).await;
                if self.job.word == Word::Over {
                    return;
                }
                if self.job.sent == before {
                    sleep(Duration::from_secs(1)).await;
                }
            }
            match self.put(guest, self.job.verdict(state, reason, code)).await {
                Some(200) => {
                    self.memory.note(&self.job.token, |told| told.verdict = Some(state.to_owned()));
                    return;
                }
                Some(403 | 404) => return,
                _ => sleep(Duration::from_secs(3)).await,
            }
        }
    }

    async fn script(&mut self, guest: &mut Guest, script: &[Value]) -> End {
        for line in script {
            let line = line.as_str().unwrap_or_default();
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "print" => self.print(rest),
                "sleep" => {
                    let until = Instant::now() + Duration::from_secs_f64(rest.parse().unwrap_or(1.0));
                    while Instant::now() < until {
                        sleep(until.min(self.next_tick) - Instant::now()).await;
                        if Instant::now() >= self.next_tick {
                            self.tick(guest).await;
                        }
                        match self.job.word {
                            _ if self.deaf => {}
                            Word::Running => {}
                            Word::Canceling if self.after_script => {}
                            Word::Canceling => {
                                self.after_script = true;
                                return End::Canceled;
                            }
                            Word::Over => return End::Aborted,
                        }
                    }
                }
                "exit" => return End::Exit(rest.parse().unwrap_or(1)),
                "crash" => guest.machine.power.crash(),
                "off" => guest.machine.power.off(),
                "restart" => guest.machine.power.reboot(),
                "panic" => guest.machine.power.panic(),
                "suspend" => guest.machine.power.sleep(),
                "pause" => guest.machine.power.pause(Pause::Disk),
                "stop" => guest.machine.power.pause(Pause::Itself),
                "deaf" => {}
                "hang" => std::future::pending::<()>().await,
                "report" => {
                    let _ = guest.machine.channel.write_all(format!("{rest}\n").as_bytes()).await;
                }
                "console" => {
                    let _ = guest.machine.console.write_all(format!("{rest}\n").as_bytes()).await;
                }
                "upload" if self.upload(guest, rest.parse().unwrap_or(1)).await => {}
                "upload" => return End::Exit(1),
                _ => self.print(line),
            }
            if matches!(word, "crash" | "off" | "restart" | "panic" | "suspend" | "pause" | "stop") {
                std::future::pending::<()>().await;
            }
        }
        End::Exit(0)
    }

    async fn tick(&mut self, guest: &Guest) {
        if self.job.piece().is_some() {
            self.patch(guest).await;
        } else {
            self.put(guest, json!({"state": "running"})).await;
        }
        self.next_tick = Instant::now() + self.job.interval;
    }

    async fn patch(&mut self, guest: &Guest) {
        let Some(piece) = self.job.piece() else { return };
        let Some(answer) = guest.exchange(&piece).await else { return };
        self.job.heard(&answer);
        if self.job.patched(&answer) {
            self.memory.note(&self.job.token, |told| told.taken = self.job.sent);
        }
        assert!(self.job.sent <= self.job.trace.len(), "a 416 beyond what the guest has sent kills real runners");
    }

    async fn put(&mut self, guest: &Guest, body: Value) -> Option<u16> {
        let answer = guest.exchange(&self.job.update(body)).await?;
        self.job.heard(&answer);
        Some(answer.status)
    }
}
