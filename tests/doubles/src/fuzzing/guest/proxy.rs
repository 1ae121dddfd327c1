//! The whole way: raw bytes of a guest, behind its greeting, through the door to GitLab.

use super::door::{
    CANARY, Connection, DEPENDENCY, DEPENDENCY_TOKEN, Door, Exchange, JOB, JOB_TOKEN, Mood, PAYLOAD, Seen,
    on_paused_time,
};
use super::requests::{Request, predicted};
use crate::pieces::Cuts;
use bytes::Bytes;
use dayfly::gitlab::JobStatus;
use std::time::Duration;

/// Begins an act in an input of [`proxy`]; in no request that is served stands such a byte outside of a body.
const ACT: u8 = 0xff;
/// Connections of one input at most.
const CONNECTIONS_MAX: usize = 8;

/// An input is bytes to send, and acts between them: `0xff` and a letter. Whatever the guest sends, and whatever
/// happens meanwhile: GitLab sees only requests of the three routes, each for one that the guest made with the right
/// token, with exactly one credential, ours, and its body whole or broken off as the guest's was. The guest gets no
/// more answers than it asked questions, nothing of GitLab's but the listed headers, its job once, and no connection
/// or task stays behind.
pub fn proxy(input: &[u8]) {
    on_paused_time(async {
        let mut door = Door::open().await;
        *door.gitlab.says.lock().unwrap() = Bytes::from_static(b"says GitLab");
        let mut ended = Vec::new();
        let mut connection = Some(door.connect(false).await);
        let mut parts = input.split(|byte| *byte == ACT);
        send(connection.as_mut(), parts.next().unwrap_or_default()).await;
        for part in parts {
            let (act, bytes) = part.split_first().map_or((b' ', part), |(act, bytes)| (*act, bytes));
            match act {
                // Another connection, beside the one before, or with a wrong greeting.
                b'n' | b'x' if ended.len() < CONNECTIONS_MAX => {
                    if let Some(before) = connection.replace(door.connect(act == b'x').await) {
                        ended.push(before);
                    }
                }
                b'e' => {
                    if let Some(before) = connection.take() {
                        ended.push(before);
                    }
                }
                b'c' => door.view.send_modify(|view| view.status = JobStatus::Canceling),
                b'o' => door.view.send_modify(|view| view.status = JobStatus::Over),
                b't' => tokio::time::sleep(Duration::from_secs(20)).await,
                b'0' => *door.gitlab.mood.lock().unwrap() = Mood::Right,
                b'1' => *door.gitlab.mood.lock().unwrap() = Mood::Early,
                b'2' => *door.gitlab.mood.lock().unwrap() = Mood::Elsewhere,
                b'3' => *door.gitlab.mood.lock().unwrap() = Mood::Broken,
                b'4' => *door.gitlab.mood.lock().unwrap() = Mood::Torn,
                // Let the door get on.
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
            send(connection.as_mut(), bytes).await;
        }
        let mut exchanges = Vec::new();
        for connection in ended.into_iter().chain(connection) {
            exchanges.push(connection.end().await);
        }
        let spool = door.close().await;
        let seen = door.gitlab.seen.lock().unwrap().clone();
        judge_calls(&exchanges, seen);
        judge_answers(&exchanges, input.windows(2).any(|act| act == [ACT, b't']));
        judge_job(&exchanges, &door, &spool);
    });
}

async fn send(connection: Option<&mut Connection>, bytes: &[u8]) {
    let Some(connection) = connection else { return };
    for piece in Cuts::of(bytes).pieces(bytes) {
        connection.send(piece).await;
        tokio::task::yield_now().await;
    }
}

/// The guest's requests; those that were refused apart.
fn asked(exchange: &Exchange) -> Vec<Request> {
    if exchange.wrong { Vec::new() } else { predicted(&exchange.sent).0 }
}

fn values<'a>(request: &'a Request, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    request.fields.iter().filter(move |(field, _)| field == name).map(|(_, value)| value.as_slice())
}

