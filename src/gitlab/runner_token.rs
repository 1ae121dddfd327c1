//! The runner token: where it comes from, and which part of it a guest may see.

use super::calls::is_token;
use crate::files::{plain, private};
use crate::secret::Secret;
use std::path::{Path, PathBuf};

/// Characters after the prefix that the official runner itself prints into every job log
/// (its `ShortenToken`), so that they are no secret.
const PUBLIC_CHARS: usize = 9;
/// A token file is one line.
const FILE_BYTES_MAX: u64 = 4096;

/// A runner authentication token. Only `gitlab::runner_api` turns it into a request.
#[derive(Clone, Debug)]
pub struct RunnerToken(pub(super) Secret);

/// Why a token file cannot be used; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("read token file `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Others may read it.
    #[error("token file `{}` has mode {mode:o}; make it 0600", path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another cannot be put in its place.
    #[error("replace token file `{}`", path.display())]
    Replace {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// It holds no token.
    #[error("token file `{}` must hold one line with the token", path.display())]
    Content {
        /// The file.
        path: PathBuf,
    },
}

impl RunnerToken {
    /// Takes a token as typed; blanks around it are cut off.
    ///
    /// What can't be a token (blanks inside, control characters, not ASCII) becomes the empty
    /// one, which GitLab refuses like any other wrong one.
    #[must_use]
    pub fn new(token: Secret) -> Self {
        let trimmed = token.expose().trim();
        Self(Secret::new(if is_token(trimmed) { trimmed } else { "" }))
    }

    /// Reads a token file: one line, and nobody else may read it ([`private::too_open`]).
    ///
    /// # Errors
    /// [`TokenFileError`], naming the file and never its content.
    pub fn from_file(path: &Path) -> Result<Self, TokenFileError> {
        use std::io::Read as _;
        let failed = |source| TokenFileError::Read { path: path.to_owned(), source };
        // Mode and content are those of one open file, whatever happens to the name meanwhile.
        let file = plain::open_chosen(path).map_err(failed)?;
        if let Some(mode) = private::too_open(path, &file.metadata().map_err(failed)?) {
            return Err(TokenFileError::Mode { path: path.to_owned(), mode });
        }
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
        if bytes.len() as u64 > FILE_BYTES_MAX || !is_token(text) {
            return Err(TokenFileError::Content { path: path.to_owned() });
        }
        Ok(Self(Secret::new(text)))
    }

    /// What a token file holds: it, and a line's end.
    #[must_use]
    pub fn to_file(&self) -> Vec<u8> {
        format!("{}\n", self.0.expose()).into_bytes()
    }

    /// Whether its runner was made in GitLab (or by its API), where it is deleted, too; others come from a registration
    /// token.
    #[must_use]
    pub fn is_of_a_runner_made_in_gitlab(&self) -> bool {
        self.0.expose().starts_with("glrt-")
    }

    /// Whether it is the same token.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.0.matches(other.0.expose())
    }

    /// The token for config.toml in a guest: this one's whole prefix, its next 9 characters, and
    /// `random` (decision D9). It only has to look right; it is no secret of GitLab's.
    ///
    /// Of a token so short that 9 characters would be more than half of it, half is shown. (GitLab
    /// makes none that short: 20 characters follow the prefix.)
    #[must_use]
    pub fn guest_token(&self, random: &str) -> String {
        let token = self.0.expose();
        let (prefix, rest) = token.split_at(prefix_bytes(token));
        let shown = PUBLIC_CHARS.min(rest.len() / 2);
        format!("{prefix}{}{random}", &rest[..shown])
    }
}

/// Length of the token's prefix: the kind, then the partition of routable tokens (`t1_`: instance,
/// `t2_`: group, `t3_`: project). Runners before 18.2 don't count the partition to the prefix.
fn prefix_bytes(token: &str) -> usize {
    let kind =
        ["glrtr-", "glrt-", "GR1348941"].iter().find(|kind| token.starts_with(**kind)).map_or(0, |kind| kind.len());
    match &token.as_bytes()[kind..] {
        [b't', digit, b'_', ..] if digit.is_ascii_digit() => kind + 3,
        _ => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn guest(token: &str) -> String {
        RunnerToken::new(Secret::new(token)).guest_token("-rnd")
    }

    /// T1: a guest sees the prefix and the 9 characters that every job log shows, and no more.
    #[test]
    fn a_guest_sees_prefix_and_nine_characters() {
        let body = "ABCDEFGHIJKLMNOPQRST";
        for prefix in ["glrt-", "glrt-t1_", "glrt-t3_", "glrtr-", "GR1348941", "t2_", ""] {
            assert_eq!(guest(&format!("{prefix}{body}")), format!("{prefix}ABCDEFGHI-rnd"), "{prefix}");
        }
        assert_eq!(guest("glrt-tx_FGHIJKLMNOPQRSTU"), "glrt-tx_FGHIJK-rnd");
    }

    proptest::proptest! {
        /// T1: whatever the token, at most 9 characters after the prefix are shown, and never all of them.
        #[test]
        fn a_guest_never_sees_a_whole_token(prefix in "(glrt-|glrtr-|GR1348941|)(t[0-9]_|)", body in "[A-Zu-z0-9.-]{1,40}") {
            let token = format!("{prefix}{body}");
            let shown = RunnerToken::new(Secret::new(token.as_str())).guest_token("");
            proptest::prop_assert!(token.starts_with(&shown));
            proptest::prop_assert!(shown.len() < token.len());
            proptest::prop_assert!(shown.len() <= prefix.len() + 9, "{} of {}", shown, token);
        }
    }

    /// T31: a token that others may read is refused, with the path; the token is in no message.
    #[test]
    fn token_files_are_private_and_hold_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let check = |content: &[u8], mode: u32| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            RunnerToken::from_file(&path)
        };
        assert_eq!(check(b"glrt-abc\n", 0o600).unwrap().0.expose(), "glrt-abc");
        assert_eq!(check(b"  glrt-abc\r\n", 0o400).unwrap().0.expose(), "glrt-abc");
        for mode in [0o644, 0o640, 0o604, 0o660, 0o620] {
            let error = check(b"glrt-abc\n", mode).unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(
                matches!(error, TokenFileError::Mode { .. }) && text.contains("/token") && !text.contains("glrt-abc"),
                "{text}"
            );
        }
        for content in
            [&b""[..], b"\n", b"glrt-a b\n", b"glrt-a\nglrt-b\n", b"glrt-\xff\n", b"glrt-\x1b\n", &[b'x'; 5000]]
        {
            assert!(matches!(check(content, 0o600), Err(TokenFileError::Content { .. })), "{content:?}");
        }
        assert!(matches!(RunnerToken::from_file(&dir.path().join("none")), Err(TokenFileError::Read { .. })));
    }

    /// U29: a token file that is a FIFO keeps no daemon from its start.
    #[test]
    fn a_token_file_that_is_a_fifo_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        plain::tests::fifo(&path);
        let read = plain::tests::in_time(move || RunnerToken::from_file(&path));
        assert!(matches!(read, Err(TokenFileError::Read { .. })));
    }

    /// T31: in no form of printing.
    #[test]
    fn a_token_never_prints_itself() {
        assert_eq!(format!("{:?}", RunnerToken::new(Secret::new("glrt-abc"))), "RunnerToken([redacted])");
    }
}
