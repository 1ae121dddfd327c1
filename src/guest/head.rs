//! Is this head one that we serve? The raw bytes of a request's head, checked before hyper sees them.
//!
//! hyper accepts what a strict server should not (both framings at once, two `Content-Length`, bare
//! line feeds, no or two `Host`, absolute targets: threats.md §6.4), and the raw head is gone once
//! hyper has parsed it. So [`super::wire`] hands hyper a head only after [`check`] has passed it,
//! whole. Pure: bytes in, verdict out.

/// Bytes of a head at most, its empty line included.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Header fields at most.
pub const FIELDS_MAX: usize = 48;
/// Bytes of a request target at most.
pub const TARGET_BYTES_MAX: usize = 2 * 1024;
/// Bytes of a method at most; the longest that HTTP registers has 17, the longest here 7.
const METHOD_BYTES_MAX: usize = 16;

/// How the body that follows a head is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes; 0 without a body.
    Length(u64),
    /// Chunks.
    Chunked,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 400.
    Malformed,
    /// 414.
    TargetTooLong,
    /// 431.
    TooLarge,
}

/// What [`scan`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// More bytes are needed.
    Partial,
    /// The head is this many bytes, its empty line included.
    Whole(usize),
}

/// Looks for the head's end in `bytes`, whose first `scanned` bytes were looked at before; updates
/// `scanned`. Refuses as early as it can, so that a TLS hello or garbage is answered at once.
pub fn scan(bytes: &[u8], scanned: &mut usize) -> Result<Scan, Refusal> {
    for (at, byte) in bytes.iter().copied().enumerate().skip(*scanned) {
        let before = at.checked_sub(1).map(|before| bytes[before]);
        match byte {
            b'\n' if before != Some(b'\r') => return Err(Refusal::Malformed),
            _ if before == Some(b'\r') && byte != b'\n' => return Err(Refusal::Malformed),
            b'\n' if bytes[..=at].ends_with(b"\r\n\r\n") => {
                *scanned = 0;
                return if at < HEAD_BYTES_MAX { Ok(Scan::Whole(at + 1)) } else { Err(Refusal::TooLarge) };
            }
            b'\n' | b'\r' | b'\t' | b' '..=b'~' => {}
            _ => return Err(Refusal::Malformed),
        }
        if at == 0 && !byte.is_ascii_uppercase() {
            return Err(Refusal::Malformed);
        }
        if at == METHOD_BYTES_MAX && !bytes[..=at].contains(&b' ') {
            return Err(Refusal::Malformed);
        }
        // The request line alone is beyond its bound: say so, rather than that the head is too large.
        if at == METHOD_BYTES_MAX + TARGET_BYTES_MAX + " HTTP/1.1 ".len() && !bytes[..=at].contains(&b'\n') {
            return Err(Refusal::TargetTooLong);
        }
    }
    *scanned = bytes.len();
    if bytes.len() > HEAD_BYTES_MAX { Err(Refusal::TooLarge) } else { Ok(Scan::Partial) }
}

/// Checks a whole head, as [`scan`] found it.
pub fn check(head: &[u8]) -> Result<Framing, Refusal> {
    let head = head.strip_suffix(b"\r\n\r\n").ok_or(Refusal::Malformed)?;
    let mut lines = Lines(Some(head));
    request_line(lines.next().ok_or(Refusal::Malformed)?)?;

    let (mut fields, mut hosts) = (0, 0);
    let (mut length, mut chunked) = (None, false);
    for line in lines {
        fields += 1;
        if fields > FIELDS_MAX {
            return Err(Refusal::TooLarge);
        }
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
        } else if name.eq_ignore_ascii_case(b"content-length") {
            if length.replace(content_length(value)?).is_some() {
                return Err(Refusal::Malformed);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Refusal::Malformed);
            }
            chunked = true;
        }
    }
    match (hosts, length, chunked) {
        (1, None, true) => Ok(Framing::Chunked),
        (1, length, false) => Ok(Framing::Length(length.unwrap_or(0))),
        _ => Err(Refusal::Malformed),
    }
}

