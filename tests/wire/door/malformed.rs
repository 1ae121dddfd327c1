//! Raw bytes after a right greeting: what is no request that we serve, and what is one all the same.

use super::support::{Door, JOB, JOB_TOKEN, Setup};
use dayfly::guest::Limits;

/// Would reach GitLab, were it ever served.
fn smuggled() -> String {
    format!("GET /api/v4/jobs/{JOB}/runtime_environment_key HTTP/1.1\r\nHost: h\r\nJob-Token: {JOB_TOKEN}\r\n\r\n")
}

/// A request with these lines behind `Host` and these bytes behind its head.
fn with(fields: &str, body: &str) -> Vec<u8> {
    let path = format!("/api/v4/jobs/{JOB}/artifacts");
    let upload = format!("Content-Type: multipart/form-data; boundary=x\r\nJob-Token: {JOB_TOKEN}");
    format!("POST {path} HTTP/1.1\r\nHost: h\r\n{upload}\r\n{fields}\r\n\r\n{body}").into_bytes()
}

/// A request with this line.
fn line(line: &str) -> Vec<u8> {
    format!("{line}\r\nHost: h\r\nJob-Token: {JOB_TOKEN}\r\n\r\n").into_bytes()
}

fn raw(text: impl AsRef<[u8]>) -> Vec<u8> {
    text.as_ref().to_vec()
}