/// Whether the guest may ask for this: the token that GitLab is to get, if so.
fn allowed(request: &Request) -> Option<&'static str> {
    let path = request.target.split('?').next()?;
    let own = |below: &str| path == format!("/api/v4/jobs/{JOB}/{below}");
    let token = match request.method.as_str() {
        "POST" if own("artifacts") => JOB_TOKEN,
        "GET" if own("artifacts") || own("runtime_environment_key") => JOB_TOKEN,
        "GET" if path == format!("/api/v4/jobs/{DEPENDENCY}/artifacts") => DEPENDENCY_TOKEN,
        _ => return None,
    };
    let mut shown = ["job-token", "private-token", "runner-token"].iter().flat_map(|name| values(request, name));
    (values(request, "job-token").count() > 0 && shown.all(|shown| shown == token.as_bytes())).then_some(token)
}

fn judge_calls(exchanges: &[Exchange], seen: Vec<Seen>) {
    let mut open: Vec<Request> = exchanges.iter().flat_map(asked).collect();
    for call in seen {
        let path = call.target.split('?').next().unwrap();
        let same = |request: &Request| {
            request.method == call.method
                && request.target.split('?').next() == Some(path)
                && allowed(request).is_some()
        };
        // Of several that are the same, the one whose body it was.
        let fits = |request: &Request| same(request) && (!call.whole || request.body.as_deref() == Some(&call.body));
        let cause = open.iter().position(|request| {
            let uploads = request.method == "POST";
            if uploads { fits(request) } else { same(request) }
        });
        let cause = open.remove(cause.unwrap_or_else(|| panic!("GitLab was asked {call:?}, and nobody may have")));
        assert!(cause.method == "POST" || call.body.is_empty(), "{call:?} brings a body");
        let token = allowed(&cause).unwrap();
        let names: Vec<_> = call.headers.iter().map(|(name, _)| name.as_str()).collect();
        for (at, name) in names.iter().enumerate() {
            let listed = ["job-token", "content-type", "accept", "range", "user-agent", "x-request-id"];
            assert!(listed.contains(name) && !names[..at].contains(name), "{call:?}");
        }
        let credential = call.headers.iter().find(|(name, _)| name == "job-token");
        assert_eq!(credential.map(|(_, value)| value.as_str()), Some(token));
        let agent = call.headers.iter().find(|(name, _)| name == "user-agent").unwrap();
        assert!(agent.1.starts_with("dayfly/"), "{agent:?}");
        let query = call.target.split_once('?').map_or("", |(_, query)| query);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let key = pair.split('=').next().unwrap();
            let known =
                ["artifact_type", "artifact_format", "expire_in", "accessibility", "direct_download", "download_mode"];
            assert!(known.contains(&key), "{call:?}");
        }
    }
}

fn judge_answers(exchanges: &[Exchange], slow: bool) {
    let mut payloads = 0;
    for exchange in exchanges {
        let text = String::from_utf8_lossy(&exchange.answered);
        assert!(!text.contains(CANARY), "{text}");
        assert!(!text.contains(DEPENDENCY_TOKEN), "{text}");
        payloads += text.matches(std::str::from_utf8(PAYLOAD).unwrap()).count();
        let asked = asked(exchange);
        let answers = answers(&exchange.answered, &asked);
        assert!(answers <= asked.len(), "{answers} answers to {}:\n{text}", asked.len());
        // A first request that is not even well-formed is told so, but to one who was slow.
        if !slow && asked.first().is_some_and(|first| first.method.is_empty()) {
            assert!(text.starts_with("HTTP/1.1 4"), "{text:?}");
        }
    }
    assert!(payloads <= 1, "the job was handed out {payloads} times");
}

