//! The greeting, from both sides.

use crate::pieces::{Peer, now};
use dayfly::guest::readers::greet;
use dayfly_guest_config::{Greeting, Nonce, PASS_BYTES, Pass};

const PASS: [u8; PASS_BYTES] = [1; PASS_BYTES];
const DOOR: Nonce = [2; 16];
const RELAY: Nonce = [3; 16];

/// The nonce that a right first line names.
fn opening(line: &[u8]) -> Option<Nonce> {
    let digits = line.strip_prefix(b"DAYFLY 1 ")?;
    let mut nonce = [0; 16];
    for (at, digit) in digits.iter().enumerate() {
        let value = b"0123456789abcdef".iter().position(|known| known == digit)?;
        *nonce.get_mut(at / 2)? |= u8::try_from(value).unwrap() << (4 * (1 - at % 2));
    }
    (digits.len() == 32).then_some(nonce)
}

fn split_line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.windows(2).position(|two| two == b"\r\n")?;
    Some((&bytes[..at], &bytes[at + 2..]))
}

/// The door believes whoever sends a right first line, waits for the door's, and sends the proof: nobody else. It
/// says nothing before a right first line, one line after it, and keeps what stands behind the proof for HTTP.
pub fn greeting_door(input: &[u8]) {
    let pass = Pass::new(PASS);
    let (line, rest) = split_line(input).unwrap_or((input, b""));
    let greeted = split_line(input).and_then(|(line, _)| {
        let door = Greeting::door(&pass, DOOR, std::str::from_utf8(line).ok()?).ok();
        assert_eq!(door.is_some(), opening(line).is_some(), "a first line is read as what it is not");
        let said = door?.door_line();
        let relay = Greeting::relay(&pass, opening(line)?, &said).unwrap();
        Some((said, relay.relay_line()))
    });
    let right = greeted.as_ref().and_then(|(_, proof)| rest.strip_prefix(proof.as_bytes())?.strip_prefix(b"\r\n"));

    let first = &input[..input.len().min(line.len() + 2)];
    let (mut stream, heard) = Peer::new(first, rest);
    let patient = now(greet(&mut stream, &pass, DOOR)).expect("the peer is never pending");
    assert_eq!(patient.is_ok(), right.is_some(), "{patient:?}");
    if let (Ok(read), Some(http)) = (&patient, right) {
        assert!(http.starts_with(read), "what stands behind the greeting is not what was sent");
    }
    let said = greeted.as_ref().map(|(line, _)| format!("{line}\r\n")).unwrap_or_default();
    assert_eq!(heard.bytes(), said.as_bytes());

    // The same bytes from somebody who does not wait: bytes read with the first line end it there.
    let (mut stream, heard) = Peer::new(input, b"");
    let hasty = now(greet(&mut stream, &pass, DOOR)).expect("the peer is never pending");
    assert!(hasty.is_err() || right.is_some());
    assert!(said.as_bytes().starts_with(&heard.bytes()), "said more than to one who waits");
}

/// The relay believes the holder of the pass who answers its own nonce, and sends no proof to anybody else; a door
/// reads no first line but a right one.
pub fn greeting_relay(input: &[u8]) {
    let Ok(line) = std::str::from_utf8(input) else { return };
    let pass = Pass::new(PASS);
    let door = |nonce| Greeting::door(&pass, nonce, &Greeting::opening(&RELAY)).unwrap();
    let nonce = line.split_once(' ').and_then(|(nonce, _)| opening(format!("DAYFLY 1 {nonce}").as_bytes()));
    let right = nonce.is_some_and(|nonce| door(nonce).door_line() == line);
    match Greeting::relay(&pass, RELAY, line) {
        Ok(greeting) => {
            assert!(right, "a wrong line is believed");
            assert_eq!(door(nonce.unwrap()).finish(&greeting.relay_line()), Ok(()));
        }
        Err(_) => assert!(!right, "a right line is not believed"),
    }
    assert!(Greeting::relay(&Pass::new([9; PASS_BYTES]), RELAY, line).is_err(), "believed under another pass");
    assert!(Greeting::relay(&pass, DOOR, line).is_err(), "believed for another nonce");

    let read = Greeting::door(&pass, DOOR, line);
    assert_eq!(read.is_ok(), opening(input).is_some());
    if let Ok(greeting) = read {
        assert!(greeting.finish(line).is_err());
        assert_eq!(line, Greeting::opening(&opening(input).unwrap()));
    }
    assert_eq!(door(DOOR).finish(line).is_ok(), *line == door_proof(&pass));
    if let Some(pass) = Pass::from_text(line) {
        assert_eq!(pass.to_text(), line, "two texts for one pass");
    }
}

/// The third line to a door with [`DOOR`], after [`RELAY`].
fn door_proof(pass: &Pass) -> String {
    let door = Greeting::door(pass, DOOR, &Greeting::opening(&RELAY)).unwrap();
    Greeting::relay(pass, RELAY, &door.door_line()).unwrap().relay_line()
}
