//! A guest that a test scripts: relay and runner in one, speaking HTTP by hand over the fake's wires.
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

use dayfly::vm::fake::GuestMachine;
use dayfly::vm::{Pause, Stream};
use dayfly_guest_config::{Greeting, GuestConfig, Pass, Report};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::time::{Instant, sleep, timeout};

/// What GitLab, through the door, said last about the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Running,
    Canceling,
    Over,
}

/// One HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

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
        report(&mut machine, &Report::Ready).await;
        let mut line = Vec::new();
        loop {
            BufReader::new(&mut machine.channel).read_until(b'\n', &mut line).await.ok()?;
            if line.ends_with(b"\n") {
                break;
            }
            // Nobody is connected: wait and read again.
            line.clear();
            sleep(Duration::from_millis(100)).await;
        }
        let config = GuestConfig::from_line(&line).ok()?;
        report(&mut machine, &Report::Applied).await;
        report(&mut machine, &Report::RunnerStarted).await;
        let toml: toml_edit::DocumentMut = config.runner.config_toml.parse().ok()?;
        let token = toml["runners"][0]["token"].as_str()?.to_owned();
        Some(Self { machine, config, memory: Memory::default(), token })
    }

    /// A connection to the door after the greeting. A door that refuses is waited for, as the relay does.
    pub async fn connect(&self) -> Option<Box<dyn Stream>> {
        let port = self.config.door.rsplit(':').next()?.parse().ok()?;
        let door = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let patience = Instant::now() + Duration::from_secs(self.config.door_patience_s);
        loop {
            if let Ok(stream) = self.machine.doors.connect(door)
                && let Ok(Some(stream)) = timeout(Duration::from_secs(5), self.greet(stream)).await
            {
                return Some(stream);
            }
            if Instant::now() >= patience {
                return None;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn greet(&self, mut stream: Box<dyn Stream>) -> Option<Box<dyn Stream>> {
        let pass = Pass::from_text(&self.config.pass)?;
        let nonce = [7; 16];
        stream.write_all(format!("{}\r\n", Greeting::opening(&nonce)).as_bytes()).await.ok()?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(stream.read_u8().await.ok()?);
        }
        let line = String::from_utf8(line).ok()?;
        let greeting = Greeting::relay(&pass, nonce, line.trim_end()).ok()?;
        stream.write_all(format!("{}\r\n", greeting.relay_line()).as_bytes()).await.ok()?;
        Some(stream)
    }

    /// One request on a connection of its own. `None`: no answer came.
    pub async fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
        let mut stream = self.connect().await?;
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: {}\r\nConnection: close\r\n",
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await.ok()?;
        stream.write_all(body).await.ok()?;
        stream.flush().await.ok()?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).await.ok()?;
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).await.ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut answer = Answer { status, headers, body: Vec::new() };
        match answer.header("content-length").and_then(|n| n.parse().ok()) {
            Some(length) => {
                answer.body.resize(length, 0);
                reader.read_exact(&mut answer.body).await.ok()?;
            }
            None => drop(reader.read_to_end(&mut answer.body).await),
        }
        Some(answer)
    }

    /// Asks once for a job.
    pub async fn ask_once(&self) -> Option<Answer> {
        let info: Value =
            json!({"name": "gitlab-runner", "version": "19.3.0", "features": {"cancel_gracefully": true}});
        let body = json!({"info": info, "token": self.token, "system_id": "s_0123456789ab"}).to_string();
        let headers = [("Content-Type", "application/json"), ("Runner-Token", self.token.as_str())];
        self.call("POST", "/api/v4/jobs/request", &headers, body.as_bytes()).await
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
        let mut job = JobRun::new(payload, Memory::default());
        job.put(self, json!({"state": "running", "output": {}})).await;
    }

    /// Runs the job that it was given.
    pub async fn work(&mut self, payload: &Value) {
        let mut job = JobRun::new(payload, self.memory.clone());
        job.run(self, payload).await;
    }

    /// Ends, as the guest program does when its runner has ended.
    pub async fn power_off(self) {
        let mut guest = self;
        report(&mut guest.machine, &Report::RunnerExited(0)).await;
        guest.machine.power.off();
        std::future::pending::<()>().await;
    }
}

async fn report(machine: &mut GuestMachine, report: &Report) {
    // Dropped when nobody listens, as the guest program does.
    let _ = timeout(Duration::from_millis(10), machine.channel.write_all(format!("{report}\n").as_bytes())).await;
}