/// Heads that are refused, with the status.
fn refused() -> Vec<(Vec<u8>, u16)> {
    let key = format!("/api/v4/jobs/{JOB}/runtime_environment_key");
    let mut cases: Vec<(Vec<u8>, u16)> = Vec::new();
    let chunked = "0\r\n\r\n";
    // Which body is it?
    for fields in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 0\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, gzip",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunkedx",
        "Transfer-Encoding: chun ked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding:",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        " Transfer-Encoding: chunked",
        "X: y\r\n Transfer-Encoding: chunked",
        "Transfer-Encoding:\r\n chunked",
        "Transfer-Encoding:\x0bchunked",
        "Transfer-Encoding: chunked\r\n\tx",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\ncontent-length: 0",
        "Content-Length: 5, 5",
        "Content-Length: 5 5",
        "Content-Length: +5",
        "Content-Length: -1",
        "Content-Length: 0x5",
        "Content-Length: 5a",
        "Content-Length: 5.0",
        "Content-Length: 5;",
        "Content-Length: \"5\"",
        "Content-Length:",
        "Content-Length: 18446744073709551616",
        "Content-Length: 99999999999999999999",
        "Content-Length : 5",
        "Content-Length: 5\r\n ,6",
    ] {
        cases.push((with(fields, chunked), 400));
    }
    // Which lines are it?
    for text in [
        format!("GET {key} HTTP/1.1\nHost: h\n\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\n\n"),
        format!("GET {key} HTTP/1.1\rHost: h\r\r"),
        format!("GET {key} HTTP/1.1\r\r\nHost: h\r\n\r\n"),
        format!("GET {key} HTTP/1.1\n\rHost: h\n\r\n\r"),
        format!("\r\nGET {key} HTTP/1.1\r\nHost: h\r\n\r\n"),
        format!("\nGET {key} HTTP/1.1\r\nHost: h\r\n\r\n"),
        format!(" GET {key} HTTP/1.1\r\nHost: h\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\n Host: h\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX: a\nY: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX: a\x1b[31mb\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX: a\x7fb\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX: a\u{e9}b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX\u{202e}: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\n: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX Y: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX(: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\n\"X\": b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX@y: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX,y: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\n[X]: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\n{{X}}: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX=y: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nX\\y: b\r\n\r\n"),
        // Whose is it?
        format!("GET {key} HTTP/1.1\r\nJob-Token: {JOB_TOKEN}\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n"),
        format!("GET {key} HTTP/1.1\r\n\r\n"),
    ] {
        cases.push((text.into_bytes(), 400));
    }
    // What is asked?
    for text in [
        format!("GET {key}"),
        format!("GET {key} "),
        format!("GET {key} HTTP/0.9"),
        format!("GET {key} HTTP/1.0"),
        format!("GET {key} HTTP/1.2"),
        format!("GET {key} HTTP/2.0"),
        format!("GET {key} HTTP/11"),
        format!("GET {key} HTTP/1.1x"),
        format!("GET {key} HTTP/1,1"),
        format!("GET {key} HTTP/ 1.1"),
        format!("GET {key} HTTP/1.1 "),
        format!("GET {key} http/1.1"),
        format!("GET {key} HTTPS/1.1"),
        format!("GET {key}  HTTP/1.1"),
        format!("GET  {key} HTTP/1.1"),
        format!("GET\t{key}\tHTTP/1.1"),
        format!("GET {key} x HTTP/1.1"),
        format!("get {key} HTTP/1.1"),
        format!("Get {key} HTTP/1.1"),
        format!("G3T {key} HTTP/1.1"),
        format!("GET: {key} HTTP/1.1"),
        format!("{} {key} HTTP/1.1", "G".repeat(17)),
        format!("{} {key} HTTP/1.1", "G".repeat(5000)),
        format!("{key} GET HTTP/1.1"),
        "GET HTTP/1.1".to_owned(),
        "GET".to_owned(),
        format!("GET http://h{key} HTTP/1.1"),
        format!("GET https://gitlab.example{key} HTTP/1.1"),
        format!("GET h{key} HTTP/1.1"),
        format!("GET {} HTTP/1.1", &key[1..]),
        format!("GET {key}#x HTTP/1.1"),
        format!("GET {key}\\ HTTP/1.1"),
        format!("GET {key}\" HTTP/1.1"),
        format!("GET {key}< HTTP/1.1"),
        format!("GET {key}{{}} HTTP/1.1"),
        format!("GET {key}| HTTP/1.1"),
        format!("GET {key}^ HTTP/1.1"),
        format!("GET {key}\u{e9} HTTP/1.1"),
        "CONNECT gitlab.example:443 HTTP/1.1".to_owned(),
        "CONNECT h:80 HTTP/1.1".to_owned(),
        "OPTIONS * HTTP/1.1".to_owned(),
        "GET * HTTP/1.1".to_owned(),
        "GET ? HTTP/1.1".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM".to_owned(),
        "SSH-2.0-OpenSSH_9.2".to_owned(),
        "EHLO guest".to_owned(),
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2".to_owned(),
        format!("DAYFLY 1 {}", "0".repeat(32)),
        "0".repeat(64),
        r#"{"method":"GET"}"#.to_owned(),
    ] {
        cases.push((line(&text), 400));
    }
    // What is it at all?
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"\x00\x00\x00\x00\x00\x00",
        b"\xff\xfe\xfd",
        b"\x80\x2e\x01\x03\x01",
        b"\x05\x01\x00",
        b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
        b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58",
        b"\x1f\x8b\x08\x00",
        b"\x1b[2J",
        b"\x7fELF",
        b"\r\n\r\n",
    ] {
        cases.push((raw(bytes), 400));
    }
    // How much is it?
    cases.push((line(&format!("GET /{} HTTP/1.1", "a".repeat(2048))), 414));
    cases.push((line(&format!("GET /{} HTTP/1.1", "a".repeat(70_000))), 414));
    cases.push((line(&format!("GET {key}?{} HTTP/1.1", "a".repeat(2048))), 414));
    cases.push((with(&"X: y\r\n".repeat(101), ""), 431));
    cases.push((with(&format!("{}X: y", "X: y\r\n".repeat(45)), ""), 431));
    cases.push((with(&format!("X: {}", "y".repeat(64 * 1024)), ""), 431));
    cases.push((with(&format!("X: {}", "y".repeat(500_000)), ""), 431));
    cases.push((with(&format!("{}: y", "X".repeat(20_000)), ""), 431));
    cases.push((with(&format!("Cookie: {}", "a=b; ".repeat(4000)), ""), 431));
    cases
}

async fn open() -> Door {
    let limits = Limits { requests_per_second: 1_000_000, requests_burst: 1_000_000, ..Limits::default() };
    Setup { limits, ..Setup::default() }.open().await
}