/// `METHOD SP target SP HTTP/1.1`, the target in origin form and of RFC 3986's characters only.
fn request_line(line: &[u8]) -> Result<(), Refusal> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Refusal::Malformed);
    };
    if method.is_empty() || method.len() > METHOD_BYTES_MAX || !method.iter().all(u8::is_ascii_uppercase) {
        return Err(Refusal::Malformed);
    }
    if target.len() > TARGET_BYTES_MAX {
        return Err(Refusal::TargetTooLong);
    }
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/?%".contains(byte);
    // HTTP/1.0 has no Host and no chunks, and no client of ours speaks it.
    if target.first() != Some(&b'/') || !target.iter().all(plain) || version != b"HTTP/1.1" {
        return Err(Refusal::Malformed);
    }
    Ok(())
}

/// `name: value`, nothing before the colon but the name; the value without the space around it.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Refusal::Malformed)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err(Refusal::Malformed);
    }
    Ok((name, value.trim_ascii()))
}

/// A byte of a field's name.
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Digits only: `+2`, `-1`, `2, 2` and 20 digits are no length.
fn content_length(value: &[u8]) -> Result<u64, Refusal> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::Malformed);
    }
    Ok(value.iter().fold(0, |length, digit| length * 10 + u64::from(digit - b'0')))
}

