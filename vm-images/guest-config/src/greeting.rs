//! The greeting: three lines before any HTTP, by which relay and door prove the pass to each other.
//!
//! ```text
//! relay → door   DAYFLY 1 <relay's nonce>
//! door → relay   <door's nonce> <door's proof>
//! relay → door   <relay's proof>
//! ```
//!
//! CR LF ends each. A nonce is 16 random bytes, hex. A proof is HMAC-SHA256 under the pass over
//! `role NUL relay's nonce NUL door's nonce`, hex. The door proves itself first: while the daemon
//! is away another process of the host could hold its port, and must learn nothing (decision D22).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::fmt;
use std::fmt::Write as _;
use subtle::ConstantTimeEq as _;

/// Bytes of a pass: 256 bits.
pub const PASS_BYTES: usize = 32;

/// Bytes of one greeting line at most, its line break not counted. The longest real one has 97.
pub const GREETING_LINE_MAX: usize = 160;

/// The right of one guest to its door.
#[derive(Clone)]
pub struct Pass([u8; PASS_BYTES]);

impl Pass {
    /// A pass of these random bytes.
    #[must_use]
    pub fn new(bytes: [u8; PASS_BYTES]) -> Self {
        Self(bytes)
    }

    /// base64url without padding: 43 characters.
    #[must_use]
    pub fn to_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// Reads [`Pass::to_text`].
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        Some(Self(bytes.try_into().ok()?))
    }

    /// What a guest and the program that carries its egress believe each other by: of the same secret, and worth nothing
    /// at the door.
    #[must_use]
    pub fn for_egress(&self) -> Self {
        Self(self.prove(&[b"dayfly egress"]))
    }

    /// What a guest and the daemon believe each other by when that asks for a shell: likewise.
    #[must_use]
    pub fn for_shell(&self) -> Self {
        Self(self.prove(&[b"dayfly shell"]))
    }

    /// HMAC-SHA256 under the pass over these parts, one after the other.
    pub(crate) fn prove(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("any key length");
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// 16 random bytes, made anew for each connection.
pub type Nonce = [u8; 16];

/// Why a greeting failed. Says nothing that would help a guesser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GreetingError {
    /// A line is not of the form above.
    #[error("greeting line is malformed")]
    Malformed,
    /// The other side does not hold the pass.
    #[error("greeting proof is wrong")]
    WrongProof,
}

/// The pure part of the greeting: lines in, lines out. Lines come and go without CR LF.
#[derive(Debug)]
pub struct Greeting {
    pass: Pass,
    relay: Nonce,
    door: Nonce,
}

impl Greeting {
    /// Line 1, the relay's opening.
    #[must_use]
    pub fn opening(relay: &Nonce) -> String {
        format!("DAYFLY 1 {}", hex(relay))
    }

    /// Door: reads line 1.
    ///
    /// # Errors
    /// [`GreetingError::Malformed`].
    pub fn door(pass: &Pass, door: Nonce, opening: &str) -> Result<Self, GreetingError> {
        let relay = opening.strip_prefix("DAYFLY 1 ").and_then(nonce).ok_or(GreetingError::Malformed)?;
        Ok(Self { pass: pass.clone(), relay, door })
    }

    /// Door: line 2.
    #[must_use]
    pub fn door_line(&self) -> String {
        format!("{} {}", hex(&self.door), self.proof("door"))
    }

    /// Relay: reads line 2 and believes the door from here on.
    ///
    /// # Errors
    /// [`GreetingError::Malformed`], or [`GreetingError::WrongProof`]: send nothing.
    pub fn relay(pass: &Pass, relay: Nonce, door_line: &str) -> Result<Self, GreetingError> {
        let (door, proof) = door_line.split_once(' ').ok_or(GreetingError::Malformed)?;
        let door = nonce(door).ok_or(GreetingError::Malformed)?;
        let greeting = Self { pass: pass.clone(), relay, door };
        greeting.check("door", proof)?;
        Ok(greeting)
    }

