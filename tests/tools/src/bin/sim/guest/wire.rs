//! A guest's way to its door, and what of it the story is told.

use crate::dice::Dice;
use crate::event::{Event, GuestDoes};
use crate::story::Story;
use dayfly::gitlab::JobId;
use dayfly::vm::Stream;
use dayfly_doubles::fake::{Doors, GuestEnd};
use dayfly_guest_config::Pass;
use dayfly_test_guest::{Answer, Connection, Kept, Relay, enter};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a guest waits for an answer: the official runner's is longer, and the door's limits shorter.
const ANSWER: Duration = Duration::from_secs(90);

/// Before a door that did not let it in is tried again.
const RETRY: Duration = Duration::from_millis(400);

/// By what a guest reaches its door.
#[derive(Clone)]
pub(crate) enum Way {
    /// Streams of its relay; the port under them is its own, to spoil as it likes.
    Wire { relay: Relay, port: GuestEnd },
    /// Connections to a port of its host.
    Port { doors: Doors, door: SocketAddr },
}

/// A connection of a guest's to its door.
pub(crate) type Wire = Connection<Box<dyn Stream>>;

/// What a guest needs to reach its door.
pub(crate) struct Line {
    pub(crate) way: Way,
    pub(crate) pass: String,
    pub(crate) patience: Duration,
    pub(crate) story: Story,
    pub(crate) vm: String,
    pub(crate) job: JobId,
    pub(crate) dice: Dice,
    kept: Kept<Box<dyn Stream>>,
}

impl Line {
    pub(crate) fn new(way: Way, pass: &str, patience: Duration, who: (Story, String, JobId), dice: Dice) -> Self {
        let (story, vm, job) = who;
        Self { way, pass: pass.to_owned(), patience, story, vm, job, dice, kept: Kept::default() }
    }

    /// The same guest's other line, without a kept connection.
    pub(crate) fn another(&mut self) -> Self {
        let dice = Dice::new(self.dice.next(), 7);
        let who = (self.story.clone(), self.vm.clone(), self.job);
        Self::new(self.way.clone(), &self.pass, self.patience, who, dice)
    }

    pub(crate) fn tell(&self, does: GuestDoes<'_>) {
        self.story.tell(&Event::Guest { vm: &self.vm, job: self.job, does });
    }

    /// A raw connection to the door, as long as it takes within the relay's patience: of a wire its port, from which
    /// the relay may read as well.
    pub(crate) async fn knock(&self) -> Option<Wire> {
        let (doors, door) = match &self.way {
            Way::Wire { port, .. } => return Some(Wire::new(Box::new(port.clone()))),
            Way::Port { doors, door } => (doors, *door),
        };
        let until = Instant::now() + self.patience;
        loop {
            if let Ok(stream) = doors.connect(door) {
                return Some(Wire::new(stream));
            }
            if Instant::now() >= until {
                return None;
            }
            sleep(RETRY).await;
        }
    }

    /// A connection after the pass was shown.
    pub(crate) async fn connect(&mut self) -> Option<Wire> {
        let pass = Pass::from_text(&self.pass)?;
        let until = Instant::now() + self.patience;
        let waits = || Instant::now() < until;
        let connection = match &self.way {
            Way::Wire { relay, .. } => {
                relay.hand_over(pass);
                Wire::new(Box::new(relay.enter(RETRY, waits).await?))
            }
            Way::Port { doors, door } => {
                let dice = &mut self.dice;
                enter(&pass, || doors.connect(*door), || nonce(dice), RETRY, waits).await?
            }
        };
        let first = !self.story.inner().ledger.vms.get(&self.vm).is_some_and(|vm| vm.greeted);
        if first {
            self.tell(GuestDoes::Greeted);
        }
        Some(connection)
    }

    pub(crate) fn nonce(&mut self) -> [u8; 16] {
        nonce(&mut self.dice)
    }

    /// One request on the kept connection, or a new one. `None`: no whole answer.
    pub(crate) async fn call(&mut self, request: &[u8]) -> Option<Answer> {
        if let Some(kept) = self.kept.take() {
            if let Some(answer) = self.exchange(kept, request).await {
                return Some(answer);
            }
            // A kept connection may have been closed meanwhile: asked again once, on a new one.
            if request
                .split(|byte| *byte == b'\r')
                .next()
                .is_some_and(|line| line.windows(10).any(|w| w == b"/artifacts"))
            {
                self.tell(GuestDoes::Transfers { uploads: None });
            }
        }
        let connection = self.connect().await?;
        self.exchange(connection, request).await
    }

    async fn exchange(&mut self, connection: Wire, request: &[u8]) -> Option<Answer> {
        let answer: io::Result<Answer> = self.kept.exchange(connection, request, ANSWER).await;
        let answer = answer.ok()?;
        self.tell(GuestDoes::Reads(&answer.raw));
        Some(answer)
    }

    /// The connection that is kept, for somebody who holds on to it.
    pub(crate) fn keep(&mut self) -> Option<Wire> {
        self.kept.take()
    }
}

fn nonce(dice: &mut Dice) -> [u8; 16] {
    let (a, b) = (dice.next().to_le_bytes(), dice.next().to_le_bytes());
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&a);
    nonce[8..].copy_from_slice(&b);
    nonce
}
