//! Whole connections: the requests that a stream of bytes is, read by us, by hyper behind our wire, and by hyper alone.

use super::door::METRICS;
use crate::pieces::{Peer, now};
use bytes::{Bytes, BytesMut};
use dayfly::guest::readers::{BadChunk, Chunks};
use dayfly::guest::readers::{FIELDS_MAX, Framing, Scan, check, scan};
use dayfly::guest::readers::{Notes, Times, Wire};
use dayfly::vm::Stream;
use http::{HeaderMap, Request as HttpRequest, Response, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::sync::Mutex;
use std::time::Duration;

/// One request, as somebody read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    /// Names in lower case, sorted; values of one name in their order.
    pub(super) fields: Vec<(String, Vec<u8>)>,
    /// The body's length, where the head told it.
    pub(super) length: Option<u64>,
    /// The body; `None` if it did not come to its end.
    pub(super) body: Option<Vec<u8>>,
}

impl Request {
    /// One that [`Wire`] put in place of a head that it refused.
    fn refused() -> Self {
        Self { method: String::new(), target: String::new(), fields: Vec::new(), length: None, body: None }
    }

    fn closes(&self) -> bool {
        self.body.is_none() || self.fields.iter().any(|(name, value)| name == "connection" && closing(value))
    }
}

fn closing(value: &[u8]) -> bool {
    value.split(|byte| *byte == b',').any(|word| word.trim_ascii().eq_ignore_ascii_case(b"close"))
}

/// Notes one request in hyper's hands: its head at once, its body when that has ended.
async fn read(request: HttpRequest<Incoming>, served: &Mutex<Vec<Request>>) {
    let (parts, body) = request.into_parts();
    let index = {
        let mut served = served.lock().unwrap();
        served.push(Request {
            method: parts.method.to_string(),
            target: parts.uri.to_string(),
            fields: fields(&parts.headers),
            length: body.size_hint().exact(),
            body: None,
        });
        served.len() - 1
    };
    let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
    served.lock().unwrap()[index].body = body;
}

fn fields(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let mut fields: Vec<_> =
        headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect();
    fields.sort_by(|a, b| a.0.cmp(&b.0));
    fields
}

/// Serves a connection as the door does, by `service`, until it ends or waits for ever.
fn serve<S, F>(stream: impl Stream, service: S)
where
    S: Fn(HttpRequest<Incoming>) -> F,
    F: Future<Output = ()>,
{
    let service = service_fn(|request| {
        let served = Box::pin(service(request));
        async {
            served.await;
            let mut answer = Response::new(Full::new(Bytes::from_static(b"no")));
            // As the door answers what it does not know: to hyper, a CONNECT that succeeds is a tunnel.
            *answer.status_mut() = StatusCode::NOT_FOUND;
            Ok::<_, Infallible>(answer)
        }
    });
    let http = http1::Builder::new()
        .max_headers(FIELDS_MAX)
        .half_close(false)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    // Broken or not: what was served by then is what counts.
    let _ = now(http);
}

/// The requests that hyper serves from `stream`.
pub(super) fn by_hyper(stream: impl Stream) -> Vec<Request> {
    let served = Mutex::new(Vec::new());
    serve(stream, |request| read(request, &served));
    served.into_inner().unwrap()
}

/// The requests that hyper serves behind our wire, those that were refused in their places.
fn by_the_door(stream: Peer, read_before: &[u8]) -> Vec<Request> {
    const LONG: Duration = Duration::from_secs(3600);
    let notes = Notes::default();
    let times = Times { head: LONG, idle: LONG, stall: LONG };
    let wire = Wire::new(Box::new(stream), BytesMut::from(read_before), notes.clone(), METRICS.guest().clone(), times);
    let served = Mutex::new(Vec::new());
    serve(wire, async |request| {
        let (refusal, _active) = notes.begin();
        match refusal {
            Some(_) => served.lock().unwrap().push(Request::refused()),
            None => read(request, &served).await,
        }
    });
    served.into_inner().unwrap()
}

