//! The uploader: one multipart POST, its body made while it is sent, in chunks.
//!
//! On a socket of its own instead of an HTTP library, for two things that matter here: an answer that comes
//! before the whole body was sent is read (GitLab refuses a large archive early), and a body that cannot be made
//! to its end is cut, never closed as if it were whole.

use super::{ArtifactsError, UploadArguments, archive};
use crate::api::{base_url, is_retried, repeated, wanted_pause};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;
use ureq::http::StatusCode;

/// As the official uploader: tries after 503, and after other failures that may pass.
const TRIES_BUSY: u32 = 6;
const TRIES_OTHER: u32 = 3;
/// Pause after the first try, doubled up to the bound.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(5);
const CONNECT_MAX: Duration = Duration::from_secs(30);
const ANSWER_MAX: Duration = Duration::from_secs(10 * 60);
/// A peer that takes no byte for so long is gone.
const WRITE_MAX: Duration = Duration::from_secs(10 * 60);
/// How long an answer is waited for when the peer closed in the middle of the body.
const EARLY_ANSWER_MAX: Duration = Duration::from_secs(5);
/// Bytes of an answer's head at most.
const HEAD_BYTES_MAX: u64 = 64 * 1024;
/// Bytes of one chunk.
const CHUNK_BYTES: usize = 32 * 1024;

/// Uploads what the flags name.
///
/// # Errors
/// GitLab's refusal, or no answer, after all tries. Nothing to upload is no error, as in the official runner.
pub(crate) fn upload(arguments: &UploadArguments) -> Result<(), ArtifactsError> {
    arguments.target.check()?;
    let files = archive::collect(arguments)?;
    if files.is_empty() {
        crate::log("ERROR: No files to upload");
        return Ok(());
    }
    let kind = if arguments.kind.is_empty() { "archive" } else { &arguments.kind };
    let mut pause = FIRST_PAUSE;
    let mut tries = 1;
    loop {
        let result = one_try(arguments, &files);
        let (what, tries_max) = match &result {
            Ok(answer) if answer.status == StatusCode::CREATED => {
                crate::log(&format!(
                    "Uploading artifacts as \"{kind}\" to coordinator... 201 Created  id={} token={}",
                    arguments.target.job,
                    arguments.target.shown_token()
                ));
                return Ok(());
            }
            Ok(Head { status, .. }) => (status.as_str().to_owned(), tries_max(*status)),
            Err(error) => (error.to_string(), TRIES_OTHER),
        };
        crate::log(&format!("WARNING: Uploading artifacts as \"{kind}\" to coordinator... {what}"));
        if tries >= tries_max {
            return Err(match result {
                Ok(answer) => ArtifactsError::Refused(answer.status.as_u16()),
                Err(error) => ArtifactsError::Unreachable(error),
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
        tries += 1;
    }
}

fn tries_max(status: StatusCode) -> u32 {
    match status.as_u16() {
        403 | 413 => 1,
        503 => TRIES_BUSY,
        _ => TRIES_OTHER,
    }
}

/// One try: the request, repeated at HTTP level under one request id.
fn one_try(arguments: &UploadArguments, files: &[PathBuf]) -> io::Result<Head> {
    let (request_id, boundary) = (crate::random_hex(32), crate::random_hex(60));
    repeated(
        || send(arguments, files, &request_id, &boundary),
        |head| is_retried(head.status).then(|| wanted_pause(&head.reset_time, &head.retry_after)),
    )
}

/// What matters of an answer.
struct Head {
    status: StatusCode,
    reset_time: String,
    retry_after: String,
}

fn send(arguments: &UploadArguments, files: &[PathBuf], request_id: &str, boundary: &str) -> io::Result<Head> {
    let (authority, base_path) = split_url(&base_url(&arguments.target.url))?;
    let stream = connect(&authority)?;
    let (answered, answers) = mpsc::channel();
    let reader = BufReader::new(stream.try_clone()?);
    std::thread::spawn(move || {
        // Nobody listens if the request was given up.
        let _ = answered.send(read_head(reader));
    });
    let mut head = format!(
        "POST {base_path}jobs/{}/artifacts{} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: {}\r\nTransfer-Encoding: chunked\r\n\
         Content-Type: multipart/form-data; boundary={boundary}\r\nJob-Token: {}\r\nX-Request-Id: {request_id}\r\n\
         Accept-Encoding: gzip\r\n\r\n",
        arguments.target.job,
        query(arguments),
        crate::info::user_agent(),
        arguments.target.token,
    )
    .into_bytes();
    let mut early = None;
    let mut raw = &stream;
    let body = raw.write_all(&head).and_then(|()| {
        head.clear();
        let mut body = Chunked { out: &stream, answers: &answers, early: &mut early, chunk: head };
        write_body(&mut body, arguments, files, boundary)?;
        body.finish()
    });
    let answer = match (early, body) {
        (Some(answer), _) => answer,
        (None, Ok(())) => answers.recv_timeout(ANSWER_MAX).map_err(io::Error::other)?,
        // The peer may have answered and closed; only if not, the failure to write counts.
        (None, Err(error)) => {
            // Our own failure to make the body cuts it, so that the peer stops waiting.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            match answers.recv_timeout(EARLY_ANSWER_MAX) {
                Ok(Ok(answer)) => Ok(answer),
                _ => Err(error),
            }
        }
    };
    let _ = stream.shutdown(std::net::Shutdown::Both);
    answer
}

fn connect(authority: &str) -> io::Result<TcpStream> {
    let address = if authority.rsplit(']').next().is_some_and(|end| end.contains(':')) {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let address = address.to_socket_addrs()?.next().ok_or_else(|| io::Error::other("no address"))?;
    let stream = TcpStream::connect_timeout(&address, CONNECT_MAX)?;
    stream.set_write_timeout(Some(WRITE_MAX))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn write_body(out: &mut impl Write, arguments: &UploadArguments, files: &[PathBuf], boundary: &str) -> io::Result<()> {
    let name = if arguments.name.is_empty() { "artifacts" } else { &arguments.name };
    let file_name = match arguments.format.as_str() {
        "gzip" => format!("{name}.gz"),
        "raw" => name.to_owned(),
        _ => format!("{name}.zip"),
    };
    let file_name = file_name.replace('\\', "\\\\").replace('"', "\\\"").replace(['\r', '\n'], "_");
    write!(
        out,
        "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{file_name}\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    )?;
    match arguments.format.as_str() {
        "gzip" => archive::write_gzip(&mut *out, files)?,
        "raw" => archive::write_raw(&mut *out, files)?,
        _ => archive::write_zip(&mut *out, files)?,
    }
    write!(out, "\r\n--{boundary}--\r\n")
}

/// The query, members in the recorded order, each only if set.
fn query(arguments: &UploadArguments) -> String {
    let members: Vec<String> = [
        ("artifact_format", &arguments.format),
        ("artifact_type", &arguments.kind),
        ("expire_in", &arguments.expire_in),
    ]
    .iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(name, value)| format!("{name}={}", form_encode(value)))
    .collect();
    if members.is_empty() { String::new() } else { format!("?{}", members.join("&")) }
}

fn form_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b' ' => "+".to_owned(),
            byte if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// Authority and path of an `http://` URL.
fn split_url(url: &str) -> io::Result<(String, String)> {
    let rest = url.strip_prefix("http://").ok_or_else(|| io::Error::other(format!("`{url}` is not plain http")))?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    Ok((authority.to_owned(), path.to_owned()))
}

/// Reads the status and the headers, interim answers skipped.
fn read_head(stream: impl BufRead) -> io::Result<Head> {
    let mut lines = stream.take(HEAD_BYTES_MAX);
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let status: StatusCode = line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1))
            .and_then(|status| status.trim().parse().ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no HTTP answer"))?;
        let mut head = Head { status, reset_time: String::new(), retry_after: String::new() };
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            match name.to_ascii_lowercase().as_str() {
                "retry-after" => value.trim().clone_into(&mut head.retry_after),
                "ratelimit-resettime" => value.trim().clone_into(&mut head.reset_time),
                _ => {}
            }
        }
        if !status.is_informational() {
            return Ok(head);
        }
    }
}

/// Writes chunks, and stops as soon as the peer has answered.
struct Chunked<'a> {
    out: &'a TcpStream,
    answers: &'a mpsc::Receiver<io::Result<Head>>,
    early: &'a mut Option<io::Result<Head>>,
    chunk: Vec<u8>,
}

