//! The resolver of the world, which hosts in it ask.

use crate::world::OPEN;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// Seconds that an answer is good for.
const TTL: u8 = 60;
/// And the first one of the name whose answer changes.
const TTL_BEFORE: u8 = 1;

/// Answers for a few names, as long as this lives; others are unknown.
pub(crate) struct Names {
    asked: Arc<Mutex<HashMap<String, u32>>>,
    _tasks: JoinSet<()>,
}

impl Names {
    pub(crate) async fn new(at: SocketAddr, names: HashMap<&'static str, IpAddr>) -> Self {
        let udp = UdpSocket::bind(at).await.expect("addresses of the ring's namespace");
        let (asked, mut tasks) = (Arc::<Mutex<HashMap<String, u32>>>::default(), JoinSet::new());
        let counts = Arc::clone(&asked);
        tasks.spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
                if let Some(answer) = answer(&names, &counts, &buffer[..length]) {
                    let _ = udp.send_to(&answer, from).await;
                }
            }
        });
        Self { asked, _tasks: tasks }
    }

    /// How often somebody has asked for this name.
    pub(crate) fn asked(&self, name: &str) -> u32 {
        self.asked.lock().unwrap().get(name).copied().unwrap_or(0)
    }
}

fn answer(
    names: &HashMap<&'static str, IpAddr>,
    counts: &Mutex<HashMap<String, u32>>,
    question: &[u8],
) -> Option<Vec<u8>> {
    let (mut labels, mut at) = (Vec::new(), 12);
    while *question.get(at)? != 0 {
        let end = at + 1 + usize::from(question[at]);
        labels.push(String::from_utf8_lossy(question.get(at + 1..end)?).to_lowercase());
        at = end;
    }
    let kind = question.get(at + 1..at + 3)?;
    let name = labels.join(".");
    let asked = {
        let mut counts = counts.lock().unwrap();
        let count = counts.entry(name.clone()).or_default();
        *count += 1;
        *count
    };
    let (known, ttl) = match names.get(name.as_str()) {
        // The first time it is somewhere else.
        Some(_) if name.ends_with(".rebind.example") && asked == 1 => (Some(IpAddr::V4(*OPEN.ip())), TTL_BEFORE),
        Some(address) => (Some(*address), TTL),
        None if name.ends_with(".flood.example") => (Some(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 77))), TTL),
        None => (None, TTL),
    };
    let found = known.filter(|address| kind == if address.is_ipv4() { [0, 1] } else { [0, 28] });
    let code = if known.is_some() { 0x80 } else { 0x83 };
    let mut message = question[..2].to_vec();
    message.extend([0x81, code, 0, 1, 0, u8::from(found.is_some()), 0, 0, 0, 0]);
    message.extend(question.get(12..at + 5)?);
    match found {
        Some(IpAddr::V4(address)) => {
            message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, ttl, 0, 4]);
            message.extend(address.octets());
        }
        Some(IpAddr::V6(address)) => {
            message.extend([0xc0, 12, 0, 28, 0, 1, 0, 0, 0, ttl, 0, 16]);
            message.extend(address.octets());
        }
        None => {}
    }
    Some(message)
}