/// The body that stands at the start of `bytes`, and its length there; `None`: it does not end there.
fn body(framing: Framing, bytes: &[u8]) -> Result<Option<(Vec<u8>, usize)>, BadChunk> {
    match framing {
        Framing::Length(length) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            Ok(bytes.get(..length).map(|body| (body.to_vec(), length)))
        }
        Framing::Chunked => {
            let mut chunks = Chunks::new();
            let taken = chunks.follow(bytes)?;
            Ok(chunks.is_done().then(|| (dechunked(&bytes[..taken]), taken)))
        }
    }
}

/// The data of a body in chunks that is known to be right.
pub(super) fn dechunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let end = bytes.windows(2).position(|two| two == b"\r\n").unwrap();
        let line = std::str::from_utf8(&bytes[..end]).unwrap();
        let size = usize::from_str_radix(line.split(';').next().unwrap(), 16).unwrap();
        if size == 0 {
            return data;
        }
        let chunk = &bytes[end + 2..];
        data.extend_from_slice(&chunk[..size]);
        assert!(chunk[size..].starts_with(b"\r\n"));
        bytes = &chunk[size + 2..];
    }
}

/// The requests that these bytes are, and whether they end in one that we refuse: its head, or its body.
pub(super) fn predicted(mut bytes: &[u8]) -> (Vec<Request>, bool) {
    let mut requests = Vec::new();
    loop {
        match scan(bytes, &mut 0) {
            Ok(Scan::Partial) => return (requests, false),
            Ok(Scan::Whole(length)) => {
                let (head, rest) = bytes.split_at(length);
                let Ok(framing) = check(head) else { break };
                let text = std::str::from_utf8(head).unwrap();
                let mut words = text.split(' ');
                let found = body(framing, rest);
                let mut fields: Vec<_> = text.trim_end_matches("\r\n").split("\r\n").skip(1).collect();
                fields.sort_by_key(|line| line.split(':').next().map(str::to_ascii_lowercase));
                let field = |line: &str| {
                    let (name, value) = line.split_once(':').unwrap();
                    (name.to_ascii_lowercase(), value.trim().as_bytes().to_vec())
                };
                requests.push(Request {
                    method: words.next().unwrap().into(),
                    target: words.next().unwrap().into(),
                    fields: fields.into_iter().map(field).collect(),
                    length: if let Framing::Length(length) = framing { Some(length) } else { None },
                    body: found.as_ref().ok().and_then(|found| found.as_ref()).map(|(body, _)| body.clone()),
                });
                match found {
                    Ok(Some((_, length))) => bytes = &rest[length..],
                    Ok(None) => return (requests, false),
                    Err(BadChunk) => return (requests, true),
                }
            }
            Err(_) => break,
        }
    }
    requests.push(Request::refused());
    (requests, true)
}

/// Never two requests out of one: however the bytes are cut, hyper behind our wire serves the requests that we read
/// in them, and where we refuse none of them hyper alone serves the same.
pub fn requests(input: &[u8]) {
    let (expected, refused) = predicted(input);
    let behind = input.len().min(usize::from(input.last().copied().unwrap_or(0)));
    let peer = Peer::waiting(&input[behind..]);
    agree(&expected, &by_the_door(peer, &input[..behind]), "the door");
    if !refused {
        agree(&expected, &by_hyper(Peer::waiting(input)), "hyper alone");
    }
}

/// All of `expected` was served, up to a request after which a connection ends.
fn agree(expected: &[Request], served: &[Request], who: &str) {
    assert!(served.len() <= expected.len(), "{who} serves {} requests of {}", served.len(), expected.len());
    for (at, (expected, served)) in expected.iter().zip(served).enumerate() {
        assert_eq!(expected, served, "request {at} of {who}");
    }
    if served.len() < expected.len() {
        let last = served.last().unwrap_or_else(|| panic!("{who} serves nothing of {expected:?}"));
        assert!(last.closes(), "{who} serves {} requests of {}", served.len(), expected.len());
    }
}
