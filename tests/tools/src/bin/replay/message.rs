//! A recorded request as bytes for the wire; the content of an upload is made up.

use crate::recording::{Body, Request};
use std::io;

/// The recorded request as bytes, with `from` replaced by `to` (a token that this run does not know by
/// the one it does) and the length of the body set right after that. The content of an upload is made up.
pub(crate) fn message(request: &Request, from: &str, to: &str) -> io::Result<Vec<u8>> {
    let body = match &request.body {
        Body::Empty => Vec::new(),
        Body::Json(text) => text.replace(from, to).into_bytes(),
        Body::Text(text) => text.clone().into_bytes(),
        Body::Form { part_headers, content_bytes, bytes } => {
            form(request.header("content-type").unwrap_or_default(), part_headers, *content_bytes, *bytes)?
        }
        Body::Lost => return Err(bad("a body that was not kept")),
    };
    let mut message = format!("{} {} HTTP/1.1\r\n", request.method, request.target);
    for (name, value) in &request.headers {
        let value =
            if name.eq_ignore_ascii_case("content-length") { body.len().to_string() } else { value.replace(from, to) };
        message.push_str(&format!("{name}: {value}\r\n"));
    }
    message.push_str("\r\n");
    let mut message = message.into_bytes();
    match request.chunks {
        Some(chunks) => {
            for piece in pieces(&body, chunks) {
                message.extend(format!("{:x}\r\n", piece.len()).into_bytes());
                message.extend(piece);
                message.extend(b"\r\n");
            }
            message.extend(b"0\r\n\r\n");
        }
        None => message.extend(body),
    }
    Ok(message)
}

/// Content of an upload: any bytes will do, but not all the same.
pub(crate) fn content(bytes: usize) -> Vec<u8> {
    (0..=250).cycle().take(bytes).collect()
}

/// A form of one part, as long as the recorded one.
fn form(content_type: &str, part_headers: &[String], content_bytes: usize, bytes: usize) -> io::Result<Vec<u8>> {
    let boundary = content_type.split_once("boundary=").ok_or_else(|| bad("a form without a boundary"))?.1;
    let mut form = format!("--{boundary}\r\n{}\r\n\r\n", part_headers.join("\r\n")).into_bytes();
    form.extend(content(content_bytes));
    form.extend(format!("\r\n--{boundary}--\r\n").into_bytes());
    if form.len() == bytes { Ok(form) } else { Err(bad("a form of another length than recorded")) }
}

/// `body` in this many pieces of about one size, none of them empty, for that would end it.
fn pieces(body: &[u8], number: usize) -> impl Iterator<Item = &[u8]> {
    let number = number.clamp(1, body.len().max(1));
    (0..number).map(move |i| &body[body.len() * i / number..body.len() * (i + 1) / number]).filter(|p| !p.is_empty())
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_cut_into_as_many_pieces_as_recorded() {
        let body = content(602);
        let cut: Vec<&[u8]> = pieces(&body, 9).collect();
        assert_eq!((cut.len(), cut.concat()), (9, body));
        assert_eq!(pieces(b"ab", 9).count(), 2);
        assert_eq!(pieces(b"", 3).count(), 0);
    }

    #[test]
    fn a_form_has_the_recorded_length_or_none() {
        let headers = ["Content-Disposition: form-data; name=\"file\"".to_owned()];
        let made = form("multipart/form-data; boundary=B", &headers, 10, 71).unwrap();
        assert!(made.starts_with(b"--B\r\nContent-Disposition") && made.ends_with(b"\r\n--B--\r\n"));
        assert!(form("multipart/form-data; boundary=B", &headers, 10, 72).is_err());
    }
}
