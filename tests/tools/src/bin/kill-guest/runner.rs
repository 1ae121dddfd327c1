//! gitlab-runner's part of the machine: one job, with the official runner's order of calls and its stubbornness.
//!
//! An answer that is lost is asked for again: the poll after a pause, a piece of trace at the next tick, from the
//! offset that a 416 names, the verdict many times, an artifact three times. No call is made for a job that is over.

use dayfly_test_tools::http::{Answer, Connection};
use dayfly_test_tools::killing::{CANCELED_LINE, Step, artifact, downloaded, first_line, last_line, uploaded};
use serde_json::{Value, json};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// After a poll without a job; official: 3 s.
const POLL_PAUSE: Duration = Duration::from_millis(1200);

/// Between two pieces of trace; official: 3 s, then what GitLab says.
const TICK: Duration = Duration::from_millis(150);

/// Between two tries of a verdict.
const VERDICT_PAUSE: Duration = Duration::from_secs(1);

/// Tries of a verdict; as in the config.toml that dayfly writes, more than any restart takes.
const VERDICT_TRIES: u32 = 60;

/// Tries of an artifact, as the official runner has them.
const UPLOAD_TRIES: u32 = 3;

/// Bytes of one PATCH.
const PIECE_BYTES: usize = 1 << 20;

/// Bytes of one chunk of an upload.
const CHUNK_BYTES: usize = 32 << 10;

/// No answer takes longer, but for a relay that waits for its door.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);

/// Asks for one job and runs it.
///
/// # Errors
/// No job came, or the answers make no sense.
pub(crate) async fn run_single(relay: SocketAddr, token: &str, patience: Duration) -> Result<(), String> {
    let mut client = Client { relay, connection: None };
    let since = Instant::now();
    let payload = loop {
        if let Some(payload) = ask(&mut client, token).await {
            break payload;
        }
        if since.elapsed() > patience {
            return Err("no job came".into());
        }
        sleep(POLL_PAUSE).await;
    };
    let mut job = Job::new(client, &payload).ok_or("the payload names no job")?;
    job.run().await
}

async fn ask(client: &mut Client, token: &str) -> Option<Value> {
    let info = json!({"name": "gitlab-runner", "version": "19.3.0", "features": {"cancel_gracefully": true}});
    let body = json!({"info": info, "token": token, "system_id": "s_0123456789ab"}).to_string();
    let headers = [("Content-Type", "application/json"), ("Runner-Token", token)];
    let answer = client.call("POST", "/api/v4/jobs/request", &headers, body.as_bytes()).await.ok()?;
    if answer.status == 201 { serde_json::from_slice(&answer.body).ok() } else { None }
}

/// A keep-alive connection, made anew when it broke.
struct Client {
    relay: SocketAddr,
    connection: Option<Connection>,
}

impl Client {
    async fn call(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<Answer> {
        let mut message = head(method, path, headers, Some(body.len()));
        message.extend_from_slice(body);
        let kept = self.connection.is_some();
        match self.exchange(&message).await {
            // What Go's client does: a kept connection may have been closed meanwhile. A PATCH may have come through.
            Err(_) if kept && method != "PATCH" => self.exchange(&message).await,
            answered => answered,
        }
    }

    async fn exchange(&mut self, message: &[u8]) -> io::Result<Answer> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(self.relay).await?,
        };
        let answer = timeout(ANSWER_LIMIT, connection.exchange(message)).await??;
        if !answer.closes() {
            self.connection = Some(connection);
        }
        Ok(answer)
    }
}

async fn connect(relay: SocketAddr) -> io::Result<Connection> {
    Connection::new(TcpStream::connect(relay).await?)
}

fn head(method: &str, path: &str, headers: &[(&str, &str)], length: Option<usize>) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\n");
    match length {
        Some(length) => head.push_str(&format!("Content-Length: {length}\r\n")),
        None => head.push_str("Transfer-Encoding: chunked\r\n"),
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// What GitLab, through the door, said last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Running,
    Canceling,
    Over,
}