/// Splits at CR LF; [`scan`] has seen to it that neither stands alone.
struct Lines<'a>(Option<&'a [u8]>);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];
    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.0?;
        match rest.iter().position(|byte| *byte == b'\n') {
            Some(at) => {
                self.0 = Some(&rest[at + 1..]);
                Some(rest[..at].strip_suffix(b"\r").unwrap_or(&rest[..at]))
            }
            None => self.0.take(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans in one piece and byte by byte (the outcome must not differ), then checks.
    fn verdict(text: &str) -> Result<Framing, Refusal> {
        let bytes = text.as_bytes();
        let mut whole = 0;
        let once = scan(bytes, &mut whole);
        let mut scanned = 0;
        let mut slowly = Ok(Scan::Partial);
        for end in 1..=bytes.len() {
            slowly = scan(&bytes[..end], &mut scanned);
            if slowly != Ok(Scan::Partial) {
                break;
            }
        }
        assert_eq!(once, slowly, "{text:?}");
        match once? {
            Scan::Whole(length) => check(&bytes[..length]),
            Scan::Partial => panic!("no end: {text:?}"),
        }
    }

    #[test]
    fn heads_of_the_official_runner_pass() {
        let get = "GET /api/v4/jobs/1/artifacts? HTTP/1.1\r\nHost: 192.0.2.1\r\nJob-Token: x\r\n\r\n";
        assert_eq!(verdict(get), Ok(Framing::Length(0)));
        let put = "PUT /api/v4/jobs/1 HTTP/1.1\r\nHost: h\r\nContent-Length: 00012\r\n\r\n";
        assert_eq!(verdict(put), Ok(Framing::Length(12)));
        let post =
            "POST /api/v4/jobs/1/artifacts?expire_in=1+week HTTP/1.1\r\nhost:h\r\nTransfer-Encoding:  Chunked \r\n\r\n";
        assert_eq!(verdict(post), Ok(Framing::Chunked));
    }

    #[test]
    fn ambiguous_or_unusual_heads_are_refused() {
        for (line, fields) in [
            ("GET / HTTP/1.1", "Host: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked"),
            ("GET / HTTP/1.1", "Host: h\r\nContent-Length: 1\r\nContent-Length: 1"),
            ("GET / HTTP/1.1", "Host: h\r\nContent-Length: 1, 1"),
            ("GET / HTTP/1.1", "Host: h\r\nContent-Length: +1"),
            ("GET / HTTP/1.1", "Host: h\r\nContent-Length:"),
            ("GET / HTTP/1.1", "Host: h\r\nContent-Length: 99999999999999999999"),
            ("GET / HTTP/1.1", "Host: h\r\nTransfer-Encoding: gzip, chunked"),
            ("GET / HTTP/1.1", "Host: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            ("GET / HTTP/1.1", "Host: h\r\nHost: h"),
            ("GET / HTTP/1.1", "Accept: x"),
            ("GET / HTTP/1.1", "Host : h"),
            ("GET / HTTP/1.1", "Host: h\r\n folded: x"),
            ("GET / HTTP/1.1", "Host: h\r\n: x"),
            ("GET / HTTP/1.1", "Host: h\r\nno colon"),
            ("GET / HTTP/1.0", "Host: h"),
            ("GET / HTTP/1.1 ", "Host: h"),
            ("GET  / HTTP/1.1", "Host: h"),
            ("GET http://h/ HTTP/1.1", "Host: h"),
            ("GET /# HTTP/1.1", "Host: h"),
            ("GET /a\\b HTTP/1.1", "Host: h"),
            ("CONNECT h:80 HTTP/1.1", "Host: h"),
            ("OPTIONS * HTTP/1.1", "Host: h"),
            ("get / HTTP/1.1", "Host: h"),
            ("PRI * HTTP/2.0", "Host: h"),
        ] {
            assert_eq!(verdict(&format!("{line}\r\n{fields}\r\n\r\n")), Err(Refusal::Malformed), "{line} {fields:?}");
        }
    }

    proptest::proptest! {
        /// B13: any bytes, in any pieces: no panic, the same verdict, and never more than the bound.
        #[test]
        fn how_a_head_is_cut_into_pieces_does_not_matter(
            text in "(GET|PUT|POST)? ?/?[a-z?#%]{0,8} ?(HTTP/1.1)?(\\r\\n)?((Host|Content-Length|Transfer-Encoding)?: ?[0-9a-z, ]{0,9}(\\r\\n|\\n|\\r)){0,4}[\\x00-\\xff]{0,4}(\\r\\n){0,2}",
            cuts in proptest::collection::vec(1_usize..9, 0..40),
        ) {
            let bytes = text.as_bytes();
            let whole = scan(bytes, &mut 0);
            let (mut scanned, mut end, mut pieced) = (0, 0, Ok(Scan::Partial));
            for cut in cuts.into_iter().chain([bytes.len()]) {
                end = bytes.len().min(end + cut);
                pieced = scan(&bytes[..end], &mut scanned);
                if pieced != Ok(Scan::Partial) {
                    break;
                }
            }
            proptest::prop_assert_eq!(whole, pieced);
            if let Ok(Scan::Whole(length)) = whole {
                proptest::prop_assert!(bytes[..length].ends_with(b"\r\n\r\n"));
                let _ = check(&bytes[..length]);
            }
        }
    }

    #[test]
    fn bytes_that_no_head_holds_are_refused_at_once() {
        for text in [
            "\x16\x03\x01",
            "\r\nGET /",
            "GET / HTTP/1.1\n",
            "GET / HTTP/1.1\rX",
            "GET /\0",
            "GET /\u{e9}",
            "GETTTTTTTTTTTTTTTTT",
        ] {
            let mut scanned = 0;
            assert_eq!(scan(text.as_bytes(), &mut scanned), Err(Refusal::Malformed), "{text:?}");
        }
    }

    #[test]
    fn sizes_have_bounds_of_their_own() {
        let target = |n: usize| format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(n - 1));
        assert_eq!(verdict(&target(TARGET_BYTES_MAX)), Ok(Framing::Length(0)));
        assert_eq!(verdict(&target(TARGET_BYTES_MAX + 1)), Err(Refusal::TargetTooLong));
        assert_eq!(verdict(&target(70_000)), Err(Refusal::TargetTooLong));
        let fields = |n: usize| format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "A: b\r\n".repeat(n - 1));
        assert_eq!(verdict(&fields(FIELDS_MAX)), Ok(Framing::Length(0)));
        assert_eq!(verdict(&fields(FIELDS_MAX + 1)), Err(Refusal::TooLarge));
        let long = |n: usize| format!("GET / HTTP/1.1\r\nHost: h\r\nA: {}\r\n\r\n", "b".repeat(n - 32));
        assert_eq!(verdict(&long(HEAD_BYTES_MAX)), Ok(Framing::Length(0)));
        assert_eq!(verdict(&long(HEAD_BYTES_MAX + 1)), Err(Refusal::TooLarge));
        assert_eq!(verdict(&long(500_000)), Err(Refusal::TooLarge));
    }
}
