//! The runner's system id, as the official runner derives it.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::fmt::Write as _;

/// The system id that gitlab-runner shows and sends for a machine-id (32 hex digits, no line break).
///
/// `s_` + the first 12 hex digits of HMAC-SHA256 (key = machine-id, message = `gitlab-runner`);
/// checked against five logs of the official runner (decision D9).
///
/// # Panics
/// Never: HMAC takes keys of any length.
#[must_use]
pub fn system_id(machine_id: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(machine_id.as_bytes()).expect("any key length");
    mac.update(b"gitlab-runner");
    let digest = mac.finalize().into_bytes();
    digest[..6].iter().fold(String::from("s_"), |mut id, byte| {
        write!(id, "{byte:02x}").expect("a String takes all");
        id
    })
}
