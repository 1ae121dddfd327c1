//! What a guest does to its door: a plan's moves, then all that is left, as the official runner
//! sends it. Its log's byte at an offset is always the same one, whatever it claims in between.

use super::plan::{Ending, Lie, Move, Plan};
use dayfly::BoxFuture;
use dayfly::vm::Stream;
use dayfly_test_guest::job::{self, PIECE_BYTES, range};
use dayfly_test_guest::{Answer, Connection, Kept};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// A guest that gets no answer for this long asks again.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a guest reaches its door, and what else happens at its moves.
pub(super) trait Way: Send + Sync {
    /// A connection after the greeting; waits for a door that refuses. `None`: it is gone for good.
    fn connect(&self) -> BoxFuture<'_, Option<Connection<Box<dyn Stream>>>>;
    /// GitLab loses its log but for so many thousandths.
    fn gitlab_loses(&self, permille: usize);
    /// The plan's [`Ending::Ours`] begins, when the door has taken so many bytes for sure.
    fn we_end(&self, taken: usize) -> BoxFuture<'_, ()>;
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
    kept: Kept<Box<dyn Stream>>,
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
        let kept = Kept::default();
        Self { way, job, token, log, kept, taken: 0, offered: 0, last: None, debug: false, over: None }
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
                self.send(self.taken, PIECE_BYTES).await?;
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
                self.send(self.taken, PIECE_BYTES).await?;
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
                    let answer = self.patch(&range(first, length), &self.log[first..first + length]).await;
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
        let answer = self.patch(&range(first, end - first), &self.log[first..end]).await;
        self.believe(answer)
    }

    fn believe(&mut self, answer: Option<Answer>) -> Result<(), String> {
        let Some(answer) = answer else { return Ok(()) };
        match (answer.status, job::size(&answer)) {
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
        let way = self.way;
        let [one, other] = [one, other].map(|length| {
            let request = self.request(&range(at, length), &self.log[at..at + length]);
            async move { way.connect().await?.exchange(&request).await.ok() }
        });
        let (first, second) = tokio::join!(one, other);
        // The answers may have crossed: the larger size is the newer one.
        let answers = [first, second].into_iter().flatten();
        let newest = answers.max_by_key(|answer| (answer.status == 403, job::size(answer)));
        self.believe(newest)
    }

    /// Sends a piece, or the begin of one, and goes away.
    async fn lose(&mut self, at: usize, length: usize, cut: Option<usize>, stay: Duration) {
        if length == 0 {
            return;
        }
        drop(self.kept.take());
        let Some(mut connection) = self.way.connect().await else { return };
        let mut request = self.request(&range(at, length), &self.log[at..at + length]);
        request.truncate(request.len() - cut.map_or(0, |cut| length - cut.min(length - 1)));
        // A door that reads no more is the same to a guest that goes away.
        let _ = timeout(PATIENCE, connection.send(&request)).await;
        sleep(stay).await;
    }

    fn request(&self, range: &str, bytes: &[u8]) -> Vec<u8> {
        job::patch_as(self.job, &self.token, range, bytes, self.debug)
    }

    async fn patch(&mut self, range: &str, bytes: &[u8]) -> Option<Answer> {
        self.call(self.request(range, bytes)).await
    }

    async fn put(&mut self, state: &str) -> Option<Answer> {
        let body = format!(r#"{{"token":"{}","state":"{state}"}}"#, self.token);
        self.call(job::update(self.job, &self.token, &body)).await
    }

    /// One call on the connection that is kept open, or on a new one.
    async fn call(&mut self, request: Vec<u8>) -> Option<Answer> {
        let connection = match self.kept.take() {
            Some(connection) => connection,
            None => match self.way.connect().await {
                Some(connection) => connection,
                None => {
                    self.over = Some(Heard::Nothing);
                    return None;
                }
            },
        };
        self.kept.exchange(connection, &request, PATIENCE).await.ok()
    }
}