struct Job {
    client: Client,
    id: u64,
    token: String,
    script: Vec<Step>,
    /// Artifacts of other jobs, and the tokens that open them.
    dependencies: Vec<(u64, String)>,
    trace: Vec<u8>,
    sent: usize,
    next_tick: Instant,
    word: Word,
}

impl Job {
    fn new(client: Client, payload: &Value) -> Option<Self> {
        let script = payload["steps"][0]["script"].as_array()?;
        let dependencies = payload["dependencies"].as_array().into_iter().flatten();
        Some(Self {
            client,
            id: payload["id"].as_u64()?,
            token: payload["token"].as_str()?.to_owned(),
            script: script.iter().map(|line| Step::parse(line.as_str()?)).collect::<Option<_>>()?,
            dependencies: dependencies
                .filter_map(|job| Some((job["id"].as_u64()?, job["token"].as_str()?.to_owned())))
                .collect(),
            trace: Vec::new(),
            sent: 0,
            next_tick: Instant::now() + TICK,
            word: Word::Running,
        })
    }

    async fn run(&mut self) -> Result<(), String> {
        // The official runner waits for this answer, for as long as there is none.
        while self.put(json!({"state": "running", "output": {}})).await.is_none() {
            sleep(POLL_PAUSE).await;
        }
        if self.word == Word::Over {
            return Ok(());
        }
        self.trace.extend_from_slice(first_line(self.id).as_bytes());
        let mut code = 0;
        for step in self.script.clone() {
            if let Step::Exit(end) = step {
                code = end;
                break;
            }
            self.step(step).await?;
            match self.word {
                Word::Running => {}
                Word::Canceling => {
                    self.trace.extend_from_slice(CANCELED_LINE.as_bytes());
                    return self.finish(json!({"state": "failed", "failure_reason": "job_canceled"})).await;
                }
                Word::Over => return Ok(()),
            }
        }
        self.trace.extend_from_slice(last_line(code).as_bytes());
        match code {
            0 => self.finish(json!({"state": "success"})).await,
            code => {
                self.finish(json!({"state": "failed", "failure_reason": "script_failure", "exit_code": code})).await
            }
        }
    }

