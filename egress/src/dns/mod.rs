//! What is a guest told of names? What the host's resolvers say, less what its policy withholds; and what it is told is what
//! an address counts for from then on.
//!
//! A guest has no IPv6 to go out by, so there are no addresses of it in an answer (AAAA and what carries hints of them are
//! answered empty). What a policy refuses on all ports is not even asked for, for a question carries bytes out, too.

pub mod message;
pub(crate) mod names;
pub(crate) mod resolvers;
#[cfg(test)]
mod tests;

use crate::notes::Notes;
use crate::policy::{Policy, Verdict};
use crate::rate::Bucket;
use message::{Code, NoQuery, QUESTION_BYTES_MAX, Query, Record, TYPE_AAAA, read_query};
use names::Names;
use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Questions that are being answered at once, for one VM.
const OUTSTANDING_MAX: usize = 256;

/// Questions a second for one VM, and at once. More than that wait: the resolvers are its neighbours', too.
const QUESTIONS_A_SECOND: u32 = 200;
const QUESTIONS_AT_ONCE: u32 = 1000;

/// Aliases that lead to an address at most.
const ALIASES_MAX: usize = 16;

/// Kinds that hold or carry addresses of IPv6, or all kinds: A6, SVCB, HTTPS, ANY.
const EMPTY_KINDS: [u16; 5] = [TYPE_AAAA, 38, 64, 65, 255];

/// Kinds that are no question for a name: none, OPT, and transfers of zones (249 to 254).
fn is_no_kind(kind: u16) -> bool {
    matches!(kind, 0 | 41 | 249..=254)
}

/// Answers the questions of one VM.
pub(crate) struct Dns {
    policy: Rc<Policy>,
    resolvers: Vec<SocketAddr>,
    names: RefCell<Names>,
    notes: Rc<Notes>,
    places: Arc<Semaphore>,
    pace: RefCell<Bucket>,
}

impl Dns {
    pub(crate) fn new(policy: Rc<Policy>, resolvers: Vec<SocketAddr>, notes: Rc<Notes>) -> Self {
        Self {
            policy,
            resolvers,
            names: RefCell::default(),
            notes,
            places: Arc::new(Semaphore::new(OUTSTANDING_MAX)),
            pace: RefCell::new(Bucket::new(QUESTIONS_A_SECOND.into(), QUESTIONS_AT_ONCE.into())),
        }
    }

    /// The names that an address counts for, the last one that was told first.
    pub(crate) fn names_of(&self, address: IpAddr) -> Vec<Rc<str>> {
        self.names.borrow().of(address, Instant::now())
    }

    /// Answers what comes on a stream, each message with its length before it, in any order, until it ends.
    pub(crate) async fn serve(self: Rc<Self>, stream: dayfly_wire::Stream) {
        let (mut reading, mut writing) = tokio::io::split(stream);
        // One place for each that is outstanding: nobody waits to hand over an answer.
        let (answers, mut answered) = mpsc::channel::<Vec<u8>>(OUTSTANDING_MAX);
        let asking = async {
            let mut tasks = JoinSet::new();
            loop {
                // The places first: beyond them nothing is read, and the guest waits.
                let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { break };
                while tasks.try_join_next().is_some() {}
                let Ok(length) = reading.read_u16().await else { break };
                let mut message = vec![0; usize::from(length).min(QUESTION_BYTES_MAX + 1)];
                if reading.read_exact(&mut message).await.is_err() {
                    break;
                }
                let rest = u64::from(length).saturating_sub(message.len() as u64);
                if tokio::io::copy(&mut (&mut reading).take(rest), &mut tokio::io::sink()).await.is_err() {
                    break;
                }
                Bucket::take(&self.pace, 1).await;
                let (dns, answers) = (Rc::clone(&self), answers.clone());
                tasks.spawn_local(async move {
                    if let Some(answer) = dns.answer(&message).await {
                        let _ = answers.send(answer).await;
                    }
                    drop(place);
                });
            }
            drop(answers);
            // Those that were asked before the end are answered.
            while tasks.join_next().await.is_some() {}
        };
        let saying = async {
            while let Some(answer) = answered.recv().await {
                // Bounded by `ANSWER_BYTES_MAX`.
                let length = u16::try_from(answer.len()).unwrap_or(0);
                if writing.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await.is_err() {
                    break;
                }
            }
            let _ = writing.shutdown().await;
        };
        tokio::join!(asking, saying);
    }