impl Chunked<'_> {
    fn send_chunk(&mut self) -> io::Result<()> {
        if let Ok(answer) = self.answers.try_recv() {
            *self.early = Some(answer);
            return Err(io::Error::other("answered before the whole body was sent"));
        }
        if self.chunk.is_empty() {
            return Ok(());
        }
        let mut framed = format!("{:x}\r\n", self.chunk.len()).into_bytes();
        framed.append(&mut self.chunk);
        framed.extend_from_slice(b"\r\n");
        self.out.write_all(&framed)
    }

    fn finish(mut self) -> io::Result<()> {
        self.send_chunk()?;
        self.out.write_all(b"0\r\n\r\n")
    }
}

impl Write for Chunked<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.chunk.extend_from_slice(bytes);
        if self.chunk.len() >= CHUNK_BYTES {
            self.send_chunk()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_has_only_what_is_set() {
        let mut arguments = UploadArguments::default();
        assert_eq!(query(&arguments), "");
        (arguments.format, arguments.expire_in) = ("zip".to_owned(), "1 week&x".to_owned());
        assert_eq!(query(&arguments), "?artifact_format=zip&expire_in=1+week%26x");
    }

    #[test]
    fn an_answers_head_is_read_behind_interim_answers() {
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\nRateLimit-ResetTime: a: b\r\nX: y\r\n\r\nbody";
        let head = read_head(text.as_bytes()).expect("a head");
        assert_eq!((head.status.as_u16(), head.retry_after.as_str(), head.reset_time.as_str()), (503, "2", "a: b"));
        assert!(read_head(&b"HTTP/1.1 201 Created\r\nX: y\r\n"[..]).is_err(), "cut in the headers");
        assert!(read_head(&b"SSH-2.0\r\n\r\n"[..]).is_err(), "another protocol");
    }
}
