//! Secrets that betray themselves: runner tokens with a known part, and a search for it in whatever
//! leaves the daemon, however it may be encoded (safety.md T1, invariant 7).
//!
//! Every test rig gives its runners tokens of [`runner_token`], so that one search over all output
//! of the suite finds any of them; `canary` of the test tools is that search as a program.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// What stands behind prefix and nine public characters of every runner token.
pub const RUNNER_CANARY: &str = "RuNnErCaNaRy";

/// The token of the n-th runner of a rig.
pub fn runner_token(number: u64) -> String {
    format!("glrt-public{:03}{RUNNER_CANARY}{number}", number % 1000)
}

/// Looks for one secret in all its encodings.
pub struct Search {
    /// Name of the encoding, and what to look for.
    needles: Vec<(&'static str, String)>,
}

impl Search {
    /// For this secret, of ASCII characters and at least four of them.
    pub fn new(secret: &str) -> Self {
        let escaped = |prefix: &str, upper: bool| {
            let hex = |byte| if upper { format!("{prefix}{byte:02X}") } else { format!("{prefix}{byte:02x}") };
            secret.bytes().map(hex).collect::<String>()
        };
        let mut needles = vec![("raw", secret.to_owned()), ("reversed", secret.chars().rev().collect())];
        for upper in [false, true] {
            needles.push(("hex", escaped("", upper)));
            needles.push(("hex, spaced", escaped(" ", upper).trim_start().to_owned()));
            needles.push(("URL-escaped", escaped("%", upper)));
            needles.push(("JSON-escaped", escaped("\\u00", upper)));
            needles.push(("escaped bytes", escaped("\\x", upper)));
        }
        for alphabet in [STANDARD, URL_SAFE] {
            for before in 0..3 {
                needles.push(("base64", base64_middle(secret.as_bytes(), before, alphabet)));
            }
        }
        let mut seen = BTreeSet::new();
        needles.retain(|(_, needle)| seen.insert(needle.clone()));
        Self { needles }
    }

    /// The encodings in which the secret is in there.
    pub fn find(&self, bytes: &[u8]) -> Vec<&'static str> {
        // All needles are ASCII, which stays what it is whatever stands around it.
        let text = String::from_utf8_lossy(bytes);
        self.needles.iter().filter(|(_, needle)| text.contains(needle.as_str())).map(|(name, _)| *name).collect()
    }

    /// Bytes of the longest needle: what must overlap where something is searched in pieces.
    pub fn longest(&self) -> usize {
        self.needles.iter().map(|(_, needle)| needle.len()).max().unwrap_or(0)
    }
}

const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const URL_SAFE: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The base64 characters that depend on nothing but `secret` where `before` bytes (0 to 2) stand
/// before it in its group of three.
fn base64_middle(secret: &[u8], before: usize, alphabet: &[u8; 64]) -> String {
    let bits: Vec<u8> = secret.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    // The first whole character begins so many bits into the secret.
    let skip = (6 - before * 8 % 6) % 6;
    let character = |six: &[u8]| char::from(alphabet[usize::from(six.iter().fold(0, |n, bit| n << 1 | bit))]);
    bits[skip..].chunks_exact(6).map(character).collect()
}

static RUNNER: LazyLock<Search> = LazyLock::new(|| Search::new(RUNNER_CANARY));

/// Looks at everything that leaves a daemon. Clones are one.
#[derive(Clone, Default)]
pub struct Spy(Arc<Mutex<Vec<String>>>);

impl Spy {
    /// Looks at `bytes`, which were found or are going `place`.
    pub fn look(&self, place: &str, bytes: &[u8]) {
        for encoding in RUNNER.find(bytes) {
            let found = format!("{place}: a runner token, {encoding}");
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(found);
        }
    }

    /// What was found.
    pub fn found(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
