//! Handshakes with a good, a wrong, a silent and a flooding other side.

use super::ends::{LIMIT, nonce, pass, shake, soon};
use crate::limits::{FILLER_BYTES, SCANNED_BYTES_MAX};
use crate::message::{Message, Scanner};
use crate::{HandshakeError, guest_handshake, host_handshake};
use bytes::BytesMut;
use dayfly_guest_config::SessionProofs;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::net::UnixStream;
use tokio::time::timeout;

#[tokio::test]
async fn both_sides_believe_the_holder_of_the_pass() {
    let (host, guest) = duplex(64);
    let (host, guest) = shake(host, guest).await;
    assert!(host.into_parts().1.is_empty() && guest.into_parts().1.is_empty());
    let (host, guest) = UnixStream::pair().unwrap();
    shake(host, guest).await;
}

#[tokio::test]
async fn another_pass_is_believed_on_neither_side() {
    let (host, guest) = duplex(4096);
    let (door, relay) = (pass(1), pass(9));
    let both = async { tokio::join!(host_handshake(host, &door, nonce(2)), guest_handshake(guest, &relay, nonce(3))) };
    let (host, guest) = soon(both).await;
    // The guest leaves before it has proven anything.
    assert_eq!(guest.unwrap_err().word(), "wrong_proof");
    assert!(matches!(host.unwrap_err().word(), "closed" | "broken"));
}

/// Says these, and reads until the other side says one that is wanted.
async fn say(pipe: &mut DuplexStream, messages: &[Message]) {
    let mut bytes = BytesMut::new();
    messages.iter().for_each(|message| message.write(&mut bytes));
    pipe.write_all(&bytes).await.unwrap();
}

async fn hear<T>(pipe: &mut DuplexStream, heard: &mut Vec<u8>, mut wanted: impl FnMut(Message) -> Option<T>) -> T {
    let mut scanner = Scanner::default();
    loop {
        let mut buffer = [0; 4096];
        let count = soon(pipe.read(&mut buffer)).await.unwrap();
        assert!(count > 0, "it has left");
        heard.extend_from_slice(&buffer[..count]);
        if let Some(found) = scanner.find(&buffer[..count], &mut wanted) {
            return found;
        }
    }
}

/// Until the door has proven itself, a guest says who it is, and nothing that could be worth anything.
#[tokio::test]
async fn a_guest_proves_nothing_to_a_door_that_has_not() {
    let (mut host, guest) = duplex(64 * 1024);
    let relay = pass(1);
    let lie = async {
        let mut heard = Vec::new();
        say(&mut host, &[Message::Hello { door: [7; 16] }]).await;
        hear(&mut host, &mut heard, |message| {
            matches!(message, Message::Answer { door, .. } if door == [7; 16]).then_some(())
        })
        .await;
        let proof = SessionProofs::new(&pass(1), [7; 16], [3; 16]);
        // Its own proof reflected, and one under another pass.
        say(&mut host, &[Message::Proof { door: [7; 16], relay: [3; 16], proof: proof.of_relay() }]).await;
        soon(host.read_to_end(&mut heard)).await.unwrap();
        heard
    };
    let (heard, guest) = tokio::join!(lie, soon(guest_handshake(guest, &relay, [3; 16])));
    assert_eq!(guest.unwrap_err().word(), "wrong_proof");
    assert!(heard.iter().take(FILLER_BYTES).all(|byte| *byte == 0xff));
    let mut answer = BytesMut::new();
    Message::Answer { door: [7; 16], relay: [3; 16] }.write(&mut answer);
    assert_eq!(&heard[FILLER_BYTES..], &answer[..]);
}

#[tokio::test]
async fn a_guest_without_the_pass_gets_no_session() {
    let (host, mut guest) = duplex(64 * 1024);
    let door = pass(1);
    let lie = async {
        let mut heard = Vec::new();
        let door = hear(&mut guest, &mut heard, |message| match message {
            Message::Hello { door } => Some(door),
            _ => None,
        });
        let door = door.await;
        say(&mut guest, &[Message::Answer { door, relay: [3; 16] }]).await;
        let proof = hear(&mut guest, &mut heard, |message| match message {
            Message::Proof { proof, .. } => Some(proof),
            _ => None,
        });
        let proof = proof.await;
        // The door's own, reflected.
        say(&mut guest, &[Message::Begin { door, relay: [3; 16], proof }]).await;
        let _ = guest.read_to_end(&mut heard).await;
    };
    let (host, ()) = tokio::join!(soon(host_handshake(host, &door, nonce(2))), lie);
    assert_eq!(host.unwrap_err().word(), "wrong_proof");
}

/// A pipe that nobody reads, for an hour: hellos stop where it is full, and what waits stays small.
#[tokio::test(start_paused = true)]
async fn a_silent_guest_costs_a_host_no_more_than_the_pipe_holds() {
    let (host, _guest) = duplex(100_000);
    let door = pass(1);
    assert!(timeout(Duration::from_secs(3600), host_handshake(host, &door, nonce(2))).await.is_err());
    // One that comes after so long finds the first hello in what lies there.
    let (host, guest) = duplex(100_000);
    let late = async {
        tokio::time::sleep(Duration::from_secs(300)).await;
        guest_handshake(guest, &door, nonce(3)).await
    };
    let (host, guest) = tokio::join!(host_handshake(host, &door, nonce(2)), late);
    host.unwrap();
    guest.unwrap();
}

/// A guest that opens its port late throws away what lay in it, hellos too: its own filler brings the next one. And what
/// a host says meanwhile to nobody is little.
#[tokio::test(start_paused = true)]
async fn a_guest_that_comes_late_is_said_hello_to_at_once() {
    let door = pass(1);
    let (host, mut port) = duplex(16 * 1024 * 1024);
    let late = async {
        let boot = Duration::from_secs(60);
        tokio::time::sleep(boot).await;
        let mut thrown_away = 0;
        let mut buffer = vec![0; 1024 * 1024];
        while let Ok(count) = timeout(Duration::ZERO, port.read(&mut buffer)).await {
            thrown_away += count.unwrap();
        }
        let since = tokio::time::Instant::now();
        let proven = guest_handshake(port, &door, nonce(3)).await;
        (thrown_away, since.elapsed(), proven)
    };
    let (host, (thrown_away, took, guest)) = tokio::join!(host_handshake(host, &door, nonce(2)), late);
    host.unwrap();
    guest.unwrap();
    assert!(took <= Duration::from_millis(30), "{took:?}");
    assert!((FILLER_BYTES * 2..700 * 1024).contains(&thrown_away), "{thrown_away}");
}

#[tokio::test]
async fn whoever_floods_a_handshake_is_left() {
    // Bytes that are nothing, bytes that are nearly something, and answers with ever new nonces.
    let junk = vec![0xfb; 64 * 1024];
    let mut answers = BytesMut::new();
    for n in 0..=u8::MAX {
        Message::Answer { door: nonce(2), relay: [n; 16] }.write(&mut answers);
    }
    for flood in [junk, answers.to_vec()] {
        let (host, mut guest) = duplex(64 * 1024);
        let door = pass(1);
        let pour = async {
            let mut poured = 0;
            while poured <= SCANNED_BYTES_MAX + flood.len() {
                if guest.write_all(&flood).await.is_err() {
                    break;
                }
                poured += flood.len();
            }
        };
        let (host, ()) =
            tokio::time::timeout(LIMIT, async { tokio::join!(host_handshake(host, &door, nonce(2)), pour) })
                .await
                .unwrap();
        assert!(matches!(host.unwrap_err(), HandshakeError::Flooded));
    }
}
