//! gitlab-runner's part of the machine: one job, with the official runner's order of calls and its stubbornness.
//!
//! An answer that is lost is asked for again: the poll after a pause, a piece of trace at the next tick, from the
//! offset that a 416 names, the verdict many times, an artifact three times. No call is made for a job that is over.

use dayfly_test_guest::http::{request, request_in_chunks};
use dayfly_test_guest::job::{CHUNK_BYTES, MULTIPART, ask, multipart, upload_path};
use dayfly_test_guest::{Answer, Connection, Job, Kept, Word};
use dayfly_test_tools::killing::{
    CANCELED_LINE, Step, artifact, cache, cached, downloaded, first_line, is_a_cache, last_line, uploaded,
};
use serde_json::{Value, json};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until};

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

/// No answer takes longer, but for a relay that waits for its door.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);

/// Asks for one job and runs it.
///
/// # Errors
/// No job came, or the answers make no sense.
pub(crate) async fn run_single(relay: SocketAddr, token: &str, patience: Duration) -> Result<(), String> {
    let mut client = Client::new(relay);
    let since = Instant::now();
    let payload = loop {
        let answer = client.call(&ask(token)).await.ok().filter(|answer| answer.status == 201);
        if let Some(payload) = answer.and_then(|answer| serde_json::from_slice(&answer.body).ok()) {
            break payload;
        }
        if since.elapsed() > patience {
            return Err("no job came".into());
        }
        sleep(POLL_PAUSE).await;
    };
    let mut work = Work::new(client, &payload).ok_or("the payload names no job")?;
    work.run().await
}

/// A keep-alive connection, made anew when it broke.
struct Client {
    relay: SocketAddr,
    kept: Kept<TcpStream>,
}

impl Client {
    fn new(relay: SocketAddr) -> Self {
        Self { relay, kept: Kept::default() }
    }

    async fn call(&mut self, request: &[u8]) -> io::Result<Answer> {
        if let Some(kept) = self.kept.take() {
            let answered = self.kept.exchange(kept, request, ANSWER_LIMIT).await;
            // What Go's client does: a kept connection may have been closed meanwhile. A PATCH may have come through.
            if answered.is_ok() || request.starts_with(b"PATCH ") {
                return answered;
            }
        }
        let stream = TcpStream::connect(self.relay).await?;
        stream.set_nodelay(true)?;
        self.kept.exchange(Connection::new(stream), request, ANSWER_LIMIT).await
    }
}

/// The job, and what is done for it.
struct Work {
    client: Client,
    job: Job,
    script: Vec<Step>,
    /// Artifacts of other jobs, and the tokens that open them.
    dependencies: Vec<(u64, String)>,
    next_tick: Instant,
    project: u64,
}

impl Work {
    fn new(client: Client, payload: &Value) -> Option<Self> {
        let script = payload["steps"][0]["script"].as_array()?;
        let dependencies = payload["dependencies"].as_array().into_iter().flatten();
        Some(Self {
            client,
            job: Job::new(payload)?,
            script: script.iter().map(|line| Step::parse(line.as_str()?)).collect::<Option<_>>()?,
            dependencies: dependencies
                .filter_map(|job| Some((job["id"].as_u64()?, job["token"].as_str()?.to_owned())))
                .collect(),
            next_tick: Instant::now() + TICK,
            project: payload["job_info"]["project_id"].as_u64()?,
        })
    }

    async fn run(&mut self) -> Result<(), String> {
        // The official runner waits for this answer, for as long as there is none.
        while self.put(json!({"state": "running", "output": {}})).await.is_none() {
            sleep(POLL_PAUSE).await;
        }
        if self.job.word == Word::Over {
            return Ok(());
        }
        self.job.trace.extend_from_slice(first_line(self.job.id).as_bytes());
        let mut code = 0;
        for step in self.script.clone() {
            if let Step::Exit(end) = step {
                code = end;
                break;
            }
            self.step(step).await?;
            match self.job.word {
                Word::Running => {}
                Word::Canceling => {
                    self.job.trace.extend_from_slice(CANCELED_LINE.as_bytes());
                    return self.finish("failed", Some("job_canceled"), 0).await;
                }
                Word::Over => return Ok(()),
            }
        }
        self.job.trace.extend_from_slice(last_line(code).as_bytes());
        match code {
            0 => self.finish("success", None, 0).await,
            code => self.finish("failed", Some("script_failure"), code).await,
        }
    }

