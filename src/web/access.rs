//! Who may see what on the status listener?
//!
//! | address | without the token | with it |
//! | --- | --- | --- |
//! | a unix socket, the host's loopback | all but consoles | all |
//! | any other | `/healthz` | all |
//!
//! The token comes as `Authorization: Bearer`, as a Prometheus sends it, or as the password of `Basic`, which browsers ask
//! for by themselves; whatever else is shown of it is refused. On loopback a request must name the host by address: a page
//! of somebody else's, open in a browser of this host, could have its own name lead here.

use super::Address;
use crate::files::{plain, private};
use crate::secret::Secret;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, HOST, HeaderMap};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::Path;

/// Bytes of a token at least: nobody guesses those.
const TOKEN_BYTES_MIN: usize = 32;

/// Bytes of its file at most.
const TOKEN_FILE_BYTES_MAX: u64 = 4096;

/// What somebody may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sight {
    /// That the process turns.
    Health,
    /// All but consoles.
    Status,
    /// All.
    All,
}

/// What is known of a request's right to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judged {
    /// It may see so much.
    May(Sight),
    /// It shows a token that is none.
    Wrong,
    /// It names a host that this is not.
    Elsewhere,
}

/// By what a request is judged.
#[derive(Debug)]
pub(super) struct Access {
    token: Option<Secret>,
    /// Without the token.
    open: Sight,
    /// A host's name is no way to this address.
    by_address_only: bool,
}

impl Access {
    pub(super) fn of(address: &Address, token: Option<Secret>) -> Self {
        let open = if address.is_local() { Sight::Status } else { Sight::Health };
        Self { token, open, by_address_only: matches!(address, Address::Tcp(_)) && address.is_local() }
    }

    /// Nobody sees more than that the process turns.
    pub(super) fn closed() -> Self {
        Self { token: None, open: Sight::Health, by_address_only: false }
    }

    /// Whether there is a token to be shown.
    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    pub(super) fn judge(&self, headers: &HeaderMap) -> Judged {
        if self.by_address_only && headers.get(HOST).is_some_and(|host| !host.to_str().is_ok_and(names_an_address)) {
            return Judged::Elsewhere;
        }
        let Some(shown) = headers.get(AUTHORIZATION) else { return Judged::May(self.open) };
        let shown = shown.to_str().ok().and_then(shown_token);
        match (&self.token, shown) {
            (Some(token), Some(shown)) if token.matches(&shown) => Judged::May(Sight::All),
            _ => Judged::Wrong,
        }
    }
}

/// `127.0.0.1:9480`, `[::1]`, `localhost`.
fn names_an_address(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok()
}

/// The token of an `Authorization`.
fn shown_token(value: &str) -> Option<String> {
    let (scheme, rest) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let text = String::from_utf8(STANDARD.decode(rest.trim()).ok()?).ok()?;
        return text.split_once(':').map(|(_, password)| password.to_owned());
    }
    None
}

/// The token in this file: one line of 32 characters at least, readable by its owner alone.
///
/// # Errors
/// The file system's, or `InvalidData` with a remedy; never with what the file holds.
pub fn token(path: &Path) -> io::Result<Secret> {
    let file = plain::open_chosen(path)?;
    if let Some(mode) = private::too_open(path, &file.metadata()?) {
        let why = format!("mode {mode:03o} lets others read it; make it 0600");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let mut text = String::new();
    file.take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text)?;
    let token = text.trim();
    if token.len() < TOKEN_BYTES_MIN || !token.chars().all(|c| c.is_ascii_graphic()) {
        let why =
            format!("it holds no token of {TOKEN_BYTES_MIN} characters or more; `openssl rand -hex 32` makes one");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(Secret::new(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn judge(address: &str, token: Option<&str>, shown: &[(&'static str, String)]) -> Judged {
        let access = Access::of(&address.parse().unwrap(), token.map(Secret::new));
        let mut headers = HeaderMap::new();
        for (name, value) in shown {
            headers.insert(*name, value.parse().unwrap());
        }
        access.judge(&headers)
    }

    /// T35: what is seen, from where, with the token and without.
    #[test]
    fn consoles_want_the_token_and_from_afar_everything_does() {
        let bearer = |token: &str| [("authorization", format!("Bearer {token}"))];
        let basic = |text: &str| [("authorization", format!("Basic {}", STANDARD.encode(text)))];
        for (address, open) in
            [("/run/s", Sight::Status), ("127.0.0.1:1", Sight::Status), ("10.0.0.1:1", Sight::Health)]
        {
            assert_eq!(judge(address, Some(TOKEN), &[]), Judged::May(open), "{address}");
            assert_eq!(judge(address, Some(TOKEN), &bearer(TOKEN)), Judged::May(Sight::All), "{address}");
            assert_eq!(judge(address, Some(TOKEN), &basic(&format!("me:{TOKEN}"))), Judged::May(Sight::All));
            for wrong in [bearer("x"), bearer(&TOKEN[1..]), basic("me:x"), basic(TOKEN)] {
                assert_eq!(judge(address, Some(TOKEN), &wrong), Judged::Wrong, "{address}");
            }
            assert_eq!(judge(address, None, &bearer("")), Judged::Wrong, "no token is no empty one");
        }
    }

    /// T35: a name that somebody else leads here is not answered on loopback.
    #[test]
    fn on_loopback_a_host_is_named_by_its_address() {
        let host = |host: &str| [("host", host.to_owned())];
        for good in ["127.0.0.1:9480", "localhost", "localhost:9480", "[::1]:9480", "[::1]"] {
            assert_eq!(judge("127.0.0.1:9480", None, &host(good)), Judged::May(Sight::Status), "{good}");
        }
        for bad in ["evil.example", "evil.example:9480", "127.0.0.1.evil.example", ""] {
            assert_eq!(judge("127.0.0.1:9480", None, &host(bad)), Judged::Elsewhere, "{bad}");
            assert_eq!(judge("/run/s", None, &host(bad)), Judged::May(Sight::Status), "a proxy has names of its own");
        }
    }

    #[test]
    fn a_token_file_is_long_and_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let write = |text: &str, mode: u32| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            token(&path)
        };
        assert!(write(&format!("{TOKEN}\n"), 0o600).unwrap().matches(TOKEN));
        let told = write(&format!("{TOKEN}\n"), 0o644).unwrap_err().to_string();
        assert!(told.contains("make it 0600") && !told.contains(TOKEN), "{told}");
        assert!(write("short\n", 0o600).unwrap_err().to_string().contains("openssl rand"));
    }
}
