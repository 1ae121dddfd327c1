//! How do the fleet's other daemons do? Asked by this one, while somebody looks, each with a deadline.
//!
//! The page's browser asks nobody but the daemon that it came from. What the others answer is bounded, and is theirs to
//! say: it is shown, and nothing follows from it.

use super::Config;
use crate::gitlab::transport::{OpenError, full};
use crate::gitlab::{Call, Connection, Endpoint, OpenTransport, Transport};
use crate::secret::Secret;
use crate::status::StatusReport;
use crate::telemetry::chain;
use http::header::{ACCEPT, AUTHORIZATION};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::BodyExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use url::Url;

/// How long one of them may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// How old an answer may be that is shown without asking again.
const FRESH: Duration = Duration::from_secs(10);

/// Bytes of an answer at most: a status of some thousand jobs.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The others.
#[derive(Default)]
pub(super) struct Fleet {
    peers: Vec<Peer>,
    token: Option<Secret>,
    /// Held for a few lines.
    heard: Mutex<Heard>,
    /// Somebody looks.
    wanted: Notify,
}

#[derive(Clone)]
struct Peer {
    url: Url,
    transport: Arc<dyn Transport>,
}

#[derive(Default)]
struct Heard {
    at: Option<Instant>,
    /// In the order of the configuration.
    of: Vec<Result<Box<StatusReport>, String>>,
}

/// One of them, as it answered last.
#[derive(Clone, Debug)]
pub(super) struct Other {
    pub(super) url: Url,
    /// Or why not, for people; none: it was not asked yet.
    pub(super) status: Option<Result<Box<StatusReport>, String>>,
}

impl Fleet {
    /// Opens no connection.
    pub(super) fn open(
        config: &Config,
        token: Option<Secret>,
        transport: &dyn OpenTransport,
    ) -> Result<Self, OpenError> {
        let peer = |url: &Url| {
            let endpoint = Endpoint {
                url: url.clone(),
                tls_ca_file: config.fleet_ca_file.clone(),
                tls_client: None,
                allow_insecure_http: false,
            };
            Ok(Peer { url: url.clone(), transport: transport.open(&endpoint)? })
        };
        let peers = config.fleet.iter().map(peer).collect::<Result<_, OpenError>>()?;
        Ok(Self { peers, token, heard: Mutex::default(), wanted: Notify::new() })
    }

    /// Asks whenever somebody looks and the last answers are old. For ever.
    ///
    /// # Cancel safety
    /// Safe: a round that is dropped is asked again.
    pub(super) async fn keep_up(&self) {
        loop {
            self.wanted.notified().await;
            if self.is_stale() {
                let of = self.ask_all().await;
                self.heard(|heard| *heard = Heard { at: Some(Instant::now()), of });
            }
        }
    }

    fn is_stale(&self) -> bool {
        !self.peers.is_empty() && self.heard(|heard| heard.at.is_none_or(|at| at.elapsed() >= FRESH))
    }

    /// The others, as they answered last; who looks again soon sees what they answer now.
    pub(super) fn look(&self) -> Vec<Other> {
        if self.is_stale() {
            self.wanted.notify_one();
        }
        let mut of = self.heard(|heard| heard.of.clone()).into_iter();
        self.peers.iter().map(|peer| Other { url: peer.url.clone(), status: of.next() }).collect()
    }

    fn heard<T>(&self, look: impl FnOnce(&mut Heard) -> T) -> T {
        look(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn ask_all(&self) -> Vec<Result<Box<StatusReport>, String>> {
        let mut asked = JoinSet::new();
        for (i, peer) in self.peers.iter().cloned().enumerate() {
            let token = self.token.clone();
            asked.spawn(async move { (i, ask(&peer, token.as_ref()).await) });
        }
        let mut answers = vec![Err("it was not asked".to_owned()); self.peers.len()];
        while let Some(Ok((i, answer))) = asked.join_next().await {
            answers[i] = answer;
        }
        answers
    }
}

async fn ask(peer: &Peer, token: Option<&Secret>) -> Result<Box<StatusReport>, String> {
    let mut request = Request::get("/status.json").header(ACCEPT, "application/json");
    if let Some(token) = token {
        let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
        let mut value = value.map_err(|_| "the token is no header".to_owned())?;
        value.set_sensitive(true);
        request = request.header(AUTHORIZATION, value);
    }
    let request = request.body(full("")).map_err(|error| chain(&error))?;
    let call = Call { request, connection: Connection::Shared, head_timeout: DEADLINE, total_timeout: DEADLINE };
    let answer = peer.transport.call(call).await.map_err(|error| chain(&error))?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED => return Err("it refuses this daemon's token: all of a fleet have the same".into()),
        status => return Err(format!("it answered {status}")),
    }
    let (mut body, mut bytes) = (answer.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|error| format!("its answer broke off: {error}"))?.into_data() else { continue };
        bytes.extend_from_slice(&data);
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err("its answer is too long for a status".to_owned());
        }
    }
    serde_json::from_slice(&bytes).map(Box::new).map_err(|_| "its answer is no status; is it a dayfly?".to_owned())
}