    async fn step(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Bytes(_) => {
                let printed = step.printed(self.id, self.trace.len());
                self.trace.extend_from_slice(&printed);
            }
            Step::Work(ms) => {
                let until = Instant::now() + Duration::from_millis(ms);
                while Instant::now() < until && self.word == Word::Running {
                    sleep_until(until.min(self.next_tick)).await;
                    self.tick().await;
                }
            }
            Step::Upload(count) => {
                let status = self.upload(count).await;
                let line = if status == Some(201) { uploaded(count) } else { format!("not uploaded: {status:?}\n") };
                self.trace.extend_from_slice(line.as_bytes());
            }
            Step::Download(from, count) => {
                let got = self.download(from).await;
                let right = got.as_ref().is_ok_and(|bytes| *bytes == artifact(from, count));
                let line = match got {
                    _ if right => downloaded(from, count),
                    Ok(bytes) => format!("downloaded {} other bytes\n", bytes.len()),
                    Err(why) => format!("not downloaded: {why}\n"),
                };
                self.trace.extend_from_slice(line.as_bytes());
            }
            Step::Exit(_) => {}
        }
        Ok(())
    }

    async fn tick(&mut self) {
        if Instant::now() >= self.next_tick {
            self.patch().await;
            self.next_tick = Instant::now() + TICK;
        }
    }

    /// Sends the next piece. Whether it was taken.
    async fn patch(&mut self) -> bool {
        let end = self.trace.len().min(self.sent + PIECE_BYTES);
        if end == self.sent {
            return true;
        }
        let range = format!("{}-{}", self.sent, end - 1);
        let path = format!("/api/v4/jobs/{}/trace?debug_trace=false", self.id);
        let headers =
            [("Content-Range", range.as_str()), ("Content-Type", "text/plain"), ("Job-Token", self.token.as_str())];
        let Ok(answer) = self.client.call("PATCH", &path, &headers, &self.trace[self.sent..end]).await else {
            return false;
        };
        self.heard(&answer);
        match answer.status {
            202 => self.sent = end,
            416 => {
                let size = answer.header("Range").and_then(|range| range.split_once('-')?.1.parse().ok());
                self.sent = size.filter(|size| *size <= self.trace.len()).unwrap_or(0);
            }
            _ => return false,
        }
        true
    }

    /// The rest of the trace, then the verdict.
    async fn finish(&mut self, verdict: Value) -> Result<(), String> {
        for _ in 0..VERDICT_TRIES {
            while self.sent < self.trace.len() && self.patch().await {}
            if self.word == Word::Over {
                return Ok(());
            }
            if self.sent == self.trace.len() {
                let checksum = format!("crc32:{:08x}", crc32fast::hash(&self.trace));
                let mut body = verdict.clone();
                body["checksum"] = checksum.clone().into();
                body["output"] = json!({"checksum": checksum, "bytesize": self.trace.len()});
                match self.put(body).await {
                    Some(200 | 403 | 404) => return Ok(()),
                    Some(412) => self.sent = 0,
                    _ => {}
                }
            }
            sleep(VERDICT_PAUSE).await;
        }
        Err("nobody took the verdict".into())
    }

    async fn put(&mut self, mut body: Value) -> Option<u16> {
        body["token"] = self.token.clone().into();
        let path = format!("/api/v4/jobs/{}", self.id);
        let token = self.token.clone();
        let headers = [("Content-Type", "application/json"), ("Job-Token", token.as_str())];
        let answer = self.client.call("PUT", &path, &headers, body.to_string().as_bytes()).await.ok()?;
        self.heard(&answer);
        Some(answer.status)
    }

    fn heard(&mut self, answer: &Answer) {
        self.word = match (answer.status, answer.header("Job-Status")) {
            (403, _) | (_, Some("canceled" | "failed")) => Word::Over,
            (_, Some("canceling")) if self.word == Word::Running => Word::Canceling,
            _ => self.word,
        };
    }

    /// On a connection of its own, as the runner's helper does, every other job without a length.
    async fn upload(&mut self, count: usize) -> Option<u16> {
        let mut body = b"--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"artifacts.zip\"\r\nContent-Type: application/octet-stream\r\n\r\n".to_vec();
        body.extend_from_slice(&artifact(self.id, count));
        body.extend_from_slice(b"\r\n--B--\r\n");
        let path = format!("/api/v4/jobs/{}/artifacts?artifact_format=zip&artifact_type=archive", self.id);
        let headers = [("Content-Type", "multipart/form-data; boundary=B"), ("Job-Token", self.token.as_str())];
        let mut message = head("POST", &path, &headers, self.id.is_multiple_of(2).then_some(body.len()));
        if self.id.is_multiple_of(2) {
            message.extend_from_slice(&body);
        } else {
            for chunk in body.chunks(CHUNK_BYTES) {
                message.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                message.extend_from_slice(chunk);
                message.extend_from_slice(b"\r\n");
            }
            message.extend_from_slice(b"0\r\n\r\n");
        }
        let mut status = None;
        for _ in 0..UPLOAD_TRIES {
            let mut helper = Client { relay: self.client.relay, connection: None };
            status = helper.exchange(&message).await.ok().map(|answer| answer.status);
            if status.is_some_and(|status| status < 500) {
                break;
            }
            sleep(VERDICT_PAUSE).await;
        }
        status
    }

    async fn download(&mut self, from: u64) -> Result<Vec<u8>, String> {
        let token = self.dependencies.iter().find(|(id, _)| *id == from).map(|(_, token)| token.clone());
        let token = token.ok_or("it is no dependency of this job")?;
        let path = format!("/api/v4/jobs/{from}/artifacts");
        let mut last = String::new();
        for _ in 0..UPLOAD_TRIES {
            let mut helper = Client { relay: self.client.relay, connection: None };
            match helper.call("GET", &path, &[("Job-Token", &token)], b"").await {
                Ok(answer) if answer.status == 200 => return Ok(answer.body),
                Ok(answer) => last = format!("status {}", answer.status),
                Err(error) => last = error.to_string(),
            }
            sleep(VERDICT_PAUSE).await;
        }
        Err(last)
    }
}
