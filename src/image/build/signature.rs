//! Is a list signed with a key that the operator trusts? By `gpgv`, which apt needs and each Debian so has.
//!
//! The key is the operator's own file, armored or not, got by a way of their own: GitLab's documentation names the
//! fingerprint of the day. No key ring of the user's plays a part, and a key that has expired or was revoked is none.

use crate::process::{ProcessError, Program};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `gpgv` reads two small files.
const DEADLINE: Duration = Duration::from_secs(30);

/// GitLab's key with all its subkeys and signatures has 10 KiB.
const KEY_BYTES_MAX: u64 = 1024 * 1024;

const ARMOR_BEGINS: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
const ARMOR_ENDS: &str = "-----END PGP PUBLIC KEY BLOCK-----";

/// Why a signature shows nothing.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The file with the key.
    #[error("read the key {}", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It is no key.
    #[error("use {} as a key: {why}", .path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: &'static str,
    },
    /// The files beside each other for gpgv.
    #[error("write down what is signed, for gpgv")]
    Files(#[source] io::Error),
    /// It could not be asked.
    #[error("ask gpgv (Debian's package gpgv) about the signature")]
    Program(#[source] ProcessError),
    /// What gpgv found.
    #[error("{0}")]
    Bad(String),
}

/// Whether `signature` is one of `signed` with the key in that file.
///
/// # Errors
/// [`SignatureError`]: there is no good signature, or nobody can tell.
///
/// # Cancel safety
/// Dropping the future ends gpgv and removes its files.
pub(super) async fn verify(key: &Path, signed: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
    let ring = key_ring(key)?;
    // A home of its own: nothing of the user's is read.
    let home = tempfile::Builder::new().prefix(".dayfly-key-").tempdir().map_err(SignatureError::Files)?;
    let [ring_at, signed_at, signature_at] = ["key.gpg", "list", "list.asc"].map(|name| home.path().join(name));
    for (path, bytes) in [(&ring_at, ring.as_slice()), (&signed_at, signed), (&signature_at, signature)] {
        fs::write(path, bytes).map_err(SignatureError::Files)?;
    }
    let gpgv = Program::new("gpgv", DEADLINE).args(["--status-fd", "1", "--homedir"]).arg(home.path());
    let ended = gpgv.arg("--keyring").arg(&ring_at).arg(&signature_at).arg(&signed_at).run().await;
    match ended {
        Ok(output) => judge(&output.text()),
        Err(ProcessError::Failed { stderr, .. }) => Err(SignatureError::Bad(in_words(&stderr))),
        Err(error) => Err(SignatureError::Program(error)),
    }
}

/// gpgv's status lines. Its exit code is 0 for a key that has expired, too.
fn judge(status: &str) -> Result<(), SignatureError> {
    let words: Vec<&str> =
        status.lines().filter_map(|line| line.strip_prefix("[GNUPG:] ")?.split_whitespace().next()).collect();
    let bad = |text: &str| Err(SignatureError::Bad(text.to_owned()));
    match () {
        () if words.contains(&"EXPKEYSIG") => bad("it was made with a key that has expired; get the new one"),
        () if words.contains(&"REVKEYSIG") => bad("it was made with a key that was revoked; get the new one"),
        () if words.contains(&"EXPSIG") => bad("the signature has expired"),
        () if words.contains(&"GOODSIG") && words.contains(&"VALIDSIG") => Ok(()),
        () => bad("gpgv finds no good signature"),
    }
}

/// What gpgv has said, less its name and its dates.
fn in_words(stderr: &str) -> String {
    let words: Vec<&str> = stderr.lines().filter_map(|line| line.strip_prefix("gpgv:")).map(str::trim).collect();
    match words.last() {
        Some(last) if last.contains("No public key") => {
            "it was made with another key than the one that is trusted".into()
        }
        Some(last) => (*last).to_owned(),
        None => "gpgv finds no good signature".into(),
    }
}

/// The key as gpgv takes it, which is not armored.
fn key_ring(path: &Path) -> Result<Vec<u8>, SignatureError> {
    let failed = |source: io::Error| SignatureError::Key { path: path.to_owned(), source };
    let no_key = |why: &'static str| SignatureError::NoKey { path: path.to_owned(), why };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > KEY_BYTES_MAX {
        return Err(no_key("it has more than 1 MiB"));
    }
    let bytes = fs::read(path).map_err(failed)?;
    let Ok(text) = std::str::from_utf8(&bytes) else { return Ok(bytes) };
    let armored = text.split_once(ARMOR_BEGINS).and_then(|(_, rest)| rest.split_once(ARMOR_ENDS));
    let Some((armored, _)) = armored else {
        return Err(no_key("it is text, and no `PGP PUBLIC KEY BLOCK`"));
    };
    // Headers end with an empty line; what begins with `=` is a checksum (RFC 4880, 6.2).
    let lines = armored.lines().map(str::trim).skip(1).skip_while(|line| !line.is_empty());
    let body: String = lines.take_while(|line| !line.starts_with('=')).collect();
    STANDARD.decode(body).map_err(|_| no_key("its armor is damaged"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_signature_that_is_good_today_is_good() {
        let valid = "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG AB Somebody\n[GNUPG:] VALIDSIG CD 2026-11-30\n";
        judge(valid).unwrap();
        for (status, part) in [
            (valid.replace("GOODSIG", "EXPKEYSIG"), "has expired; get the new one"),
            (valid.replace("GOODSIG", "REVKEYSIG"), "was revoked"),
            (valid.replace("GOODSIG", "EXPSIG"), "the signature has expired"),
            ("[GNUPG:] NEWSIG\n".into(), "no good signature"),
            // A name may say anything.
            ("[GNUPG:] ERRSIG GOODSIG VALIDSIG\n".into(), "no good signature"),
            (String::new(), "no good signature"),
        ] {
            let error = judge(&status).unwrap_err().to_string();
            assert!(error.contains(part), "{status}: {error}");
        }
    }

    #[test]
    fn what_is_no_key_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        let told = |content: &[u8]| {
            fs::write(&file, content).unwrap();
            key_ring(&file).map_err(|error| error.to_string())
        };
        assert_eq!(told(&[0x99, 0xff, 0x01]), Ok(vec![0x99, 0xff, 0x01]));
        let armored = format!("of somebody\n{ARMOR_BEGINS}\nComment: x\n\nAQID\n=abcd\n{ARMOR_ENDS}\n");
        assert_eq!(told(armored.as_bytes()), Ok(vec![1, 2, 3]));
        assert!(told(b"<html>").unwrap_err().contains("no `PGP PUBLIC KEY BLOCK`"));
        assert!(told(armored.replace("AQID", "A?ID").as_bytes()).unwrap_err().contains("armor is damaged"));
        assert!(key_ring(&dir.path().join("none")).unwrap_err().to_string().contains("read the key"));
    }
}
