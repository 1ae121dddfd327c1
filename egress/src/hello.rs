//! Which server does a connection ask for? The name in a TLS hello (RFC 8446, 4.1.2; RFC 6066, 3), in the bytes with which
//! it begins.
//!
//! Nothing is decrypted or changed. A hello may be cut over records, and arrive in pieces; what is not read to its end
//! within [`HELLO_BYTES_MAX`] is none.

use crate::policy::host_name;

/// Bytes of a hello at most, heads of its records included. Those of browsers have 2 KiB.
pub const HELLO_BYTES_MAX: usize = 8 * 1024;

const RECORD_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// What the first bytes of a connection are.
#[derive(Debug, PartialEq, Eq)]
pub enum Hello {
    /// Perhaps the beginning of one.
    NotYet,
    /// None: another protocol.
    None,
    /// One, with the name that it asks for, in lower case.
    Tls(Option<String>),
    /// It begins like one, and is none that could be read.
    Malformed,
}

/// Reads the first bytes of a connection.
#[must_use]
pub fn read(bytes: &[u8]) -> Hello {
    let begins = [RECORD_HANDSHAKE, 3];
    let have = bytes.len().min(begins.len());
    if bytes[..have] != begins[..have] {
        return Hello::None;
    }
    let mut message = Vec::new();
    let mut rest = bytes;
    while let Some((head, body)) = rest.split_first_chunk::<5>() {
        let [kind, major, _, high, low] = *head;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind != RECORD_HANDSHAKE || major != 3 || length == 0 {
            return Hello::Malformed;
        }
        let part = &body[..length.min(body.len())];
        message.extend_from_slice(part);
        match whole(&message) {
            Some(Ok(hello)) => return server_name(hello).map_or(Hello::Malformed, Hello::Tls),
            Some(Err(())) => return Hello::Malformed,
            None => rest = &body[part.len()..],
        }
        if part.len() < length {
            break;
        }
    }
    if bytes.len() >= HELLO_BYTES_MAX { Hello::Malformed } else { Hello::NotYet }
}

/// A hello's body, once it is whole; `Err`: it is another message, or longer than any.
fn whole(message: &[u8]) -> Option<Result<&[u8], ()>> {
    let [kind, rest @ ..] = message else { return None };
    if *kind != CLIENT_HELLO {
        return Some(Err(()));
    }
    let (length, body) = rest.split_first_chunk::<3>()?;
    let [a, b, c] = *length;
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    if length > HELLO_BYTES_MAX {
        return Some(Err(()));
    }
    body.get(..length).map(Ok)
}

/// A part with its length before it, in one byte or two, and what follows.
fn part<const WIDE: bool>(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = if WIDE {
        let (length, rest) = short(bytes)?;
        (usize::from(length), rest)
    } else {
        let (length, rest) = bytes.split_first()?;
        (usize::from(*length), rest)
    };
    rest.split_at_checked(length)
}

fn short(bytes: &[u8]) -> Option<(u16, &[u8])> {
    bytes.split_first_chunk::<2>().map(|(short, rest)| (u16::from_be_bytes(*short), rest))
}

/// The name that a hello asks for, if it does; outer `None`: it is malformed.
fn server_name(hello: &[u8]) -> Option<Option<String>> {
    // Version and random.
    let (_, rest) = hello.split_at_checked(2 + 32)?;
    let (_session, rest) = part::<false>(rest)?;
    let (_ciphers, rest) = part::<true>(rest)?;
    let (_compressions, rest) = part::<false>(rest)?;
    if rest.is_empty() {
        return Some(None);
    }
    let (mut extensions, rest) = part::<true>(rest)?;
    if !rest.is_empty() {
        return None;
    }
    let mut found = None;
    while !extensions.is_empty() {
        let (kind, rest) = short(extensions)?;
        let (body, rest) = part::<true>(rest)?;
        extensions = rest;
        if kind != EXTENSION_SERVER_NAME {
            continue;
        }
        // A server could take another one than we.
        if found.is_some() {
            return None;
        }
        let (list, rest) = part::<true>(body)?;
        let (kind, name) = list.split_first()?;
        let (name, more) = part::<true>(name)?;
        if *kind != HOST_NAME || !more.is_empty() || !rest.is_empty() {
            return None;
        }
        found = Some(host_name(std::str::from_utf8(name).ok()?)?);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(bytes: &[u8]) -> Vec<u8> {
        [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &wide(body)].concat()
    }

    fn names(name: &str) -> Vec<u8> {
        extension(0, &wide(&[&[0][..], &wide(name.as_bytes())].concat()))
    }

    /// A hello with these extensions, in records of at most `record` bytes.
    fn hello(extensions: &[Vec<u8>], record: usize) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([1, 9]);
        body.extend(wide(&[0x13, 1]));
        body.extend([1, 0]);
        body.extend(wide(&extensions.concat()));
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let message = [&[1][..], &length[1..], &body].concat();
        message.chunks(record).flat_map(|part| [&[22, 3, 1][..], &wide(part)].concat()).collect()
    }

    #[test]
    fn the_name_is_found_however_the_hello_is_cut() {
        for record in [1, 3, 50, 1000] {
            let bytes = hello(&[extension(43, &[2, 3, 4]), names("Deb.Debian.org"), extension(10, &[0; 300])], record);
            for cut in 0..bytes.len() {
                assert_eq!(read(&bytes[..cut]), Hello::NotYet, "{record}, {cut}");
            }
            assert_eq!(read(&bytes), Hello::Tls(Some("deb.debian.org".into())));
            assert_eq!(read(&[&bytes[..], b"more"].concat()), Hello::Tls(Some("deb.debian.org".into())));
        }
        assert_eq!(read(&hello(&[extension(43, &[2, 3, 4])], 1000)), Hello::Tls(None));
    }

    #[test]
    fn other_protocols_are_none() {
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"SSH-2.0-x", &[22, 2], &[0]] {
            assert_eq!(read(bytes), Hello::None);
        }
        assert_eq!(read(&[]), Hello::NotYet);
    }

    #[test]
    fn what_begins_like_one_and_is_none_is_malformed() {
        assert_eq!(read(&hello(&[names("a.example"), names("b.example")], 1000)), Hello::Malformed, "two names");
        assert_eq!(read(&hello(&[names("a b")], 1000)), Hello::Malformed);
        assert_eq!(read(&hello(&[names("")], 1000)), Hello::Malformed);
        let two = wide(&[&[0][..], &wide(b"a.example"), &[0], &wide(b"b.example")].concat());
        assert_eq!(read(&hello(&[extension(0, &two)], 1000)), Hello::Malformed, "two names in one list");
        let mut cut = hello(&[names("a.example")], 1000);
        cut[60] = 0xff;
        assert_eq!(read(&cut), Hello::Malformed);
        assert_eq!(read(&[22, 3, 1, 0, 0]), Hello::Malformed, "an empty record");
        assert_eq!(read(&[22, 3, 1, 0, 1, 2]), Hello::Malformed, "another message");
        assert_eq!(read(&[22, 3, 1, 0, 4, 1, 0xff, 0, 0]), Hello::Malformed, "longer than any");
        let endless = [vec![22, 3, 1, 0x20, 0, 1, 0, 0x20, 0], vec![0; HELLO_BYTES_MAX]].concat();
        assert_eq!(read(&endless), Hello::Malformed);
    }
}