    async fn step(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Bytes(_) => {
                let printed = step.printed(self.job.id, self.job.trace.len());
                self.job.trace.extend_from_slice(&printed);
            }
            Step::Work(ms) => {
                let until = Instant::now() + Duration::from_millis(ms);
                while Instant::now() < until && self.job.word == Word::Running {
                    sleep_until(until.min(self.next_tick)).await;
                    self.tick().await;
                }
            }
            Step::Upload(count) => {
                let status = self.upload(count).await;
                let line = if status == Some(201) { uploaded(count) } else { format!("not uploaded: {status:?}\n") };
                self.job.trace.extend_from_slice(line.as_bytes());
            }
            Step::Download(from, count) => {
                let got = self.download(from).await;
                let right = got.as_ref().is_ok_and(|bytes| *bytes == artifact(from, count));
                let line = match got {
                    _ if right => downloaded(from, count),
                    Ok(bytes) => format!("downloaded {} other bytes\n", bytes.len()),
                    Err(why) => format!("not downloaded: {why}\n"),
                };
                self.job.trace.extend_from_slice(line.as_bytes());
            }
            Step::Cache(count) => {
                let line = match self.cache(count).await {
                    Ok(()) => cached(count),
                    Err(why) => format!("not cached: {why}\n"),
                };
                self.job.trace.extend_from_slice(line.as_bytes());
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

    /// Sends the next piece. `false`: there was no answer to go on with.
    async fn patch(&mut self) -> bool {
        let Some(piece) = self.job.piece() else { return true };
        let Ok(answer) = self.client.call(&piece).await else { return false };
        self.job.heard(&answer);
        self.job.patched(&answer);
        if self.job.sent > self.job.trace.len() {
            self.job.sent = 0;
        }
        matches!(answer.status, 202 | 416)
    }

    /// The rest of the trace, then the verdict.
    async fn finish(&mut self, state: &str, reason: Option<&str>, code: i64) -> Result<(), String> {
        let verdict = self.job.verdict(state, reason, code);
        for _ in 0..VERDICT_TRIES {
            while self.job.piece().is_some() && self.patch().await {}
            if self.job.word == Word::Over {
                return Ok(());
            }
            if self.job.sent == self.job.trace.len() {
                match self.put(verdict.clone()).await {
                    Some(200 | 403 | 404) => return Ok(()),
                    Some(412) => self.job.sent = 0,
                    _ => {}
                }
            }
            sleep(VERDICT_PAUSE).await;
        }
        Err("nobody took the verdict".into())
    }

    async fn put(&mut self, body: Value) -> Option<u16> {
        let answer = self.client.call(&self.job.update(body)).await.ok()?;
        self.job.heard(&answer);
        Some(answer.status)
    }

    /// On a connection of its own, as the runner's helper does, every other job without a length.
    async fn upload(&mut self, count: usize) -> Option<u16> {
        let body = multipart(&artifact(self.job.id, count));
        let path = upload_path(self.job.id);
        let headers = [("Content-Type", MULTIPART), ("Job-Token", self.job.token.as_str())];
        let message = if self.job.id.is_multiple_of(2) {
            request("POST", &path, &headers, body)
        } else {
            request_in_chunks("POST", &path, &headers, &body, CHUNK_BYTES)
        };
        let mut status = None;
        for _ in 0..UPLOAD_TRIES {
            status = Client::new(self.client.relay).call(&message).await.ok().map(|answer| answer.status);
            if status.is_some_and(|status| status < 500) {
                break;
            }
            sleep(VERDICT_PAUSE).await;
        }
        status
    }

    /// Saves, as often as a daemon dies of it, then looks in two parts for what is there: whole, whoever saved it last.
    async fn cache(&mut self, count: usize) -> Result<(), String> {
        let path = format!("/cache/project/{}/kill", self.project);
        let message = request("PUT", &path, &[], cache(self.job.id, count));
        self.until_answered(&message, 200).await?;
        loop {
            let part = |range: String| request("GET", &path, &[("Range", &range)], "");
            let first = self.until_answered(&part("bytes=0-9".into()), 206).await?;
            let rest = self.until_answered(&part("bytes=10-".into()), 206).await?;
            // A daemon of before kept to one version only as long as it lived.
            if first.header("etag") != rest.header("etag") {
                continue;
            }
            let found = [first.body, rest.body].concat();
            return if is_a_cache(&found) { Ok(()) } else { Err(format!("{} bytes that are no cache", found.len())) };
        }
    }

    /// The first answer of this status.
    async fn until_answered(&mut self, message: &[u8], right: u16) -> Result<Answer, String> {
        for _ in 0..VERDICT_TRIES {
            match Client::new(self.client.relay).call(message).await {
                Ok(answer) if answer.status == right => return Ok(answer),
                Ok(answer) if answer.status < 500 => return Err(format!("status {}", answer.status)),
                Ok(_) | Err(_) => sleep(VERDICT_PAUSE).await,
            }
        }
        Err("no answer".into())
    }

    async fn download(&mut self, from: u64) -> Result<Vec<u8>, String> {
        let token = self.dependencies.iter().find(|(id, _)| *id == from).map(|(_, token)| token.clone());
        let token = token.ok_or("it is no dependency of this job")?;
        let message = request("GET", &format!("/api/v4/jobs/{from}/artifacts"), &[("Job-Token", &token)], "");
        let mut last = String::new();
        for _ in 0..UPLOAD_TRIES {
            match Client::new(self.client.relay).call(&message).await {
                Ok(answer) if answer.status == 200 => return Ok(answer.body),
                Ok(answer) => last = format!("status {}", answer.status),
                Err(error) => last = error.to_string(),
            }
            sleep(VERDICT_PAUSE).await;
        }
        Err(last)
    }
}