    /// The answer to one message; `None`: there is nothing to answer to.
    pub(crate) async fn answer(&self, message: &[u8]) -> Option<Vec<u8>> {
        let query = match read_query(message) {
            Ok(query) => query,
            Err(NoQuery::Nothing) => return None,
            Err(NoQuery::Answer(answer)) => return Some(answer),
        };
        let (code, records) = self.decide(&query).await;
        Some(query.answer(code, &records))
    }

    async fn decide(&self, query: &Query) -> (Code, Vec<Record>) {
        let none = |code| (code, Vec::new());
        if !query.is_internet() || is_no_kind(query.question.kind) {
            return none(Code::REFUSED);
        }
        // No host has such a name; neither has anybody to whom it would be said.
        let Some(name) = query.question.name.to_host() else { return none(Code::NO_SUCH_NAME) };
        if is_ours(&name) || message::reverse(&name).is_some_and(|address| self.is_withheld(&name, address)) {
            return none(Code::NO_SUCH_NAME);
        }
        if let Verdict::Refused(reason) = self.policy.lookup(&name) {
            self.notes.withheld(&name, reason);
            return none(Code::NO_SUCH_NAME);
        }
        let kind = query.question.kind;
        if EMPTY_KINDS.contains(&kind) {
            return none(Code::NO_ERROR);
        }
        let kept = self.names.borrow().kept(&name, kind, Instant::now());
        if let Some((records, left)) = kept {
            let records = records.iter().map(|record| Record { ttl: record.ttl.min(left), ..record.clone() }).collect();
            return (Code::NO_ERROR, self.tell(&name, records));
        }
        let Some(answer) = resolvers::resolve(&self.resolvers, &query.question).await else {
            return none(Code::SERVER_FAILURE);
        };
        let records: Rc<[Record]> = chain(&query.question.name, kind, answer.records).into();
        if answer.code == Code::NO_ERROR {
            self.names.borrow_mut().keep(&name, kind, &records, Instant::now());
        }
        (answer.code, self.tell(&name, records.to_vec()))
    }

    /// The records that the guest may have, which it is told now. What is withheld of them is written down.
    fn tell(&self, name: &str, records: Vec<Record>) -> Vec<Record> {
        let mut told = Vec::with_capacity(records.len());
        for record in records {
            if let Some(address) = record.address() {
                let address = IpAddr::V4(address);
                if let Verdict::Refused(reason) = self.policy.answer(name, address) {
                    self.notes.withheld(name, reason);
                    continue;
                }
                self.names.borrow_mut().learn(name, address, record.ttl, Instant::now());
            }
            told.push(record);
        }
        told
    }

    fn is_withheld(&self, name: &str, address: IpAddr) -> bool {
        !self.policy.answer(name, address).is_allowed()
    }
}

/// A name of the wire's own, which nobody is asked for.
fn is_ours(name: &str) -> bool {
    name == "dayfly.invalid" || name.ends_with(".dayfly.invalid")
}

/// The records that answer the question: the aliases from its name on, and what stands at their end. Others are nobody's
/// answer, and a resolver that sends them is not believed.
fn chain(question: &message::Name, kind: u16, records: Vec<Record>) -> Vec<Record> {
    let mut at = question.clone();
    let mut used = vec![false; records.len()];
    if kind != message::TYPE_CNAME {
        for _ in 0..ALIASES_MAX {
            let alias = records.iter().position(|record| record.owner == at && record.alias().is_some());
            let Some(position) = alias.filter(|position| !used[*position]) else { break };
            used[position] = true;
            if let Some(next) = records[position].alias() {
                at = next;
            }
        }
    }
    for (position, record) in records.iter().enumerate() {
        used[position] |= record.kind == kind && record.owner == at;
    }
    let mut used = used.into_iter();
    records.into_iter().filter(|_| used.next() == Some(true)).collect()
}
