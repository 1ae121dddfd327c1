//! What does a process do all day? It holds the sessions on its VM's port, one after the other, and serves their streams.
//!
//! A session ends when the guest begins another one, or says nothing for too long; its streams end with it. The process ends
//! when the port does, which is the VM's end. One thread: nothing here is shared with another one.

use crate::audit::Log;
use crate::dns::Dns;
use crate::notes::Notes;
use crate::policy::{Policy, Rate};
use crate::port::Port;
use crate::rate::Bucket;
use crate::stream::{self, CHUNK};
use dayfly_guest_config::{Nonce, Pass};
use dayfly_wire::{Asked, DNS_AUTHORITY, HandshakeError, HostSession, Limits, host_handshake};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Between two handshakes that came to nothing.
const PAUSE: Duration = Duration::from_millis(100);

/// Streams of DNS at once; a guest needs one, and another while it begins anew.
const DNS_STREAMS_MAX: usize = 4;

/// Connections of one VM at once, whatever its policy says: the session's streams are not enough to count, for one that the
/// guest has ended may have bytes left that its far end does not take.
const CONNECTIONS_MAX: u32 = 1024;

/// Connections that one VM begins a second, and at once. More than that wait: the host's tables are its neighbours', too.
const CONNECTS_A_SECOND: u64 = 500;
const CONNECTS_AT_ONCE: u64 = 2000;

/// Bytes that are kept of a stream that says little.
const SMALL: usize = 1024;

/// Bytes that may go at once after a pause, where there is a rate: so much of a second's.
const BURST: u64 = 4;

/// What all streams of a VM share.
pub(crate) struct Vm {
    pub(crate) policy: Rc<Policy>,
    pub(crate) dns: Rc<Dns>,
    pub(crate) notes: Rc<Notes>,
    /// Bytes both ways, if they have a rate.
    pub(crate) bytes: Option<RefCell<Bucket>>,
    /// For connections at once.
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) connects: RefCell<Bucket>,
    /// Where a stream reads into, before it is sent.
    pub(crate) scratch: RefCell<Box<[u8]>>,
    /// Bytes that are kept of a stream: of one that says little, among many, and among few.
    pub(crate) sizes: [usize; 3],
    /// Streams that are being copied.
    pub(crate) open: Cell<usize>,
}

impl Vm {
    pub(crate) fn new(policy: Policy, resolvers: Vec<SocketAddr>, log: Log) -> Self {
        let (policy, notes) = (Rc::new(policy), Rc::new(Notes::new(log)));
        let Rate { bytes_a_second, connections } = policy.rate.unwrap_or_default();
        Self {
            dns: Rc::new(Dns::new(Rc::clone(&policy), resolvers, Rc::clone(&notes))),
            bytes: bytes_a_second.map(|bytes| RefCell::new(Bucket::new(bytes, (bytes / BURST).max(CHUNK as u64)))),
            connections: Arc::new(Semaphore::new(connections.unwrap_or(CONNECTIONS_MAX).min(CONNECTIONS_MAX) as usize)),
            connects: RefCell::new(Bucket::new(CONNECTS_A_SECOND, CONNECTS_AT_ONCE)),
            scratch: RefCell::new(vec![0; CHUNK].into()),
            sizes: {
                let limits = Limits::egress();
                let few = limits.few.map_or(limits.host.window, |few| few.window);
                [SMALL, limits.host.window as usize, few as usize]
            },
            open: Cell::new(0),
            policy,
            notes,
        }
    }
}

/// Serves the guest behind this port until it hangs up.
pub(crate) async fn serve(port: &Port, pass: &Pass, vm: &Rc<Vm>) {
    tokio::select! {
        () = sessions(port, pass, vm) => {}
        () = vm.notes.write(|| vm.open.get() > 0) => {}
    }
    vm.notes.finish();
}

async fn sessions(port: &Port, pass: &Pass, vm: &Rc<Vm>) {
    loop {
        let mut nonce = Nonce::default();
        if getrandom::fill(&mut nonce).is_err() {
            sleep(PAUSE).await;
            continue;
        }
        // As long as it takes: a guest boots, or has begun its program anew.
        match host_handshake(port.clone(), pass, nonce).await {
            Ok(proven) => {
                if let Ok(session) = proven.serve(&Limits::egress()).await {
                    streams(session, vm).await;
                }
            }
            Err(HandshakeError::Closed | HandshakeError::Io(_)) => return,
            Err(HandshakeError::WrongProof | HandshakeError::Flooded) => {}
        }
        sleep(PAUSE).await;
    }
}

/// The streams of one session. When it ends, they are cut.
async fn streams(mut session: HostSession<Port>, vm: &Rc<Vm>) {
    let mut tasks = JoinSet::new();
    let dns = Arc::new(Semaphore::new(DNS_STREAMS_MAX));
    loop {
        tokio::select! {
            // The session first: all bytes move in it. It loses nothing.
            biased;
            asked = session.request() => match asked {
                Some(Ok(asked)) => drop(tasks.spawn_local(one(Rc::clone(vm), asked, Arc::clone(&dns)))),
                Some(Err(_)) | None => return,
            },
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn one(vm: Rc<Vm>, asked: Asked, dns: Arc<Semaphore>) {
    if asked.authority() != DNS_AUTHORITY {
        return stream::serve(vm, asked).await;
    }
    match dns.try_acquire() {
        Ok(_place) => {
            if let Some(stream) = asked.accept() {
                Rc::clone(&vm.dns).serve(stream).await;
            }
        }
        Err(_) => asked.refuse(503),
    }
}
