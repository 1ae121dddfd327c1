//! What a guest does to its door: a plan's moves, then all that is left, as the official runner
//! sends it. Its log's byte at an offset is always the same one, whatever it claims in between.

use super::plan::{Ending, Lie, Move, Plan};
use dayfly::BoxFuture;
use dayfly::vm::Stream;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::time::{sleep, timeout};

/// Largest PATCH of the official runner.
const PIECE_MAX: usize = 1 << 20;

/// A guest that gets no answer for this long asks again.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a guest reaches its door, and what else happens at its moves.
pub(super) trait Way: Send + Sync {
    /// A connection after the greeting; waits for a door that refuses. `None`: it is gone for good.
    fn connect(&self) -> BoxFuture<'_, Option<Box<dyn Stream>>>;
    /// GitLab loses its log but for so many thousandths.
    fn gitlab_loses(&self, permille: usize);
    /// The plan's [`Ending::Ours`] begins, when the door has taken so many bytes for sure.
    fn we_end(&self, taken: usize) -> BoxFuture<'_, ()>;
}

/// One answer.
struct Answer {
    status: u16,
    /// The size in its `Range`.
    range: Option<usize>,
    closes: bool,
}

/// What a guest knows at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Its verdict was taken.
    Taken,
    /// The job was over: 403.
    Refused,
    /// Its door has gone, perhaps with the answer to its verdict.
    Nothing,
}

/// A guest and its job.
pub(super) struct Client<'a, W: Way> {
    way: &'a W,
    job: u64,
    token: String,
    log: &'static [u8],
    connection: Option<BufReader<Box<dyn Stream>>>,
    /// Bytes that the door has taken, as far as the guest knows.
    pub(super) taken: usize,
    /// Bytes that were ever on their way: no 416 may name more.
    offered: usize,
    last: Option<(usize, usize)>,
    debug: bool,
    /// The door said that the job is over, or has gone.
    over: Option<Heard>,
}

impl<'a, W: Way> Client<'a, W> {
    pub(super) fn new(way: &'a W, job: u64, token: String, plan: &Plan) -> Self {
        let log = plan.log.bytes();
        Self { way, job, token, log, connection: None, taken: 0, offered: 0, last: None, debug: false, over: None }
    }

    /// Everything that the plan says.
    pub(super) async fn run(&mut self, plan: &Plan) -> Result<Heard, String> {
        let moves = match plan.ending {
            Ending::Verdict { .. } => plan.moves.len(),
            Ending::Ours { after } => after.min(plan.moves.len()),
        };
        for one in &plan.moves[..moves] {
            self.step(*one).await?;
        }
        let Ending::Verdict { success } = plan.ending else {
            self.way.we_end(self.taken).await;
            // It may not have heard, and goes on until it does.
            while self.over.is_none() && self.taken < self.log.len() {
                self.send(self.taken, PIECE_MAX).await?;
                sleep(Duration::from_secs(1)).await;
            }
            return Ok(self.over.unwrap_or(Heard::Nothing));
        };
        loop {
            while self.taken < self.log.len() {
                if let Some(heard) = self.over {
                    return Ok(heard);
                }
                let before = self.taken;
                self.send(self.taken, PIECE_MAX).await?;
                if self.taken == before {
                    sleep(Duration::from_secs(1)).await;
                }
            }
            let state = if success { "success" } else { "failed" };
            match self.put(state).await.map(|answer| answer.status) {
                Some(200) => return Ok(Heard::Taken),
                Some(403) => return Ok(Heard::Refused),
                None if self.over.is_some() => return Ok(Heard::Nothing),
                _ => sleep(Duration::from_secs(3)).await,
            }
        }
    }

