//! A guest with a busy job, over TCP: greeting, hand-out, one artifact, then a piece of trace a second.

use dayfly::rng::Rng;
use dayfly_guest_config::{GuestConfig, Pass};
use dayfly_test_guest::boot::{door, guest_token};
use dayfly_test_guest::http::request;
use dayfly_test_guest::job::{MULTIPART, ask, multipart, patch, upload_path};
use dayfly_test_guest::{Answer, Connection, Job};
use serde_json::Value;
use std::io;
use std::time::Duration;
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
    let Begun { mut runner, mut job } = begin(config, rng).await?;
    upload(config, rng, &job).await?;

    let piece = [b'.'; PIECE_BYTES - 1].into_iter().chain([b'\n']).collect::<Vec<u8>>();
    loop {
        call(&mut runner, &patch(job.id, &job.token, job.sent, &piece), 202).await?;
        job.sent += PIECE_BYTES;
        tokio::time::sleep(PIECE_EVERY).await;
    }
}

/// A guest runner that has told GitLab that its job runs.
pub(crate) struct Begun {
    pub(crate) runner: Connection<TcpStream>,
    pub(crate) job: Job,
}

/// Asks for its job, and says that it runs.
pub(crate) async fn begin(config: &GuestConfig, rng: &Rng) -> io::Result<Begun> {
    let token = guest_token(config).ok_or_else(|| bad("no guest token"))?;
    let mut runner = connect(config, rng).await?;
    let answer = call(&mut runner, &ask(&token), 201).await?;
    let payload: Value = serde_json::from_slice(&answer.body)?;
    let job = Job::new(&payload).ok_or_else(|| bad("no job in the payload"))?;
    call(&mut runner, &job.begin(), 200).await?;
    Ok(Begun { runner, job })
}

/// On a connection of its own, as the runner's helper does.
async fn upload(config: &GuestConfig, rng: &Rng, job: &Job) -> io::Result<()> {
    let headers = [("Content-Type", MULTIPART), ("Job-Token", job.token.as_str())];
    let message = request("POST", &upload_path(job.id), &headers, multipart(&vec![b'x'; ARTIFACT_BYTES]));
    let mut helper = connect(config, rng).await?;
    call(&mut helper, &message, 201).await.map(drop)
}

/// One call, and the answer that it must have.
pub(crate) async fn call(runner: &mut Connection<TcpStream>, request: &[u8], wanted: u16) -> io::Result<Answer> {
    let answer = runner.exchange(request).await?;
    if answer.status == wanted {
        Ok(answer)
    } else {
        let what =
            String::from_utf8_lossy(request.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
        Err(io::Error::other(format!("{what} was answered {}", answer.status)))
    }
}

/// A connection behind the relay's side of the greeting.
pub(crate) async fn connect(config: &GuestConfig, rng: &Rng) -> io::Result<Connection<TcpStream>> {
    let pass = Pass::from_text(&config.pass).ok_or_else(|| bad("no pass"))?;
    let door = door(config).ok_or_else(|| bad("no door"))?;
    let stream = TcpStream::connect(door).await?;
    stream.set_nodelay(true)?;
    let mut connection = Connection::new(stream);
    connection.greet(&pass, rng.bytes(), b"").await?;
    Ok(connection)
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
