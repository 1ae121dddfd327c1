//! One request over real HTTP: a fresh connection, no redirects, no retries.

use crate::fact::{Part, Sent, SentBody};
use crate::names::{Placeholders, bytes_of};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{Cursor, Write as _};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use zip::write::SimpleFileOptions;

/// No fact holds a request longer than two seconds.
const LIMIT: Duration = Duration::from_secs(30);

const BOUNDARY: &str = "dayfly-facts-2f1d7c";

/// What came back.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// Sends and reads whole.
pub(crate) async fn send(address: SocketAddr, sent: &Sent, placeholders: &Placeholders) -> Result<Reply, String> {
    let request = build(address, sent, placeholders)?;
    timeout(LIMIT, exchange(address, request)).await.map_err(|_| format!("no answer within {LIMIT:?}"))?
}

async fn exchange(address: SocketAddr, request: Request<Full<Bytes>>) -> Result<Reply, String> {
    let say = |error: &dyn std::fmt::Display| error.to_string();
    let stream = TcpStream::connect(address).await.map_err(|error| say(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| say(&error))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| say(&error))?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| say(&error))?.to_bytes();
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body })
    };
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    // The connection moves the bytes; the answer counts first. Nothing is lost when a branch is dropped
    // at the end of both.
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            _ = &mut connection, if open => open = false,
        }
    }
}

fn build(address: SocketAddr, sent: &Sent, placeholders: &Placeholders) -> Result<Request<Full<Bytes>>, String> {
    let mut uri = placeholders.text(&sent.path)?;
    if !sent.query.is_empty() {
        uri.push(if uri.contains('?') { '&' } else { '?' });
        uri.push_str(&form(&sent.query, placeholders)?);
    }
    let mut request = Request::builder().method(sent.method.as_str()).uri(uri).header("host", address.to_string());
    for (name, value) in &sent.headers {
        request = request.header(name, plain(&placeholders.resolve(value)?));
    }
    let body = match &sent.body {
        SentBody::None => Bytes::new(),
        SentBody::Json { value } => Bytes::from(placeholders.resolve(value)?.to_string()),
        SentBody::Form { value } => Bytes::from(form(value, placeholders)?),
        SentBody::Text { value } => Bytes::from(bytes_of(value, placeholders)?),
        SentBody::Multipart { parts } => {
            request = request.header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
            multipart(parts, placeholders)?
        }
    };
    request.body(Full::new(body)).map_err(|error| error.to_string())
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn form(pairs: &serde_json::Map<String, Value>, placeholders: &Placeholders) -> Result<String, String> {
    let mut out = url::form_urlencoded::Serializer::new(String::new());
    for (key, value) in pairs {
        match placeholders.resolve(value)? {
            Value::Object(members) => {
                for (inner, value) in &members {
                    out.append_pair(&format!("{key}[{inner}]"), &plain(value));
                }
            }
            Value::Array(items) => {
                for item in &items {
                    out.append_pair(&format!("{key}[]"), &plain(item));
                }
            }
            value => {
                out.append_pair(key, &plain(&value));
            }
        }
    }
    Ok(out.finish())
}

fn multipart(parts: &[Part], placeholders: &Placeholders) -> Result<Bytes, String> {
    let mut body = Vec::new();
    for part in parts {
        let mut head = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{}\"", part.field);
        if let Some(filename) = &part.filename {
            // Writing to a String never fails.
            let _ = write!(head, "; filename=\"{filename}\"\r\nContent-Type: application/octet-stream");
        }
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(b"\r\n\r\n");
        body.extend_from_slice(&content(&placeholders.text(&part.content)?)?);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    Ok(body.into())
}

/// `zip:<seed>`, `gzip:<seed>`, `gzip-text:<text>`, `random:<bytes>`; other texts are themselves.
fn content(described: &str) -> Result<Vec<u8>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("make {described}: {error}");
    match described.split_once(':') {
        Some(("zip", seed)) => {
            let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
            zip.start_file("content.txt", SimpleFileOptions::default()).map_err(|error| failed(&error))?;
            zip.write_all(seed.as_bytes()).map_err(|error| failed(&error))?;
            Ok(zip.finish().map_err(|error| failed(&error))?.into_inner())
        }
        Some(("gzip" | "gzip-text", text)) => {
            let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
            gzip.write_all(text.as_bytes()).map_err(|error| failed(&error))?;
            gzip.finish().map_err(|error| failed(&error))
        }
        Some(("random", count)) => {
            let count: usize = count.parse().map_err(|error| failed(&error))?;
            let mut state = 0x2545_f491_4f6c_dd1d_u64;
            let next = |_| {
                // Xorshift: anything that does not compress will do.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            };
            Ok((0..count).map(next).collect())
        }
        _ => Ok(described.as_bytes().to_vec()),
    }
}