    async fn step(&mut self, one: Move) -> Result<(), String> {
        let at = self.taken;
        match one {
            Move::Send(length) => self.send(at, self.middle(length)).await?,
            Move::SendCut(length, cut) => {
                let length = self.middle(length);
                self.offered = self.offered.max(at + length);
                self.lose(at, length, Some(cut), Duration::ZERO).await;
            }
            Move::SendLost(length, ms) => {
                let length = self.middle(length);
                self.offered = self.offered.max(at + length);
                self.lose(at, length, None, Duration::from_millis(ms)).await;
            }
            Move::Again => {
                if let Some((first, length)) = self.last {
                    self.send(first, length).await?;
                }
            }
            Move::Overlap(back, length) => {
                let first = at.saturating_sub(back);
                self.send(first, self.middle(length) + (at - first)).await?;
            }
            Move::Gap(ahead, length) => {
                let first = at + ahead;
                let length = length.min(self.log.len().saturating_sub(first));
                if length > 0 {
                    let range = format!("{first}-{}", first + length - 1);
                    let answer = self.patch(&range, &self.log[first..first + length]).await;
                    self.refused(answer.as_ref(), 416)?;
                }
            }
            Move::Lie(length, lie) => self.lie(at, self.middle(length).min(5000), lie).await?,
            Move::Both(one, other) => self.both(at, self.middle(one), self.middle(other)).await?,
            Move::Alive => {
                self.put("running").await;
            }
            Move::Debug => self.debug = true,
            Move::Work(ms) => sleep(Duration::from_millis(ms)).await,
            Move::GitlabLoses(permille) if at < self.log.len() => self.way.gitlab_loses(permille),
            Move::GitlabLoses(_) => {}
        }
        Ok(())
    }

    /// So many of the next bytes, all but the very last at most.
    fn middle(&self, length: usize) -> usize {
        length.min((self.log.len().saturating_sub(1)).saturating_sub(self.taken))
    }

    /// PATCHes bytes of the log and believes the answer, as the official runner does.
    async fn send(&mut self, first: usize, length: usize) -> Result<(), String> {
        let end = (first + length).min(self.log.len());
        if end <= first {
            return Ok(());
        }
        self.offered = self.offered.max(end);
        self.last = Some((first, end - first));
        let answer = self.patch(&format!("{first}-{}", end - 1), &self.log[first..end]).await;
        self.believe(answer)
    }

    fn believe(&mut self, answer: Option<Answer>) -> Result<(), String> {
        let Some(answer) = answer else { return Ok(()) };
        match (answer.status, answer.range) {
            (202 | 416, Some(size)) if size > self.offered => {
                Err(format!("the door names {size} bytes where {} were ever sent", self.offered))
            }
            (202 | 416, Some(size)) if size < self.taken => {
                Err(format!("the door names {size} bytes after it had taken {}", self.taken))
            }
            (202 | 416, Some(size)) => {
                self.taken = size;
                Ok(())
            }
            (403, _) => {
                self.over = Some(Heard::Refused);
                Ok(())
            }
            (413 | 429 | 503, _) => Ok(()),
            (status, range) => Err(format!("the door answered {status} with the range {range:?} to a PATCH")),
        }
    }

    /// A PATCH that must not be taken.
    fn refused(&mut self, answer: Option<&Answer>, expected: u16) -> Result<(), String> {
        match answer.map(|answer| answer.status) {
            None | Some(429 | 503) => Ok(()),
            Some(403) => {
                self.over = Some(Heard::Refused);
                Ok(())
            }
            Some(status) if status == expected => Ok(()),
            Some(status) => Err(format!("a wrong PATCH was answered {status}")),
        }
    }

    async fn lie(&mut self, at: usize, length: usize, lie: Lie) -> Result<(), String> {
        if length == 0 {
            return Ok(());
        }
        let end = at + length - 1;
        let range = match lie {
            Lie::TooLong => format!("{at}-{}", end + 1),
            Lie::TooShort => format!("{at}-{}", if end > at { end - 1 } else { end + 9 }),
            Lie::Backwards => format!("{}-{at}", end + 1),
            Lie::Huge => format!("{at}-18446744073709551616"),
            Lie::Words => "all of it".to_owned(),
        };
        let answer = self.patch(&range, &self.log[at..at + length]).await;
        self.refused(answer.as_ref(), 400)
    }

