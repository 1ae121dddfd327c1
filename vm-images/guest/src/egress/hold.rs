//! First packets wait here until their far ends have answered, so that who connects to a closed port is refused, and not
//! connected and then cut: `nc -z`, and whoever tries one address after another, must not be deceived.

use crate::netfilter::queue::{Flow, Packet, Queue, Verdict};
use crate::netfilter::rules::{CONNECTED, REFUSED};
use crate::relay::session::open_to;
use dayfly_wire::{Opener, Stream};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout};

/// Connections that wait, or whose stream was not fetched yet. Beyond that first packets are lost, and are sent again
/// after a second.
const FLOWS_MAX: usize = 4096;

/// The host tries to connect for 20 s; the rest is for a session that begins anew, and for a place among its streams.
/// Then the packet is lost, as it would be on its way to a host that does not answer; the next one is held anew.
const HOLD: Duration = Duration::from_secs(30);

/// From the verdict to the connection: a few packets on `lo`. A connection that has not come by then is not wanted any
/// more; its first packet, sent once more, begins anew.
const FETCH: Duration = Duration::from_secs(10);

/// Between two looks for those.
const SWEEP: Duration = Duration::from_secs(1);

/// After an error of the queue, which there should be none of.
const QUEUE_PAUSE: Duration = Duration::from_millis(100);

/// Connections from their first packet until they have come.
pub(super) struct Hold {
    flows: Mutex<HashMap<Flow, State>>,
    session: watch::Receiver<Option<Opener>>,
}

enum State {
    /// For the far end's answer.
    Waiting,
    Opened {
        stream: Stream,
        until: Instant,
    },
}

/// What a first packet is.
#[derive(Debug, PartialEq, Eq)]
enum First {
    /// Of a new connection, noted now.
    New,
    /// The same once more, while its connection waits; or there are too many.
    Superfluous,
    /// The same once more, and its connection may come.
    Welcome,
}

impl Hold {
    pub(super) fn new(session: watch::Receiver<Option<Opener>>) -> Self {
        Self { flows: Mutex::default(), session }
    }

    fn flows(&self) -> MutexGuard<'_, HashMap<Flow, State>> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream that was opened for a connection which has come.
    pub(super) fn take(&self, flow: Flow) -> Option<Stream> {
        match self.flows().entry(flow) {
            Entry::Occupied(entry) if matches!(entry.get(), State::Opened { .. }) => match entry.remove() {
                State::Opened { stream, .. } => Some(stream),
                State::Waiting => None,
            },
            _ => None,
        }
    }

    /// A stream to where this connection wants to.
    ///
    /// # Errors
    /// The host's answer, or that there was none in time.
    pub(super) async fn open(&self, flow: Flow) -> io::Result<Stream> {
        let opened = timeout(HOLD, open_to(self.session.clone(), &flow.destination.to_string())).await;
        opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn note(&self, flow: Flow) -> First {
        let mut flows = self.flows();
        let full = flows.len() >= FLOWS_MAX;
        match flows.entry(flow) {
            Entry::Occupied(entry) if matches!(entry.get(), State::Opened { .. }) => First::Welcome,
            Entry::Occupied(_) => First::Superfluous,
            Entry::Vacant(_) if full => First::Superfluous,
            Entry::Vacant(entry) => {
                entry.insert(State::Waiting);
                First::New
            }
        }
    }

    /// Asks the host, and says what becomes of the packet.
    async fn answer(&self, flow: Flow) -> Verdict {
        let stream = self.open(flow).await;
        let mut flows = self.flows();
        match stream {
            Ok(stream) => {
                flows.insert(flow, State::Opened { stream, until: Instant::now() + FETCH });
                Verdict::Repeat(CONNECTED)
            }
            Err(error) => {
                flows.remove(&flow);
                // Nobody has refused it: it is sent again as long as who connects has patience, and asked again.
                if error.kind() == io::ErrorKind::TimedOut { Verdict::Drop } else { Verdict::Repeat(REFUSED) }
            }
        }
    }

    fn sweep(&self) {
        let now = Instant::now();
        let stale = |_: &Flow, state: &mut State| matches!(state, State::Opened { until, .. } if *until <= now);
        let stale: Vec<_> = self.flows().extract_if(stale).collect();
        for (_, state) in stale {
            if let State::Opened { stream, .. } = state {
                stream.reset();
            }
        }
    }
}

/// Answers first packets for ever.
pub(super) async fn run(hold: Arc<Hold>, queue: Queue, number: u16) {
    let queue = Arc::new(queue);
    let mut asking = JoinSet::new();
    let mut sweep = interval(SWEEP);
    loop {
        tokio::select! {
            // All are cancel safe.
            biased;
            Some(_) = asking.join_next() => {}
            packets = queue.next() => {
                let Ok(packets) = packets else {
                    sleep(QUEUE_PAUSE).await;
                    continue;
                };
                for Packet { id, flow } in packets {
                    let Some(flow) = flow else {
                        queue.decide(id, Verdict::Accept, number);
                        continue;
                    };
                    match hold.note(flow) {
                        First::Welcome => queue.decide(id, Verdict::Repeat(CONNECTED), number),
                        First::Superfluous => queue.decide(id, Verdict::Drop, number),
                        First::New => {
                            let (hold, queue) = (Arc::clone(&hold), Arc::clone(&queue));
                            asking.spawn(async move {
                                let verdict = hold.answer(flow).await;
                                queue.decide(id, verdict, number);
                            });
                        }
                    }
                }
            }
            _ = sweep.tick() => hold.sweep(),
        }
    }
}
