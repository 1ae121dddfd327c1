//! The relay against doors of all kinds: at an address on loopback, and behind a port that is a socket.

mod tcp;
mod wire;

use super::*;
use dayfly_guest_config::PASS_BYTES;

/// No wait of these tests is longer.
const LIMIT: Duration = Duration::from_secs(20);

fn pass(n: u8) -> Pass {
    Pass::new([n; PASS_BYTES])
}

fn limits() -> Limits {
    Limits {
        greeting: Duration::from_millis(300),
        retry: Duration::from_millis(5),
        retry_unproven: Duration::from_millis(5),
        ..Limits::default()
    }
}

/// A relay with its address.
fn relay(limits: Limits) -> (Relay, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (Relay::start(listener, limits, || {}).unwrap(), address)
}

/// Waits until all connections of the relay are closed.
fn wait_idle(relay: &Relay) {
    let mut state = relay.0.state();
    let start = Instant::now();
    while state.open > 0 {
        assert!(start.elapsed() < LIMIT, "{} connections stay open", state.open);
        state = relay.0.changed.wait_timeout(state, LIMIT).unwrap().0;
    }
}
