//! Secrets that betray themselves: runner tokens with a known part, and a search for it in whatever
//! leaves the daemon, however it may be encoded (threats.md T1, invariant 7).
//!
//! Every test rig gives its runners tokens of [`runner_token`], so that one search over all output
//! of the suite finds any of them; `canary` of the test tools is that search as a program.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// What stands behind prefix and nine public characters of every runner token.
pub const RUNNER_CANARY: &str = "RuNnErCaNaRy";

/// The token of the n-th runner of a rig.
pub fn runner_token(number: u64) -> String {
    format!("glrt-public{:03}{RUNNER_CANARY}{number}", number % 1000)
}

/// Looks for one secret in all its encodings.
pub struct Search {
    /// Name of the encoding, and what to look for.
    needles: Vec<(&'static str, Vec<u8>)>,
}

impl Search {
    /// For this text, of at least four ASCII characters.
    pub fn new(secret: &str) -> Self {
        Self::of_bytes(secret.as_bytes())
    }

    /// For these bytes, a key's say; at least four.
    pub fn of_bytes(secret: &[u8]) -> Self {
        let escaped = |prefix: &str, upper: bool| {
            let hex = |byte| if upper { format!("{prefix}{byte:02X}") } else { format!("{prefix}{byte:02x}") };
            secret.iter().map(hex).collect::<String>()
        };
        let mut needles = vec![("raw", secret.to_owned()), ("reversed", secret.iter().rev().copied().collect())];
        let mut text = |name, needle: String| needles.push((name, needle.into_bytes()));
        for upper in [false, true] {
            text("hex", escaped("", upper));
            text("hex, spaced", escaped(" ", upper).trim_start().to_owned());
            text("URL-escaped", escaped("%", upper));
            text("JSON-escaped", escaped("\\u00", upper));
            text("escaped bytes", escaped("\\x", upper));
        }
        for alphabet in [STANDARD, URL_SAFE] {
            for before in 0..3 {
                text("base64", base64_middle(secret, before, alphabet));
            }
        }
        // As `{:?}` prints it.
        text("list of numbers", secret.iter().map(u8::to_string).collect::<Vec<_>>().join(", "));
        let mut seen = BTreeSet::new();
        needles.retain(|(_, needle)| seen.insert(needle.clone()));
        Self { needles }
    }

    /// The encodings in which the secret is in there.
    pub fn find(&self, bytes: &[u8]) -> Vec<&'static str> {
        // ASCII stays what it is whatever stands around it.
        let text = String::from_utf8_lossy(bytes);
        let holds = |needle: &[u8]| match std::str::from_utf8(needle) {
            Ok(needle) if needle.is_ascii() => text.contains(needle),
            _ => bytes.windows(needle.len()).any(|window| window == needle),
        };
        self.needles.iter().filter(|(_, needle)| holds(needle)).map(|(name, _)| *name).collect()
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

/// Looks at everything that leaves a daemon, for the runners' tokens and what else it is told. Clones are one.
#[derive(Clone, Default)]
pub struct Spy {
    /// Other secrets of this rig, by their names.
    others: Arc<Mutex<Vec<(&'static str, Search)>>>,
    found: Arc<Mutex<Vec<String>>>,
}

impl Spy {
    /// From now on looks for this one, too.
    pub fn look_for(&self, name: &'static str, search: Search) {
        locked(&self.others).push((name, search));
    }

    /// Another one that looks for the same, and has found nothing.
    pub fn afresh(&self) -> Self {
        Self { others: self.others.clone(), found: Arc::default() }
    }

    /// Looks at `bytes`, which were found or are going `place`.
    pub fn look(&self, place: &str, bytes: &[u8]) {
        let others = locked(&self.others);
        let others =
            others.iter().flat_map(|(name, search)| search.find(bytes).into_iter().map(move |how| (*name, how)));
        for (name, encoding) in RUNNER.find(bytes).into_iter().map(|how| ("a runner token", how)).chain(others) {
            locked(&self.found).push(format!("{place}: {name}, {encoding}"));
        }
    }

    /// What was found.
    pub fn found(&self) -> Vec<String> {
        locked(&self.found).clone()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
