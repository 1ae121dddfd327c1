//! A guest with a busy job, over TCP: greeting, hand-out, one artifact, then a piece of trace a second.

use dayfly::rng::Rng;
use dayfly_guest_config::{Greeting, GuestConfig, Pass};
use dayfly_test_tools::host::{door, guest_token};
use dayfly_test_tools::http::{Answer, Connection};
use serde_json::{Value, json};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A line-happy job: 4 KiB a second, more than most.
const PIECE_BYTES: usize = 4096;
const PIECE_EVERY: Duration = Duration::from_secs(1);

/// Large enough to fill every buffer between guest and GitLab.
const ARTIFACT_BYTES: usize = 1 << 20;

/// Works on its job for ever.
///
/// # Errors
/// The guest's first trouble; a job that is disturbed is not one to measure with.
pub(crate) async fn run(config: &GuestConfig, rng: &Rng) -> io::Result<()> {
    let Begun { mut runner, job, token: job_token } = begin(config, rng).await?;
    let job_token = job_token.as_str();
    upload(config, rng, job, job_token).await?;

    let piece = [b'.'; PIECE_BYTES - 1].into_iter().chain([b'\n']).collect::<Vec<u8>>();
    let mut sent = 0;
    loop {
        let range = format!("{sent}-{}", sent + PIECE_BYTES - 1);
        let headers = [("Content-Range", range.as_str()), ("Content-Type", "text/plain"), ("Job-Token", job_token)];
        let path = format!("/api/v4/jobs/{job}/trace?debug_trace=false");
        call(&mut runner, "PATCH", &path, &headers, &piece, 202).await?;
        sent += PIECE_BYTES;
        tokio::time::sleep(PIECE_EVERY).await;
    }
}

/// A guest runner that has told GitLab that its job runs.
pub(crate) struct Begun {
    pub(crate) runner: Connection,
    pub(crate) job: u64,
    /// The job token.
    pub(crate) token: String,
}

/// Asks for its job, and says that it runs.
pub(crate) async fn begin(config: &GuestConfig, rng: &Rng) -> io::Result<Begun> {
    let token = guest_token(config).ok_or_else(|| bad("no guest token"))?;
    let mut runner = connect(config, rng).await?;
    let info = json!({"name": "gitlab-runner", "version": "19.3.0", "features": {"cancel_gracefully": true}});
    let ask = json!({"info": info, "token": token, "system_id": "s_0123456789ab"}).to_string();
    let headers = [("Content-Type", "application/json"), ("Runner-Token", token.as_str())];
    let answer = call(&mut runner, "POST", "/api/v4/jobs/request", &headers, ask.as_bytes(), 201).await?;
    let payload: Value = serde_json::from_slice(&answer.body)?;
    let job = payload["id"].as_u64().ok_or_else(|| bad("no job id"))?;
    let job_token = payload["token"].as_str().ok_or_else(|| bad("no job token"))?.to_owned();

    let running = json!({"token": job_token, "state": "running", "output": {}}).to_string();
    let headers = [("Content-Type", "application/json"), ("Job-Token", job_token.as_str())];
    call(&mut runner, "PUT", &format!("/api/v4/jobs/{job}"), &headers, running.as_bytes(), 200).await?;
    Ok(Begun { runner, job, token: job_token })
}

/// On a connection of its own, as the runner's helper does.
async fn upload(config: &GuestConfig, rng: &Rng, job: u64, job_token: &str) -> io::Result<()> {
    let mut body = b"--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"artifacts.zip\"\r\nContent-Type: application/octet-stream\r\n\r\n".to_vec();
    body.resize(body.len() + ARTIFACT_BYTES, b'x');
    body.extend_from_slice(b"\r\n--B--\r\n");
    let path = format!("/api/v4/jobs/{job}/artifacts?artifact_format=zip&artifact_type=archive");
    let headers = [("Content-Type", "multipart/form-data; boundary=B"), ("Job-Token", job_token)];
    let mut helper = connect(config, rng).await?;
    call(&mut helper, "POST", &path, &headers, &body, 201).await.map(drop)
}

pub(crate) async fn call(
    connection: &mut Connection,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    wanted: u16,
) -> io::Result<Answer> {
    let answer = connection.exchange(&request(method, path, headers, body)).await?;
    if answer.status == wanted {
        Ok(answer)
    } else {
        Err(io::Error::other(format!("{method} {path} was answered {}", answer.status)))
    }
}

/// A request as bytes.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut message = format!("{method} {path} HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        message.push_str(&format!("{name}: {value}\r\n"));
    }
    message.push_str("\r\n");
    let mut message = message.into_bytes();
    message.extend_from_slice(body);
    message
}

pub(crate) async fn connect(config: &GuestConfig, rng: &Rng) -> io::Result<Connection> {
    Connection::new(greeted(config, rng).await?)
}

/// A connection behind the relay's side of the greeting.
pub(crate) async fn greeted(config: &GuestConfig, rng: &Rng) -> io::Result<TcpStream> {
    let pass = Pass::from_text(&config.pass).ok_or_else(|| bad("no pass"))?;
    let door = door(config).ok_or_else(|| bad("no door"))?;
    let mut stream = TcpStream::connect(door).await?;
    let nonce = rng.bytes();
    stream.write_all(format!("{}\r\n", Greeting::opening(&nonce)).as_bytes()).await?;
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await?);
    }
    let line = String::from_utf8_lossy(&line);
    let greeting = Greeting::relay(&pass, nonce, line.trim_end()).map_err(io::Error::other)?;
    stream.write_all(format!("{}\r\n", greeting.relay_line()).as_bytes()).await?;
    Ok(stream)
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