/// T6, T8, P3, P6, P10: each is answered with its status and closed, in one segment with the
/// greeting's last line and apart; what stands behind it is never served.
#[tokio::test(start_paused = true)]
async fn malformed_heads_are_refused_and_nothing_behind_them_is_served() {
    let door = open().await;
    let cases = refused();
    for (bytes, status) in &cases {
        let name: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
        let mut whole = bytes.clone();
        whole.extend_from_slice(smuggled().as_bytes());
        for together in [true, false] {
            let mut guest = door.connect().await;
            guest.greet(&door.pass, if together { &whole } else { b"" }).await;
            if !together {
                guest.try_send(&whole).await;
            }
            let reply = guest.try_reply().await.unwrap_or_else(|| panic!("no answer to {name:?}"));
            assert_eq!((reply.status, reply.header("connection")), (*status, Some("close")), "{name:?}");
            assert!(reply.text().starts_with(&format!(r#"{{"message":"{status} "#)), "{name:?}: {}", reply.text());
            assert!(guest.rest().await.is_empty(), "{name:?}");
        }
    }
    assert_eq!((door.gitlab.contacts(), door.told()), (0, vec!["greeted".to_owned()]));
    assert!(cases.len() >= 120, "{}", cases.len());
    println!("figure door.malformed_heads {}", cases.len());
}

/// P4: a body whose framing breaks, or that ends early, is no update and no trace.
#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_is_no_update() {
    let door = open().await;
    let update = format!(r#"{{"token":"{JOB_TOKEN}","state":"success"}}"#);
    let size = format!("{:x}", update.len());
    let mut cases = 0;
    for body in [
        format!("0x{size}\r\n{update}\r\n0\r\n\r\n"),
        format!("{size} \r\n{update}\r\n0\r\n\r\n"),
        format!(" {size}\r\n{update}\r\n0\r\n\r\n"),
        format!("+{size}\r\n{update}\r\n0\r\n\r\n"),
        format!("-{size}\r\n{update}\r\n0\r\n\r\n"),
        format!("{size}\n{update}\r\n0\r\n\r\n"),
        format!("{size}\r\n{update}\n0\r\n\r\n"),
        format!("{size}\r\n{update}0\r\n\r\n"),
        format!("{size}\r\n{update}\r\n0\n\n"),
        format!("{size}\r\n{update}\r\n0\r\n\n"),
        format!("{size}\r\n{update}\r\n0\r\nA\nB: c\r\n\r\n"),
        format!("{size}\r\n{update}\r\n0\r\nA\0: c\r\n\r\n"),
        format!("{size};{}\r\n{update}\r\n0\r\n\r\n", "x".repeat(300)),
        format!("{size};\0\r\n{update}\r\n0\r\n\r\n"),
        format!("fffffffffffffffff\r\n{update}\r\n0\r\n\r\n"),
        format!("1000000000000000\r\n{update}\r\n0\r\n\r\n"),
        format!("\r\n{update}\r\n0\r\n\r\n"),
        format!(";\r\n{update}\r\n0\r\n\r\n"),
        format!("g\r\n{update}\r\n0\r\n\r\n"),
        format!("{size}\r\n{update}\r\n0\r\n{}\r\n\r\n", "T: ".to_owned() + &"x".repeat(5000)),
    ] {
        cases += 1;
        let head = format!("PUT /api/v4/jobs/{JOB} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n");
        let mut guest = door.guest().await;
        guest.try_send(format!("{head}{body}{}", smuggled())).await;
        let reply = guest.try_reply().await;
        assert!(reply.as_ref().is_none_or(|reply| reply.status == 400), "{body:?}: {reply:?}");
        assert!(guest.rest().await.is_empty(), "{body:?}");
    }
    for head in ["Content-Length: 1000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n3e8\r\n"] {
        cases += 1;
        let mut guest = door.guest().await;
        guest.send(format!("PUT /api/v4/jobs/{JOB} HTTP/1.1\r\nHost: h\r\n{head}{update}")).await;
        // The lying length never comes: no progress for 60 s.
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("connection")), (408, Some("close")), "{head:?}");
    }
    assert!(door.job.lock().unwrap().verdicts.is_empty(), "a verdict out of {cases} broken bodies");
    assert_eq!(door.gitlab.contacts(), 0);
}

/// T6: what is well-formed, if unusual, reaches GitLab as exactly the requests that it is.
#[tokio::test(start_paused = true)]
async fn unusual_but_right_requests_are_the_requests_they_are() {
    let door = open().await;
    door.gitlab.answer_after_body(201, &[], "201");
    let upload = format!("POST /api/v4/jobs/{JOB}/artifacts");
    let key = format!("GET /api/v4/jobs/{JOB}/runtime_environment_key");
    for (bytes, expected) in [
        (with("Transfer-Encoding: chunked", "3\r\nabc\r\n0\r\n\r\n"), vec![(&upload, "abc")]),
        (with("transfer-encoding:CHUNKED  ", "0003\r\nabc\r\n000\r\n\r\n"), vec![(&upload, "abc")]),
        (with("Transfer-Encoding: chunked", "3;a=b;c\r\nabc\r\n0;d\r\nT: x\r\nU: y\r\n\r\n"), vec![(&upload, "abc")]),
        (
            with("Transfer-Encoding: chunked", "A\r\n0123456789\r\n1\r\n\n\r\n0\r\n\r\n"),
            vec![(&upload, "0123456789\n")],
        ),
        (with("Content-Length: 03", "abc"), vec![(&upload, "abc")]),
        (with("Content-Length: 0", ""), vec![(&upload, "")]),
        (with("Content-Length: 5", "0\r\n\r\n"), vec![(&upload, "0\r\n\r\n")]),
        (with("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 1", "x"), vec![(&upload, "x")]),
        (with("Content-Length: 3\r\nJOB_TOKEN: x\r\nContent_Length: 9", "abc"), vec![(&upload, "abc")]),
        (smuggled().into_bytes(), vec![(&key, "")]),
        (
            [
                with("Transfer-Encoding: chunked", "1\r\na\r\n0\r\n\r\n"),
                with("Content-Length: 1", "b"),
                smuggled().into(),
            ]
            .concat(),
            vec![(&upload, "a"), (&upload, "b"), (&key, "")],
        ),
        // A request in a body is a body.
        (with(&format!("Content-Length: {}", smuggled().len()), &smuggled()), vec![(&upload, smuggled().leak())]),
    ] {
        let text = String::from_utf8(bytes.clone()).unwrap();
        for together in [true, false] {
            door.gitlab.seen.lock().unwrap().clear();
            let mut guest = door.connect().await;
            guest.greet(&door.pass, if together { &bytes } else { b"" }).await;
            if !together {
                for byte in &bytes {
                    guest.send([*byte]).await;
                }
            }
            for _ in &expected {
                assert_eq!(guest.reply().await.status, 201, "{text:?}");
            }
            let seen = door.gitlab.seen.lock().unwrap().clone();
            let seen: Vec<_> = seen.iter().map(|s| (s.line.as_str(), std::str::from_utf8(&s.body).unwrap())).collect();
            let expected: Vec<_> = expected.iter().map(|(line, body)| (line.as_str(), *body)).collect();
            assert_eq!(seen, expected, "{text:?}");
        }
    }
}

/// P6: neither CONNECT nor an upgrade ever opens a tunnel; what follows is HTTP or nothing.
#[tokio::test(start_paused = true)]
async fn there_is_no_tunnel() {
    let door = open().await;
    let mut guest = door.guest().await;
    guest.send("CONNECT /api/v4/user HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(guest.reply().await.status, 404);
    let mut guest = door.guest().await;
    guest.send("GET /api/v4/runners/router/discovery HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n").await;
    assert_eq!(guest.reply().await.status, 501);
    guest.send(b"\x81\x05hello").await;
    assert_eq!(guest.reply().await.status, 400);
    assert!(guest.rest().await.is_empty());
}