/// One job in a guest.
pub struct JobRun {
    memory: Memory,
    id: u64,
    token: String,
    trace: Vec<u8>,
    sent: usize,
    interval: Duration,
    next_tick: Instant,
    word: Word,
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
    pub fn new(payload: &Value, memory: Memory) -> Self {
        memory.note(payload["token"].as_str().unwrap_or_default(), |told| told.runs += 1);
        Self {
            memory,
            id: payload["id"].as_u64().unwrap_or(0),
            token: payload["token"].as_str().unwrap_or_default().to_owned(),
            trace: Vec::new(),
            sent: 0,
            interval: Duration::from_secs(3),
            next_tick: Instant::now() + Duration::from_secs(3),
            word: Word::Running,
            after_script: false,
            deaf: false,
        }
    }

    fn print(&mut self, text: &str) {
        self.trace.extend_from_slice(text.as_bytes());
        self.trace.push(b'\n');
        self.memory.note(&self.token, |told| told.printed.clone_from(&self.trace));
    }

    async fn run(&mut self, guest: &mut Guest, payload: &Value) {
        self.put(guest, json!({"state": "running", "output": {}})).await;
        if self.word == Word::Over {
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
                self.put(guest, self.verdict("failed", Some("unknown_failure"), 0)).await;
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
            while self.sent < self.trace.len() {
                let before = self.sent;
                self.patch(guest).await;
                if self.word == Word::Over {
                    return;
                }
                if self.sent == before {
                    sleep(Duration::from_secs(1)).await;
                }
            }
            match self.put(guest, self.verdict(state, reason, code)).await {
                Some(200) => {
                    self.memory.note(&self.token, |told| told.verdict = Some(state.to_owned()));
                    return;
                }
                Some(403 | 404) => return,
                _ => sleep(Duration::from_secs(3)).await,
            }
        }
    }

    fn verdict(&self, state: &str, reason: Option<&str>, code: i64) -> Value {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.trace);
        let checksum = format!("crc32:{:08x}", hasher.finalize());
        let mut body = json!({"state": state, "checksum": checksum, "output": {"checksum": checksum, "bytesize": self.trace.len()}});
        if let Some(reason) = reason {
            body["failure_reason"] = reason.into();
        }
        if code != 0 {
            body["exit_code"] = code.into();
        }
        body
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
                        match self.word {
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
        if self.sent < self.trace.len() {
            self.patch(guest).await;
        } else {
            self.put(guest, json!({"state": "running"})).await;
        }
        self.next_tick = Instant::now() + self.interval;
    }

    async fn patch(&mut self, guest: &Guest) {
        let end = self.trace.len().min(self.sent + 1024 * 1024);
        if end == self.sent {
            return;
        }
        let range = format!("{}-{}", self.sent, end - 1);
        let path = format!("/api/v4/jobs/{}/trace?debug_trace=false", self.id);
        let headers =
            [("Content-Range", range.as_str()), ("Content-Type", "text/plain"), ("Job-Token", self.token.as_str())];
        let Some(answer) = guest.call("PATCH", &path, &headers, &self.trace[self.sent..end]).await else { return };
        self.heard(&answer);
        match answer.status {
            202 => {
                self.sent = end;
                self.memory.note(&self.token, |told| told.taken = end);
            }
            416 => {
                let range = answer.header("Range").and_then(|r| r.split_once('-')?.1.parse().ok());
                self.sent = range.unwrap_or(0);
                assert!(self.sent <= self.trace.len(), "a 416 beyond what the guest has sent kills real runners");
            }
            _ => {}
        }
    }

    async fn put(&mut self, guest: &Guest, mut body: Value) -> Option<u16> {
        body["token"] = self.token.clone().into();
        let path = format!("/api/v4/jobs/{}", self.id);
        let headers = [("Content-Type", "application/json"), ("Job-Token", self.token.as_str())];
        let answer = guest.call("PUT", &path, &headers, body.to_string().as_bytes()).await?;
        self.heard(&answer);
        Some(answer.status)
    }

    fn heard(&mut self, answer: &Answer) {
        if let Some(seconds) = answer.header("X-GitLab-Trace-Update-Interval").and_then(|s| s.parse().ok()) {
            self.interval = Duration::from_secs(seconds);
        }
        self.word = match (answer.status, answer.header("Job-Status")) {
            (403, _) | (_, Some("canceled" | "failed")) => Word::Over,
            (_, Some("canceling")) if self.word == Word::Running => Word::Canceling,
            _ => self.word,
        };
    }
}