    /// Relay: line 3.
    #[must_use]
    pub fn relay_line(&self) -> String {
        self.proof("relay")
    }

    /// Door: reads line 3 and believes the relay from here on.
    ///
    /// # Errors
    /// [`GreetingError::WrongProof`].
    pub fn finish(&self, relay_line: &str) -> Result<(), GreetingError> {
        self.check("relay", relay_line)
    }

    fn proof(&self, role: &str) -> String {
        let (relay, door) = (hex(&self.relay), hex(&self.door));
        hex(&self.pass.prove(&[role.as_bytes(), b"\0", relay.as_bytes(), b"\0", door.as_bytes()]))
    }

    fn check(&self, role: &str, proof: &str) -> Result<(), GreetingError> {
        if bool::from(self.proof(role).as_bytes().ct_eq(proof.as_bytes())) {
            Ok(())
        } else {
            Err(GreetingError::WrongProof)
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes all");
        text
    })
}

/// Exactly 32 lower-case hex digits.
fn nonce(text: &str) -> Option<Nonce> {
    let digits = text.as_bytes();
    if digits.len() != 32 || !digits.iter().all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(n: u8) -> Pass {
        Pass::new([n; PASS_BYTES])
    }

    #[test]
    fn both_sides_believe_the_holder_of_the_pass() {
        let door = Greeting::door(&pass(1), [2; 16], &Greeting::opening(&[3; 16])).unwrap();
        let relay = Greeting::relay(&pass(1), [3; 16], &door.door_line()).unwrap();
        assert_eq!(door.finish(&relay.relay_line()), Ok(()));
    }

    #[test]
    fn the_pass_of_the_egress_is_worth_nothing_at_the_door() {
        let egress = pass(1).for_egress();
        assert_ne!(egress.to_text(), pass(1).to_text());
        assert_eq!(egress.to_text(), pass(1).for_egress().to_text());
        // HMAC-SHA256 under 32 bytes of 1 over "dayfly egress": both sides may be of different versions.
        assert_eq!(egress.to_text(), "bmPV6KlBoP0sIJ2Rv8uhEg16qgDwPJs1uEE8VlVHY4M");
        let door = Greeting::door(&pass(1), [2; 16], &Greeting::opening(&[3; 16])).unwrap();
        assert_eq!(Greeting::relay(&egress, [3; 16], &door.door_line()).unwrap_err(), GreetingError::WrongProof);
    }

    #[test]
    fn neither_side_believes_another_pass() {
        let door = Greeting::door(&pass(1), [2; 16], &Greeting::opening(&[3; 16])).unwrap();
        assert_eq!(Greeting::relay(&pass(9), [3; 16], &door.door_line()).unwrap_err(), GreetingError::WrongProof);
        // A door's own proof, reflected, is no relay's proof.
        let (_, reflected) = door.door_line().split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        assert_eq!(door.finish(&reflected), Err(GreetingError::WrongProof));
        // A proof of another connection, replayed.
        let other = Greeting::door(&pass(1), [7; 16], &Greeting::opening(&[3; 16])).unwrap();
        let relay = Greeting::relay(&pass(1), [3; 16], &door.door_line()).unwrap();
        assert_eq!(other.finish(&relay.relay_line()), Err(GreetingError::WrongProof));
    }

    #[test]
    fn malformed_openings_are_refused() {
        for line in [
            "",
            "DAYFLY 1",
            "DAYFLY 2 00000000000000000000000000000000",
            "DAYFLY 1 0",
            "DAYFLY 1 0000000000000000000000000000000G",
            "DAYFLY 1 +0000000000000000000000000000000",
        ] {
            assert_eq!(Greeting::door(&pass(1), [2; 16], line).unwrap_err(), GreetingError::Malformed, "{line}");
        }
    }

    #[test]
    fn no_line_is_longer_than_the_limit() {
        let door = Greeting::door(&pass(1), [2; 16], &Greeting::opening(&[3; 16])).unwrap();
        assert!(door.door_line().len() <= GREETING_LINE_MAX);
    }
}