/// Counts the answers, each by its own framing; interim ones do not count.
fn answers(mut bytes: &[u8], asked: &[Request]) -> usize {
    let mut count = 0;
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        let Some(end) = end else { return count };
        let (head, rest) = bytes.split_at(end + 4);
        let head = std::str::from_utf8(head).expect("an answer's head is text").to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 "), "no answer: {head:?}");
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if head.starts_with("http/1.1 1") {
            bytes = rest;
            continue;
        }
        let bodiless = head.starts_with("http/1.1 204") || asked.get(count).is_some_and(|asked| asked.method == "HEAD");
        count += 1;
        let length = field("content-length:").filter(|_| !bodiless).map_or(0, |length| length.parse().unwrap());
        assert!(bodiless || field("content-length:").is_some() || field("transfer-encoding:").is_some(), "{head}");
        if field("transfer-encoding:").is_some() {
            // GitLab's bodies here all have a length, and so have ours.
            panic!("an answer in chunks: {head}");
        }
        bytes = rest.get(length..).unwrap_or_default();
    }
    count
}

fn judge_job(exchanges: &[Exchange], door: &Door, spool: &[u8]) {
    let all: Vec<Request> = exchanges.iter().flat_map(asked).collect();
    let path = format!("/api/v4/jobs/{JOB}");
    let target = |request: &Request| request.target.split('?').next().unwrap_or_default().to_owned();
    let told = door.told.lock().unwrap();
    let puts =
        all.iter().filter(|request| request.method == "PUT" && target(request) == path && request.body.is_some());
    assert!(told.verdicts.len() <= puts.count());
    let patches = all.iter().filter(|request| request.method == "PATCH" && target(request) == format!("{path}/trace"));
    let offered: usize = patches.filter_map(|request| request.body.as_ref()).map(Vec::len).sum();
    assert!(spool.len() <= offered, "{} bytes of trace out of {offered}", spool.len());
}

/// An artifact: whatever it holds, it reaches GitLab byte for byte, by either framing, and comes back so.
pub fn artifact_upload(input: &[u8]) {
    on_paused_time(async {
        let mut door = Door::open().await;
        let mut cuts = Cuts::of(input);
        let chunked = cuts.number().is_multiple_of(2);
        let mut request = format!(
            "POST /api/v4/jobs/{JOB}/artifacts?artifact_type=archive HTTP/1.1\r\nHost: h\r\nJob-Token: {JOB_TOKEN}\r\n\
             Content-Type: multipart/form-data; boundary=x\r\n"
        )
        .into_bytes();
        if chunked {
            request.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            for piece in cuts.pieces(input) {
                request.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                request.extend_from_slice(piece);
                request.extend_from_slice(b"\r\n");
            }
            request.extend_from_slice(b"0\r\n\r\n");
        } else {
            request.extend_from_slice(format!("Content-Length: {}\r\n\r\n", input.len()).as_bytes());
            request.extend_from_slice(input);
        }
        *door.gitlab.says.lock().unwrap() = Bytes::copy_from_slice(input);
        let mut connection = door.connect(false).await;
        send(Some(&mut connection), &request).await;
        let download =
            format!("GET /api/v4/jobs/{JOB}/artifacts HTTP/1.1\r\nHost: h\r\nJob-Token: {JOB_TOKEN}\r\n\r\n");
        connection.send(download.as_bytes()).await;
        // An end of input before the answer would be the end of the request.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let exchange = connection.end().await;
        door.close().await;

        let seen = door.gitlab.seen.lock().unwrap();
        let [up, down] = seen.as_slice() else { panic!("GitLab saw {} requests", seen.len()) };
        assert!(up.whole && up.body == input, "GitLab got {} bytes of {}", up.body.len(), input.len());
        let kind = up.headers.iter().find(|(name, _)| name == "content-type").map(|(_, value)| value.as_str());
        assert_eq!(kind, Some("multipart/form-data; boundary=x"));
        assert_eq!((down.method.as_str(), down.body.len()), ("GET", 0));
        let mut answered = exchange.answered.as_slice();
        for status in ["201", "200"] {
            let head = answered.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
            assert!(answered.starts_with(format!("HTTP/1.1 {status}").as_bytes()));
            assert_eq!(&answered[head..head + input.len()], input);
            answered = &answered[head + input.len()..];
        }
        assert!(answered.is_empty());
    });
}
