//! The proofs of a session on the wire: those of the greeting, for two nonces that the handshake carries as bytes.
//!
//! The handshake itself, what is scanned for and repeated, is `dayfly_wire`'s. The roles' names differ from the
//! greeting's, so that a proof which was heard on one of the two is worth nothing on the other.

use crate::{Nonce, Pass};
use subtle::ConstantTimeEq as _;

/// Bytes of a proof.
pub const PROOF_BYTES: usize = 32;

/// What both ends prove to each other, and how each checks the other (decision D22).
#[derive(Debug)]
pub struct SessionProofs {
    pass: Pass,
    door: Nonce,
    relay: Nonce,
}

impl SessionProofs {
    /// Those of the session with these two nonces, each made anew by its side.
    #[must_use]
    pub fn new(pass: &Pass, door: Nonce, relay: Nonce) -> Self {
        Self { pass: pass.clone(), door, relay }
    }

    /// What the door sends, first.
    #[must_use]
    pub fn of_door(&self) -> [u8; PROOF_BYTES] {
        self.proof("wire door")
    }

    /// What the relay sends to a door that has proven itself.
    #[must_use]
    pub fn of_relay(&self) -> [u8; PROOF_BYTES] {
        self.proof("wire relay")
    }

    /// Does the other side, the door, hold the pass? In constant time.
    #[must_use]
    pub fn is_of_door(&self, proof: &[u8; PROOF_BYTES]) -> bool {
        self.of_door().ct_eq(proof).into()
    }

    /// Does the other side, the relay, hold the pass? In constant time.
    #[must_use]
    pub fn is_of_relay(&self, proof: &[u8; PROOF_BYTES]) -> bool {
        self.of_relay().ct_eq(proof).into()
    }

    fn proof(&self, role: &str) -> [u8; PROOF_BYTES] {
        self.pass.prove(&[role.as_bytes(), b"\0", &self.relay, b"\0", &self.door])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Greeting, PASS_BYTES};

    fn pass(n: u8) -> Pass {
        Pass::new([n; PASS_BYTES])
    }

    #[test]
    fn a_proof_holds_for_its_role_its_nonces_and_its_pass() {
        let ours = SessionProofs::new(&pass(1), [2; 16], [3; 16]);
        assert!(ours.is_of_door(&ours.of_door()) && ours.is_of_relay(&ours.of_relay()));
        assert!(!ours.is_of_door(&ours.of_relay()) && !ours.is_of_relay(&ours.of_door()));
        let others = [
            SessionProofs::new(&pass(9), [2; 16], [3; 16]),
            SessionProofs::new(&pass(1), [3; 16], [2; 16]),
            SessionProofs::new(&pass(1), [2; 16], [4; 16]),
        ];
        for other in others {
            assert!(!ours.is_of_door(&other.of_door()) && !ours.is_of_relay(&other.of_relay()));
        }
    }

    #[test]
    fn a_proof_of_the_greeting_is_none_of_a_session() {
        let greeting = Greeting::door(&pass(1), [2; 16], &Greeting::opening(&[3; 16])).unwrap();
        let session = SessionProofs::new(&pass(1), [2; 16], [3; 16]);
        let hex = |bytes: [u8; PROOF_BYTES]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert!(!greeting.door_line().contains(&hex(session.of_door())));
        assert_eq!(greeting.finish(&hex(session.of_relay())), Err(crate::GreetingError::WrongProof));
    }
}
