//! What must hold for any bytes on the wire? The handshake at both of its ends, and a guest's session at the host.

use crate::pieces::Cuts;
use dayfly_guest_config::{Nonce, PASS_BYTES, Pass, SessionProofs};
use dayfly_wire::{HandshakeError, Limits, guest_handshake, host_handshake};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::runtime::Builder;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;

/// The committed corpus was made with these.
const PASS: [u8; PASS_BYTES] = [1; PASS_BYTES];
const DOOR: Nonce = [2; 16];
const RELAY: Nonce = [3; 16];

/// Longer than anything on the wire may take; the clock is paused, and no time passes while something moves.
const LIMIT: Duration = Duration::from_secs(3600);

/// Streams that a host takes at once.
const STREAMS_MAX: usize = 64;

/// Runs this on a clock that only moves when nothing else does.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let ended = runtime.block_on(LocalSet::new().run_until(async { timeout(LIMIT, work).await }));
    ended.expect("it does not end")
}

/// Says the input, cut as it says, and that no more comes; hears until the other side has ended.
async fn say(input: &[u8], pipe: DuplexStream) -> Vec<u8> {
    let (mut reading, mut writing) = tokio::io::split(pipe);
    let saying = async {
        for piece in Cuts::of(input).pieces(input) {
            if writing.write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        let _ = writing.shutdown().await;
    };
    let hearing = async {
        let mut heard = Vec::new();
        let _ = reading.read_to_end(&mut heard).await;
        heard
    };
    tokio::join!(saying, hearing).1
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Nonces that messages in these bytes carry: behind what each begins with and its kind, and behind the first of them.
/// To try whatever 16 bytes there are would take longer than an input may.
fn nonces_of(input: &[u8]) -> impl Iterator<Item = Nonce> {
    const BEGINS: &[u8] = b"\xfbdayfly-wire-1\r\xfb";
    let at = (0..input.len()).filter(|at| input[*at..].starts_with(BEGINS)).map(|at| at + BEGINS.len() + 1);
    at.flat_map(|at| [at, at + 16]).filter_map(|at| Nonce::try_from(input.get(at..at + 16)?).ok())
}

/// Whoever has a session has said a proof under the pass, whatever else came with it; and a guest says its own proof
/// only to who has. Both ends of the handshake come to an end.
pub fn wire_handshake(input: &[u8]) {
    let pass = Pass::new(PASS);
    let nonces = || nonces_of(input);

    let (host, guest) = duplex(4096);
    let (ended, _) =
        run(async { tokio::join!(async { host_handshake(host, &pass, DOOR).await.map(drop) }, say(input, guest)) });
    if ended.is_ok() {
        let proven = |relay| holds(input, &SessionProofs::new(&pass, DOOR, relay).of_relay());
        assert!(nonces().any(proven), "a session without the pass");
    }

    let (host, guest) = duplex(4096);
    let (ended, heard) =
        run(async { tokio::join!(async { guest_handshake(guest, &pass, RELAY).await.map(drop) }, say(input, host)) });
    let given = nonces().filter(|door| holds(&heard, &SessionProofs::new(&pass, *door, RELAY).of_relay()));
    let mut given =
        if ended.is_ok() || heard.len() > dayfly_wire::FILLER_BYTES { given.take(1) } else { given.take(0) };
    if let Some(door) = given.next() {
        assert!(holds(input, &SessionProofs::new(&pass, door, RELAY).of_door()), "a proof to whoever asks");
    } else {
        assert!(matches!(ended, Err(HandshakeError::Closed | HandshakeError::WrongProof | HandshakeError::Io(_))));
    }
}

/// Whatever a guest says in a session: it comes to an end, and no more streams are open at once than a host takes.
pub fn wire_session(input: &[u8]) {
    run(async {
        let pass = Pass::new(PASS);
        let (host, guest) = duplex(64 * 1024);
        let (host, guest) = tokio::join!(host_handshake(host, &pass, DOOR), guest_handshake(guest, &pass, RELAY));
        let guest = say(input, guest.unwrap().into_parts().0);
        let session = async {
            let open = Rc::new(Cell::new(0));
            let Ok(mut session) = host.unwrap().serve(&Limits::default()).await else { return };
            while let Some(Ok(stream)) = session.accept().await {
                open.set(open.get() + 1);
                let open = Rc::clone(&open);
                assert!(open.get() <= 2 * STREAMS_MAX, "more streams than are taken, those that are ending included");
                spawn_local(async move {
                    let (mut reading, mut writing) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut reading, &mut writing).await;
                    let _ = writing.shutdown().await;
                    open.set(open.get() - 1);
                });
            }
        };
        tokio::join!(session, guest);
    });
}