    /// Two at once from the same offset: one of them is in time, or the shorter one is, then the rest of none.
    async fn both(&mut self, at: usize, one: usize, other: usize) -> Result<(), String> {
        if one == 0 || other == 0 {
            return Ok(());
        }
        self.offered = self.offered.max(at + one.max(other));
        let (way, path, log) = (self.way, self.trace_path(), self.log);
        let [one, other] = [one, other].map(|length| {
            let head = self.head("PATCH", &path, &range_header(at, length), length);
            async move { exchange(&mut BufReader::new(way.connect().await?), &head, &log[at..at + length]).await }
        });
        let (first, second) = tokio::join!(one, other);
        // The answers may have crossed: the larger size is the newer one.
        let answers = [first, second].into_iter().flatten();
        let newest = answers.max_by_key(|answer| (answer.status == 403, answer.range));
        self.believe(newest)
    }

    /// Sends a piece, or the begin of one, and goes away.
    async fn lose(&mut self, at: usize, length: usize, cut: Option<usize>, stay: Duration) {
        if length == 0 {
            return;
        }
        self.connection = None;
        let Some(mut stream) = self.way.connect().await else { return };
        let head = self.head("PATCH", &self.trace_path(), &range_header(at, length), length);
        let body = &self.log[at..at + cut.map_or(length, |cut| cut.min(length - 1))];
        let write = async {
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body).await?;
            stream.flush().await
        };
        // A door that reads no more is the same to a guest that goes away.
        let _ = timeout(PATIENCE, write).await;
        sleep(stay).await;
    }

    fn trace_path(&self) -> String {
        format!("/api/v4/jobs/{}/trace?debug_trace={}", self.job, self.debug)
    }

    fn head(&self, method: &str, path: &str, header: &str, length: usize) -> String {
        let token = &self.token;
        format!(
            "{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\nJob-Token: {token}\r\n{header}\r\nContent-Length: {length}\r\n\r\n"
        )
    }

    async fn patch(&mut self, range: &str, body: &[u8]) -> Option<Answer> {
        let header = format!("Content-Range: {range}\r\nContent-Type: text/plain");
        let head = self.head("PATCH", &self.trace_path(), &header, body.len());
        self.call(&head, body).await
    }

    async fn put(&mut self, state: &str) -> Option<Answer> {
        let body = format!(r#"{{"token":"{}","state":"{state}"}}"#, self.token);
        let head =
            self.head("PUT", &format!("/api/v4/jobs/{}", self.job), "Content-Type: application/json", body.len());
        self.call(&head, body.as_bytes()).await
    }

    /// One call on the connection that is kept open, or on a new one.
    async fn call(&mut self, head: &str, body: &[u8]) -> Option<Answer> {
        if self.connection.is_none() {
            self.connection = self.way.connect().await.map(BufReader::new);
            if self.connection.is_none() {
                self.over = Some(Heard::Nothing);
            }
        }
        let mut connection = self.connection.take()?;
        let answer = timeout(PATIENCE, exchange(&mut connection, head, body)).await.ok().flatten()?;
        if !answer.closes {
            self.connection = Some(connection);
        }
        Some(answer)
    }
}

fn range_header(at: usize, length: usize) -> String {
    format!("Content-Range: {at}-{}\r\nContent-Type: text/plain", at + length - 1)
}

async fn exchange(stream: &mut BufReader<Box<dyn Stream>>, head: &str, body: &[u8]) -> Option<Answer> {
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.write_all(body).await.ok()?;
    stream.flush().await.ok()?;
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let status = line.split(' ').nth(1)?.parse().ok()?;
    let (mut length, mut range, mut closes) = (0, None, false);
    loop {
        line.clear();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "range" => range = value.split_once('-').and_then(|(_, size)| size.parse().ok()),
            "connection" => closes = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await.ok()?;
    Some(Answer { status, range, closes })
}
